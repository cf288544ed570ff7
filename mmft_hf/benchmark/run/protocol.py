"""The protocol of a benchmark: methods get training and validation images, and are judged on a sealed test split.

Shots are training images per class. A seed draws the subset, the order and the captions, the same for every method.
Shapes: `n` images of a dataset, `C` classes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, Image
from tqdm.auto import tqdm

from ...core.console import some
from ...core.errors import UserError
from ...core.files import write_json
from ...data.images import BadImage, read_image
from ...data.sampling import IGNORED, few_shot_split
from ...data.splits import Splits, labels_of
from ...predict.metrics import report
from .results import FULL

MOST_VALIDATION_SHOTS = 4  # per class, as in CoOp's few-shot protocol

Shots = int | str


def parse_shots(words: Iterable[str]) -> list[Shots]:
    """`1 4 full` as numbers and `full`.

    Raises:
        UserError: another word.
    """
    found: list[Shots] = []
    for word in map(str, words):
        if word != FULL and not (word.isascii() and word.isdigit()):
            raise UserError(f"--shots: expected numbers of images per class, or full, found {word!r}.")
        found.append(word if word == FULL else int(word))
    return found


class Cell(NamedTuple):
    """One entry of the grid: a method at a number of shots (or `full`) with a seed. Equals the `results.key_of` of its row."""

    method: str
    shots: Shots
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, {self.shots} shots, seed {self.seed}"


@dataclass(frozen=True)
class Task:
    """What every method gets at (shots, seed).

    Args:
        train, validation: columns `image`, `label`, and perhaps `captions` (training only).
        class_names: `C` names.
        policy: what validation may be used for: `val-k` (`min(shots, 4)` images per class) or `val-full`. A method that
            does not use it reports `last`.
        captions: the refined captions that the training images have, by name; empty: those of the dataset.
    """

    train: Dataset
    validation: Dataset
    class_names: list[str]
    shots: Shots
    seed: int
    policy: str
    captions: str = ""

    def with_captions(self, source: str) -> Task:
        """The task with refined captions instead of those of the dataset; unchanged for an empty name."""
        return replace(self, train=with_captions_of(self.train, source), captions=source)


def with_captions_of(train: Dataset, source: str) -> Dataset:
    """Training images with refined captions, and their records, instead of those of the dataset; unchanged for an empty name."""
    if not source:
        return train
    own = [name for name in ("captions", "caption_records") if name in train.column_names]
    refined = {refined_column(source, name): name for name in ("captions", "caption_records")}
    there = {old: new for old, new in refined.items() if old in train.column_names}
    return train.remove_columns(own).rename_columns(there)


def refined_column(source: str, column: str = "captions") -> str:
    """The column of the training images that has the captions of a refined folder, or their records."""
    return f"{column}@{source}"


def make_task(splits: Splits, shots: Shots, seed: int, allow_fewer: bool = False) -> tuple[Task, dict[str, list[int]]]:
    """The task of (shots, seed), and the rows of the training and the validation split that it consists of.

    Raises:
        UserError: a class has fewer training images than shots, without `allow_fewer`.
    """
    rows = {"train": list(range(len(splits.train))), "validation": list(range(len(splits.validation)))}
    if shots != FULL:
        counts = np.bincount(labels_of(splits.train), minlength=len(splits.class_names))
        few = np.flatnonzero(counts < shots)
        if len(few) and not allow_fewer:
            found = some([f"{splits.class_names[c]} ({counts[c]})" for c in few])
            raise UserError(
                f"--shots {shots}: expected this many training images of every class, found fewer of {len(few)}: {found}. "
                "Type --allow_fewer true to take all that there are, or fewer shots."
            )
        rows["train"] = few_shot_split(labels_of(splits.train), shots, seed) if shots else []
        rows["validation"] = few_shot_split(
            labels_of(splits.validation), max(1, min(shots, MOST_VALIDATION_SHOTS)), seed
        )
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
    """Records the images of a task, by row and name, so that others can repeat it."""
    content = {"shots": task.shots, "seed": task.seed, "dataset_fingerprint": splits.fingerprint()}
    for split, numbers in rows.items():
        names = getattr(splits, split).select(numbers)["image_id"][:]
        content[split] = {"rows": numbers, "images": list(names)}
    write_json(folder / f"shots-{task.shots}_seed-{task.seed}.json", content, indent=1)


# Scores `(n, C)` of the images of a dataset: what a method leaves behind.
Classifier = Callable[[Dataset], np.ndarray]
# The columns of a test image that a classifier sees: the picture, and its row for messages.
VISIBLE = ("image", "source_row")


class SealedTest:
    """The test split and its shifts, which no method can read.

    A method gets a `Task`, which contains neither. The classifier that it returns is judged here, once per cell, and sees
    pictures only: labels and captions stay inside.

    Args:
        splits: the test split, as `test`, and further splits by name: other images of the same classes.
        class_names: `C` names.
        skip_bad_images: unreadable pictures are not counted; otherwise a classifier stops at them.
    """

    def __init__(self, splits: Mapping[str, Dataset], class_names: list[str], skip_bad_images: bool = False):
        self.__splits = dict(splits)
        self._class_names = class_names
        self._skip = skip_bad_images
        self._prepared: dict[str, tuple[Dataset, np.ndarray]] = {}
        self._judged: set[Cell] = set()

    def judge(self, cell: Cell, classifier: Classifier) -> dict:
        """Runs a finished classifier on every split.

        Returns:
            `test_accuracy`, `test_mean_per_class_accuracy`, `test_images`; `shift_accuracy` by split; `predictions`: the
            class of each image by split (-1: unreadable); `test_seconds`.

        Raises:
            ValueError: the cell was judged before, or its scores are not finite numbers, one row per image.
        """
        if cell in self._judged:
            raise ValueError(f"{cell}: the test split is read once.")
        self._judged.add(cell)
        reports, predictions, start = {}, {}, time.monotonic()
        for name, dataset in self.__splits.items():
            if name not in self._prepared:
                readable = readable_rows(dataset) if self._skip else np.ones(len(dataset), dtype=bool)
                self._prepared[name] = without_answers(dataset), readable
            pictures, readable = self._prepared[name]
            scores = np.asarray(classifier(pictures))
            if scores.shape != (len(dataset), len(self._class_names)):
                raise ValueError(f"expected {len(dataset)} x {len(self._class_names)} scores, found {scores.shape}")
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


def without_answers(dataset: Dataset) -> Dataset:
    """The pictures without captions or any other column that tells what they show, and all labelled 0.

    Code that reads images expects a label.
    """
    zeros = np.zeros(len(dataset), dtype=np.int64)
    return undecoded(dataset, VISIBLE).add_column("label", zeros, feature=dataset.features["label"])


def undecoded(dataset: Dataset, columns: Sequence[str] = ("image",)) -> Dataset:
    """Those of these columns that exist, with images as they are stored."""
    found = [name for name in columns if name in dataset.column_names]
    return dataset.select_columns(found).cast_column("image", Image(decode=False))


def readable_rows(dataset: Dataset, name: str = "") -> np.ndarray:
    """Whether each image can be decoded, bool `(n,)`. The name of the split is shown with the progress."""
    images, size = undecoded(dataset), 64
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # decoding releases the interpreter lock
        batches = tqdm(images.iter(size), f"Reading {name} images", -(-len(images) // size), leave=False, delay=1)
        return np.array([ok for batch in batches for ok in threads.map(_is_readable, batch["image"])], dtype=bool)


def _is_readable(image: dict) -> bool:
    try:
        read_image(image)
    except BadImage:
        return False
    return True
