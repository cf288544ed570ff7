"""Strengths of sources of captions from pairwise comparisons.

Shapes: `k` sources, `g` images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 1000
MOST_ROUNDS, CLOSE = 10_000, 1e-10
DEFINED = 0.95  # share of the draws that must have strengths for an interval


@dataclass(frozen=True)
class Game:
    """One comparison: `first` and `second` are sources; `result` is 1 if the first wins, 0 if the second does, 0.5 for a tie."""

    image: str
    first: str
    second: str
    result: float


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Logarithms of the Bradley-Terry strengths, with mean 0, by the MM algorithm (Hunter 2004, eq. 3).

    Args:
        wins: `(..., k, k)`; how often the row beat the column. A tie is half a win for both.

    Returns:
        `(..., k)`; nan where there are no finite strengths: some sources won, or lost, all comparisons with the others.
    """
    wins = np.asarray(wins, np.float64) * (1 - np.eye(np.shape(wins)[-1]))
    flat = wins.reshape(-1, *wins.shape[-2:])
    found = np.full(flat.shape[:2], np.nan)
    good = _connected(flat)
    games, won = (flat + flat.swapaxes(1, 2))[good], flat[good].sum(axis=2)
    strengths = np.ones_like(won)
    for _ in range(MOST_ROUNDS):
        new = won / (games / (strengths[:, :, None] + strengths[:, None, :])).sum(axis=2)
        new /= np.exp(np.log(new).mean(axis=1, keepdims=True))
        moved = np.abs(np.log(new / strengths)).max(initial=0)
        strengths = new
        if moved < CLOSE:
            break
    found[good] = np.log(strengths)
    return found.reshape(wins.shape[:-1])


def _connected(wins: np.ndarray) -> np.ndarray:
    """Whether each source beat each other one through a chain of wins, for `(g, k, k)`."""
    k = wins.shape[1]
    reach = (wins > 0) | np.eye(k, dtype=bool)
    for _ in range(k):
        reach = (reach.astype(np.int64) @ reach.astype(np.int64)) > 0
    return reach.all(axis=(1, 2)) if k > 1 else np.zeros(len(wins), bool)


@dataclass(frozen=True)
class Strength:
    """Of a source: its strength, its interval (95 %, over images), and its games. None where undefined."""

    source: str
    value: float | None
    low: float | None
    high: float | None
    games: int


def caption_arena(games: Sequence[Game], draws: int = DRAWS, seed: int = 0) -> list[Strength]:
    """Strengths of all sources, the best first, with intervals by a bootstrap over images.

    After CapArena (arXiv 2503.12329), which shows each pair in one order and fits online Elo or a logistic regression.

    Args:
        games: between different sources.
    """
    sources = sorted({name for game in games for name in (game.first, game.second)})
    images = sorted({game.image for game in games})
    place, number = {name: i for i, name in enumerate(sources)}, {name: i for i, name in enumerate(images)}
    wins = np.zeros((len(images), len(sources), len(sources)))
    played = dict.fromkeys(sources, 0)
    for game in games:
        a, b, g = place[game.first], place[game.second], number[game.image]
        wins[g, a, b] += game.result
        wins[g, b, a] += 1 - game.result
        played[game.first] += 1
        played[game.second] += 1
    if not games:
        return []
    values = bradley_terry(wins.sum(axis=0))
    weights = np.random.default_rng(seed).multinomial(len(images), np.full(len(images), 1 / len(images)), size=draws)
    drawn = bradley_terry(np.einsum("dg,gij->dij", weights, wins))
    defined = ~np.isnan(drawn).any(axis=1)
    sure = defined.mean() >= DEFINED and not np.isnan(values).any()
    low, high = np.quantile(drawn[defined], (0.025, 0.975), axis=0).tolist() if sure else ([None] * len(sources),) * 2
    found = [
        Strength(name, None if np.isnan(value) else value, low[i], high[i], played[name])
        for i, (name, value) in enumerate(zip(sources, values.tolist(), strict=True))
    ]
    return sorted(found, key=lambda one: (-(one.value or 0), one.source))
