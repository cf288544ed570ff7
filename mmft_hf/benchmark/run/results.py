"""The file of results, one line of JSON per cell: several processes add to it, and a cut leaves no more than half a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from ...core.errors import UserError

RESULTS_FILE = "results.jsonl"
FULL = "full"  # in place of a number of shots: all training images
CLAIMS, SUBSETS = "claims", "subsets"  # folders beside it: locks, and which images each task had


class Results:
    """Reads the rows of a file, and later those that were added meanwhile.

    Args:
        path: the file; need not exist.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict] = []
        self._read = 0

    def refresh(self) -> list[dict]:
        """All rows. A last line without an end, which a cut left or another process is writing, is passed over.

        Raises:
            UserError: a line that is no row.
        """
        if not self.path.is_file():
            return self.rows
        with open(self.path, "rb") as file:
            file.seek(self._read)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        for line in new.splitlines():
            try:
                row = json.loads(line)
                _check_row(row)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path}: expected a result in line {len(self.rows) + 1}, found {error!r}. Type another --output_dir."
                ) from error
            self.rows.append(row)
        self._read += len(new)
        return self.rows


def _check_row(row: dict) -> None:
    """Raises an error unless a row says which cell it is of: what it says stands in tables and file names."""
    number = type(row["shots"]) is int or row["shots"] == FULL
    named = isinstance(row["method"], str) and isinstance(row["identity"], dict)
    if not (number and named and type(row["seed"]) is int and row["status"] in ("done", "failed")):
        raise TypeError("method, shots, seed, status or identity of another type")


def read_results(path: Path) -> list[dict]:
    """The rows of a results file, but for those that failed under another identity than its results; none where there is no file."""
    rows = Results(path).refresh()
    done = [row for row in rows if row["status"] == "done"]
    return binding(rows, (done or rows)[-1]["identity"]) if rows else []


def append_row(path: Path, row: dict) -> None:
    """Adds a line, whole and on the disk before this returns. No other process may write meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        _cut_half_a_line(file)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _cut_half_a_line(file) -> None:
    """Takes away what a process that was cut left of a line."""
    end = position = file.seek(0, os.SEEK_END)
    while position:
        start = max(0, position - 2**16)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            position = start + found + 1
            break
        position = start
    if position < end:
        file.truncate(position)


def key_of(row: dict) -> tuple:
    """Which cell a row is of."""
    return row["method"], row["shots"], row["seed"]


def binding(rows: Iterable[dict], identity: dict) -> list[dict]:
    """The rows without those that failed under another identity: there is nothing in them that could be averaged."""
    return [row for row in rows if row["status"] == "done" or not differences(row["identity"], identity)]


def check_identity(rows: Iterable[dict], identity: dict, folder: Path) -> None:
    """Raises `UserError` where a result depends on other settings, data or versions than `identity`: both would be averaged."""
    for row in binding(rows, identity):
        if found := differences(row["identity"], identity):
            what = ", ".join(dict.fromkeys(name.split(".")[0] for name, *_ in found))
            details = "; ".join(_difference(*difference) for difference in found)
            raise UserError(
                f"--output_dir {folder}: expected results of the same {what}, found others, which are not to be averaged with "
                f"these ({details}). Type another --output_dir, or, to delete them, --overwrite_output_dir true."
            )


def _difference(name: str, there: object, here: object) -> str:
    """One entry of `differences` in words. A setting that is not named has its default, and no hash is shown."""
    last = name.split(".")[-1]
    if name == "dataset_fingerprint":
        return "the pictures, labels or captions have changed since"
    if name.startswith("shift_splits.") and None not in (there, here):
        return f"the pictures or labels of split {last} have changed since"
    if name.startswith("shift_splits."):
        return f"--shift_splits {last} {'there' if here is None else 'here'} alone"
    if name.startswith("settings."):
        from ...train.config import MMFTConfig  # which takes a while

        default = {f.name: getattr(f.default, "value", f.default) for f in fields(MMFTConfig)}.get(last)
        there, here = (default if value is None else value for value in (there, here))
    return f"{last} {there} there, {here} here"


def differences(one: dict, other: dict, above: str = "") -> list[tuple[str, object, object]]:
    """What differs between two identities: `("settings.learning_rate", 0.001, 0.0001)`.

    Not the name of the data, which their fingerprint tells better: a folder may have been moved.
    """
    found = []
    for key in sorted({*one, *other} - {"dataset"}):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{above}{key}.")
        elif a != b:
            found.append((f"{above}{key}", a, b))
    return found
