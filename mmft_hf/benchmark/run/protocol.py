"""What a cell of a benchmark is given: images of training and validation, and never those of the test.

Shots are images per class; a seed draws the subset, the order and the captions, alike for every method.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Image

from ...core.errors import UserError
from ...core.files import write_json
from ...data.images import BadImage, read_image
from ...data.sampling import IGNORED, few_shot_split
from ...data.splits import Splits, captions_of, labels_of
from ...predict.metrics import report
from .results import FULL

# CoOp's rule: a few-shot learner has no more than four validation images of each class.
MOST_VALIDATION_SHOTS = 4

Shots = int | str


@dataclass(frozen=True)
class Cell:
    """One entry of the grid: a method at so many shots (a number, or `full`) with a seed."""

    method: str
    shots: Shots
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, {self.shots} shots, seed {self.seed}"


@dataclass(frozen=True)
class Task:
    """What every method gets at (shots, seed).

    Args:
        train, validation: columns `image`, `label` and perhaps `captions` (of training alone).
        class_names: `C` names.
        policy: what validation may be used for: `val-k` (`min(shots, 4)` images per class) or `val-full`. A method that
            does not use it reports `last`.
    """

    train: Dataset
    validation: Dataset
    class_names: list[str]
    shots: Shots
    seed: int
    policy: str

    @property
    def has_captions(self) -> bool:
        """Whether any training image has a caption that is not blank."""
        return "captions" in self.train.column_names and any(map(captions_of, self.train["captions"]))


def make_task(splits: Splits, shots: Shots, seed: int, allow_fewer: bool = False) -> tuple[Task, dict[str, list[int]]]:
    """The task of (shots, seed), and the row numbers that it has of the training and the validation split.

    Raises:
        UserError: a class with fewer training images than shots, without `allow_fewer`.
    """
    rows = {"train": list(range(len(splits.train))), "validation": list(range(len(splits.validation)))}
    if shots != FULL:
        shots = int(shots)
        counts = np.bincount(labels_of(splits.train), minlength=len(splits.class_names))
        few = np.flatnonzero(counts < shots)
        if len(few) and not allow_fewer:
            some = ", ".join(f"{splits.class_names[c]} ({counts[c]})" for c in few[:8])
            raise UserError(
                f"--shots {shots}: expected so many training images of every class, found fewer of {len(few)}: {some}"
                f"{', …' if len(few) > 8 else ''}. Type --allow_fewer true to take what there is, or fewer shots."
            )
        rows["train"] = few_shot_split(labels_of(splits.train), shots, seed) if shots else []
        most = max(1, min(shots, MOST_VALIDATION_SHOTS))
        rows["validation"] = few_shot_split(labels_of(splits.validation), most, seed)
    task = Task(
        train=splits.train.select(rows["train"]),
        validation=splits.validation.select(rows["validation"]),
        class_names=splits.class_names,
        shots=shots,
        seed=seed,
        policy="val-full" if shots == FULL else "val-k",
    )
    return task, rows


def write_rows(folder: Path, task: Task, rows: dict[str, list[int]], splits: Splits) -> None:
    """Keeps which images a task has, by row number and name, for others to repeat it."""
    content = {"shots": task.shots, "seed": task.seed, "dataset_fingerprint": splits.fingerprint()}
    for split, numbers in rows.items():
        names = getattr(splits, split).select(numbers)["image_id"][:]
        content[split] = {"rows": numbers, "images": list(names)}
    path = folder / f"shots-{task.shots}_seed-{task.seed}.json"
    write_json(path, content, indent=1)


# Scores `(n, C)` of the images of a data set: what a method leaves behind.
Classifier = Callable[[Dataset], np.ndarray]
# All that a classifier needs to know of a test image: the picture, and its row's number for messages.
OF_AN_IMAGE = ("image", "source_row")


class SealedTest:
    """The test split, and its shifts. Methods are given a `Task`, which has none of them; what they return is judged here,
    once per cell, and is shown pictures alone: labels and captions stay here.

    Args:
        splits: the test split, as `test`, and further ones by name: other images of the same classes.
        class_names: `C` names.
        skip_bad_images: pictures that cannot be read count for nothing; otherwise a classifier stops at them.
    """

    def __init__(self, splits: Mapping[str, Dataset], class_names: list[str], skip_bad_images: bool = False):
        self.__splits = dict(splits)
        self._class_names = class_names
        self._skip = skip_bad_images
        self._readable: dict[str, np.ndarray] = {}
        self._shown: dict[str, Dataset] = {}
        self._judged: set[Cell] = set()

    def judge(self, cell: Cell, classifier: Classifier) -> dict:
        """What a finished classifier does on every split, and the seconds that it took.

        Returns:
            `test_accuracy`, `test_mean_per_class_accuracy`, `test_images`; `shift_accuracy` by split; `predictions`, for
            each split the class of each image (-1: unreadable); `test_seconds`.

        Raises:
            ValueError: the cell was judged before, or its scores are not finite numbers, a row for each image.
        """
        if cell in self._judged:
            raise ValueError(f"{cell}: the test split is read once.")
        self._judged.add(cell)
        reports, predictions, start = {}, {}, time.monotonic()
        for name, dataset in self.__splits.items():
            if name not in self._shown:
                self._shown[name] = without_answers(dataset)
            scores = np.asarray(classifier(self._shown[name]))
            if scores.shape != (len(dataset), len(self._class_names)):
                raise ValueError(f"expected {len(dataset)} x {len(self._class_names)} scores, found {scores.shape}")
            readable = self._readable_rows(name, dataset)
            if not np.isfinite(scores[readable]).all():
                raise ValueError("the scores are not finite")
            reports[name] = report(scores, np.where(readable, labels_of(dataset), IGNORED), self._class_names)
            predictions[name] = np.where(readable, scores.argmax(axis=1), -1).tolist()
        test = reports.pop("test")
        return {
            "test_accuracy": test["accuracy"],
            "test_mean_per_class_accuracy": test["mean_per_class_accuracy"],
            "test_images": test["examples"],
            "shift_accuracy": {name: found["accuracy"] for name, found in reports.items()},
            "predictions": predictions,
            "test_seconds": round(time.monotonic() - start, 3),
        }

    def _readable_rows(self, name: str, dataset: Dataset) -> np.ndarray:
        if not self._skip:
            return np.ones(len(dataset), dtype=bool)
        if name not in self._readable:
            self._readable[name] = readable_rows(dataset)
        return self._readable[name]


def readable_rows(dataset: Dataset) -> np.ndarray:
    """Whether each image can be decoded, bool `(n,)`."""
    return np.array([is_readable(row["image"]) for row in undecoded(dataset)], dtype=bool)


def without_answers(dataset: Dataset) -> Dataset:
    """The same pictures without captions or anything else that tells what they show, and all of them labelled 0.

    There is a label since all that reads images expects one.
    """
    columns = [name for name in OF_AN_IMAGE if name in dataset.column_names]
    zeros = np.zeros(len(dataset), dtype=np.int64)
    return undecoded(dataset, columns).add_column("label", zeros, feature=dataset.features["label"])


def undecoded(dataset: Dataset, columns: Sequence[str] = ("image",)) -> Dataset:
    """The images (or these columns, if they are among them) alone, as they are stored."""
    return dataset.select_columns(list(columns)).cast_column("image", Image(decode=False))


def is_readable(image: dict) -> bool:
    """Whether a stored image can be decoded."""
    try:
        read_image(image)
    except BadImage:
        return False
    return True
