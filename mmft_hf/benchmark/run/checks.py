"""What is looked at before the first cell, so that hours of work do not end in an error that was there from the start."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from datasets import Dataset, Image
from tqdm.auto import tqdm

from ...core.errors import UserError
from ...data.splits import Splits, labels_of, text_columns
from .methods import METHODS
from .protocol import Cell, is_readable, make_task
from .summary import FULL, in_order, shots_name

MOST_NAMED = 8
# How `load_splits` begins a note that is not true of methods which need captions.
NO_CAPTIONS = "There are no captions"


def with_what_they_need(methods: Sequence[str], splits: Splits, dataset_name: str) -> tuple[list[str], list[str]]:
    """The methods that can be run, and a note on the others: without captions those that need them mean nothing.

    Raises:
        UserError: none is left.
    """
    without = [name for name in dict.fromkeys(methods) if METHODS[name].needs_captions]
    if not without or (splits.has_captions and splits.captions_per_image().any()):
        return list(methods), []
    texts = text_columns(splits.train)
    if texts and not splits.has_captions:
        how = f"It has texts in {', '.join(texts)}: type --captions_column {texts[0]} to take them as captions."
    else:
        how = (
            f"To write them, type: mmft-hf caption --dataset_name {shlex.quote(dataset_name)} --captioner transformers "
            "--captioner_model HUB_ID --output_dir outputs/captioned (other captioners: mmft-hf caption --help); then "
            "--dataset_name outputs/captioned here."
        )
    left = [name for name in methods if name not in without]
    if not left:
        raise UserError(f"--methods {' '.join(without)}: expected captions of the training images, found none. {how}")
    return left, [f"Left out, because the training images have no captions: {', '.join(without)}. {how}"]


def notes_on(
    splits: Splits, judged: Mapping[str, Dataset], shots: Iterable, unreadable: Mapping[str, list[str]]
) -> list[str]:
    """Sentences on what is fewer than a reader of the results would think.

    Args:
        judged: the splits that methods are judged on, by name.
        shots: of all cells.
        unreadable: of each judged split, the images that are passed over.
    """
    names, notes = splits.class_names, [note for note in splits.notes if not note.startswith(NO_CAPTIONS)]
    counts = np.bincount(labels_of(splits.train), minlength=len(names))
    for n in in_order(shots):
        few = counts[counts < n] if n != FULL else ()
        if len(few):
            low, high = few.min(), few.max()
            notes.append(
                f"{shots_name(n)}: {len(few)} of {len(names)} classes {'have' if len(few) > 1 else 'has'} fewer images "
                f"({low if low == high else f'{low} to {high}'}); all of them are taken."
            )
    for split, dataset in judged.items():
        missing = np.flatnonzero(np.bincount(labels_of(dataset), minlength=len(names)) == 0)
        if len(missing):
            notes.append(
                f"{len(missing)} of {len(names)} classes {'have' if len(missing) > 1 else 'has'} no {split} image: "
                f"{_some([names[c] for c in missing])}. Accuracy is over the others."
            )
        if bad := unreadable.get(split):
            notes.append(
                f"{len(bad)} of {len(dataset):,} {split} images cannot be read and count for nothing: {_some(bad)}."
            )
    return notes


def refuse_unreadable(splits: Splits, judged: Mapping[str, Dataset], cells: Iterable[Cell], allow_fewer: bool) -> None:
    """Reads every picture that these cells will need.

    Raises:
        UserError: some cannot be read.
    """
    tasks = {(cell.shots, cell.seed) for cell in cells}
    used = {row for task in tasks for row in make_task(splits, *task, allow_fewer)[1]["train"]}
    parts = {"train": splits.train.select(sorted(used)), "validation": splits.validation, **judged}
    bad = [place for name, dataset in parts.items() for place in unreadable(name, dataset)]
    if bad:
        raise UserError(
            f"expected pictures that can be read, found {len(bad)} that cannot: {_some(bad)}. Repair or remove "
            f"{'them' if len(bad) > 1 else 'it'}, or type --on_bad_image skip to leave {'them' if len(bad) > 1 else 'it'} out."
        )


def unreadable(name: str, dataset: Dataset) -> list[str]:
    """Where the pictures of a split are that cannot be decoded."""
    columns = [column for column in ("image", "source_row") if column in dataset.column_names]
    rows = dataset.select_columns(columns).cast_column("image", Image(decode=False))
    found, batch_size = [], 64
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # decoding leaves the interpreter free
        starts = range(0, len(rows), batch_size)
        for start in tqdm(starts, desc=f"Looking at {name} images", leave=False, delay=1):
            batch = rows[start : start + batch_size]
            for i, readable in enumerate(threads.map(is_readable, batch["image"])):
                if not readable:
                    place = f"row {batch['source_row'][i] if 'source_row' in batch else start + i} of {dataset.split or name}"
                    path = (batch["image"][i] or {}).get("path")
                    found.append(f"{path} ({place})" if path else place)
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (", …" if len(names) > MOST_NAMED else "")
