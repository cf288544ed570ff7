"""The figures of a model card: confusion matrix and training curves, drawn with matplotlib.

matplotlib is imported when a figure is drawn, since `legible` is used without one.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .calibration import reliability, risk_coverage

WIDTH, DPI = 8.0, 150  # inches; pixels per inch
INK, GREY, FAINT, BLUE, ORANGE = "#282c34", "#7d828a", "#e2e5e9", "#24589c", "#c85c14"
STYLE = {"font.size": 8.5, "text.color": INK, "figure.dpi": DPI, "axes.titlesize": 10, "axes.titlelocation": "left"}
STYLE |= {"axes.edgecolor": FAINT, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
STYLE |= {"xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": GREY, "ytick.labelcolor": GREY}
MOST_CLASSES = 40  # in a matrix with legible names
MOST_PAIRS = 25


def legible(name: str, number: int) -> str:
    """A name without accents, or `class 7` if it is written in letters that the pictures' fonts lack."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    plain = " ".join(plain[:200].split())
    return plain if plain and all(" " <= c <= "~" for c in plain) else f"class {number + 1}"


@contextmanager
def _figure(path: Path, height: float):
    """Yields a figure and saves it as PNG. The user's matplotlib settings have no effect."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure
        figure.savefig(path, dpi=DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})


# -- confusion --------------------------------------------------------------------------------------------------------
def draw_confusion(path: Path, confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> None:
    """Draws true against predicted classes; with more than 40 classes, the most frequent confusions.

    Args:
        path: the PNG file.
        confusion: `(C, C)` counts; rows are true classes.
        class_names: `C` names.
    """
    names = [legible(name, number) for number, name in enumerate(class_names)]
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in names]
    draw = _matrix if len(names) <= MOST_CLASSES else _pairs
    draw(path, np.asarray(confusion), names)


def _matrix(path: Path, counts: np.ndarray, names: list[str]) -> None:
    from matplotlib.colors import to_rgb

    size = len(names)
    cell = min(0.8, 6.4 / size)  # inches
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    colour = np.where(np.eye(size, dtype=bool)[..., None], to_rgb(BLUE), to_rgb(ORANGE))
    strength = np.where(counts > 0, 0.12 + 0.88 * share, 0)[..., None]  # small shares are raised, so that they show
    with _figure(path, cell * size + 1.9) as figure:
        axes = figure.subplots()
        axes.imshow(1 + strength * (colour - 1))
        axes.set_title("Rows: true class of the test images. Columns: predicted class.", loc="center")
        axes.set_xticks(range(size), names, rotation=90, color=INK, fontsize=min(9, 60 * cell))
        axes.set_yticks(range(size), names, color=INK, fontsize=min(9, 60 * cell))
        axes.tick_params(labeltop=True, labelbottom=False)
        axes.set_xticks(np.arange(size + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(size + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=FAINT, linewidth=0.5)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        for row, column in np.argwhere(counts):
            ink = "white" if share[row, column] > 0.45 else INK
            digits = cell * (40 if counts[row, column] < 100 else 26)
            axes.text(column, row, counts[row, column], color=ink, ha="center", va="center", fontsize=min(9, digits))
        axes.set_xlabel("Blue: right. Orange: wrong. The darker, the larger the share of the row.", color=GREY)


def _pairs(path: Path, counts: np.ndarray, names: list[str]) -> None:
    wrong = counts - np.diag(np.diag(counts))
    share = 100 * wrong / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    pairs = sorted(map(tuple, np.argwhere(wrong)), key=lambda pair: (-wrong[pair], -share[pair], pair))[:MOST_PAIRS]
    what = f"{wrong.sum():,} of {counts.sum():,} test images were taken for another class"
    with _figure(path, 1 + 0.24 * max(4, len(pairs))) as figure:
        figure.suptitle(f"{what}. The most frequent confusions:" if pairs else f"{what}.", fontsize=10)
        axes = figure.subplots()
        bars = axes.barh(range(len(pairs)), [share[pair] for pair in pairs], color=ORANGE)
        axes.bar_label(bars, [f"{wrong[pair]} of {counts[pair[0]].sum()}" for pair in pairs], padding=4, color=GREY)
        axes.set_yticks(range(len(pairs)), [f"{names[row]}, taken for {names[column]}" for row, column in pairs])
        axes.tick_params("y", labelcolor=INK, length=0)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel("share of the images of the true class, %", color=GREY)


# -- certainty --------------------------------------------------------------------------------------------------------
def draw_certainty(path: Path, confidence: np.ndarray, right: np.ndarray, reject_below: float | None = None) -> None:
    """Draws how often answers are right by their probability, and the error rate if only the most certain ones count.

    Args:
        path: the PNG file.
        confidence (`(n,)`): probability of the best class.
        right (`(n,)`): whether it is the right one, bool.
        reject_below: the threshold of the classifier, to be marked.
    """
    with _figure(path, 2.9) as figure:
        left, right_axes = figure.subplots(1, 2)
        left.set_title("Right answers, %, by their probability")
        means, shares, _ = zip(*reliability(confidence, right), strict=True)
        left.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1)
        left.plot(100 * np.array(means), 100 * np.array(shares), "o-", color=BLUE, markersize=4)
        left.set_xlabel("probability of the answer, % (each point: a fifteenth of the images)", color=GREY)
        left.set(xlim=(0, 100), ylim=(0, 100))
        risk = 100 * risk_coverage(confidence, right)
        coverage = 100 * np.arange(1, len(risk) + 1) / len(risk)
        right_axes.set_title("Errors, %, among the most certain answers")
        right_axes.plot(coverage, risk, color=BLUE)
        if reject_below is not None:
            kept = 100 * float((confidence >= reject_below).mean())
            right_axes.axvline(kept, color=ORANGE, linestyle="--", linewidth=1.2)
            right_axes.annotate(f"answered: {kept:.0f} %", (kept, 0.95), (4, 0), right_axes.get_xaxis_transform(),
                                "offset points", color=ORANGE)  # fmt: skip
        right_axes.set_xlabel("images that get an answer, %", color=GREY)
        right_axes.set(xlim=(0, 100), ylim=(0, None))
        for axes in (left, right_axes):
            axes.grid(axis="y", color=FAINT)


# -- curves -----------------------------------------------------------------------------------------------------------
def draw_curves(
    path: Path,
    log_history: Iterable[dict],
    zero_shot: float,
    best_epoch: float | None = None,
    metric: str = "accuracy",
) -> None:
    """Draws training loss and validation accuracy by epoch, with the zero-shot accuracy as a line.

    Args:
        path: the PNG file.
        log_history: of the Trainer's state.
        zero_shot: validation accuracy of the untuned model with the class template, 0 to 1.
        best_epoch (*optional*): the epoch that was kept, to be marked.
        metric: what is drawn as accuracy.
    """
    losses, accuracies = training_curves(log_history, metric)
    measured = f"Validation {metric.replace('_', ' ')}, %"
    with _figure(path, 2.9) as figure:
        left, right = figure.subplots(1, 2, sharex=True)
        for axes, title, points in ((left, "Training loss", losses), (right, measured, accuracies)):
            axes.set_title(title)
            if not points:
                axes.set_axis_off()
                axes.text(0, 0.5, "was not logged", color=GREY, transform=axes.transAxes)
                continue
            axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", markersize=3 if len(points) <= 60 else 0)
            axes.set_xlabel("epoch", color=GREY)
            axes.grid(axis="y", color=FAINT)
            axes.locator_params(axis="x", integer=points[-1][0] >= 1)
        if not accuracies:
            return
        level = 100 * zero_shot
        right.axhline(level, color=ORANGE, linestyle="--", linewidth=1.2)
        offset = {"textcoords": "offset points", "annotation_clip": False}
        edge = right.get_yaxis_transform()
        right.annotate(f"zero-shot {level:.1f}", (1, level), (0, -10), edge, color=ORANGE, ha="right", **offset)
        for x, y in accuracies:
            if best_epoch is not None and abs(x - best_epoch) < 1e-6:
                right.plot(x, y, "o", color=BLUE, markersize=8)
                right.annotate(f"kept: {y:.1f}", (x, y), (0, 8), color=BLUE, ha="center", **offset)
        right.margins(y=0.15)


def training_curves(log_history: Iterable[dict], metric: str = "accuracy") -> tuple[list, list]:
    """`(epoch, loss)` and `(epoch, validation accuracy in %)`, or another metric of validation, in order, each step once."""
    losses, accuracies, after = {}, {}, {}
    finished = False
    for log in log_history:
        epoch = log.get("epoch")
        finished = finished or "train_runtime" in log
        if epoch is None:
            continue
        if "loss" in log:
            losses[epoch] = log["loss"]
        if f"eval_{metric}" in log:
            # Figures measured after the training belong to the model that was kept, not to the last epoch.
            (after if finished else accuracies).setdefault(epoch, 100 * log[f"eval_{metric}"])
    curves = (losses, accuracies or after)
    return tuple([(x, y) for x, y in sorted(c.items()) if math.isfinite(y)] for c in curves)
