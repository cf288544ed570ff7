"""Checks of the data, and notes on it, before the first cell: hours of work must not end in an error."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from datasets import Dataset, DatasetDict

from ...core.arguments import DataArguments
from ...core.console import some
from ...core.errors import UserError, nearest
from ...data.identical import labels_note
from ...data.raw import SPLIT_NAMES, split_for
from ...data.sources import open_source
from ...data.splits import NO_CAPTIONS, Splits, text_columns
from .data_summary import class_notes
from .methods import method_named
from .protocol import Cell, make_task, readable_rows, undecoded


# -- splits ----------------------------------------------------------------------------------------------------------------
def check_labels(args: DataArguments, shift_splits: Sequence[str]) -> None:
    """Checks that the test split and the shift splits exist, have labels and serve no other purpose.

    Raises:
        UserError: one of them does not. A missing test split is fine: `load_splits` holds one out.
    """
    raw = open_source(args).splits
    roles = _roles(raw, args)
    test = roles.get("test")
    if test in raw and len(raw[test]) and not _has_labels(raw[test], args.label_column):
        others = [name for name in raw if _has_labels(raw[name], args.label_column)]
        raise UserError(
            f"split {test!r}: expected labels to judge the methods by, found none. Type --test_split NAME with one that has "
            f"labels ({', '.join(others) or 'there is none'})."
        )
    free = f"Splits that are free: {', '.join(name for name in raw if name not in roles.values()) or 'none'}."
    for name in shift_splits:
        role = next((role for role, split in roles.items() if split == name), None)
        if name not in raw:
            wrong = f"a split of the dataset, found {', '.join(raw)}.{nearest(name, raw)}"
        elif role:
            wrong = f"one role for each split, found it as {role} split, too."
        elif shift_splits.count(name) > 1:
            wrong = "one role for each split, found it as a shift twice."
        elif not len(raw[name]):
            wrong = "images with labels, found 0 images."
        elif not _has_labels(raw[name], args.label_column):
            wrong = f"images with labels, found {len(raw[name])} images without any."
        else:
            continue
        raise UserError(f"--shift_splits {name}: expected {wrong} {free}")


def _roles(raw: DatasetDict, args: DataArguments) -> dict[str, str]:
    """The split that `load_splits` takes for each role that has one."""
    found = {}
    for role in SPLIT_NAMES:
        name = getattr(args, f"{role}_split") or split_for(role, raw)
        if name is not None and name not in found.values():
            found[role] = name
    return found if "train" in found else {"train": next(iter(raw)), **found}


def _has_labels(dataset: Dataset, column: str) -> bool:
    """Whether any row has a label; in test splits of challenges all labels are -1."""
    return column not in dataset.column_names or any(label not in (None, -1) for label in dataset[column][:])


# -- captions --------------------------------------------------------------------------------------------------------------
def runnable(methods: Sequence[str], splits: Splits, dataset_name: str) -> tuple[list[str], list[str]]:
    """The methods that can run on this dataset, and a note on those that lack the captions they need.

    Raises:
        UserError: none can run.
    """
    known = {name: method_named(name) for name in methods}
    without = [name for name, method in known.items() if method.needs_captions and not method.captions]
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


# -- notes -----------------------------------------------------------------------------------------------------------------
def notes_on(splits: Splits, summary: Mapping, shots: Iterable, unreadable: Mapping[str, list[str]]) -> list[str]:
    """Sentences on the data for a reader of the results.

    Args:
        summary: see `data_summary`.
        shots: of all cells.
        unreadable: the images of each judged split that are skipped.
    """
    # Methods that need captions are left out, see `runnable`.
    notes = [note for note in splits.notes if NO_CAPTIONS not in note] + class_notes(summary, shots)
    for split, bad in unreadable.items():
        if bad:
            total = len(summary["labels"][split])
            notes.append(f"{len(bad)} of {total:,} {split} images cannot be read and are not counted: {some(bad)}.")
    if count := summary["duplicates_count"]:
        shown = ((*d["images"], *d["splits"]) for d in summary["duplicates"][:3])
        pairs = [f"{one} of {split} is {other} of {another}" for one, other, split, another in shown]
        notes.append(
            f"{count} {'pictures are' if count > 1 else 'picture is'} in two splits, byte for byte ({'; '.join(pairs)}): what is "
            "learnt or chosen on one is then measured on the other. They stay in; for a fair comparison remove them from one "
            "split."
        )
    return notes + labels_note(summary.get("two_labels", ()), summary.get("two_labels_count", 0))


# -- pictures --------------------------------------------------------------------------------------------------------------
def refuse_unreadable(splits: Splits, judged: Mapping[str, Dataset], cells: Iterable[Cell], allow_fewer: bool) -> None:
    """Reads every picture that these cells need.

    Raises:
        UserError: some cannot be read.
    """
    tasks = {(cell.shots, cell.seed) for cell in cells}
    used = {row for task in tasks for row in make_task(splits, *task, allow_fewer)[1]["train"]}
    parts = {"train": splits.train.select(sorted(used)), "validation": splits.validation, **judged}
    bad = [place for name, dataset in parts.items() for place in unreadable(name, dataset)]
    if bad:
        them = "them" if len(bad) > 1 else "it"
        raise UserError(
            f"expected pictures that can be read, found {len(bad)} that cannot: {some(bad)}. Repair or remove {them}, or type "
            f"--on_bad_image skip to leave {them} out."
        )


def unreadable(name: str, dataset: Dataset) -> list[str]:
    """The places of pictures in a split that cannot be decoded."""
    bad = np.flatnonzero(~readable_rows(dataset, name))
    rows = undecoded(dataset.select(bad), ("image", "source_row"))
    places = [f"row {row.get('source_row', i)} of {dataset.split or name}" for i, row in zip(bad, rows, strict=True)]
    paths = [(row["image"] or {}).get("path") for row in rows]
    return [f"{path} ({place})" if path else place for path, place in zip(paths, places, strict=True)]
