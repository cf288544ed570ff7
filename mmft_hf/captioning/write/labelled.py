"""Shared by imports and merges: a labelled dataset is taken apart into images and small columns, and rebuilt.

New columns are placed next to the `image` column, which is not copied unless it has to be. Only the captions and one hash
and one name per image are held in memory.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Image, concatenate_datasets
from datasets.fingerprint import Hasher

from ...core.console import some
from ...core.errors import UserError
from ...data.splits import captions_of
from .dataset import CAPTION_FEATURES, RECORD, stored_image


class LabelledImages:
    """The small columns of a dataset, row by row, and `images`: the dataset without captions, images not decoded.

    Args:
        name: of the dataset, for messages.
        dataset: columns `image` and `label`, and perhaps those of `CAPTION_FEATURES`.
        captioned: whether it must have captions.

    Attributes:
        labels, files, hashes: of each row: class number, names of the image's folder and file (empty if unknown), and
            sha256 of the image (None if it cannot be read).
        captions, records: of each row. `each` gives them without holding them all.

    Raises:
        UserError: no rows; columns that are missing or of another type; a row without a class; an image whose sha256
            differs from its `image_sha256`.
    """

    def __init__(self, name: str, dataset: Dataset, captioned: bool = False):
        self.name, self.columns = name, dataset.column_names
        missing = {"image", "label"} - set(self.columns)
        if missing or (captioned and not {"captions", "caption_records"} & set(self.columns)):
            raise UserError(
                f"{name}: expected columns image, label{' and captions' * captioned}, found {', '.join(self.columns)}."
            )
        kind = dataset.features["label"]
        if not isinstance(kind, ClassLabel) or not len(dataset):
            raise UserError(
                f"{name}: expected images, and labels with class names; found {len(dataset)} rows of {kind}."
            )
        dataset = dataset.with_format(None).cast_column("image", Image(decode=False))
        self.class_names, self.labels = list(kind.names), dataset["label"][:]
        for row, label in enumerate(self.labels):
            if label is None or not 0 <= label < len(self.class_names):
                raise UserError(f"{name}, row {row}: expected a class, found {label}. Correct the row or remove it.")
        self.files, self.hashes = [], []
        for row in dataset.select_columns("image"):
            path = Path(nfc((row["image"] or {}).get("path") or ""))
            self.files.append((path.parent.name, path.name))
            self.hashes.append(stored_image(row["image"])[1])
        for row, sha in enumerate(self._column(dataset, "image_sha256")):
            if None not in (sha, self.hashes[row]) and sha != self.hashes[row]:
                raise UserError(
                    f"{name}, row {row} ({self.image_name(row)}): expected the picture with sha256 {sha[:12]}…, found "
                    f"{self.hashes[row][:12]}…. Its captions may be another picture's: caption it again."
                )
        own = [column for column in ("captions", "caption_records") if column in self.columns]
        self._captioned = dataset.select_columns(own) if own else None
        self.images = dataset.remove_columns([column for column in CAPTION_FEATURES if column in self.columns])

    def each(self, rows: Sequence[int] | None = None) -> Iterator[tuple[list[str], list[dict]]]:
        """Captions and records of all rows, or of some in their order, with few of them in memory at a time."""
        if self._captioned is None:
            yield from (([], []) for _ in (self.labels if rows is None else rows))
            return
        chosen = self._captioned if rows is None else self._captioned.select(rows)
        for batch in chosen.iter(200):
            size = len(next(iter(batch.values())))
            captions, records = (batch.get(name, [None] * size) for name in ("captions", "caption_records"))
            yield from ((captions_of(own), self._complete(found)) for own, found in zip(captions, records, strict=True))

    @cached_property
    def captions(self) -> list[list[str]]:
        return [captions for captions, _ in self.each()]

    @cached_property
    def records(self) -> list[list[dict]]:
        return [records for _, records in self.each()]

    def class_name(self, row: int) -> str:
        return self.class_names[self.labels[row]]

    def image_name(self, row: int) -> str:
        """The name of an image in messages: class and file, or the row if images have no file names."""
        file = self.files[row][1]
        return f"{self.class_name(row)}/{file}" if file else f"row {row} of {self.name}"

    def unreadable(self) -> list[str]:
        """Names of the images that cannot be read."""
        return [self.image_name(row) for row, sha in enumerate(self.hashes) if sha is None]

    def _column(self, dataset: Dataset, column: str) -> list:
        return dataset[column][:] if column in self.columns else [None] * len(dataset)

    def _complete(self, value) -> list[dict]:
        """Records of earlier versions and of other tools may lack fields."""
        for record in value or ():
            if not isinstance(record, Mapping) or not set(record) <= set(RECORD):
                raise UserError(
                    f"{self.name}, column caption_records: expected the fields {', '.join(RECORD)}, found {record}."
                )
        return [dict.fromkeys(RECORD) | dict(record) for record in value or ()]


def record_key(record: Mapping) -> tuple:
    """Equal for records of the same caption. A failure has no text, so its status takes the place of one."""
    text = record["text"] or (record["status"],)
    return (*(record[name] for name in ("aspect", "model", "prompt_id", "sample")), text)


def nfc(text: str) -> str:
    """One spelling of accented letters, because file systems and writers of JSON differ."""
    return unicodedata.normalize("NFC", text)


def note(before: str, names: list[str], what: str) -> list[str]:
    """A sentence that counts and names some images or keys; nothing if there are none."""
    return [f"{before}{len(names):,} {what}: {some(names, 3)}."] if names else []


def with_columns(images: Dataset, columns: dict[str, list], features: Mapping) -> Dataset:
    """Adds columns, `image_sha256` among them, to undecoded images. See `beside`."""
    return beside(images, Dataset.from_dict(columns, features=Features(features)))


def beside(images: Dataset, columns: Dataset) -> Dataset:
    """Adds columns, `image_sha256` among them, to undecoded images.

    Images that are separate files are read into the dataset, because parquet files contain only what is inside; a selection
    of rows is copied, too. Both are written to disk in small batches. Everything else is left where it is.
    """
    inside = pc.all(pc.is_valid(pc.struct_field(images.data.column("image"), "bytes"))).as_py()
    if not inside or images._indices is not None:
        images = images.map(
            lambda row: {"image": stored_image(row["image"])[0]},
            features=images.features,
            writer_batch_size=16,
            new_fingerprint=Hasher.hash(
                (images._fingerprint, columns["image_sha256"][:], "inside")
            ),  # files may have changed
            desc="Gathering pictures",
        )
    result = concatenate_datasets([images, columns], axis=1)
    if [stored_image(row["image"])[1] for row in result.select_columns("image")] != columns["image_sha256"][:]:
        raise RuntimeError("captions were paired with other pictures, or pictures changed")  # a bug in this package
    return result.cast_column("image", Image())
