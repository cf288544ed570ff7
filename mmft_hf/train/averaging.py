"""Weight averaging: an exponential moving average of the trained weights is evaluated and saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers.trainer_callback import TrainerCallback

from ..core.errors import UserError
from .checkpoints import is_checkpoint

# A checkpoint's model file has the averaged weights; this one has the trained weights, from which a resume continues.
FILE_NAME = "unaveraged.safetensors"


def share_of_step(decay: float, step: int) -> float:
    """Share of the weights after `step` (from 1 on) in the updated average: `(1 - decay) / (1 - decay ** step)`.

    The average after n steps then weights the weights after each step by `decay ** (n - step)`, also in short runs. The
    untuned weights, with which an average without this correction starts, have no part in it.

    References: Kingma & Ba 2015, "Adam" (arXiv 1412.6980), section 3, for this correction of the start.
    """
    return (1 - decay) / (1 - decay**step)


class WeightAveraging:
    """The part of `MMFTTrainer` that averages weights, with `args.weight_averaging` as the decay; 0: no averaging.

    The average of all trained weights (towers, LoRA matrices, logit scale) is kept next to the model and updated after each
    optimizer step. It is swapped into the model for evaluation and saving, and permanently when training ends. Every process
    does the same. A checkpoint holds both.

    References: Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization" (arXiv 1803.05407);
    Morales-Brotons et al. 2024, "Exponential moving average of weights in deep learning" (arXiv 2411.18704).
    """

    # The average, or the trained weights while the average is in the model. None: no training is under way.
    _beside: dict[str, Tensor] | None = None
    _average_is_in = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.weight_averaging:
            self.add_callback(_Average(self))

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """All trainable parameters, by name."""
        model = self.accelerator.unwrap_model(self.model)
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def _exchange(self) -> None:
        """Swaps average and trained weights; the tensors change places, nothing is copied."""
        for name, parameter in self.trained_parameters().items():
            parameter.data, self._beside[name] = self._beside[name], parameter.data
        self._average_is_in = not self._average_is_in

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within this context the model has the averaged weights."""
        if self._beside is None or self._average_is_in:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def evaluate(self, *args, **kwargs):
        with self._averaged(), self._unsharded():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        with self._averaged(), self._unsharded():
            return super().predict(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        with self._averaged():  # around all of it, since the model may be pushed, too
            super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        with self._averaged():
            super()._save(output_dir, state_dict)
            folder = Path(output_dir or self.args.output_dir)
            if self._beside is not None and is_checkpoint(folder):
                save_file({name: value.contiguous() for name, value in self._beside.items()}, folder / FILE_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs):
        path = Path(resume_from_checkpoint) / FILE_NAME
        if path.is_file() != (self.args.weight_averaging > 0):
            left, now = ("a", "none") if path.is_file() else ("no", "one")
            raise UserError(
                f"--resume_from_checkpoint {resume_from_checkpoint}: expected a run with {left} --weight_averaging, like "
                f"the one that wrote it, found {now}. Type the settings that the run was started with, or a new --output_dir."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        if not self.args.weight_averaging:
            return
        parameters, trained = self.trained_parameters(), load_file(path)
        if set(trained) != set(parameters):
            raise UserError(
                f"--resume_from_checkpoint {resume_from_checkpoint}: it was trained with other towers. Type the --vision_tower "
                "and --text_tower that the run was started with, or a new --output_dir."
            )
        self._beside = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(trained[name])

    def _load_best_model(self):
        self._beside = None  # the checkpoint's weights are averaged already
        super()._load_best_model()

    def train(self, *args, **kwargs):
        result = super().train(*args, **kwargs)
        if self._beside is not None:
            self._exchange()
            self._beside, self._average_is_in = None, False
            self.forget_prototypes()
        return result


class _Average(TrainerCallback):
    """Starts and updates the average."""

    def __init__(self, trainer: WeightAveraging):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:  # otherwise it came from a checkpoint
            parameters = self.trainer.trained_parameters()
            self.trainer._beside = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        parameters = self.trainer.trained_parameters()
        average = [self.trainer._beside[name] for name in parameters]
        decay = 1 - share_of_step(args.weight_averaging, state.global_step)
        get_ema_multi_avg_fn(decay)(average, list(parameters.values()), state.global_step)
