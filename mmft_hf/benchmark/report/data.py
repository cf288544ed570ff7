"""What a benchmark was run on, and what to type for the same."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from html import escape

import numpy as np

from ...core.markdown import one_line
from ..run.results import RESULTS_FILE
from ..run.summary import FULL, shots_name
from .page import folded, prose, safe, table, without_folder
from .statistics import Findings

DIGEST = re.compile("[0-9a-f]{16}")
MOST_NAMED = 8


def data_parts(results: Findings) -> Iterable[str]:
    """The section on data: splits, duplicates, images per class, versions and settings, and how to repeat the grid."""
    data, labels = results.data, results.data.get("labels") or {}
    counts = data.get("train_images_per_class")
    rows = []
    if counts:
        spread = f"{min(counts):,} to {max(counts):,} of a class"
        rows.append(["train", f"{sum(counts):,}", spread])
    if data.get("validation_images") is not None:
        rows.append(["validation", f"{data['validation_images']:,}", ""])
    for split, truth in labels.items():
        groups, few = results.groups(split), results.few_groups(split)
        drawn = "groups, too few for an interval over images" if few else "groups that are drawn as one"
        rows.append(
            [
                safe(split, 40),
                f"{len(truth):,}",
                f"{len(set(map(str, groups))):,} {drawn}" if groups else "",
            ]
        )
    if rows:
        yield table(
            ["split", "images", "<th class=words></th>"], [[a, b, f"<td class=words>{c}</td>"] for a, b, c in rows]
        )
    yield _duplicates(data)
    if counts and results.class_names:
        totals = {
            split: np.bincount([y for y in truth if y >= 0], minlength=len(counts)) for split, truth in labels.items()
        }
        lines = [
            [safe(name, 60), f"{counts[c]:,}", *(f"{total[c]:,}" for total in totals.values())]
            for c, name in enumerate(results.class_names)
        ]
        yield folded("Images of each class", table(["class", "train", *(safe(s, 40) for s in totals)], lines))
    yield folded("Model, data, settings and versions", _identity(results.identity))
    gaps = ", also cells that are missing in it" if results.missing() else ""
    yield prose(
        f"Every cell is a line of {RESULTS_FILE}; which images a cell had is in subsets/. This runs the grid again{gaps}; seeds may be "
        "added. In place of names of folders type their paths; cells that are done are kept in the folder given as --output_dir."
    )
    yield f"<pre>{escape(command(results))}</pre>"


def fewer_than_thought(results: Findings) -> list[str]:
    """Sentences on classes with fewer training images than shots, and on those without images to be judged on."""
    names, counts, found = results.class_names, results.data.get("train_images_per_class") or [], []
    for n in results.shots:
        few = [count for count in counts if n != FULL and count < n]
        if few:
            span = f"{min(few)} to {max(few)}" if min(few) < max(few) else f"{few[0]}"
            found.append(
                f"{shots_name(n)}: {len(few)} of {len(counts)} classes {'have' if len(few) > 1 else 'has'} fewer training images "
                f"({span}); all of them were taken."
            )
    for split, truth in (results.data.get("labels") or {}).items():
        present = set(truth)
        missing = [name for c, name in enumerate(names) if c not in present]
        if missing:
            more = ", …" if len(missing) > MOST_NAMED else ""
            found.append(
                f"{len(missing)} of {len(names)} classes {'have' if len(missing) > 1 else 'has'} no {one_line(split, 40)} image: "
                f"{', '.join(one_line(name, 40) for name in missing[:MOST_NAMED])}{more}. Accuracy is over the others."
            )
    return found


def _duplicates(data: dict) -> str:
    found = data.get("duplicates")
    if found is None:
        return ""
    count = data.get("duplicates_count", len(found))
    if not count:
        return prose("No picture is in two splits, byte for byte.")
    rows = [
        [" and ".join(map(safe, entry["splits"])), f"<td class=words>{', '.join(map(safe, entry['images']))}</td>"]
        for entry in found[:100]
    ]
    text = f"{count:,} image{'s are' if count > 1 else ' is'} in more than one split: accuracy on them says little."
    return prose(text, "note") + folded("Which", table(["splits", "<th class=words>images</th>"], rows))


def _flat(identity: dict, above: str = "") -> Iterable[tuple[str, object]]:
    for key, value in identity.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", without_folder(value) if isinstance(value, str) and "/" in value else value


def _identity(identity: dict) -> str:
    rows = [[safe(key), f"<td class=words>{safe(value, 300)}</td>"] for key, value in _flat(identity)]
    return table(["setting", "<th class=words>value</th>"], rows) if rows else ""


def command(results: Findings) -> str:
    """What to type for the same grid, made of what the rows say."""
    identity, arguments = results.identity, results.data.get("arguments")
    seeds = sorted({row["seed"] for row in [*results.all_rows(), *results.failed] if row["shots"] != 0})
    words = ["mmft-hf benchmark", "--methods", *results.methods]
    words += ["--shots", *map(str, [n for n in results.shots if n != 0] or [0])] + (
        ["--seeds", *map(str, seeds)] if seeds else []
    )
    named = {
        "model_name_or_path": identity.get("base_model"),
        # Of a model in a folder, the hash of its weights stands there, which is no revision to ask for.
        "model_revision": None
        if DIGEST.fullmatch(str(identity.get("base_model_revision")))
        else identity.get("base_model_revision"),
        "dataset_name": identity.get("dataset"),
        "shift_splits": list(identity.get("shift_splits") or {}),
        "group_column": (results.data.get("made_from") or {}).get("group_column"),
        **(arguments if isinstance(arguments, dict) else {}),
        **(identity.get("settings") or {}),
    }
    named.pop("greater_is_better", None)  # both follow from others where nothing is typed
    named = {name: value for name, value in named.items() if (name, value) != ("bf16", False)}
    for name, value in named.items():
        values = value if isinstance(value, list) else [value]
        if any(v not in (None, "None", "") for v in values):
            words += [f"--{name}", *(shlex.quote(_typed(v)) for v in values)]
    if results.folder:
        words += ["--output_dir", shlex.quote(results.folder)]
    return " ".join(words).replace(" --", " \\\n  --")


def _typed(value: object) -> str:
    """A setting as it is typed: `true`, `adamw_torch`, and of a path the last part."""
    text = str(value).lower() if isinstance(value, bool) else without_folder(str(value))
    return re.sub(r"^[A-Za-z]+\.([A-Z0-9_]+)$", lambda found: found[1].lower(), text)
