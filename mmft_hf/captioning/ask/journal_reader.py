"""Reading a journal: the rows of all its files that are as they were written, and which of a slot's tries counts.

A result that was damaged on the disk is named and does not count, so that it is asked for again; the others stay.
"""

from __future__ import annotations

import heapq
import logging
import re
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import ClassVar

from ...core.reading import check_regular
from ...core.schema import shown
from ..steps.asking import ROLES
from ..types import TERMINAL
from .journal_table import (
    COLUMNS,
    CONTENT,
    LEFT_OUT,
    WAIT_S,
    JournalError,
    broken,
    first_misfit,
    has_digests,
    journal_files,
    row_digest,
)

logger = logging.getLogger(__name__)
_SLOT, _KEY = (list(COLUMNS).index(name) for name in ("slot", "key"))


def read_rows(
    folder: str | Path, columns: Sequence[str] = tuple(COLUMNS), condition: str = "1", values: Sequence = ()
) -> Iterator[dict]:
    """Rows of all files of a journal that meet a condition, file by file, by slot. A key may occur in several of them: see `best`."""
    for path in journal_files(folder):
        yield from _read_file(path, columns, condition, values)


def _read_file(path: Path, columns: Sequence[str], condition: str = "1", values: Sequence = ()) -> Iterator[dict]:
    try:
        with closing(_File(path)) as file:
            yield from file.all_rows(columns, condition, values)
    except sqlite3.Error as error:
        if "no such table" not in str(error):  # another process has only just created the file
            raise broken(path, error) from error
        logger.warning("Note: %s holds no results.", path)


class _File:
    """One file of a journal, open to be read. Rows that are not as they were written are named and left out."""

    _told: ClassVar[set[tuple]] = set()  # damaged rows that were named: a run reads them several times

    def __init__(self, path: Path):
        check_regular(path)
        self.path, self._db = path, sqlite3.connect(path, timeout=WAIT_S)
        self._db.create_function("intact", -1, self._intact)
        self._digests = has_digests(self._db)
        self._damaged: list[tuple] = []
        self._last, self._in_order = b"", True

    def close(self) -> None:
        self._db.close()

    def all_rows(self, columns: Sequence[str], condition: str = "1", values: Sequence = ()) -> Iterator[dict]:
        """The rows that meet a condition, by slot. The whole file is checked.

        Raises:
            JournalError: pages are damaged, so that results may be missing or cannot be found.
        """
        for (found,) in self._db.execute("PRAGMA quick_check"):
            if found != "ok" and not re.search(r"value in results\.\w+$", found):  # which concerns one row
                raise broken(self.path, sqlite3.DatabaseError(found))
        self._last, self._in_order = b"", True
        yield from self._rows(columns, "1", condition, values)
        if not self._in_order:
            raise broken(self.path, sqlite3.DatabaseError("results out of order"))

    def rows_of(self, slots: Sequence[str]) -> Iterator[dict]:
        """The rows of some slots."""
        yield from self._rows(tuple(COLUMNS), f"slot IN ({', '.join('?' * len(slots))})", "1", slots)

    def _rows(self, columns: Sequence[str], place: str, condition: str, values: Sequence) -> Iterator[dict]:
        if self._digests:  # first of all: of a damaged row, no value can be trusted
            condition = f"CASE WHEN intact(digest, {CONTENT}) THEN {condition} ELSE 0 END"
        query = f"SELECT {', '.join(columns)}, {first_misfit(tuple(columns))} FROM results WHERE {place} AND ({condition}) ORDER BY slot"
        try:
            for *row, name in self._db.execute(query, values):
                found = dict(zip(columns, row, strict=True))
                if name is not None:
                    raise JournalError(
                        f"{self.path}, column {name}: expected what a run writes, found {shown(found[name])}. Nothing was changed. If "
                        "the file is damaged, move it away: its answers will be asked for again."
                    )
                yield found
        finally:
            self._tell()

    def _intact(self, digest, *content) -> bool:
        """Called by sqlite for each row, in their order."""
        slot = content[_SLOT]
        if type(slot) is not bytes or slot < self._last:
            self._in_order = False
        else:
            self._last = slot
        if digest is None or digest == (found := row_digest(*content)):
            return True
        self._damaged.append((str(self.path), slot, content[_KEY], found))
        return False

    def _tell(self) -> None:
        new = [damaged for damaged in dict.fromkeys(self._damaged) if damaged not in self._told]
        self._damaged.clear()
        if new:
            self._told.update(new)
            what = "result is not as it was written" if len(new) == 1 else "results are not as they were written"
            logger.warning(
                "Note: %s: %s %s, e.g. that of key %s: damaged on the disk? What is damaged does not count, and the next run asks for "
                "it again.",
                self.path,
                f"{len(new):,}",
                what,
                new[0][2].decode(errors="replace")[:64] if isinstance(new[0][2], bytes) else new[0][2],
            )


def left_out(folder: str | Path) -> list[dict]:
    """The fields that runs left out, by `LEFT_OUT`, in the order of the runs. Journals of version 0.1 record none."""
    found = []
    for path in journal_files(folder):
        check_regular(path)
        try:
            with closing(sqlite3.connect(path, timeout=WAIT_S)) as db:
                if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'left_out'").fetchone():
                    rows = db.execute(f"SELECT {', '.join(LEFT_OUT)} FROM left_out")
                    found += [dict(zip(LEFT_OUT, row, strict=True)) for row in rows]
        except sqlite3.Error as error:
            raise broken(path, error) from error
    return sorted(found, key=lambda row: (row["run_id"] or "", row["field"] or ""))


def settled_slots(folder: str | Path, max_tokens: int = 0) -> set[str]:
    """Slots that need no further call: their result is final, and no other try was due.

    Args:
        max_tokens: today's token limit. An answer that this limit or a larger one truncated would be truncated again, and is
            left alone.
    """
    marks = ", ".join("?" * len(TERMINAL))
    truncated = "status IN ('truncated', 'empty') AND finish_reason = 'length' AND max_tokens >= ?"
    condition = f"pending = 0 AND (status IN ({marks}) OR ({truncated} AND ? > 0))"
    return {row["slot"] for row in read_rows(folder, ("slot",), condition, (*TERMINAL, max_tokens, max_tokens))}


def unsettled_slots(folder: str | Path) -> set[str]:
    """Slots that have results, but none that settles them."""
    condition = f"(pending = 1 OR status NOT IN ({', '.join('?' * len(TERMINAL))}))"
    return {row["slot"] for row in read_rows(folder, ("slot",), condition, TERMINAL)}


def holds_answers(folder: str | Path) -> bool:
    """Whether a journal is one of steps, whose rows name the role that answered where captions name their prompt."""
    return any(row["prompt_id"] in ROLES for row in islice(read_rows(folder, ("prompt_id",)), 1))


def spent_dollars(folder: str | Path) -> float:
    """Cost of all results so far in US dollars, as far as prices were known."""
    return sum(row["cost"] for row in read_rows(folder, ("cost",), "cost IS NOT NULL"))


def best(rows: Iterable[dict]) -> list[dict]:
    """The history of one slot: one row per try, the one that counts last.

    A key in several files counts once: a final result takes precedence, then an answer after which another try was due,
    then the oldest row. Among the tries, a final one counts, else the latest. So all readers of the same files agree.
    """
    rows = sorted(rows, key=lambda r: (r["key"], not _final(r), r["status"] not in TERMINAL, r["updated_at"]))
    once = {row["key"]: row for row in reversed(rows)}
    return sorted(once.values(), key=lambda r: (_final(r), r["reask"] or 0, r["key"]))


def _final(row: dict) -> bool:
    return row["status"] in TERMINAL and not row["pending"]


def by_slot(folder: str | Path, columns: Sequence[str] = tuple(COLUMNS)) -> Iterator[tuple[str, list[dict]]]:
    """All slots of a journal in order, each with its tries (see `best`); one slot is in memory at a time."""
    files = [_read_file(path, columns) for path in journal_files(folder)]
    for slot, rows in groupby(heapq.merge(*files, key=itemgetter("slot")), key=itemgetter("slot")):
        yield slot, best(rows)


class JournalReader:
    """Looks up slots. It opens the files on first use, when all processes have created theirs."""

    def __init__(self, folder: str | Path):
        self.folder = str(folder)
        self._files: list[_File] | None = None

    def history(self, slots: Sequence[str]) -> dict[str, list[dict]]:
        """The tries of each slot that has results, the one that counts last (see `best`)."""
        found: dict[str, list[dict]] = {}
        path = Path(self.folder)
        try:
            if self._files is None:
                self._files = []
                for path in journal_files(self.folder):
                    self._files.append(_File(path))
            for file in self._files:
                path = file.path
                for row in file.rows_of(slots):
                    found.setdefault(row["slot"], []).append(row)
        except sqlite3.Error as error:
            raise broken(path, error) from error
        return {slot: best(rows) for slot, rows in found.items()}

    def close(self) -> None:
        """Closes the files: a write-ahead log is folded into its file only when no reader has it open."""
        for file in self._files or ():
            file.close()
        self._files = None
