"""`mmft-hf caption refine` and `mmft-hf caption report`: they read settings, call the captioning package and print."""

from __future__ import annotations

import shlex
from pathlib import Path

from ...captioning.arguments import CaptionArguments
from ...captioning.caption_table import CaptionTable
from ...captioning.compare import caption_comparison
from ...captioning.refine import RefineWorkflow
from ...core.arguments import DataArguments
from ...core.console import many, printable_text, say, table
from ...core.errors import UserError
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
    if args.dry_run:
        say("\nNo step asks a model, so there are no calls and nothing to pay for. Leave --dry_run out to start.")
        return
    result = workflow.run()
    if result.statistics is None:
        say(f"\n{args.output_dir} holds this already: nothing was computed.")
        say(f"\nNext: mmft-hf finetune --dataset_name {shlex.quote(args.output_dir)}")
        return
    say("\ncaptions before      after  without a score  step")
    for number, applied in enumerate(result.applied, 1):
        say(f"{applied.before:>15,} {applied.after:>10,} {applied.unscored:>16,}  {number} {applied.step.name}")
    printing.print_folder(args.output_dir, result.statistics)
    say(f"\nBefore and after: {Path(args.output_dir) / REFINED_PAGE}")
    say(f"{printing.next_line(args.output_dir, result.statistics)}")


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
        "output": workflow.args.output_dir,
    }
    for number, step in enumerate(workflow.steps, 1):
        options = ", ".join(
            f"{key} {value}"
            for key, value in step.spec().items()
            if key not in ("step", "version") and value is not None
        )
        lines[f"step {number}"] = f"{step.name}{f' ({options})' if options else ''}: {step.about}"
    table({name: printable_text(str(text)) for name, text in lines.items()})
    compares = any(step.name == "self_retrieval" for step in workflow.steps)
    if compares and found.shared and not workflow.group_column:
        say(
            f"\n  Note: {many(found.shared, 'image')} {'has' if found.shared == 1 else 'have'} all captions in common with another one; "
            "these are not compared with each other. --group_column NAME says better which images show the same thing."
        )


def report(data_args: DataArguments, args: CaptionArguments, *operands: str) -> None:
    """Shows the captions of a dataset before and after, and writes a page."""
    if len(operands) != 1:
        raise UserError(
            f"caption report: expected one captioned folder, found {' '.join(operands) or 'none'}. Type mmft-hf caption report "
            "FOLDER, perhaps with --compare OTHER."
        )
    figures, page = caption_comparison(data_args, operands[0], args.compare)
    width = max(len(name) for name, _, _ in figures)
    say(f"{'':<{width}}  {'before':>10}  {'after':>10}")
    for name, before, after in figures:
        say(f"{printable_text(name):<{width}}  {before:>10}  {after:>10}")
    say(f"\nThe page: {page}")
