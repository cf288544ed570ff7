"""Figures of a benchmark's report, drawn with matplotlib's Agg, without any global state but its settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from ...core.markdown import one_line
from ..run.summary import interval, shots_name
from .methods import FAMILIES, base_of, family
from .statistics import FEWEST_SEEDS, ClassGains, Difference, Findings, shown_classes
from .style import COLOURS, DOWN, GREY, INK, MAIN, UP, WIDTH, apart, label_points, legible, save, styles
from .verdict import signed

MOST_LINES = 8
KEPT = ("mmft", "mmft-no-captions")  # whatever else is left out


# -- accuracy against shots ----------------------------------------------------------------------------------------------
def shots_figure(results: Findings, path: Path) -> tuple[Path, list[str]] | None:
    """A panel for each family, mmft in all of them; untuned models as level lines. Also the methods that were left out."""
    shots = [n for n in results.shots if n != 0]
    groups, span = {}, max(1, len(shots) - 1)
    for method in results.methods:
        if any(results.rows(method, n) for n in shots):
            groups.setdefault(family(method), []).append(method)
    if not groups or not shots:
        return None
    look, left_out = styles(results.methods), []
    # What reads captions untrained is one method or two: they go beside MMFT.
    if len(groups) > 1 and "untuned" in groups:
        home = "mmft" if "mmft" in groups else next(k for k in groups if k != "untuned")
        groups[home] = groups.pop("untuned") + groups[home]
    groups = {k: groups[k] for k in ("mmft", "tuned", "features", "ablation", "untuned") if k in groups}
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(WIDTH if columns == 2 else WIDTH * 0.66, 3.7 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    low, high, every = np.inf, -np.inf, {}
    for axes, (kind, methods) in zip(grid.flat, groups.items(), strict=False):
        chosen = ["mmft"] if kind != "mmft" and "mmft" in results.methods else []
        own = sorted(
            methods, key=lambda m: (m not in KEPT, look[m].hollow, -max(results.mean(m, n) or 0 for n in shots))
        )
        left_out += own[MOST_LINES - len(chosen) :]
        chosen += own[: MOST_LINES - len(chosen)]
        ends = []
        for method in chosen:
            found = [(i, results.values(method, n)) for i, n in enumerate(shots) if results.values(method, n)]
            if not found:
                continue
            x = [i for i, _ in found]
            y = np.array([np.mean(v) for _, v in found])
            half = np.array([(interval(v) or 0.0) if len(v) >= FEWEST_SEEDS else 0.0 for _, v in found])
            main, colour = method == "mmft", look[method].colour
            axes.fill_between(x, y - half, y + half, color=colour, alpha=0.18 if main else 0.08, lw=0)
            axes.plot(x, y, lw=2.4 if main else 1.4, zorder=3 + main, **look[method].line)
            ends.append((x[-1], y[-1], method, colour))
            low, high = min(low, y.min()), max(high, y.max())
        for method in [m for m in ("zs", "zs-ens") if results.rows(m, 0)]:
            level = results.mean(method, 0)
            axes.axhline(level, color=GREY, ls=(0, (4, 3)) if method == "zs" else (0, (1, 2)), lw=1.2, zorder=1)
            low, high = min(low, level), max(high, level)
            ends.append((len(shots) - 1, level, method, GREY))
        axes.set_title(FAMILIES[kind] if kind != "untuned" else "Methods")
        axes.set_xticks(range(len(shots)), [shots_name(n) for n in shots])
        axes.set_xlim(-0.07 * span, len(shots) - 1 + 0.05 * span)
        axes.grid(axis="x", visible=False)
        every[axes] = ends
    for axes in list(grid.flat)[len(groups) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy, %")
    room = max((high - low) * 0.08, 1.0)  # a wide band is cut, rather than that it presses the lines together
    for axes, ends in every.items():
        axes.set_ylim(low - room, high + room)
        places = apart([y for _, y, *_ in ends], (high - low + 2 * room) * 0.055, low - room / 2, high + room / 2)
        for (x, y, method, colour), place in zip(ends, places, strict=True):
            weight = "bold" if method == "mmft" else "normal"
            end = len(shots) - 1 + 0.1 * span
            axes.plot([x + 0.02 * span, end - 0.01 * span], [y, place], color=colour, lw=0.6, alpha=0.7, clip_on=False)
            axes.text(end, place, method, color=colour, va="center", fontsize=9, weight=weight)
    return save(figure, path), left_out


# -- differences ---------------------------------------------------------------------------------------------------------
def differences_figure(found: dict, reference: str, shots: list, methods: list[str], path: Path) -> Path:
    """Each method minus the reference: a panel for each number of shots, thick over seeds, thin over test images.

    Args:
        found: `Difference` by (method, shots).
    """
    height = 0.245 * len(methods) + 1.1
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(1, len(shots), sharey=True, sharex=True, squeeze=False)[0]
    far = max(5.0, 2.5 * float(np.quantile([abs(d.points) for d in found.values()], 0.7)))
    ends = [x for d in found.values() for x in (d.points, *(d.over_seeds or ()), *(d.over_images or ()))]
    low, high = max(-far, min(ends) - 1), min(far, max(ends) + 1)
    low, high = min(low, -1.0), max(high, 1.0)
    for axes, n in zip(grid, shots, strict=True):
        for i, method in enumerate(methods):
            difference: Difference | None = found.get((method, n))
            if difference is None:
                continue
            colour = {"better": UP, "worse": DOWN}.get(difference.verdict, "#8d9399")
            if not low < difference.points < high:  # one that is far off must not press the others together
                left = difference.points <= low
                text = f"◂ {signed(difference.points)}" if left else f"{signed(difference.points)} ▸"
                axes.text(
                    low if left else high,
                    i,
                    text,
                    color=colour,
                    fontsize=8,
                    va="center",
                    ha="left" if left else "right",
                )
                continue
            if difference.over_images:
                axes.plot(difference.over_images, [i, i], color=colour, lw=1.1, solid_capstyle="butt")
                axes.plot(difference.over_images, [i, i], "|", color=colour, ms=6)
            if difference.over_seeds:
                axes.plot(difference.over_seeds, [i, i], color=colour, lw=4, alpha=0.45, solid_capstyle="butt")
            axes.plot(difference.points, i, "o", color=colour, ms=4.5)
        axes.axvline(0, color=MAIN, lw=1.2, zorder=1)
        axes.set_title(shots_name(n))
        axes.grid(axis="y", visible=False)
        for i in range(0, len(methods), 2):
            axes.axhspan(i - 0.5, i + 0.5, color="#f5f6f7", lw=0, zorder=0)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set_xlim(low, high)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    grid[0].set_yticks(range(len(methods)), methods)
    figure.supxlabel(f"points of test accuracy above (right) or below (left) {reference}", fontsize=9.5)
    return save(figure, path)


def compared(methods: list[str]) -> list[str]:
    """The methods that are no ablation, and the control; what is to be named first comes first.

    Permuted labels fall to chance, far below all others, and would press these together.
    """
    found = [m for m in methods if family(m) != "ablation" or m in KEPT]
    found = [m for m in found if not base_of(m).endswith("permuted-labels")]
    first = (*KEPT, "zs", "flyp", "ce", "mmft+wise")
    return sorted(found, key=lambda m: first.index(m) if m in first else len(first))


# -- robustness and cost -------------------------------------------------------------------------------------------------
def robustness_figure(results: Findings, shots, path: Path) -> Path:
    """Accuracy on each shift split against accuracy in domain, all methods; mmft and its control from few shots to many."""
    splits, look = results.shift_splits, styles(results.methods)
    columns = min(2, len(splits))
    lines = -(-len(splits) // columns)
    figure = Figure(figsize=(WIDTH if columns == 2 else WIDTH * 0.66, 4.4 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    named = {}
    for axes, split in zip(grid.flat, splits, strict=False):
        points = []
        for method in compared(results.methods):
            n = shots if results.rows(method, shots) else 0
            x, y = results.mean(method, n), results.mean(method, n, split)
            if x is None or y is None:
                continue
            if method in ("mmft", "mmft-no-captions"):
                way = [(results.mean(method, k), results.mean(method, k, split)) for k in results.shots]
                x_way, y_way = zip(*[w for w in way if None not in w], strict=True)
                axes.plot(x_way, y_way, color=look[method].colour, lw=1, marker=".", alpha=0.5)
            axes.plot(x, y, **look[method].dot)
            points.append((x, y, method, look[method].colour))
        if not points:
            continue
        ends = np.array([axes.get_xlim(), axes.get_ylim()])
        pad = 0.06 * np.ptp(ends, axis=1)
        axes.set_xlim(ends[0, 0] - pad[0], ends[0, 1] + 2.2 * pad[0])
        axes.set_ylim(ends[1, 0] - pad[1], ends[1, 1] + pad[1])
        axes.axline((50, 50), slope=1, color=GREY, lw=0.9, ls=(0, (1, 2)), zorder=1)
        zero = next(((x, y) for x, y, name, _ in points if name == "zs"), None)
        if zero:
            axes.axline(zero, slope=1, color=GREY, lw=0.9, zorder=1)
        axes.set_title(one_line(split, 40))
        axes.set_xlabel("accuracy in domain, %")
        axes.set_ylabel("accuracy on the shift, %")
        named[axes] = points
    for axes in list(grid.flat)[len(splits) :]:
        axes.set_visible(False)
    for axes, points in named.items():
        label_points(axes, points)
    return save(figure, path)


def cost_figure(results: Findings, shots: list, path: Path) -> Path | None:
    """Accuracy against seconds of fitting, a panel for each of one or two numbers of shots."""
    look = styles(results.methods)
    panels = []
    for n in shots:
        found = []
        for method in compared(results.methods):
            rows = results.nearest(method, n).values()
            seconds = [row["fit_seconds"] for row in rows if row.get("fit_seconds")]
            if seconds:
                found.append(
                    (float(np.mean(seconds)), float(np.mean([100 * r["test_accuracy"] for r in rows])), method)
                )
        if found:
            panels.append((n, found))
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH if len(panels) > 1 else WIDTH * 0.66, 4.0), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (n, found) in zip(grid, panels, strict=True):
        for x, y, method in reversed(found):  # what is named first lies on top
            axes.plot(x, y, **look[method].dot)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, place: f"{x:g}")
        seconds = [x for x, *_ in found]
        axes.set_xlim(min(seconds) / 2, max(seconds) * 6)
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.03 * (high - low), high + 0.05 * (high - low))
        axes.set_title(shots_name(n))
        axes.set_xlabel("seconds of fitting, choices included")
    grid[0].set_ylabel("test accuracy, %")
    for axes, (_, found) in zip(grid, panels, strict=True):
        label_points(axes, [(x, y, method, look[method].colour) for x, y, method in found])
    return save(figure, path)


# -- classes -------------------------------------------------------------------------------------------------------------
def classes_figure(gains: ClassGains, names: list[str], path: Path) -> Path:
    """Bars from the largest gain to the largest loss, pale where the interval contains 0."""
    shown = shown_classes(gains.gain)
    figure = Figure(figsize=(WIDTH, 0.225 * len(shown) + 0.9), layout="constrained")
    axes = figure.subplots()
    for i, c in enumerate(shown.tolist()):
        gain, low, high = gains.gain[c], gains.low[c], gains.high[c]
        colour = UP if gain >= 0 else DOWN
        axes.barh(i, gain, height=0.68, color=colour, alpha=0.3 if low <= 0 <= high else 0.9, lw=0)
        axes.plot([low, high], [i, i], color=INK, lw=0.9)
    if len(shown) < np.isfinite(gains.gain).sum():  # those between are left out
        axes.axhline(len(shown) / 2 - 0.5, color=GREY, lw=1, ls=(0, (1, 3)))
    axes.axvline(0, color=INK, lw=0.9)
    axes.set_yticks(range(len(shown)), [f"{legible(names[c], c)}  ({gains.images[c]})" for c in shown.tolist()])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"points of recall, {gains.method} minus {gains.other}")
    return save(figure, path)


def maps_figure(maps: list[dict], titles: list[str], chosen: list[int], names: list[str], path: Path) -> Path:
    """Panels of embeddings in the plane: chosen classes in colour, others grey, prototypes as stars."""
    figure = Figure(figsize=(WIDTH, WIDTH / 2 + 0.75), layout="constrained")
    grid = figure.subplots(1, len(maps), squeeze=False)[0]
    kinds = [((MAIN, *COLOURS[:5])[i % 6], "o^"[i // 6 % 2]) for i in range(len(chosen))]
    for axes, entry, title in zip(grid, maps, titles, strict=True):
        points, stars = np.asarray(entry["points"], float), np.asarray(entry.get("prototypes") or [], float)
        labels = np.asarray(entry["labels"])
        axes.scatter(*points[~np.isin(labels, chosen)].T, s=9, color="#c9cdd2", lw=0)
        handles = []
        for c, (colour, marker) in zip(chosen, kinds, strict=True):
            handles.append(axes.scatter(*points[labels == c].T, s=22, color=colour, marker=marker, lw=0, alpha=0.85))
        for i, (c, (colour, _)) in enumerate(zip(chosen, kinds, strict=True), 1):
            if c < len(stars):
                axes.scatter(*stars[c], s=150, color=colour, marker="*", edgecolor=INK, linewidth=0.8, zorder=4)
                text = axes.annotate(
                    str(i), stars[c], xytext=(5, 4), textcoords="offset points", weight="bold", zorder=5
                )
                text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        axes.set_title(title)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal", "datalim")
        axes.spines[:].set_visible(False)
    legend = figure.legend(
        handles, ["x"] * len(handles), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    for i, (text, c) in enumerate(zip(legend.get_texts(), chosen, strict=True), 1):
        text.set_text(f"{i}  {legible(names[c], c) if c < len(names) else f'class {c + 1}'}")
    return save(figure, path)
