"""Progress of a training: one bar, and one line per epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

from ..core.console import plain, seconds
from ..predict.heads import Head
from .selection import SEVERAL, metric_name, shown
from .terms import LossTerm

# What the stock Trainer logs: everything else in a log comes from the loss terms, or from the batches.
STOCK = {"loss", "grad_norm", "learning_rate", "epoch", "num_input_tokens_seen", "train_tokens_per_second"}
# How some scalars are written; all others as name and value.
FORMATS = {
    "anchors_with_positives": "anchors with a positive {:.0%}",
    "captions_cut": "captions truncated {:.1%}",
    "skipped_images": "images skipped {:.0f}",
}


FIRST_STEPS = 5  # after which the time of a training is estimated; the first of them is slower
LONG = 900.0  # seconds; a longer training is announced
LEAST = 60.0  # seconds; less is not worth saying at the end of an epoch


class EpochLines(ProgressCallback):
    """A progress bar with one readable line per evaluation, instead of the stock callback's dictionaries.

    A training of more than a quarter of an hour is announced after its first steps.

    Args:
        terms: of the loss, which is written as their weighted sum.
        mean_weights: mean weight of each scheduled term since the last log, by name; the Trainer updates it.
        head: returns the head of the last validation.
        bar: False prints the lines without a bar, for log files.
        start: what epoch 0 is.
    """

    def __init__(
        self,
        terms: Sequence[LossTerm],
        mean_weights: Mapping[str, float],
        head: Callable[[], Head | None],
        bar: bool = True,
        start: str = "untuned model",
    ):
        super().__init__()
        self.terms, self.mean_weights, self.head = terms, mean_weights, head
        self.bar, self.start = bar, start
        self.losses: dict[str, float] = {}
        self.metric, self.higher, self.best = "accuracy", True, None
        self.training = False

    def _print(self, line: str) -> None:
        line = plain(line)
        if self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line, flush=True)

    def on_train_begin(self, args, state, control, **kwargs):
        """Opens the bar."""
        self.training = True
        if self.bar:
            super().on_train_begin(args, state, control, **kwargs)
            if self.training_bar is not None:
                self.training_bar.set_description("Training")
                self.training_bar.update(state.global_step)
        self.current_step = self.first_step = state.global_step
        self.begun = time.monotonic()
        # The star marks a new best value of the metric that selects.
        self.metric, self.higher = metric_name(args.metric_for_best_model), args.greater_is_better is not False
        self.best = state.best_metric

    def on_step_end(self, args, state, control, **kwargs):
        """Advances the bar."""
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)
        if not state.is_world_process_zero:
            return
        done = state.global_step - self.first_step
        if done == 1:
            self.after_first = time.monotonic()
        elif done == FIRST_STEPS:
            step = (time.monotonic() - self.after_first) / (FIRST_STEPS - 1)
            left = step * (state.max_steps - state.global_step)
            if left > LONG:
                advice = ""
                if args.device.type == "cpu":
                    advice = ". On a CPU, --num_train_epochs 0 fits a head to the untuned model, which takes minutes"
                self._print(f"about {seconds(left)} left, at {seconds(step)} a step, plus validation{advice}")

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        """Advances a bar that appears only if a validation takes longer than a second."""
        if self.bar and state.is_world_process_zero:
            if self.prediction_bar is None:
                self.prediction_bar = tqdm(total=len(eval_dataloader), desc="Validation", leave=False, delay=1)
            self.prediction_bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Remembers the losses of an epoch, and prints the line once its validation is known."""
        if not state.is_world_process_zero or not self.training:
            return
        if "loss" in logs:
            self.losses = logs
            if args.eval_strategy == "no":
                self._print(self._line(self.losses, state, None))
        if "eval_accuracy" in logs or f"eval_{SEVERAL}" in logs:
            self._print(self._line(self.losses, state, logs))
            self.losses = {}

    def _line(self, logs: dict, state, validation: dict | None) -> str:
        parts = [f"epoch {state.epoch or 0:>5.1f}/{state.num_train_epochs:g}"]
        if logs:
            # A scheduled weight is shown as the mean over the steps, so the sum is only about the loss.
            moves = any(callable(term.weight) for term in self.terms)
            weights = {
                t.name: f"{self.mean_weights[t.name]:.3g}" if callable(t.weight) else f"{t.weight:g}"
                for t in self.terms
            }
            sum_ = " + ".join(f"{w} x {name} {logs[f'{name}_loss']:.3f}" for name, w in weights.items())
            parts.append(f"loss {logs['loss']:.3f} {'~' if moves else '='} {sum_}")
            told = {f"{term.name}_{what}" for term in self.terms for what in ("loss", "weight")} | STOCK
            if not logs["skipped_images"]:
                told.add("skipped_images")
            scalars = {name: value for name, value in logs.items() if name not in told}
            parts += [
                FORMATS.get(name, f"{name.replace('_', ' ')} {{:.3g}}").format(v) for name, v in sorted(scalars.items())
            ]
        elif state.global_step == 0:
            parts.append(f"{self.start}, {self.head().about}")
        if validation is not None:
            main = "accuracy" if "eval_accuracy" in validation else SEVERAL
            parts.append(f"validation {'mAP ' * (main == SEVERAL)}{validation[f'eval_{main}']:.1%}")
            value = validation.get(f"eval_{self.metric}")
            if value is not None:
                if self.metric != main:
                    parts[-1] += f", {self.metric.replace('_', ' ')} {shown(self.metric, value).replace(' %', '%')}"
                if self.best is None or (value > self.best if self.higher else value < self.best):
                    parts[-1] += " *"
                    self.best = value
        if (done := state.global_step - self.first_step) > 0:
            left = (time.monotonic() - self.begun) / done * (state.max_steps - state.global_step)
            if left >= LEAST:
                parts.append(f"about {seconds(left)} left")
        return " | ".join(parts)

    def on_train_end(self, args, state, control, **kwargs):
        """Closes the bar."""
        self.training = False
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)
