"""Intervals of means over seeds, and how numbers of shots and seeds are written."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable

from .results import FULL, latest

FEWEST_SEEDS = 3  # two may agree by chance, or give an interval that contains everything


def interval(values: list[float]) -> float | None:
    """Half the 95 % interval of the mean of a few runs (Student's t).

    None for fewer than `FEWEST_SEEDS` values, and where all are the same: they tell nothing about other seeds.
    """
    from scipy.stats import t  # comes with scikit-learn, whose absence is reported first

    if len(values) < FEWEST_SEEDS or max(values) - min(values) < 1e-9:
        return None
    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def in_order(shots: Iterable) -> list:
    """The numbers of shots in ascending order, `full` last, each once."""
    return sorted(set(shots), key=lambda n: (n == FULL, 0 if n == FULL else n))


def shots_name(n) -> str:
    """`1 shot`, `16 shots`, `all images`."""
    return "all images" if n == FULL else "untuned" if n == 0 else f"{n} shot{'' if n == 1 else 's'}"


def seeds_text(counts: Iterable[int]) -> str:
    """`5`, or `3 to 5` where cells of a method have different numbers of seeds."""
    counts = set(counts)
    return " to ".join(map(str, sorted({min(counts), max(counts)}))) if counts else "0"


def fewer_seeds(count: int, most: int) -> str:
    """` (2 seeds)` behind a mean over fewer seeds than others of its column; otherwise an empty string."""
    return f" ({count} seed{'' if count == 1 else 's'})" if count < most else ""


def image_chance(rows: Iterable[dict]) -> tuple[int, float] | None:
    """The number of test images, and half the 95 % interval (Wilson) of the best mean accuracy over them, in points.

    None without results.
    """
    from ...predict.metrics import wilson_interval  # slow to import

    cells: dict[tuple, list[float]] = defaultdict(list)
    images = 0
    for row in latest(rows):
        if row["status"] == "done" and row.get("test_images"):
            cells[row["method"], row["shots"]].append(row["test_accuracy"])
            images = max(images, row["test_images"])
    if not images:
        return None
    low, high = wilson_interval(round(images * max(map(statistics.mean, cells.values()))), images)
    return images, 50 * (high - low)


def image_note(rows: Iterable[dict], groups: int = 0) -> str:
    """A sentence on the sampling error of the test images, for below a table of means; empty without results.

    Args:
        groups: number of groups of test images that belong together; 0 where every image is independent.
    """
    found = image_chance(rows)
    if found is None:
        return ""
    images, points = found
    size = f"of {groups:,} groups, ±{points:.1f} points or more" if groups else f"about ±{points:.1f} points"
    return f"No ± above counts the chance of the test images: with {images:,} of them, {size}."
