"""Reads one file of rows: parquet, Arrow, CSV, JSON, or a tar of WebDataset. No picture is decoded."""

from __future__ import annotations

import csv
import io
import json
import shlex
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from datasets.features.features import generate_from_arrow_type

from ..core.arguments import DataArguments
from ..core.errors import UserError
from ..core.files import DETAILS_FILE
from ..core.reading import refuse_pointers
from .columns import IMAGE, cast_array
from .images import PICTURE_SUFFIXES
from .web_tar import read_tar

BATCH_BYTES = 32 * 2**20
MOST_LEVELS = 32  # of lists in lists: libraries recurse over them


@dataclass
class TableFile:
    """The rows of one file.

    Args:
        path: of the file.
        features: its columns and their types, without those that `datasets` adds for speed (views, dictionaries, large types).
        batches: reads the rows, with the storage types of `features`.
        notes: sentences about what was read contrary to what a user may expect.
        text: the rows, if they are text whose types are not known yet, as in a CSV file.
    """

    path: Path
    features: Features
    batches: Callable[[], Iterator[pa.RecordBatch]]
    notes: list[str] = field(default_factory=list)
    text: pa.Table | None = None


def read_table_file(path: Path, args: DataArguments) -> TableFile:
    """Opens a file by its suffix, one of `READERS`.

    Raises:
        UserError: the file is empty, damaged, or not what its suffix says.
    """
    try:
        if not path.stat().st_size:
            raise UserError(f"{path}: expected rows of images and labels, found an empty file. Remove it, or fill it.")
        refuse_pointers(path)
        return READERS[path.suffix.lower()](path, args)
    except UserError:
        raise
    except (pa.ArrowException, tarfile.TarError, OSError, EOFError, ValueError, RecursionError, OverflowError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"{path}: expected a file of type {path.suffix.lower()}, found one that cannot be read ({reason}). Write the file again."
        ) from error


# -- parquet and Arrow ---------------------------------------------------------------------------------------------------
def _parquet(path: Path, args: DataArguments) -> TableFile:
    file = pq.ParquetFile(path)
    size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
    rows = max(1, min(10_000, BATCH_BYTES * file.metadata.num_rows // max(size, 1)))
    return _typed(path, file.schema_arrow, lambda columns: pq.ParquetFile(path).iter_batches(rows, columns=columns))


def _arrow(path: Path, args: DataArguments) -> TableFile:
    def open_file():
        source = pa.memory_map(str(path))
        if source.read(6) == b"ARROW1":  # the format for files; `datasets` writes the one for streams
            reader = pa.ipc.open_file(source)
            return reader.schema, (reader.get_batch(i) for i in range(reader.num_record_batches))
        source.seek(0)
        reader = pa.ipc.open_stream(source)
        return reader.schema, reader

    return _typed(path, open_file()[0], lambda columns: (batch.select(columns) for batch in open_file()[1]))


def _unusual(kind: pa.DataType) -> str | None:
    """Why a type of nested lists and structures cannot be kept, in a few words; None if it can."""
    count, level = 0, [kind]
    while level:
        if any(pa.types.is_struct(part) and part.num_fields == 0 for part in level):
            return "a structure without fields, which parquet cannot hold"
        level = [part.field(i).type for part in level if pa.types.is_nested(part) for i in range(part.num_fields)]
        count += bool(level)
    return f"nested {count} levels deep" if count > MOST_LEVELS else None


def _typed(path: Path, schema: pa.Schema, read: Callable[[list[str]], Iterable[pa.RecordBatch]]) -> TableFile:
    """A file whose columns have types, as `datasets`, pandas, polars or Spark write them."""
    _once(path, schema.names)
    fields, dropped = [], []
    for column in schema:
        if why := _unusual(column.type):
            dropped.append(f"{column.name} ({why})")
            continue
        kind = _plain(column.type)
        try:
            generate_from_arrow_type(kind)
            fields.append(pa.field(column.name, kind))
        except ValueError:
            dropped.append(f"{column.name} ({column.type})")
    plain = pa.schema(fields)
    try:
        features = Features.from_arrow_schema(plain.with_metadata(schema.metadata))
    except Exception as error:  # the file's own description of its columns may hold anything
        raise UserError(
            f"{path}: expected the types of its columns in the file's metadata ('huggingface'), found some that cannot be read "
            f"({type(error).__name__}). Write the file again."
        ) from error

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in read(plain.names):
            columns = [cast_array(batch.column(column.name), column.type) for column in plain]
            yield pa.RecordBatch.from_arrays(columns, schema=plain)

    left = [f"{path.name}: columns of a type that is not read are left out: {', '.join(dropped)}."] if dropped else []
    return TableFile(path, features, batches, left)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type with the same values and neither views, dictionaries, run lengths nor 64-bit offsets."""
    of = pa.types
    if isinstance(kind, pa.BaseExtensionType) and not kind.extension_name.startswith("datasets."):
        return _plain(kind.storage_type)
    if of.is_dictionary(kind) or of.is_run_end_encoded(kind):
        return _plain(kind.value_type)
    if of.is_string_view(kind) or of.is_large_string(kind):
        return pa.string()
    if of.is_binary_view(kind) or of.is_large_binary(kind) or of.is_fixed_size_binary(kind):
        return pa.binary()
    if of.is_fixed_size_list(kind):
        return pa.list_(_plain(kind.value_type), kind.list_size)
    if of.is_list(kind) or of.is_large_list(kind) or of.is_list_view(kind) or of.is_large_list_view(kind):
        return pa.list_(_plain(kind.value_type))
    if of.is_struct(kind):
        return pa.struct([(kind.field(i).name, _plain(kind.field(i).type)) for i in range(kind.num_fields)])
    return kind


def _once(path: Path, names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"{path}: expected each column once, found {', '.join(map(repr, twice))} several times. Rename or remove the others."
        )


# -- text ----------------------------------------------------------------------------------------------------------------
def _decoded(path: Path) -> tuple[str, list[str]]:
    """The text of a file, and a note if it is not in UTF-8."""
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return data.decode("utf-32"), []
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):  # as Excel writes "Unicode text"
        return data.decode("utf-16"), []
    if b"\0" in data:  # UTF-16 without a mark, or a file that is no text
        raise UserError(f"{path}: expected text, found characters with the code 0. Save the file again, as UTF-8.")
    try:
        return data.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        try:
            text, name = data.decode("cp1252"), "Windows-1252"
        except UnicodeDecodeError:
            text, name = data.decode("latin-1"), "Latin-1"
        return text, [f"{path.name} is not in UTF-8 and was read as {name}."]


def _csv(path: Path, args: DataArguments) -> TableFile:
    """Separated by comma, semicolon, tab or bar. Every cell stays the text that it is; an empty one is missing."""
    text, notes = _decoded(path)
    known = {args.image_column, args.label_column}
    separator = None
    if text[:4].lower() == "sep=":  # a hint to Excel
        separator, text = text[4:5], text.partition("\n")[2]
    candidates = [separator] if separator else (["\t"] if path.suffix.lower() == ".tsv" else []) + [",", ";", "\t", "|"]
    headers = {s: _header(text, s) for s in candidates}
    separator = max(candidates, key=lambda s: (len(known & set(headers[s])), len(headers[s])))
    header = [
        name or f"Unnamed: {i}" for i, name in enumerate(headers[separator])
    ]  # pandas leaves out the name of its index
    if not known & set(header) and any(Path(cell).suffix.lower() in PICTURE_SUFFIXES for cell in header):
        raise UserError(
            f"{path}: expected the names of the columns in the first line, found {', '.join(header)[:100]}. Write "
            f"{args.image_column},{args.label_column} above it."
        )
    _once(path, header)
    columns: list[list[str | None]] = [[] for _ in header]
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=separator != "\t"
    )
    limit = csv.field_size_limit(2**31 - 1)
    try:
        for cells in reader:
            if not any(cells) or reader.line_num == 0:
                continue
            if len(cells) > len(header) and not any(cells[len(header) :]):
                cells = cells[: len(header)]
            if len(cells) != len(header):
                raise UserError(
                    f"{path}, line {reader.line_num}: expected {len(header)} cells ({', '.join(header)[:100]}), found {len(cells)}. A "
                    f"text with {separator!r} or a line break in it needs quotes around it."
                )
            for column, cell in zip(columns, cells, strict=True):
                column.append(cell or None)
    except csv.Error as error:
        raise UserError(
            f"{path}, line {reader.line_num}: expected cells separated by {separator!r}, found {error}. Correct the line."
        ) from error
    finally:
        csv.field_size_limit(limit)
    table = pa.table({name: pa.array(cells[1:], pa.string()) for name, cells in zip(header, columns, strict=True)})
    return TableFile(path, Features.from_arrow_schema(table.schema), table.to_batches, notes, table)


def _header(text: str, separator: str) -> list[str]:
    """The first line that is not blank, as cells."""
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=separator != "\t")
        return next(([cell.strip() for cell in row] for row in rows if any(row)), [])
    except csv.Error:
        return []


def _json(path: Path, args: DataArguments) -> TableFile:
    """JSON lines, or one list of objects."""
    text, notes = _decoded(path)
    rows: list = []
    if text.lstrip().startswith("["):
        rows = json.loads(text)
        places = [f"entry {i}" for i in range(len(rows))]
    else:
        places = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    _one_object(path, text)
                    raise UserError(
                        f"{path}, line {number}: expected one JSON object per line, found {line[:60]!r} ({error}). Correct the line."
                    ) from error
                places.append(f"line {number}")
    for row, place in zip(rows, places, strict=True):
        if not isinstance(row, dict):
            raise UserError(f"{path}, {place}: expected a JSON object, found {json.dumps(row)[:60]}. Correct it.")
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            kinds = sorted({type(value).__name__ for value in values if value is not None})
            raise UserError(
                f"{path}, column {name!r}: expected values of one type, found {', '.join(kinds)} ({str(error).splitlines()[0]}). "
                "Write all of them as text, in quotes, or leave the column out."
            ) from error
    return _in_memory(path, pa.table(columns), notes)


def _one_object(path: Path, text: str) -> None:
    """Says what a file that is one JSON object holds, such as the annotations of COCO."""
    try:
        found = json.loads(text)
    except ValueError:
        return
    if path.name == DETAILS_FILE:
        raise UserError(
            f"{path}: expected data, found the record of a captioned dataset. Type its folder: {shlex.quote(str(path.parent))}"
        )
    raise UserError(
        f"{path}: expected JSON lines or a list of objects, one per picture, found one object with {', '.join(map(str, found))[:100]}. "
        "Write a CSV file with the columns image and label."
    )


def _in_memory(path: Path, table: pa.Table, notes: list[str]) -> TableFile:
    file = _typed(path, table.schema, lambda columns: table.select(columns).to_batches())
    return TableFile(path, file.features, file.batches, notes + file.notes)


def _tar(path: Path, args: DataArguments) -> TableFile:
    table, images, notes = read_tar(path, args.label_column)
    table = table.drop_columns([args.image_column] * (args.image_column in table.column_names))
    schema = pa.schema([(args.image_column, IMAGE), *((field.name, field.type) for field in table.schema)])

    def batches(columns: list[str]) -> Iterator[pa.RecordBatch]:
        start = 0
        for pictures in images:
            part = table.slice(start, len(pictures)).combine_chunks().to_batches()
            rest = [part[0].column(name) for name in table.column_names] if part else []
            batch = pa.RecordBatch.from_arrays([cast_array(pictures, IMAGE), *rest], schema=schema)
            yield batch.select(columns)
            start += len(pictures)

    file = _typed(path, schema, batches)
    return TableFile(path, file.features, file.batches, notes + file.notes)


READERS = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _json,
    ".json": _json,
    ".tar": _tar,
}
