"""The journal: every result of a captioning run, committed as it arrives, so that nothing is lost or paid for twice.

One sqlite file per process in `OUTPUT_DIR/journal/`; readers take the union (`journal_reader`). A result is stored under the key
of its request. Its *slot* names what the plan asked for, so that a second try, under its own key, fills the same slot.
"""

from __future__ import annotations

import logging
import sqlite3
import time
import uuid
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from ...core.files import InUse, Lock, file_system
from ...core.reading import check_regular
from .journal_reader import by_slot
from .journal_table import (
    COLUMNS,
    INTACT,
    LEFT_OUT,
    TABLE,
    WAIT_S,
    JournalError,
    broken,
    content,
    has_digests,
    journal_files,
    row_digest,
    storable,
)

logger = logging.getLogger(__name__)
OPENED = {"status": "'not_run'", "pending": "0"}
REOPEN = (
    f"UPDATE results SET {', '.join(f'{column} = {value}' for column, value in OPENED.items())}, "
    f"digest = row_digest({content(lambda column: OPENED.get(column, column))}) WHERE slot = ? AND {INTACT}"
)
SUMMED = ("tokens_in", "tokens_out", "cost", "attempts")  # asking again adds to what a request cost before
# sqlite's write-ahead log needs memory-mapped files, which machines cannot share on these.
NETWORK_FILE_SYSTEMS = frozenset(
    "nfs nfs4 cifs smb3 smbfs lustre beegfs gpfs ceph glusterfs 9p afs orangefs fuse.sshfs fuse.gcsfuse fuse.s3fs fuse.juicefs "
    "fuse.rclone".split()
)


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
            raise broken(self.path, error) from error
        names = ", ".join(COLUMNS)
        marks = ", ".join(f":{name}" for name in COLUMNS)

        def updated(c: str) -> str:
            if c not in SUMMED:
                return f"excluded.{c}"
            return f"(CASE WHEN {INTACT} THEN coalesce({c} + excluded.{c}, {c}, excluded.{c}) ELSE excluded.{c} END)"

        update = ", ".join(f"{c} = {updated(c)}" for c in COLUMNS if c not in ("slot", "key"))
        digest, updated_digest = (f"row_digest({content(value)})" for value in (":{}".format, updated))
        self._put = (
            f"INSERT INTO results ({names}, digest) VALUES ({marks}, {digest}) "
            f"ON CONFLICT (slot, key) DO UPDATE SET {update}, digest = {updated_digest}"
        )

    # -- writing ------------------------------------------------------------------------------------------------------
    def put(self, rows: Sequence[dict]) -> None:
        """Commits rows of `COLUMNS` (missing columns are null) in one transaction."""
        now = time.time()
        rows = [{**dict.fromkeys(COLUMNS), "pending": 0, "updated_at": now, **storable(row)} for row in rows]
        try:
            with self._db:
                self._db.execute("BEGIN")
                self._db.executemany(self._put, rows)
        except sqlite3.Error as error:
            raise broken(self.path, error) from error

    def put_left_out(self, run_id: str, model: str, field: str, instead: str | None, said: str) -> None:
        """Records that a run goes on without a field that the server refuses."""
        try:
            row = storable(dict(zip(LEFT_OUT, (run_id, model, field, instead, said), strict=True)))
            self._db.execute("INSERT OR REPLACE INTO left_out VALUES (?, ?, ?, ?, ?)", list(row.values()))
        except sqlite3.Error as error:
            raise broken(self.path, error) from error

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
                raise broken(path, error) from error
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


def _prepare(db: sqlite3.Connection) -> None:
    """Makes a file ready to be written: those of earlier versions lack the column of the digests."""
    db.create_function("row_digest", -1, row_digest)
    if not has_digests(db):
        db.execute("ALTER TABLE results ADD COLUMN digest INTEGER")
