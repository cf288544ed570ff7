"""`self_retrieval`: whether a caption tells its image from the other images of its class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import numpy as np

from ...core.errors import UserError
from .base import Embeddings, Row, Step, readable, scored

BLOCK = 256  # images whose captions are compared at a time
TIE = 1e-6  # difference of cosines below which rounding decides


@dataclass(frozen=True)
class SelfRetrieval(Step):
    """Ranks the image of a caption among the images of its class. Images of its own group do not take part.

    Writes `sr_rank` (1: no image fits the caption better; half a rank for each tie), `sr_pct` (1 best, 0 worst, .5 by chance)
    and `sr_margin` (its cosine minus that of the best other image). An image without any other to compare with has none.

    Args:
        bag: compare with this number of images only, those that look most alike.
        listener: number of images, drawn by the sha256 of the image, among which a listener has to guess the captioned one;
            with it, `sr_prob` is the probability of the right guess.
        distractors: `all`: the listener's images are drawn from all classes; `class`: from its own.
    """

    bag: int | None = None
    listener: int | None = None
    distractors: str = "all"

    name: ClassVar[str] = "self_retrieval"
    about: ClassVar[str] = "ranks each image among those of its class by its own caption"
    after: ClassVar[str] = (
        "self-retrieval in bags of look-alikes (arXiv 2409.03025); the listener after discriminative fine-tuning"
    )
    differs: ClassVar[str] = (
        "Captions are only scored: no captioner is trained, by reinforcement or otherwise. A detail that is made up can set an "
        "image apart as well as a true one."
    )

    def __post_init__(self):
        for name in ("bag", "listener"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"step self_retrieval, {name}: expected 1 or more, found {value}.")
        if self.distractors not in ("all", "class"):
            raise UserError(f"step self_retrieval, distractors: expected all or class, found {self.distractors!r}.")

    def writes(self) -> tuple[str, ...]:
        return ("sr_rank", "sr_pct", "sr_margin") + (("sr_prob",) if self.listener else ())

    def apply(self, rows: list[Row], scorer: Embeddings, found: Sequence = ()) -> list[list[dict]]:
        found: dict[tuple[int, int], dict] = {}
        images = scorer.images()
        seen = readable(rows, images)
        if not seen:
            return scored(rows, found)
        # Copies of a picture count once as something to be compared with.
        once = {rows[i].image_sha256: i for i in reversed(seen)}.values()
        others = np.array(sorted(once, key=lambda i: rows[i].image_sha256))
        labels = np.array([row.label for row in rows])
        same = np.stack([_numbered([row.group for row in rows]), _numbered([row.image_sha256 or "" for row in rows])])
        captioned: dict[int, list[int]] = {}
        for i in seen:
            if rows[i].captions():
                captioned.setdefault(rows[i].label, []).append(i)
        for label, own in captioned.items():
            members = others[labels[others] == label]
            for start in range(0, len(own), BLOCK):
                self._rank(rows, own[start : start + BLOCK], members, same, images, scorer, found)
        if self.listener:
            self._listen(rows, list(chain(*captioned.values())), others, labels, same, images, scorer, found)
        return scored(rows, found)

    def _rank(self, rows, own: Sequence[int], members, same, images, scorer, found: dict) -> None:
        """Adds the ranks of the captions of the images `own` among those of `members` that are other pictures of other groups.

        `same` `(2, n)` numbers the groups and the pictures of all rows.
        """
        allowed = (same[:, own, None] != same[:, None, members]).all(axis=0)
        if self.bag:
            alike = np.where(allowed, images[own] @ images[members].T, -np.inf)
            nearest = np.argsort(-alike, axis=1, kind="stable")[:, : self.bag]
            chosen = np.zeros_like(allowed)
            np.put_along_axis(chosen, nearest, True, axis=1)
            allowed &= chosen
        captions = [(a, i, k) for a, i in enumerate(own) for k in rows[i].captions()]
        texts = scorer.texts([rows[i].records[k]["text"] for _, i, k in captions])
        cosines = texts @ images[members].T
        true = np.einsum("md,md->m", texts, images[[i for _, i, _ in captions]])
        for (a, i, k), row, value in zip(captions, cosines, true, strict=True):
            rivals = row[allowed[a]]
            if not len(rivals):
                found[i, k] = dict.fromkeys(("sr_rank", "sr_pct", "sr_margin"))
                continue
            tied = np.isclose(rivals, value, rtol=0, atol=TIE)
            rank = 1 + np.count_nonzero((rivals > value) & ~tied) + np.count_nonzero(tied) / 2
            found[i, k] = {
                "sr_rank": rank,
                "sr_pct": 1 - (rank - 1) / len(rivals),
                "sr_margin": float(value - rivals.max()),
            }

    def _listen(self, rows, own: Sequence[int], others, labels, same, images, scorer, found: dict) -> None:
        """Adds `sr_prob`: softmax of scaled cosines over the image and the listener's other images."""
        for i in own:
            row, captions = rows[i], rows[i].captions()
            rivals = others[(same[:, others] != same[:, [i]]).all(axis=0)]
            if self.distractors == "class":
                rivals = rivals[labels[rivals] == row.label]
            if len(rivals) > self.listener:
                drawn = np.random.default_rng(int(row.image_sha256[:15], 16))
                rivals = np.sort(drawn.choice(rivals, self.listener, replace=False))
            texts = scorer.texts([row.records[k]["text"] for k in captions])
            logits = scorer.scale * (texts @ images[[i, *rivals]].T).astype(np.float64)
            share = np.exp(logits - logits.max(axis=1, keepdims=True))
            for k, probability in zip(captions, share[:, 0] / share.sum(axis=1), strict=True):
                found[i, k]["sr_prob"] = float(probability) if len(rivals) else None


def _numbered(names: Sequence[str]) -> np.ndarray:
    """Equal numbers for equal names, `(n,)`."""
    return np.unique(names, return_inverse=True)[1]
