"""Runs the cells of a benchmark and keeps each result as soon as it exists, so that an interrupted grid can continue.

Several processes may run the same grid at once. Each takes the next cells that no other process has. A cell depends on nothing
but itself, so the numbers are the same for any number of processes (with the same number of threads each, on CPUs).
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from datasets import Dataset

from ...core.errors import UserError
from ...core.files import no_room
from ...data.splits import Splits, captions_of
from .context import Context
from .methods import AT, METHODS, fit, method_named, weighs
from .processes import Claims
from .protocol import Cell, SealedTest, Shots, Task, make_task, write_rows
from .results import (
    CLAIMS,
    RESULTS_FILE,
    SUBSETS,
    Results,
    append_row,
    binding,
    check_identity,
    identity_of_row,
    key_of,
    latest,
)
from .summary import shots_name

WAIT_SECONDS = 1.0  # between two looks at the results of other processes


def cells(methods: Iterable[str], shots: Iterable[Shots], seeds: Iterable[int]) -> list[Cell]:
    """The grid, in the order of `shots`, `seeds` and `methods`, each cell once. A method that reads no images has one cell at
    0 shots, in front."""
    methods = list(methods)
    known = {name: method_named(name) for name in methods}
    free = [name for name, method in known.items() if method.family == "untuned" and not method.needs_captions]
    found = [Cell(name, 0, 0) for name in free]
    found += [Cell(name, n, seed) for n in shots for seed in seeds for name in methods if name not in free and n != 0]
    return list(dict.fromkeys(found))  # a seed may have been typed twice


class Grid:
    """The cells of a benchmark, and the folder that holds their results.

    Args:
        cells: in the order in which they run.
        splits: the data; `splits.test` goes to the sealed test and to no method.
        folder: of the results, shared by all processes.
        identity: of the results, see `identity`; kept with every row.
        shifts: further splits to evaluate every cell on, by name.
        allow_fewer: takes all images of a class that has fewer than shots.
        skip_bad_images: unreadable test images are not counted; otherwise they are an error.
        say: prints a line.

    Raises:
        UserError: the folder holds results of another identity; a class has fewer images than shots.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        splits: Splits,
        folder: Path,
        identity: dict,
        shifts: Mapping[str, Dataset] | None = None,
        allow_fewer: bool = False,
        skip_bad_images: bool = False,
        say: Callable[[str], None] = print,
    ):
        self.cells, self.splits, self.folder = list(cells), splits, folder
        self.identity, self.allow_fewer, self.say = identity, allow_fewer, say
        self.results = Results(folder / RESULTS_FILE)
        self._before = len(self._all_rows())
        for cell in {cell.shots: cell for cell in reversed(self.cells)}.values():
            make_task(splits, cell.shots, cell.seed, allow_fewer)  # raises an error now, not after hours
        self.claims = Claims(folder / CLAIMS)
        self.sealed = SealedTest({"test": splits.test, **(shifts or {})}, splits.class_names, skip_bad_images)
        self._task: Task | None = None

    def _all_rows(self) -> list[dict]:
        known = len(self.results.rows)
        rows = self.results.refresh()
        check_identity(rows[known:], self.identity, self.folder)
        return binding(rows, self.identity)

    def rows(self) -> list[dict]:
        """The row of each cell that has one, see `results.latest`."""
        found = {key_of(row): row for row in latest(self._all_rows())}
        return [found[cell] for cell in self.cells if cell in found]

    def open_cells(self) -> list[Cell]:
        """The cells without a result. A failed cell is tried again, but not by the process in which it failed."""
        rows = self._all_rows()
        done = {key_of(row) for i, row in enumerate(rows) if row["status"] == "done" or i >= self._before}
        return [cell for cell in self.cells if cell not in done]

    def run(self, context: Context | None) -> list[dict]:
        """Runs the cells without a result, waits for those that other processes run, and returns the rows of all.

        A cell that fails is recorded as failed, and the others continue. Other processes take over the cells of one that died.

        Args:
            context: may be None if no cell is open.
        """
        while left := self.open_cells():
            groups: dict[tuple, list[Cell]] = {}
            for cell in left:
                groups.setdefault((_fitted_with(cell), cell.shots, cell.seed), []).append(cell)
            if not any(self._run_group(context, *key, group) for key, group in groups.items()):
                time.sleep(WAIT_SECONDS)
        return self.rows()

    def _run_group(self, context: Context, name: str, shots: Shots, seed: int, group: list[Cell]) -> bool:
        """Runs cells that share a training, unless another process does."""
        with self.claims.take(f"{name} {shots} shots seed {seed}") as mine:
            still_open = set(self.open_cells()) if mine else ()  # another process may just have finished some
            for cell in group:
                if cell in still_open:
                    self._run_cell(context, cell)
        return mine

    def _run_cell(self, context: Context, cell: Cell) -> None:
        row = {
            **cell._asdict(),
            **run_cell(cell, context, self._task_of(cell), self.sealed),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "identity": identity_of_row(self.identity, method_named(cell.method).captions, weighs(cell.method)),
        }
        with self.claims.alone("results"):
            append_row(self.folder / RESULTS_FILE, row)
        if row["status"] == "done":
            result = f"{100 * row['test_accuracy']:5.1f} %  {row['fit_seconds'] + row['test_seconds']:.1f} s"
        else:
            result = f"failed: {row['error']}"
        count = f"{len(self.cells) - len(self.open_cells())}/{len(self.cells)}"
        self.say(f"{count:>9}  {cell.method:<22} {shots_name(cell.shots):>10}  seed {cell.seed}  {result}")

    def _task_of(self, cell: Cell) -> Task:
        if self._task is None or (self._task.shots, self._task.seed) != (cell.shots, cell.seed):
            # Cells come in order, so that only the last task is kept.
            self._task, rows = make_task(self.splits, cell.shots, cell.seed, self.allow_fewer)
            with self.claims.alone("subsets"):
                write_rows(self.folder / SUBSETS, self._task, rows, self.splits)
        return self._task


def _fitted_with(cell: Cell) -> str:
    """The first method of the table with the training of this cell's method, on the same captions; the method itself if it has none."""
    method = method_named(cell.method)
    if method.training is None:
        return method.name
    first = next(other.name for other in METHODS.values() if other.training is method.training)
    return f"{first}{AT}{method.captions}" if method.captions else first


def run_cell(cell: Cell, context: Context, task: Task, sealed: SealedTest) -> dict:
    """Fits a method and then has it judged on the test split and its shifts. Returns its part of the row."""
    method = method_named(cell.method)
    try:
        task = task.with_captions(method.captions)
        captions = task.train["captions"] if "captions" in task.train.column_names else ()
        if method.needs_captions and not any(map(captions_of, captions)):
            raise UserError(
                "it needs captions, and the training images have none. Run mmft-hf caption, or leave it out"
            )
        fitted = fit(method, context, task)
        judged = sealed.judge(cell, fitted.classifier)
    except Exception as error:  # no failure of one cell may end the others
        if no_room(error):  # but that is none of the cell
            raise
        if not isinstance(error, (UserError, ValueError)):
            traceback.print_exc()
        return {"status": "failed", "error": str(error).strip() or type(error).__name__}
    return {
        "status": "done",
        "selection_policy": fitted.policy,
        "chosen": fitted.chosen,
        "tried": fitted.tried,
        "steps": fitted.steps,
        "images_seen": fitted.images,
        "validation_accuracy": fitted.validation_accuracy,
        **judged,
        "train_images": len(task.train),
        "validation_images": len(task.validation),
        "fit_seconds": round(fitted.seconds, 3),
    }
