"""What a dataset holds before its columns have their names and its splits their roles."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from datasets import DatasetDict

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
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


def empty_split(name: str, split: str) -> str:
    """The message for a split without images."""
    return f"dataset {name!r}: expected images in split {split!r}, found none: it is empty. Remove it, or fill it."
