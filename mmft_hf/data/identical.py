"""Finds identical pictures: in two splits, where they flatter a metric, or with two labels, of which one is wrong."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Image

from ..core.console import many, printable_text
from .images import content_hash
from .labels import class_names_of, labels_of


@dataclass
class Identical:
    """Pictures that are the same byte for byte.

    Args:
        across: pictures that an earlier split holds too: `splits` and `images`, two names each, the earlier one first.
        labels: pictures that have another label elsewhere: `labels` and `images`, two names each.
    """

    across: list[dict]
    labels: list[dict]

    def notes(self) -> list[str]:
        """At most one sentence about each kind."""
        notes = []
        if self.across:
            counts = Counter(tuple(found["splits"]) for found in self.across)
            where = "; ".join(f"{count:,} of {later} in {earlier} too" for (earlier, later), count in counts.items())
            one, other = self.across[0]["images"]
            notes.append(
                f"Identical pictures in several splits: {where}, such as {_shown(other)} ({_shown(one)}). Metrics on them say "
                "nothing about new pictures."
            )
        return notes + labels_note(self.labels, len(self.labels))


def labels_note(found: Sequence[Mapping], count: int) -> list[str]:
    """A sentence on `count` pictures with two labels, of which `found` holds the first ones (`Identical.labels`)."""
    if not found:
        return []
    (one, other), (a, b) = found[0]["images"], found[0]["labels"]
    return [
        f"Identical pictures with different labels: {many(count, 'picture')}, such as {_shown(one)} ({_shown(a)}) and "
        f"{_shown(other)} ({_shown(b)}). At most one of the labels is right."
    ]


def find_identical(splits: Mapping[str, Dataset]) -> Identical:
    """Compares all pictures by the hash of their bytes. Only those whose size in bytes another one has are read.

    Args:
        splits: by name, in the order in which they count as earlier.
    """
    images = {
        name: rows.select_columns("image").cast_column("image", Image(decode=False)) for name, rows in splits.items()
    }
    sizes = {name: _sizes(rows) for name, rows in images.items()}
    count = Counter(size for own in sizes.values() for size in own if size is not None)
    copies: dict[bytes, list[tuple[str, int]]] = defaultdict(list)
    with ThreadPoolExecutor(8) as threads:  # reading and hashing leave the interpreter free
        for name, rows in images.items():
            wanted = [row for row, size in enumerate(sizes[name]) if count[size] > 1]
            for start in range(0, len(wanted), 256):
                part = wanted[start : start + 256]
                for row, digest in zip(part, threads.map(content_hash, rows[part]["image"]), strict=True):
                    if digest != bytes(32):  # the file is missing
                        copies[digest].append((name, row))

    order = {name: place for place, name in enumerate(splits)}
    labels = {name: labels_of(rows) if "label" in rows.column_names else None for name, rows in splits.items()}
    across, different = [], []
    for places in copies.values():
        first = places[0]
        for place in places[1:]:
            if place[0] != first[0]:
                across.append((first, place))
            one, other = (None if labels[name] is None else labels[name][row].tolist() for name, row in (first, place))
            if one is not None and other is not None and one != other:
                different.append((first, place))

    def in_order(pairs):
        return sorted(pairs, key=lambda pair: (order[pair[1][0]], pair[1][1]))

    def names(pair) -> list[str]:
        return [name_of(splits[name], row) for name, row in pair]

    return Identical(
        [{"splits": [pair[0][0], pair[1][0]], "images": names(pair)} for pair in in_order(across)],
        [{"labels": [_label(splits[s], r) for s, r in pair], "images": names(pair)} for pair in in_order(different)],
    )


def _sizes(images: Dataset) -> list[int | None]:
    """Sizes in bytes of undecoded pictures; None for a missing file. Stored bytes are not read."""
    import pyarrow.compute as pc

    found: list[int | None] = []
    for batch in images.with_format("arrow").iter(1000):
        column = batch["image"].combine_chunks()
        stored, paths = pc.binary_length(pc.struct_field(column, "bytes")), pc.struct_field(column, "path")
        for size, path in zip(stored.to_pylist(), paths.to_pylist(), strict=True):
            if size is None:
                try:
                    size = os.path.getsize(path) if path else None
                except (OSError, ValueError):
                    size = None
            found.append(size)
    return found


def name_of(dataset: Dataset, row: int) -> str:
    """The name of an image: its id, else its folder and file name (classes may share file names), else its row."""
    known = [name for name in ("id", "source_row", "image") if name in dataset.column_names]
    found = dataset.select([row]).select_columns(known).cast_column("image", Image(decode=False))[0]
    if "id" in found:
        return str(found["id"])
    path = (found["image"] or {}).get("path") or ""
    # In an archive: `zip://bird/1.png::/home/me/birds.zip`.
    return "/".join(Path(path.split("::")[0]).parts[-2:]).lstrip("/") or f"row {found.get('source_row', row)}"


def _label(dataset: Dataset, row: int) -> str:
    label = labels_of(dataset.select([row]))[0]
    if label.ndim:
        return ", ".join(class_names_of(dataset)[c] for c in np.flatnonzero(label)) or "none"
    kind, label = dataset.features["label"], int(label)
    return kind.names[label] if isinstance(kind, ClassLabel) and 0 <= label < len(kind.names) else str(label)


def _shown(text: str) -> str:
    return printable_text(text if len(text) <= 60 else f"{text[:59]}…")
