"""What a dataset holds before its columns have their names and its splits their roles."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from datasets import DatasetDict

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
# Further words that name the folder of a split.
_FOLDER_WORDS = {
    "train": "train_set training_set trainset",
    "validation": "validate validation_set valid_set val_set valset dev_set devset development",
    "test": "testing test_set testing_set testset eval evaluate evaluation holdout hold_out",
}
_ROLES = {word: role for role, words in _FOLDER_WORDS.items() for word in (*SPLIT_NAMES[role], *words.split())}
NO_ROWS = re.compile(r'Instruction "(.*)" corresponds to no data')  # how `datasets` reports an empty split


@dataclass
class RawData:
    """The splits of an opened dataset, under the names and columns that it came with.

    Args:
        splits: one `Dataset` per split.
        notes: sentences about what was read, or left out, contrary to what a user may expect.
    """

    splits: DatasetDict
    notes: list[str] = field(default_factory=list)


def split_role(word: str) -> str | None:
    """The split that a folder or file of this name is: `train`, `validation` or `test`, or None if it is no split."""
    return _ROLES.get(_plain(word))


def split_for(role: str, names: Iterable[str]) -> str | None:
    """The split that a role takes if the user names none: that with the first of the usual names, in any case of letters."""
    names = list(names)
    by_word = {_plain(name): name for name in reversed(names)}
    return next((name for a in SPLIT_NAMES[role] if (name := a if a in names else by_word.get(a))), None)


def role_within(name: str) -> str | None:
    """The split that a word within a name hints at: `pets_train`, `1_Test`, `trainA`, `val2018`."""
    words = re.findall(r"[a-z]+", re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower())
    return next((_ROLES[word] for word in words if word in _ROLES), None)


def _plain(word: str) -> str:
    return re.sub(r"[ -]", "_", word).lower()


def empty_split(name: str, split: str) -> str:
    """The message for a split without images."""
    return f"dataset {name!r}: expected images in split {split!r}, found none: it is empty. Remove it, or fill it."
