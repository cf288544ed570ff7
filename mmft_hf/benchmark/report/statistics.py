"""What the results of a benchmark say, and how surely: means over seeds, paired differences, and two kinds of chance.

A difference between two methods has an interval *over seeds* (Student's t on the differences within each seed: had the
training images been others?) and one *over test images* (a bootstrap that draws test images, or groups of images that belong
together, and averages over seeds: had the test images been others?). Only where neither contains 0 is it called a difference.

Shapes: `n` test images, `G` groups of them, `S` seeds, `C` classes.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from ...core.errors import UserError
from ..run.results import RESULTS_FILE, differences
from ..run.summary import FEWEST_SEEDS, in_order, interval, latest
from .methods import FAMILIES, family

DRAWS, SEED = 2000, 0
FEWEST_GROUPS = 10  # of test images: of fewer, a bootstrap is much too sure
MOST_CLASSES = 40  # whose gains are drawn
TEST, PER_CLASS = "test", "mean per class"


# -- results -------------------------------------------------------------------------------------------------------------
@dataclass
class Findings:
    """The rows of one benchmark, by method, shots and seed, with what stands beside them.

    Args:
        cells: `{(method, shots): {seed: row}}`, done cells alone.
        failed: rows of failed cells.
        data: content of `data.json`, or nothing.
        maps: content of `maps.json`, or nothing.
        notes: what a reader of the page must know about missing parts.
        folder: name of the folder that all this is from.
    """

    cells: dict[tuple, dict[int, dict]]
    failed: list[dict]
    identity: dict
    data: dict = field(default_factory=dict)
    maps: list = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folder: str = ""

    def __post_init__(self):
        keys = [*self.cells, *((row["method"], row["shots"]) for row in self.failed)]
        first = list(dict.fromkeys(method for method, _ in keys))
        place = list(FAMILIES)
        self.methods = sorted(first, key=lambda name: (place.index(family(name)), first.index(name)))
        self.shots = in_order(n for _, n in keys)

    def rows(self, method: str, shots) -> dict[int, dict]:
        """Done rows by seed."""
        return self.cells.get((method, shots), {})

    def all_rows(self) -> list[dict]:
        """Every done row."""
        return [row for cell in self.cells.values() for row in cell.values()]

    def nearest(self, method: str, shots) -> dict[int, dict]:
        """The same, of a method without training at any number of shots."""
        return self.rows(method, shots) or self.rows(method, 0)

    def values(self, method: str, shots, split: str = TEST) -> list[float]:
        """Accuracy in percent of each seed."""
        return [
            100 * accuracy(row, split) for row in self.rows(method, shots).values() if accuracy(row, split) is not None
        ]

    def mean(self, method: str, shots, split: str = TEST) -> float | None:
        """Mean accuracy in percent."""
        found = self.values(method, shots, split)
        return statistics.mean(found) if found else None

    @property
    def shift_splits(self) -> list[str]:
        """Names of the splits from elsewhere than the training."""
        return list(dict.fromkeys(name for row in self.all_rows() for name in row.get("shift_accuracy") or {}))

    def largest(self, *methods: str):
        """The largest number of shots at which all of these methods have results; None without any."""
        return next((n for n in reversed(self.shots) if all(self.nearest(m, n) for m in methods)), None)

    def most_seeds(self, shots) -> int:
        """Seeds of the method that has most."""
        return max(len(self.rows(m, shots)) for m in self.methods)

    def best(self, shots, methods, reference: str | None = None, split: str = TEST) -> list[str]:
        """Which of the methods are ahead on the same seeds; several if level, none without results.

        Ranked are differences to a reference within each seed, and not means, by which a method that failed on a hard seed
        would win. Those with fewer than three seeds come after the others.

        Args:
            reference (*optional*): by default that of the methods with most seeds.
        """
        if reference is None:
            reference = max(methods, key=lambda m: len(self.rows(m, shots)), default=None)
        rank = {}
        for method in methods:
            if found := paired(self, method, reference, shots, split):
                points = statistics.mean(accuracy(a, split) - accuracy(b, split) for a, b in found)
                rank[method] = (min(len(found), FEWEST_SEEDS), round(points, 9))
        return [method for method in rank if rank[method] == max(rank.values())]

    def missing(self) -> int:
        """How many cells there are not, if all methods were to be run at all shots and seeds that some were."""
        rows = [row for row in [*self.all_rows(), *self.failed] if row["shots"] != 0]
        return math.prod(len({row[key] for row in rows}) for key in ("method", "shots", "seed")) - len(rows)

    def groups(self, split: str = TEST) -> list | None:
        """`(n,)` ids of groups of test images that belong together; None where each stands alone."""
        return (self.data.get("groups") or {}).get(split)

    def few_groups(self, split: str = TEST) -> int:
        """How many groups its images are of, if that is too few to draw from; else 0."""
        truth = np.asarray((self.data.get("labels") or {}).get(split) or [])
        groups = self.groups(split) or range(len(truth))
        count = len({str(group) for group, label in zip(groups, truth, strict=False) if label >= 0})
        return count if count < FEWEST_GROUPS else 0

    @property
    def class_names(self) -> list[str]:
        """`C` names; empty without `data.json`."""
        return list(self.data.get("class_names") or [])


def accuracy(row: dict, split: str = TEST) -> float | None:
    """Accuracy of a row on the test split, there with every class counting alike, or on a shift split; 0 to 1."""
    if split == TEST:
        return row.get("test_accuracy")
    if split == PER_CLASS:
        return row.get("test_mean_per_class_accuracy")
    return (row.get("shift_accuracy") or {}).get(split)


def gather(rows: list[dict], folder: Path) -> Findings:
    """Results from the rows of a file and from what lies beside it.

    Raises:
        UserError: there are no rows, or rows of differing identities, whose means would mean nothing.
    """
    if not rows:
        found = "no such folder" if not folder.is_dir() else "none in it"
        raise UserError(
            f"--report {folder}: expected the --output_dir of a benchmark, with results in {RESULTS_FILE}, found {found}. "
            "Type: mmft-hf benchmark --report outputs/mmft"
        )
    identity = rows[0].get("identity") or {}
    for row in rows:
        if different := differences(identity, row.get("identity") or {}):
            listed = "; ".join(f"{name} ({a}, {b})" for name, a, b in different)
            raise UserError(
                f"{folder}: expected results of one model, data set, settings and versions, found rows that differ in "
                f"{listed}. These must not be averaged: run them into folders of their own."
            )
    cells: dict[tuple, dict[int, dict]] = {}
    failed = []
    for row in latest(rows):
        if row["status"] == "done":
            cells.setdefault((row["method"], row["shots"]), {})[row["seed"]] = row
        else:
            failed.append(row)
    notes: list[str] = []
    data = beside(folder / "data.json", dict, notes)
    results = Findings(
        cells, failed, identity, data, beside(folder / "maps.json", list, notes), notes, folder.resolve().name
    )
    drop_foreign_predictions(results)
    return results


def beside(path: Path, kind: type, notes: list[str]):
    """A JSON file; empty where there is none, or none that can be read."""
    if not path.is_file():
        return kind()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        notes.append(f"{path.name} could not be read ({error}); its part of the report is left out.")
        return kind()
    return content if isinstance(content, kind) else kind()


def drop_foreign_predictions(results: Findings) -> None:
    """Predictions that do not give the accuracy of their row belong to other labels: nothing is computed from them."""
    labels = results.data.get("labels") or {}
    wrong = 0
    for cell in results.cells.values():
        for row in cell.values():
            kept = {}
            for split, predicted in (row.get("predictions") or {}).items():
                truth, stated = labels.get(split), accuracy(row, split)
                if truth is None or stated is None:
                    continue
                right, read = correct(predicted, truth) if len(truth) == len(predicted) else (np.zeros(1), np.zeros(1))
                if read.any() and abs(right[read.astype(bool)].mean() - stated) < 1e-4:
                    kept[split] = np.asarray(predicted)
                else:
                    wrong += 1
            row["predictions"] = kept
    if wrong:
        results.notes.append(
            f"{wrong} lists of predictions do not fit the labels in data.json and are left out: is it of another run?"
        )


def correct(predicted, truth) -> tuple[np.ndarray, np.ndarray]:
    """`(n,)` 1.0 where right; `(n,)` whether the image counts: it was read and has a label."""
    predicted, truth = np.asarray(predicted), np.asarray(truth)
    read = (predicted >= 0) & (truth >= 0)
    return ((predicted == truth) & read).astype(float), read


# -- differences ---------------------------------------------------------------------------------------------------------
@dataclass
class Difference:
    """How many points of accuracy one method is above another.

    Args:
        points: mean over seeds.
        seeds: number of seeds that both have; a method without training is paired with each.
        over_seeds: 95 % interval over seeds; None for fewer than `FEWEST_SEEDS`, and where all give the same.
        over_images: 95 % interval over test images; None without predictions or with fewer than `FEWEST_GROUPS` groups.
    """

    points: float
    seeds: int
    over_seeds: tuple[float, float] | None
    over_images: tuple[float, float] | None = None

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `not distinguishable`, `too few seeds` or `same for every seed`."""
        known = [pair for pair in (self.over_seeds, self.over_images) if pair]
        if any(low <= 0 <= high for low, high in known):
            return "not distinguishable"
        if self.seeds < FEWEST_SEEDS:
            return "too few seeds"
        if self.over_seeds is None:
            return "same for every seed"
        return "better" if self.points > 0 else "worse"


def pairs(a: dict[int, dict], b: dict[int, dict]) -> list[tuple[dict, dict]]:
    """Rows of the same seed. What was done once, without any chance (0 shots), stands beside every seed of the other."""
    if len(b) == 1 and next(iter(b.values()))["shots"] == 0:
        return [(row, next(iter(b.values()))) for row in a.values()]
    if len(a) == 1 and next(iter(a.values()))["shots"] == 0:
        return [(next(iter(a.values())), row) for row in b.values()]
    return [(a[seed], b[seed]) for seed in a if seed in b]


def paired(results: Findings, method: str, other: str, shots, split: str = TEST) -> list[tuple[dict, dict]]:
    """Rows of both methods that have an accuracy on this split."""
    found = pairs(results.nearest(method, shots), results.nearest(other, shots))
    return [(a, b) for a, b in found if accuracy(a, split) is not None and accuracy(b, split) is not None]


def compare(results: Findings, method: str, other: str, shots, split: str = TEST) -> Difference | None:
    """`method` minus `other`, in points; None without a common seed."""
    found = paired(results, method, other, shots, split)
    if not found:
        return None
    points = [100 * (accuracy(a, split) - accuracy(b, split)) for a, b in found]
    mean, half = statistics.mean(points), interval(points)
    truth = (results.data.get("labels") or {}).get(split)
    images = None
    predicted = all(split in a["predictions"] and split in b["predictions"] for a, b in found)
    if truth is not None and predicted and not results.few_groups(split):
        gain, read = gains(found, truth, split)
        low, high = bootstrap(gain, read, results.groups(split))
        images = (100 * float(low), 100 * float(high))
    return Difference(mean, len(points), None if half is None else (mean - half, mean + half), images)


def gains(found: list[tuple[dict, dict]], truth, split: str = TEST) -> tuple[np.ndarray, np.ndarray]:
    """`(n,)` gain of each image, -1 to 1, averaged over the pairs (0 where it does not count); `(n,)` whether it counts."""
    total, reads = 0.0, True
    for a, b in found:
        right_a, read_a = correct(a["predictions"][split], truth)
        right_b, read_b = correct(b["predictions"][split], truth)
        total, reads = total + right_a - right_b, reads & read_a & read_b
    return np.where(reads, total / len(found), 0.0), reads


def bootstrap(gain: np.ndarray, read: np.ndarray, groups=None, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """95 % percentile interval of mean gains, images (or whole groups of them) drawn with replacement.

    Args:
        gain (`(n,)` or `(n, K)`): gains per image, 0 where it does not count; `K` means are taken on the same draws.
        read (`(n,)` or `(n, K)`): whether an image counts.
        groups (`(n,)`, *optional*): ids; images of one id are not independent, and are drawn together.

    Returns:
        `(2,)` or `(2, K)`: lower and upper ends. Draws in which nothing counts are left out.
    """
    n = len(gain)
    ids = np.arange(n) if groups is None else np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
    size = int(ids.max()) + 1
    sums = np.zeros((size, *gain.shape[1:]))
    counts = np.zeros((size, *read.shape[1:]))
    np.add.at(sums, ids, gain)
    np.add.at(counts, ids, read)
    means, step = [], max(1, 4_000_000 // size)  # so many draws at once take 32 MB
    for some in np.split(drawn(size, draws, seed), range(step, draws, step)):
        weights = some.astype(float)
        with np.errstate(invalid="ignore"):
            means.append((weights @ sums) / (weights @ counts))
    return np.nanquantile(np.concatenate(means), [0.025, 0.975], axis=0)


@lru_cache(maxsize=4)
def drawn(size: int, draws: int, seed: int) -> np.ndarray:
    """`(draws, size)`: how often each of `size` groups is in each draw. The same for every comparison."""
    rng = np.random.default_rng(seed)
    return np.stack([np.bincount(rng.integers(size, size=size), minlength=size).astype(np.uint8) for _ in range(draws)])


# -- classes -------------------------------------------------------------------------------------------------------------
@dataclass
class ClassGains:
    """Recall of each class by one method minus that by another, in points, mean over seeds; `(C,)`, NaN without test images.

    Args:
        low, high: 95 % interval over test images, of the classes that gain or lose most; NaN of others. Without ends where the
            images are of too few groups.
    """

    method: str
    other: str
    shots: int | str
    gain: np.ndarray
    low: np.ndarray
    high: np.ndarray
    images: np.ndarray


def with_predictions(results: Findings, *methods: str):
    """The largest shots at which all of these methods have predictions that can be looked into; None without any."""
    for n in reversed(results.shots):
        cells = [results.nearest(m, n) for m in methods]
        if all(cell and all(TEST in row["predictions"] for row in cell.values()) for cell in cells):
            return n
    return None


def class_gains(results: Findings, method: str, other: str) -> ClassGains | None:
    """Which classes gain most, at the largest shots; None without predictions or a common seed."""
    shots, names = with_predictions(results, method, other), results.class_names
    found = pairs(results.nearest(method, shots), results.nearest(other, shots)) if shots is not None else []
    if not found or not names:
        return None
    truth = np.asarray(results.data["labels"][TEST])
    gain, read = gains(found, truth)
    own = read[:, None] & (truth[:, None] == np.arange(len(names)))
    images = own.sum(axis=0)
    with np.errstate(invalid="ignore"):
        mean = (gain[:, None] * own).sum(axis=0) / images
    extremes, ends = shown_classes(mean), np.full((2, len(names)), np.nan)
    own = own[:, extremes]
    if results.few_groups():
        ends[0, extremes], ends[1, extremes] = -np.inf, np.inf
    elif len(extremes):
        ends[:, extremes] = bootstrap(gain[:, None] * own, own, results.groups())
    return ClassGains(method, other, shots, 100 * mean, 100 * ends[0], 100 * ends[1], images)


def shown_classes(gain: np.ndarray, most: int = MOST_CLASSES) -> np.ndarray:
    """Classes from the largest gain to the largest loss; of too many, those at the two ends."""
    order = np.argsort(-gain, kind="stable")
    order = order[np.isfinite(gain[order])]
    return order if len(order) <= most else np.concatenate([order[: most // 2], order[-(most // 2) :]])


def confusions(results: Findings, method: str, shots) -> tuple[np.ndarray, np.ndarray]:
    """`(C, C)` images of a class (rows) that are taken for another (columns), mean over seeds; `(C,)` images of each class."""
    truth = np.asarray(results.data["labels"][TEST])
    size, cells = len(results.class_names), results.nearest(method, shots)
    counts = np.zeros((size, size))
    for row in cells.values():
        predicted = row["predictions"][TEST]
        read = correct(predicted, truth)[1]
        np.add.at(counts, (truth[read], predicted[read]), 1 / len(cells))
    images = counts.sum(axis=1).round().astype(int)
    np.fill_diagonal(counts, 0)
    return counts, images
