"""What tells two sets of images apart, in words: statements are proposed on one half of each and ranked on the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..steps.asking import Ask, Asking, quoted

SHOWN, ROUNDS, STATEMENTS = 20, 3, 10


@dataclass(frozen=True)
class Statement:
    """A statement about the first set.

    Args:
        auroc: how often it fits an image of the first set better than one of the second; .5 by chance.
        p: of Welch's test of the cosines (normal approximation), times the number of statements as Holm's procedure has it.
    """

    text: str
    auroc: float
    p: float


def propose(first: Sequence[str], second: Sequence[str], seed: int = 0) -> Asking:
    """Asks the writer what captions of the first set have in common that those of the second lack; returns statements.

    After VisDiff (Dunlap et al. 2024): three rounds of ten statements on twenty captions of each set. Show it captions of images
    that `ranked` does not get.
    """
    rng = np.random.default_rng(seed)

    def drawn(texts: Sequence[str]) -> str:
        chosen = sorted(rng.permutation(len(texts))[:SHOWN])
        return "\n".join(quoted(texts[k]) for k in chosen)

    asks = [
        Ask(
            "writer",
            f"Captions of images of set A:\n{drawn(first)}\n\nCaptions of images of set B:\n{drawn(second)}\n\nWrite {STATEMENTS} "
            "short phrases that describe what is seen in images of set A more often than in those of set B.",
            answer="list",
        )
        for _ in range(ROUNDS)
    ]
    answers = yield asks
    return list(dict.fromkeys(text.strip() for answer in answers for text in answer or () if text.strip()))


def ranked(statements: Sequence[str], texts: np.ndarray, first: np.ndarray, second: np.ndarray) -> list[Statement]:
    """Statements by AUROC, the best first.

    Args:
        texts: their embeddings `(s, D)`.
        first, second: embeddings `(a, D)` and `(b, D)` of images that were not shown when the statements were proposed. Use images of
            the validation split, never of test.

    Raises:
        ValueError: a set with fewer than two images.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"expected two images or more of each set, found {len(first)} and {len(second)}")
    high, low = texts @ first.T, texts @ second.T
    auroc = [_auroc(*pair) for pair in zip(high, low, strict=True)]
    spread = np.sqrt(high.var(axis=1, ddof=1) / high.shape[1] + low.var(axis=1, ddof=1) / low.shape[1])
    t = (high.mean(axis=1) - low.mean(axis=1)) / np.maximum(spread, 1e-12)
    raw = np.array([math.erfc(value / math.sqrt(2)) / 2 for value in t])
    order, p, most = np.argsort(raw, kind="stable"), np.empty(len(raw)), 0.0
    for place, k in enumerate(order):
        most = max(most, min(1.0, raw[k] * (len(raw) - place)))
        p[k] = most
    found = [Statement(*one) for one in zip(statements, auroc, p.tolist(), strict=True)]
    return sorted(found, key=lambda one: (-one.auroc, one.text))


def _auroc(high: np.ndarray, low: np.ndarray) -> float:
    """How often a value of the first is above one of the second; ties count half."""
    low = np.sort(low)
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.mean() / (2 * len(low)))
