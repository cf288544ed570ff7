"""Accuracy and related figures as an `evaluate.Metric` that needs no network. Shapes: `n` examples, `C` classes."""

from __future__ import annotations

import math

import datasets
import evaluate
import numpy as np

from ..core.errors import UserError

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


def class_sizes(counts) -> tuple[int, int]:
    """Images of the smallest and of the largest class, from the counts `(C,)`; classes without images are left out."""
    present = [int(count) for count in counts if count]
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
