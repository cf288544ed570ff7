"""The best of several candidates: `NAME@max_K`, a score that captions have, maximised over `K` captions of each image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..steps.base import Row, score_of


def best_of(rows: Sequence[Row], name: str, k: int) -> dict[str, float | int | None]:
    """The mean over images of the best score among their first `k` captions. Images with fewer than `k` are counted apart.

    After SPIDEr-max (Labbé et al. 2022). It grows with `k`: compare equal numbers.
    """
    found = [[score_of(row.records[i], name) for i in row.captions()] for row in rows]
    values = [[value for value in own if value is not None] for own in found]
    best = [max(own[:k]) for own in values if len(own) >= k]
    return {
        f"best {name} of {k} captions": float(np.mean(best)) if best else None,
        f"images with fewer than {k} captions with {name}": len(rows) - len(best),
    }
