"""The journal: every result of a captioning run, committed as it comes, so that nothing is lost or paid for twice.

One sqlite file per process in `OUTPUT_DIR/journal/`; a reader takes the union. A result is stored under the key of its
request; the *slot* says what the plan asked for, so that a second try, under its own key, answers the same slot.
"""

from __future__ import annotations

import heapq
import os
import socket
import sqlite3
import sys
import time
import uuid
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from ...core.errors import UserError
from ..types import STATUSES, TERMINAL

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TEXT = (
    "key",
    "slot",
    "call_id",
    "image_sha256",
    "label",
    "prompt_id",
    "aspect",
    "status",
    "raw_text",
    "text",
    "checks",
)
TEXT += ("finish_reason", "model", "error_class", "error", "run_id")
COLUMNS = {
    **dict.fromkeys(TEXT, "TEXT"),
    **dict.fromkeys(
        (
            "sample",
            "reask",
            "pending",
            "max_tokens",
            "tokens_in",
            "tokens_out",
            "thinking_tokens",
            "attempts",
            "latency_ms",
        ),
        "INTEGER",
    ),
    **dict.fromkeys(("cost", "updated_at"), "REAL"),
}
SUMMED = ("tokens_in", "tokens_out", "cost", "attempts")  # a request that is asked again adds to what it cost before
WAIT_S = 60  # for a lock: without a write-ahead log, whoever reads holds up the writer
# Memory-mapped files, which sqlite's write-ahead log needs, are not shared between the machines of these.
NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "beegfs", "gpfs", "ceph", "glusterfs", "9p"}
NETWORK_FILE_SYSTEMS |= {"fuse.sshfs", "fuse.gcsfuse", "fuse.s3fs", "fuse.juicefs", "fuse.rclone", "afs", "orangefs"}


class JournalError(UserError):
    """The journal cannot be written or read: a full disk, a damaged file, another process at work."""


class Journal:
    """Writes one file of a journal folder and reads them all.

    Args:
        folder: made if it is missing.
        rank: which process this is; each has its own file.

    Raises:
        JournalError: another process of this rank is at work in the folder.
    """

    def __init__(self, folder: str | Path, rank: int = 0):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.notes: list[str] = []
        self._lock = self._take_lock(rank)
        self.path = self.folder / f"journal-{rank:05d}.sqlite"
        if self._lock is None:
            # Without locks nobody can be told apart from somebody: a file that only this process knows.
            self.path = self.folder / f"journal-{rank:05d}-{uuid.uuid4().hex[:12]}.sqlite"
        kind = file_system(self.folder)
        shared = self._lock is None or kind in NETWORK_FILE_SYSTEMS
        if shared:
            self.notes.append(
                f"The journal is on a file system ({kind}) whose locks cannot be trusted: it is written without a "
                "write-ahead log. Use one machine at a time."
            )
        try:
            self._db = sqlite3.connect(self.path, WAIT_S, isolation_level=None, check_same_thread=False)
            self._db.execute(f"PRAGMA journal_mode={'DELETE' if shared else 'WAL'}")
            # A killed process loses nothing under NORMAL; a machine without power may lose the last answers.
            self._db.execute(f"PRAGMA synchronous={'FULL' if shared else 'NORMAL'}")
            # One tree, in which a commit touches one page: a slot's tries lie together.
            columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
            self._db.execute(f"CREATE TABLE IF NOT EXISTS results ({columns}, PRIMARY KEY (slot, key)) WITHOUT ROWID")
        except sqlite3.Error as error:
            self._give_back()
            raise self._broken(self.path, error) from error
        names = ", ".join(COLUMNS)
        marks = ", ".join(f":{name}" for name in COLUMNS)
        update = ", ".join(
            f"{c} = coalesce({c} + excluded.{c}, {c}, excluded.{c})" if c in SUMMED else f"{c} = excluded.{c}"
            for c in COLUMNS
            if c not in ("slot", "key")
        )
        self._put = f"INSERT INTO results ({names}) VALUES ({marks}) ON CONFLICT (slot, key) DO UPDATE SET {update}"

    # -- writing ------------------------------------------------------------------------------------------------------
    def put(self, rows: Sequence[dict]) -> None:
        """Commits rows of `COLUMNS` (missing ones are null) in one transaction."""
        now = time.time()
        rows = [{**dict.fromkeys(COLUMNS), "pending": 0, "updated_at": now, **_utf8(row)} for row in rows]
        try:
            if len(rows) == 1:
                self._db.execute(self._put, rows[0])
            else:
                self._db.execute("BEGIN")
                self._db.executemany(self._put, rows)
                self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise self._broken(self.path, error) from error

    def reopen(self, statuses: Iterable[str], among: Container[str]) -> int:
        """Opens slots whose result has one of these statuses, so that the next run asks again. Returns how many.

        Args:
            among: slots that may be opened. Others in the folder are of other pictures, models or prompts, which the next
                run does not ask for: they would be without a result.
        """
        statuses = list(statuses)
        for status in statuses:
            if status not in STATUSES:
                raise UserError(f"retry: expected statuses among {', '.join(STATUSES)}, found {status!r}.")
        columns = ("key", "slot", "status", "pending", "reask", "updated_at")
        found = ((slot, rows[-1]["status"]) for slot, rows in by_slot(self.folder, columns) if slot in among)
        slots = [(slot,) for slot, status in found if status in statuses]
        for path in self._paths():
            db = self._db if path == self.path else sqlite3.connect(path, timeout=WAIT_S, isolation_level=None)
            try:
                db.execute("BEGIN")  # all tries of a slot: one that was turned down is forgotten with the next
                db.executemany("UPDATE results SET status = 'not_run', pending = 0 WHERE slot = ?", slots)
                db.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._broken(path, error) from error
            finally:
                if db is not self._db:
                    db.close()
        return len(slots)

    # -- reading ------------------------------------------------------------------------------------------------------
    def rows(self, columns: Sequence[str] = tuple(COLUMNS), where: str = "", values: Sequence = ()) -> Iterator[dict]:
        """Rows of all files, file by file. A key may come from more than one: see `best`."""
        yield from read_rows(self._paths(), columns, where, values)

    def close(self) -> None:
        """Folds the write-ahead log into the file and gives the lock back."""
        self._db.close()
        self._give_back()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _paths(self) -> list[Path]:
        return journal_files(self.folder)

    # -- locks --------------------------------------------------------------------------------------------------------
    def _take_lock(self, rank: int) -> int | None:
        """A lock that ends with this process, however it ends; None where the file system has none."""
        if fcntl is None:
            return None
        path = self.folder / f"journal-{rank:05d}.lock"
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = path.read_text(errors="replace").strip() or "unknown"
            os.close(handle)
            raise JournalError(
                f"{self.folder}: expected to be alone, found another run at work there ({owner}). Wait for it or stop "
                "it, or type another --output_dir."
            ) from error
        except OSError:
            os.close(handle)
            return None
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return handle

    def _give_back(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @staticmethod
    def _broken(path: Path, error: sqlite3.Error) -> JournalError:
        what = str(error)
        if "full" in what or "disk I/O" in what:  # the latter over a quota, too
            return JournalError(
                f"{path}: expected a disk with room, found: {what}. Make room; what was answered so far is kept."
            )
        return JournalError(
            f"{path}: expected a journal that can be read and written, found: {what}. Nothing was changed. If the file "
            "is damaged, move it away: its answers will be asked for again."
        )


def _utf8(row: dict) -> dict:
    """The row without halves of surrogate pairs: JSON and names of folders can hold them, no file of ours can."""
    return {k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in row.items()}


def journal_files(folder: str | Path) -> list[Path]:
    """The files of a journal, in a fixed order."""
    return sorted(Path(folder).glob("journal-*.sqlite"))


def read_rows(paths: Iterable[Path], columns: Sequence[str], where: str = "", values: Sequence = ()) -> Iterator[dict]:
    """Rows of several files, one after the other, without waiting for those who write."""
    for path in paths:
        try:
            db = sqlite3.connect(path, timeout=WAIT_S)
            try:
                for row in db.execute(f"SELECT {', '.join(columns)} FROM results {where}", values):
                    yield dict(zip(columns, row, strict=True))
            finally:
                db.close()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                continue  # another process has just made the file
            raise Journal._broken(path, error) from error
        except sqlite3.Error as error:
            raise Journal._broken(path, error) from error


def settled_slots(folder: str | Path, max_tokens: int = 0) -> set[str]:
    """Slots that need no further call: a result that is final, and after which no other try was due.

    Args:
        max_tokens: the budget of today. What was cut by as much or more would be cut again, and is left alone.
    """
    marks = ", ".join("?" * len(TERMINAL))
    cut = "status IN ('truncated', 'empty') AND finish_reason = 'length' AND max_tokens >= ?"
    where = f"WHERE pending = 0 AND (status IN ({marks}) OR ({cut} AND ? > 0))"
    rows = read_rows(journal_files(folder), ("slot",), where, (*TERMINAL, max_tokens, max_tokens))
    return {row["slot"] for row in rows}


def unsettled_slots(folder: str | Path) -> set[str]:
    """Slots that have results, though none that settles them: few, mostly, beside those that have none."""
    marks = ", ".join("?" * len(TERMINAL))
    where = f"WHERE pending = 1 OR status NOT IN ({marks})"
    return {row["slot"] for row in read_rows(journal_files(folder), ("slot",), where, TERMINAL)}


def spent_dollars(folder: str | Path) -> float:
    """What all results so far cost, in US dollars, as far as prices were known."""
    return sum(row["cost"] or 0.0 for row in read_rows(journal_files(folder), ("cost",), "WHERE cost IS NOT NULL"))


def best(rows: Iterable[dict]) -> list[dict]:
    """The rows of one slot as its history: one per try, the one that counts last.

    A key in several files counts once: a final result beats an answer after which another try was due, that beats the
    others, then the oldest. Of the tries, a final one beats others, then the latest counts. So every reader of the same
    files sees the same.
    """
    rows = sorted(rows, key=lambda r: (r["key"], not _final(r), r["status"] not in TERMINAL, r["updated_at"]))
    once = {row["key"]: row for row in reversed(rows)}
    return sorted(once.values(), key=lambda r: (_final(r), r["reask"], r["key"]))


def _final(row: dict) -> bool:
    return row["status"] in TERMINAL and not row["pending"]


def by_slot(folder: str | Path, columns: Sequence[str] = tuple(COLUMNS)) -> Iterator[tuple[str, list[dict]]]:
    """All slots of a journal folder in order, each with its tries (see `best`); one slot is held at a time."""
    files = [read_rows([path], columns, "ORDER BY slot") for path in journal_files(folder)]
    for slot, rows in groupby(heapq.merge(*files, key=itemgetter("slot")), key=itemgetter("slot")):
        yield slot, best(rows)


class JournalReader:
    """Looks up slots, opened when it is first asked: it can be pickled, and `datasets.map` can start processes with it."""

    def __init__(self, folder: str | Path):
        self.folder = str(folder)
        self._dbs: list[sqlite3.Connection] | None = None

    def __getstate__(self) -> dict:
        return {"folder": self.folder, "_dbs": None}

    def history(self, slots: Sequence[str]) -> dict[str, list[dict]]:
        """For each slot that has results, its tries in order, the one that counts last (see `best`)."""
        if self._dbs is None:
            self._dbs = [sqlite3.connect(path, timeout=WAIT_S) for path in journal_files(self.folder)]
        found: dict[str, list[dict]] = {}
        marks = ", ".join("?" * len(slots))
        query = f"SELECT {', '.join(COLUMNS)} FROM results WHERE slot IN ({marks})"
        for db in self._dbs:
            for row in db.execute(query, list(slots)):
                row = dict(zip(COLUMNS, row, strict=True))
                found.setdefault(row["slot"], []).append(row)
        return {slot: best(rows) for slot, rows in found.items()}

    def close(self) -> None:
        """Lets the files go: only without readers is a write-ahead log folded into its file."""
        for db in self._dbs or ():
            db.close()
        self._dbs = None


def file_system(folder: Path) -> str:
    """The kind of file system that holds a folder (`ext4`, `nfs4`, …), `unknown` where the system does not say."""
    if not sys.platform.startswith("linux"):
        return "unknown"
    place, longest, kind = str(folder.resolve()), -1, "unknown"
    try:
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, mount, name, *_ = line.split()
            mount = mount.replace("\\040", " ")
            inside = place == mount or place.startswith(mount.rstrip("/") + "/")
            if inside and len(mount) >= longest:
                longest, kind = len(mount), name
    except OSError:
        pass
    return kind
