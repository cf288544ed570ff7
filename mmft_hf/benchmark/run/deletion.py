"""`--overwrite_output_dir true`: takes away what an earlier benchmark left in a folder, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from ...core.errors import UserError
from ..report import DRAWN, FIGURES, PAGE
from .data_summary import DATA_FILE
from .embedding_map import MAPS_FILE
from .processes import Claims, count_of_processes
from .results import CLAIMS, RESULTS_FILE, SUBSETS, read_results


def delete_benchmark(folder: Path) -> None:
    """Deletes results, subsets and report. The locks stay: they are empty, and whoever waits at one would wait for nobody.

    Raises:
        UserError: other processes work at it, or would begin to; `results.jsonl` is not that of a benchmark.
    """
    what = f"--overwrite_output_dir true: expected one process at {folder}, found"
    if count_of_processes() > 1:
        raise UserError(
            f"{what} {count_of_processes()}, which would delete each other's results. Type another --output_dir, or delete it "
            "beforehand."
        )
    if not read_results(folder / RESULTS_FILE):
        return  # no benchmark, and so nothing that one left
    claims = Claims(folder / CLAIMS)
    with ExitStack() as held:
        for lock in sorted(claims.folder.glob("*.lock")):
            if not held.enter_context(claims.take(lock.stem)):
                raise UserError(f"{what} another one at {lock.stem}. Wait for its end, or type another --output_dir.")
        _delete(folder, [RESULTS_FILE, DATA_FILE, MAPS_FILE, PAGE])
        _delete(folder / SUBSETS, [path.name for path in (folder / SUBSETS).glob("shots-*_seed-*.json")])
        _delete(folder / FIGURES, [f"{name}.png" for name in DRAWN])
        for inside in (SUBSETS, FIGURES):
            if (folder / inside).is_dir() and not any((folder / inside).iterdir()):
                (folder / inside).rmdir()


def _delete(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)
