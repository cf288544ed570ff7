"""Checkpoints of the Trainer: what they hold, which is the best, which can be resumed, and what none is made of."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch

from ..core.errors import UserError
from ..model.embedding import quick_attention
from ..model.towers import checkpoint_state, lora_layers, merged_state
from .checkpoints import (
    check_same_batches,
    check_same_model,
    is_checkpoint,
    is_complete,
    last_complete_checkpoint,
    rotate,
)

logger = logging.getLogger(__name__)


class TrainingCheckpoints:
    """A part of `MMFTTrainer`."""

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        """Makes the untuned model a candidate: the stock Trainer evaluates it on start, but cannot select it."""
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        start = Path(self.args.output_dir) / "checkpoint-0"
        if self.state.global_step == 0 and self.args.load_best_model_at_end and self.state.best_metric is None:
            self._determine_best_metric(metrics, trial)
            # The stock code takes a best step of 0 for none.
            self.state.best_model_checkpoint = str(start)
            self._save_checkpoint(self.model_wrapped, trial)
        return metrics

    def _run_epoch(self, *args, **kwargs):
        # A run that was cut after its last step, within an epoch, would otherwise make one step more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        if lora_layers(model):
            state_dict = checkpoint_state(model, state_dict) if is_checkpoint(folder) else merged_state(model)
        if not is_checkpoint(folder):  # what loss terms train of their own is no part of the model
            state_dict = model.state_dict() if state_dict is None else state_dict
            state_dict = {name: value for name, value in state_dict.items() if not name.startswith("loss_terms.")}
        if is_checkpoint(folder):
            # save_pretrained gives some weights (those of ViT and AltCLIP) the names of older versions; the stock Trainer
            # reads a checkpoint by the names of now, and would pass over the others with a warning.
            model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save(output_dir, state_dict)
        finally:
            vars(model).pop("save_pretrained", None)
        # A pickle that nothing reads, with all settings of this machine in it.
        (folder / "training_args.bin").unlink(missing_ok=True)

    def _expect_finite_losses(self, but: int = 0) -> None:
        """Looks at the losses of the last steps, `but` for so many."""
        while len(self._unseen_losses) > but:
            step, loss, arrived = self._unseen_losses.pop(0)
            if arrived is not None:
                arrived.synchronize()
            if not torch.isfinite(loss):
                self.stop_at("the loss", loss.item(), step)

    def stop_at(self, what: str, value: float, step: int) -> None:
        """Raises the error of a number that is not finite. No checkpoint is saved after such an evaluation."""
        checkpoint = last_complete_checkpoint(self.args.output_dir)
        good = "good " if self.args.eval_strategy != "no" else ""  # without evaluations nobody looked at it
        kept = f"The last {good}checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet."
        raise UserError(
            f"{what} became {value} at step {step} (epoch {self.state.epoch or 0:.2f}). {kept} Type a smaller "
            "--learning_rate, or --max_grad_norm 1.0, with a new --output_dir."
        )

    def _issue_warnings_after_load(self, load_result):
        # What a checkpoint with LoRA lacks is what the base model has; that it has all else is checked before.
        if not lora_layers(self.model):
            super()._issue_warnings_after_load(load_result)

    def _save_checkpoint(self, *args, **kwargs):
        self._expect_finite_losses()
        # The stock rotation deletes any folder called checkpoint-…, a user's own, too.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and limit:
            rotate(Path(self.args.output_dir), limit, self.state.global_step, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, *args, **kwargs):
        super()._load_from_checkpoint(*args, **kwargs)
        self.forget_prototypes()

    def _load_best_model(self):
        super()._load_best_model()
        self.forget_prototypes()

    def _init_training_state(self, *args, **kwargs):
        result = super()._init_training_state(*args, **kwargs)
        # The state names the best checkpoint by the path it had: a folder that was moved must not lose it.
        if self.state.best_global_step is not None and self.state.best_metric is not None:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            if best.is_dir():
                self.state.best_model_checkpoint = str(best)
        return result

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Trains, or goes on from a checkpoint; the result is the same, bit for bit on a CPU with as many threads.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the last complete one of `args.output_dir`. A
                checkpoint that a kill left half-written is passed over; where there is none, training starts anew.

        Raises:
            UserError: the checkpoint is incomplete or belongs to another model; a loss that is not finite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                logger.warning("There is no complete checkpoint in %s: training starts anew.", self.args.output_dir)
        elif resume_from_checkpoint and not is_complete(Path(resume_from_checkpoint)):
            found = last_complete_checkpoint(self.args.output_dir)
            raise UserError(
                f"--resume_from_checkpoint {resume_from_checkpoint}: expected a complete checkpoint of this Trainer"
                + (f". Type --resume_from_checkpoint {found}." if found else "; there is none in the output folder.")
            )
        if resume_from_checkpoint:
            check_same_model(Path(resume_from_checkpoint), self.accelerator.unwrap_model(self.model))
            check_same_batches(Path(resume_from_checkpoint), self.args)
        with quick_attention(self.accelerator.unwrap_model(self.model), self.args.bf16):
            result = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        self._expect_finite_losses()  # that of the last step, where nothing was evaluated or saved after it
        return result
