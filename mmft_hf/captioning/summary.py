"""What a captioning command prints about its plan, its calls and its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import indent, shorten

from datasets import Dataset, Image

from ..core.console import printable_text, say, table
from .ask.cost import Price
from .ask.dispatch import Outcome
from .ask.plan import WorkItem
from .types import ACCEPTED
from .write.card import PAGE
from .write.statistics import CaptionTally

WIDTH = 110  # characters of a line of examples


def many(count: int, noun: str) -> str:
    """`1 caption`, `2,223 captions`."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def money(dollars: float) -> str:
    """`$12.30`, `$0.0041`: never rounded to nothing."""
    if 0 < dollars < 0.0001:
        return "less than $0.0001"
    return f"${dollars:,.2f}" if dollars >= 1 else f"${dollars:.4f}"


def rate(dollars: float) -> str:
    """A price per million tokens: `$0.40`, `$0.075`."""
    return f"${dollars:.2f}" if round(dollars, 2) == dollars else f"${dollars:g}"


def calls_line(outcome: Outcome, price: Price | None, local: bool) -> str:
    """How many calls there were, how many tokens, for how much.

    Args:
        price: of the model, where it is known.
        local: the model is in this process, so that nobody sends a bill.
    """
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in outcome.failures.most_common())
    known = outcome.cost or (price is not None and outcome.tokens_in + outcome.tokens_out)
    cost = "" if local else f"; {money(outcome.cost)}" if known else "; cost unknown"
    return (
        f"{many(outcome.calls, 'call')} answered of {outcome.attempts:,} tried{f' ({kinds})' if kinds else ''}; "
        f"{outcome.tokens_in:,} tokens in, {outcome.tokens_out:,} out{cost}; {outcome.seconds:.0f} s."
    )


def print_prompts(jobs: list[WorkItem], joint: bool) -> None:
    """Prompts of the first picture, and of the last one of another class."""
    say("\nPrompts, for example:")
    others = [job for job in jobs[::-1] if job.label != jobs[0].label]
    for job in (jobs[0], *others[:1]):
        for slot in job.slots[: 1 if joint else 2]:
            say(f"  [{printable_text(job.class_name)} · {'all aspects' if joint else slot.aspect}]")
            say(indent(slot.prompt, "    "))


def print_folder(
    path: Path, dataset: Dataset, tally: CaptionTally, statistics: Mapping, details: Mapping, asks: bool
) -> None:
    """What is in a captioned data set, and some captions of it.

    Args:
        asks: a model was asked, so that `caption status` knows more of what is missing.
    """
    everything, captions = statistics["all"], statistics["captions"]
    unwanted = {name: count for name, count in statistics["statuses"].items() if name not in ACCEPTED}
    others = "".join(f"; {count:,} {name}" for name, count in unwanted.items()) or "; 0 empty"
    without = statistics["images_without_caption"]
    lines = {
        "captions": f"{captions:,} kept, {captions / max(len(dataset), 1):.1f} per image{others}",
        "no caption": many(without, "image"),
    }
    if statistics["unreadable_images"]:
        row = tally.unreadable_row
        image = dataset.cast_column("image", Image(decode=False))[row]["image"] or {}
        name = printable_text(Path(image.get("path") or "no name").name)
        lines["unreadable"] = f"{many(statistics['unreadable_images'], 'image')}, e.g. {name} (row {row})"
    if everything["clip_tokens"]:
        tokens, over = everything["clip_tokens"], everything["checks"]["over_token_limit"]
        limit = (details.get("checks") or {}).get("token_limit") or "limit"
        lines["tokens"] = f"median {tokens['median']:.0f}, longest {tokens['max']}; {over} over the model's {limit}"
    if captions:
        lines["label named"] = f"in {everything['mentions_label'] / everything['captions']:.0%} of the captions"
    lines["report"] = path / PAGE
    say()
    table(lines)
    if asks and unwanted:
        say(f"\nWhy some are missing: mmft-hf caption status --output_dir {path}")
    rows = tally.rows_to_show(3)
    if rows:
        say("\nFor example:")
    names, blocks = dataset.features["label"].names, []
    for row in dataset.select(rows).select_columns(["label", "captions"]):
        shown = [f'"{shorten(text, WIDTH - 10, placeholder=" …")}"' for text in row["captions"][:3]]
        shown += [f"and {len(row['captions']) - 3} more"] if len(row["captions"]) > 3 else []
        blocks.append([f"{names[row['label']]}:", *shown])
    short = all(len("  ".join(block)) < WIDTH for block in blocks)
    for block in blocks:
        for line in ["  ".join(block)] if short else [block[0], *(f"  {text}" for text in block[1:])]:
            say(printable_text(f"  {line}"))


def next_line(path: Path | str, statistics: Mapping) -> str:
    """The command that trains on a captioned data set."""
    skip = " --on_bad_image skip" if statistics["unreadable_images"] else ""
    return f"Next: mmft-hf finetune --dataset_name {path}{skip}"
