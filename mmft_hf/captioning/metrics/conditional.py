"""Conditional retrieval: whether an image and one of its captions together find another image that shares the caption."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..steps.base import Embeddings, Row, readable

GALLERY, MOST = 10, 2_000  # images to choose from; questions


def conditional_ranks(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """The rank of the first image of each gallery, 1 being best; half a rank for each tie.

    Args:
        query: `(q, D)`.
        gallery: `(q, g, D)`.
    """
    cosines = np.einsum("qd,qgd->qg", query, gallery)
    right, others = cosines[:, :1], cosines[:, 1:]
    tied = np.isclose(others, right, rtol=0, atol=1e-6)
    return 1 + ((others > right) & ~tied).sum(axis=1) + tied.sum(axis=1) / 2


def conditional_retrieval(rows: Sequence[Row], scorer: Embeddings) -> dict[str, float | None]:
    """Of a gallery of ten, how often image + caption find the one other image, of another group, that has the caption.

    After GeneCIS (Vaze et al. 2023): the query is the sum of both embeddings. The nine others are those most like the reference
    that lack the caption. None if no two groups share a caption.
    """
    images = scorer.images()
    seen = sorted(readable(rows, images), key=lambda i: rows[i].image_sha256)
    texts = {i: {rows[i].records[k]["text"] for k in rows[i].captions()} for i in seen}
    owners: dict[str, list[int]] = {}
    for i in seen:
        for text in texts[i]:
            owners.setdefault(text, []).append(i)
    shared = {text: own for text, own in owners.items() if len({rows[i].group for i in own}) > 1}
    pairs = [(i, text) for text in sorted(shared) for i in shared[text]]
    rng = np.random.default_rng(0)
    pairs = [pairs[n] for n in sorted(rng.permutation(len(pairs))[:MOST])]
    queries, galleries = [], []
    order = np.array(seen)
    for i, text in pairs:
        targets = [j for j in shared[text] if rows[j].group != rows[i].group]
        without = [j for j in order[np.argsort(-(images[order] @ images[i]), kind="stable")] if text not in texts[j]]
        rivals = [j for j in without if rows[j].group != rows[i].group][: GALLERY - 1]
        if len(rivals) == GALLERY - 1:
            queries.append((i, text))
            galleries.append([targets[rng.integers(len(targets))], *rivals])
    if not queries:
        return {f"finds an image by another and a shared caption, first {k} of {GALLERY}": None for k in (1, 2, 3)}
    said = scorer.texts([text for _, text in queries])
    query = images[[i for i, _ in queries]] + said / np.linalg.norm(said, axis=1, keepdims=True)
    ranks = conditional_ranks(query, images[np.array(galleries)])
    return {
        f"finds an image by another and a shared caption, first {k} of {GALLERY}": float(np.mean(ranks <= k))
        for k in (1, 2, 3)
    }
