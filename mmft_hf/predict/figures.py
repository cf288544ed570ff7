"""Pictures of a result for its card: the confusion matrix and the curves of the training. Drawn with Pillow alone.

Coordinates are in units of which a picture is 800 wide; it is saved with two pixels per unit.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

WIDTH, FINE = 800, 4  # drawn at FINE pixels per unit, then halved, which makes lines smooth
INK, GREY, FAINT, BLUE, ORANGE = (40, 44, 52), (125, 130, 138), (226, 229, 233), (36, 88, 156), (200, 92, 20)
MOST_CLASSES = 40  # of a matrix whose names can still be read
MOST_PAIRS = 25


def legible(name: str, number: int) -> str:
    """A name in the letters that the font has (accents are dropped), or `class 7` where it is written in others."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    plain = " ".join(plain[:200].split())
    return plain if plain and all(" " <= c <= "~" for c in plain) else f"class {number + 1}"


def fit(text: str, width: float, font) -> str:
    """The text, cut so that it is no wider."""
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text


class _Page:
    """A white page in units."""

    def __init__(self, height: float):
        self.height = height
        self.image = PILImage.new("RGB", (WIDTH * FINE, round(height * FINE)), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x, y, text, size=12.0, colour=INK, anchor="lm", width=math.inf) -> None:
        font = ImageFont.load_default(round(size * FINE))
        text, halo = fit(text, width * FINE, font), colour == BLUE and 3 * FINE
        self.draw.text((x * FINE, y * FINE), text, colour, font, anchor, stroke_width=halo, stroke_fill="white")

    def text_upwards(self, x, bottom, text, size, width) -> None:
        """Read from below, centred at `x`."""
        font = ImageFont.load_default(round(size * FINE))
        text = fit(text, width * FINE, font)
        mask = PILImage.new("L", (math.ceil(font.getlength(text)) + FINE, round(size * 1.5 * FINE)))
        ImageDraw.Draw(mask).text((0, mask.height // 2), text, 255, font, anchor="lm")
        mask = mask.rotate(90, expand=True)
        self.image.paste(INK, (round(x * FINE) - mask.width // 2, round(bottom * FINE) - mask.height), mask)

    def box(self, x, y, width, height, fill) -> None:
        self.draw.rectangle([x * FINE, y * FINE, (x + width) * FINE - 1, (y + height) * FINE - 1], fill)

    def line(self, points: Sequence[tuple[float, float]], colour=INK, width=1.0, dashed=False) -> None:
        scaled = [(x * FINE, y * FINE) for x, y in points]
        if dashed:  # level lines only
            (x, y), (end, _) = scaled
            for start in np.arange(x, end, 9 * FINE):
                self.draw.line([(start, y), (min(start + 5 * FINE, end), y)], colour, round(width * FINE))
        else:
            self.draw.line(scaled, colour, round(width * FINE), joint="curve")

    def dot(self, x, y, radius, colour) -> None:
        self.draw.ellipse([(v + d) * FINE for d in (-radius, radius) for v in (x, y)], colour)

    def done(self) -> PILImage.Image:
        return self.image.reduce(2).quantize(96)


# -- confusion --------------------------------------------------------------------------------------------------------
def confusion_picture(confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> PILImage.Image:
    """True classes by predicted ones; of more than 40 classes, the most frequent confusions.

    Args:
        confusion: `(C, C)` counts, rows are true classes.
        class_names: `C` names.
    """
    counts = np.asarray(confusion)
    names = [legible(name, number) for number, name in enumerate(class_names)]
    return _matrix(counts, names) if len(names) <= MOST_CLASSES else _pairs(counts, names)


def _matrix(counts: np.ndarray, names: list[str]) -> PILImage.Image:
    size, total = len(names), counts.sum(axis=1)
    cell = min(84.0, (WIDTH - 178) / size)
    letters = min(12.5, max(9.0, cell * 0.7))
    font = ImageFont.load_default(round(letters * FINE))
    label = min(140.0, max(font.getlength(name) for name in names) / FINE + 8)
    left, top = (WIDTH - cell * size - label) / 2 + label, 46 + label
    page = _Page(top + cell * size + 34)
    page.text(WIDTH / 2, 16, "Rows: the true class (test images). Columns: what the model said.", 13, anchor="mm")
    for i, name in enumerate(names):
        middle = (i + 0.5) * cell
        page.text(left - 6, top + middle, name, letters, anchor="rm", width=label - 8)
        page.text_upwards(left + middle, top - 5, name, letters, label - 8)
    for row, column in np.ndindex(size, size):
        x, y, count = left + column * cell, top + row * cell, int(counts[row, column])
        share = count / total[row] if total[row] else 0.0
        colour = BLUE if row == column else ORANGE
        page.box(x + 0.5, y + 0.5, cell - 1, cell - 1, _tint(colour, share) if count else (246, 247, 248))
        if count:
            digits = min(12.0, cell * (0.6 if count < 100 else 0.4 if count < 1000 else 0.32))
            page.text(x + cell / 2, y + cell / 2, str(count), digits, "white" if share > 0.45 else INK, "mm")
    below = "Blue: right. Orange: wrong. The darker, the larger the share of its row."
    page.text(WIDTH / 2, page.height - 14, below, 11.5, GREY, "mm")
    return page.done()


def _pairs(counts: np.ndarray, names: list[str]) -> PILImage.Image:
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    share = wrong / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    order = sorted(np.argwhere(wrong), key=lambda rc: (-wrong[tuple(rc)], -share[tuple(rc)], *rc))[:MOST_PAIRS]
    page = _Page(92 + 22 * max(1, len(order)))
    what = f"{wrong.sum():,} of {counts.sum():,} test images were taken for another class"
    page.text(20, 18, f"{what}. The most frequent confusions:" if len(order) else f"{what}.", 13)
    for x, head in ((20, "true class"), (250, "taken for"), (480, "of its images")):
        page.text(x, 48, head, 11.5, GREY)
    for i, (row, column) in enumerate(order):
        y = 72 + 22 * i
        page.text(20, y, names[row], 12.5, width=222)
        page.text(250, y, names[column], 12.5, width=222)
        page.box(480, y - 7, max(2, 210 * share[row, column]), 14, _tint(ORANGE, 0.7))
        page.text(700, y, f"{wrong[row, column]} of {counts[row].sum()}", 12, GREY)
    return page.done()


def _tint(colour: tuple[int, int, int], share: float) -> tuple[int, ...]:
    """White for nothing, the colour for all; small shares are raised, so that they show."""
    return tuple(round(255 + (c - 255) * (0.12 + 0.88 * share)) for c in colour)


# -- curves -----------------------------------------------------------------------------------------------------------
def curves_picture(log_history: Iterable[dict], zero_shot: float, best_epoch: float | None = None) -> PILImage.Image:
    """Training loss and validation accuracy by epoch, the zero-shot accuracy as a line.

    Args:
        log_history: of the Trainer's state.
        zero_shot: validation accuracy of the untuned model with the class template, 0 to 1.
        best_epoch (*optional*): the epoch that was kept, to be marked.
    """
    losses, accuracies = training_curves(log_history)
    page = _Page(290)
    last = max((x for x, _ in losses + accuracies), default=0) or 1.0
    marked = [(x, y) for x, y in accuracies if best_epoch is not None and abs(x - best_epoch) < 1e-6][:1]
    _panel(page, 52, "Training loss", last, losses)
    _panel(page, 462, "Validation accuracy, %", last, accuracies, marked, 100 * zero_shot)
    return page.done()


def training_curves(log_history: Iterable[dict]) -> tuple[list, list]:
    """`(epoch, loss)` and `(epoch, validation accuracy in %)`, in order, each step once."""
    losses, accuracies, after = {}, {}, {}
    finished = False
    for log in log_history:
        epoch = log.get("epoch")
        finished = finished or "train_runtime" in log
        if epoch is None:
            continue
        if "loss" in log:
            losses[epoch] = log["loss"]
        if "eval_accuracy" in log:
            # What is measured after the training is the model that was kept, not that of the last epoch.
            (after if finished else accuracies).setdefault(epoch, 100 * log["eval_accuracy"])
    curves = (losses, accuracies or after)
    return tuple([(x, y) for x, y in sorted(c.items()) if math.isfinite(y)] for c in curves)


def _panel(page: _Page, left: float, title: str, last: float, points: list, marked: list = (), level=None) -> None:
    top, bottom, width = 50, 240, 318
    page.text(left, 20, title, 13.5)
    if not points:
        page.text(left, (top + bottom) / 2, "was not logged", 12, GREY)
        return
    values = [y for _, y in points] + ([level] if level is not None else [])
    ticks = _ticks(min(values), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)
    place_x = lambda x: left + width * x / last  # noqa: E731
    place_y = lambda y: bottom - (bottom - top) * (y - low) / (high - low)  # noqa: E731
    for tick in ticks:
        page.line([(left, place_y(tick)), (left + width, place_y(tick))], FAINT, 0.75)
        page.text(left - 7, place_y(tick), f"{tick:g}", 11, GREY, "rm")
    for tick in (t for t in _ticks(0, last) if t <= last):
        page.text(place_x(tick), bottom + 14, f"{tick:g}", 11, GREY, "mm")
    page.text(left + width, bottom + 34, "epoch", 11, GREY, "rm")
    if level is not None:
        page.line([(left, place_y(level)), (left + width, place_y(level))], ORANGE, 1.25, dashed=True)
        below = place_y(level) + 10 < bottom
        page.text(left + width, place_y(level) + (10 if below else -10), f"zero-shot {level:.1f}", 11, ORANGE, "rm")
    line = [(place_x(x), place_y(y)) for x, y in points]
    if len(line) > 1:
        page.line(line, BLUE, 1.75)
    if len(line) <= 60:
        for x, y in line:
            page.dot(x, y, 2.2, BLUE)
    for x, y in marked:
        page.dot(place_x(x), place_y(y), 5, BLUE)
        anchor = "lm" if place_x(x) < left + 60 else "rm" if place_x(x) > left + width - 60 else "mm"
        page.text(place_x(x), place_y(y) - 14, f"kept: {y:.1f}", 11.5, BLUE, anchor)


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers around an interval."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]
