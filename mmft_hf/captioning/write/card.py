"""The card (`README.md`) of a captioned dataset. Its sentences are in `templates/caption_card.md.j2`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from markupsafe import Markup

from ...core.files import PAGE_FILE, PICTURE_FILE, REFINED_PAGE
from ...core.markdown import code, front_matter, listed, one_line, public_name
from ...core.pages import render_card
from ...core.repositories import describe_recorded_dataset
from ...version import __version__
from ..judge.checks import MEANINGS
from .figures import figure_rows
from .statistics import CaptionStatistics, percentage, spread

TEMPLATES = Path(__file__).parent / "templates"
CLASS_MARK = "[class name]"  # stands for the name of the class in the prompts of a card
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}


def title(details: Mapping) -> str:
    """`Captions of NAME`."""
    name = source_name(details)
    return f"Captions of {name}" if name else "Captions"


def source_name(details: Mapping) -> str:
    """The dataset that was captioned. Of a local path only the last part, because paths are private."""
    return public_name(str((details.get("made_from") or {}).get("dataset_name") or ""))


def captioned_splits(details: Mapping) -> list[str]:
    """Names of the splits that have captions; empty if unknown."""
    splits = (details.get("made_from") or {}).get("split") or []
    return [splits] if isinstance(splits, str) else list(splits)


def caption_card(
    statistics: CaptionStatistics,
    details: Mapping,
    splits: Iterable[str] = (),
    repo_id: str | None = None,
    captions_only: bool = False,
) -> str:
    """The card of a captioned dataset as Markdown.

    Args:
        statistics: of the captioned split.
        details: as for `caption_report`, and `license`. Default: the licence that the card of the source dataset states.
        splits: names of all splits that the dataset has; the card names their files.
        repo_id (*optional*): where the dataset will be published; the snippet loads it from there.
        captions_only: the dataset is published without images. The card then shows none, names the files in `captions/`,
            and explains how captions are joined to images.
    """
    figures, splits = statistics.figures, sorted(splits)
    models = [name for name in figures["models"] if name not in ("", "columns", "template")]
    source = source_name(details)
    data = "captions" if captions_only else "data"
    stated = describe_recorded_dataset(source, offline=True).get("license") if source else None
    license = details.get("license") or stated
    front: dict = {"language": ["en"]}
    if license:
        front["license"] = license
    if models:
        front["annotations_creators"] = ["machine-generated"]
    front |= {"task_categories": ["image-classification"], "tags": ["captions", "clip", "mmft"]}
    front["tags"] += ["synthetic-captions"] if models else []
    front["pretty_name"] = title(details)
    front["size_categories"] = [next((name for rows, name in SIZES.items() if figures["images"] < rows), "n>10M")]
    if splits:
        files = [{"split": split, "path": f"{data}/{split}-*.parquet"} for split in splits]
        # `datasets` caches a folder by its card: without the run id, it would open the old captions after a new run.
        run = {"description": f"run {details['run_id']}"} if details.get("run_id") else {}
        front["configs"] = [{"config_name": "default", **run, "data_files": files}]
    prompts = details.get("prompt_texts") or {}
    sampling = dict((details.get("made_from") or {}).get("sampling") or {})
    if "requests" in details:
        sampling["temperature"] = (details["requests"] or {}).get("temperature", "the model's own (none was sent)")
    return render_card(
        TEMPLATES / "caption_card.md.j2",
        front=Markup(front_matter(front)),
        title=title(details),
        source=source,
        statistics=statistics,
        figures=figures,
        models=models,
        written_by=Markup(listed(map(code, models))) if models else None,
        given=figures["models"].get("columns", 0),
        templates="template" in figures["models"],
        checks=MEANINGS,
        fired={name: count for name, count in figures["all"]["checks"].items() if count},
        picture=PICTURE_FILE,
        page=PAGE_FILE,
        refined_page=REFINED_PAGE,
        steps=details.get("steps") or (),
        scorer=details.get("scorer"),
        comparison=figure_rows(**details["comparison"]) if details.get("comparison") else (),
        repo_id=repo_id or ".",
        split=one_line((captioned_splits(details) or splits or ["train"])[0]),
        captions_only=captions_only,
        details=details,
        version=__version__,
        sampling=sampling,
        prompts=prompts,
        class_mark=Markup(CLASS_MARK),
        told_label=any(CLASS_MARK in str(text) for text in prompts.values()),
        licence=Markup(listed(map(code, [license] if isinstance(license, str) else license))) if license else None,
        licence_source=source if license == stated else None,
        percentage=percentage,
        spread=spread,
    )
