"""How much of the images their captions explain: second moments, and what a linear map predicts on images it has not seen.

Shapes: `n` images, `D` embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...data.texts import DEFAULT_TEMPLATE, class_prompt
from ..steps.base import Embeddings, Row, readable

EPSILON, RIDGE = 1e-12, 1e-3


def moments(images: np.ndarray, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of the images' second moment that texts explain linearly, and the rest, `(D, D)` each.

    Jalali et al. 2024 (arXiv 2412.18645), with the cosine as kernel. In sample: with few images for their `D`, shuffled texts
    explain much, too.

    Args:
        images, texts: `(n, D)` each.
    """
    n = len(images)
    whole, cross = images.T @ images / n, images.T @ texts / n
    inverse = np.linalg.pinv(texts.T @ texts / n + EPSILON * np.eye(texts.shape[1]), hermitian=True)
    explained = cross @ inverse @ cross.T
    return explained, whole - explained


def sce(moment: np.ndarray) -> float:
    """Schur complement entropy: the sum of λ·log(Σλ/λ) over the eigenvalues λ of a part of the second moment.

    0 for a part without variation in directions, or for none.
    """
    values = np.linalg.eigvalsh(moment)
    values = values[values > 1e-9]
    return float((values * np.log(values.sum() / values)).sum())


def nullified(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Images without what the texts of their labels explain linearly, `(n, D)`, not of unit norm.

    Args:
        labels: embeddings of the class prompts, one for each image, `(n, D)`.
    """
    inverse = np.linalg.pinv(labels.T @ labels / len(labels) + EPSILON * np.eye(labels.shape[1]), hermitian=True)
    return images - labels @ (inverse @ (labels.T @ images / len(images)))


def held_out(images: np.ndarray, texts: np.ndarray, halves: np.ndarray) -> float:
    """The share of the images' variance that a ridge regression on texts, fitted to one half, predicts on the other.

    The mean of both directions. Below 0, it predicts worse than the mean image does.

    Args:
        halves: bool `(n,)`.
    """
    shares = []
    for fitted in (halves, ~halves):
        seen, said = images[fitted].mean(axis=0), texts[fitted].mean(axis=0)
        inputs, others = texts[fitted] - said, images[~fitted]
        ridge = inputs.T @ inputs / len(inputs) + RIDGE * np.eye(inputs.shape[1])
        weights = np.linalg.solve(ridge, inputs.T @ (images[fitted] - seen) / len(inputs))
        error = others - seen - (texts[~fitted] - said) @ weights
        shares.append(1 - np.square(error).sum() / np.square(others - others.mean(axis=0)).sum())
    return float(np.mean(shares))


def explained_images(rows: Sequence[Row], scorer: Embeddings) -> dict[str, float | None]:
    """What the captions of each image, as the mean of their embeddings, explain of the images, beside shuffled captions.

    Both halves have whole groups. None where there are fewer than two groups on a side.
    """
    images = scorer.images().astype(np.float64)
    own = sorted((i for i in readable(rows, images) if rows[i].captions()), key=lambda i: rows[i].image_sha256)
    groups = sorted({rows[i].group for i in own})
    if len(groups) < 4:
        return dict.fromkeys(LABELS)
    rng = np.random.default_rng(0)
    first = {groups[k] for k in rng.permutation(len(groups))[: len(groups) // 2]}
    halves = np.array([rows[i].group in first for i in own])
    seen = images[own]
    texts = np.stack([scorer.texts([rows[i].records[k]["text"] for k in rows[i].captions()]).mean(axis=0) for i in own])
    texts = texts.astype(np.float64)
    shuffled = texts[rng.permutation(len(own))]
    labels = scorer.texts([class_prompt(DEFAULT_TEMPLATE, rows[i].class_name) for i in own]).astype(np.float64)
    rest = nullified(seen, labels)
    values = (
        held_out(seen, texts, halves),
        held_out(seen, labels, halves),
        held_out(seen, shuffled, halves),
        held_out(rest, texts, halves),
        np.exp(sce(moments(seen, texts)[1])),
        np.exp(sce(moments(seen, shuffled)[1])),
    )
    return dict(zip(LABELS, map(float, values), strict=True))


LABELS = (
    "variance of other images that captions predict",
    "… that class names predict",
    "… that shuffled captions predict (control)",
    "… without what class names say, that captions predict",
    "images beyond their captions (exp of SCE)",
    "… beyond shuffled captions (control)",
)
