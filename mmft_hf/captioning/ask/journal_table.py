"""What a journal holds: the columns of its table, what fits into each, and the digest of a row.

Each result has a digest of its own, because sqlite has no checksums. Results of version 0.1 have none, and are taken as they are.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path

from ...core.errors import UserError
from ..types import STATUSES

TEXT = "key slot call_id image_sha256 label prompt_id aspect status raw_text text checks finish_reason model error_class error"
NUMBERS = "sample reask pending max_tokens tokens_in tokens_out thinking_tokens attempts latency_ms"
COLUMNS = {
    **dict.fromkeys([*TEXT.split(), "run_id"], "TEXT"),
    **dict.fromkeys(NUMBERS.split(), "INTEGER"),
    **dict.fromkeys(("cost", "updated_at"), "REAL"),
}
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


def content(value: Callable[[str], str] = str) -> str:
    """SQL: the content of a row, as `row_digest` takes it, given what stands for each column.

    Texts are taken as their bytes, since damaged ones may be no text at all, and numbers as reals, whatever sqlite stores them as.
    """
    return ", ".join(
        f"CAST({value(name)} AS BLOB)" if kind == "TEXT" else f"{value(name)} + 0.0" for name, kind in COLUMNS.items()
    )


CONTENT = content()
INTACT = f"(digest IS NULL OR digest = row_digest({CONTENT}))"
# WITHOUT ROWID: one tree in which the tries of a slot are adjacent, and a commit touches one page.
TABLE = (
    f"CREATE TABLE IF NOT EXISTS results ({', '.join(f'{name} {kind}' for name, kind in COLUMNS.items())}, "
    "digest INTEGER, PRIMARY KEY (slot, key)) WITHOUT ROWID"
)
WAIT_S = 60  # for a lock: without a write-ahead log, readers block the writer


class JournalError(UserError):
    """The journal cannot be written or read: full disk, damaged file, or another process at work."""


def broken(path: Path, error: sqlite3.Error) -> JournalError:
    """What to tell the user of an error of SQLite at a journal file: a full disk, or a damaged file."""
    what = str(error)
    if "full" in what or "disk I/O" in what:  # the latter also over a quota
        return JournalError(
            f"{path}: expected a disk with room, found: {what}. Make room; what was answered so far is kept."
        )
    return JournalError(
        f"{path}: expected a journal that can be read and written, found: {what}. Nothing was changed. If the file "
        "is damaged, move it away: its answers will be asked for again."
    )


def storable(row: dict) -> dict:
    """The row without lone surrogates, which JSON and folder names can contain but sqlite and parquet cannot, and with texts of
    at most `LONGEST` characters."""
    return {k: v[:LONGEST].encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in row.items()}


def journal_files(folder: str | Path) -> list[Path]:
    """The files of a journal, in a fixed order."""
    return sorted(Path(folder).glob("journal-*.sqlite"))


def row_digest(*content) -> int:
    """32 bits of the values of `COLUMNS`, texts as bytes in UTF-8. They differ after any damage of up to four bytes in a row."""
    return zlib.crc32(repr(content).encode())


def has_digests(db: sqlite3.Connection) -> bool:
    """Whether the results have checksums; older journals have none."""
    return db.execute("SELECT 1 FROM pragma_table_info('results') WHERE name = 'digest'").fetchone() is not None


def misfit(rows: Sequence[dict]) -> tuple[str, object] | None:
    """The first value that no journal holds, after its column; None if there is none. Such rows must not get into one."""
    names = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
    marks = ", ".join(f":{name}" for name in COLUMNS)
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute(f"CREATE TABLE results ({names})")
        db.executemany(f"INSERT INTO results VALUES ({marks})", map(storable, rows))
        query = f"SELECT rowid, {first_misfit(tuple(COLUMNS))} AS wrong FROM results WHERE wrong IS NOT NULL"
        for row, name in db.execute(query):
            return name, rows[row - 1][name]
    return None


@lru_cache
def first_misfit(columns: tuple[str, ...]) -> str:
    """SQL: the name of the first column whose value does not fit, or null. It takes no time beside the reading."""
    wrong = " ".join(f"WHEN NOT ({FITS[name]}) THEN '{name}'" for name in columns)
    return f"CASE {wrong} END"
