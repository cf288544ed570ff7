"""Runs the cells of a benchmark and keeps each result as soon as there is one: a cut grid goes on where it stopped."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path

from ..data import Splits
from ..errors import UserError
from .methods import NEEDS_CAPTIONS, WITHOUT_TRAINING, Workshop, fit
from .protocol import FULL, Cell, SealedTest, Shots, make_task, write_rows

RESULTS_FILE = "results.jsonl"


def cells(methods: Iterable[str], shots: Iterable[Shots], seeds: Iterable[int]) -> list[Cell]:
    """The grid, cheap methods first within each (shots, seed). What needs no images is done once, at 0 shots."""
    methods, found = list(methods), []
    free = [name for name in methods if name in WITHOUT_TRAINING]
    found += [Cell(name, 0, 0) for name in free]
    found += [
        Cell(name, n, seed)
        for n in shots
        for seed in seeds
        for name in methods
        if name not in free and n not in (0, "0")
    ]
    return found


def read_results(path: Path) -> list[dict]:
    """The rows of a results file. A last line that a cut left half-written is passed over."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if i < len(lines) - 1:
                raise UserError(
                    f"{path}: expected JSON in line {i + 1}, found {error}. Type another --output_dir."
                ) from error
    return rows


def append_row(path: Path, row: dict) -> None:
    """Adds a line, whole and on the disk before this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    cut = text[text.rfind("\n") + 1 :]
    with open(path, "r+" if text else "w", encoding="utf-8") as file:
        if cut:  # half a line of a run that was cut
            file.truncate(len(text[: len(text) - len(cut)].encode()))
        file.seek(0, os.SEEK_END)
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run_grid(
    grid: list[Cell],
    shop: Workshop,
    splits: Splits,
    folder: Path,
    identity: dict,
    allow_fewer: bool,
    say: Callable[[str], None],
) -> list[dict]:
    """Runs the cells that have no result yet; returns the rows of all of them.

    A cell that fails is kept as failed, and the others go on; it is tried again by the next run.

    Args:
        identity: what else results depend on (model, data, settings, versions); kept with every row.

    Raises:
        UserError: the folder holds results of another identity.
    """
    path = folder / RESULTS_FILE
    rows = read_results(path)
    for row in rows:
        if row["identity"] != identity:
            differ = sorted(k for k in identity | row["identity"] if identity.get(k) != row["identity"].get(k))
            raise UserError(
                f"--output_dir {folder}: expected results of the same {', '.join(differ)}, found others, which are not to be "
                "averaged with these. Type another --output_dir."
            )
    done = {(row["method"], row["shots"], row["seed"]): row for row in rows if row["status"] == "done"}
    sealed = SealedTest(splits.test, splits.class_names)
    todo = [cell for cell in grid if (cell.method, cell.shots, cell.seed) not in done]
    if len(todo) < len(grid):
        say(f"{len(grid) - len(todo)} of {len(grid)} cells are done already.")
    tasks = {}
    for i, cell in enumerate(todo, 1):
        key = (cell.shots, cell.seed)
        if key not in tasks:
            tasks = {
                key: make_task(splits, cell.shots, cell.seed, allow_fewer)
            }  # the last one alone: they come in order
            write_rows(folder / "subsets", *tasks[key], splits)
        row = {
            "method": cell.method,
            "shots": cell.shots,
            "seed": cell.seed,
            **run_cell(cell, shop, tasks[key][0], sealed),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "identity": identity,
        }
        append_row(path, row)
        done[cell.method, cell.shots, cell.seed] = row
        result = f"{100 * row['test_accuracy']:5.1f} %" if row["status"] == "done" else f"failed: {row['error']}"
        say(f"{i:4}/{len(todo)}  {cell.method:<22} {cell.shots:>4} shots  seed {cell.seed}  {result}")
    return [row for cell in grid if (row := done.get((cell.method, cell.shots, cell.seed)))]


def run_cell(cell: Cell, shop: Workshop, task, sealed: SealedTest) -> dict:
    """Fits a method, and only then has it judged on the test split."""
    try:
        if cell.method in NEEDS_CAPTIONS and not task.has_captions:
            raise UserError(
                "it needs captions, and the training images have none. Run mmft-hf caption, or leave it out"
            )
        fitted = fit(cell.method, shop, task)
        test = sealed.judge(cell, fitted.classifier)
    except Exception as error:  # one cell must not end the others, whatever happens in it
        if not isinstance(error, (UserError, ValueError)):
            traceback.print_exc()
        return {"status": "failed", "error": str(error).strip() or type(error).__name__}
    return {
        "status": "done",
        "selection_policy": fitted.policy,
        "chosen": fitted.chosen,
        "validation_accuracy": fitted.validation_accuracy,
        "test_accuracy": test["accuracy"],
        "test_mean_per_class_accuracy": test["mean_per_class_accuracy"],
        "test_images": test["examples"],
        "train_images": len(task.train),
        "fit_seconds": round(fitted.seconds, 3),
    }


def parse_shots(words: Iterable[str]) -> list[Shots]:
    """`1 4 full` as numbers and `full`.

    Raises:
        UserError: anything else.
    """
    found: list[Shots] = []
    for word in map(str, words):
        if word != FULL and not word.isdigit():
            raise UserError(f"--shots: expected numbers of images per class, or full, found {word!r}.")
        found.append(word if word == FULL else int(word))
    return found
