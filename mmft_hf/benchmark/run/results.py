"""`results.jsonl`, one line of JSON per cell, to which several processes append; and which of its rows may be averaged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from ...core.errors import UserError

RESULTS_FILE = "results.jsonl"
CLAIMS, SUBSETS = "claims", "subsets"  # folders next to it: locks, and the images of each task
FULL = "full"  # stands for a number of shots: all training images


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
        """All rows. A last line without an end, which was interrupted or is being written, is ignored.

        Raises:
            UserError: a line is not a row.
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
    """Raises an error unless the row names its cell properly: tables and file names contain what it says."""
    number = type(row["shots"]) is int or row["shots"] == FULL
    named = isinstance(row["method"], str) and isinstance(row["identity"], dict)
    if not (number and named and type(row["seed"]) is int and row["status"] in ("done", "failed")):
        raise TypeError("method, shots, seed, status or identity of another type")


def read_results(path: Path) -> list[dict]:
    """The rows of a file, without those that failed under another identity; none if there is no file."""
    rows = Results(path).refresh()
    done = [row for row in rows if row["status"] == "done"]
    return binding(rows, (done or rows)[-1]["identity"]) if rows else []


def append_row(path: Path, row: dict) -> None:
    """Appends a line and returns when it is on the disk; half a line, of an interrupted process or a full disk, is removed.

    No other process may write meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        file.truncate(end)
        line = memoryview(json.dumps(row).encode() + b"\n")
        try:
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def key_of(row: dict) -> tuple:
    """The cell of a row."""
    return row["method"], row["shots"], row["seed"]


def latest(rows: Iterable[dict]) -> list[dict]:
    """One row per cell: the last that is done, else the last that failed."""
    found: dict[tuple, dict] = {}
    for row in rows:
        if row["status"] == "done" or found.get(key_of(row), row)["status"] != "done":
            found[key_of(row)] = row
    return list(found.values())


# -- identities --------------------------------------------------------------------------------------------------------------
def differences(one: dict, other: dict, above: str = "") -> list[tuple[str, object, object]]:
    """Where two identities differ: `("settings.learning_rate", 0.001, 0.0001)`.

    The name of the dataset is not compared: its fingerprint says more, and a folder may have been moved.
    """
    found = []
    for key in sorted({*one, *other} - {"dataset"}):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{above}{key}.")
        elif a != b:
            found.append((f"{above}{key}", a, b))
    return found


def binding(rows: Iterable[dict], identity: dict) -> list[dict]:
    """The rows without those that failed under another identity, in which there is nothing to average."""
    return [row for row in rows if row["status"] == "done" or not differences(row["identity"], identity)]


def check_identity(rows: Iterable[dict], identity: dict, folder: Path) -> None:
    """Raises `UserError` where a result has another identity."""
    for row in binding(rows, identity):
        if found := differences(row["identity"], identity):
            what = ", ".join(dict.fromkeys(name.split(".")[0] for name, *_ in found))
            details = "; ".join(_in_words(*difference) for difference in found)
            raise UserError(
                f"--output_dir {folder}: expected results of the same {what}, found others, which are not to be averaged with "
                f"these ({details}). Type another --output_dir, or, to delete them, --overwrite_output_dir true."
            )


def _in_words(name: str, there: object, here: object) -> str:
    """One difference in words. A setting that is missing has its default."""
    part, _, last = name.partition(".")
    if part == "dataset_fingerprint":
        return "the pictures, labels or captions have changed since"
    if part == "shift_splits" and None not in (there, here):
        return f"the pictures or labels of split {last} have changed since"
    if part == "shift_splits":
        return f"--shift_splits {last} {'there' if here is None else 'here'} alone"
    if part == "settings":
        from ...train.config import MMFTConfig

        default = {f.name: getattr(f.default, "value", f.default) for f in fields(MMFTConfig)}.get(last)
        there, here = (default if value is None else value for value in (there, here))
    return f"{last or part} {there} there, {here} here"
