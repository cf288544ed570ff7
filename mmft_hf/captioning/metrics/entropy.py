"""How evenly the values of an attribute occur."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def attribute_entropy(counts: Sequence[int]) -> float:
    """Entropy of how often each proposed value of an attribute was found, 0 (one value) to 1 (all equally often).

    Rassin et al. 2024 (arXiv 2410.22592). It is divided by the logarithm of the number of proposed values, found or not.

    Raises:
        ValueError: fewer than two proposed values, or nothing was found.
    """
    if len(counts) < 2 or not sum(counts):
        raise ValueError(f"expected counts of two values or more, not all 0, found {list(counts)}")
    shares = np.array([count for count in counts if count]) / sum(counts)
    return float(-(shares * np.log(shares)).sum() / np.log(len(counts))) + 0.0
