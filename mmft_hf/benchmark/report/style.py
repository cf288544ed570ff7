"""How the figures of a benchmark's report look. A method has one colour and one marker in all of them; families differ in
marker, so that they can be told apart without colour, too; interpolated weights are hollow and dashed.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from ...core.markdown import one_line
from .methods import KNOWN, base_of, family

WIDTH, DPI = 9.0, 170  # inches
INK, GREY, FAINT = "#22262b", "#70767d", "#dfe2e6"
MAIN, UP, DOWN = "#0067a5", "#0067a5", "#c4500c"
# Okabe and Ito's colours, the light ones darkened to be read on white; blue is mmft's alone.
COLOURS = ("#d55e00", "#007a5e", "#b5609a", "#b07d00", "#3d8fc4", "#5b4a9e", "#7f4a2a", "#5f6b2a")
OWN_COLOURS = {"mmft": MAIN, "zs": GREY, "zs-ens": GREY, "zs-cap": INK}
# Families begin elsewhere, so that those that matter most differ in colour, too.
FIRST_COLOUR = {"ablation": 0, "tuned": 1, "features": 4, "mmft": 6}
MARKERS = {"untuned": "*", "features": "s", "tuned": "^", "mmft": "o", "ablation": "D"}

SETTINGS = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $x$
    "figure.facecolor": "white",
}


@contextmanager
def drawing():
    """matplotlib's own defaults and ours, whatever the user's are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


@dataclass(frozen=True)
class Style:
    """Keywords of a method's marks and lines."""

    colour: str
    marker: str
    hollow: bool = False

    @property
    def dot(self) -> dict:
        """For a mark alone."""
        size = 10 if self.marker == "*" else 7
        return self.edge | {"color": self.colour, "marker": self.marker, "ms": size, "ls": "none", "zorder": 3}

    @property
    def line(self) -> dict:
        """For a line with marks."""
        size = {"^": 6, "*": 8.5}.get(self.marker, 5)
        return self.edge | {"color": self.colour, "marker": self.marker, "ms": size, "ls": "--" if self.hollow else "-"}

    @property
    def edge(self) -> dict:
        return {"mfc": "white", "mec": self.colour} if self.hollow else {"mec": "white", "mew": 0.5}


def styles(methods: list[str]) -> dict[str, Style]:
    """How each method looks."""
    found, seen = {}, {}
    for method in methods:
        base, kind = base_of(method), family(method)
        own = seen.setdefault(kind, list(KNOWN.get(kind, ())))
        if base in OWN_COLOURS:
            colour = OWN_COLOURS[base]
        else:
            if base not in own:
                own.append(base)
            colour = COLOURS[(own.index(base) + FIRST_COLOUR.get(kind, 0)) % len(COLOURS)]
        found[method] = Style(colour, MARKERS[kind], hollow=base != method)
    return found


def save(figure: Figure, path: Path) -> Path:
    """The same figure gives the same bytes."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def legible(name: str, number: int, most: int = 28) -> str:
    """A name in letters that the font has, on one line, or `class 7`."""
    known = get_font(findfont("DejaVu Sans")).get_charmap()
    plain = one_line(name, most)
    return plain if plain and all(ord(c) in known for c in plain) else f"class {number + 1}"


def apart(places: list[float], gap: float, low: float, high: float) -> list[float]:
    """Places moved as little as needed to be `gap` apart, within `low` and `high` if there is room."""
    order = np.argsort(places, kind="stable")
    moved = np.asarray(places, dtype=float)[order]
    for _ in range(400):
        for i in range(len(moved) - 1):
            lacking = gap - (moved[i + 1] - moved[i])
            if lacking > 1e-9:
                moved[i] -= lacking / 2
                moved[i + 1] += lacking / 2
        if len(moved) and (moved[-1] - moved[0]) <= high - low:
            moved += max(0.0, low - moved[0]) - max(0.0, moved[-1] - high)
    found = np.empty_like(moved)
    found[order] = moved
    return found.tolist()


def label_points(axes, points: list[tuple[float, float, str, str]]) -> None:
    """A name beside each point `(x, y, name, colour)`, where it covers neither a point nor another name.

    The first come first; a point that has no such place goes without a name, since its colour and marker tell it.
    """
    figure = axes.figure
    FigureCanvasAgg(figure).draw()  # the layout, without which places are not known
    renderer, place = figure.canvas.get_renderer(), axes.transData.transform
    scale = figure.dpi / 72
    dots = np.array([place((x, y)) for x, y, *_ in points])
    frame, taken = axes.get_window_extent(renderer), []
    for (x, y, name, colour), dot in zip(points, dots, strict=True):
        text = axes.annotate(name, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8.5, color=colour)
        size = text.get_window_extent(renderer)
        for far, (dx, dy) in ((r, d) for r in (7, 13, 20, 28) for d in DIRECTIONS):
            left = dot[0] + far * scale * dx - size.width * {1: 0, 0: 0.5, -1: 1}[np.sign(dx)]
            bottom = dot[1] + far * scale * dy - size.height * (0.65 if dy < 0 else 0.35)
            box = (left - 2, bottom - 1, left + size.width + 2, bottom + size.height * 0.9)
            inside = frame.x0 <= box[0] and box[2] <= frame.x1 + 30 and frame.y0 <= box[1] and box[3] <= frame.y1
            near = (dots > (box[0] - 4, box[1] - 4)) & (dots < (box[2] + 4, box[3] + 4))
            if inside and not near.all(axis=1).any() and not any(overlap(box, other) for other in taken):
                break
        else:
            text.remove()
            continue
        taken.append(box)
        text.set_position(((left - dot[0]) / scale, (bottom - dot[1]) / scale))
        if far > 13:
            start = np.clip(dot[0], left, left + size.width), np.clip(dot[1], bottom, bottom + size.height * 0.8)
            end = axes.transData.inverted().transform(start)
            axes.plot([x, end[0]], [y, end[1]], color=colour, lw=0.6, alpha=0.6, zorder=2)


DIRECTIONS = ((1, 0), (-1, 0), (0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8), (0, 1.2), (0, -1.2))


def overlap(a: tuple, b: tuple) -> bool:
    """Whether two boxes (left, bottom, right, top) overlap."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
