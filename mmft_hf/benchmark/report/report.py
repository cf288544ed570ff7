"""The report of a benchmark: one page to read, with its figures, from the files that a grid leaves."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from importlib.util import find_spec
from pathlib import Path
from string import Template

import numpy as np

from ...core.errors import UserError
from ...core.markdown import listed
from ...version import __version__
from ..run.results import RESULTS_FILE, read_results
from ..run.summary import image_note, in_order, shots_name
from . import page as page
from .data import data_parts, fewer_than_thought
from .methods import family
from .page import folded, picture, prose, safe, section, without_folder
from .statistics import (
    PER_CLASS,
    TEST,
    ClassGains,
    Findings,
    class_gains,
    compare,
    gather,
    shown_classes,
    with_predictions,
)
from .verdict import BEST, CONTROL, METHOD, few_images, shots_list, verdict

PAGE, FIGURES = "report.html", "report"
DRAWN = ("shots", "differences", "robustness", "cost", "classes", "map")
TEMPLATE = Path(__file__).parent / "templates" / "benchmark.html"
MOST_COLOURED, MOST_SAMPLES = 12, 3


def write_report(folder: str | Path) -> Path:
    """Writes `report.html`, one page without scripts or outside resources, and its figures as `report/*.png`.

    Args:
        folder: the `--output_dir` of a benchmark, or its page or results in it. Read are `results.jsonl`, and `data.json` and
            `maps.json` where there are any: without them, the parts that need them are left out. The same files give the same
            bytes.

    Returns:
        The page.

    Raises:
        UserError: there is no such folder or no result in it, they are of differing identities, or matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise UserError("report: expected matplotlib, found none. Type: pip install 'mmft_hf[benchmark]'")
    from .style import drawing

    folder = Path(folder)
    if folder.name in (PAGE, RESULTS_FILE):
        folder = folder.parent
    results = gather(read_results(folder / RESULTS_FILE), folder)
    figures = folder / FIGURES
    figures.mkdir(exist_ok=True)
    for name in DRAWN:  # what cannot be drawn now must not stay
        (figures / f"{name}.png").unlink(missing_ok=True)
    found = verdict(results)
    with drawing():
        legend = "" if found[-1] else _how_to_read(results)  # which otherwise stands in the verdict
        parts = [part for part in _sections(results, figures, legend) if part]
    names = re.findall(r'<section id="(\w+)">\n<h2>(.*?)</h2>', "\n".join(parts))
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading in names)
    title, subtitle = _title(results)
    html = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=title,
        subtitle=subtitle,
        body="\n".join([_verdict(results, found), f"<nav>{links}</nav>", *parts]),
        footer=f"mmft_hf {escape(__version__)} · {_when(results)}",
    )
    path = folder / PAGE
    path.write_text(html, encoding="utf-8")
    return path


def _title(results: Findings) -> tuple[str, str]:
    identity, data = results.identity, results.data
    dataset = without_folder(str(data.get("dataset") or identity.get("dataset") or "unknown data"))
    model = without_folder(str(data.get("model") or identity.get("base_model") or "unknown model"))
    tests = {row["test_images"] for row in results.all_rows() if row.get("test_images")}
    seeds = {row["seed"] for row in results.all_rows() if row["shots"] != 0}
    shots = shots_list([n for n in results.shots if n != 0])
    facts = [
        f"{len(results.class_names):,} classes" if results.class_names else "",
        f"{max(tests):,} test images" if tests else "",
        f"{len(results.methods)} method{'s' if len(results.methods) > 1 else ''}",
        shots,
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}" if seeds else "",
    ]
    return f"{safe(dataset)} with {safe(model)}", " · ".join(fact for fact in facts if fact)


def _when(results: Findings) -> str:
    times = sorted(row["time"] for row in [*results.all_rows(), *results.failed] if row.get("time"))
    if not times:
        return "results without a date"
    return safe(f"results of {times[0][:10]}" + (f" to {times[-1][:10]}" if times[-1][:10] != times[0][:10] else ""))


# -- the page, from top to bottom ----------------------------------------------------------------------------------------
def _verdict(results: Findings, found: tuple) -> str:
    headline, sentences, comparisons = found
    text = "".join(f"<p>{safe(sentence, 400)}</p>" for sentence in sentences)
    how = _how_to_read(results) if comparisons else ""
    notes = "".join(prose(safe(note, 400), "note") for note in results.notes)
    board = page.verdict_table(comparisons, BEST)
    few = few_images(results)
    top = (
        f"{few[0]} test images are few: chance in them alone is about ±{few[1]:.0f} points of any accuracy."
        if few
        else ""
    )
    return (
        f"{prose(top, 'note')}<div class=verdict><b class=main>{safe(headline, 400)}</b>{text}{board}{how}</div>{notes}"
    )


def _how_to_read(results: Findings) -> str:
    few, known = results.few_groups(), any(TEST in row["predictions"] for row in results.all_rows())
    paired = "Student's t on differences within a seed"
    unsure = "? fewer than three seeds, or all give the same."
    if known and not few:
        drawn = ", groups of images that belong together drawn as one" if results.groups() else ""
        text = (
            f"▲ better, ▼ worse: neither 95 % interval contains 0. ≈ not distinguishable: one does. {unsure} <b>Seeds</b>: had the "
            f"training images been others ({paired}). <b>Images</b>: had the test images been others (bootstrap, averaged over "
            f"seeds{drawn})."
        )
    else:
        why = page.too_few_groups(few) if known else "there are no predictions with labels"
        text = (
            f"▲ better, ▼ worse: the 95 % interval over seeds ({paired}) does not contain 0. ≈ not distinguishable: it does. {unsure} "
            f"The chance of the test images is not counted: {why}."
        )
    return prose(f"<small>{text} One in twenty intervals misses by chance.</small>")


def _sections(results: Findings, folder: Path, legend: str) -> Iterable[str]:
    per_class = any(row.get("test_mean_per_class_accuracy") is not None for row in results.all_rows())
    yield section(
        "results",
        "Results",
        prose(
            "Test accuracy in %, mean over seeds ± half its 95 % interval, where three seeds or more differ; in bold the best of a "
            f"column on the same seeds. {page.policies_note(results)}"
        ),
        page.results_table(results),
        prose(image_note(results.all_rows(), len(set(results.groups() or ())))),
        *(prose(safe(text, 600)) for text in fewer_than_thought(results)),
        page.failures(results),
        folded("With every class counting alike", page.results_table(results, PER_CLASS)) if per_class else "",
        page.choices(results),
    )
    yield _shots(results, folder)
    yield _differences(results, folder, legend)
    yield _robustness(results, folder)
    yield _cost(results, folder)
    yield _ablations(results)
    yield from _classes(results, folder)
    yield section("data", "Data, and how to repeat this", *data_parts(results))


def _shots(results: Findings, folder: Path) -> str:
    from .figures import shots_figure

    drawn = shots_figure(results, folder / "shots.png")
    if drawn is None:
        return ""
    path, left_out = drawn
    more = f" Left out, to keep it legible: {listed(map(safe, left_out))}." if left_out else ""
    note = (
        f"Bands are 95 % intervals over seeds, where there are three or more; level lines are the untuned model.{more}"
    )
    return section("shots", "Accuracy against shots", prose(note), picture(path, "Test accuracy against shots"))


def _differences(results: Findings, folder: Path, legend: str) -> str:
    from .figures import differences_figure

    shots = [n for n in results.shots if n != 0] or results.shots
    reference = METHOD if METHOD in results.methods else results.methods[0]
    found = {
        (m, n): d for m in results.methods for n in shots if m != reference and (d := compare(results, m, reference, n))
    }
    methods = [m for m in results.methods if any((m, n) in found for n in shots)]
    if not methods:
        return ""
    shots = [n for n in shots if any((m, n) in found for m in methods)]
    path = differences_figure(found, reference, shots, methods, folder / "differences.png")
    note = (
        f"Points of test accuracy above or below {safe(reference)}, on the same training images. Thick: 95 % interval over seeds. "
        "Thin: 95 % interval over test images. Grey: not distinguishable."
    )
    return section(
        "differences",
        f"Differences to {safe(reference)}",
        prose(note),
        picture(path, f"Differences to {reference}"),
        folded("The figures", page.differences_table(found, results, shots, methods) + legend),
    )


def _robustness(results: Findings, folder: Path) -> str:
    from .figures import robustness_figure

    shots = results.largest(METHOD) if METHOD in results.methods else None
    shots = shots if shots is not None else results.shots[-1]
    splits = results.shift_splits
    if not splits:
        return ""
    control = next((m for m in (CONTROL, "flyp", "zs") if {m, METHOD} <= set(results.methods)), None)
    path = robustness_figure(results, shots, folder / "robustness.png")
    note = (
        f"Images from elsewhere than the training images, {_with(shots)}. Dotted: as good there as in domain. Solid: as far below as "
        "the untuned model; what lies above it lost less than that. Thin paths: mmft and its control from few shots to many."
    )
    every = "".join(f"<h3>{safe(split)}</h3>{page.results_table(results, split)}" for split in splits)
    return section(
        "robustness",
        "Robustness",
        prose(note),
        picture(path, "Accuracy on shifted images against accuracy in domain"),
        page.shifts_table(results, METHOD, control) if control else "",
        *(prose(f"{safe(s)}: {page.too_few_groups(few)}.") for s in splits if (few := results.few_groups(s))),
        page.robustness_table(results, shots),
        folded("Every number of shots", every),
    )


def _with(shots) -> str:
    return "untuned" if shots == 0 else f"with {shots_name(shots)}"


def _cost(results: Findings, folder: Path) -> str:
    from .figures import cost_figure

    shots = [n for n in results.shots if n != 0]
    if not shots:
        return ""
    shown = list(dict.fromkeys([shots[(len(shots) - 1) // 2], shots[-1]]))
    path = cost_figure(results, shown, folder / "cost.png")
    note = (
        "Seconds that a fit took on the machine of the benchmark, choices on validation included; top left is best. Ablations are "
        "in the table; a mark without a name is known by its colour and shape from the figures above."
    )
    return section(
        "cost",
        "Cost against accuracy",
        prose(note),
        picture(path, "Test accuracy against seconds of fitting"),
        prose(page.captions_note(results.data.get("captions"))),
        folded("Seconds and steps", page.cost_table(results, shots)),
    )


def _ablations(results: Findings) -> str:
    methods = [m for m in results.methods if family(m) in ("ablation", "mmft") and m != METHOD]
    if METHOD not in results.methods or not any(family(m) == "ablation" for m in methods):
        return ""
    shots = [n for n in results.shots if results.rows(METHOD, n)]
    found = {(m, n): d for m in methods for n in shots if (d := compare(results, m, METHOD, n))}
    methods = sorted((m for m in methods if any((m, n) in found for n in shots)), key=lambda m: family(m) == "mmft")
    if not methods:
        return ""
    note = "Each row changes one thing of mmft. ▼ means that mmft is better without that change."
    return section("ablations", "Ablations", prose(note), page.ablations_table(found, shots, methods))


def _classes(results: Findings, folder: Path) -> Iterable[str]:
    from .figures import classes_figure

    control = next((m for m in (CONTROL, "flyp", "zs") if with_predictions(results, METHOD, m) is not None), None)
    shots = with_predictions(results, METHOD, *([control] if control else []))
    gains = class_gains(results, METHOD, control) if control else None
    if gains is not None:
        path = classes_figure(gains, results.class_names, folder / "classes.png")
        order = shown_classes(gains.gain)
        ups = [c for c in order.tolist() if gains.gain[c] > 0][:MOST_SAMPLES]
        downs = [c for c in order.tolist()[::-1] if gains.gain[c] < 0][:MOST_SAMPLES]
        few = f"; of {len(gains.gain):,} classes, those at the two ends" if len(order) < len(gains.gain) else ""
        note = (
            f"Recall of mmft minus that of {safe(control)}, {_with(shots)}, mean over seeds{few}. In brackets: test images. Lines: 95 % "
            "intervals over test images, too narrow for classes with few images; pale where they contain 0. With so many classes "
            "some will be far out by chance."
        )
        yield section(
            "classes",
            "Which classes gain from captions" if control != "zs" else "Which classes gain from MMFT",
            prose(note),
            picture(path, "Gain of recall by class"),
            _samples("Most gained", gains, ups, results),
            _samples("Most lost", gains, downs, results),
        )
    if shots is not None and results.class_names:
        note = f"Test images per seed that were taken for another class, {_with(shots)}, mean over seeds."
        yield section(
            "confusions",
            "Most frequent confusions",
            prose(note),
            page.confusion_tables(results, METHOD, control, shots),
        )
    yield _maps(results, gains, folder)


def _samples(heading: str, gains: ClassGains, classes: list[int], results: Findings) -> str:
    cards = page.class_samples(gains, classes, results)
    return f"<h3>{heading}</h3>{cards}" if cards else ""


def _maps(results: Findings, gains: ClassGains | None, folder: Path) -> str:
    from .figures import maps_figure

    maps = [
        entry
        for entry in results.maps
        if entry.get("points") and len(entry["points"]) == len(entry.get("labels") or [])
    ]
    before = next((e for e in maps if e.get("method") == "zs"), None)
    # Of most shots and, of these, the first seed, in whatever order the grid was made.
    own = sorted((e for e in maps if e.get("method") == METHOD), key=lambda e: e.get("seed") or 0)
    after = next((e for n in in_order(e.get("shots") for e in own)[::-1] for e in own if e.get("shots") == n), None)
    panels = [entry for entry in (before, after) if entry]
    if not panels:
        return ""
    labels = np.concatenate([np.asarray(entry["labels"]) for entry in panels])
    present, counts = np.unique(labels[labels >= 0], return_counts=True)
    weight = {int(c): int(n) for c, n in zip(present, counts, strict=True)}
    if len(present) > MOST_COLOURED and gains is not None:
        weight = {c: abs(np.nan_to_num(gains.gain[c])) if c < len(gains.gain) else 0 for c in weight}
    chosen = sorted(sorted(weight, key=lambda c: (-weight[c], c))[:MOST_COLOURED])
    titles = [
        f"before: {e['method']}"
        if e is before
        else f"after: {e['method']}, {shots_name(e.get('shots'))}, seed {e.get('seed')}"
        for e in panels
    ]
    path = maps_figure(panels, titles, chosen, results.class_names, folder / "map.png")
    which = "" if len(present) <= MOST_COLOURED else (
        " Coloured: the classes whose recall captions changed most." if gains is not None else " Coloured: the largest classes."
    )  # fmt: skip
    note = f"Validation images (t-SNE of their embeddings); stars are what classes are compared with.{which} Distances between far groups mean little."
    return section(
        "map", "Embeddings before and after", prose(note), picture(path, "Embeddings before and after training")
    )
