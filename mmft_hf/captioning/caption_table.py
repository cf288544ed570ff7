"""The caption records of one split, as steps see them."""

from __future__ import annotations

import hashlib
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType

from datasets import Dataset, Features, concatenate_datasets

from ..core.errors import UserError, nearest
from .experts import asked_expert, is_expert
from .spool import Spool
from .steps.base import Row
from .types import ACCEPTED
from .write.dataset import CAPTION_FEATURES, RECORD, captions_from
from .write.labelled import LabelledImages, beside


class CaptionTable:
    """The caption records of one split, in an order that depends on pictures and classes alone.

    Args:
        name: of the dataset, for messages.
        dataset: columns `image`, `label`, and `captions` or `caption_records`.
        group_column: see `CaptionArguments`.
        columns: those that steps read (`Step.columns`), each with the name of a step that does. A function takes the place of a column
            that is not there, see `experts`.

    Attributes:
        rows: in the order of class and sha256. They are on disk, and so is what takes their place.
        digest: of the captions, in the order of the dataset.
        order: for each of them, its number in the dataset.
        shared: number of images that have all their captions in common with another one. Without a `group_column` they form
            groups.

    Raises:
        UserError: no such column; no captions.
    """

    def __init__(
        self,
        name: str,
        dataset: Dataset,
        group_column: str | None = None,
        columns: Mapping[str, str] = MappingProxyType({}),
    ):
        asked = {column: f"step {step}, column" for column, step in columns.items()}
        for column, what in (asked | ({group_column: "--group_column"} if group_column else {})).items():
            if column not in dataset.column_names and not (column in asked and is_expert(column)):
                raise UserError(
                    f"{what}: expected one of {', '.join(dataset.column_names)}, found {column!r}."
                    f"{nearest(column, dataset.column_names)}"
                )
        if {"captions", "caption_records"}.isdisjoint(dataset.column_names):
            raise UserError(
                f"{name}: expected a column captions, found {', '.join(dataset.column_names)}. If the captions are in another column, "
                "type --captions_column NAME."
            )
        self.part = part = LabelledImages(name, dataset, captioned=True)
        seen, texts = hashlib.sha256(), []  # of each image, the digest of its captions; empty without any
        for captions, records in part.each():
            seen.update(repr(captions).encode())
            own = captions_from(with_all(records, captions))
            texts.append(hashlib.sha256("\n".join(sorted(own)).encode()).hexdigest() if own else "")
        self.digest = seen.hexdigest()
        if not any(texts):
            raise UserError(
                f"{name}: expected captions, found none. Type mmft-hf caption --dataset_name {shlex.quote(name)} …"
            )
        counts = Counter(zip(part.labels, texts, strict=True))
        self.shared = sum(count for (_, text), count in counts.items() if count > 1 and text)
        values = dataset[group_column][:] if group_column else [text or None for text in texts]
        groups = [f"row {i}" if value is None else f"= {value}" for i, value in enumerate(values)]
        self.order = sorted(range(len(texts)), key=lambda i: (part.labels[i], part.hashes[i] or "", i))
        read = {
            column: dataset[column][:]
            if column in dataset.column_names
            else asked_expert(column, part.images, part.hashes)
            for column in columns
        }
        self.rows: Sequence[Row] = Spool(
            Row(
                part.hashes[i],
                part.labels[i],
                part.class_name(i),
                groups[i],
                with_all(records, captions),
                {column: found[i] for column, found in read.items()},
            )
            for i, (captions, records) in zip(self.order, part.each(self.order), strict=True)
        )

    def images(self) -> Dataset:
        """The images and labels in the order of `rows`, not decoded."""
        return self.part.images.select_columns(["image", "label"]).select(self.order)

    def scores(self) -> list[str]:
        """Names of the scores that captions have."""
        found = (score["name"] for row in self.rows for k in row.captions() for score in row.records[k]["scores"] or ())
        return list(dict.fromkeys(found))

    def texts(self) -> set[str]:
        """All captions."""
        return {row.records[k]["text"] for row in self.rows for k in row.captions()}

    def dataset(self) -> Dataset:
        """The dataset with the present records."""
        places = sorted(range(len(self.order)), key=self.order.__getitem__)
        found = ([dict.fromkeys(RECORD) | record for record in self.rows[k].records] for k in places)
        return _rebuilt(self.part, ((captions_from(own), own) for own in found))


def with_all(records: Sequence[dict], captions: Sequence[str]) -> list[dict]:
    """The records of an image, and one for each of its captions that has none: a text that the dataset already had."""
    known = {record["text"] for record in records if record["status"] in ACCEPTED}
    own = {
        "aspect": "captions",
        "status": "ok",
        "model": "columns",
        "prompt_id": "captions",
        "checks": [],
        "attempts": 1,
    }
    new = [text for text in dict.fromkeys(captions) if text not in known]
    return [*records, *(dict.fromkeys(RECORD) | own | {"text": text, "sample": i} for i, text in enumerate(new))]


def _rebuilt(part: LabelledImages, rows: Iterator[tuple[list[str], list[dict]]]) -> Dataset:
    """The dataset with other captions and records."""
    parts, features = [], Features(CAPTION_FEATURES)
    for start in range(0, len(part.hashes), 200):
        captions, records = zip(*islice(rows, 200), strict=True)
        columns = {"captions": captions, "caption_records": records, "image_sha256": part.hashes[start : start + 200]}
        parts.append(Dataset.from_dict(columns, features=features))
    result = beside(part.images, concatenate_datasets(parts))
    ordered = [name for name in part.columns if name in result.column_names]
    return result.select_columns(ordered + [name for name in result.column_names if name not in ordered])


def completed(name: str, dataset: Dataset) -> Dataset:
    """A split that is not refined, with the columns and fields of one that is."""
    part = LabelledImages(name, dataset)
    return _rebuilt(part, part.each())
