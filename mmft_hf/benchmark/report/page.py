"""The report of a benchmark: one page to read or print, with its figures, from the files that a benchmark leaves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from statistics import mean

import numpy as np

from ...core.console import seconds
from ...core.errors import UserError
from ...core.files import atomic_write
from ...core.pages import render_page
from ...predict.metrics import class_sizes, uneven_note
from ...version import __version__
from ..run.budgets import AUTHORS, EQUAL, LONG, LONG_STEPS
from ..run.data_summary import class_notes
from ..run.results import RESULTS_FILE, read_results
from ..run.summary import fewer_seeds, image_note, in_order, interval, seeds_text, shots_name
from .provenance import command, split_facts, without_folder
from .refining import refining
from .statistics import (
    HEADINGS,
    PER_CLASS,
    TEST,
    Findings,
    class_gains,
    compare,
    gather,
    method_of,
)
from .verdict import BEST, CONTROL, MARKS, METHOD, intervals, shots_list, signed, verdict

PAGE, FIGURES = "report.html", "report"
DRAWN = ("shots", "differences", "robustness", "classes")
TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
POLICIES = {
    "last": "the last step, without validation",
    "val-k": "chosen on few validation images, at most four per class",
    "val-full": "chosen on the whole validation split",
}


BUDGET_WORDS = {
    EQUAL: "Equal budget: the same settings for every training.",
    AUTHORS: "The authors' budgets: each method is trained with the steps, batches, rate and crops of its authors, without a search.",
    LONG: f"Long budget: {LONG_STEPS} steps for each image of a class, and two learning rates.",
}


def write_report(folder: str | Path) -> Path:
    """Writes `report.html`, one page without scripts or outside resources, and its figures as `report/*.png`.

    Args:
        folder: the `--output_dir` of a benchmark, or the page or results in it. `results.jsonl` is required; without
            `data.json` the report lacks the parts that need it. The same files give the same bytes.

    Returns:
        The page.

    Raises:
        UserError: there is no such folder or no result in it, identities differ, or scikit-learn is missing.
    """
    check_packages()
    folder = Path(folder)
    if folder.name in (PAGE, RESULTS_FILE):
        folder = folder.parent
    results = gather(read_results(folder / RESULTS_FILE), folder)
    (folder / FIGURES).mkdir(exist_ok=True)
    html = render_page(TEMPLATE, FILTERS, **_values(results, folder / FIGURES))
    path = folder / PAGE
    with atomic_write(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return path


def check_packages() -> None:
    """Raises `UserError` where scikit-learn, and with it scipy, is missing."""
    if find_spec("sklearn") is None:
        raise UserError("benchmark: expected scikit-learn, found none. Type: pip install 'mmft_hf[benchmark]'")


def _values(results: Findings, folder: Path) -> dict:
    """Everything that the template shows."""
    from . import figures  # scikit-learn is optional

    controls = (CONTROL, "flyp", "zs")
    control = next((m for m in controls if {m, METHOD} <= {*results.methods}), None)
    gains = next((found for m in controls if (found := class_gains(results, METHOD, m)) is not None), None)
    most = next((n for n in reversed(results.shots) if results.rows(METHOD, n)), results.shots[-1])
    # With mmft: how far it is ahead of each method. Without: how far each method is ahead of the first, usually zs.
    ahead = METHOD in results.methods
    reference = METHOD if ahead else results.methods[0]
    versus = "mmft minus each method" if ahead else f"each method minus {reference}"
    differences = {
        (m, n): found
        for m in results.methods
        for n in results.positive_shots or results.shots
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
        "classes": (figures.classes_figure, gains, results.class_names),
    }
    splits = (TEST, PER_CLASS, *results.shift_splits)
    answer, arms = verdict(results), refining(results)
    shown = [*differences.values(), *over_control.values()] + [d for c in answer[2].values() for _, d in c.values()]
    shown += [d for arm in arms for c in arm.comparisons.values() for d in c.values()]
    unequal = (
        " ≠ not at equal budget (images seen, or learning rates tried): no verdict."
        if any(not d.equal for d in shown)
        else ""
    )
    return {
        "results": results,
        "figures": {name: figures.draw(f, folder / f"{name}.png", *rest) for name, (f, *rest) in drawings.items()},
        "left_out": figures.shots_panels(results)[1],
        "verdict": answer,
        "refining": arms,
        "unequal_mark": unequal,
        "budget": (results.identity.get("settings") or {}).get("budget", EQUAL),
        "differences": differences,
        "versus": versus,
        "control": control,
        "over_control": over_control,
        "most_shots": most,
        "gains": gains,
        "best": {
            (split, n): results.best(n, results.methods_at(n), split=split) for split in splits for n in results.shots
        },
        "notes": [
            image_note(results.all_rows(), len(set(results.groups() or ()))),
            *class_notes(results.data, results.shots),
        ],
        "failures": _failures(results),
        "uneven": uneven(results.data) if results.with_accuracy(PER_CLASS) else "",
        "splits": split_facts(results),
        "command": command(results),
        "dates": _dates(results),
        "version": __version__,
    } | CONSTANTS


def _failures(results: Findings) -> dict[tuple, list[int]]:
    """Seeds of the failed cells by method, shots and error."""
    groups: dict[tuple, list[int]] = {}
    for row in results.failed:
        groups.setdefault((row["method"], row["shots"], str(row.get("error"))), []).append(row["seed"])
    return groups


def uneven(data: Mapping) -> str:
    """Why the mean over the classes comes first; empty where it does not.

    Args:
        data: content of `data.json`.
    """
    labels = np.asarray((data.get("labels") or {}).get(TEST) or [], dtype=int)
    known = labels[labels >= 0]
    return uneven_note(*class_sizes(np.bincount(known))) if len(known) else ""


def _dates(results: Findings) -> str:
    days = sorted(row["time"][:10] for row in (*results.all_rows(), *results.failed) if row.get("time"))
    return " to ".join(dict.fromkeys((days[0], days[-1]))) if days else ""


def by_family(methods: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Methods with the heading of their family; those of a family stand together in `Findings.methods`."""
    return [(HEADINGS[key], list(group)) for key, group in groupby(methods, lambda name: method_of(name).family)]


CONSTANTS = {"METHOD": METHOD, "TEST": TEST, "PER_CLASS": PER_CLASS, "MARKS": MARKS, "BEST": BEST, "POLICIES": POLICIES}
CONSTANTS |= {"BUDGET_WORDS": BUDGET_WORDS}
FILTERS = {
    f.__name__: f
    for f in (by_family, fewer_seeds, in_order, interval, intervals, mean, method_of, seconds, seeds_text,
              shots_list, shots_name, signed, without_folder)
}  # fmt: skip
