"""The figures of a benchmark's report, drawn with matplotlib. Each function returns a figure, or None if there is nothing to draw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator

from ...core.files import atomic_write
from ...core.markdown import one_line
from ..run.summary import in_order, interval, shots_name
from .statistics import HEADINGS, TEST, ClassGains, Difference, Findings, method_of, shown_classes
from .verdict import CONTROL, METHOD, signed

STYLE = Path(__file__).parent / "templates" / "figures.mplstyle"
WIDTH = 9.0  # inches
PAGE_DPI = 109  # pixels of the page per inch of a figure
INK, GREY, BLUE, ORANGE = "#22262b", "#70767d", "#0067a5", "#c4500c"
# The colours of Okabe and Ito, light ones darkened for white paper. Blue is reserved for mmft.
COLOURS = ("#d55e00", "#007a5e", "#b5609a", "#b07d00", "#3d8fc4", "#5b4a9e", "#7f4a2a", "#5f6b2a")
MOST_LINES = 8  # in a panel


def draw(function: Callable[..., Figure | None], path: Path, *values) -> dict | None:
    """Saves a figure as PNG, independently of the user's matplotlib settings. The same figure gives the same bytes.

    Returns:
        `png`: its bytes, and `width`: its width on the page in pixels; None without a figure.
    """
    path.unlink(missing_ok=True)  # an older figure that cannot be drawn any more
    with style.context(STYLE, after_reset=True):
        figure = function(*values)
        if figure is None:
            return None
        with atomic_write(path) as temporary:
            figure.savefig(temporary, metadata={"Software": None})
    return {"png": path.read_bytes(), "width": round(figure.get_figwidth() * PAGE_DPI)}


# -- accuracy against shots ----------------------------------------------------------------------------------------------
def shots_panels(results: Findings) -> tuple[dict[str, list[str]], list[str]]:
    """Methods by panel, and methods left out because their panel is full. `mmft` is in every panel."""
    shots = results.positive_shots
    panels: dict[str, list[str]] = {}
    for method in results.methods_at(*shots):
        panels.setdefault(method_of(method).family, []).append(method)
    if "untuned" in panels and len(panels) > 1:  # zs-cap, next to the other methods with captions if there are any
        panels["mmft" if "mmft" in panels else list(panels)[1]] += panels.pop("untuned")
    panels = {
        family: panels[family] for family in ("mmft", "tuned", "features", "ablation", *panels) if family in panels
    }
    left_out = []
    for family, methods in panels.items():
        methods.sort(key=lambda m: max(results.mean(m, n) or 0 for n in shots), reverse=True)
        methods.sort(key=lambda m: (m not in (METHOD, CONTROL), method_of(m).alpha < 1))
        if family != "mmft" and METHOD in results.methods:
            methods.insert(0, METHOD)
        left_out += methods[MOST_LINES:]
        del methods[MOST_LINES:]
    return panels, left_out


def shots_figure(results: Findings) -> Figure | None:
    """Test accuracy against shots: a panel for each family of methods; the untuned model as level lines."""
    shots, (panels, _) = results.positive_shots, shots_panels(results)
    if not panels:
        return None
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(WIDTH if columns == 2 else WIDTH * 0.66, 3.7 * lines))
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    untuned = {m: results.mean(m, 0) for m in ("zs", "zs-ens") if results.rows(m, 0)}
    every = [mean for ms in panels.values() for m in ms for n in shots if (mean := results.mean(m, n)) is not None]
    low, high = min(every + list(untuned.values())), max(every + list(untuned.values()))
    room = max((high - low) * 0.08, 1.0)  # wide bands are clipped so that they do not press the lines together
    for axes, (family, methods) in zip(grid.flat, panels.items(), strict=False):
        colours = iter(COLOURS)
        for method in methods:
            found = [(i, values) for i, n in enumerate(shots) if (values := results.values(method, n))]
            if not found:
                continue
            x, y = np.array([(i, np.mean(values)) for i, values in found]).T
            half = np.array([interval(values) or 0.0 for _, values in found])
            main, hollow = method == METHOD, method_of(method).alpha < 1
            colour = BLUE if main else next(colours)
            axes.fill_between(x, y - half, y + half, color=colour, alpha=0.18 if main else 0.08, lw=0)
            marks = {"ls": "--", "mfc": "white"} if hollow else {}
            axes.plot(x, y, marker="o", color=colour, lw=2.4 if main else 1.4, zorder=3 + main, label=method, **marks)
        for (method, level), dashes in zip(untuned.items(), ("--", ":"), strict=False):
            axes.axhline(level, color=GREY, ls=dashes, lw=1.2, zorder=1, label=method)
        axes.set(title=HEADINGS[family], ylim=(low - room, high + room))
        axes.set(xticks=range(len(shots)), xticklabels=map(shots_name, shots))
        axes.grid(axis="x", visible=False)
        by_height = sorted(axes.lines, key=lambda line: line.get_ydata()[-1], reverse=True)
        axes.legend(handles=by_height, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy, %")
    return figure


# -- a row for each method -----------------------------------------------------------------------------------------------
def named_rows(names: list[str], titles: list[str], **more) -> tuple[Figure, list]:
    """A figure with a row for each name, and its panels side by side."""
    figure = Figure(figsize=(WIDTH if len(titles) > 1 else WIDTH * 0.75, 0.24 * len(names) + 1.1))
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False, **more)[0]
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=title, yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        axes.grid(axis="y", visible=False)
        for i in range(0, len(names), 2):
            axes.axhspan(i - 0.5, i + 0.5, color="#f5f6f7", lw=0, zorder=0)
    for label in panels[0].get_yticklabels():
        label.set_weight("bold" if label.get_text() == METHOD else "normal")
    return figure, list(panels)


def compared(methods: list[str]) -> list[str]:
    """The methods without ablations, but with the control; without sanity checks, which would press the others together."""
    known = {name: method_of(name) for name in methods}
    return [m for m, row in known.items() if (row.family != "ablation" or m == CONTROL) and not row.sanity_check]


def differences_figure(found: dict[tuple, Difference], label: str) -> Figure | None:
    """Differences by (method, shots): a panel for each number of shots; thick over seeds, thin over test images."""
    if not found:
        return None
    methods, shots = list(dict.fromkeys(m for m, _ in found)), in_order(n for _, n in found)
    figure, panels = named_rows(methods, [shots_name(n) for n in shots], sharex=True)
    far = max(5.0, 2.5 * float(np.quantile([abs(d.points) for d in found.values()], 0.7)))
    ends = [x for d in found.values() for x in (d.points, *(d.over_seeds or ()), *(d.over_images or ()))]
    low, high = min(max(-far, min(ends) - 1), -1.0), max(min(far, max(ends) + 1), 1.0)
    for (method, n), difference in found.items():
        axes, i, points = panels[shots.index(n)], methods.index(method), difference.points
        colour = {"better": BLUE, "worse": ORANGE}.get(difference.verdict, "#8d9399")
        if not low < points < high:  # far off; it must not press the others together
            text, side = (f"◂ {signed(points)}", "left") if points <= low else (f"{signed(points)} ▸", "right")
            axes.text(low if side == "left" else high, i, text, color=colour, fontsize=8, va="center", ha=side)
            continue
        if difference.over_images:
            axes.plot(difference.over_images, [i, i], "|-", color=colour, lw=1.1, ms=6)
        if difference.over_seeds:
            axes.plot(difference.over_seeds, [i, i], color=colour, lw=4, alpha=0.45, solid_capstyle="butt")
        axes.plot(points, i, "o", color=colour, ms=4.5)
    for axes in panels:
        axes.axvline(0, color=INK, lw=1.2, zorder=1)
        axes.set_xlim(low, high)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    figure.supxlabel(label, fontsize=9.5)
    return figure


def robustness_figure(results: Findings, shots) -> Figure | None:
    """Accuracy on the test split (hollow) and on each shift split (filled), a panel for each split."""
    splits, found = results.shift_splits, {}
    for method in compared(results.methods):
        n = shots if results.rows(method, shots) else 0
        found[method] = [results.mean(method, n, split) for split in (TEST, *splits)]
    found = {method: means for method, means in found.items() if None not in means}
    if not found or not splits:
        return None
    figure, panels = named_rows(list(found), [one_line(split, 40) for split in splits], sharex=True)
    for i, (method, (inside, *shifted)) in enumerate(found.items()):
        colour = BLUE if method == METHOD else INK
        for axes, outside in zip(panels, shifted, strict=True):
            axes.plot([inside, outside], [i, i], color=colour, lw=1.2, alpha=0.5)
            axes.plot(inside, i, "o", color=colour, mfc="white")
            axes.plot(outside, i, "o", color=colour)
            if method == "zs":
                axes.axvline(outside, color=GREY, lw=1, ls="--", zorder=1)
    figure.supxlabel("accuracy, %", fontsize=9.5)
    return figure


# -- classes -------------------------------------------------------------------------------------------------------------
def legible(name: str, number: int) -> str:
    """The name on one line if the font has all its letters; otherwise `class 7`."""
    letters, plain = get_font(findfont("DejaVu Sans")).get_charmap(), one_line(name, 28)
    return plain if plain and all(ord(c) in letters for c in plain) else f"class {number + 1}"


def classes_figure(gains: ClassGains | None, names: list[str]) -> Figure | None:
    """Gain of recall by class as bars, pale if the interval over test images contains 0."""
    if gains is None:
        return None
    shown = shown_classes(gains.gain)
    gain, low, high = gains.gain[shown], gains.low[shown], gains.high[shown]
    figure, (axes,) = named_rows([f"{legible(names[c], c)}  ({gains.images[c]})" for c in shown], [""])
    rows, known = np.arange(len(shown)), np.isfinite(low) & np.isfinite(high)
    pale = np.where((low <= 0) & (high >= 0), 0.3, 0.9)
    colours = [to_rgba(BLUE if points >= 0 else ORANGE, alpha) for points, alpha in zip(gain, pale, strict=True)]
    axes.barh(rows, gain, height=0.68, color=colours, lw=0)
    axes.hlines(rows[known], low[known], high[known], color=INK, lw=0.9)
    if len(shown) < np.isfinite(gains.gain).sum():  # the classes between the two ends are left out
        axes.axhline(len(shown) / 2 - 0.5, color=GREY, lw=1, ls=":")
    axes.axvline(0, color=INK, lw=0.9)
    axes.set_xlabel(f"points of recall, {gains.method} minus {gains.other}")
    return figure
