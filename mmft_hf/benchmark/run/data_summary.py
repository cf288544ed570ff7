"""`data.json`: what the methods are compared on, for a report that opens neither the data set nor a model."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from datasets import Dataset, Image

from ...core.errors import UserError
from ...data.images import BadImage, content_hash, read_image
from ...data.splits import Splits, captions_of, labels_of

DATA_FILE = "data.json"
PIXELS = 96  # of the longer side of an example
CAPTIONS = 3  # of an example
MANY_CLASSES = 200  # of more there is one example each, otherwise two
MOST_DUPLICATES = 100  # that are listed


def describe(splits: Splits, judged: Mapping[str, Dataset], group_column: str | None = None) -> dict:
    """What there is to know of the data without opening them: see the keys below.

    Args:
        judged: the splits that methods are judged on, by name, `test` first.
        group_column: images with the same value there are not independent, as drawings of one concept.

    Returns:
        `class_names` (C), `labels` by judged split, `groups` likewise (None without a column),
        `train_images_per_class` (C), `validation_images`, `captions` (None without any: `images` that have some,
        `captions`), `duplicates` (`splits` and `images`, two each) with `duplicates_count`, `examples` of training images by
        class number.

    Raises:
        UserError: a judged split has no such column.
    """
    classes = len(splits.class_names)
    duplicates = find_duplicates({"train": splits.train, "validation": splits.validation, **judged})
    captions = None
    if splits.has_captions:
        counts = splits.captions_per_image()
        captions = {"images": int((counts > 0).sum()), "captions": int(counts.sum())}
    return {
        "class_names": list(splits.class_names),
        "labels": {name: labels_of(dataset).tolist() for name, dataset in judged.items()},
        "groups": groups_of(judged, group_column),
        "train_images_per_class": np.bincount(labels_of(splits.train), minlength=classes).tolist(),
        "validation_images": len(splits.validation),
        "captions": captions,
        "duplicates": duplicates[:MOST_DUPLICATES],
        "duplicates_count": len(duplicates),
        "examples": examples(splits.train, classes),
    }


def groups_of(judged: Mapping[str, Dataset], column: str | None) -> dict[str, list[str]] | None:
    """The group of each image of each split; an image without one is its own."""
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


def find_duplicates(splits: Mapping[str, Dataset]) -> list[dict]:
    """Images of a split whose bytes an earlier split has, too: `splits` and `images`, the earlier ones first."""
    first: dict[bytes, tuple[str, int]] = {}
    found = []
    for name, dataset in splits.items():
        images = dataset.select_columns("image").cast_column("image", Image(decode=False))
        hashes, own = [], {}
        with ThreadPoolExecutor(8) as threads:  # reading and hashing leave the interpreter free
            for batch in images.iter(256):
                hashes += threads.map(content_hash, batch["image"])
        for row, digest in enumerate(hashes):
            if digest == bytes(32):  # there is nothing to read
                continue
            if digest in first:
                split, other = first[digest]
                found.append({"splits": [split, name], "images": [_name(splits[split], other), _name(dataset, row)]})
            else:
                own.setdefault(digest, (name, row))
        first |= own
    return found


def _name(dataset: Dataset, row: int) -> str:
    """What an image is called: its own id, its file with the folder, which every class may have one of, or its row."""
    known = [name for name in ("id", "source_row", "image") if name in dataset.column_names]
    found = dataset.select([row]).select_columns(known).cast_column("image", Image(decode=False))[0]
    if "id" in found:
        return str(found["id"])
    path = (found["image"] or {}).get("path") or ""
    # What is in an archive is called `zip://bird/1.png::/home/me/birds.zip`.
    return "/".join(Path(path.split("::")[0]).parts[-2:]).lstrip("/") or f"row {found.get('source_row', row)}"


def examples(train: Dataset, classes: int) -> dict[str, list[dict]]:
    """Small training images of each class as base64 JPEG, with some of their captions; those with captions first, and different ones."""
    each = 2 if classes <= MANY_CLASSES else 1
    rows = train.select_columns([c for c in ("image", "captions") if c in train.column_names])
    rows = rows.cast_column("image", Image(decode=False))
    texts = [captions_of(value) for value in train["captions"][:]] if "captions" in train.column_names else None
    labels, found = labels_of(train), {}
    for label in range(classes):
        own = np.flatnonzero(labels == label).tolist()
        if texts:  # those with texts of their own first: pictures of one thing may share theirs
            once = {tuple(texts[row]): row for row in reversed(own) if texts[row]}
            own.sort(key=lambda row: (once.get(tuple(texts[row])) != row, not texts[row]))
        shown = []
        for row in own:
            try:
                picture = read_image(rows[row]["image"])
            except BadImage:
                continue
            picture.thumbnail((PIXELS, PIXELS))
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=85)
            image = base64.b64encode(file.getvalue()).decode()
            shown.append({"image": image, "captions": texts[row][:CAPTIONS] if texts else []})
            if len(shown) == each:
                break
        found[str(label)] = shown
    return found
