"""`select`: keeps the best captions by a score. The others stay in the records, with the status `dropped`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...core.errors import UserError
from ..types import DROPPED
from .base import Embeddings, Row, Step, score_of

WAYS = ("keep", "keep_share", "above")


@dataclass(frozen=True)
class Select(Step):
    """Keeps captions by a score. Exactly one of `keep`, `keep_share` and `above` is given.

    Captions without the score are kept: what is not known is no reason to drop a caption. A text that an image has twice is one
    caption. Ties go to the caption of the smaller sha256, then aspect, then sample.

    Args:
        by: name of the score; the larger the better, but for `sr_rank`.
        keep: number of captions that each image keeps.
        keep_share: share of the captions that each class keeps. The best caption of each image is always kept.
        above: captions are dropped whose score is not above this number, even if an image has no other.
    """

    by: str = ""
    keep: int | None = None
    keep_share: float | None = None
    above: float | None = None

    name: ClassVar[str] = "select"
    about: ClassVar[str] = "keeps the best captions by a score"
    after: ClassVar[str] = "best-of-n selection"
    differs: ClassVar[str] = "It chooses among captions that are there. It is no reward training of a captioner."

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

    def reads(self) -> tuple[str, ...]:
        return (self.by,)

    def apply(self, rows: list[Row], scorer: Embeddings | None = None, found: Sequence = ()) -> list[list[dict]]:
        values, ranked = {}, []
        for i, row in enumerate(rows):
            for k in row.captions():
                record = row.records[k]
                value, place = score_of(record, self.by), (i, record["text"])
                if value is not None and place not in values:
                    values[place] = value
                    better = value if self.by == "sr_rank" else -value
                    ties = (row.image_sha256 or "", record["aspect"] or "", record["sample"] or 0, record["text"])
                    ranked.append(((better, *ties), place))
        order = [place for _, place in sorted(ranked)]
        kept = self._kept(rows, order, values)
        found = []
        for i, row in enumerate(rows):
            own, records = set(row.captions()), list(row.records)
            for k in own:
                place = (i, records[k]["text"])
                if place in values:
                    records[k] = self._judged(records[k], values[place], place in kept)
            found.append(records)
        return found

    def _kept(self, rows, order: list[tuple[int, str]], values: dict) -> set[tuple[int, str]]:
        """What is kept of `order`, pairs of row and text with the best one first."""
        if self.above is not None:
            return {place for place in order if values[place] > self.above}
        by_image: dict[int, list] = {}
        for place in order:
            by_image.setdefault(place[0], []).append(place)
        if self.keep is not None:
            return {place for own in by_image.values() for place in own[: self.keep]}
        by_class: dict[int, list] = {}
        for place in order:
            by_class.setdefault(rows[place[0]].label, []).append(place)
        # 0.1 * 30 is a little more than 3 in binary.
        counts = {label: math.ceil(round(self.keep_share * len(own), 9)) for label, own in by_class.items()}
        kept = {place for label, own in by_class.items() for place in own[: counts[label]]}
        return kept | {own[0] for own in by_image.values()}

    def _judged(self, record, value: float, kept: bool) -> dict:
        if kept:
            return {**record, "score": value}
        return {**record, "score": value, "status": DROPPED, "step": self.name}
