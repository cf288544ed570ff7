"""The page that compares the captions of a folder before and after its steps, or with those of another data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from ..core.arguments import DataArguments
from ..core.console import is_main
from ..core.errors import UserError
from ..core.files import COMPARED_PAGE, DETAILS_FILE, REFINED_PAGE, STEPS_FILE, atomic_write
from ..core.markdown import public_name
from .caption_table import CaptionTable
from .metrics.table import Metric, check_scores, metric_of
from .refine import open_scorer
from .spool import Spool
from .steps.base import Embeddings, Row
from .workflow import load_data
from .write.card import captioned_splits, title
from .write.comparison import changes_from, choose, comparison_page, refined_page
from .write.figures import as_before, caption_figures, figure_rows
from .write.output_folder import CaptionFolder


def caption_comparison(
    data_args: DataArguments,
    folder: str,
    other: str | None = None,
    metrics: Sequence[str] = (),
    scorer: str | None = None,
    group_column: str | None = None,
) -> tuple[list[tuple[str, str, str]], Path]:
    """Writes the page of a captioned folder before and after its steps, or of another dataset (before) and it (after).

    Args:
        folder: the captioned folder, into which the page is written.
        other: another captioned dataset of the same images.
        metrics: further figures, as `metrics.table.metric_of` reads them.
        scorer: the model that metrics compare captions and images with.
        group_column: see `CaptionArguments`.

    Returns:
        The figures, as `figures.figure_rows`, and the page.

    Raises:
        UserError: no captioned folder; no steps to tell of, and no `other`; no image in common; an unknown metric or score, or no
            scorer for a metric.
    """
    measures = [metric_of(word) for word in metrics]
    if scorer is None and any(needs for _, needs in measures):
        raise UserError(
            "--scorer: expected the model that --metrics compares captions and images with, found none. Type --scorer NAME."
        )
    details = CaptionFolder(folder).details()
    if not details:
        raise UserError(f"caption report: expected a captioned folder, found no {DETAILS_FILE} in {folder}.")
    data, train, _ = load_data(DataArguments(dataset_name=folder))
    split = next((name for name in captioned_splits(details) if name in data), train)
    name = title(details)
    if other is None:
        if not details.get("steps"):
            raise UserError(
                f"caption report: expected a folder of mmft-hf caption refine, found {folder}, which no step has changed. Type "
                "--compare OTHER to compare two captioned datasets."
            )
        comparison = details["comparison"]
        if measures:
            table = CaptionTable(folder, data[split], group_column)
            check_scores(metrics, table.scores())
            model = scorer and open_scorer(scorer, table, is_main())
            sides = (Spool(replace(row, records=as_before(row.records)) for row in table.rows), table.rows)
            comparison = {
                side: figures | {"metrics": _measured(measures, rows, model)}
                for (side, figures), rows in zip(comparison.items(), sides, strict=True)
            }
        with atomic_write(Path(folder) / REFINED_PAGE) as path:
            found = details | {"comparison": comparison}
            refined_page(path, data[split], f"{name}: before and after", found, _step_details(Path(folder)))
        return figure_rows(**comparison), Path(folder) / REFINED_PAGE
    others, other_train, _ = load_data(replace(data_args, dataset_name=other))
    after = CaptionTable(folder, data[split], group_column)
    before = CaptionTable(other, others[split if split in others else other_train], group_column)
    check_scores(metrics, [*before.scores(), *after.scores()])
    figures = figure_rows(
        *(
            caption_figures((r.image_sha256, r.records) for r in t.rows)
            | {"metrics": _measured(measures, t.rows, scorer and measures and open_scorer(scorer, t, is_main()))}
            for t in (before, after)
        )
    )
    there = {(row.image_sha256, row.class_name): k for k, row in enumerate(before.rows) if row.image_sha256}

    def changes(i: int) -> list[tuple[str, str, str]]:
        row = after.rows[i]
        return changes_from(before.rows[there[row.image_sha256, row.class_name]].records, row.records)

    shared = [i for i, row in enumerate(after.rows) if (row.image_sha256, row.class_name) in there]
    if not shared:
        raise UserError(f"--compare {other}: expected captions of the images of {folder}, found none of them there.")
    images = after.images()
    with atomic_write(Path(folder) / COMPARED_PAGE) as path:
        sides, steps = (public_name(other), public_name(folder)), details.get("steps") or ()
        comparison_page(
            path, f"{name}: compared", sides, figures, steps, choose(shared, changes, images["label"][:]), images
        )
    return figures, Path(folder) / COMPARED_PAGE


def _step_details(folder: Path) -> list[dict]:
    """The rows of `steps.parquet`; none if the folder has no such file."""
    path = folder / STEPS_FILE
    return pq.read_table(path).to_pylist() if path.is_file() else []


def _measured(measures: Sequence[tuple[Metric, bool]], rows: Sequence[Row], scorer: Embeddings | None) -> dict:
    return {label: value for measure, _ in measures for label, value in measure(rows, scorer).items()}
