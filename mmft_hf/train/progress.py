"""What a user watches while it trains: one bar, and one line per epoch."""

from __future__ import annotations

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback


class EpochLines(ProgressCallback):
    """A progress bar with one readable line per evaluation, in place of the stock callback's dictionaries.

    Args:
        bar: False prints the lines without a bar, for log files.
    """

    def __init__(self, bar: bool = True):
        super().__init__()
        self.bar = bar
        self.losses: dict[str, float] = {}
        self.best = float("-inf")
        self.training = False
        self.source = ""

    def _print(self, line: str) -> None:
        if self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line, flush=True)

    def on_train_begin(self, args, state, control, **kwargs):
        """Opens the bar."""
        self.training = True
        self.source = args.prototypes
        if args.template_weight:
            self.source += f" and, with weight {args.template_weight:g}, the class template"
        if self.bar:
            super().on_train_begin(args, state, control, **kwargs)
            if self.training_bar is not None:
                self.training_bar.set_description("Training")
                self.training_bar.update(state.global_step)
        self.current_step = state.global_step
        # The star marks a new best accuracy; a run that selects by something else has none.
        by_accuracy = (args.metric_for_best_model or "").removeprefix("eval_") == "accuracy"
        self.best = float("-inf") if by_accuracy else float("inf")
        if by_accuracy and state.best_metric is not None:
            self.best = state.best_metric

    def on_step_end(self, args, state, control, **kwargs):
        """Moves the bar."""
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        """Moves a bar that shows only for validations longer than a second."""
        if self.bar and state.is_world_process_zero:
            if self.prediction_bar is None:
                self.prediction_bar = tqdm(total=len(eval_dataloader), desc="Validation", leave=False, delay=1)
            self.prediction_bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Remembers the losses of an epoch, and prints the line when its validation is known."""
        if not state.is_world_process_zero or not self.training:
            return
        if "loss" in logs:
            # On its way to another value it is the mean of the steps, with which the sum is not quite the loss.
            moves = args.supcon_weight_end is not None
            w = float(f"{logs['supcon_weight']:.3g}") if moves else args.supcon_weight
            self.losses = logs | {"w": w, "sign": "~" if moves else "="}
            if args.eval_strategy == "no":
                self._print(self._line(self.losses, state, None))
        if "eval_accuracy" in logs:
            self._print(self._line(self.losses, state, logs["eval_accuracy"]))
            self.losses = {}

    def _line(self, logs: dict, state, accuracy: float | None) -> str:
        parts = [f"epoch {state.epoch or 0:>5.1f}/{state.num_train_epochs:g}"]
        if logs:
            w = logs["w"]
            sum_ = f"{w:g} x supcon {logs['supcon_loss']:.3f} + {1 - w:g} x clip {logs['clip_loss']:.3f}"
            parts.append(f"loss {logs['loss']:.3f} {logs['sign']} {sum_}")
            parts.append(f"anchors with a positive {logs['anchors_with_positives']:.0%}")
            parts.append(f"captions cut {logs['captions_cut']:.1%}")
            if logs["skipped_images"]:
                parts.append(f"images skipped {logs['skipped_images']:.0f}")
        elif state.global_step == 0:
            parts.append(f"untuned model, compared with {self.source}")
        if accuracy is not None:
            parts.append(f"validation {accuracy:.1%}{' *' if accuracy > self.best else ''}")
            self.best = max(self.best, accuracy)
        return " | ".join(parts)

    def on_train_end(self, args, state, control, **kwargs):
        """Closes the bar."""
        self.training = False
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)
