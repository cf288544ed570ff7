"""The report of a benchmark: one page to read or print, with its figures, from the files that a benchmark leaves."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from ...core.errors import UserError
from ...core.markdown import listed, one_line
from ...core.pages import render_page
from ...version import __version__
from ..run.results import RESULTS_FILE, read_results
from ..run.summary import fewer_seeds, image_note, in_order, interval, seeds_text, shots_name
from .provenance import class_notes, command, settings, splits, without_folder
from .statistics import (
    HEADINGS,
    PER_CLASS,
    TEST,
    ClassGains,
    Findings,
    class_gains,
    compare,
    gather,
    method_of,
    shown_classes,
)
from .verdict import CONTROL, MARKS, METHOD, intervals, shots_list, signed, verdict

PAGE, FIGURES = "report.html", "report"
DRAWN = ("shots", "differences", "robustness", "cost", "classes", "map")
TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
POLICIES = {
    "last": "the last step, without validation",
    "val-k": "chosen on few validation images, at most four per class",
    "val-full": "chosen on the whole validation split",
    "none": "nothing to choose",
}
MOST_SAMPLES = 3
BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")


def write_report(folder: str | Path) -> Path:
    """Writes `report.html`, one page without scripts or outside resources, and its figures as `report/*.png`.

    Args:
        folder: the `--output_dir` of a benchmark, or the page or results in it. `results.jsonl` is required; without
            `data.json` and `maps.json` the report lacks the parts that need them. The same files give the same bytes.

    Returns:
        The page.

    Raises:
        UserError: there is no such folder or no result in it, identities differ, or matplotlib or scikit-learn is missing.
    """
    if missing := [name for name in ("matplotlib", "sklearn") if find_spec(name) is None]:
        raise UserError(f"report: expected {listed(missing)}, found none. Type: pip install 'mmft_hf[benchmark]'")
    folder = Path(folder)
    if folder.name in (PAGE, RESULTS_FILE):
        folder = folder.parent
    results = gather(read_results(folder / RESULTS_FILE), folder)
    (folder / FIGURES).mkdir(exist_ok=True)
    html = render_page(TEMPLATE, FILTERS, **_values(results, folder / FIGURES))
    path = folder / PAGE
    path.write_text(html, encoding="utf-8")
    return path


def _values(results: Findings, folder: Path) -> dict:
    """Everything that the template shows."""
    from . import figures  # matplotlib is optional

    headline, sentences, comparisons = verdict(results)
    control = next((m for m in (CONTROL, "flyp", "zs") if {m, METHOD} <= {*results.methods}), None)
    gained = (class_gains(results, METHOD, m) for m in (CONTROL, "flyp", "zs"))
    gains = next((found for found in gained if found is not None), None)
    shots = [n for n in results.shots if n != 0]
    most = next((n for n in reversed(results.shots) if results.rows(METHOD, n)), results.shots[-1])
    # With mmft: how far it is ahead of each method. Without: how far each method is ahead of the first, usually zs.
    ahead = METHOD in results.methods
    reference = METHOD if ahead else results.methods[0]
    versus = "mmft minus each method" if ahead else f"each method minus {reference}"
    differences = {
        (m, n): found
        for m in results.methods
        for n in shots or results.shots
        if m != reference and (found := compare(results, *((reference, m) if ahead else (m, reference)), n))
    }
    over_control = {
        (split, n): found
        for split in results.shift_splits
        for n in results.shots
        if control and results.rows(METHOD, n) and (found := compare(results, METHOD, control, n, split))
    }
    drawings = {
        "shots": (figures.shots_figure, results),
        "differences": (figures.differences_figure, differences, f"{versus}, points of test accuracy"),
        "robustness": (figures.robustness_figure, results, most),
        "cost": (figures.cost_figure, results, most),
        "classes": (figures.classes_figure, gains, results.class_names),
        "map": (figures.map_figure, results, gains),
    }
    rows = results.all_rows()
    return {
        **_title(results),
        "results": results,
        "figures": {name: figures.draw(f, folder / f"{name}.png", *rest) for name, (f, *rest) in drawings.items()},
        "left_out": figures.shots_panels(results)[1],
        "headline": headline,
        "sentences": sentences,
        "comparisons": comparisons,
        "has_predictions": any(TEST in row["predictions"] for row in rows),
        "differences": differences,
        "versus": versus,
        "control": control,
        "over_control": over_control,
        "most_shots": most,
        "gains": gains,
        "samples": _samples(gains, results) if gains else {},
        "tables": {split: _accuracies(results, split) for split in (TEST, PER_CLASS, *results.shift_splits)},
        "costs": _costs(results, shots),
        "captions": _captions(results.data.get("captions")),
        "policies": {name: text for name, text in POLICIES.items() if name in {r["selection_policy"] for r in rows}},
        "notes": [image_note(rows, len(set(results.groups() or ()))), *class_notes(results)],
        "failures": _failures(results),
        "choices": _choices(results),
        "splits": splits(results),
        "duplicates": results.data.get("duplicates"),
        "duplicates_count": results.data.get("duplicates_count", len(results.data.get("duplicates") or ())),
        "settings": list(settings(results.identity)),
        "command": command(results),
        "by_family": _by_family,
        "about": lambda name: method_of(name).about,
        "MARKS": MARKS,
        "METHOD": METHOD,
        "TEST": TEST,
        "PER_CLASS": PER_CLASS,
    }


def _by_family(methods) -> list[tuple[str, list[str]]]:
    """Consecutive methods of one family, under its heading."""
    return [(HEADINGS[key], list(group)) for key, group in groupby(methods, lambda name: method_of(name).family)]


def _title(results: Findings) -> dict[str, str]:
    identity, data, rows = results.identity, results.data, results.all_rows()
    dataset = without_folder(str(data.get("dataset") or identity.get("dataset") or "unknown data"))
    model = without_folder(str(data.get("model") or identity.get("base_model") or "unknown model"))
    tests = max((row.get("test_images") or 0 for row in rows), default=0)
    seeds = {row["seed"] for row in rows if row["shots"] != 0}
    days = sorted(row["time"][:10] for row in (*rows, *results.failed) if row.get("time"))
    facts = [
        f"{len(results.class_names):,} classes" if results.class_names else "",
        f"{tests:,} test images" if tests else "",
        f"{len(results.methods)} method{'s' if len(results.methods) > 1 else ''}",
        shots_list([n for n in results.shots if n != 0]),
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}" if seeds else "",
    ]
    return {
        "dataset": dataset,
        "model": model,
        "facts": " · ".join(fact for fact in facts if fact),
        "days": " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "",
        "version": __version__,
    }


def _accuracies(results: Findings, split: str) -> dict[str, dict]:
    """Selection policies, seeds and accuracies by method; methods without a result on a split other than `test` are left out."""
    best = {n: results.best(n, [m for m in results.methods if results.rows(m, n)], split=split) for n in results.shots}
    failed = Counter((row["method"], row["shots"]) for row in results.failed if split == TEST)

    def cell(method, n):
        values = results.values(method, n, split)
        return {
            "mean": statistics.mean(values) if values else None,
            "half": interval(values),
            "best": method in best[n],
            "seeds": fewer_seeds(len(values), results.most_seeds(n)).strip() if values else "",
            "failed": failed[method, n],
        }

    table = {}
    for method in results.methods:
        cells = [results.rows(method, n) for n in results.shots]
        table[method] = {
            "policies": sorted({row["selection_policy"] for rows in cells for row in rows.values()}),
            "seeds": seeds_text(len(rows) for rows in cells if rows),
            "cells": [cell(method, n) for n in results.shots],
        }
    known = {method for method, row in table.items() if any(cell["mean"] is not None for cell in row["cells"])}
    return {method: row for method, row in table.items() if method in known or split == TEST}


def _costs(results: Findings, shots: list) -> dict[str, list[tuple]]:
    """Mean seconds and optimiser steps by method, for each number of shots; None where unknown."""

    def mean(method, n, key):
        found = [row[key] for row in results.rows(method, n).values() if row.get(key)]
        return statistics.mean(found) if found else None

    table = {m: [(mean(m, n, "fit_seconds"), mean(m, n, "steps")) for n in shots] for m in results.methods}
    return {method: cells for method, cells in table.items() if any(seconds for seconds, _ in cells)}


def _failures(results: Findings) -> dict[tuple, list[int]]:
    """Seeds of the failed cells by method, shots and error."""
    groups: dict[tuple, list[int]] = {}
    for row in results.failed:
        groups.setdefault((row["method"], row["shots"], str(row.get("error"))), []).append(row["seed"])
    return groups


def _choices(results: Findings) -> list[tuple]:
    """Method, shots, what validation chose (in how many seeds), and from how many candidates."""
    table = []
    for (method, shots), cell in results.cells.items():
        chosen = Counter(
            ", ".join(
                f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in (row.get("chosen") or {}).items()
            )
            for row in cell.values()
        )
        del chosen[""]
        if chosen:
            text = "; ".join(f"{what} ({count})" for what, count in chosen.most_common())
            table.append((method, shots, text, max(row.get("tried") or 1 for row in cell.values())))
    return table


def _samples(gains: ClassGains, results: Findings) -> dict[str, list[dict]]:
    """The classes that gain and lose most, each with an image and its captions. Only base64 is taken for an image."""
    order, examples = shown_classes(gains.gain).tolist(), results.data.get("examples") or {}
    found = {
        "Largest gains": [c for c in order if gains.gain[c] > 0][:MOST_SAMPLES],
        "Largest losses": [c for c in order[::-1] if gains.gain[c] < 0][:MOST_SAMPLES],
    }

    def card(c: int) -> dict:
        shown = [
            {
                "image": image if BASE64.fullmatch(image := str(e.get("image"))) else "",
                "captions": e.get("captions") or [],
            }
            for e in (examples.get(str(c)) or [])[:2]
        ]
        return {"name": results.class_names[c], "gain": gains.gain[c], "examples": shown}

    return {heading: [card(c) for c in classes] for heading, classes in found.items() if classes}


def _captions(captions: dict | None) -> str:
    """What the captions cost, in a sentence."""
    if not captions:
        return ""
    count, images = captions.get("captions"), captions.get("images")
    what = f"{count:,} captions of {images:,} training images" if count and images else "The captions"
    by = f" by {one_line(captions['captioner'])}" if captions.get("captioner") else ""
    forms = {
        "calls": "{:,} calls",
        "tokens_in": "{:,} tokens in",
        "tokens_out": "{:,} tokens out",
        "seconds": "{}",
        "cost_usd": "${:,.2f}",
    }
    known = {key: captions[key] for key in forms if captions.get(key) is not None}
    if "seconds" in known:
        known["seconds"] = seconds(known["seconds"])
    costs = ", ".join(forms[key].format(value) for key, value in known.items()) or "unknown"
    return f"{what}{by} were made once, before all training. Their cost: {costs}. Methods without captions do not need them."


def seconds(count: float) -> str:
    """`0.4 s`, `35 s`, `12 min`, `3.1 h`."""
    if count < 100:
        return f"{count:.2g} s" if count < 10 else f"{count:.0f} s"
    return f"{count / 60:.0f} min" if count < 6000 else f"{count / 3600:.1f} h"


FILTERS = {"in_order": in_order, "intervals": intervals, "seconds": seconds, "shots_name": shots_name, "signed": signed}
