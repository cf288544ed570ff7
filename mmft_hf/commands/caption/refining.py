"""`mmft-hf caption refine` and `mmft-hf caption report`: they read settings, call the captioning package and print."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from textwrap import indent

from ...captioning.apply import AppliedStep
from ...captioning.arguments import CaptionArguments
from ...captioning.bounds import PlannedStep
from ...captioning.caption_table import CaptionTable
from ...captioning.compare import caption_comparison
from ...captioning.refine import RefineResult, RefineWorkflow
from ...captioning.steps.asking import rendered
from ...core.arguments import DataArguments
from ...core.console import many, printable_text, say, table
from ...core.errors import PartialResult, UserError
from ...core.files import REFINED_PAGE
from . import printing


def refine(data_args: DataArguments, args: CaptionArguments, *operands: str) -> None:
    """Applies steps to a captioned dataset and writes another one."""
    if len(operands) != 1:
        raise UserError(
            f"caption refine: expected one captioned dataset, found {' '.join(operands) or 'none'}. Type mmft-hf caption refine "
            "FOLDER --steps …"
        )
    workflow = RefineWorkflow(data_args, args, operands[0])
    _print_heading("Plan for refining" if args.dry_run else "Refining", workflow)
    if (started := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        say(
            f"\n  Note: one of the {started} processes refines, and the others end at once. A model behind a server, such as vLLM, uses "
            "several GPUs."
        )
    if args.dry_run:
        _print_plan(workflow)
        return
    result = workflow.run()
    if result.statistics is None:
        say(f"\n{args.output_dir} holds this already: nothing was computed.")
        say(f"\nNext: mmft-hf finetune --dataset_name {shlex.quote(args.output_dir)}")
        return
    _print_steps(result.applied)
    printing.print_folder(args.output_dir, result.statistics)
    say(f"\nBefore and after: {Path(args.output_dir) / REFINED_PAGE}")
    if result.open:
        raise _partial(workflow, result)
    say(f"{printing.next_line(args.output_dir, result.statistics)}")


def _partial(workflow: RefineWorkflow, result: RefineResult) -> PartialResult:
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in result.outcome.failures.most_common(4))
    return PartialResult(
        f"{many(result.open, 'question')} {'has' if result.open == 1 else 'have'} no answer{f' ({kinds})' if kinds else ''}. "
        f"{workflow.args.output_dir} was made without {'it' if result.open == 1 else 'them'}.",
        again=True,
    )


def _print_steps(applied: list[AppliedStep]) -> None:
    say("\ncaptions before      after  without a score  step")
    for number, step in enumerate(applied, 1):
        say(f"{step.before:>15,} {step.after:>10,} {step.unscored:>16,}  {number} {step.step.title}")
    asking = [(number, step) for number, step in enumerate(applied, 1) if step.asked]
    if asking:
        say("\nquestions  unsure  unparsable  unanswered      calls    dollars  step")
    for number, step in asking:
        asked = step.asked
        unanswered, dollars = asked["refused"] + asked["failed"], asked["cost_usd"]
        cost = "unknown" if dollars is None else f"{dollars:.4f}"
        say(
            f"{asked['questions']:>9,} {asked['unsure']:>7,} {asked['unparsable']:>11,} {unanswered:>11,} {asked['calls']:>10,} "
            f"{cost:>10}  {number} {step.step.title}"
        )
    for number, step in enumerate(applied, 1):
        for note in step.told.notes:
            say(f"\nStep {number} {step.step.title}: {printable_text(note)}")


def _print_heading(verb: str, workflow: RefineWorkflow) -> None:
    found: CaptionTable = workflow.table
    captions = sum(len(row.captions()) for row in found.rows)
    say(f"{verb} {workflow.source}\n")
    lines = {
        "split": f"{workflow.train}: {many(len(found.rows), 'image')}, {many(captions, 'caption')}",
        "scorer": f"{workflow.scorer} ({len(found.texts()):,} different texts)"
        if workflow.scorer
        else "none is needed",
        **({"report scorer": workflow.args.report_scorer} if workflow.args.report_scorer else {}),
        **{name: f"{role.captioner.backend} {role.captioner.model}" for name, role in workflow.roles.items()},
        "output": workflow.args.output_dir,
    }
    for number, step in enumerate(workflow.steps, 1):
        options = ", ".join(f"{key} {value}" for key, value in step.typed_options().items())
        lines[f"step {number}"] = f"{step.title}{f' ({options})' if options else ''}: {step.about}"
    table({name: printable_text(str(text)) for name, text in lines.items()})
    compares = any(step.name == "self_retrieval" for step in workflow.steps)
    if compares and found.shared and not workflow.group_column:
        say(
            f"\n  Note: {many(found.shared, 'image')} {'has' if found.shared == 1 else 'have'} all captions in common with another one; "
            "these are not compared with each other. --group_column NAME says better which images show the same thing."
        )
    for step in workflow.steps if workflow.roles else ():
        for caution in step.cautions(workflow.checker.tokens.limit):
            say(f"\n  Note: {printable_text(caution)}")
    for model in workflow.judges_itself():
        say(
            f"\n  Note: {printable_text(model)} judges captions that it wrote itself, which the card tells. Another --judge_model is a "
            "fairer judge."
        )


# -- before a run -----------------------------------------------------------------------------------------------------
def _print_plan(workflow: RefineWorkflow) -> None:
    if not workflow.roles:
        say("\nNo step asks a model, so there are no calls and nothing to pay for. Leave --dry_run out to start.")
        return
    plan = workflow.plan()
    say(
        "\nAt most, from the captions before the first step that asks, without what has to be asked again because it cannot be read:\n"
    )
    say("questions  tokens in  tokens out    dollars  role       step")
    total: float | None = 0.0
    for step in plan:
        for name, count in step.asks.items():
            dollars = step.dollars(workflow.roles[name])
            local = workflow.roles[name].captioner.backend == "transformers"
            dollars = 0.0 if local else dollars
            total = None if dollars is None or total is None else total + dollars
            cost = "unknown" if dollars is None else f"{dollars:.4f}"
            say(
                f"{count:>9,} {step.tokens_in[name]:>10,} {step.tokens_out[name]:>11,} {cost:>10}  {name:<9}  {step.number} "
                f"{step.step.title}"
            )
    _print_cost(workflow, total)
    _print_prompts(plan)
    for role in workflow.roles.values():
        try:
            role.check_key()
        except UserError as error:
            say(f"\nBefore the run: {error}")
    say("\nNothing was asked. Leave --dry_run out to start.")


def _print_cost(workflow: RefineWorkflow, total: float | None) -> None:
    meter, limit = next(iter(workflow.roles.values())).meter, workflow.args.max_cost_usd
    if meter.spent:
        say(f"\nSpent so far: {printing.money(meter.spent)}; what the journal has is not asked again.")
    if total is None:
        unknown = {
            r.captioner.model
            for r in workflow.roles.values()
            if r.captioner.backend != "transformers" and not r.meter.price
        }
        names = printable_text(", ".join(sorted(unknown)))
        say(f"\nNot in the price table: {names}. Type --prices FILE.yaml to name what a million tokens cost.")
    elif limit is not None and meter.spent + total > limit:
        say(f"\n--max_cost_usd {limit:g} will stop it if all of that is needed.")


def _print_prompts(plan: list[PlannedStep]) -> None:
    say("\nQuestions, for example:")
    for step in plan:
        for ask in step.prompts:
            shown = ", ".join(view.what for view in ask.pictures) or "text alone"
            say(f"  [{step.number} {step.step.title} · {ask.role} · {shown}]")
            say(indent(printable_lines(rendered(ask)), "    "))


def printable_lines(text: str) -> str:
    """A text whose lines are printable."""
    return "\n".join(map(printable_text, text.split("\n")))


def report(data_args: DataArguments, args: CaptionArguments, *operands: str) -> None:
    """Shows the captions of a dataset before and after, and writes a page."""
    if len(operands) != 1:
        raise UserError(
            f"caption report: expected one captioned folder, found {' '.join(operands) or 'none'}. Type mmft-hf caption report "
            "FOLDER, perhaps with --compare OTHER."
        )
    figures, page = caption_comparison(
        data_args, operands[0], args.compare, args.metrics or (), args.scorer, args.group_column
    )
    width = max(len(name) for name, _, _ in figures)
    say(f"{'':<{width}}  {'before':>10}  {'after':>10}")
    for name, before, after in figures:
        say(f"{printable_text(name):<{width}}  {before:>10}  {after:>10}")
    say(f"\nThe page: {page}")
