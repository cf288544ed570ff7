"""Accuracy and related figures as an `evaluate.Metric` that needs no network. Shapes: `n` examples, `C` classes."""

from __future__ import annotations

import math

import datasets
import evaluate
import numpy as np

from ..core.errors import UserError
from ..data.sampling import is_example
from .heads.base import DECISION

Z_95 = 1.959963984540054
UNEVEN = 5  # times as many images in the largest class as in the smallest


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % interval of the share of `correct` trials among `total` independent ones; (0, 1) without trials.

    References: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if total == 0:
        return 0.0, 1.0
    p, z2 = correct / total, Z_95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def area_under_roc(known: np.ndarray, unknown: np.ndarray) -> tuple[float, float, float]:
    """AUROC of a score that should be higher for pictures of known classes, `(m,)`, than for others, `(n,)`: the share of pairs in
    which it is, ties counted half. Then its 95 % interval, from which the area is 1.96 standard errors of its ends away.

    m and n are at least 1. The interval does not collapse where all pairs are in order.

    References: Hanley & McNeil 1982 for the standard error; Newcombe 2006, "Confidence intervals for an effect size measure based
    on the Mann-Whitney statistic. Part 2", method 5.
    """
    known, m, n = np.sort(known), len(known), len(unknown)
    lower, equal_or_lower = (np.searchsorted(known, unknown, side) for side in ("left", "right"))
    area = float((m - (lower + equal_or_lower) / 2).mean() / m)
    more = (m + n) / 2 - 1

    def outside(end: float) -> bool:
        variance = end * (1 - end) * (1 + more * ((1 - end) / (2 - end) + end / (1 + end))) / (m * n)
        return abs(area - end) > Z_95 * math.sqrt(variance)

    ends = []
    for far in (0.0, 1.0):
        near = area
        for _ in range(60):
            middle = (far + near) / 2
            far, near = (middle, near) if outside(middle) else (far, middle)
        ends.append(near)
    return area, *ends


def class_sizes(counts) -> tuple[int, int]:
    """Images of the smallest and of the largest class, from the counts `(C,)`; classes without images are left out."""
    present = [int(count) for count in counts if count] or [0]
    return min(present), max(present)


def uneven_note(smallest: int, largest: int) -> str:
    """Why the mean over the classes comes before accuracy, in a sentence; empty where it does not.

    It does where the largest class of the split that is reported has five times as many images as the smallest: there,
    accuracy is mostly that of the large classes, however the training images are distributed.
    """
    if largest < UNEVEN * smallest:
        return ""
    return (
        f"The largest class has {largest:,} test images and the smallest {smallest:,}, so accuracy says little about small classes: "
        "the mean over the classes, in which each class counts the same, comes first."
    )


class ClassificationReport(evaluate.Metric):
    """Accuracy with its interval, mean per class, a row per class and the confusion matrix.

    `compute(predictions=, references=, class_names=None, scores=None)`:

    Args:
        predictions (`n` integers): predicted classes.
        references (`n` integers): true classes.
        class_names (`C` texts, *optional*): set the number of classes and name the rows of `per_class`.
        scores (`(n, C)` floats, *optional*): add `top5_accuracy` if there are more than five classes.

    Returns a dict: `accuracy`, `accuracy_ci_low`, `accuracy_ci_high` (Wilson, 95 %), `mean_per_class_accuracy` (over the
    classes that occur among the references), `per_class` (list of `label`, `images`, `accuracy`), `confusion_matrix`
    (`C` rows of true classes by `C` columns of predicted ones, counts), `examples`.

    It also works in `evaluate.evaluator("image-classification").compute(metric=ClassificationReport())`, which needs scipy:
    `pip install mmft_hf[evaluator]`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy with interval, mean per class, per-class table and confusion matrix.",
            citation="",
            inputs_description=self.__doc__ or "",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions, references, class_names=None, scores=None) -> dict:
        predictions, references = np.asarray(predictions), np.asarray(references)
        total = len(references)
        classes = len(class_names) if class_names else int(max(predictions.max(), references.max())) + 1
        names = list(class_names) if class_names else [str(c) for c in range(classes)]
        confusion = np.zeros((classes, classes), dtype=np.int64)
        np.add.at(confusion, (references, predictions), 1)
        counts, hits = confusion.sum(axis=1), np.diag(confusion)
        present = counts > 0
        low, high = wilson_interval(int(hits.sum()), total)
        result = {
            "accuracy": float(hits.sum() / total),
            "accuracy_ci_low": low,
            "accuracy_ci_high": high,
            "mean_per_class_accuracy": float((hits[present] / counts[present]).mean()),
            "examples": total,
            "per_class": [
                {"label": name, "images": int(n), "accuracy": float(h / n) if n else None}
                for name, n, h in zip(names, counts, hits, strict=True)
            ],
            "confusion_matrix": confusion.tolist(),
        }
        if scores is not None and classes > 5:
            top5 = np.argpartition(-np.asarray(scores), 4, axis=1)[:, :5]
            result["top5_accuracy"] = float((top5 == references[:, None]).any(axis=1).mean())
        return result


def report(scores: np.ndarray, labels: np.ndarray, class_names: list[str]) -> dict:
    """`ClassificationReport` of scores `(n, C)`; rows with a negative label are left out and counted in `skipped`.

    Raises:
        UserError: no row is left.
    """
    known = labels >= 0
    if not known.any():
        raise UserError(f"expected at least one image that can be read, found none among {len(labels)}.")
    scores, references = scores[known], labels[known]
    result = ClassificationReport(keep_in_memory=True).compute(
        predictions=scores.argmax(axis=1), references=references, class_names=class_names, scores=scores
    )
    return {**result, "skipped": int((~known).sum())}


# -- several labels per picture --------------------------------------------------------------------------------------------
def several_report(
    scores: np.ndarray, labels: np.ndarray, class_names: list[str], decision: float | np.ndarray = DECISION
) -> dict:
    """Metrics of several labels per picture, over the rows that are examples; the others are counted in `skipped`.

    Args:
        scores (`(n, C)`): a class is predicted from `decision` on, a score or one of each class. Average precision depends on
            their order alone.
        labels (`(n, C)`): 1 where a class holds, else 0; -100 for no example.

    Returns:
        `mean_average_precision` and `macro_f1`, means over the classes that occur; `micro_f1` over all decisions; `accuracy`,
        the share of pictures with exactly the right labels, with its Wilson interval (`accuracy_ci_low`, `accuracy_ci_high`);
        `per_class` (list of `label`, `images`, `average_precision`, `precision`, `recall`, `f1`; None where it is not
        defined), `examples`, `skipped`.

    Raises:
        UserError: no row is left.
    """
    known = is_example(labels)
    if not known.any():
        raise UserError(f"expected at least one image that can be read, found none among {len(labels)}.")
    scores, truth = scores[known], labels[known] > 0
    predicted = scores >= decision
    hits, answered, positives = (predicted & truth).sum(axis=0), predicted.sum(axis=0), truth.sum(axis=0)
    f1 = 2 * hits / np.maximum(answered + positives, 1)
    occur = positives > 0
    precision = [average_precision(scores[:, c], truth[:, c]) if occur[c] else None for c in range(len(class_names))]
    exact = int((predicted == truth).all(axis=1).sum())
    low, high = wilson_interval(exact, len(truth))
    return {
        "mean_average_precision": float(np.mean([p for p in precision if p is not None])) if occur.any() else 0.0,
        "micro_f1": float(2 * hits.sum() / max(answered.sum() + positives.sum(), 1)),
        "macro_f1": float(f1[occur].mean()) if occur.any() else 0.0,
        "accuracy": exact / len(truth),
        "accuracy_ci_low": low,
        "accuracy_ci_high": high,
        "examples": len(truth),
        "per_class": [
            {
                "label": name,
                "images": int(positives[c]),
                "average_precision": precision[c],
                "precision": float(hits[c] / answered[c]) if answered[c] else None,
                "recall": float(hits[c] / positives[c]) if occur[c] else None,
                "f1": float(f1[c]) if occur[c] else None,
            }
            for c, name in enumerate(class_names)
        ],
        "skipped": int((~known).sum()),
    }


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the positives of the precision down to each: Σ (recall_k - recall_(k-1)) precision_k over the different scores.

    Args:
        scores (`(n,)`), truth (`(n,)`, bool): with a positive at least.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # equal scores count at once
    hits = np.cumsum(truth[order])[ends]
    return float((np.diff(hits, prepend=0) * hits / (ends + 1)).sum() / hits[-1])
