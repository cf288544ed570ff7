"""The metric by which the candidates of a run are compared on validation: every epoch, and the untuned model."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.arguments import choice
from ..core.console import percent
from ..core.errors import UserError

# Whether a higher value is better. None of them depends on the batch size; `loss` is the cross-entropy of the class logits.
SEVERAL = "mean_average_precision"  # the only one with several labels per picture: it needs no threshold
METRICS = {"accuracy": True, "top5_accuracy": True, "mean_per_class_accuracy": True, "loss": False, SEVERAL: True}


def metric_name(setting: str | None) -> str:
    """The name in `METRICS` of what selects the epoch by `--metric_for_best_model`; an unknown name is returned as it is."""
    return "accuracy" if setting is None else setting.removeprefix("eval_")


def check_metric(setting: str | None, class_names: Sequence[str], several_labels: bool = False) -> str:
    """The name of the metric. With several labels per picture it is mean average precision.

    Raises:
        UserError: it is none of `METRICS`, or not defined for these classes.
    """
    metric = metric_name(setting)
    if metric not in METRICS and metric.endswith("loss"):
        raise UserError(
            f"--metric_for_best_model: expected one of {', '.join(METRICS)}, found {metric!r}: a training loss depends on the "
            "batch size. Type --metric_for_best_model loss, the cross-entropy of the class probabilities."
        )
    choice("metric_for_best_model", metric, METRICS)
    if several_labels and (setting is None or metric == SEVERAL):
        return SEVERAL
    if several_labels or metric == SEVERAL:
        kinds = ("one label", "several labels")
        raise UserError(
            f"--metric_for_best_model {metric}: expected {kinds[not several_labels]} per picture, found {kinds[several_labels]}. Leave "
            "it out."
        )
    if metric == "top5_accuracy" and len(class_names) <= 5:
        raise UserError(
            f"--metric_for_best_model top5_accuracy: expected more than five classes, found {len(class_names)}, of which all "
            "are among the top five. Type --metric_for_best_model accuracy."
        )
    return metric


def is_better(metric: str, one: float, other: float) -> bool:
    """Whether the first value of a metric is better than the second one."""
    return one > other if METRICS[metric] else one < other


def by_metric(metric: str) -> str:
    """` by loss`, for a sentence that says what was better; empty for accuracy, which goes without saying."""
    return "" if metric == "accuracy" else f" by {'mAP' if metric == SEVERAL else metric}"


def stale(values: Sequence[float], greater: bool) -> int:
    """How many of the last values of a metric are not better than the best one before them.

    Args:
        greater: whether a greater value is better.
    """
    if not values:
        return 0
    best = (max if greater else min)(values)
    return len(values) - 1 - list(values).index(best)


def shown(metric: str, value: float) -> str:
    """A value as it is printed: `71.4 %`, or three decimals of a loss or an unknown metric."""
    return percent(value) if METRICS.get(metric) else f"{value:.3f}"
