"""Pictures of a result: readable from two classes to two hundred, never blank, and true to the log."""

import numpy as np
import pytest
from card_tools import ink
from PIL import Image

from mmft_hf.predict.figures import draw_confusion, draw_curves, legible, training_curves


@pytest.mark.parametrize("classes", [2, 24, pytest.param(40, marks=pytest.mark.slow), 41, 200])
def test_confusion_of_few_and_many_classes(classes, tmp_path):
    rng = np.random.default_rng(0)
    confusion = np.diag(rng.integers(1, 1500, classes)) + (rng.random((classes, classes)) < 0.1)
    path = tmp_path / "confusion.png"
    draw_confusion(path, confusion, [f"a class with a long name {i}" for i in range(classes)])
    picture = Image.open(path)
    assert picture.width == 1200 and 300 < picture.height < 1500 and ink(Image.open(path)) > 0.01
    draw_confusion(path, np.zeros((classes, classes), int), ["x"] * classes)
    assert ink(Image.open(path)) > 0.001


def test_names_that_the_font_cannot_write_are_numbered():
    assert [legible(name, 6) for name in ("café au lait", "鳥", "a\nb", "")] == [
        "cafe au lait",
        "class 7",
        "a b",
        "class 7",
    ]


def test_curves_count_each_step_once_and_leave_out_what_came_after_training(tmp_path):
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
        draw_curves(tmp_path / "curves.png", history, 0.4, 1.0)
        assert ink(Image.open(tmp_path / "curves.png")) > 0.004
