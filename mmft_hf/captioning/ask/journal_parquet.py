"""A journal as one parquet file, to publish it on the Hub or move it to another machine."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ...core.errors import UserError
from ...core.files import atomic_write
from ...core.reading import check_regular
from ...core.schema import shown
from ..types import TERMINAL
from .journal import Journal
from .journal_reader import by_slot, read_rows
from .journal_table import COLUMNS, journal_files, misfit

KINDS = {"TEXT": pa.string(), "INTEGER": pa.int64(), "REAL": pa.float64()}


def export_journal(folder: str | Path, file: str | Path) -> int:
    """Writes the union of a journal folder to one parquet file. Returns its number of rows."""
    schema = pa.schema([(name, KINDS[kind]) for name, kind in COLUMNS.items()])
    if not journal_files(folder):
        raise UserError(f"{folder}: expected a journal, found none. Type --output_dir FOLDER of a captioning run.")
    written, rows = 0, (row for _, tries in by_slot(folder) for row in tries)
    with atomic_write(file) as temporary, pq.ParquetWriter(temporary, schema, write_page_checksum=True) as writer:
        while batch := list(islice(rows, 10_000)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            written += len(batch)
    return written


def import_journal(journal: Journal, file: str | Path) -> int:
    """Adds the rows of an exported journal that are not there yet. Returns their number."""
    try:
        check_regular(file)
        source = pq.ParquetFile(file, page_checksum_verification=True)
        missing = [name for name in COLUMNS if name not in source.schema_arrow.names]
    except Exception as error:
        raise UserError(f"{file}: expected an exported journal (parquet), found: {error}.") from error
    if missing:
        raise UserError(
            f"{file}: expected an exported journal, found no column {missing[0]!r}. A captioned dataset is not a journal: "
            "type `mmft-hf caption merge` for that."
        )
    for rows in _batches(source, file):
        if wrong := misfit(rows):
            found = f"{shown(wrong[1])} in column {wrong[0]}, which no run writes"
            raise UserError(f"{file}: expected an exported journal, found {found}. Nothing was imported.")
    known = {row["key"] for row in read_rows(journal.folder, ("key",))}
    done = {row["key"] for row in read_rows(journal.folder, ("key", "status")) if row["status"] in TERMINAL}
    added = 0
    for rows in _batches(source, file):
        # New rows, and results of what failed here.
        wanted = [row for row in rows if row["key"] not in (done if row["status"] in TERMINAL else known)]
        journal.put(wanted)
        added += len(wanted)
    return added


def _batches(source: pq.ParquetFile, file: str | Path) -> Iterator[list[dict]]:
    """Rows with the types that a journal has, some thousands at a time."""
    schema = pa.schema([(name, KINDS[kind]) for name, kind in COLUMNS.items()])
    try:
        for batch in source.iter_batches(10_000, columns=schema.names):
            yield pa.Table.from_batches([batch]).select(schema.names).cast(schema).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        found = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: expected an exported journal, found a damaged file or another: {found}") from error
