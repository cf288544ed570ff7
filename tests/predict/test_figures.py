"""Pictures of a result: readable from two classes to two hundred, never blank, and true to the log."""

import numpy as np
import pytest
from card_tools import ink

from mmft_hf.predict.figures import confusion_picture, curves_picture, legible, training_curves


@pytest.mark.parametrize("classes", [2, 24, 40, 41, 200])
def test_confusion_picture_of_few_and_many_classes(classes):
    rng = np.random.default_rng(0)
    confusion = np.diag(rng.integers(1, 1500, classes)) + (rng.random((classes, classes)) < 0.1)
    picture = confusion_picture(confusion, [f"a class with a long name {i}" for i in range(classes)])
    assert picture.width == 1600 and 400 < picture.height < 2000 and ink(picture) > 0.01
    assert ink(confusion_picture(np.zeros((classes, classes), int), ["x"] * classes)) > 0.001


def test_names_that_the_font_cannot_write_are_numbered():
    assert [legible(name, 6) for name in ("café au lait", "鳥", "a\nb", "")] == [
        "cafe au lait",
        "class 7",
        "a b",
        "class 7",
    ]


def test_curves_count_each_step_once_and_leave_out_what_came_after_training():
    logs = [{"epoch": 0, "eval_accuracy": 0.25}, {"epoch": 1.0, "loss": 2.0}, {"epoch": 1.0, "eval_accuracy": 0.5}]
    logs += [
        {"epoch": 2.0, "loss": float("nan")},
        {"epoch": 2.0, "eval_accuracy": 0.25},
        {"epoch": 2.0, "train_runtime": 1},
    ]
    losses, accuracies = training_curves([*logs, {"epoch": 2.0, "eval_accuracy": 0.5}])
    assert losses == [(1.0, 2.0)] and accuracies == [(0, 25.0), (1.0, 50.0), (2.0, 25.0)]
    assert training_curves([*logs[5:], {"epoch": 2.0, "eval_accuracy": 0.5}])[1] == [(2.0, 50.0)]
    for history in (logs, logs[:1], []):
        assert ink(curves_picture(history, 0.4, 1.0)) > 0.005
