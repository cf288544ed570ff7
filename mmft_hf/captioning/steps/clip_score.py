"""`clip_score`: how well a caption fits its image, as the cosine of their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...core.errors import UserError
from ...data.sentences import sentences_of
from ...data.texts import DEFAULT_TEMPLATE, class_prompt
from .base import Embeddings, Row, Step, places, scored

BINS = ("uniform", "quantile")
REGIONS = ("whole", "quadrant:0", "quadrant:1", "quadrant:2", "quadrant:3", "centre")
VIEWS = {"whole": ("whole",), "quadrants": REGIONS[1:5], "centre": ("centre",)}


@dataclass(frozen=True)
class ClipScore(Step):
    """Writes `clip`, the cosine of caption and image, and `clip_gain`, by how much it exceeds that of the class template.

    With several views, or by sentence, it also writes `clip_best`, the mean over sentences of the cosine with the view that fits
    the sentence best, and `clip_view`, the number in `REGIONS` of the view that fits the whole caption best.

    Args:
        views: what of the image is looked at: some of `whole`, `quadrants` and `centre`. The best one counts.
        per: `caption`, or `sentence`: each sentence may have a view of its own.
        strata: number of levels; with it, `clip_level` is the bin of `clip`, from 0 on, among all captions of the split.
        bins: `uniform` divides the range of `clip` evenly, `quantile` the captions.
    """

    views: tuple[str, ...] = ("whole",)
    per: str = "caption"
    strata: int | None = None
    bins: str = "uniform"

    name: ClassVar[str] = "clip_score"
    about: ClassVar[str] = "scores how well each caption fits its image"
    after: ClassVar[str] = (
        "CLIPScore (Hessel et al. 2021); levels after NoC (Kang et al. 2023); views after MacCap (arXiv 2401.02347)"
    )
    differs: ClassVar[str] = (
        "It is the plain cosine, without a prefix or a factor. No captioner is trained on the levels. The gain compares "
        "captions of one image; it is no measure by which images could be ranked. Views are cut out of the picture; MacCap mixes "
        "patches inside the model."
    )

    def __post_init__(self):
        if self.strata is not None and self.strata < 2:
            raise UserError(f"step clip_score, strata: expected 2 or more, found {self.strata}.")
        if self.bins not in BINS:
            raise UserError(f"step clip_score, bins: expected one of {', '.join(BINS)}, found {self.bins!r}.")
        if not self.views or not set(self.views) <= set(VIEWS):
            found = ", ".join(self.views) or "none"
            raise UserError(f"step clip_score, views: expected some of {', '.join(VIEWS)}, found {found}.")
        if self.per not in ("caption", "sentence"):
            raise UserError(f"step clip_score, per: expected caption or sentence, found {self.per!r}.")

    def _regions(self) -> list[str]:
        return [region for view in VIEWS if view in self.views for region in VIEWS[view]]

    def _looks_closer(self) -> bool:
        return self._regions() != ["whole"] or self.per == "sentence"

    def writes(self) -> tuple[str, ...]:
        closer = ("clip_best", "clip_view") if self._looks_closer() else ()
        return ("clip", "clip_gain", *closer) + (("clip_level",) if self.strata else ())

    def apply(self, rows: list[Row], scorer: Embeddings, found: Sequence = ()) -> list[list[dict]]:
        images = scorer.images()
        found = places(rows, images)
        if not found:
            return scored(rows, {})
        own = [i for i, _ in found]
        names = sorted({row.class_name for row in rows})
        templates = scorer.texts([class_prompt(DEFAULT_TEMPLATE, name) for name in names])
        number = {name: k for k, name in enumerate(names)}
        labels = templates[[number[rows[i].class_name] for i in own]]
        texts = [rows[i].records[k]["text"] for i, k in found]
        clip = cosines(scorer.texts(texts), images[own])
        columns = {"clip": clip, "clip_gain": clip - cosines(labels, images[own])}
        if self._looks_closer():
            columns |= self._closer(texts, own, scorer)
        if self.strata:
            columns["clip_level"] = levels(clip, edges(clip, self.strata, self.bins))
        values = zip(*(column.tolist() for column in columns.values()), strict=True)
        return scored(rows, {place: dict(zip(columns, v, strict=True)) for place, v in zip(found, values, strict=True)})

    def _closer(self, texts: Sequence[str], images: Sequence[int], scorer: Embeddings) -> dict[str, np.ndarray]:
        """`clip_best` and `clip_view` of texts and the numbers of their images."""
        regions = self._regions()
        parts = [(sentences_of(text) if self.per == "sentence" else None) or [text] for text in texts]
        owner = np.repeat(np.arange(len(texts)), [len(own) for own in parts])
        embeds = scorer.texts([part for own in parts for part in own])
        at = np.asarray(images)[owner]
        seen = np.stack([cosines(embeds, scorer.images(region)[at]) for region in regions])  # (views, sentences)
        counts = np.bincount(owner)
        means = np.stack([np.bincount(owner, weights=row) / counts for row in seen])
        best = np.array([REGIONS.index(regions[k]) for k in means.argmax(axis=0)])
        return {"clip_best": np.bincount(owner, weights=seen.max(axis=0)) / counts, "clip_view": best}


def cosines(texts: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The cosine of each text and its image, `(m, D)` both."""
    return np.einsum("md,md->m", texts, images)


def edges(values: np.ndarray, strata: int, bins: str) -> np.ndarray:
    """The inner edges `(strata - 1,)` of bins over the range of the values, or over the values in order (`quantile`)."""
    inner = np.arange(1, strata) / strata
    if bins == "quantile":
        return np.quantile(values, inner)
    return values.min() + inner * (values.max() - values.min())


def levels(values: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The bin of each value, from 0 on. Values outside the range belong to the first or last bin."""
    return np.searchsorted(inner, values, side="right")
