"""Weight averaging: what is evaluated and saved is an exponential moving average of the weights that are trained."""

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

# Beside the averaged weights of a checkpoint: those that a resume goes on with.
FILE_NAME = "unaveraged.safetensors"


def share_of_step(decay: float, step: int) -> float:
    """What the weights after `step` (from 1 on) count for in the average that they enter: `(1 - decay) / (1 - decay ** step)`.

    So the average after n steps is that of the weights after each of them, weighed by `decay ** (n - step)`, also where a run is
    short: the untuned weights, with which an average without this correction begins, have no part in it.

    References: Kingma & Ba 2015, "Adam" (arXiv 1412.6980), section 3, for this correction of the start.
    """
    return (1 - decay) / (1 - decay**step)


class WeightAveraging:
    """A part of `MMFTTrainer`, for `args.weight_averaging`: the decay, from 0 (no averaging) to below 1.

    The average of what is trained (a tower, its LoRA matrices, the logit scale) is kept beside it, updated after each step of
    the optimizer, and takes its place while the model is evaluated or saved, and for good when training ends. Every process does
    that alike. A checkpoint holds both.

    References: Izmailov et al. 2018, "Averaging weights leads to wider optima and better generalization" (arXiv 1803.05407);
    Morales-Brotons et al. 2024, "Exponential moving average of weights in deep learning" (arXiv 2411.18704).
    """

    # The average; while that is in the model, the weights that it stands in for. None: there is no training.
    _beside: dict[str, Tensor] | None = None
    _average_is_in = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.weight_averaging:
            self.add_callback(_Average(self))

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        model = self.accelerator.unwrap_model(self.model)
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def _exchange(self) -> None:
        """The average for the weights, or these again for it: tensors change places, no number is copied."""
        for name, parameter in self.trained_parameters().items():
            parameter.data, self._beside[name] = self._beside[name], parameter.data
        self._average_is_in = not self._average_is_in

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model has the averaged weights meanwhile."""
        if self._beside is None or self._average_is_in:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def evaluate(self, *args, **kwargs):
        with self._averaged():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        with self._averaged():
            return super().predict(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        with self._averaged():  # as a whole, since it may be pushed
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
                f"--resume_from_checkpoint {resume_from_checkpoint}: expected a run with {left} --weight_averaging, as the one "
                f"that left it, found {now}. Type the settings that it was started with, or a new --output_dir."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        if not self.args.weight_averaging:
            return
        parameters, trained = self.trained_parameters(), load_file(path)
        if set(trained) != set(parameters):
            raise UserError(
                f"--resume_from_checkpoint {resume_from_checkpoint}: it was trained with other towers. Type the --vision_tower "
                "and --text_tower that it was started with, or a new --output_dir."
            )
        self._beside = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(trained[name])

    def _load_best_model(self):
        self._beside = None  # a checkpoint's weights are averaged
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
