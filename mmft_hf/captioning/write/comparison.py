"""An HTML page that shows captions before and after. It is `templates/refined.html.j2`."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Image

from ...core.pages import render_page
from ...version import __version__
from ..judge.checks import MEANINGS
from ..types import ACCEPTED, DROPPED, REPLACED
from .card import TEMPLATES
from .figures import accepted, figure_rows
from .report import SAMPLES, show_row


@dataclass(frozen=True)
class Compared:
    """One image of a page: its row, and `(mark, text, note)` of each caption; mark: `kept`, `new` or `gone`; or `dropped`,
    `replaced`, `rejected` or `written` with the step."""

    row: int
    captions: Sequence[tuple[str, str, str]]


def own_changes(records: Sequence[Mapping]) -> list[tuple[str, str, str]]:
    """What steps did to the captions of one image, as in `Compared`."""
    shown = (*ACCEPTED, DROPPED, REPLACED)
    texts = [r for r in records if r["text"] and (r["status"] in shown or r.get("parents") is not None)]
    return [(_mark(record), record["text"], _scores(record)) for record in texts]


def rejected_texts(details: Iterable[Mapping]) -> dict[str, list[tuple[str, str, str]]]:
    """The answers that could not become captions, by sha256 of the image, as in `Compared`. `details`: rows of `steps.parquet`."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for row in details:
        if row["kind"] == "rejected":
            mark = f"rejected by {row['step']}: {_reasons(row['verdict'].split(', '))}"
            found.setdefault(row["image_sha256"], []).append((mark, row["text"], ""))
    return found


def _reasons(checks: Iterable[str]) -> str:
    return "; ".join(MEANINGS.get(check, check) for check in checks)


def _mark(record: Mapping) -> str:
    if record["status"] not in ACCEPTED:
        if record["status"] not in (DROPPED, REPLACED):
            return f"{record['status']} by {record['step']}: {_reasons(record['checks'] or ())}"
        # Earlier versions wrote it over the step that wrote the text.
        return f"{record['status']} by {record.get('removed_by') or record['step']}"
    return "kept" if record.get("parents") is None else f"written by {record['step']}"


def changes_from(before: Sequence[Mapping], after: Sequence[Mapping]) -> list[tuple[str, str, str]]:
    """What differs between the captions of one image in two data sets, as in `Compared`."""
    old, new = ({r["text"]: r for r in records if accepted(r)} for records in (before, after))
    found = [("kept" if text in new else "gone", text, _scores(new.get(text, record))) for text, record in old.items()]
    return found + [("new", text, _scores(record)) for text, record in new.items() if text not in old]


def _scores(record: Mapping) -> str:
    return ", ".join(f"{score['name']} {score['value']:.3g}" for score in record.get("scores") or ())


def choose(
    rows: Iterable[int],
    changes: Callable[[int], Sequence[tuple[str, str, str]]],
    labels: Sequence[int],
    number: int = SAMPLES,
) -> list[Compared]:
    """Images to be shown: those with a change first, from as many classes as possible, in a seeded order.

    Args:
        changes: what became of the captions of a row, as in `Compared`. Those of all rows are never in memory at a time.
    """
    found = [(i, all(mark == "kept" for mark, _, _ in changes(i))) for i in rows]
    random.Random(0).shuffle(found)
    turn: Counter = Counter()
    keyed = []
    for i, same in found:
        keyed.append(((same, turn[labels[i], same]), i))
        turn[labels[i], same] += 1
    chosen = sorted(keyed, key=lambda entry: entry[0])[:number]
    return [Compared(i, changes(i)) for _, i in chosen]


def refined_page(path: Path, dataset: Dataset, title: str, details: Mapping, step_details: Iterable[Mapping]) -> None:
    """Writes the page of a dataset whose records tell what steps did.

    Args:
        details: as in `captions.json`, with `comparison`.
        step_details: rows of `steps.parquet`.
    """
    labels, rejected = dataset["label"][:], rejected_texts(step_details)
    rows = dataset.select_columns(["caption_records", "image_sha256"])

    def changes(i: int) -> list[tuple[str, str, str]]:
        row = rows[i]
        return [*own_changes(row["caption_records"] or ()), *rejected.get(row["image_sha256"], ())]

    images = choose(range(len(rows)), changes, labels)
    figures = figure_rows(details["comparison"]["before"], details["comparison"]["after"])
    comparison_page(path, title, ("all captions", "those that are kept"), figures, details["steps"], images, dataset)


def comparison_page(
    path: Path,
    title: str,
    sides: tuple[str, str],
    figures: Sequence[tuple[str, str, str]],
    steps: Sequence[Mapping],
    images: Sequence[Compared],
    dataset: Dataset,
) -> None:
    """Writes the page, without scripts or external resources.

    Args:
        sides: what `before` and `after` are, in a few words.
        figures: of `figure_rows`.
        steps: as in `captions.json`.
        images: those that are shown, rows of `dataset` (columns `image` and `label`).
    """
    shown = dataset.cast_column("image", Image(decode=False))
    names = dataset.features["label"].names
    samples = [
        show_row(shown[image.row], names)
        | {"entries": [(f"{mark} · {note}" if note else mark, text) for mark, text, note in image.captions]}
        for image in images
    ]
    page = render_page(
        TEMPLATES / "refined.html.j2",
        title=title,
        sides=sides,
        figures=figures,
        steps=steps,
        samples=samples,
        version=__version__,
    )
    path.write_text(page, encoding="utf-8")
