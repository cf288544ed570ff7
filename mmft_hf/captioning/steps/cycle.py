"""`cycle`: whether the image of a caption leads back to the caption, or to one that says the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...core.errors import UserError
from .base import ByRow, Embeddings, Row, Step, place_of, readable, removed, scored, with_scores

BLOCK = 256  # images, or texts, that are compared at a time
TIE = 1e-6  # difference of cosines below which rounding decides


@dataclass(frozen=True)
class Cycle(Step):
    """Writes `cycle`: the text cosine of a caption with those captions of its class that lie nearest to its image.

    1 if the caption itself is one of them. Each text of a class takes part once. A class with too few different texts to choose
    from has no score.

    Args:
        back: number of captions that an image leads back to.
        reassign: moves a caption to that of the `k` images nearest to it which has the best score, if that is another one.
            Where captions are right it does harm: a fifth of them moved on the embedded data.
        k: see `reassign`.
    """

    back: int = 2
    reassign: bool = False
    k: int = 15

    name: ClassVar[str] = "cycle"
    about: ClassVar[str] = "scores whether the image of a caption leads back to it"
    after: ClassVar[str] = "the cycle filter of synthetic captions (arXiv 2507.18616)"
    differs: ClassVar[str] = (
        "Captions are compared within their class, by the scorer's own text tower instead of a sentence encoder, and stay with "
        "their image unless reassign is set."
    )

    def __post_init__(self):
        for name in ("back", "k"):
            if getattr(self, name) < 1:
                raise UserError(f"step cycle, {name}: expected 1 or more, found {getattr(self, name)}.")

    def writes(self) -> tuple[str, ...]:
        return ("cycle",)

    def apply(self, rows: Sequence[Row], scorer: Embeddings, found: Sequence = ()) -> Sequence[list[dict]]:
        images = scorer.images()
        members: dict[int, list[int]] = {}
        for i in sorted(readable(rows, images), key=lambda i: rows[i].image_sha256):
            members.setdefault(rows[i].label, []).append(i)
        scores: dict[tuple[int, int], dict] = {}
        moves: dict[tuple[int, int], tuple[int, float]] = {}
        for own in members.values():
            self._compare(rows, own, images, scorer, scores, moves)
        return self._moved(rows, scored(rows, scores), moves)

    def _compare(self, rows, own: Sequence[int], images, scorer, scores: dict, moves: dict) -> None:
        """Adds the scores, and with `reassign` the moves, of the captions of the images `own` of one class."""
        texts = sorted({rows[i].records[k]["text"] for i in own for k in rows[i].captions()})
        if len(texts) <= self.back:
            return
        number = {text: p for p, text in enumerate(texts)}
        embeds = scorer.texts(texts)
        unit = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
        near = np.concatenate([_best(images[block] @ embeds.T, self.back) for block in _blocks(np.array(own))])
        captions = [
            (a, i, k, number[rows[i].records[k]["text"]]) for a, i in enumerate(own) for k in rows[i].captions()
        ]
        for a, i, k, p in captions:
            scores[i, k] = {"cycle": float((unit[near[a]] @ unit[p]).max())}
        if not self.reassign:
            return
        best: dict[int, tuple[int, float]] = {}  # of each text: the place of an image in `own`, and the score with it
        for block in _blocks(np.arange(len(texts))):
            for p, candidates in zip(block.tolist(), _best(embeds[block] @ images[own].T, self.k), strict=True):
                values = np.einsum("kbd,d->kb", unit[near[candidates]], unit[p]).max(axis=1)
                first = int(np.argmax(values >= values.max() - TIE))  # the nearest image among the best
                best[p] = int(candidates[first]), float(values[first])
        for _, i, k, p in captions:
            place, value = best[p]
            if own[place] != i and value > scores[i, k]["cycle"] + TIE:
                moves[i, k] = own[place], value

    def _moved(self, rows: Sequence[Row], records: Sequence[list[dict]], moves: dict) -> Sequence[list[dict]]:
        given: dict[int, list[tuple[int, int, float]]] = {}  # what each image gets
        for (i, k), (j, value) in moves.items():
            text = rows[i].records[k]["text"]
            if all(text != rows[j].records[other]["text"] for other in rows[j].captions()):
                given.setdefault(j, []).append((i, k, value))

        def make(i: int, row: Row) -> list[dict]:
            own = [removed(record, self.name) if (i, k) in moves else record for k, record in enumerate(records[i])]
            for a, k, value in given.get(i, ()):
                old = records[a][k]
                new = {**old, "step": self.name, "parents": [place_of(old)], "scores": None}
                own.append(with_scores(new, {"cycle": value}))
            return own

        return ByRow(rows, make)


def _blocks(numbers: np.ndarray) -> list[np.ndarray]:
    return [numbers[start : start + BLOCK] for start in range(0, len(numbers), BLOCK)]


def _best(values: np.ndarray, number: int) -> np.ndarray:
    """The columns of the largest values of each row, the largest first."""
    return np.argsort(-values, axis=1, kind="stable")[:, :number]
