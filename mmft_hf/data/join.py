"""Joins captions without images to images that the user has, by the sha256 of the image files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from datasets import ClassLabel, Dataset, DatasetDict, List, Value

from ..core.errors import UserError
from .columns import LISTS, NULL, TEXT
from .images import BadImage, original_bytes
from .labels import MISSING, Labels, class_names_of, same_name


def join_captions(images: Dataset, captions: DatasetDict, name: str) -> tuple[Dataset, list[str]]:
    """Adds captions to the images whose bytes have their sha256.

    Args:
        images: columns `image` (not decoded) and `label` (`ClassLabel`, or lists of it).
        captions: every split has `captions` and `image_sha256`, and possibly `label`.
        name: of the dataset of captions, for messages.

    Returns:
        The images with `captions` (empty if there are none), and sentences about what did not match.

    Raises:
        UserError: a column is missing; no image matches.
    """
    found = _captions_by_digest(captions, name)
    names = class_names_of(images)
    joined, matched, without, other_class = [], set(), 0, 0
    for row in images.select_columns(["image", "label"]):
        digest = _digest(row["image"])
        entries = found.get(digest, ())
        texts = _texts(entries, row["label"], names)
        matched |= {digest} if entries else set()
        other_class += bool(entries) and not texts
        without += not texts
        joined.append(texts)
    if found and not matched:
        raise UserError(
            f"{name}: expected captions of these images, found none: no image file has the content of any of its "
            f"{len(found):,} captioned images. Files that were converted or resized do not match."
        )
    notes = [f"Captions of {name}: {len(joined) - without:,} of {len(joined):,} images have some."]
    if without - other_class:
        notes.append(f"{without - other_class:,} images are not in {name}, and train with the class template alone.")
    if len(found) > len(matched):
        notes.append(f"{len(found) - len(matched):,} captioned images of {name} are not among these images.")
    if other_class:
        notes.append(f"{other_class:,} images have another class there; those captions are left out.")
    if "captions" in images.column_names:
        images = images.remove_columns("captions")
    return images.add_column("captions", joined, feature=List(Value("string"))), notes


def captions_of_all(images: Dataset, captions: Dataset, name: str) -> list[list[str]]:
    """The captions of the images, each of which must be among the captioned ones under a class of its own.

    Args:
        images: columns `image` (not decoded) and `label`.
        captions: columns `captions`, `image_sha256`, and possibly `label`. An image may be without captions.
        name: of the dataset of captions, for messages.

    Raises:
        UserError: a column or an image is missing.
    """
    found = _captions_by_digest({"train": captions}, name)
    known, names = set(captions["image_sha256"][:]), class_names_of(images)
    joined, missing, other_class = [], 0, 0
    for row in images.select_columns(["image", "label"]):
        digest = _digest(row["image"])
        joined.append(_texts(found.get(digest, ()), row["label"], names))
        missing += digest not in known
        other_class += digest in found and not joined[-1]
    if missing or other_class:
        wrong = [f"{missing:,} that are not there"] * bool(missing)
        wrong += [f"{other_class:,} that have another class there"] * bool(other_class)
        raise UserError(
            f"{name}: expected captions of each of the {len(images):,} training images, found {' and '.join(wrong)}. Type the folder "
            "that mmft-hf caption refine made of this dataset."
        )
    return joined


KEPT = ("text", "scores", "step", "aspect", "prompt_id")  # fields of records


def records_of_all(images: Dataset, captions: Dataset) -> list[list[dict]]:
    """Text, scores and sources of the caption records of the images, under whatever class.

    Args:
        images: column `image` (not decoded).
        captions: columns `caption_records` and `image_sha256`.
    """
    found: dict[str, list[dict]] = {}
    for row in captions.select_columns(["caption_records", "image_sha256"]):
        own = [{name: r.get(name) for name in KEPT} for r in row["caption_records"] or () if r["text"]]
        found.setdefault(row["image_sha256"], []).extend(own)
    return [found.get(_digest(row["image"]), []) for row in images.select_columns("image")]


def _texts(entries: Iterable[tuple[set[str], list[str]]], label: int | list[int], names: Sequence[str]) -> list[str]:
    """The captions of an image, each once, out of `entries` for its content.

    A caption describes its class. It would be wrong for the same image under the name of another class.
    """
    codes = label if isinstance(label, list) else [label]
    own = {same_name(names[code]) for code in codes if code is not None}
    return list(dict.fromkeys(text for classes, texts in entries if not classes or classes & own for text in texts))


def _captions_by_digest(captions: Mapping[str, Dataset], name: str) -> dict[str, list[tuple[set[str], list[str]]]]:
    """The captions of each sha256, with the names of their classes as far as they are known."""
    found: dict[str, list[tuple[set[str], list[str]]]] = {}
    for split, rows in captions.items():
        missing = [column for column in ("captions", "image_sha256") if column not in rows.column_names]
        if missing:
            raise UserError(
                f"{name}, split {split!r}: expected columns captions and image_sha256, found {', '.join(rows.column_names)}. "
                "Type the name of a dataset that mmft-hf push published."
            )
        kinds = rows.features.get("label", NULL)
        inner = kinds.feature if isinstance(kinds, LISTS) else kinds
        known = Labels.of(rows, f"{name}, split {split!r}") if isinstance(inner, ClassLabel) or inner in TEXT else None
        classes: list[set[str]] = [set() for _ in range(len(rows))]
        if known is not None:
            places = range(len(rows)) if known.row_of is None else known.row_of.tolist()
            for place, code in zip(places, known.codes.tolist(), strict=True):
                classes[place] |= set() if code == MISSING else {same_name(known.names[code])}
        for own, row in zip(classes, rows.select_columns(["captions", "image_sha256"]), strict=True):
            if row["image_sha256"] and row["captions"]:
                found.setdefault(row["image_sha256"], []).append((own, row["captions"]))
    return found


def _digest(image: dict | None) -> str:
    try:
        return hashlib.sha256(original_bytes(image)).hexdigest()
    except BadImage:
        return ""
