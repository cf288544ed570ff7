"""What an import and a merge of captions share: a labelled data set taken apart, and put together with new captions.

New columns are put beside the `image` column, which stays the table that it was wherever it can. What is held in memory
is the captions, and one hash and one name per image.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, Image, concatenate_datasets
from datasets.fingerprint import Hasher

from ...core.errors import UserError
from ...data.images import BadImage, original_bytes
from ...data.splits import captions_of
from ..ask.pictures import sha256
from ..types import ACCEPTED
from .dataset import CAPTION_FEATURES, RECORD


class CaptionTable:
    """What is small in a data set, row by row, and `rest`: the images undecoded, without the captions.

    Args:
        name: of the data set, for messages.
        dataset: columns `image` and `label`, and perhaps those of `CAPTION_FEATURES`.
        captioned: whether it must have captions.

    Raises:
        UserError: no rows, columns that are missing or of another type, a row without a class, an image that is not the
            one that `image_sha256` says. An image that cannot be read has None among the `hashes`.
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
        for path, sha in _pictures(dataset):
            self.files.append(_folder_and_file(path))
            self.hashes.append(sha)
        for row, sha in enumerate(self._column(dataset, "image_sha256")):
            if None not in (sha, self.hashes[row]) and sha != self.hashes[row]:
                raise UserError(
                    f"{name}, row {row} ({self.image_name(row)}): expected the picture with sha256 {sha[:12]}…, found "
                    f"{self.hashes[row][:12]}…. Its captions may be another picture's: caption it again."
                )
        self.captions = [captions_of(value) for value in self._column(dataset, "captions")]
        self.records = [self._complete(value) for value in self._column(dataset, "caption_records")]
        self.rest = dataset.remove_columns([column for column in CAPTION_FEATURES if column in self.columns])

    def image_name(self, row: int) -> str:
        """For people: class and file, or the row where images have no file names."""
        file = self.files[row][1]
        return f"{self.class_names[self.labels[row]]}/{file}" if file else f"row {row} of {self.name}"

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
    """What makes two records the same caption. A failure has no text: its status takes the place."""
    return (
        *(record[name] for name in ("aspect", "model", "prompt_id", "sample")),
        record["text"] or (record["status"],),
    )


def texts_of(records: Iterable[Mapping], others: Iterable[str]) -> list[str]:
    """The `captions` of an image: accepted texts in the order of the records, then `others`; each once."""
    accepted = [record["text"] for record in records if record["status"] in ACCEPTED and record["text"]]
    return list(dict.fromkeys([*accepted, *others]))


def picture_hashes(dataset: Dataset) -> list[str | None]:
    """The sha256 of the bytes of each undecoded image, None if it cannot be read; one image at a time is in memory."""
    return [sha for _, sha in _pictures(dataset)]


def _pictures(dataset: Dataset) -> Iterable[tuple[str | None, str | None]]:
    for row in dataset.select_columns("image"):
        try:
            digest = sha256(original_bytes(row["image"]))
        except BadImage:
            digest = None
        yield (row["image"] or {}).get("path"), digest


def _folder_and_file(path: str | None) -> tuple[str, str]:
    """Names of both, each perhaps empty."""
    parts = Path(nfc(path or "")).parts
    return (parts[-2].strip("/") if len(parts) > 1 else "", parts[-1] if parts else "")


def nfc(text: str) -> str:
    """One spelling of accented letters: file systems and writers of JSON differ."""
    return unicodedata.normalize("NFC", text)


def put_beside(images: Dataset, columns: dict[str, list], features: Mapping) -> Dataset:
    """The undecoded images with more columns, `image_sha256` among them, which is compared with the result.

    Images that lie in files of their own are taken in, since parquet files are written with what is inside alone; a
    selection of rows is copied too. Both go to disk in small batches. All else is left where it is.
    """
    outside = not all(_inside(images))
    if outside or images._indices is not None:
        fingerprint = Hasher.hash((images._fingerprint, columns["image_sha256"], "inside"))  # files may have changed
        options = {"writer_batch_size": 16, "new_fingerprint": fingerprint, "desc": "Gathering pictures"}
        images = images.map(_take_in, features=images.features, **options)
    result = concatenate_datasets([images, Dataset.from_dict(columns, features=Features(features))], axis=1)
    if picture_hashes(result) != columns["image_sha256"]:
        raise RuntimeError("captions were paired with other pictures, or pictures changed")  # a defect of ours
    return result


def _inside(images: Dataset) -> Iterable[bool]:
    for chunk in images.data.column("image").chunks:
        yield from pc.is_valid(chunk.field("bytes")).to_pylist()


def _take_in(row: dict) -> dict:
    path = (row["image"] or {}).get("path")
    name = Path(path).name if path else None
    try:
        return {"image": {"bytes": original_bytes(row["image"]), "path": name}}
    except BadImage:
        return {"image": {"bytes": None, "path": name}}


def few(names: Sequence, count: int = 3) -> str:
    """The first of them, for a message."""
    return ", ".join(str(name) for name in names[:count]) + (", …" if len(names) > count else "")
