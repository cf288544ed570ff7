"""`select`: keeps the best captions by scores. The others stay in the records, with the status `dropped`."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...core.errors import UserError
from ..judge.wording import has_loop, words_of
from ..types import DROPPED
from .base import ByRow, Embeddings, Row, Step, removed, score_of

WAYS = ("keep", "keep_share", "above")
PER = ("image", "slot", "class", "split")
FLAWS = ("repetition", "truncated", "foreign_script")  # checks of captions that never win against one without
TRAITS = ("class", "aspect")  # what strata may be besides a score

Place = tuple[int, str]  # the number of a row, and a text


@dataclass(frozen=True, slots=True)
class _Caption:
    """What `select` knows of a caption: there is one for each of the whole split."""

    image_sha256: str
    label: int
    aspect: str | None
    sample: int
    flawed: bool
    scores: tuple[float, ...]
    stratum: str


@dataclass(frozen=True)
class Select(Step):
    """Keeps captions by scores. Exactly one of `keep`, `keep_share` and `above` is given.

    Captions without the score are kept: what is not known is no reason to drop a caption. A text that an image has twice is one
    caption. A text that repeats itself, was cut off or is in another script is kept only where there is no other. Ties go to the
    caption of the smaller sha256, then aspect, then sample.

    Args:
        by: name of the score; the larger the better, but for `sr_rank`. Or weights of several scores by name, which are added up.
        z: standardises each score over the captions of an `image`, a `class` or the `split` before it is weighted.
        keep: number of captions that are kept of each `per`, by default of each image.
        keep_share: share of the captions that is kept of each `per`, by default of each class.
        per: `image`; `slot`: an aspect of an image; `class`; `split`.
        strata: a score, `class` or `aspect`. The number is shared out evenly among its values, the rarest first; what they do not
            need passes on.
        above: captions are dropped whose score is not above this number, even if an image has no other.
        empty_images: whether `keep` and `keep_share` may leave an image without a caption. By default its best one is kept
            in any case.
    """

    by: str | dict[str, float] = ""
    keep: int | None = None
    keep_share: float | None = None
    above: float | None = None
    per: str | None = None
    z: str | None = None
    strata: str | None = None
    empty_images: bool = False

    name: ClassVar[str] = "select"
    about: ClassVar[str] = "keeps the best captions by a score"
    after: ClassVar[str] = (
        "best-of-n selection; weighted scores after hybrid ranking, strata after the selection of rare styles (arXiv 2503.13383)"
    )
    differs: ClassVar[str] = "It chooses among captions that are there. It is no reward training of a captioner."
    version: ClassVar[int] = 2

    def __post_init__(self):
        given = [name for name in WAYS if getattr(self, name) is not None]
        if not self.by:
            raise UserError("step select, by: expected the name of a score, such as clip, found none.")
        if len(given) != 1:
            raise UserError(
                f"step select: expected one of {', '.join(WAYS)}, found {' and '.join(given) or 'none'}. Use one step for each."
            )
        if self.keep is not None and self.keep < 1:
            raise UserError(f"step select, keep: expected 1 or more, found {self.keep}.")
        if self.keep_share is not None and not 0 < self.keep_share < 1:
            raise UserError(f"step select, keep_share: expected a share between 0 and 1, found {self.keep_share:g}.")
        for name, allowed in (("per", PER), ("z", ("image", "class", "split"))):
            if getattr(self, name) not in (None, *allowed):
                raise UserError(
                    f"step select, {name}: expected one of {', '.join(allowed)}, found {getattr(self, name)!r}."
                )
        if self.z and isinstance(self.by, str):
            raise UserError(f"step select, z: expected weights of several scores in by, found {self.by!r} alone.")
        if needless := [n for n in ("per", "strata", "empty_images") if self.above is not None and getattr(self, n)]:
            raise UserError(f"step select, {needless[0]}: expected it with keep or keep_share, found above.")

    def _scores(self) -> tuple[str, ...]:
        return (self.by,) if isinstance(self.by, str) else tuple(self.by)

    def reads(self) -> tuple[str, ...]:
        return self._scores() + ((self.strata,) if self.strata and self.strata not in TRAITS else ())

    def apply(
        self, rows: Sequence[Row], scorer: Embeddings | None = None, found: Sequence = ()
    ) -> Sequence[list[dict]]:
        captions: dict[Place, _Caption] = {}
        for i, row in enumerate(rows):
            for k in row.captions():
                record = row.records[k]
                scores = tuple(score_of(record, name) for name in self._scores())
                place = (i, record["text"])
                if None not in scores and place not in captions:
                    own = (row.image_sha256 or "", row.label, record["aspect"], record["sample"] or 0)
                    captions[place] = _Caption(*own, _flawed(record), scores, self._stratum(row, record))
        values = self._values(captions)
        better = -1 if self.by == "sr_rank" else 1

        def rank(place: Place) -> tuple:
            one = captions[place]
            ties = (one.image_sha256, one.aspect or "", one.sample, place[1])
            return (one.flawed, -better * values[place], *ties)

        kept = self._kept(sorted(captions, key=rank), values, captions)

        def make(i: int, row: Row) -> list[dict]:
            records = list(row.records)
            for k in row.captions():
                place = (i, records[k]["text"])
                if place in values:
                    records[k] = self._judged(records[k], values[place], place in kept)
            return records

        return ByRow(rows, make)

    def _values(self, captions: Mapping[Place, _Caption]) -> dict[Place, float]:
        """The number by which each caption is sorted."""
        if isinstance(self.by, str):
            return {place: one.scores[0] for place, one in captions.items()}
        total = np.zeros(len(captions))
        pools: dict[Hashable, list[int]] = {}
        for n, ((i, _), one) in enumerate(captions.items()):
            pools.setdefault({"image": i, "class": one.label}.get(self.z), []).append(n)
        for number, weight in enumerate(self.by.values()):
            column = np.array([one.scores[number] for one in captions.values()])
            for own in pools.values() if self.z else ():
                deviation = column[own].std()
                column[own] = (column[own] - column[own].mean()) / deviation if deviation > 0 else 0
            total += weight * column
        return dict(zip(captions, total.tolist(), strict=True))

    def _kept(self, order: list[Place], values: dict, captions: Mapping[Place, _Caption]) -> set[Place]:
        """What is kept of `order`, in which the best caption is first."""
        if self.above is not None:
            return {place for place in order if values[place] > self.above}
        per = self.per or ("image" if self.keep else "class")
        pools: dict[Hashable, list[Place]] = {}
        for place in order:
            one = captions[place]
            key = {"image": place[0], "slot": (place[0], one.aspect), "class": one.label}.get(per)
            pools.setdefault(key, []).append(place)
        kept: set[Place] = set()
        for own in pools.values():
            # 0.1 * 30 is a little more than 3 in binary.
            number = self.keep or math.ceil(round(self.keep_share * len(own), 9))
            kept.update(shared_out(own, [captions[p].stratum for p in own], number))
        first = {i: (i, text) for i, text in reversed(order)}  # the best of each image
        return kept if self.empty_images else kept | set(first.values())

    def _stratum(self, row: Row, record: Mapping) -> str:
        if self.strata == "class":
            return row.class_name
        return str(record["aspect"] if self.strata == "aspect" else self.strata and score_of(record, self.strata))

    def _judged(self, record, value: float, kept: bool) -> dict:
        if kept:
            return {**record, "score": value}
        return removed({**record, "score": value}, self.name, DROPPED)


def shared_out(order: Sequence, strata: Sequence[str], number: int) -> list:
    """The first of `order`, `number` in all, shared out evenly among strata.

    The rarest stratum comes first and gets its part of what is left, rounded up; what it does not need passes on.
    """
    members: dict[str, list] = {}
    for entry, stratum in zip(order, strata, strict=True):
        members.setdefault(stratum, []).append(entry)
    found: list = []
    for left, (_, own) in zip(
        range(len(members), 0, -1), sorted(members.items(), key=lambda m: (len(m[1]), m[0])), strict=True
    ):
        found += own[: -(-(number - len(found)) // left)]
    return found


def _flawed(record: Mapping) -> bool:
    """Whether a text was found wanting by a check. Loops are looked for here, too: texts of columns may not have been checked."""
    return any(check in FLAWS for check in record["checks"] or ()) or has_loop(words_of(record["text"]))
