"""`data.json`: a summary of the data, from which a report is written without opening the dataset or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np
from datasets import Dataset

from ...core.arguments import DataArguments, Range
from ...core.console import some
from ...core.errors import UserError
from ...core.files import write_json
from ...core.markdown import one_line
from ...core.reading import read_json
from ...core.records import Count
from ...core.schema import ClassNames
from ...core.seals import is_as_written, sealed
from ...data.identical import find_identical
from ...data.splits import Splits, labels_of
from ...hub.cards.sources import captioning_cost
from .arguments import BenchmarkArguments, BenchmarkData
from .identity import fingerprint_of
from .results import FULL
from .summary import in_order, shots_name

DATA_FILE = "data.json"
MOST_DUPLICATES = 100  # in the list


class CaptionCounts(TypedDict, total=False):
    """Captions of the training images, and what they took."""

    images: Count
    captions: Count
    captioner: str | None
    calls: Count | None
    cost_usd: Annotated[float, Range(0)] | None
    tokens_in: Count | None
    tokens_out: Count | None
    seconds: Annotated[float, Range(0)] | None


class RefinedCounts(CaptionCounts, total=False):
    """Captions of a refined folder for the training images."""

    folder: str


class Duplicate(TypedDict):
    """An image that two splits hold."""

    splits: list[str]
    images: list[str]


class TwoLabels(TypedDict):
    """An image that has another label elsewhere."""

    labels: list[str]
    images: list[str]


class Summary(TypedDict, total=False):
    """`data.json`, see `load_or_summarize`."""

    dataset: str
    model: str
    class_names: ClassNames
    labels: dict[str, list[int]]
    groups: dict[str, list[str | int] | None] | None
    train_images_per_class: list[Count]
    validation_images: Count
    captions: CaptionCounts | None
    refined: dict[str, RefinedCounts]
    duplicates: list[Duplicate]
    duplicates_count: Count
    two_labels: list[TwoLabels]
    two_labels_count: Count
    arguments: dict
    made_from: dict
    pictures_read_for: list[str]
    cells: list[str]
    sha256: str


def load_or_summarize(
    folder: Path,
    splits: Splits,
    judged: Mapping[str, Dataset],
    args: BenchmarkArguments,
    data_args: BenchmarkData,
    identity: Mapping,
) -> dict:
    """The content of `data.json`: read from the folder, or written to it where it is missing or describes other data.

    Args:
        judged: the splits that methods are evaluated on, by name, `test` first.
        identity: of the results, see `identity`.

    Returns:
        `dataset` and `model` (names), `class_names` (C), `labels` by judged split, `groups` likewise (None without a column),
        `train_images_per_class` (C), `validation_images`, `captions` (None without any, else `images` that have some,
        `captions`, and the keys of `captioning_cost`), `duplicates` (`splits` and `images`, two each) and
        `duplicates_count`, `two_labels` (`labels` and `images`, two each) and `two_labels_count`, `arguments` (further settings to
        type for the same data), `made_from` (fingerprints), `pictures_read_for` (the tasks whose pictures were all read), `cells` (all
        that were ever to run here).

    Raises:
        UserError: a judged split has no column `group_column`.
    """
    made_from = {
        "data": identity["dataset_fingerprint"],
        "judged": {"test": fingerprint_of(splits.test), **identity["shift_splits"]},
        "group_column": args.group_column,
    }
    with suppress(OSError, UserError):  # missing or damaged: it is made again
        found = read_json(folder / DATA_FILE, Summary)
        if found.get("made_from") == made_from and "two_labels" in found and is_as_written(found):
            return found
    typed = {
        f.name: value
        for f in fields(DataArguments)
        if f.name not in ("dataset_name", "shots") and (value := getattr(data_args, f.name)) != f.default
    }
    classes = len(splits.class_names)
    identical = find_identical({"train": splits.train, "validation": splits.validation, **judged})
    found = {
        "dataset": identity["dataset"],
        "model": identity["base_model"],
        "class_names": list(splits.class_names),
        "labels": {name: labels_of(dataset).tolist() for name, dataset in judged.items()},
        "groups": groups_of(judged, args.group_column),
        "train_images_per_class": np.bincount(labels_of(splits.train), minlength=classes).tolist(),
        "validation_images": len(splits.validation),
        "captions": _captions(splits, data_args) if splits.has_captions else None,
        "duplicates": identical.across[:MOST_DUPLICATES],
        "duplicates_count": len(identical.across),
        "two_labels": identical.labels[:MOST_DUPLICATES],
        "two_labels_count": len(identical.labels),
        "arguments": typed | ({"allow_fewer": True} if args.allow_fewer else {}),
        "made_from": made_from,
    }
    write_summary(folder, found)
    return found


def write_summary(folder: Path, content: dict) -> None:
    """Writes `data.json`."""
    write_json(folder / DATA_FILE, sealed(content), indent=None, ensure_ascii=False, allow_nan=False)


def _captions(splits: Splits, data_args: BenchmarkData) -> dict:
    """How many training images have captions, how many captions there are, and what they cost, if that is known."""
    counts = splits.captions_per_image()
    found = {"images": int((counts > 0).sum()), "captions": int(counts.sum())}
    found |= dict.fromkeys(("captioner", "calls", "cost_usd", "tokens_in", "tokens_out", "seconds"))
    if data_args.captions_column not in (None, "captions"):  # mmft-hf caption writes no other column
        return found
    if data_args.captions_dataset:
        return found | (captioning_cost(data_args.captions_dataset) or {})
    return found | (captioning_cost(data_args.dataset_name, data_args.dataset_revision) or {})


def class_notes(summary: Mapping, shots: Iterable) -> list[str]:
    """Sentences on classes with fewer training images than shots, and on classes without images to be judged on.

    Args:
        summary: the content of `data.json`; a key may be missing.
        shots: of all cells.
    """
    names, counts = summary.get("class_names") or [], summary.get("train_images_per_class") or []

    def have(classes: list) -> str:
        return f"{len(classes)} of {len(names)} classes {'have' if len(classes) > 1 else 'has'}"

    notes = []
    for n in in_order(shots):
        if few := [count for count in counts if n != FULL and count < n]:
            span = f"{min(few)} to {max(few)}" if min(few) < max(few) else f"{few[0]}"
            notes.append(f"{shots_name(n)}: {have(few)} fewer training images ({span}); all of them are taken.")
    for split, labels in (summary.get("labels") or {}).items():
        present = set(labels)
        if missing := [one_line(name, 40) for c, name in enumerate(names) if c not in present]:
            notes.append(
                f"{have(missing)} no {one_line(split, 40)} image: {some(missing)}. Accuracy is over the other classes."
            )
    return notes


def groups_of(judged: Mapping[str, Dataset], column: str | None) -> dict[str, list[str]] | None:
    """The group of each image, by split; an image without a value is a group of its own. None without a column."""
    if column is None:
        return None
    for name, dataset in judged.items():
        if column not in dataset.column_names:
            raise UserError(
                f"--group_column {column}: expected a column of split {name!r}, found {', '.join(dataset.column_names)}."
            )
    return {
        name: [f"row {row}" if value is None else str(value) for row, value in enumerate(dataset[column][:])]
        for name, dataset in judged.items()
    }
