"""Adds captions to a labelled image dataset: written by a multimodal model, or texts that it already has."""

from __future__ import annotations

from ...captioning.arguments import CaptionArguments
from ...core.arguments import DataArguments
from ...core.console import is_main
from ...core.errors import UserError, nearest

POSITIONAL = (
    "action",
    "run (default): caption, or continue; plan: same as --dry_run; status FOLDER: what there is, what failed and why; retry STATUS …: "
    "ask again for results that were rejected, refused, …; bench: time a few calls; export FILE.parquet: write the journal to "
    "one file; import FILE …: read such a file, or JSON files of captions; merge FOLDER …: join several captioned datasets; "
    "refine FOLDER: score, judge and rewrite its captions and keep the best, by --steps; report FOLDER: its captions before and after; "
    "chats FOLDER: write its captions as conversations, to tune a captioner of your own; prices FILE.yaml: write today's prices, for "
    "--prices.",
)
ACTIONS = (
    "run",
    "plan",
    "status",
    "retry",
    "bench",
    "export",
    "import",
    "merge",
    "refine",
    "report",
    "chats",
    "prices",
)
ARGUMENTS = (DataArguments, CaptionArguments)


def run(data_args: DataArguments, args: CaptionArguments, words: list[str]) -> None:
    """Captions the training split, passes the other splits on, and writes a folder that `--dataset_name` opens."""
    action, *operands = words or ["run"]
    if action not in ACTIONS:
        raise UserError(f"caption: expected one of {', '.join(ACTIONS)}, found {action!r}.{nearest(action, ACTIONS)}")
    if action in ("run", "plan", "bench") and operands:
        raise UserError(f"caption {action}: unexpected word {operands[0]!r}. Settings are written --key value.")
    if not is_main() and (args.captioner != "transformers" or action not in ("run", "retry")):
        return  # one process, with many calls in flight, is enough for a server
    if action in ("refine", "report"):
        from . import refining as module
    else:
        from . import actions as module

    if action == "run":
        action = "plan" if args.dry_run else "caption"
    getattr(module, {"import": "import_"}.get(action, action))(data_args, args, *operands)
