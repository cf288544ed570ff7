"""Adds captions to a labelled image data set: written by a multimodal model, or texts that it already has."""

from __future__ import annotations

from ..captioning.arguments import CaptionArguments
from ..core.arguments import DataArguments
from ..core.console import is_main
from ..core.errors import UserError, nearest

POSITIONAL = (
    "action",
    "run (default): caption, or continue; plan: as --dry_run; status: what is there, what failed and why; retry STATUS …: ask "
    "again where the result was rejected, refused, …; bench: time a few calls; export FILE.parquet: the journal as one file; "
    "import FILE …: such a file, or JSON files of captions; merge FOLDER …: several captioned data sets into one.",
)


ACTIONS = ("run", "plan", "status", "retry", "bench", "export", "import", "merge")
ARGUMENTS = (DataArguments, CaptionArguments)


def run(data_args: DataArguments, args: CaptionArguments, words: list[str]) -> None:
    """Captions the training split, passes the others on, and writes a folder that `--dataset_name` opens."""
    action, *operands = words or ["run"]
    if action not in ACTIONS:
        raise UserError(f"caption: expected one of {', '.join(ACTIONS)}, found {action!r}.{nearest(action, ACTIONS)}")
    if action in ("run", "plan", "status", "bench") and operands:
        raise UserError(f"caption {action}: unexpected word {operands[0]!r}. Settings are written --key value.")
    if not is_main() and (args.captioner != "transformers" or action not in ("run", "retry")):
        return  # servers are asked by one process, which has many calls in flight
    if action in ("run", "plan"):
        from ..captioning.jobs import CaptionJob

        job = CaptionJob(data_args, args)
        job.plan() if args.dry_run or action == "plan" else job.run()
    else:
        from ..captioning import tools

        getattr(tools, action + "_" * (action == "import"))(operands, data_args, args)
