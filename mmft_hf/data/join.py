"""Captions without images, joined to images that the user has: by the content of the files, whatever they are called."""

from __future__ import annotations

import hashlib

from datasets import ClassLabel, Dataset, DatasetDict, List, Value

from ..core.errors import UserError
from .images import BadImage, original_bytes
from .texts import clean_class_name


def join_captions(images: Dataset, captions: DatasetDict, name: str) -> tuple[Dataset, list[str]]:
    """Puts captions beside images whose bytes have their sha256.

    Args:
        images: columns `image` (not decoded) and `label` (`ClassLabel`).
        captions: every split has `captions` and `image_sha256`, and perhaps `label`.
        name: of the captions' data set, for messages.

    Returns:
        The images with `captions` (empty where there are none), and what did not match, in sentences.

    Raises:
        UserError: a column is missing; not a single image matches.
    """
    found: dict[str, list[tuple[str | None, list[str]]]] = {}
    for split, rows in captions.items():
        missing = [column for column in ("captions", "image_sha256") if column not in rows.column_names]
        if missing:
            raise UserError(
                f"{name}, split {split!r}: expected columns captions and image_sha256, found {', '.join(rows.column_names)}. "
                "Type the name of a data set that mmft-hf push made."
            )
        kind = rows.features.get("label")
        lean = rows.select_columns([c for c in ("captions", "image_sha256", "label") if c in rows.column_names])
        for row in lean:
            label = kind.names[row["label"]] if isinstance(kind, ClassLabel) and row["label"] is not None else None
            if row["image_sha256"] and row["captions"]:
                found.setdefault(row["image_sha256"], []).append((label, row["captions"]))
    names = images.features["label"].names
    joined, used, without, other_class = [], set(), 0, 0
    for row in images.select_columns(["image", "label"]):
        try:
            digest = hashlib.sha256(original_bytes(row["image"])).hexdigest()
        except BadImage:
            digest = ""
        own = clean_class_name(names[row["label"]]).casefold()
        entries = found.get(digest, ())
        # A caption speaks of its class: under another name of the same picture it would be wrong.
        fitting = [texts for label, texts in entries if label is None or clean_class_name(label).casefold() == own]
        other_class += bool(entries) and not fitting
        without += not fitting
        used |= {digest} if entries else set()
        joined.append(list(dict.fromkeys(text for texts in fitting for text in texts)))
    if found and not used:
        raise UserError(
            f"{name}: expected captions of these images, found none: no image file has the content that any of its "
            f"{len(found):,} captioned images has. Files that were converted or resized do not match."
        )
    notes = [f"Captions of {name}: {len(joined) - without:,} of {len(joined):,} images have some."]
    if without - other_class:
        notes.append(f"{without - other_class:,} images are not in {name}, and train with the class template alone.")
    if len(found) > len(used):
        notes.append(f"{len(found) - len(used):,} captioned images of {name} are not among these images.")
    if other_class:
        notes.append(f"{other_class:,} images have another class there; those captions are left out.")
    if "captions" in images.column_names:
        images = images.remove_columns("captions")
    return images.add_column("captions", joined, feature=List(Value("string"))), notes
