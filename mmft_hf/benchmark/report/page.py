"""Tables of a benchmark's report as HTML. Every text from data is escaped here."""

from __future__ import annotations

import base64
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from html import escape
from pathlib import Path

import numpy as np

from ...core.markdown import one_line
from ..run.summary import fewer_seeds, interval, seeds_text, shots_name
from .methods import FAMILIES, about, family
from .statistics import TEST, ClassGains, Difference, Findings, compare, confusions
from .verdict import MARKS, intervals, signed

POLICIES = {
    "last": "the last step, no validation",
    "val-k": "chosen on few validation images, at most four of each class",
    "val-full": "chosen on the whole validation split",
    "none": "nothing to choose",
}
MOST_PAIRS, MOST_LISTED = 10, 12
PAGE_SCALE = 0.64  # pixels of the page by pixels of a figure: sharp on fine screens and on paper


def safe(text: object, limit: int = 120) -> str:
    """Text of others on one line, without markup of its own."""
    return escape(one_line(text, limit))


def without_folder(name: object) -> str:
    """Of an absolute path the last part, since paths are nobody's business; another name as it is."""
    return Path(str(name)).name if Path(str(name)).is_absolute() else str(name)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells that are HTML already; a cell that begins with `<t` brings its own tags, and so does a row that is one."""
    top = "".join(cell if cell.startswith("<t") else f"<th>{cell}</th>" for cell in head)
    lines = []
    for row in rows:
        if isinstance(row, str):
            lines.append(row)
            continue
        first, *rest = row
        cells = "".join(cell if cell.startswith("<t") else f"<td>{cell}</td>" for cell in rest)
        lines.append(f"<tr>{first if first.startswith('<t') else f'<th>{first}</th>'}{cells}</tr>")
    return f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def section(name: str, heading: str, *parts: str) -> str:
    """A part of the page; nothing without content."""
    content = "\n".join(part for part in parts if part)
    return f'<section id="{name}">\n<h2>{heading}</h2>\n{content}\n</section>' if content else ""


def prose(text: str, kind: str = "soft") -> str:
    """A paragraph of HTML."""
    return f'<p class="{kind}">{text}</p>' if text else ""


def picture(path: Path | None, alt: str) -> str:
    """A figure whose bytes are on the page."""
    if path is None:
        return ""
    data = path.read_bytes()
    width = round(int.from_bytes(data[16:20], "big") * PAGE_SCALE)  # of a PNG's header
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<figure><img alt="{escape(alt)}" width="{width}" src="{source}"></figure>'


def folded(summary: str, content: str) -> str:
    """What is there for those who look for it."""
    return f"<details><summary>{summary}</summary>\n{content}\n</details>" if content else ""


# -- results -------------------------------------------------------------------------------------------------------------
def by_family(methods: Iterable[str], columns: int, line) -> list:
    """Rows `line(method)`, under the names of their families."""
    rows, last = [], None
    for method in methods:
        found = line(method)
        if found is None:
            continue
        if family(method) != last:
            last = family(method)
            rows.append(f'<tr class=family><th colspan="{columns}">{FAMILIES[last]}</th></tr>')
        rows.append(found)
    return rows


def results_table(results: Findings, split: str = TEST, shots: list | None = None) -> str:
    """Methods by shots: mean, half the interval over seeds, the best of a column on the same seeds in bold."""
    shots = shots or results.shots
    best = {n: results.best(n, [m for m in results.methods if results.rows(m, n)], split=split) for n in shots}
    lost = Counter((row["method"], row["shots"]) for row in results.failed)
    place = {name: i for i, name in enumerate(POLICIES)}

    def line(method: str):
        counts = [len(results.rows(method, n)) for n in shots if results.rows(method, n)]
        rows = [row for n in shots for row in results.rows(method, n).values()]
        if not rows and split != TEST:
            return None
        policies = sorted(
            {row["selection_policy"] for row in rows}, key=lambda name: (place.get(name, len(place)), name)
        )
        cells = [safe(method), f"<td class=policy>{safe(', '.join(policies)) or '–'}</td>", seeds_text(counts)]
        for n in shots:
            values, failed = results.values(method, n, split), lost[method, n]
            text = f'<small class="worse below">{failed} failed</small>' if failed and split == TEST else ""
            figure = mean_text(values, results.most_seeds(n), bold=method in best[n])
            cells.append(f"<td>{figure}{text}</td>")
        return cells

    head = ["method", "<th class=words>selection</th>", "seeds", *(shots_name(n) for n in shots)]
    return table(head, by_family(results.methods, len(head), line))


def mean_text(values: list[float], most: int, bold: bool = False) -> str:
    """Mean, half its interval over seeds, and how many seeds where others have more; nothing without values."""
    if not values:
        return ""
    mean, half = f"{statistics.mean(values):.1f}", interval(values)
    text = (f"<b>{mean}</b>" if bold else mean) + ("" if half is None else f" <small>± {half:.1f}</small>")
    few = fewer_seeds(len(values), most).strip()
    return text + (f"<small class=below>{few}</small>" if few else "")


def policies_note(results: Findings) -> str:
    """What the selection policies on the page mean."""
    used = {row["selection_policy"] for cell in results.cells.values() for row in cell.values()}
    known = [f"{name}: {POLICIES[name]}" for name in POLICIES if name in used]
    return f"Selection: {'; '.join(known)}." if known else ""


def failures(results: Findings) -> str:
    """Which cells failed, and why."""
    groups: dict[tuple, list] = {}
    for row in results.failed:
        groups.setdefault((row["method"], row["shots"], str(row.get("error"))), []).append(row["seed"])
    rows = [
        [safe(method), shots_name(n), ", ".join(map(str, sorted(seeds))), f"<td class=words>{safe(error, 300)}</td>"]
        for (method, n, error), seeds in groups.items()
    ]
    if not rows:
        return ""
    count = len(results.failed)
    text = (
        f"{count} cells failed. The same command tries them again."
        if count > 1
        else "One cell failed. The same command tries it again."
    )
    listing = table(["method", "shots", "seeds", "<th class=words>what happened</th>"], rows[:MOST_LISTED])
    more = prose(f"… and {len(rows) - MOST_LISTED} more.") if len(rows) > MOST_LISTED else ""
    return prose(text, "note") + listing + more


def choices(results: Findings) -> str:
    """What validation chose, and how many fits that took."""
    rows = []
    for (method, shots), cell in results.cells.items():
        found = Counter(
            ", ".join(
                f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in (row.get("chosen") or {}).items()
            )
            for row in cell.values()
        )
        found.pop("", None)
        if found:
            tried = max(row.get("tried") or 1 for row in cell.values())
            texts = "; ".join(f"{safe(what, 200)} ({count})" for what, count in found.most_common())
            rows.append([safe(method), shots_name(shots), f"<td class=words>{texts}</td>", safe(tried)])
    head = ["method", "shots", "<th class=words>chosen (in how many seeds)</th>", "tried"]
    return folded("What validation chose", table(head, rows)) if rows else ""


def difference_cell(difference: Difference | None, other: str = "") -> str:
    """A cell with its mark and intervals."""
    if difference is None:
        return "<td></td>"
    below = "".join(f"<small class=below>{text}</small>" for text in intervals(difference))
    name = f"<small class=below>against {safe(other)}</small>" if other else ""
    verdict, mark = difference.verdict, MARKS[difference.verdict]
    kind = verdict if verdict in ("better", "worse") else "unclear"
    return f'<td class="{kind}"><b>{mark} {signed(difference.points)}</b>{name}{below}</td>'


def too_few_groups(count: int) -> str:
    """Why there is no interval over images."""
    return f"the images are of {count} group{'s' if count > 1 else ''}, too few for an interval over them"


def verdict_table(comparisons: list, best: str) -> str:
    """Comparisons by shots."""
    shots = list(dict.fromkeys(n for *_, found in comparisons for n in found))
    rows = []
    for name, meaning, found in comparisons:
        cells = [f"<th>mmft − {safe(name)}<small>{meaning}</small></th>"]
        cells += [
            difference_cell(found[n][1], found[n][0] if name == best else "") if n in found else "<td></td>"
            for n in shots
        ]
        rows.append(cells)
    return table(["points of test accuracy", *map(shots_name, shots)], rows) if rows else ""


def differences_table(found: dict, results: Findings, shots: list, methods: list[str]) -> str:
    """Each method minus the reference, by shots."""

    def line(method: str):
        return [safe(method), *(difference_cell(found.get((method, n))) for n in shots)]

    return table(["method", *map(shots_name, shots)], by_family(methods, len(shots) + 1, line))


def ablations_table(found: dict, shots: list, methods: list[str]) -> str:
    """Ablations minus mmft, with what each tests."""
    rows = []
    for method in methods:
        cells = [f"<th>{safe(method)}<small>{about(method)}</small></th>"]
        rows.append(cells + [difference_cell(found.get((method, n))) for n in shots])
    return table(["minus mmft", *map(shots_name, shots)], rows) if rows else ""


# -- robustness, cost ----------------------------------------------------------------------------------------------------
def robustness_table(results: Findings, shots) -> str:
    """In domain and on each shift split, and how much of the gain over the untuned model is left there."""
    splits = results.shift_splits
    zero = {split: results.mean("zs", 0, split) for split in (TEST, *splits)}

    def line(method: str):
        n = shots if results.rows(method, shots) else 0
        if results.mean(method, n) is None:
            return None
        cells = [safe(method)]
        for split in (TEST, *splits):
            mean = results.mean(method, n, split)
            gain = "" if zero[split] is None or mean is None or method == "zs" else signed(mean - zero[split])
            text = mean_text(results.values(method, n, split), results.most_seeds(n))
            cells += [text or "–", gain]
        return cells

    head = ["method"]
    for split in (TEST, *splits):
        head += [safe("in domain" if split == TEST else split, 40), "over zs"]
    return table(head, by_family(results.methods, len(head), line))


def shifts_table(results: Findings, method: str, other: str) -> str:
    """One method minus another on each shift split, by shots."""
    found = {
        (split, n): difference
        for split in results.shift_splits
        for n in results.shots
        if results.rows(method, n) and (difference := compare(results, method, other, n, split))
    }
    shots = [n for n in results.shots if any(n == k for _, k in found)]
    rows = [
        [safe(split, 40), *(difference_cell(found.get((split, n))) for n in shots)]
        for split in results.shift_splits
        if any(split == key for key, _ in found)
    ]
    return table([f"{safe(method)} − {safe(other)} on", *map(shots_name, shots)], rows) if rows else ""


def cost_table(results: Findings, shots: list) -> str:
    """Seconds of fitting and steps, mean over seeds."""

    def line(method: str):
        cells, some = [safe(method)], False
        for n in shots:
            rows = list(results.rows(method, n).values())
            seconds = [row["fit_seconds"] for row in rows if row.get("fit_seconds") is not None]
            steps = [row["steps"] for row in rows if row.get("steps")]
            some = some or bool(seconds)
            text = seconds_text(statistics.mean(seconds)) if seconds else ""
            if steps:
                text += f"<small class=below>{statistics.mean(steps):,.0f} steps</small>"
            cells.append(f"<td>{text}</td>")
        return cells if some else None

    rows = by_family(results.methods, len(shots) + 1, line)
    return table(["method", *map(shots_name, shots)], rows) if rows else ""


def seconds_text(seconds: float) -> str:
    """`0.4 s`, `35 s`, `12 min`, `3.1 h`."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def captions_note(captions: dict | None) -> str:
    """What the captions cost, as one line."""
    if not captions:
        return ""
    count, images = captions.get("captions"), captions.get("images")
    parts = [f"{count:,} captions of {images:,} training images" if count and images else "captions"]
    if captions.get("captioner"):
        parts.append(f"by {safe(captions['captioner'])}")
    figures = []
    for key, form in (("calls", "{:,} calls"), ("tokens_in", "{:,} tokens in"), ("tokens_out", "{:,} tokens out")):
        if captions.get(key) is not None:
            figures.append(form.format(captions[key]))
    if captions.get("seconds") is not None:
        figures.append(seconds_text(captions["seconds"]))
    if captions.get("cost_usd") is not None:
        figures.append(f"${captions['cost_usd']:,.2f}")
    known = f": {', '.join(figures)}" if figures else "; what they cost is not known"
    return f"Before all that, once: {' '.join(parts)}{known}. Methods without captions do not need it."


# -- classes -------------------------------------------------------------------------------------------------------------
def confusion_tables(results: Findings, method: str, other: str | None, shots) -> str:
    """The most frequent confusions of a method, and of its control, each beside the other's."""
    names, found = results.class_names, {}
    for name in filter(None, (method, other)):
        found[name] = confusions(results, name, shots)
    parts = []
    for name in found:
        counts, images = found[name]
        beside = next((n for n in found if n != name), None)
        order = sorted(np.argwhere(counts > 0).tolist(), key=lambda rc: (-counts[tuple(rc)], rc))[:MOST_PAIRS]
        rows = []
        for row, column in order:
            cells = [
                f"<td class=words>{safe(names[row], 40)}</td>",
                f"<td class=words>{safe(names[column], 40)}</td>",
                f"{counts[row, column]:.1f} <small>of {images[row]}</small>",
            ]
            rows.append(cells + ([f"{found[beside][0][row, column]:.1f}"] if beside else []))
        head = ["<th class=words>true class</th>", "<th class=words>taken for</th>", safe(name)]
        parts.append(f"<div><h3>{safe(name)}</h3>{table(head + ([safe(beside)] if beside else []), rows)}</div>")
    return f"<div class=pair>{''.join(parts)}</div>" if parts else ""


def class_samples(gains: ClassGains, classes: Iterable[int], results: Findings) -> str:
    """Classes with their gain, example images and captions."""
    examples, cards = results.data.get("examples") or {}, []
    for c in classes:
        shown = "".join(sample(entry) for entry in (examples.get(str(c)) or [])[:2])
        kind = "better" if gains.gain[c] > 0 else "worse"
        title = f"{safe(results.class_names[c], 40)} <span class={kind}>{signed(gains.gain[c])}</span>"
        cards.append(f"<div class=class><h4>{title}</h4>{shown}</div>")
    return f"<div class=classes>{''.join(cards)}</div>" if cards else ""


def sample(entry: dict) -> str:
    """An image with its captions; nothing but base64 is taken for an image."""
    image = str(entry.get("image") or "")
    known = re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", image)
    drawn = f'<img alt="" src="data:image/jpeg;base64,{image}">' if known else ""
    texts = "".join(f"<li>{safe(text, 160)}</li>" for text in (entry.get("captions") or [])[:3])
    return f"<div class=sample>{drawn}<ul>{texts or '<li class=soft>no caption</li>'}</ul></div>"
