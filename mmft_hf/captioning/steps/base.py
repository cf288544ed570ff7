"""What a refining step is: a pure function of the caption records of a split and of embeddings.

Shapes: `n` rows, `m` texts, `D` embedding size.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL.Image import Image

from ..types import ACCEPTED, REPLACED
from .asking import Asking, View


@dataclass(frozen=True)
class Row:
    """An image with its caption records.

    Args:
        image_sha256: of its bytes; None if it cannot be read.
        label, class_name: its class.
        group: images of one group show the same thing and never compete with each other.
        records: its caption records, which no step changes in place.
        columns: the columns of the dataset that a step reads (`Step.columns`).
    """

    image_sha256: str | None
    label: int
    class_name: str
    group: str
    records: Sequence[Mapping]
    columns: Mapping[str, Any] = field(default_factory=dict)

    def picture(self, what: str = "whole") -> tuple[View, ...]:
        """Its picture, for a question: see `View`."""
        return (View(self.image_sha256, what),)

    def captions(self) -> list[int]:
        """Positions of the accepted captions in `records`."""
        return [i for i, record in enumerate(self.records) if record["status"] in ACCEPTED and record["text"]]

    def texts(self) -> list[str]:
        """The accepted captions, each once."""
        return list(dict.fromkeys(self.records[i]["text"] for i in self.captions()))


class Embeddings(Protocol):
    """What a step may ask of the scorer."""

    scale: float
    """By which the model multiplies cosines."""

    def images(self, region: str = "whole") -> np.ndarray:
        """Unit-norm embeddings `(n, D)` of the images of all rows, or of a part of each (see `asking.View`); zeros for those
        that cannot be read."""

    def picture(self, row: int) -> Image:
        """The picture of a row, RGB. Raises `BadImage` if it cannot be read."""

    def encode(self, pictures: Sequence[Image]) -> np.ndarray:
        """Unit-norm embeddings `(m, D)` of other pictures."""

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors `(m, D)` whose inner product with an image's embedding is the cosine of text and image.

        A text that is longer than the text tower reads counts as the mean of its sentences.
        """


@dataclass(frozen=True)
class Told:
    """What a step tells of a run beside the records.

    Args:
        figures: numbers, or lists of numbers, by name: for the report and the card.
        details: rows of `steps.parquet`, which have the fields of `DETAIL`.
        notes: one sentence each: for the console and the card.
    """

    figures: Mapping[str, Any] = field(default_factory=dict)
    details: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


DETAIL = ("image_sha256", "record", "kind", "text", "verdict", "votes")
"""Fields of a detail: texts but for `votes`, a list of texts. `record` is the caption, as in `parents`."""


@dataclass(frozen=True)
class Step:
    """One step. Its fields are its options; `apply` is a pure function: no call, no clock, no global random numbers.

    Attributes:
        name: as it is typed.
        about: what it does, in a sentence.
        after: the work that it follows; `differs`: in what it differs from it. Both are shown on the card.
        version: to be raised with any change of what `apply` returns.
        sees_label: whether a question of it may hold the name of the class, which the card tells. A judge that is told the class
            confirms it.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    after: ClassVar[str] = ""
    differs: ClassVar[str] = ""
    version: ClassVar[int] = 1
    sees_label: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """What messages, tables and the card call it: `name`, or the name of its preset."""
        return self.name

    def typed_options(self) -> dict:
        """The options that are not the default ones, for people."""
        return {
            key: value for key, value in self.spec().items() if key not in ("step", "version") and value is not None
        }

    def writes(self) -> tuple[str, ...]:
        """Names of the scores that it writes."""
        return ()

    def needs_scorer(self) -> bool:
        """Whether `fit` or `apply` embeds pictures or texts: by default, a step that writes scores and asks nobody."""
        return bool(self.writes()) and not self.roles()

    def reads(self) -> tuple[str, ...]:
        """Names of the scores that it reads."""
        return ()

    def spec(self) -> dict:
        """All that can change the result, JSON-able: the options that are not the default ones.

        So a new option leaves earlier results as they are; another default needs another `version`.
        """
        options = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        lists = {name: list(value) for name, value in options.items() if isinstance(value, tuple)}
        return {"step": self.name, "version": self.version, **options, **lists}

    def roles(self) -> tuple[str, ...]:
        """Who is asked: some of `asking.ROLES`."""
        return ()

    def needs(self) -> Mapping[str, Sequence[str]]:
        """What its questions need of the backend of a role, beyond one picture and a text: some of `types.FEATURES`, by role."""
        return {role: ("text",) for role in self.roles() if role == "writer"}

    def scripts(self) -> tuple[str, ...]:
        """Scripts of the language that it writes, as Unicode names them. Empty: Latin letters, and class names are looked for."""
        return ()

    def cautions(self, token_limit: int | None) -> list[str]:
        """What to know before it asks, a sentence each. `token_limit`: of the text tower that will be trained."""
        return []

    def samples(self) -> int:
        """How often it asks one and the same question. More than once makes sense at a temperature above 0 only."""
        return 1

    def columns(self) -> tuple[str, ...]:
        """The columns of the dataset that it reads."""
        return ()

    def fit(self, rows: Sequence[Row], scorer: Embeddings | None) -> Any:
        """What is taken from all rows before the first question, such as a neighbour of each one; `ask` gets it."""
        return None

    def bound(self, row: Row, fitted: Any) -> Counter:
        """The most questions that a row can lead to, by role; one that is also asked about another row counts there or here."""
        return Counter()

    def ask(self, row: Row, fitted: Any) -> Asking:
        """Asks about a row, and returns what `apply` gets as `found`."""
        return None
        yield []  # a generator

    def apply(self, rows: Sequence[Row], scorer: Embeddings | None, found: Sequence[Any] = ()) -> Sequence[list[dict]]:
        """The new records of each row: `ByRow`, or a list.

        Args:
            found: for each row, what `ask` returned.
        """
        raise NotImplementedError

    def told(self, rows: Sequence[Row], found: Sequence[Any]) -> Told:
        """What it tells of the run. Arguments as in `apply`."""
        return Told()


def score_of(record: Mapping, name: str) -> float | None:
    """A score of a caption record; None if it has none."""
    return next((score["value"] for score in record["scores"] or () if score["name"] == name), None)


def with_scores(record: Mapping, scores: Mapping[str, float | None]) -> dict:
    """The record with these scores, which replace those of the same names. Scores are stored as float32; None is left out."""
    kept = [score for score in record["scores"] or () if score["name"] not in scores]
    found = [(name, value) for name, value in scores.items() if value is not None and math.isfinite(value)]
    return {**record, "scores": kept + [{"name": name, "value": float(np.float32(value))} for name, value in found]}


class ByRow(Sequence):
    """The records of each row, made when they are asked for, so that those of all rows are never in memory at a time.

    Args:
        make: gives the records of a row, from its number and the row.
    """

    def __init__(self, rows: Sequence[Row], make: Callable[[int, Row], list[dict]]):
        self._rows, self._make = rows, make

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        return self._make(i, self._rows[i])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None


def scored(rows: Sequence[Row], scores: Mapping[tuple[int, int], Mapping[str, float | None]]) -> Sequence[list[dict]]:
    """The records of all rows, with the scores of those at `(row, position)`."""
    return ByRow(
        rows, lambda i, row: [with_scores(record, scores.get((i, k), {})) for k, record in enumerate(row.records)]
    )


def scored_texts(rows: Sequence[Row], scores: Sequence[Mapping[str, Mapping] | None]) -> Sequence[list[dict]]:
    """The records of all rows, with the scores of each caption of a row by its text."""
    by_place = {
        (i, k): own[row.records[k]["text"]]
        for i, (row, own) in enumerate(zip(rows, scores, strict=True))
        for k in row.captions()
        if own and row.records[k]["text"] in own
    }
    return scored(rows, by_place)


def readable(rows: Sequence[Row], images: np.ndarray) -> list[int]:
    """The rows whose images can be read: only these are scored, and compared with. `images` `(n, D)`: see `Embeddings`."""
    return [i for i, row in enumerate(rows) if row.image_sha256 and images[i].any()]


def places(rows: Sequence[Row], images: np.ndarray) -> list[tuple[int, int]]:
    """`(row, position)` of the accepted captions of the images that can be read."""
    return [(i, k) for i in readable(rows, images) for k in rows[i].captions()]


def text_of(value: Any) -> str:
    """The value of a column as text, a list as its entries; empty if there is none."""
    values = value if isinstance(value, list | tuple) else [value]
    return "; ".join(" ".join(str(one).split()) for one in values if one is not None and str(one).strip())


def place_of(record: Mapping) -> str:
    """A caption record among those of its image: `aspect#sample@step`."""
    return f"{record['aspect']}#{record['sample']}@{record.get('step') or 'caption'}"


def written(row: Row, step: str, text: str, parents: Sequence[Mapping], **fields: Any) -> dict:
    """The record of a new text of a step.

    Args:
        parents: the records that it was made from; the first one gives its aspect and sample.
        fields: further fields, such as `model`.
    """
    first = parents[0] if parents else {"aspect": step, "sample": 0}
    named = [place_of(record) for record in parents]
    new = {
        "aspect": first["aspect"],
        "sample": first["sample"],
        "status": "ok",
        "text": text,
        "checks": [],
        "attempts": 1,
    }
    return new | {"prompt_id": step, "step": step, "parents": named, "scores": None} | fields


def removed(record: Mapping, step: str, status: str = REPLACED) -> dict:
    """The record of a text that a new one took the place of, or with the status `dropped` of one that is left out.

    Its own `step` stays, so that the `parents` of texts that were made from it lead to it.
    """
    return {**record, "status": status, "removed_by": step}
