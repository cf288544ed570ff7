"""The statistics of a benchmark: means over seeds, paired differences and their intervals.

A difference between two methods has two 95 % intervals. The interval *over seeds* (Student's t on the differences within each
seed) covers the choice of training images. The interval *over test images* (a bootstrap that draws test images, or groups of
images that belong together, and averages over seeds) covers the choice of test images. A difference counts only if neither
interval contains 0.

Shapes: `n` test images, `G` groups of them, `S` seeds, `C` classes.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterable
from dataclasses import InitVar, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from ...core.console import many, some
from ...core.errors import UserError
from ...core.reading import read_json
from ...core.seals import note_if_changed
from ..run.budgets import equal_budgets
from ..run.data_summary import DATA_FILE, Summary
from ..run.methods import FAMILIES, Method, method_named
from ..run.protocol import Cell
from ..run.results import RESULTS_FILE, differences, joined, key_of
from ..run.summary import FEWEST_SEEDS, in_order, interval, latest

logger = logging.getLogger(__name__)

DRAWS, SEED = 2000, 0
FEWEST_GROUPS = 10  # of test images; a bootstrap over fewer gives intervals that are far too narrow
MOST_CLASSES = 40  # in the figure of gains
TEST, PER_CLASS = "test", "mean per class"
# Results of another version may name methods that this one lacks.
UNKNOWN = Method("", None, None, "other", "A method of another version.", needs_captions=True)
HEADINGS = FAMILIES | {"other": "Methods of another version"}


# -- results -------------------------------------------------------------------------------------------------------------
@dataclass
class Findings:
    """The rows of one benchmark by method, shots and seed, and the files next to them.

    Args:
        lines: rows of the results, perhaps several of one cell.
        identity: model, data, settings and versions that all rows share.
        data: content of `data.json`; empty if there is none.
        notes: warnings for the reader about files and predictions that could not be used.
        folder: name of the folder of results.

    Attributes:
        cells: `{(method, shots): {seed: row}}` of the cells that are done.
        failed: rows of the cells that failed.
        methods, shots: in the order of the page; `positive_shots` without 0.
        shift_splits: names of the splits with images from elsewhere than the training images.
        class_names: `C` names; empty without `data.json`.
    """

    lines: InitVar[Iterable[dict]]
    identity: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    folder: str = ""

    def __post_init__(self, lines: Iterable[dict]):
        self.cells: dict[tuple, dict[int, dict]] = {}
        self.failed: list[dict] = []
        for row in latest(lines):
            if row["status"] == "done":
                self.cells.setdefault((row["method"], row["shots"]), {})[row["seed"]] = row
            else:
                self.failed.append(row)
        keys = [*self.cells, *((row["method"], row["shots"]) for row in self.failed)]
        families = list(HEADINGS)
        names = dict.fromkeys(name for name, _ in keys)
        self.methods: list[str] = sorted(names, key=lambda name: families.index(method_of(name).family))
        self.shots = in_order(n for _, n in keys)
        self.positive_shots = [n for n in self.shots if n != 0]
        self.shift_splits = list(
            dict.fromkeys(name for row in self.all_rows() for name in row.get("shift_accuracy") or {})
        )
        self.class_names = list(self.data.get("class_names") or [])

    def rows(self, method: str, shots) -> dict[int, dict]:
        """Rows by seed."""
        return self.cells.get((method, shots), {})

    def all_rows(self) -> list[dict]:
        """The rows of all cells that are done."""
        return [row for cell in self.cells.values() for row in cell.values()]

    def nearest(self, method: str, shots) -> dict[int, dict]:
        """Rows by seed; those at 0 shots for a method that has no training."""
        return self.rows(method, shots) or self.rows(method, 0)

    def values(self, method: str, shots, split: str = TEST) -> list[float]:
        """Accuracy of each seed, in percent."""
        found = (accuracy(row, split) for row in self.rows(method, shots).values())
        return [100 * value for value in found if value is not None]

    def mean(self, method: str, shots, split: str = TEST) -> float | None:
        """Mean accuracy over seeds, in percent."""
        found = self.values(method, shots, split)
        return statistics.mean(found) if found else None

    def seeds(self) -> set[int]:
        """Seeds of all cells with training, failed ones included."""
        return {row["seed"] for row in (*self.all_rows(), *self.failed) if row["shots"] != 0}

    def methods_at(self, *shots) -> list[str]:
        """Methods with a result at any of these numbers of shots."""
        return [method for method in self.methods if any(self.rows(method, n) for n in shots)]

    def with_accuracy(self, split: str) -> list[str]:
        """Methods with an accuracy on a split; for the test split all methods, failed ones included."""
        return [m for m in self.methods if split == TEST or any(self.values(m, n, split) for n in self.shots)]

    def policies(self, *methods: str) -> list[str]:
        """Selection policies of these methods."""
        cells = [self.rows(method, n) for method in methods for n in self.shots]
        return sorted({row["selection_policy"] for cell in cells for row in cell.values()})

    def seed_counts(self, method: str) -> list[int]:
        """The number of seeds at each number of shots that a method was run with."""
        return [len(cell) for n in self.shots if (cell := self.rows(method, n))]

    def has_predictions(self) -> bool:
        """Whether any row has predictions for test images with known labels."""
        return any(TEST in row["predictions"] for row in self.all_rows())

    def most_seeds(self, shots) -> int:
        """The number of seeds of the method that has most."""
        return max(len(self.rows(method, shots)) for method in self.methods)

    def best(self, shots, methods, reference: str | None = None, split: str = TEST) -> list[str]:
        """The leading method; several if they are level, none without results.

        Methods are ranked by their difference to a reference within each seed. Ranked by means, a method that failed on a hard
        seed would win. Methods with fewer than three seeds come after the others.

        Args:
            reference (*optional*): default: the method with most seeds.
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
        """The number of cells that the full grid of all methods, shots and seeds would have on top of those found."""
        rows = [row for row in [*self.all_rows(), *self.failed] if row["shots"] != 0]
        return math.prod(len({row[key] for row in rows}) for key in ("method", "shots", "seed")) - len(rows)

    def groups(self, split: str = TEST) -> list | None:
        """`(n,)` group ids of the test images; None if every image stands alone."""
        return (self.data.get("groups") or {}).get(split)

    def few_groups(self, split: str = TEST) -> int:
        """The number of groups of a split if they are too few for a bootstrap; otherwise 0."""
        truth = (self.data.get("labels") or {}).get(split) or []
        groups = self.groups(split) or range(len(truth))
        count = len({str(group) for group, label in zip(groups, truth, strict=False) if label >= 0})
        return count if count < FEWEST_GROUPS else 0


def method_of(name: str) -> Method:
    """The method of this name, `UNKNOWN` if there is none."""
    try:
        return method_named(name)
    except KeyError:
        return UNKNOWN


def accuracy(row: dict, split: str = TEST) -> float | None:
    """Accuracy of a row on the test split, on a shift split, or as the mean over the classes of the test split; 0 to 1."""
    if split == TEST:
        return row.get("test_accuracy")
    if split == PER_CLASS:
        return row.get("test_mean_per_class_accuracy")
    return (row.get("shift_accuracy") or {}).get(split)


def gather(rows: list[dict], folder: Path) -> Findings:
    """Puts together the rows of a results file and the files next to it.

    Raises:
        UserError: there are no rows, or their identities differ, so that they must not be averaged.
    """
    if not rows:
        found = "no such folder" if not folder.is_dir() else "none in it"
        raise UserError(
            f"--report {folder}: expected the --output_dir of a benchmark, with results in {RESULTS_FILE}, found {found}. "
            "Type --report with that folder."
        )
    identity = joined(row.get("identity") or {} for row in rows)
    for row in rows:
        if different := differences(identity, row.get("identity") or {}):
            listed = "; ".join(f"{name} ({a}, {b})" for name, a, b in different)
            raise UserError(
                f"{folder}: expected results of one model, dataset, settings and versions, found rows that differ in "
                f"{listed}. They must not be averaged. Type another --output_dir for each."
            )
    data, notes = {}, []
    try:
        data = read_json(folder / DATA_FILE, Summary)
        note_if_changed(data, folder / DATA_FILE)
    except FileNotFoundError:
        logger.warning("Note: there is no %s: the report leaves out what depends on it.", folder / DATA_FILE)
    except UserError as error:
        notes.append(f"{DATA_FILE} could not be read. The report leaves out what depends on it.")
        logger.warning("Note: the report leaves out what depends on %s. %s", DATA_FILE, error)
    there = {str(Cell(*key_of(row))) for row in rows}
    if gone := [cell for cell in data.get("cells", ()) if cell not in there]:
        logger.warning(
            "Note: %s has no result of %s (%s): not run yet, or lost. The command of the benchmark runs what is missing.",
            folder / RESULTS_FILE,
            many(len(gone), "cell"),
            some(gone, 3),
        )
    results = Findings(rows, identity, data, notes, folder.resolve().name)
    drop_foreign_predictions(results)
    return results


def drop_foreign_predictions(results: Findings) -> None:
    """Keeps only predictions that reproduce the accuracy of their row. Others belong to different labels."""
    labels, wrong = results.data.get("labels") or {}, 0
    for row in results.all_rows():
        kept = {}
        for split, predicted in (row.get("predictions") or {}).items():
            truth, stated = labels.get(split), accuracy(row, split)
            if truth is None or stated is None:
                continue
            if len(truth) == len(predicted):
                right, counts = correct(predicted, truth)
                if counts.any() and abs(right[counts].mean() - stated) < 1e-4:
                    kept[split] = np.asarray(predicted)
            wrong += split not in kept
        row["predictions"] = kept
    if wrong:
        results.notes.append(
            f"{wrong} lists of predictions do not fit the labels in data.json and are left out. Is it from another benchmark?"
        )


def correct(predicted, truth) -> tuple[np.ndarray, np.ndarray]:
    """`(n,)` 1.0 for right answers; `(n,)` whether the image counts: it could be read and has a label."""
    predicted, truth = np.asarray(predicted), np.asarray(truth)
    counts = (predicted >= 0) & (truth >= 0)
    return ((predicted == truth) & counts).astype(float), counts


# -- differences ---------------------------------------------------------------------------------------------------------
@dataclass
class Difference:
    """By how many points of accuracy one method is above another.

    Args:
        points: mean over seeds.
        seeds: number of seeds that both methods have.
        over_seeds: 95 % interval over seeds; None for fewer than `FEWEST_SEEDS` seeds, or if all of them give the same.
        over_images: 95 % interval over test images; None without predictions, or with fewer than `FEWEST_GROUPS` groups.
        equal: whether both had the same budget, see `budgets.equal_budgets`.
    """

    points: float
    seeds: int
    over_seeds: tuple[float, float] | None
    over_images: tuple[float, float] | None = None
    equal: bool = True

    @property
    def verdict(self) -> str:
        """`better`, `worse`, `not distinguishable`, `too few seeds`, `same for every seed` or `not at equal budget`."""
        if not self.equal:
            return "not at equal budget"
        known = [pair for pair in (self.over_seeds, self.over_images) if pair]
        if any(low <= 0 <= high for low, high in known):
            return "not distinguishable"
        if self.seeds < FEWEST_SEEDS:
            return "too few seeds"
        if self.over_seeds is None:
            return "same for every seed"
        return "better" if self.points > 0 else "worse"


def paired(results: Findings, method: str, other: str, shots, split: str = TEST) -> list[tuple[dict, dict]]:
    """Rows of both methods with equal seeds that have an accuracy on this split.

    A method without training has one row, at 0 shots, that is paired with every seed of the other.
    """
    a, b = results.nearest(method, shots), results.nearest(other, shots)
    if [row["shots"] for row in b.values()] == [0]:
        (untuned,) = b.values()
        b = dict.fromkeys(a, untuned)
    elif [row["shots"] for row in a.values()] == [0]:
        (untuned,) = a.values()
        a = dict.fromkeys(b, untuned)
    found = [(a[seed], b[seed]) for seed in a if seed in b]
    return [pair for pair in found if None not in (accuracy(pair[0], split), accuracy(pair[1], split))]


def compare(results: Findings, method: str, other: str, shots, split: str = TEST) -> Difference | None:
    """`method` minus `other`, in points; None without a common seed."""
    found = paired(results, method, other, shots, split)
    if not found:
        return None
    points = [100 * (accuracy(a, split) - accuracy(b, split)) for a, b in found]
    mean, half = statistics.mean(points), interval(points)
    images = None
    if all(split in row["predictions"] for pair in found for row in pair) and not results.few_groups(split):
        low, high = bootstrap(*gains(found, results.data["labels"][split], split), results.groups(split))
        images = (100 * float(low), 100 * float(high))
    equal = all(equal_budgets(one, other) for one, other in found)
    return Difference(mean, len(points), None if half is None else (mean - half, mean + half), images, equal)


def gains(found: list[tuple[dict, dict]], truth, split: str = TEST) -> tuple[np.ndarray, np.ndarray]:
    """`(n,)` gain of each image, -1 to 1, mean over the pairs (0 if it does not count); `(n,)` whether it counts."""
    total, counts = 0.0, True
    for pair in found:
        (right_a, counts_a), (right_b, counts_b) = (correct(row["predictions"][split], truth) for row in pair)
        total, counts = total + right_a - right_b, counts & counts_a & counts_b
    return np.where(counts, total / len(found), 0.0), counts


def bootstrap(gain: np.ndarray, counts: np.ndarray, groups=None, draws: int = DRAWS, seed: int = SEED) -> np.ndarray:
    """95 % percentile interval of mean gains; images (or whole groups of them) are drawn with replacement.

    Args:
        gain (`(n,)` or `(n, K)`): gains per image, 0 where it does not count; `K` means are taken over the same draws.
        counts (`(n,)` or `(n, K)`): whether an image counts.
        groups (`(n,)`, *optional*): ids; images with the same id are not independent and are drawn together.

    Returns:
        `(2,)` or `(2, K)`: lower and upper ends. Draws in which no image counts are left out.
    """
    ids = np.arange(len(gain)) if groups is None else np.unique(np.asarray(groups, str), return_inverse=True)[1]
    size = int(ids.max()) + 1
    sums, totals = np.zeros((size, *gain.shape[1:])), np.zeros((size, *counts.shape[1:]))
    np.add.at(sums, ids, gain)
    np.add.at(totals, ids, counts)
    means, step = [], max(1, 4_000_000 // size)  # this many draws at once take 32 MB
    for chunk in np.split(drawn(size, draws, seed), range(step, draws, step)):
        weights = chunk.astype(float)
        with np.errstate(invalid="ignore"):
            means.append((weights @ sums) / (weights @ totals))
    return np.nanquantile(np.concatenate(means), [0.025, 0.975], axis=0)


@lru_cache(maxsize=4)
def drawn(size: int, draws: int, seed: int) -> np.ndarray:
    """`(draws, size)`: how often each draw has each of `size` groups. All comparisons share the draws."""
    rng = np.random.default_rng(seed)
    return np.stack([np.bincount(rng.integers(size, size=size), minlength=size).astype(np.uint8) for _ in range(draws)])


# -- classes -------------------------------------------------------------------------------------------------------------
@dataclass
class ClassGains:
    """Recall of each class by one method minus that by another, in points, mean over seeds; `(C,)`, NaN without test images.

    Args:
        low, high: 95 % interval over test images of the classes that gain or lose most, NaN for others. Infinite if there are
            too few groups of images.
        images: number of test images.
    """

    method: str
    other: str
    shots: int | str
    gain: np.ndarray
    low: np.ndarray
    high: np.ndarray
    images: np.ndarray


def class_gains(results: Findings, method: str, other: str) -> ClassGains | None:
    """Gains by class, at the largest number of shots with predictions of both methods; None without any."""
    for shots in reversed(results.shots):
        cells = results.nearest(method, shots), results.nearest(other, shots)
        if all(cell and all(TEST in row["predictions"] for row in cell.values()) for cell in cells):
            break
    else:
        return None
    found, names = paired(results, method, other, shots), results.class_names
    if not found or not names:
        return None
    truth = np.asarray(results.data["labels"][TEST])
    gain, counts = gains(found, truth)
    own = counts[:, None] & (truth[:, None] == np.arange(len(names)))
    images = own.sum(axis=0)
    with np.errstate(invalid="ignore"):
        mean = (gain[:, None] * own).sum(axis=0) / images
    extremes, ends = shown_classes(mean), np.full((2, len(names)), np.nan)
    own = own[:, extremes]
    if results.few_groups():
        ends[:, extremes] = [[-np.inf], [np.inf]]
    elif len(extremes):
        ends[:, extremes] = bootstrap(gain[:, None] * own, own, results.groups())
    return ClassGains(method, other, shots, 100 * mean, 100 * ends[0], 100 * ends[1], images)


def shown_classes(gain: np.ndarray, most: int = MOST_CLASSES) -> np.ndarray:
    """Class numbers from the largest gain to the largest loss; only the two ends if there are more than `most`."""
    order = np.argsort(-gain, kind="stable")
    order = order[np.isfinite(gain[order])]
    return order if len(order) <= most else np.concatenate([order[: most // 2], order[-(most // 2) :]])
