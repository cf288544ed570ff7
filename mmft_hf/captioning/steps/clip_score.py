"""`clip_score`: how well a caption fits its image, as the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...core.errors import UserError
from ...data.texts import DEFAULT_TEMPLATE, class_prompt
from .base import Embeddings, Row, Step, places, scored

BINS = ("uniform", "quantile")


@dataclass(frozen=True)
class ClipScore(Step):
    """Writes `clip`, the cosine of caption and image, and `clip_gain`, by how much it exceeds that of the class template.

    Args:
        strata: number of levels; with it, `clip_level` is the bin of `clip`, from 0 on, among all captions of the split.
        bins: `uniform` divides the range of `clip` evenly, `quantile` the captions.
    """

    strata: int | None = None
    bins: str = "uniform"

    name: ClassVar[str] = "clip_score"
    about: ClassVar[str] = "scores how well each caption fits its image"
    after: ClassVar[str] = "CLIPScore (Hessel et al. 2021); levels after NoC (Kang et al. 2023)"
    differs: ClassVar[str] = (
        "It is the plain cosine, without a prefix or a factor. No captioner is trained on the levels. The gain compares "
        "captions of one image; it is no measure by which images could be ranked."
    )

    def __post_init__(self):
        if self.strata is not None and self.strata < 2:
            raise UserError(f"step clip_score, strata: expected 2 or more, found {self.strata}.")
        if self.bins not in BINS:
            raise UserError(f"step clip_score, bins: expected one of {', '.join(BINS)}, found {self.bins!r}.")

    def writes(self) -> tuple[str, ...]:
        return ("clip", "clip_gain") + (("clip_level",) if self.strata else ())

    def apply(self, rows: list[Row], scorer: Embeddings, found: Sequence = ()) -> list[list[dict]]:
        images = scorer.images()
        found = places(rows, images)
        if not found:
            return scored(rows, {})
        images = images[[i for i, _ in found]]
        names = sorted({row.class_name for row in rows})
        templates = scorer.texts([class_prompt(DEFAULT_TEMPLATE, name) for name in names])
        number = {name: k for k, name in enumerate(names)}
        own = templates[[number[rows[i].class_name] for i, _ in found]]
        clip = np.einsum("md,md->m", scorer.texts([rows[i].records[k]["text"] for i, k in found]), images)
        columns = {"clip": clip, "clip_gain": clip - np.einsum("md,md->m", own, images)}
        if self.strata:
            columns["clip_level"] = levels(clip, edges(clip, self.strata, self.bins))
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        return scored(rows, {place: dict(zip(columns, v, strict=True)) for place, v in zip(found, values, strict=True)})


def edges(values: np.ndarray, strata: int, bins: str) -> np.ndarray:
    """The inner edges `(strata - 1,)` of bins over the range of the values, or over the values in order (`quantile`)."""
    inner = np.arange(1, strata) / strata
    if bins == "quantile":
        return np.quantile(values, inner)
    return values.min() + inner * (values.max() - values.min())


def levels(values: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The bin of each value, from 0 on. Values outside the range belong to the first or last bin."""
    return np.searchsorted(inner, values, side="right")
