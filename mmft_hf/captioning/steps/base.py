"""What a refining step is: a pure function of the caption records of a split and of embeddings.

Shapes: `n` rows, `m` texts, `D` embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Protocol

import numpy as np

from ..types import ACCEPTED


@dataclass(frozen=True)
class Row:
    """An image with its caption records.

    Args:
        image_sha256: of its bytes; None if it cannot be read.
        label, class_name: its class.
        group: images of one group show the same thing and never compete with each other.
        records: its caption records, which no step changes in place.
    """

    image_sha256: str | None
    label: int
    class_name: str
    group: str
    records: Sequence[Mapping]

    def captions(self) -> list[int]:
        """Positions of the accepted captions in `records`."""
        return [i for i, record in enumerate(self.records) if record["status"] in ACCEPTED and record["text"]]


class Embeddings(Protocol):
    """What a step may ask of the scorer."""

    scale: float
    """By which the model multiplies cosines."""

    def images(self) -> np.ndarray:
        """Unit-norm embeddings `(n, D)` of the images of all rows; zeros for those that cannot be read."""

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors `(m, D)` whose inner product with an image's embedding is the cosine of text and image.

        A text that is longer than the text tower reads counts as the mean of its sentences.
        """


@dataclass(frozen=True)
class Step:
    """One step. Its fields are its options; `apply` is a pure function: no call, no clock, no global random numbers.

    Attributes:
        name: as it is typed.
        about: what it does, in a sentence.
        after: the work that it follows; `differs`: in what it differs from it. Both are shown on the card.
        version: to be raised with any change of what `apply` returns.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    after: ClassVar[str] = ""
    differs: ClassVar[str] = ""
    version: ClassVar[int] = 1

    def writes(self) -> tuple[str, ...]:
        """Names of the scores that it writes. A step that writes scores needs a scorer."""
        return ()

    def reads(self) -> tuple[str, ...]:
        """Names of the scores that it reads."""
        return ()

    def spec(self) -> dict:
        """All that can change the result, JSON-able."""
        return {"step": self.name, "version": self.version, **asdict(self)}

    def apply(self, rows: Sequence[Row], scorer: Embeddings | None) -> list[list[dict]]:
        """The new records of each row."""
        raise NotImplementedError


def score_of(record: Mapping, name: str) -> float | None:
    """A score of a caption record; None if it has none."""
    return next((score["value"] for score in record["scores"] or () if score["name"] == name), None)


def with_scores(record: Mapping, scores: Mapping[str, float | None]) -> dict:
    """The record with these scores, which replace those of the same names. Scores are stored as float32; None is left out."""
    kept = [score for score in record["scores"] or () if score["name"] not in scores]
    found = [(name, value) for name, value in scores.items() if value is not None and math.isfinite(value)]
    return {**record, "scores": kept + [{"name": name, "value": float(np.float32(value))} for name, value in found]}


def scored(rows: Sequence[Row], scores: Mapping[tuple[int, int], Mapping[str, float | None]]) -> list[list[dict]]:
    """The records of all rows, with the scores of those at `(row, position)`."""
    return [
        [with_scores(record, scores.get((i, k), {})) for k, record in enumerate(row.records)]
        for i, row in enumerate(rows)
    ]


def readable(rows: Sequence[Row], images: np.ndarray) -> list[int]:
    """The rows whose images can be read: only these are scored, and compared with. `images` `(n, D)`: see `Embeddings`."""
    return [i for i, row in enumerate(rows) if row.image_sha256 and images[i].any()]


def places(rows: Sequence[Row], images: np.ndarray) -> list[tuple[int, int]]:
    """`(row, position)` of the accepted captions of the images that can be read."""
    return [(i, k) for i in readable(rows, images) for k in rows[i].captions()]
