"""`results.jsonl`, one line of JSON per cell, to which several processes append; and which of its rows may be averaged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from ...core.arguments import Range
from ...core.errors import UserError
from ...core.reading import open_regular, parse_json
from ...core.records import Count, Share
from ...core.schema import conform
from ...core.seals import note_if_changed, sealed

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
        with open_regular(self.path) as file:
            file.seek(self._read)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        for line in new.splitlines():
            self.rows.append(parse_row(line, f"{self.path}, line {len(self.rows) + 1}"))
        self._read += len(new)
        return self.rows


class ResultsIdentity(TypedDict, total=False):
    """What the rows of a file share, see `identity`."""

    base_model: str
    base_model_revision: str | None
    dataset: str
    dataset_fingerprint: str
    shift_splits: dict[str, str]
    settings: dict
    versions: dict[str, str]
    captions: dict[str, str]


class _Row(TypedDict):
    method: str
    shots: Annotated[int, Range(0)] | Literal["full"]
    seed: int
    status: Literal["done", "failed"]
    identity: ResultsIdentity


class FailedRow(_Row, total=False):
    """A line of `results.jsonl` whose cell failed."""

    error: str
    time: str
    sha256: str


class _DoneRow(_Row):
    test_accuracy: Share
    selection_policy: str


class DoneRow(_DoneRow, total=False):
    """A line of `results.jsonl` whose cell is done."""

    chosen: dict
    steps: int | None
    images_seen: Count | None
    tried: Count
    validation_accuracy: Share | None
    test_mean_per_class_accuracy: Share | None
    test_images: Count
    shift_accuracy: dict[str, Share | None]
    predictions: dict[str, list[int]]
    test_seconds: Annotated[float, Range(0)]
    fit_seconds: Annotated[float, Range(0)]
    train_images: Count
    validation_images: Count
    time: str
    sha256: str


def parse_row(line: bytes, place: str) -> dict:
    """A row of the file. A line is logged if it was changed after it was written.

    Raises:
        UserError: it is not a row.
    """
    remedy = "Type another --output_dir, or remove the line to have its cell run again."
    row = parse_json(line, place, _Row, remedy)
    conform(row, DoneRow if row["status"] == "done" else FailedRow, place, remedy)
    note_if_changed(row, place)
    return row


def read_results(path: Path) -> list[dict]:
    """The rows of a file, without those that failed under another identity; none if there is no file."""
    rows = Results(path).refresh()
    done = [row for row in rows if row["status"] == "done"]
    return binding(rows, joined(row["identity"] for row in reversed(done or rows[-1:]))) if rows else []


def append_row(path: Path, row: dict) -> None:
    """Appends a line and returns when it is on the disk; half a line, of an interrupted process or a full disk, is removed.

    No other process may write meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        file.truncate(end)
        line = memoryview(json.dumps(sealed(row)).encode() + b"\n")
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
OF_METHODS = ("captions", "weights")  # entries of an identity that not all methods read


def identity_of_row(identity: dict, captions: str, weighs: bool = False) -> dict:
    """The identity of a result: that of the grid, with what its method reads and nothing else.

    Args:
        captions: the refined captions that the method reads, by name; empty: those of the dataset.
        weighs: whether it weighs captions.
    """
    rest = {key: value for key, value in identity.items() if key not in OF_METHODS}
    read = {"captions": bool(captions), "weights": weighs}
    return rest | {key: {captions: identity[key][captions]} for key, reads in read.items() if reads}


def joined(identities: Iterable[dict]) -> dict:
    """The identity of results that have no `differences`: each knows only the captions and weights that its method reads."""
    first, *others = identities
    found: dict[str, dict[str, str]] = {}
    for one in (first, *others):
        found |= {key: one[key] | found.get(key, {}) for key in OF_METHODS if one.get(key)}
    return first | found


def differences(one: dict, other: dict, above: str = "") -> list[tuple[str, object, object]]:
    """Where two identities differ: `("settings.learning_rate", 0.001, 0.0001)`.

    The name of the dataset is not compared: its fingerprint says more, and a folder may have been moved. Refined captions and weights
    that one of them does not know are not compared: its method does not read them.
    """
    found = []
    for key in sorted({*one, *other} - {"dataset"}):
        a, b = one.get(key), other.get(key)
        if key in OF_METHODS:
            a, b = (
                {name: value for name, value in (x or {}).items() if name in (y or {})} for x, y in ((a, b), (b, a))
            )
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
    if part == "captions":
        return f"the captions of --refined {last} have changed since"
    if part == "weights":
        there, here = (str(value).split()[0] for value in (there, here))
        return (
            "the scores of the captions have changed since"
            if there == here
            else f"--sample_weight {there} there, {here} here"
        )
    if part == "shift_splits" and None not in (there, here):
        return f"the pictures or labels of split {last} have changed since"
    if part == "shift_splits":
        return f"--shift_splits {last} {'there' if here is None else 'here'} alone"
    if part == "settings":
        from .config import BenchmarkConfig

        defaults = {f.name: getattr(f.default, "value", f.default) for f in fields(BenchmarkConfig)}
        default = (defaults | {"budget": "equal"}).get(last)
        there, here = (default if value is None else value for value in (there, here))
    return f"{last or part} {there} there, {here} here"
