"""Figures worked out by hand."""

import numpy as np
import pytest

from mmft_hf import ClassificationReport
from mmft_hf.predict.metrics import class_sizes, report, uneven_note, wilson_interval


def test_counts_of_a_small_table():
    found = ClassificationReport(keep_in_memory=True).compute(
        predictions=[0, 0, 1, 2, 2, 2], references=[0, 1, 1, 2, 2, 0], class_names=["a", "b", "c", "never"]
    )
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["mean_per_class_accuracy"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert found["confusion_matrix"] == [[1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]
    assert found["per_class"][3] == {"label": "never", "images": 0, "accuracy": None}
    assert "top5_accuracy" not in found


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Values of the formula by hand; 0 and all of n have one closed end.
    [(103, 267, 0.3294, 0.4454), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0)],
)
def test_wilson_interval(correct, total, low, high):
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-4)


def test_classes_differ_in_size_from_five_times_on():
    assert class_sizes([0, 7, 3, 12]) == (3, 12)
    assert uneven_note(3, 14) == "" and "has 15 test images and the smallest 3" in uneven_note(3, 15)


def test_top5_and_skipped_images():
    scores = np.zeros((3, 7))
    scores[0, [1, 2, 3, 4, 5]] = 1
    scores[1, 6] = 1
    scores[1, [0, 1, 2, 3]] = 0.5
    found = report(scores, np.array([5, 5, -100]), [str(c) for c in range(7)])
    assert found["top5_accuracy"] == 0.5
    assert (found["examples"], found["skipped"]) == (2, 1)


def test_nothing_readable_is_an_error():
    with pytest.raises(ValueError, match="at least one image"):
        report(np.zeros((2, 3)), np.array([-100, -100]), ["a", "b", "c"])
