"""How many different captions a class has: the Vendi score before and after, at equal numbers of captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .base import Embeddings, Row

DRAWS, MOST = 20, 100  # samples of each class, and captions per sample: the score depends on their number


def vendi(embeds: np.ndarray) -> float:
    """Vendi score (Friedman & Dieng 2023, arXiv 2210.02410, eq. 2) of unit-norm vectors `(m, D)` under the cosine.

    1 if all are equal, `m` if all are orthogonal.
    """
    shares = np.linalg.eigvalsh(embeds.astype(np.float64) @ embeds.T.astype(np.float64) / len(embeds))
    shares = shares[shares > 1e-12]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def vendi_of_classes(sides: Sequence[Sequence[Row]], scorer: Embeddings) -> list[float | None]:
    """The Vendi score of the captions of a class, averaged over classes, for several versions of the same rows.

    Of each class, all versions give the same number of captions, at most `MOST`, the mean over `DRAWS` seeded samples. Classes
    with fewer than two captions in some version are left out; None if there is no other.
    """
    texts: list[dict[str, list[str]]] = []
    for rows in sides:
        own: dict[str, list[str]] = {}
        for row in sorted(rows, key=lambda row: row.image_sha256 or ""):
            own.setdefault(row.class_name, []).extend(dict.fromkeys(row.records[k]["text"] for k in row.captions()))
        texts.append(own)
    found: list[list[float]] = [[] for _ in sides]
    for name in sorted(set.intersection(*(set(own) for own in texts))):
        size = min(MOST, *(len(own[name]) for own in texts))
        if size < 2:
            continue
        for scores, own in zip(found, texts, strict=True):
            embeds = scorer.texts(own[name])
            embeds = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
            rng = np.random.default_rng(0)
            draws = DRAWS if len(embeds) > size else 1
            scores.append(np.mean([vendi(embeds[rng.permutation(len(embeds))[:size]]) for _ in range(draws)]))
    return [float(np.mean(scores)) if scores else None for scores in found]
