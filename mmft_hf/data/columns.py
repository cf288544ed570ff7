"""Columns of a dataset: read, replaced and checked without copying the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image, IterableDataset, LargeList, List, Value

from ..core.errors import UserError

NULL = Value("null")  # the type of a column in which no row has a value
TEXT = (Value("string"), Value("large_string"), Value("string_view"))
LISTS = (List, LargeList)
CONTENT = (Value("binary"), Value("large_binary"), Value("binary_view"))
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # how `datasets` stores an `Image`


def column_of(dataset: Dataset, column: str) -> pa.ChunkedArray:
    """The values of a column as they are stored."""
    if dataset._indices is None:
        return dataset.data.column(column)
    return dataset.select_columns([column]).with_format("arrow")[:].column(column)


def with_values(dataset: Dataset, column: str, values, feature) -> Dataset:
    """The dataset with other values in a column, which keeps its place."""
    order, new = dataset.column_names, f"new {column}"  # added first: a table without columns would have no rows
    changed = dataset.add_column(new, values, feature=feature).remove_columns(column).rename_column(new, column)
    return changed.select_columns(order)


def entries_of(values: pa.ChunkedArray) -> tuple[pa.Array, Callable[[pa.Array], pa.Array], np.ndarray]:
    """The entries of all lists of a column, one after the other.

    Returns:
        Also a function that puts other values in the places of the entries, and the row of each entry, int64.
    """
    whole = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
    lengths = pc.fill_null(pc.list_value_length(whole), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())

    def lists(entries: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, entries, mask=whole.is_null())

    return whole.flatten(), lists, np.repeat(np.arange(len(whole)), lengths)


def cast_array(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """The values as another type of Arrow. Fields of structs are matched by name."""
    if values.type == kind:
        return values
    if pa.types.is_run_end_encoded(values.type):
        values = pc.run_end_decode(values)
    if pa.types.is_struct(kind) and pa.types.is_struct(values.type):  # by the names of the fields, whatever their order
        own = {values.type.field(i).name: values.field(i) for i in range(values.type.num_fields)}
        parts = [cast_array(own[f.name], f.type) if f.name in own else pa.nulls(len(values), f.type) for f in kind]
        return pa.StructArray.from_arrays(parts, fields=list(kind), mask=values.is_null())
    try:
        return values.cast(kind)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):  # Arrow has no such cast, or a wrong one (views of lists)
        return pa.array(values.to_pylist(), kind)


def is_image(kind) -> bool:
    """Whether a column's type is a struct of bytes and, perhaps, a path: what other tools make of an `Image`."""
    if not isinstance(kind, Mapping) or not {"bytes"} <= kind.keys() <= {"bytes", "path"}:
        return False
    return kind["bytes"] in (*CONTENT, NULL) and kind.get("path", NULL) in (*TEXT, NULL)


def undecoded(dataset: Dataset, column: str, where: str) -> Dataset:
    """The dataset with a column of pictures as `Image(decode=False)`.

    Args:
        column: images, bytes, structs of bytes and path, or paths, which are relative to the current folder.

    Raises:
        UserError: the column holds something else.
    """
    kind = dataset.features[column]
    if isinstance(kind, Image):
        return dataset.cast_column(column, Image(decode=False))
    values = column_of(dataset, column)
    if kind in TEXT:
        paths = pa.array([os.path.abspath(path) if path else None for path in values.to_pylist()], pa.string())
        stored = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
    elif kind in CONTENT:
        parts = [cast_array(chunk, pa.binary()) for chunk in values.chunks]
        stored = pa.chunked_array(
            [pa.StructArray.from_arrays([part, pa.nulls(len(part), pa.string())], ["bytes", "path"]) for part in parts],
            IMAGE,
        )
    elif is_image(kind):
        stored = pa.chunked_array([cast_array(chunk, IMAGE) for chunk in values.chunks], IMAGE)
    elif kind == NULL:
        stored = pa.nulls(len(dataset), IMAGE)
    else:
        raise UserError(f"{where}: expected images or their paths, found {kind}.")
    return with_values(dataset, column, stored, Image(decode=False))


def check_plain(name: str, dataset) -> None:
    """Raises `UserError` unless this is a `Dataset` whose rows come as they are stored."""
    if not isinstance(dataset, Dataset):
        how = "Give one as a datasets.Dataset, for example with datasets.Dataset.from_dict({…})."
        if isinstance(dataset, Mapping):
            how = f"Give one of its splits: {', '.join(map(repr, dataset))}."
        elif isinstance(dataset, IterableDataset):
            how = "Load it without streaming=True, or collect it: Dataset.from_generator(lambda: iter(dataset))."
        raise UserError(
            f"{name}: expected a datasets.Dataset, whose rows can be counted and drawn in any order, found "
            f"{type(dataset).__name__}. {how}"
        )
    if dataset.format["type"] is not None:
        kind = "a transform" if dataset.format["type"] == "custom" else f"the format {dataset.format['type']!r}"
        raise UserError(
            f"{name}: expected rows as they are stored, found {kind} set by with_transform or set_format, which would not take part: "
            "crops and tokens are made here. Use dataset.with_format(None), and map(…) for what has to stay."
        )
