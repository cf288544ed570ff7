"""What `mmft-hf caption` prints about its plan, its calls, its journal and its folder."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from textwrap import indent, shorten

from datasets import Image

from ...captioning.ask.cost import Price, estimate_tokens, price_of
from ...captioning.ask.dispatch import Outcome
from ...captioning.ask.journal_reader import by_slot
from ...captioning.ask.plan import Plan, WorkItem
from ...captioning.split import SplitCaptioner
from ...captioning.types import ACCEPTED, STATUSES, TERMINAL
from ...captioning.workflow import CaptionResult, CaptionWorkflow
from ...captioning.write.statistics import CaptionStatistics
from ...core.console import many, printable_text, say, some, table
from ...core.errors import PartialResult, UserError, nearest
from ...core.files import PAGE_FILE
from ...data.texts import ASPECTS, joined_class_names

WIDTH = 100  # characters of an example


def money(dollars: float) -> str:
    """`$12.30`, `$0.0041`: never rounded to nothing."""
    if 0 < dollars < 0.0001:
        return "less than $0.0001"
    return f"${dollars:,.2f}" if dollars >= 1 else f"${dollars:.4f}"


def rate(dollars: float) -> str:
    """A price per million tokens: `$0.40`, `$0.075`."""
    return f"${dollars:.2f}" if round(dollars, 2) == dollars else f"${dollars:g}"


# -- before a run -----------------------------------------------------------------------------------------------------
def print_heading(verb: str, workflow: CaptionWorkflow) -> None:
    """The dataset, the captioner and what it is asked for."""
    captioner, data, args = workflow.captioner, workflow.data, workflow.args
    say(f"{verb} {workflow.data_args.dataset_name}\n")
    others = [f"{name} {len(split):,}" for name, split in data.items() if name not in workflow.splits]
    images = [
        f"{f'{len(rows):,} of ' if rows is not None else ''}{len(data[split]):,} of split {split}"
        for split, rows in workflow.rows.items()
    ]
    what = {"columns": ", ".join(captioner.columns), "template": args.class_template}
    sets = workflow.sets
    lines = {
        "classes": len(workflow.class_names)
        if sets is None
        else f"{len(sets.class_names)}, in {len(sets.sets):,} sets of labels",
        "images": ", ".join(images) + (f"; other splits get no captions: {', '.join(others)}" if others else ""),
        "captioner": f"{captioner.backend} ({what.get(captioner.backend, captioner.model)})",
    }
    if captioner.asks:
        prompts = captioner.prompts
        aspects = [
            aspect if aspect in ASPECTS else f"{aspect} (your own{nearest(aspect, ASPECTS).replace('.', '')})"
            for aspect in prompts.aspects
        ]
        lines["aspects"] = f"{', '.join(aspects)}; about {prompts.words} words each; domain: {prompts.domain}"
    table(lines | {"output": args.output_dir})


def print_plan(workflow: CaptionWorkflow, split: str, run: SplitCaptioner, plan: Plan, spent: float) -> None:
    """What a run would ask for, with an estimate of its cost.

    Args:
        spent: US dollars that earlier runs in the folder cost.
    """
    captioner, args = workflow.captioner, workflow.args
    calls = -(-plan.open // (len(captioner.prompts.aspects) if captioner.joint else 1))
    rows = {f"split {split}": many(plan.rows, "image")}
    if plan.repeated:
        rows[f"split {split}"] += f", {plan.repeated:,} of them repeat another"
    if plan.unreadable:
        rows["unreadable"] = f"{many(len(plan.unreadable), 'image')}: {next(iter(plan.unreadable.values()))}"
    wanted = len(plan.slots)
    rows["captions"] = f"{wanted:,} wanted, {wanted - plan.open:,} in the journal, {plan.open:,} to ask for"
    if plan.items:
        sample = plan.items[:: max(1, len(plan.items) // 32)]
        pictures = [estimate_tokens(*size, run.price) for size in run.sizes(sample)]
        prompts = [len(slot.prompt) / 3.5 for item in sample for slot in item.slots]
        tokens_in = calls * (sum(pictures) / max(len(pictures), 1) + sum(prompts) / len(prompts))
        tokens_out = plan.open * min(args.words * 1.4, args.max_tokens)
        rows["calls"] = f"{calls:,}, not counting what has to be asked again"
        rows["tokens"] = (
            f"about {tokens_in:,.0f} in and {tokens_out:,.0f} out, estimated from {many(len(pictures), 'picture')}"
        )
        rows["cost"] = _cost(workflow, run.price, tokens_in, tokens_out, spent)
    rows["sampling"] = _sampling(run.backend.sampling_fields())
    rows |= left_out_line(run.left_out())
    if spent:
        rows["spent so far"] = money(spent)
    if args.requests_per_minute and plan.items:
        rows["time"] = f"{calls / args.requests_per_minute:,.0f} minutes or more, at the limit per minute"
    say()
    table(rows)
    if plan.items:
        _print_prompts(plan.items, captioner.joint)


def _sampling(fields: Mapping[str, object]) -> str:
    """`temperature 0.2, a seed per request`."""
    texts = [f"{name} {json.dumps(value)}" for name, value in fields.items() if name != "seed"]
    texts += (
        []
        if "seed" not in fields
        else ["a seed per request" if isinstance(fields["seed"], str) else f"seed {fields['seed']}"]
    )
    return printable_text(", ".join(texts)) or "the model's own (nothing is sent)"


def left_out_line(rows: Iterable[Mapping]) -> dict[str, str]:
    """The fields that a server refused, as a line of a table; none if there are none."""
    fields = dict.fromkeys(f"{row['field']} (as {row['instead']})" if row["instead"] else row["field"] for row in rows)
    return (
        {"left out": printable_text(f"{', '.join(fields)}: refused by the server in an earlier run")} if fields else {}
    )


def _cost(workflow: CaptionWorkflow, price: Price | None, tokens_in: float, tokens_out: float, spent: float) -> str:
    if workflow.captioner.backend == "transformers":
        return "none but this machine's time"
    if price is None:
        return f"unknown: {workflow.captioner.model} is not in the price table. Type --prices FILE.yaml to name one."
    dollars, limit = (tokens_in * price.input + tokens_out * price.output) / 1e6, workflow.args.max_cost_usd
    date = f", prices of {price.date}" if price.date else ""
    over = f"; --max_cost_usd {limit:g} will stop it" if limit is not None and spent + dollars > limit else ""
    return f"about {money(dollars)} ({rate(price.input)} in, {rate(price.output)} out per million tokens{date}){over}"


def _print_prompts(items: list[WorkItem], joint: bool) -> None:
    """Prompts of the first picture, and of the last one of another class."""
    say("\nPrompts, for example:")
    others = [item for item in items[::-1] if item.label != items[0].label]
    for item in (items[0], *others[:1]):
        for slot in item.slots[: 1 if joint else 2]:
            say(f"  [{printable_text(item.class_name)} · {'all aspects' if joint else slot.aspect}]")
            say(indent(slot.prompt, "    "))


# -- after a run ------------------------------------------------------------------------------------------------------
def print_result(workflow: CaptionWorkflow, result: CaptionResult) -> None:
    """The folder, the calls and the next command.

    Raises:
        PartialResult: captions are missing.
        UserError: there is not one caption, and a run would ask for no more.
    """
    output, statistics = workflow.args.output_dir, result.statistics
    if statistics:
        print_folder(output, statistics, journaled=workflow.captioner.asks)
        if result.outcome.attempts:
            say(f"\n{_calls(workflow, result.outcome)}")
    if result.missing:
        raise _partial(workflow, result)
    wanted, accepted = sum(result.statuses.values()), sum(result.statuses[status] for status in ACCEPTED)
    if not (statistics.figures["captions"] if statistics else accepted):
        raise _no_captions(workflow, result)
    if statistics:
        say(f"\n{next_line(output, statistics)}")
    elif accepted == wanted:
        say(f"\nNothing to do: {output} has all {wanted:,} captions.")
    else:
        others = [f"{result.statuses[s]:,} {s}" for s in TERMINAL if s not in ACCEPTED and result.statuses[s]]
        say(
            f"\nNothing to do: {output} has {accepted:,} of {wanted:,} captions, and a run asks for no more "
            f"({', '.join(others)}). Why: mmft-hf caption status --output_dir {shlex.quote(output)}"
        )


def _no_captions(workflow: CaptionWorkflow, result: CaptionResult) -> UserError:
    output = shlex.quote(workflow.args.output_dir)
    if not workflow.captioner.asks:
        return UserError(
            f"expected captions, found none in {some(workflow.captioner.columns)}. Type --text_columns NAME."
        )
    final = [status for status in TERMINAL if result.statuses[status]]
    found = [f"{result.statuses[status]:,} {status}" for status in final]
    found += [f"{many(result.unreadable, 'image')} that cannot be read"] if result.unreadable else []
    rows = (rows[-1] for _, rows in by_slot(Path(workflow.args.output_dir) / "journal") if rows)
    said = next((text for row in rows if (text := row["raw_text"] or row["error"])), None)
    example = f' (e.g. "{printable_text(shorten(said, WIDTH, placeholder=" …"))}")' if said else ""
    how = "Type another --captioner_model or --prompt_template, with another --output_dir"
    how += f"; to ask the same again, `retry {' '.join(final)}` after `mmft-hf caption`" if final else ""
    return UserError(
        f"expected captions, found none: {', '.join(found)}{example}. {how}. What became of each: mmft-hf caption status "
        f"--output_dir {output}"
    )


def _partial(workflow: CaptionWorkflow, result: CaptionResult) -> PartialResult:
    outcome, statuses, args = result.outcome, result.statuses, workflow.args
    why = f" {outcome.why.rstrip('.')}." if outcome.why else ""
    if outcome.stopped == "cost":
        why = f" The next call could exceed --max_cost_usd {args.max_cost_usd:g}: type a larger limit to continue."
    if statuses["truncated"] + statuses["empty"] > result.missing / 2:
        why += (
            f" Most were truncated by the token budget or empty: type a larger --max_tokens than {args.max_tokens}, "
            "and only those captions are asked for again."
        )
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in outcome.failures.most_common(4))
    return PartialResult(
        f"{result.missing:,} of {sum(statuses.values()):,} captions are missing.{why}"
        f"{f' Failures: {kinds}.' if kinds else ''} {args.output_dir} holds the captions so far.",
        again=outcome.stopped != "cost",
    )


def _calls(workflow: CaptionWorkflow, outcome: Outcome) -> str:
    """How many calls there were, how many tokens, at what cost."""
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in outcome.failures.most_common())
    price = price_of(workflow.captioner.model, workflow.args.prices)
    known = outcome.cost or (price is not None and outcome.tokens_in + outcome.tokens_out)
    cost = f"; {money(outcome.cost)}" if known else "; cost unknown"
    return (
        f"{many(outcome.calls, 'call')} answered of {outcome.attempts:,} tried{f' ({kinds})' if kinds else ''}; "
        f"{outcome.tokens_in:,} tokens in, {outcome.tokens_out:,} out"
        f"{'' if workflow.captioner.backend == 'transformers' else cost}; {outcome.seconds:.0f} s."
    )


def print_folder(path: str, statistics: CaptionStatistics, journaled: bool = False) -> None:
    """What is in a captioned dataset, and some of its captions.

    Args:
        journaled: there is a journal, so that `caption status` can explain what is missing.
    """
    lines = statistics.headline()
    if (row := statistics.unreadable_row) is not None:
        image = statistics.dataset.cast_column("image", Image(decode=False))[row]["image"] or {}
        name = printable_text(Path(image.get("path") or "no name").name)
        lines["unreadable images"] += f", e.g. {name} (row {row})"
    unwanted = {name: count for name, count in statistics.figures["statuses"].items() if name not in ACCEPTED}
    if unwanted:
        lines["not accepted"] = ", ".join(f"{count:,} {name}" for name, count in unwanted.items())
    lines["report"] = Path(path) / PAGE_FILE
    say()
    table(lines)
    if journaled and unwanted:
        say(f"\nWhy some are missing: mmft-hf caption status --output_dir {shlex.quote(path)}")
    _print_captions(statistics)


def _print_captions(statistics: CaptionStatistics) -> None:
    rows = statistics.sample_rows(3)
    if rows:
        say("\nFor example:")
    for row in statistics.dataset.select(rows).select_columns(["label", "captions"]):
        shown = [f'"{shorten(text, WIDTH, placeholder=" …")}"' for text in row["captions"][:3]]
        shown += [f"and {len(row['captions']) - 3} more"] if len(row["captions"]) > 3 else []
        name = joined_class_names(statistics.class_names, row["label"])
        for line in (f"{name}:", *(f"  {text}" for text in shown)):
            say(printable_text(f"  {line}"))


def next_line(path: str, statistics: CaptionStatistics) -> str:
    """The command that trains on a captioned dataset."""
    skip = " --on_bad_image skip" if statistics.figures["unreadable_images"] else ""
    return f"Next: mmft-hf finetune --dataset_name {shlex.quote(path)}{skip}"


# -- the journal ------------------------------------------------------------------------------------------------------
def print_statuses(by_aspect: Mapping[str, Counter], aspects: Iterable[str]) -> Counter:
    """A line of statuses for each aspect, `aspects` first, and their sums, which are returned."""
    total = sum(by_aspect.values(), Counter())
    states = [state for state in STATUSES if total[state]]
    order = dict.fromkeys([*aspects, *sorted(by_aspect)])
    lines = [(aspect, by_aspect[aspect]) for aspect in order if aspect in by_aspect] + [("all", total)]
    width = max(len(aspect) for aspect, _ in lines)
    say("  " + " " * width + "".join(f"{state:>12}" for state in states))
    for aspect, counts in lines:
        say(f"  {aspect:<{width}}" + "".join(f"{counts[state]:>12,}" for state in states))
    say()
    return total
