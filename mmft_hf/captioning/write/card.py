"""What a captioned data set is called and what is said of it in figures; its card. No sentence of it is a placeholder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from string import Template

from datasets import Dataset

from ...core.console import percent
from ...core.markdown import code, fenced, front_matter, listed, md, one_line
from ...core.repositories import describe_recorded_dataset
from ...version import __version__
from ..judge.checks import TABLE

TEMPLATES = Path(__file__).parent / "templates"
CLASS_MARK = "[class name]"  # stands for the name in the prompts of a card
PAGE, PICTURE, CARD = "captions.html", "captions.png", "README.md"
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.parquet")


def title(details: Mapping) -> str:
    """`Captions of NAME`."""
    name = source_name(details)
    return f"Captions of {name}" if name else "Captions"


def source_name(details: Mapping) -> str:
    """The data set that was captioned; of a local path only the last part, since paths are nobody's business."""
    name = str((details.get("made_from") or {}).get("dataset_name") or "")
    return Path(name).name if name and Path(name).exists() else name


def origin(details: Mapping) -> list[str]:
    """Split, model and run, as far as they are known."""
    splits = (details.get("made_from") or {}).get("split") or []
    splits = [splits] if isinstance(splits, str) else splits
    found = [f"split {', '.join(map(str, splits))}"] if splits else []
    return [*found, *[str(details[key]) for key in ("model", "run_id") if details.get(key)]]


def share(count: int, total: int) -> str:
    """`12.5 %`, or a dash of nothing."""
    return percent(count / total) if total else "–"


def figures(statistics: dict) -> dict[str, str]:
    """What the tiles and the card say."""
    everything, images = statistics["all"], statistics["images"]
    captions, checks = everything["captions"], everything["checks"]
    repeated = statistics["duplicates"]
    found = {
        "images": f"{images:,}",
        "captions": f"{statistics['captions']:,}",
        "captions per image": f"{statistics['captions'] / images:.2f}" if images else "–",
        "images without a caption": f"{statistics['images_without_caption']:,}",
        "name their class": share(everything["mentions_label"], captions),
        "over the token limit": share(checks["over_token_limit"], everything["answers"]),
        "cut at a sentence": share(everything["trimmed"], captions),
        "deny their label": f"{checks['label_contradicted']:,}",
        "texts of several images": f"{repeated['texts']:,}",
    }
    if everything["clip_tokens"] is None:
        del found["over the token limit"]
    return found


def spread(found: dict | None) -> str:
    """Median, 95th percentile and maximum."""
    return f"{found['median']:g} · {found['p95']:g} · {found['max']}" if found else "–"


def with_all(statistics: dict) -> list[tuple[str, dict]]:
    """The aspects, and all of them together where there are several."""
    aspects = list(statistics["aspects"].items())
    return [*aspects, ("all", statistics["all"])] if len(aspects) > 1 else aspects


def caption_card(
    dataset: Dataset,
    folder: str | Path,
    details: Mapping,
    statistics: dict,
    repo_id: str | None = None,
    captions_only: bool = False,
) -> Path:
    """Writes `README.md`, the card of a captioned data set.

    Args:
        dataset: as for `caption_report`.
        folder: of the data set; its `data/*.parquet` and `captions.png` are named in the card.
        details: as for `caption_report`; and `license`. Default: what the card of the captioned data set states.
        statistics: of `caption_statistics`.
        repo_id (*optional*): where it will be published; its snippet loads it from there.
        captions_only: without the images, which are then neither shown nor in `data/`, but joined by their content.

    Returns:
        The card.
    """
    folder, prompts = Path(folder), details.get("prompt_texts") or {}
    written = [name for name in statistics["models"] if name not in ("", "columns", "template")]
    source = source_name(details)
    where = "captions" if captions_only else "data"
    splits = sorted({m[1] for p in (folder / where).glob("*.parquet") if (m := _SHARD.fullmatch(p.name))})
    stated = describe_recorded_dataset(source, offline=True).get("license") if source else None
    license = details.get("license") or stated
    front: dict = {"language": ["en"]}
    if license:
        front["license"] = license
    if written:
        front["annotations_creators"] = ["machine-generated"]
    front |= {"task_categories": ["image-classification"], "tags": ["captions", "clip", "mmft"]}
    front["tags"] += ["synthetic-captions"] if written else []
    front["pretty_name"] = title(details)
    front["size_categories"] = [_size(len(dataset))]
    if splits:
        files = [{"split": split, "path": f"{where}/{split}-*.parquet"} for split in splits]
        # `datasets` tells what it cached of a folder by its card: without the run, new captions would open as the old.
        run = {"description": f"run {details['run_id']}"} if details.get("run_id") else {}
        front["configs"] = [{"config_name": "default", **run, "data_files": files}]
    of = f" of {md(source)}" if source else ""
    if written:
        by = f"written by {listed(map(code, written))}"
    elif "template" in statistics["models"]:
        by = "made from class templates"
    else:
        by = "texts that the data set already had"
    classes = statistics["classes"]["with_images"]
    captioned = (details.get("made_from") or {}).get("split") or splits or ["train"]
    captioned = captioned if isinstance(captioned, str) else captioned[0]
    card = Template((TEMPLATES / "caption_card.md").read_text(encoding="utf-8")).substitute(
        front=front_matter(front),
        title=md(title(details)),
        summary=f"{statistics['captions']:,} captions for {statistics['images']:,} images{of} in {classes:,} classes, {by}. A "
        "caption is a text about its picture: a model of images and texts, such as CLIP, is fine-tuned on both, and on the labels.",
        picture="" if captions_only else f"![Some images with their captions]({PICTURE})\n\n",
        page="" if captions_only else f"All figures, with samples and the checks in detail: [{PAGE}]({PAGE}).\n\n",
        figures="\n".join(f"| {md(name)} | {value} |" for name, value in figures(statistics).items()),
        use=_use(repo_id or ".", json.dumps(one_line(captioned)), captions_only),
        aspects="\n".join(
            f"| {md(name)} | {c['captions']:,} | {spread(c['words'])} | {spread(c['clip_tokens'])} | "
            f"{share(c['mentions_label'], c['captions'])} |"
            for name, c in with_all(statistics)
        ),
        checks=_checks_in_words(statistics),
        made=_made_in_words(statistics, details, written),
        limits=_limits(prompts, written, "template" in statistics["models"]),
        licence=_licence(license, source if license == stated else None, written),
    )
    path = folder / CARD
    path.write_text(card, encoding="utf-8")
    return path


def _use(name: str, split: str, captions_only: bool) -> str:
    """How to load it, as Markdown with a snippet that runs: beside the images, or with them in a folder."""
    if captions_only:
        return (
            "The images are not here. Whoever has them joins the captions to them by their content; the number of images "
            "that match is reported:\n\n```python\nfrom mmft_hf import load_captioned_dataset\n\n"
            f'data = load_captioned_dataset("IMAGES", captions_dataset="{name}")  # IMAGES: your folder of images\n'
            f'print(data[{split}][0]["captions"])\n```\n\n'
            f"or, on the command line, `mmft-hf finetune --dataset_name IMAGES --captions_dataset {name}`.\n"
        )
    here, imports, source = "", "", json.dumps(name)
    if name == ".":  # which `datasets` cannot open by that name
        here, imports, source = "In this folder:\n\n", "import os\n\n", "os.getcwd()"
    return (
        f"{here}```python\n{imports}from datasets import load_dataset\n\ndata = load_dataset({source})\n"
        f'row = data[{split}][0]\nprint(row["captions"])\n```\n\n'
        f"Train on it: `mmft-hf finetune --dataset_name {name}`.\n"
    )


def _made_in_words(statistics: dict, details: Mapping, written: list[str]) -> str:
    """Models, settings, spending and prompts, as Markdown."""
    settings = (details.get("made_from") or {}).get("sampling") or {}
    lines = [f"- model: {code(name)}, {statistics['models'][name]:,} captions" for name in written]
    lines += [
        f"- {md(str(name).replace('_', ' '))}: {md(str(value))}"
        for name, value in settings.items()
        if value not in (None, {}, "")
    ]
    spent, last = details.get("spent") or {}, details.get("last_run") or {}
    if statistics["tokens_in"] or statistics["tokens_out"]:
        lines.append(f"- tokens: {statistics['tokens_in']:,} in, {statistics['tokens_out']:,} out")
    if spent.get("cost_usd"):
        lines.append(f"- cost: {spent['cost_usd']:.2f} USD")
    elif last.get("cost_usd"):
        lines.append(f"- cost of the last run: {last['cost_usd']:.2f} USD")
    lines.append(f"- mmft_hf {__version__}" + (f", run {md(str(details['run_id']))}" if details.get("run_id") else ""))
    if not written:
        lines.insert(0, "- No model wrote any of the texts.")
    prompts = details.get("prompt_texts") or {}
    if any(CLASS_MARK in str(text) for text in prompts.values()):
        lines.append(f"\nThe prompts, where `{CLASS_MARK}` stands for the name of the image's class:")
    elif prompts:
        lines.append("\nThe prompts:")
    for aspect, text in prompts.items():
        lines.append(f"\n{md(aspect)}\n\n{fenced(text)}")
    return "\n".join(lines)


def _checks_in_words(statistics: dict) -> str:
    everything, statuses = statistics["all"], statistics["statuses"]
    fired = {name: count for name, count in everything["checks"].items() if count}
    lines = ["Captions by status: " + (", ".join(f"{name} {n:,}" for name, n in statuses.items()) or "none") + "."]
    if fired:
        rows = (
            f"| {code(n)} | {TABLE[n].meaning if n in TABLE else ''} | {count:,} | {share(count, everything['answers'])} |"
            for n, count in fired.items()
        )
        lines += ["", "What the checks found:", "", "| check | meaning | answers | share |", "|---|---|---|---|", *rows]
    else:
        lines.append("No check found anything.")
    return "\n".join(lines)


def _limits(prompts: Mapping, written: list[str], templates: bool) -> str:
    lines = []
    if written:
        if any(CLASS_MARK in str(text) for text in prompts.values()):
            lines.append(
                "- The captions were written by a model that was told the label. One can be right about the class without "
                "being right about the picture, and a wrong label goes into its caption."
            )
        else:
            lines.append("- The captions were written by a model, and no person has read them all.")
        lines.append("- The checks look at words: they do not compare a caption with its picture.")
    elif templates:
        lines.append("- All images of a class have the same texts.")
    else:
        lines.append("- The texts are the data set's own: nothing was generated, and nothing was corrected.")
    lines.append("- They are for training. For evaluation, use images and labels alone.")
    return "\n".join(lines)


def _licence(license: str | list[str] | None, source: str | None, written: list[str]) -> str:
    terms = " Captions that a model wrote may be under the terms of whoever offers it." if written else ""
    if not license:
        return (
            "This card states no licence, since that of the images is not known here. Whoever publishes the data set must choose "
            f"one that allows it.{terms}"
        )
    names = listed(map(code, [license] if isinstance(license, str) else license))
    return f"{names}, as the card of {md(source)} states.{terms}" if source else f"{names}.{terms}"


def _size(rows: int) -> str:
    """The size category of the Hub."""
    bounds = [(1_000, "1K"), (10_000, "10K"), (100_000, "100K"), (1_000_000, "1M"), (10_000_000, "10M")]
    below = "n"
    for bound, name in bounds:
        if rows < bound:
            return f"{below}<{name}" if below == "n" else f"{below}<n<{name}"
        below = name
    return "n>10M"
