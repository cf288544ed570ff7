"""How many different captions a class has: the Vendi score before and after, at equal numbers of captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .base import Embeddings, Row, readable

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
    texts = [_texts_of_classes(rows) for rows in sides]
    found: list[list[float]] = [[] for _ in sides]
    for name in sorted(set.intersection(*(set(own) for own in texts))):
        size = min(MOST, *(len(own[name]) for own in texts))
        if size < 2:
            continue
        for scores, own in zip(found, texts, strict=True):
            scores.append(_drawn_vendi(_unit(scorer.texts(own[name])), size))
    return [float(np.mean(scores)) if scores else None for scores in found]


def contextual_vendi(rows: Sequence[Row], scorer: Embeddings) -> dict[str, float | None]:
    """The Vendi scores of the captions and of the images of a class, at equal numbers, and their ratio, averaged over classes.

    After c-VSG (arXiv 2406.08482), which guides a generator by a Vendi score beside that of real images. Copies of a picture count once.
    Classes with fewer than two captions or images are left out; None if there is no other.
    """
    images = scorer.images()
    pictures: dict[str, dict[str, int]] = {}
    for i in sorted(readable(rows, images), key=lambda i: rows[i].image_sha256):
        pictures.setdefault(rows[i].class_name, {}).setdefault(rows[i].image_sha256, i)
    found = []
    for name, texts in sorted(_texts_of_classes(rows).items()):
        own = list(pictures.get(name, {}).values())
        size = min(MOST, len(texts), len(own))
        if size > 1:
            found.append((_drawn_vendi(_unit(scorer.texts(texts)), size), _drawn_vendi(images[own], size)))
    said, seen = np.array(found).reshape(-1, 2).T
    values = (said, seen, said / seen) if found else ()
    names = (
        "different captions of a class (Vendi)",
        "different images of a class (Vendi)",
        "captions over images (Vendi)",
    )
    return dict.fromkeys(names) | dict(zip(names, (float(value.mean()) for value in values), strict=False))


def _texts_of_classes(rows: Sequence[Row]) -> dict[str, list[str]]:
    own: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: row.image_sha256 or ""):
        own.setdefault(row.class_name, []).extend(dict.fromkeys(row.records[k]["text"] for k in row.captions()))
    return own


def _unit(embeds: np.ndarray) -> np.ndarray:
    return embeds / np.linalg.norm(embeds, axis=1, keepdims=True)


def _drawn_vendi(embeds: np.ndarray, size: int) -> float:
    """The mean Vendi score of seeded samples of this size."""
    rng = np.random.default_rng(0)
    draws = DRAWS if len(embeds) > size else 1
    return np.mean([vendi(embeds[rng.permutation(len(embeds))[:size]]) for _ in range(draws)])
