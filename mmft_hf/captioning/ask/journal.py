"""The journal: every result of a captioning run, committed as it arrives, so that nothing is lost or paid for twice.

One sqlite file per process in `OUTPUT_DIR/journal/`; readers take the union. A result is stored under the key of its
request. Its *slot* names what the plan asked for, so that a second try, under its own key, fills the same slot.

Each result has a digest of its own, because sqlite has no checksums. A result that was damaged on the disk is named and does not
count, so that it is asked for again; the others stay. Results of earlier versions have no digest, and are taken as they are.
"""

from __future__ import annotations

import heapq
import logging
import re
import sqlite3
import time
import uuid
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import closing
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import ClassVar

from ...core.errors import UserError
from ...core.files import InUse, Lock, file_system
from ...core.reading import check_regular
from ...core.schema import shown
from ..types import STATUSES, TERMINAL

TEXT = "key slot call_id image_sha256 label prompt_id aspect status raw_text text checks finish_reason model error_class error"
NUMBERS = "sample reask pending max_tokens tokens_in tokens_out thinking_tokens attempts latency_ms"
COLUMNS = {
    **dict.fromkeys([*TEXT.split(), "run_id"], "TEXT"),
    **dict.fromkeys(NUMBERS.split(), "INTEGER"),
    **dict.fromkeys(("cost", "updated_at"), "REAL"),
}
logger = logging.getLogger(__name__)
# A table of its own: which fields of its requests a run left out, because the server refused them.
LEFT_OUT = ("run_id", "model", "field", "instead", "said")
LONGEST = 200_000  # characters of a text, thinking included
# What each column may hold, as sqlite checks it: the file may come from elsewhere, or be damaged.
FITS = {name: f"{name} IS NULL OR typeof({name}) = 'text' AND length({name}) <= {LONGEST}" for name in COLUMNS}
FITS |= {name: f"typeof({name}) = 'text' AND length({name}) <= 10000" for name in ("key", "slot")}
FITS |= {
    name: f"{name} IS NULL OR typeof({name}) IN ('integer', 'real') AND {name} BETWEEN 0 AND 1e15"
    for name in NUMBERS.split()
}
FITS |= {name: f"typeof({name}) = 'integer' AND {name} BETWEEN 0 AND 1000000" for name in ("pending",)}
FITS["cost"] = "cost IS NULL OR typeof(cost) IN ('real', 'integer') AND cost BETWEEN 0 AND 1e12"
FITS["updated_at"] = "typeof(updated_at) IN ('real', 'integer') AND updated_at BETWEEN 0 AND 1e12"
FITS["status"] = f"typeof(status) = 'text' AND status IN ({', '.join(map(repr, STATUSES))})"
FITS["checks"] = (
    "checks IS NULL OR CASE WHEN typeof(checks) = 'text' AND length(checks) <= 10000 AND json_valid(checks) "
    "THEN json_type(checks) = 'array' AND NOT EXISTS (SELECT 1 FROM json_each(checks) WHERE type <> 'text') ELSE 0 END"
)


def _content(value: Callable[[str], str] = str) -> str:
    """SQL: the content of a row, as `row_digest` takes it, given what stands for each column.

    Texts are taken as their bytes, since damaged ones may be no text at all, and numbers as reals, whatever sqlite stores them as.
    """
    return ", ".join(
        f"CAST({value(name)} AS BLOB)" if kind == "TEXT" else f"{value(name)} + 0.0" for name, kind in COLUMNS.items()
    )


CONTENT = _content()
INTACT = f"(digest IS NULL OR digest = row_digest({CONTENT}))"
OPENED = {"status": "'not_run'", "pending": "0"}
REOPEN = (
    f"UPDATE results SET {', '.join(f'{column} = {value}' for column, value in OPENED.items())}, "
    f"digest = row_digest({_content(lambda column: OPENED.get(column, column))}) WHERE slot = ? AND {INTACT}"
)
# WITHOUT ROWID: one tree in which the tries of a slot are adjacent, and a commit touches one page.
TABLE = (
    f"CREATE TABLE IF NOT EXISTS results ({', '.join(f'{name} {kind}' for name, kind in COLUMNS.items())}, "
    "digest INTEGER, PRIMARY KEY (slot, key)) WITHOUT ROWID"
)
SUMMED = ("tokens_in", "tokens_out", "cost", "attempts")  # asking again adds to what a request cost before
WAIT_S = 60  # for a lock: without a write-ahead log, readers block the writer
# sqlite's write-ahead log needs memory-mapped files, which machines cannot share on these.
NETWORK_FILE_SYSTEMS = frozenset(
    "nfs nfs4 cifs smb3 smbfs lustre beegfs gpfs ceph glusterfs 9p afs orangefs fuse.sshfs fuse.gcsfuse fuse.s3fs fuse.juicefs "
    "fuse.rclone".split()
)


class JournalError(UserError):
    """The journal cannot be written or read: full disk, damaged file, or another process at work."""


class Journal:
    """Writes one file of a journal folder, and holds its lock.

    Args:
        folder: created if missing.
        rank: index of this process; each has its own file.

    Raises:
        JournalError: another process of this rank is at work in the folder.
    """

    def __init__(self, folder: str | Path, rank: int = 0):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.notes: list[str] = []
        try:
            self._lock = Lock(self.folder / f"journal-{rank:05d}.lock", self.folder)
        except InUse as error:
            raise JournalError(str(error)) from error
        self.path = self.folder / f"journal-{rank:05d}.sqlite"
        if not self._lock.held:
            # Without locks another writer would go unnoticed: use a file that only this process knows.
            self.path = self.folder / f"journal-{rank:05d}-{uuid.uuid4().hex[:12]}.sqlite"
        kind = file_system(self.folder)
        shared = not self._lock.held or kind in NETWORK_FILE_SYSTEMS
        if shared:
            self.notes.append(
                f"The journal is on a file system ({kind}) whose locks cannot be trusted, so it is written without a "
                "write-ahead log. Use one machine at a time."
            )
        if self.path.is_file() and not self.path.stat().st_size:
            logger.warning("Note: %s is empty. What it held is asked for again.", self.path)
        try:
            self.path.touch()  # with the permissions that the umask leaves; sqlite would narrow them
            check_regular(self.path)
            self._db = sqlite3.connect(self.path, WAIT_S, isolation_level=None, check_same_thread=False)
            self._db.execute(f"PRAGMA journal_mode={'DELETE' if shared else 'WAL'}")
            # Under NORMAL a killed process loses nothing; a power failure may lose the last answers.
            self._db.execute(f"PRAGMA synchronous={'FULL' if shared else 'NORMAL'}")
            self._db.execute(TABLE)
            _prepare(self._db)
            names = ", ".join(f"{name} TEXT" for name in LEFT_OUT)
            self._db.execute(f"CREATE TABLE IF NOT EXISTS left_out ({names}, PRIMARY KEY (run_id, model, field))")
        except sqlite3.Error as error:
            self._lock.release()
            raise _broken(self.path, error) from error
        names = ", ".join(COLUMNS)
        marks = ", ".join(f":{name}" for name in COLUMNS)

        def updated(c: str) -> str:
            if c not in SUMMED:
                return f"excluded.{c}"
            return f"(CASE WHEN {INTACT} THEN coalesce({c} + excluded.{c}, {c}, excluded.{c}) ELSE excluded.{c} END)"

        update = ", ".join(f"{c} = {updated(c)}" for c in COLUMNS if c not in ("slot", "key"))
        digest, updated_digest = (f"row_digest({_content(value)})" for value in (":{}".format, updated))
        self._put = (
            f"INSERT INTO results ({names}, digest) VALUES ({marks}, {digest}) "
            f"ON CONFLICT (slot, key) DO UPDATE SET {update}, digest = {updated_digest}"
        )

    # -- writing ------------------------------------------------------------------------------------------------------
    def put(self, rows: Sequence[dict]) -> None:
        """Commits rows of `COLUMNS` (missing columns are null) in one transaction."""
        now = time.time()
        rows = [{**dict.fromkeys(COLUMNS), "pending": 0, "updated_at": now, **_storable(row)} for row in rows]
        try:
            with self._db:
                self._db.execute("BEGIN")
                self._db.executemany(self._put, rows)
        except sqlite3.Error as error:
            raise _broken(self.path, error) from error

    def put_left_out(self, run_id: str, model: str, field: str, instead: str | None, said: str) -> None:
        """Records that a run goes on without a field that the server refuses."""
        try:
            row = _storable(dict(zip(LEFT_OUT, (run_id, model, field, instead, said), strict=True)))
            self._db.execute("INSERT OR REPLACE INTO left_out VALUES (?, ?, ?, ?, ?)", list(row.values()))
        except sqlite3.Error as error:
            raise _broken(self.path, error) from error

    def reopen(self, statuses: Iterable[str], among: Container[str]) -> int:
        """Opens slots whose result has one of these statuses, so that the next run asks again. Returns their number.

        Args:
            among: slots that may be opened. Others in the folder belong to pictures, models or prompts that the next run
                does not ask for, and would be left without a result.
        """
        columns = ("key", "slot", "status", "pending", "reask", "updated_at")
        found = ((slot, rows[-1]["status"]) for slot, rows in by_slot(self.folder, columns) if slot in among)
        slots = [(slot,) for slot, status in found if status in statuses]
        for path in journal_files(self.folder):
            db = self._db if path == self.path else sqlite3.connect(path, timeout=WAIT_S, isolation_level=None)
            try:
                _prepare(db)
                with db:
                    db.execute("BEGIN")  # all tries of a slot, including those that were turned down
                    db.executemany(REOPEN, slots)
            except sqlite3.Error as error:
                raise _broken(path, error) from error
            finally:
                if db is not self._db:
                    db.close()
        return len(slots)

    def close(self) -> None:
        """Folds the write-ahead log into the file and releases the lock."""
        self._db.close()
        self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _broken(path: Path, error: sqlite3.Error) -> JournalError:
    what = str(error)
    if "full" in what or "disk I/O" in what:  # the latter also over a quota
        return JournalError(
            f"{path}: expected a disk with room, found: {what}. Make room; what was answered so far is kept."
        )
    return JournalError(
        f"{path}: expected a journal that can be read and written, found: {what}. Nothing was changed. If the file "
        "is damaged, move it away: its answers will be asked for again."
    )


def _storable(row: dict) -> dict:
    """The row without lone surrogates, which JSON and folder names can contain but sqlite and parquet cannot, and with texts of
    at most `LONGEST` characters."""
    return {k: v[:LONGEST].encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in row.items()}


def journal_files(folder: str | Path) -> list[Path]:
    """The files of a journal, in a fixed order."""
    return sorted(Path(folder).glob("journal-*.sqlite"))


def row_digest(*content) -> int:
    """32 bits of the values of `COLUMNS`, texts as bytes in UTF-8. They differ after any damage of up to four bytes in a row."""
    return zlib.crc32(repr(content).encode())


def _prepare(db: sqlite3.Connection) -> None:
    """Makes a file ready to be written: those of earlier versions lack the column of the digests."""
    db.create_function("row_digest", -1, row_digest)
    if not _has_digests(db):
        db.execute("ALTER TABLE results ADD COLUMN digest INTEGER")


def _has_digests(db: sqlite3.Connection) -> bool:
    return db.execute("SELECT 1 FROM pragma_table_info('results') WHERE name = 'digest'").fetchone() is not None


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
            raise _broken(path, error) from error
        logger.warning("Note: %s holds no results.", path)


class _File:
    """One file of a journal, open to be read. Rows that are not as they were written are named and left out."""

    _told: ClassVar[set[tuple]] = set()  # damaged rows that were named: a run reads them several times

    def __init__(self, path: Path):
        check_regular(path)
        self.path, self._db = path, sqlite3.connect(path, timeout=WAIT_S)
        self._db.create_function("intact", -1, self._intact)
        self._digests = _has_digests(self._db)
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
                raise _broken(self.path, sqlite3.DatabaseError(found))
        self._last, self._in_order = b"", True
        yield from self._rows(columns, "1", condition, values)
        if not self._in_order:
            raise _broken(self.path, sqlite3.DatabaseError("results out of order"))

    def rows_of(self, slots: Sequence[str]) -> Iterator[dict]:
        """The rows of some slots."""
        yield from self._rows(tuple(COLUMNS), f"slot IN ({', '.join('?' * len(slots))})", "1", slots)

    def _rows(self, columns: Sequence[str], place: str, condition: str, values: Sequence) -> Iterator[dict]:
        if self._digests:  # first of all: of a damaged row, no value can be trusted
            condition = f"CASE WHEN intact(digest, {CONTENT}) THEN {condition} ELSE 0 END"
        query = f"SELECT {', '.join(columns)}, {_first_misfit(tuple(columns))} FROM results WHERE {place} AND ({condition}) ORDER BY slot"
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


_SLOT, _KEY = (list(COLUMNS).index(name) for name in ("slot", "key"))


def misfit(rows: Sequence[dict]) -> tuple[str, object] | None:
    """The first value that no journal holds, after its column; None if there is none. Such rows must not get into one."""
    names = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
    marks = ", ".join(f":{name}" for name in COLUMNS)
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute(f"CREATE TABLE results ({names})")
        db.executemany(f"INSERT INTO results VALUES ({marks})", map(_storable, rows))
        query = f"SELECT rowid, {_first_misfit(tuple(COLUMNS))} AS wrong FROM results WHERE wrong IS NOT NULL"
        for row, name in db.execute(query):
            return name, rows[row - 1][name]
    return None


@lru_cache
def _first_misfit(columns: tuple[str, ...]) -> str:
    """SQL: the name of the first column whose value does not fit, or null. It takes no time beside the reading."""
    wrong = " ".join(f"WHEN NOT ({FITS[name]}) THEN '{name}'" for name in columns)
    return f"CASE {wrong} END"


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
            raise _broken(path, error) from error
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
            raise _broken(path, error) from error
        return {slot: best(rows) for slot, rows in found.items()}

    def close(self) -> None:
        """Closes the files: a write-ahead log is folded into its file only when no reader has it open."""
        for file in self._files or ():
            file.close()
        self._files = None
