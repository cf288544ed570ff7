"""`representatives`: few images that stand for all. The captions of the others are dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...core.errors import UserError
from ..types import DROPPED
from .base import ByRow, Embeddings, Row, Step, readable, removed

ROUNDS = 50  # of k-means at most


@dataclass(frozen=True)
class Representatives(Step):
    """Keeps the captions of a share of the images, so that later steps ask about these alone. No image is removed.

    The captions of images that cannot be read are kept.

    Args:
        share: of the images with captions; at least one of each class.
        method: `kmeans`: the image nearest to the middle of each of as many clusters. `farthest`: the image nearest to the mean,
            then always the one that is farthest from those chosen.
        per: `class`, or `split`: classes share the budget, and each keeps one at least.
        seed: of the first middles of `kmeans`.
    """

    share: float = 0.25
    method: str = "kmeans"
    per: str = "class"
    seed: int = 0

    name: ClassVar[str] = "representatives"
    about: ClassVar[str] = "keeps the captions of images that stand for the others"
    after: ClassVar[str] = "clustering and selection of a training set (arXiv 2305.20087)"
    differs: ClassVar[str] = (
        "The images are clustered by the scorer's embeddings, not by features of a codebook, and chosen by their place alone, not by "
        "how well a caption fits them."
    )

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise UserError(f"step representatives, share: expected a number above 0, at most 1, found {self.share}.")
        for name, allowed in (("method", tuple(METHODS)), ("per", ("class", "split"))):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"step representatives, {name}: expected one of {', '.join(allowed)}, found {getattr(self, name)!r}."
                )

    def needs_scorer(self) -> bool:
        return True

    def apply(self, rows: Sequence[Row], scorer: Embeddings, found: Sequence = ()) -> Sequence[list[dict]]:
        images = scorer.images()
        seen = [i for i in readable(rows, images) if rows[i].captions()]
        chosen = self.chosen(rows, images, seen)
        left_out = set(seen) - chosen

        def make(i: int, row: Row) -> list[dict]:
            own = {*row.captions()} if i in left_out else ()
            return [removed(r, self.name, DROPPED) if k in own else r for k, r in enumerate(row.records)]

        return ByRow(rows, make)

    def chosen(self, rows: Sequence[Row], images: np.ndarray, among: Sequence[int]) -> set[int]:
        """The rows that stand for those `among` which they are. `images` `(n, D)`: see `Embeddings`."""
        seen = sorted(among, key=lambda i: rows[i].image_sha256)
        once = list({rows[i].image_sha256: i for i in reversed(seen)}.values())[::-1]  # of copies, one may be chosen
        pools: dict[int, list[int]] = {}
        for i in once:
            pools.setdefault(rows[i].label if self.per == "class" else 0, []).append(i)
        chosen: set[int] = set()
        for own in pools.values():
            number = math.ceil(round(self.share * len(own), 9))
            chosen |= {own[k] for k in METHODS[self.method](images[own], number, self.seed)}
        for label in {rows[i].label for i in once} - {rows[i].label for i in chosen}:
            own = [i for i in once if rows[i].label == label]
            chosen.add(own[farthest_first(images[own], 1)[0]])
        return chosen


def farthest_first(embeds: np.ndarray, number: int, seed: int = 0) -> list[int]:
    """Rows of unit-norm `embeds` `(n, D)`: the one nearest to the mean, then always the one farthest from all chosen.

    Gonzalez 1985, a 2-approximation of the k-centre problem.
    """
    chosen = [int(np.argmax(embeds @ embeds.mean(axis=0)))]
    nearest = embeds @ embeds[chosen[0]]  # cosine with the nearest chosen one
    while len(chosen) < number:
        nearest[chosen[-1]] = np.inf
        chosen.append(int(np.argmin(nearest)))
        nearest = np.maximum(nearest, embeds @ embeds[chosen[-1]])
    return chosen


def kmeans(embeds: np.ndarray, number: int, seed: int = 0) -> list[int]:
    """The row of `embeds` `(n, D)` nearest to the middle of each of `number` clusters.

    Lloyd's algorithm from middles drawn as in k-means++ (Arthur & Vassilvitskii 2007).
    """
    rng = np.random.default_rng(seed)
    squares = np.einsum("nd,nd->n", embeds, embeds)

    def distances(middles: np.ndarray) -> np.ndarray:
        return np.maximum(squares[:, None] - 2 * embeds @ middles.T + np.einsum("kd,kd->k", middles, middles), 0)

    first = [int(rng.integers(len(embeds)))]
    near = distances(embeds[first])[:, 0].astype(np.float64)
    while len(first) < number:
        near[first] = 0
        total = near.sum()
        # All others may be copies of those drawn.
        first.append(int(rng.choice(len(embeds), p=near / total)) if total > 0 else _unused(len(embeds), first)[0])
        near = np.minimum(near, distances(embeds[first[-1:]])[:, 0])
    middles, owner = embeds[first], None
    for _ in range(ROUNDS):
        assigned = distances(middles).argmin(axis=1)
        if owner is not None and (assigned == owner).all():
            break
        owner = assigned
        for k in np.unique(owner):
            middles[k] = embeds[owner == k].mean(axis=0)
    far = distances(middles)
    clusters = [(k, np.flatnonzero(owner == k)) for k in np.unique(owner)]
    chosen = [int(members[far[members, k].argmin()]) for k, members in clusters]
    return chosen + _unused(len(embeds), chosen)[: number - len(chosen)]  # a cluster may have become empty


def _unused(count: int, chosen: Sequence[int]) -> list[int]:
    return sorted(set(range(count)) - set(chosen))


METHODS = {"kmeans": kmeans, "farthest": farthest_first}
