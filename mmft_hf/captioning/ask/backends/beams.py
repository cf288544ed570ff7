"""Diverse beam search over log-probabilities. Shapes: `n` prefixes, `V` tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class Beam:
    """A text so far. `log_prob` is its log-probability, `score` that with the penalties; `ended`: its last token is an end."""

    tokens: Prefix = ()
    log_prob: float = 0.0
    score: float = 0.0
    ended: bool = False


def diverse_beams(
    log_probs: Callable[[Sequence[Prefix]], np.ndarray],
    beams: int,
    groups: int,
    diversity: float,
    ends: Collection[int],
    most: int,
) -> list[list[Beam]]:
    """Beam search in groups that avoid each other's tokens (Vijayakumar et al. 2016, arXiv 1610.02424, algorithm 1, with the
    Hamming penalty).

    At each position the groups take turns. A token loses `diversity` for each beam of an earlier group that has just chosen it.
    Within a group this is plain beam search, whose running sums hold the penalties. A beam that has ended stays as it is and
    takes part in the comparison.

    Args:
        log_probs: of the next token after each prefix, `(n, V)`.
        beams: in all groups together, a multiple of `groups`.
        ends: tokens that end a text.
        most: number of tokens after which a text is cut off.

    Returns:
        For each group its beams by log-probability without penalties, the best one first.
    """
    width = beams // groups
    found = [[Beam()] for _ in range(groups)]
    for _ in range(most):
        live = list(dict.fromkeys(beam.tokens for group in found for beam in group if not beam.ended))
        if not live:
            break
        values = dict(zip(live, np.asarray(log_probs(live), np.float64), strict=True))
        taken: Counter = Counter()
        for number, group in enumerate(found):
            group = _extended(group, values, width, diversity, taken, ends)
            # Only beams that have grown have chosen a token at this position.
            grown = [beam for beam in group if beam not in found[number]]
            taken.update(beam.tokens[-1] for beam in grown)
            found[number] = group
    return [sorted(group, key=lambda beam: (-beam.log_prob, beam.tokens)) for group in found]


def _extended(group, values, width: int, diversity: float, taken: Counter, ends: Collection[int]) -> list[Beam]:
    """The best beams of a group after one more token."""
    candidates = [beam for beam in group if beam.ended]
    for beam in group:
        if beam.ended:
            continue
        plain = values[beam.tokens]
        penalised = plain.copy()
        for token, count in taken.items():
            penalised[token] -= diversity * count
        # The first of equal ones, as everywhere.
        for token in np.argsort(-penalised, kind="stable")[:width].tolist():
            if np.isfinite(penalised[token]):
                log_prob, score = beam.log_prob + float(plain[token]), beam.score + float(penalised[token])
                candidates.append(Beam((*beam.tokens, token), log_prob, score, token in ends))
    return sorted(candidates, key=lambda beam: (-beam.score, beam.tokens))[:width] or group
