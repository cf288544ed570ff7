"""Runs the cells of a benchmark and keeps each result as soon as there is one: a cut grid goes on where it stopped.

Several processes may run the same grid at once. Each takes the next cells that nobody has; a cell depends on nothing but
itself, so that the numbers are the same for any number of processes (with the same number of threads each, on CPUs).
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from datasets import Dataset

from ...core.errors import UserError
from ...data.splits import Splits
from .context import Context
from .embedding_map import cells_to_show, draw_map, keep_map
from .methods import METHODS, Fitted, fit
from .processes import Claims
from .protocol import FULL, Cell, SealedTest, Shots, Task, make_task, write_rows
from .results import CLAIMS, RESULTS_FILE, SUBSETS, Results, append_row, binding, check_identity, key_of
from .summary import shots_name

WAIT_SECONDS = 1.0  # between two looks at what others have done


def cells(methods: Iterable[str], shots: Iterable[Shots], seeds: Iterable[int]) -> list[Cell]:
    """The grid, each cell once, in the order of `shots`, `seeds` and `methods`. What needs no images is done once, at 0 shots."""
    methods, found = list(methods), []
    free = [name for name in methods if not METHODS[name].needs_images]
    found += [Cell(name, 0, 0) for name in free]
    found += [Cell(name, n, seed) for n in shots for seed in seeds for name in methods if name not in free and n != 0]
    return list(dict.fromkeys(found))  # a seed may have been typed twice


class Grid:
    """The cells of a benchmark, and the folder that their results are kept in.

    Args:
        cells: in the order in which they are run.
        splits: the data; `splits.test` goes to the sealed test and to no method.
        shifts: further splits that every cell is judged on, by name.
        folder: of the results, shared by all processes.
        identity: what else results depend on (model, data, settings, versions); kept with every row.
        allow_fewer: takes what there is of a class with fewer images than shots.
        skip_bad_images: test images that cannot be read count for nothing.
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
        shifts: dict[str, Dataset] | None = None,
        allow_fewer: bool = False,
        skip_bad_images: bool = False,
        say: Callable[[str], None] = print,
    ):
        self.cells, self.splits, self.folder = list(cells), splits, folder
        self.identity, self.allow_fewer, self.say = identity, allow_fewer, say
        self.results = Results(folder / RESULTS_FILE)
        self._before = len(self._all_rows())
        for cell in {cell.shots: cell for cell in reversed(self.cells)}.values():
            make_task(splits, cell.shots, cell.seed, allow_fewer)  # now, not after hours
        self.claims = Claims(folder / CLAIMS)
        self.sealed = SealedTest({"test": splits.test, **(shifts or {})}, splits.class_names, skip_bad_images)
        self._shown = cells_to_show(self.cells)
        self._task: tuple[tuple, Task] | None = None

    def _all_rows(self) -> list[dict]:
        known = len(self.results.rows)
        rows = self.results.refresh()
        check_identity(rows[known:], self.identity, self.folder)
        return binding(rows, self.identity)

    def rows(self) -> list[dict]:
        """The row of each cell that has one; of several, the last that is done, else the last."""
        found: dict[tuple, dict] = {}
        for row in self._all_rows():
            if row["status"] == "done" or found.get(key_of(row), row)["status"] != "done":
                found[key_of(row)] = row
        return [found[key] for cell in self.cells if (key := (cell.method, cell.shots, cell.seed)) in found]

    def open_cells(self) -> list[Cell]:
        """Those without a result. One that failed is tried again, but not by the run in which it failed."""
        rows = self._all_rows()
        done = {key_of(row) for i, row in enumerate(rows) if row["status"] == "done" or i >= self._before}
        return [cell for cell in self.cells if (cell.method, cell.shots, cell.seed) not in done]

    def run(self, context: Context) -> list[dict]:
        """Runs the cells that have no result yet, or waits for those that others are at; returns the rows of all cells.

        A cell that fails is kept as failed, and the others go on. What a process that died was at is taken over.
        """
        while left := self.open_cells():
            if not any(self._run_group(context, group) for group in _groups(left)):
                time.sleep(WAIT_SECONDS)
        return self.rows()

    def _run_group(self, context: Context, group: list[Cell]) -> bool:
        """Runs cells that share a training, if no other process is at them."""
        first = group[0]
        with self.claims.take(f"{_shared(first)} {first.shots} shots seed {first.seed}") as mine:
            # Whoever had them a moment ago may have finished them.
            still_open = set(self.open_cells()) if mine else ()
            for cell in group:
                if cell in still_open:
                    self._run_cell(context, cell)
        return mine

    def _run_cell(self, context: Context, cell: Cell) -> None:
        task = self._task_of(cell)
        found, fitted = run_cell(cell, context, task, self.sealed)
        row = {
            "method": cell.method,
            "shots": cell.shots,
            "seed": cell.seed,
            **found,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "identity": self.identity,
        }
        with self.claims.alone("results"):
            append_row(self.folder / RESULTS_FILE, row)
        if row["status"] == "done":
            result = f"{100 * row['test_accuracy']:5.1f} %  {row['fit_seconds'] + row['test_seconds']:.1f} s"
        else:
            result = f"failed: {row['error']}"
        count = f"{len(self.cells) - len(self.open_cells())}/{len(self.cells)}"
        self.say(f"{count:>9}  {cell.method:<22} {shots_name(cell.shots):>10}  seed {cell.seed}  {result}")
        if cell in self._shown and fitted is not None:
            self._draw(cell, context, fitted)

    def _draw(self, cell: Cell, context: Context, fitted: Fitted) -> None:
        try:
            embed, prototypes = partial(context.embeddings, fitted.model), fitted.head.embeddings.cpu().numpy()
            drawn = draw_map(embed, prototypes, self.splits.validation)
        except Exception as error:  # a picture of a cell costs no result
            self.say(f"{'':>9}  no map of {cell}: {str(error) or type(error).__name__}")
            return
        if drawn:
            with self.claims.alone("maps"):
                keep_map(self.folder, cell, drawn)

    def _task_of(self, cell: Cell) -> Task:
        key = (cell.shots, cell.seed)
        if self._task is None or self._task[0] != key:  # the last one alone: they come in order
            task, rows = make_task(self.splits, cell.shots, cell.seed, self.allow_fewer)
            with self.claims.alone("subsets"):
                write_rows(self.folder / SUBSETS, task, rows, self.splits)
            self._task = key, task
        return self._task[1]


def _groups(grid: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that share a training, in the order of their first ones."""
    found: dict[tuple, list[Cell]] = {}
    for cell in grid:
        found.setdefault((_shared(cell), cell.shots, cell.seed), []).append(cell)
    return list(found.values())


def _shared(cell: Cell) -> str:
    """A name for what a cell shares with other methods: the first method with its training, or itself without one."""
    method = METHODS[cell.method]
    if method.training is None:
        return method.name
    return next(other.name for other in METHODS.values() if other.training is method.training)


def run_cell(cell: Cell, context: Context, task: Task, sealed: SealedTest) -> tuple[dict, Fitted | None]:
    """Fits a method, and only then has it judged on the test split and its shifts."""
    method = METHODS[cell.method]
    try:
        if method.needs_captions and not task.has_captions:
            raise UserError(
                "it needs captions, and the training images have none. Run mmft-hf caption, or leave it out"
            )
        fitted = fit(method, context, task)
        judged = sealed.judge(cell, fitted.classifier)
    except Exception as error:  # one cell must not end the others, whatever happens in it
        if not isinstance(error, (UserError, ValueError)):
            traceback.print_exc()
        return {"status": "failed", "error": str(error).strip() or type(error).__name__}, None
    row = {
        "status": "done",
        "selection_policy": fitted.policy,
        "chosen": fitted.chosen,
        "tried": fitted.tried,
        "steps": fitted.steps,
        "validation_accuracy": fitted.validation_accuracy,
        **judged,
        "train_images": len(task.train),
        "validation_images": len(task.validation),
        "fit_seconds": round(fitted.seconds, 3),
    }
    return row, fitted


def parse_shots(words: Iterable[str]) -> list[Shots]:
    """`1 4 full` as numbers and `full`.

    Raises:
        UserError: anything else.
    """
    found: list[Shots] = []
    for word in map(str, words):
        if word != FULL and not (word.isascii() and word.isdigit()):
            raise UserError(f"--shots: expected numbers of images per class, or full, found {word!r}.")
        found.append(word if word == FULL else int(word))
    return found
