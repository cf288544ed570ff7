"""Which splits methods are judged on: the test split, and further ones of the same classes, as drawn by other hands."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace

from datasets import Dataset, DatasetDict

from ...core.arguments import DataArguments
from ...core.errors import UserError, nearest
from ...data.sources import load_raw
from ...data.splits import SPLIT_NAMES, labels_of, load_test_split


def check_labels(args: DataArguments, shift_splits: Iterable[str]) -> None:
    """Looks whether all that is judged on is there, has labels, and is not trained on or selected with.

    Raises:
        UserError: it is not so. Where there is no test split at all, `load_splits` holds part of the training images out.
    """
    raw = load_raw(args.dataset_name, args.dataset_config_name, args.dataset_revision, args.image_root)
    roles = _roles(raw, args)
    named = roles.get("test")
    if named in raw and len(raw[named]) and not _has_labels(raw[named], args.label_column):
        others = [name for name in raw if _has_labels(raw[name], args.label_column)]
        raise UserError(
            f"split {named!r}: expected labels to judge the methods by, found none. Type --test_split NAME with one that has "
            f"labels ({', '.join(others) or 'there is none'})."
        )
    names = list(shift_splits)
    for name in names:
        free = [other for other in raw if other not in roles.values()]
        there = f"Splits that are free: {', '.join(free) or 'none'}."
        if name not in raw:
            raise UserError(
                f"--shift_splits {name}: expected a split of the data set, found {', '.join(raw)}.{nearest(name, raw)} {there}"
            )
        role = next((role for role, taken in roles.items() if taken == name), None)
        if role or names.count(name) > 1:
            raise UserError(
                f"--shift_splits {name}: expected one role for each split, found it as "
                f"{role + ' split, too' if role else 'a shift twice'}. {there}"
            )
        if len(raw[name]) == 0 or not _has_labels(raw[name], args.label_column):
            raise UserError(
                f"--shift_splits {name}: expected images with labels, found {len(raw[name])} images "
                f"{'without any' if len(raw[name]) else ''}. {there}"
            )


def _roles(raw: DatasetDict, args: DataArguments) -> dict[str, str]:
    """The split that `load_splits` takes for each role, where there is one."""
    found = {}
    for role, aliases in SPLIT_NAMES.items():
        name = getattr(args, f"{role}_split") or next((alias for alias in aliases if alias in raw), None)
        if name is not None and name not in found.values():
            found[role] = name
    return found if "train" in found else {"train": next(iter(raw)), **found}


def _has_labels(dataset: Dataset, column: str) -> bool:
    """Whether any row has one; -1 is how the test split of a challenge says that it has none."""
    return column not in dataset.column_names or not set(dataset[column][:]) <= {None, -1}


def load_shifts(args: DataArguments, names: Iterable[str], class_names: list[str]) -> dict[str, Dataset]:
    """The splits of these names, their labels matched to the classes by name.

    Raises:
        UserError: a class that is not among `class_names`.
    """
    return {name: load_test_split(replace(args, test_split=name), class_names) for name in names}


def fingerprint_of(dataset: Dataset) -> str:
    """16 hex digits of labels and picture files, as in `Splits.fingerprint`; no picture is opened."""
    digest = hashlib.sha256(labels_of(dataset).astype("<i8").tobytes())
    digest.update(json.dumps(dataset["image_id"][:]).encode())
    return digest.hexdigest()[:16]
