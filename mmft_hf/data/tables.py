"""Opens tables of images: any number of files per split, joined by the names of their columns and classes."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets
from datasets.table import cast_array_to_feature

from ..core.arguments import DataArguments
from ..core.builtin import builtin
from ..core.console import some
from ..core.errors import UserError
from .columns import IMAGE, LISTS, NULL, TEXT, column_of, entries_of, undecoded, with_values
from .formats import READERS, TableFile, read_table_file
from .image_paths import resolve_paths
from .labels import MISSING, class_label, joined_names, refuse_outside, renumbered
from .mapped import mapped
from .raw import SPLIT_NAMES, RawData, split_role
from .split_files import read_split_file

_BESIDE = (*SPLIT_NAMES["validation"], *SPLIT_NAMES["test"])
_WHOLE, _DECIMAL = re.compile(r"0|-?[1-9][0-9]{0,17}"), re.compile(r"-?(0|[1-9][0-9]{0,14})\.[0-9]{1,15}")


def open_table(name: str, path: Path, args: DataArguments) -> RawData:
    """Opens one file, and the files of other splits next to a file called `train.…` (same suffix)."""
    suffix = path.suffix.lower()
    if suffix not in READERS:
        pickle = " A pickle can run any code when it is opened: type --dataset_name split_zhou_X.json --shots 16."
        raise UserError(
            f"dataset {name!r}: expected a file of type {', '.join(READERS)}, or a CoOp split file (.json), found "
            f"{path.suffix!r}. For a folder of images type --dataset_name FOLDER.{pickle * (path.suffix == '.pkl')}"
        )
    if suffix == ".json" and (splits := read_split_file(name, args.image_root)):
        return RawData(splits)
    others = _other_splits(path)
    raw = open_files(name, {"train": [path]} | {split: [file] for split, file in others.items()}, args)
    names = [file.name for file in others.values()]
    verb = "are read as further splits" if len(names) > 1 else "is read as a further split"
    note = [f"{' and '.join(names)} next to {path.name} {verb}."] if names else []
    return RawData(raw.splits, note + raw.notes)


def _other_splits(path: Path) -> dict[str, Path]:
    """The files of other splits next to a file called `train.csv` or the like, by the name of their split."""
    if split_role(path.stem) != "train":
        return {}
    suffix = path.suffix.lower()
    beside = sorted(file for file in path.parent.iterdir() if file.suffix.lower() == suffix and file.is_file())
    beside = [file for file in beside if split_role(file.stem) in ("validation", "test")]
    found: dict[str, Path] = {}
    for file in sorted(beside, key=lambda file: (file.stem not in _BESIDE, file.name)):
        word = file.stem.lower()
        found.setdefault(word if word in _BESIDE else split_role(word), file)
    return {word: found[word] for word in _BESIDE if word in found}


def open_files(
    name: str, files: Mapping[str, Sequence[Path]], args: DataArguments, card: Features | None = None
) -> RawData:
    """Opens the files of each split as one dataset. Pictures stay undecoded, and on disk.

    Numbers of classes are those of the file that they stand in: they are joined by the names of the classes. Paths of pictures
    are relative to the file's folder, to the folder of the dataset, or to `--image_root`, and lead nowhere else.

    Args:
        name: what the user typed, for messages.
        files: of each split, in order. Suffixes: `formats.READERS`.
        args: the columns' names and `image_root`.
        card (*optional*): column types that the dataset's card declares, for files that do not know their class names.

    Raises:
        UserError: a file is empty or damaged; a column has other types, or numbers without class names, in another file; a picture
            elsewhere.
    """
    opened = [(split, read_table_file(Path(path), args)) for split, paths in files.items() for path in paths]
    text = [file for _, file in opened if file.text is not None]
    _find_types(text, args)
    root = Path(builtin(args.dataset_name))
    parts: dict[str, list[Dataset]] = {split: [] for split in files}
    for split, file in opened:
        rows = _with_card(_rows_of(file), card)
        folders = [file.path.parent] + [root] * root.is_dir()
        parts[split].append(_with_paths(rows, args.image_column, folders, args.image_root, str(file.path)))
    every = [rows for datasets in parts.values() for rows in datasets]
    places = [str(file.path) for _, file in opened]
    by_file = iter(same_columns(_join_classes(every, places), places))
    splits = {}
    for split, datasets in parts.items():
        rows = [next(by_file) for _ in datasets]
        splits[split] = concatenate_datasets(rows) if len(rows) > 1 else rows[0]
    return RawData(DatasetDict(splits), [note for _, file in opened for note in file.notes])


def _rows_of(file: TableFile) -> Dataset:
    stat = file.path.stat()
    key = file.text if file.text is not None else (str(file.path.resolve()), stat.st_size, stat.st_mtime_ns)
    try:
        return mapped(key, file.features, file.batches())
    except (pa.ArrowException, tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{file.path}: expected rows that can be read and copied to the cache of datasets, found an error "
            f"({str(error).splitlines()[0].rstrip('.')}). Write the file again, or make room there (HF_HOME names its folder)."
        ) from error


def _with_card(rows: Dataset, card: Features | None) -> Dataset:
    """Numbers without names in the file get the names that the card declares."""
    for column, kind in (card or {}).items():
        own = rows.features.get(column)
        listed = isinstance(kind, LISTS) and isinstance(own, LISTS)
        plain = own.feature if listed else own
        if class_label(kind) and listed == isinstance(kind, LISTS) and _is_whole(plain):
            rows = with_values(rows, column, column_of(rows, column), kind)
    return rows


def _is_whole(kind) -> bool:
    return isinstance(kind, Value) and kind.dtype.startswith(("int", "uint"))


# -- text without types ----------------------------------------------------------------------------------------------------
def _find_types(files: Sequence[TableFile], args: DataArguments) -> None:
    """Finds the columns of CSV files that hold numbers in all files. Whatever is not written as a number stays text.

    `007`, `1e3`, `1.10`, `nan`, `NA` and `true` are text: as numbers they would lose their spelling.
    """
    for column in dict.fromkeys(name for file in files for name in file.text.column_names):
        if column in (args.image_column, args.captions_column, "captions"):
            continue
        chunks = [file.text[column] for file in files if column in file.text.column_names]
        kind = _number_type({value for chunk in chunks for value in pc.unique(chunk).to_pylist()} - {None})
        if kind is not None:
            for file in files:
                if column in file.text.column_names:
                    place = file.text.column_names.index(column)
                    file.text = file.text.set_column(place, column, file.text[column].cast(kind))
    for file in files:
        file.features, file.batches = Features.from_arrow_schema(file.text.schema), file.text.to_batches


def _number_type(values: set[str]) -> pa.DataType | None:
    if not values or not all(_WHOLE.fullmatch(v) or (_DECIMAL.fullmatch(v) and repr(float(v)) == v) for v in values):
        return None
    return pa.int64() if all(map(_WHOLE.fullmatch, values)) else pa.float64()


# -- pictures beside the table -----------------------------------------------------------------------------------------------
def _with_paths(rows: Dataset, column: str, folders: Sequence[Path], image_root: str | None, where: str) -> Dataset:
    """Makes paths of pictures absolute, in a column of text or of images without bytes, and checks where they lead."""
    if column not in rows.features:
        return rows
    where = f"{where}, column {column!r}"
    if rows.features[column] in TEXT:
        paths = pa.array(resolve_paths(rows[column][:], folders, image_root, where), pa.string())
        stored = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
        return with_values(rows, column, stored, Image(decode=False))
    rows = undecoded(rows, column, where)
    chunks = column_of(rows, column).chunks
    outside = [chunk.field("path").filter(chunk.field("bytes").is_null()) for chunk in chunks]
    paths = iter(resolve_paths([path for part in outside for path in part.to_pylist()], folders, image_root, where))
    if not any(map(len, outside)):
        return rows
    stored = []
    for chunk in chunks:
        content, own = chunk.field("bytes"), chunk.field("path").to_pylist()
        own = [next(paths) if empty else path for path, empty in zip(own, content.is_null().to_pylist(), strict=True)]
        stored.append(pa.StructArray.from_arrays([content, pa.array(own, pa.string())], ["bytes", "path"]))
    return with_values(rows, column, pa.chunked_array(stored, IMAGE), Image(decode=False))


# -- columns of all files ------------------------------------------------------------------------------------------------------
def _join_classes(parts: Sequence[Dataset], places: Sequence[str]) -> list[Dataset]:
    """Gives the classes of all files one list of names."""
    parts = list(parts)
    for column in dict.fromkeys(name for rows in parts for name in rows.column_names):
        kinds = [rows.features.get(column) for rows in parts]
        named = [kind for kind in kinds if class_label(kind)]
        if not named or all(kind in (named[0], None, NULL) for kind in kinds):
            continue
        inner = [kind.feature if isinstance(kind, LISTS) else kind for kind in kinds]
        as_text = any(kind in TEXT for kind in inner)
        names = joined_names(class_label(kind).names for kind in named)
        for i, (rows, kind, place) in enumerate(zip(parts, inner, places, strict=True)):
            if kind in (None, NULL) or kind in TEXT:
                continue
            where, values, listed = f"{place}, column {column!r}", column_of(rows, column), isinstance(kinds[i], LISTS)
            lists = row_of = None
            if listed:
                entries, lists, row_of = entries_of(values)
                values = pa.chunked_array([entries])
            if isinstance(kind, ClassLabel):
                codes = pc.fill_null(values, MISSING).to_numpy()
                refuse_outside(codes, len(kind.names), where, kind.names, row_of=row_of)
                codes = renumbered(codes, kind.names, names)
            elif set(pc.unique(values).to_pylist()) <= {None, MISSING}:
                codes = np.full(len(values), MISSING)
            else:
                known = next(p for p, other in zip(places, kinds, strict=True) if class_label(other))
                raise UserError(
                    f"{where}: expected the names of classes, as {known} has them ({some(names)}), found {kinds[i]}. Nothing says "
                    "which numbers are which classes: write the names into this file."
                )
            values, feature = pa.array(codes, mask=codes == MISSING), ClassLabel(names=names)
            if as_text:
                values, feature = pa.array(names, pa.string()).take(values), Value("string")
            if listed:
                values, feature = lists(values), List(feature)
            parts[i] = with_values(rows, column, values, feature)
    return parts


def same_columns(parts: Sequence[Dataset], places: Sequence[str]) -> list[Dataset]:
    """Gives all parts the columns of all, with the same types: captions may be in the training file alone.

    Args:
        places: what the parts are called in messages.
    """
    features: dict = {}
    first: dict[str, str] = {}
    for rows, place in zip(parts, places, strict=True):
        for column, kind in rows.features.items():
            if features.get(column, NULL) in (NULL, List(NULL)):
                features[column], first[column] = kind, place
    same = []
    for rows, place in zip(parts, places, strict=True):
        for column, kind in features.items():
            if column not in rows.features:
                rows = rows.add_column(
                    column, pa.nulls(len(rows), Features({column: kind}).arrow_schema.field(0).type), feature=kind
                )
            elif rows.features[column] != kind:
                try:
                    rows = with_values(rows, column, cast_array_to_feature(column_of(rows, column), kind), kind)
                except (TypeError, ValueError, NotImplementedError) as error:
                    raise UserError(
                        f"{place}, column {column!r}: expected {kind} as in {first[column]}, found {rows.features[column]}. Use the "
                        "same type in both."
                    ) from error
        same.append(rows.select_columns(list(features)))
    return same
