"""The caption records of one split, as steps see them."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from datasets import Dataset

from ..core.errors import UserError, nearest
from .experts import asked_expert, is_expert
from .steps.base import Row
from .types import ACCEPTED
from .write.dataset import CAPTION_FEATURES, RECORD, captions_from
from .write.labelled import LabelledImages, with_columns


class CaptionTable:
    """The caption records of one split, in an order that depends on pictures and classes alone.

    Args:
        name: of the dataset, for messages.
        dataset: columns `image`, `label`, and `captions` or `caption_records`.
        group_column: see `CaptionArguments`.
        columns: those that steps read (`Step.columns`), each with the name of a step that does. A function takes the place of a column
            that is not there, see `experts`.

    Attributes:
        rows: in the order of class and sha256.
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
        records = [with_all(r, c) for r, c in zip(part.records, part.captions, strict=True)]
        if not any(map(captions_from, records)):
            raise UserError(
                f"{name}: expected captions, found none. Type mmft-hf caption --dataset_name {shlex.quote(name)} …"
            )
        texts = ["\n".join(sorted(captions_from(own))) for own in records]
        counts = Counter(zip(part.labels, texts, strict=True))
        self.shared = sum(count for (_, text), count in counts.items() if count > 1 and text)
        values = dataset[group_column][:] if group_column else [text or None for text in texts]
        groups = [f"row {i}" if value is None else f"= {value}" for i, value in enumerate(values)]
        self.order = sorted(range(len(records)), key=lambda i: (part.labels[i], part.hashes[i] or "", i))
        read = {
            column: dataset[column][:]
            if column in dataset.column_names
            else asked_expert(column, part.images, part.hashes)
            for column in columns
        }
        self.rows = [
            Row(
                part.hashes[i],
                part.labels[i],
                part.class_name(i),
                groups[i],
                records[i],
                {column: found[i] for column, found in read.items()},
            )
            for i in self.order
        ]

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
        records: list = [None] * len(self.order)
        for i, row in zip(self.order, self.rows, strict=True):
            records[i] = [dict.fromkeys(RECORD) | record for record in row.records]
        return _rebuilt(self.part, records, [captions_from(own) for own in records])


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


def _rebuilt(part: LabelledImages, records: list, captions: list) -> Dataset:
    columns = {"captions": captions, "caption_records": records, "image_sha256": part.hashes}
    result = with_columns(part.images, columns, CAPTION_FEATURES)
    ordered = [name for name in part.columns if name in result.column_names]
    return result.select_columns(ordered + [name for name in result.column_names if name not in ordered])


def completed(name: str, dataset: Dataset) -> Dataset:
    """A split that is not refined, with the columns and fields of one that is."""
    part = LabelledImages(name, dataset)
    return _rebuilt(part, part.records, part.captions)
