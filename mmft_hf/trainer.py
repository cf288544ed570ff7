"""`MMFTTrainer`: the stock Trainer with the MMFT loss, caption draws and class logits. Subclassed at the hooks only."""

from __future__ import annotations

import copy
import logging
import math
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset
from transformers import CLIPModel, CLIPProcessor, EvalPrediction, Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from .checkpoints import check_same_model, is_checkpoint, is_complete, last_complete_checkpoint
from .collator import IGNORED, MMFTDataCollator
from .configuration import MMFTConfig
from .errors import UserError
from .losses import MMFTLoss, anchors_with_positives
from .metrics import report
from .modeling import encode_images, logit_scale
from .progress import EpochLines
from .prompts import TEMPLATES
from .prototypes import ClassPrototypes
from .sampling import EpochSampler
from .towers import checkpoint_state, lora_layers, merged_state
from .training_pushes import TrainingPushes
from .views import ImageView, TrainingView

logger = logging.getLogger(__name__)


class MMFTTrainer(TrainingPushes, Trainer):
    """Fine-tunes a `CLIPModel` on images with labels and captions.

    Args:
        model (`CLIPModel`): as `load_model` returns it, in float32.
        args (`MMFTConfig`): settings of the training and of the method.
        train_dataset (`datasets.Dataset`): columns `image`, `label` (`ClassLabel`) and, where there are any, `captions`.
        eval_dataset (`datasets.Dataset`, *optional*): columns `image`, `label`: validation, which selects the best
            epoch. Without it the last step is kept.
        processing_class (`CLIPProcessor`): of the model.
        compute_metrics (*optional*): gets class logits `(n, C)` and labels `(n,)`; the default gives `accuracy`,
            `top5_accuracy` and `mean_per_class_accuracy`.

    Each step makes one forward of the wrapped model with B images and B texts; one caption per image is drawn afresh in
    every epoch. Evaluation compares images with the class prototypes of the current weights (`args.prototypes`); its
    `eval_loss` is the cross-entropy of the class logits, which, unlike a contrastive loss, no batch size can move.

    Raises:
        UserError: a model, a data set or a checkpoint that does not fit.

    References: Enomoto & Yamaguchi 2026, "MultiModal Fine-tuning with Synthetic Captions" (arXiv 2601.21426).
    """

    def __init__(
        self,
        model: CLIPModel,
        args: MMFTConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: CLIPProcessor | None = None,
        compute_metrics=None,
        **kwargs,
    ):
        # -- model and data ----------------------------------------------------------------------------------------
        if not hasattr(model, "logit_scale") or not hasattr(model, "get_image_features"):
            raise UserError(f"model: expected a CLIPModel, found {type(model).__name__}. Use mmft_hf.load_model(…).")
        if hasattr(model, "get_base_model") or getattr(model, "_hf_peft_config_loaded", False):
            raise UserError(
                "model: expected a CLIPModel without an adapter of PEFT, which would not keep the trained logit scale. Use "
                'mmft_hf.set_towers(model, "lora", "lora").'
            )
        if processing_class is None:
            raise UserError("processing_class: expected the CLIPProcessor of the model. Use mmft_hf.load_model(…).")
        half = sorted({str(p.dtype) for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)})
        if half:
            raise UserError(
                f"model: expected float32 weights, found {half[0]}, in which AdamW's steps vanish. Load it with "
                "mmft_hf.load_model(…) or dtype=torch.float32, and use bf16=True for speed."
            )
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if dataset is not None:
                _check_dataset(name, dataset)
        if args.n_gpu > 1:
            raise UserError(
                f"expected one process per GPU, found one process with {args.n_gpu} GPUs. Type accelerate launch "
                f"--num_processes {args.n_gpu} recipes/finetune.py …, or set CUDA_VISIBLE_DEVICES=0 to use one."
            )
        self.class_names = train_dataset.features["label"].names if train_dataset is not None else None
        if (
            train_dataset is not None
            and eval_dataset is not None
            and eval_dataset.features["label"].names != self.class_names
        ):
            raise UserError("eval_dataset: expected the class names of train_dataset, in the same order.")
        if eval_dataset is None and args.eval_strategy != "no":
            args = copy.copy(args)
            args.eval_strategy, args.eval_on_start, args.load_best_model_at_end = "no", False, False
            logger.warning("There is no eval_dataset: no epoch is selected, the last step is kept.")
        if args.gradient_accumulation_steps > 1:
            logger.warning(
                "gradient_accumulation_steps=%d averages gradients over several batches; it does not enlarge the "
                "contrastive batch, whose negatives stay within %d images per process.",
                args.gradient_accumulation_steps,
                args.per_device_train_batch_size,
            )

        # -- the stock Trainer -------------------------------------------------------------------------------------
        super().__init__(
            model=model,
            args=args,
            data_collator=kwargs.pop("data_collator", None) or MMFTDataCollator(processing_class),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics or self._class_metrics,
            **kwargs,
        )
        self.loss = MMFTLoss(args.supcon_weight, args.include_self)
        self.prototypes: ClassPrototypes | None = None
        self._sampler: EpochSampler | None = None
        self._told_fallback = False
        self._sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self._batches = 0

        # -- three lines that every contrastive Trainer needs --------------------------------------------------------
        # CLIPModel.forward takes **kwargs, so the Trainer would believe that the model divides the loss by the number
        # of accumulated items; it does not, and gradients would come out multiplied by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        # training_step divides by the accumulation steps; in transformers 5.2 accelerate would do so once more.
        if not self.is_deepspeed_enabled:
            self.accelerator.gradient_accumulation_steps = 1
        # Otherwise evaluate() would leave out the loss.
        self.can_return_loss = True
        self.label_names = ["labels"]

        self.add_callback(_SetEpoch(self))
        # One line per epoch in place of a dictionary.
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(EpochLines)
        else:
            self.remove_callback(PrinterCallback)
            self.add_callback(EpochLines(bar=False))

    # -- data -------------------------------------------------------------------------------------------------------
    def _set_signature_columns_if_needed(self):
        # Rows go to the collator, not to model.forward: nothing is unused.
        self._signature_columns = ["image", "label", "text", "box", "skipped"]

    def _get_dataloader(self, dataset, description, *args, is_training=False, **kwargs):
        if isinstance(dataset, Dataset):
            if is_training:
                dataset = TrainingView(
                    dataset,
                    self.class_names,
                    self.args.class_template,
                    self.args.seed if self.args.data_seed is None else self.args.data_seed,
                    self.args.crop_min_area,
                    self.args.on_bad_image,
                )
            else:
                name = "validation" if description == "Evaluation" else description.lower()
                dataset = ImageView(dataset, self.args.on_bad_image, name)
        return super()._get_dataloader(dataset, description, *args, is_training=is_training, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._sampler = EpochSampler(len(dataset), seed)
        return self._sampler

    # -- training ---------------------------------------------------------------------------------------------------
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """MMFT loss of one batch, through exactly one forward of the wrapped model."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        cut, skipped = inputs.pop("captions_cut"), inputs.pop("skipped")
        outputs = model(**inputs)
        # Reading a parameter of the unwrapped model is safe beside one wrapped forward: its gradient hook still fires.
        scale = logit_scale(self.accelerator.unwrap_model(model))
        losses = self.loss(outputs.image_embeds, outputs.text_embeds, labels, scale)
        self._batches += 1
        for name, value in (
            ("supcon_loss", losses["supcon"]),
            ("clip_loss", losses["clip"]),
            ("anchors_with_positives", anchors_with_positives(labels, self.args.include_self).float().mean()),
            ("captions_cut", cut.float().mean()),
            ("skipped_images", skipped.sum()),
        ):
            self._sums[name] = self._sums[name] + value.detach()
        return (losses["loss"], outputs) if return_outputs else losses["loss"]

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One forward and backward; a loss that is not finite stops the training before the weights are touched."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            self._stop_at("the loss", loss.item(), self.state.global_step + 1)
        return loss

    def _stop_at(self, what: str, value: float, step: int) -> None:
        """Raises the error of a number that is not finite. No checkpoint is saved after such an evaluation."""
        checkpoint = last_complete_checkpoint(self.args.output_dir)
        good = "good " if self.args.eval_strategy != "no" else ""  # without evaluations nobody looked at it
        kept = f"The last {good}checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet."
        raise UserError(
            f"{what} became {value} at step {step} (epoch {self.state.epoch or 0:.2f}). {kept} Type a smaller "
            "--learning_rate, or --max_grad_norm 1.0, with a new --output_dir."
        )

    def log(self, logs, start_time=None):
        """Adds the means of the loss components since the last log of a training loss."""
        if "loss" in logs and self._batches:
            for name, total in self._sums.items():
                total = self.accelerator.reduce(torch.as_tensor(total, dtype=torch.float32, device=self.args.device))
                logs[name] = total.item() / (1 if name == "skipped_images" else self._batches * self.args.world_size)
            self._sums.clear()
            self._batches = 0
        super().log(logs, start_time)

    # -- evaluation -------------------------------------------------------------------------------------------------
    def build_prototypes(self) -> ClassPrototypes:
        """Prototypes of the current weights, from the source that `args.prototypes` names."""
        model, processor = self.accelerator.unwrap_model(self.model), self.processing_class
        source, template = self.args.prototypes, self.args.class_template
        batch_size = self.args.per_device_eval_batch_size
        progress = self.is_world_process_zero() and not self.args.disable_tqdm
        if source == "captions":
            found = ClassPrototypes.from_captions(model, processor, self.train_dataset, template, batch_size, progress)
            if found.fallback_classes and not self._told_fallback:
                self._told_fallback = True
                logger.warning("Classes without captions use the template: %s", ", ".join(found.fallback_classes))
            return found
        if source == "images":
            return ClassPrototypes.from_images(
                model,
                processor,
                self.train_dataset,
                batch_size,
                self.args.on_bad_image,
                self.args.dataloader_num_workers,
                progress,
            )
        # The user's own template comes first among several.
        templates = template if source == "template" else [template, *(t for t in TEMPLATES if t != template)]
        return ClassPrototypes.from_templates(model, processor, self.class_names, templates)

    def evaluation_loop(self, *args, **kwargs):
        """The stock loop, after prototypes of the current weights were built."""
        self.prototypes, self.prototypes_step = self.build_prototypes(), self.state.global_step
        output = super().evaluation_loop(*args, **kwargs)
        for name, value in output.metrics.items():
            if name.endswith("_loss") and not math.isfinite(value):
                self._stop_at("the validation loss", value, self.state.global_step)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Class logits `(B, C)` of a batch, with their mean cross-entropy as the loss."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with torch.no_grad(), self.accelerator.autocast():
            embeds = encode_images(self.accelerator.unwrap_model(model), inputs["pixel_values"])
        logits = self.prototypes.logits(embeds)
        known = (labels != IGNORED).sum().clamp(min=1)
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / known
        return (loss, None, None) if prediction_loss_only else (loss, logits, labels)

    def _class_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        result = report(prediction.predictions, prediction.label_ids, self.prototypes.class_names)
        keys = ("accuracy", "top5_accuracy", "mean_per_class_accuracy")
        return {key: result[key] for key in keys if key in result}

    def create_model_card(self, *args, **kwargs):
        """Nothing: the stock card would overwrite the one with the results, which the output folder gets at the end."""

    # -- selection, checkpoints, resume ------------------------------------------------------------------------------
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
        super()._save(output_dir, state_dict)
        # A pickle that nothing reads, with all settings of this machine in it.
        (folder / "training_args.bin").unlink(missing_ok=True)

    def _issue_warnings_after_load(self, load_result):
        # What a checkpoint with LoRA lacks is what the base model has; that it has all else is checked before.
        if not lora_layers(self.model):
            super()._issue_warnings_after_load(load_result)

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
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)


class _SetEpoch(TrainerCallback):
    """Tells the sampler its epoch also where the loader is wrapped, as on a resume within an epoch of several processes."""

    def __init__(self, trainer: MMFTTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer._sampler is not None:
            self.trainer._sampler.set_epoch(int(state.epoch or 0))


def _check_dataset(name: str, dataset: Dataset) -> None:
    for column in ("image", "label"):
        if column not in dataset.column_names:
            raise UserError(
                f"{name}: expected columns image and label, found {', '.join(dataset.column_names)}. Use "
                "mmft_hf.load_captioned_dataset(…), or dataset.rename_columns({…})."
            )
    if not isinstance(dataset.features["label"], ClassLabel):
        raise UserError(
            f"{name}: expected labels with class names (ClassLabel), found {dataset.features['label']}. Use "
            "mmft_hf.load_captioned_dataset(…), or dataset.class_encode_column('label')."
        )
