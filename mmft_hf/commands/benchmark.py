"""Compares methods on one dataset under one protocol: the same shots and seeds for all, and a test split that no method can read.

Several processes may work on one grid: the same command in a second terminal, or torchrun and accelerate launch with
recipes/benchmark.py, each with a GPU of its own. Each takes the next free cells.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from ..benchmark.report.page import write_report
from ..benchmark.report.statistics import PER_CLASS
from ..benchmark.report.table import summary_table
from ..benchmark.run.arguments import BenchmarkArguments, BenchmarkData
from ..benchmark.run.config import BenchmarkConfig
from ..benchmark.run.processes import number_of_process
from ..benchmark.run.results import RESULTS_FILE, SUBSETS
from ..benchmark.run.workflow import run_benchmark
from ..core.arguments import ModelArguments
from ..core.console import say
from ..core.errors import PartialResult, UserError

ARGUMENTS = (BenchmarkArguments, ModelArguments, BenchmarkData, BenchmarkConfig)


def run(
    args: BenchmarkArguments, model_args: ModelArguments, data_args: BenchmarkData, config: BenchmarkConfig
) -> None:
    """Runs the cells of the grid that have no result yet, and prints a table of all."""
    if args.report:
        folder = Path(args.report)
        if not folder.exists() and not (folder.parent / RESULTS_FILE).exists():  # for example true
            raise UserError(
                f"--report: expected the --output_dir of a benchmark, found no folder {args.report!r}. Type mmft-hf benchmark "
                f"--report {shlex.quote(str(config.output_dir))}"
            )
        if number_of_process() == 0:
            say(f"Report: {write_report(folder)}")
        return
    result = run_benchmark(args, model_args, data_args, config, say)
    if number_of_process() != 0:
        return
    over_seeds = "in %, mean over seeds, with 95 % interval over seeds"
    if result.uneven:
        say(
            f"\nMean test accuracy over the classes {over_seeds}\n\n{summary_table(result.rows, PER_CLASS)}\n\n{result.uneven}"
        )
    say(f"\nTest accuracy {over_seeds}\n\n{summary_table(result.rows)}")
    if result.note:
        say(f"\n{result.note}")
    for answer in result.refining:
        say(f"\n{answer}")
    folder = result.folder
    say(f"\nEvery cell is a line of {folder / RESULTS_FILE}; which images each task had is in {folder / SUBSETS}.")
    say(f"Report: {result.report}")
    if failed := sum(row["status"] == "failed" for row in result.rows):
        raise PartialResult(f"{failed} of {len(result.rows)} cells failed.", again=True)
