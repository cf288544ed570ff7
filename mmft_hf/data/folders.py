"""Opens folders: pictures in class folders, pictures with a metadata file, or tables."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Image, NamedSplit, Value
from datasets.features.features import generate_from_arrow_type

from ..core.arguments import DataArguments
from ..core.console import many, some
from ..core.errors import UserError
from ..core.files import CARD_FILE
from .class_folders import has_class_folders, is_split_name, read_layout
from .images import PICTURE_SUFFIXES, UNREADABLE_SUFFIXES
from .mapped import mapped
from .metadata import METADATA_FILES, Metadata, read_metadata, with_metadata
from .raw import RawData, split_role
from .table_folders import card_tables, named_tables, open_tables, packed_tables
from .walk import UNDERSCORE, Tree, walk

_KINDS = {
    "archives, which have to be unpacked": ".zip .tar .gz .tgz .bz2 .xz .zst .7z .rar",
    "text files": ".txt .md .rst .log .html .htm .xml .yaml .yml .json .tsv .mat .pkl",
    "videos": ".mp4 .mov .avi .mkv .webm .m4v .mpg .mpeg .wmv .3gp",
}
_KIND_OF = {suffix: kind for kind, suffixes in _KINDS.items() for suffix in suffixes.split()}
_LISTS = (".csv", ".jsonl", ".parquet")  # the tables that a note recommends


def open_folder(args: DataArguments, path: Path) -> RawData:
    """Opens a folder: tables if it holds nothing else, or a card that names them; otherwise pictures.

    Raises:
        UserError: there is nothing to read, or two ways to read it.
    """
    tree = walk(path)
    pictures = [file for file in tree.files if suffix_of(file) in PICTURE_SUFFIXES]
    metadata = read_metadata(args, tree, pictures) if pictures else None
    classes = has_class_folders(pictures)
    if not metadata:
        tables = card_tables(args, tree)
        if tables is None and not classes:
            tables = named_tables(args, tree)
        if tables:
            return open_tables(args, tree, tables)
    if not pictures:
        raise _nothing(args, tree)
    if classes and not args.class_names and (packed := packed_tables(tree)):
        raise UserError(
            f"dataset {args.dataset_name!r}: expected pictures or tables, found pictures in folders and {some(packed, 2)}. For the "
            f"table type --dataset_name {shlex.quote(str(Path(args.dataset_name) / packed[0]))}; for the pictures move the table "
            "out of the folder."
        )
    return _open_pictures(args, tree, pictures, metadata)


def suffix_of(file: str) -> str:
    """The suffix of a file in small letters, with its dot; empty if it has none."""
    return os.path.splitext(file)[1].lower()


def _open_pictures(args: DataArguments, tree: Tree, pictures: list[str], metadata: Metadata | None) -> RawData:
    """The pictures of the class folders, with what metadata files say about them."""
    labelled = metadata is not None and args.label_column in metadata.rows.column_names
    try:
        layout = read_layout(args, pictures, tree.folders, labelled)
    except UserError as error:
        raise UserError(f"{error.args[0]}{_lists_there(tree, metadata)}") from error
    twice: list[str] = []
    splits = {split: _once(tree, rows, twice) for split, rows in layout.splits.items()}
    notes = list(layout.notes)
    further: dict[str, Dataset] = {}
    if metadata:
        splits, further, found = with_metadata(args, splits, metadata)
        notes += found
    if twice:
        notes.append(f"Links to pictures that are read already, left out: {_counted(twice)}.")
    label = args.label_column if labelled else "label"
    data = DatasetDict(
        {split: _dataset(tree, split, rows, label, further.get(split)) for split, rows in splits.items()}
    )
    return RawData(data, notes + left_out(tree) + _tables_beside(args, tree, metadata is not None))


def _once(tree: Tree, rows: Sequence[tuple[str, str | None]], twice: list[str]) -> list[tuple[str, str | None]]:
    """The pictures of a split. One that several links of one class lead to counts once; the others are added to `twice`."""
    seen, kept = set(), []
    for file, label in rows:
        key = (tree.real(file), label)
        if key in seen:
            twice.append(file)
        else:
            seen.add(key)
            kept.append((file, label))
    return kept


def _dataset(
    tree: Tree, split: str, rows: Sequence[tuple[str, object]], label: str, further: Dataset | None
) -> Dataset:
    """The pictures of a split, undecoded, with their labels and further columns."""
    paths = pa.array([tree.path(file) for file, _ in rows], pa.string())
    images = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
    labels = pa.array([value for _, value in rows])
    kinds = {
        "image": Image(decode=False),
        label: Value("string") if pa.types.is_null(labels.type) else generate_from_arrow_type(labels.type),
    }
    features = Features(kinds)
    table = pa.table([images, labels.cast(features.arrow_schema.field(label).type)], schema=features.arrow_schema)
    # On disk, so that what `datasets.map` makes of it, with all pictures, is on disk, too.
    named = NamedSplit(split) if is_split_name(split) else None
    data = mapped((split, table), features, table.to_batches(), named)
    for column in () if further is None else further.column_names:
        values = further[column][:] if len(further) else [None] * len(data)
        data = data.add_column(column, values, feature=further.features[column])
    return data


def _lists_there(tree: Tree, metadata: Metadata | None) -> str:
    """What may hold the classes where folders do not."""
    if metadata:
        columns = ", ".join(name for name in metadata.rows.column_names)
        return f" The metadata has columns {columns}: if one is the class, type --label_column NAME."
    lists = [file for file in tree.files if suffix_of(file) in (*_LISTS, ".json")]
    return f" A list there ({some(lists, 3)}) may be what --dataset_name should name." if lists else ""


# -- what is left out ------------------------------------------------------------------------------------------------------
def _nothing(args: DataArguments, tree: Tree) -> UserError:
    notes = left_out(tree)
    found = f"found none. {' '.join(notes)}" if notes else "found an empty folder."
    if lists := [file for file in tree.files if _is_list(file) or suffix_of(file) == ".tar"]:
        found = (
            f"found tables whose names do not say which split they are: {some(lists, 4)}. Call them train, validation and test, or "
            f"type --dataset_name {shlex.quote(str(Path(args.dataset_name) / lists[0]))}."
        )
    return UserError(
        f"dataset {args.dataset_name!r}: expected parquet files, or one subfolder of images per class; {found}"
    )


def left_out(tree: Tree) -> list[str]:
    """What is not read, by reason, with examples. A card and licences at the top are not counted."""
    reasons: dict[str, list[str]] = {}
    advice: dict[str, list[str]] = {}
    for file in tree.files:
        name, suffix = file.rpartition("/")[2], suffix_of(file)
        if suffix in PICTURE_SUFFIXES or _is_list(file):
            continue
        if suffix in UNREADABLE_SUFFIXES:
            advice.setdefault(UNREADABLE_SUFFIXES[suffix], []).append(file)
        elif not (file == name and (name == CARD_FILE or name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")))):
            kind = _KIND_OF.get(suffix, "other files") if suffix else "files without a suffix"
            reasons.setdefault(kind, []).append(file)
    notes = [
        f"Pictures that cannot be read, left out: {_counted(files)}. {_sentence(how)}" for how, files in advice.items()
    ]
    for reason, places in tree.left_out.items():
        if reason == UNDERSCORE:
            places = [f"{p} with {many(_count_pictures(tree.path(p)), 'picture')}" for p in places]
        reasons[reason] = places
    if reasons:
        notes.append(
            "Left out: " + "; ".join(f"{reason}: {_counted(found)}" for reason, found in reasons.items()) + "."
        )
    return notes


def _counted(files: Sequence[str]) -> str:
    return f"{len(files):,} ({some(files, 3)})"


def _sentence(advice: str) -> str:
    return f"Type {advice}." if advice.startswith("pip ") else f"{advice[0].upper()}{advice[1:]}."


def _count_pictures(folder: str) -> int:
    return sum(suffix_of(file) in PICTURE_SUFFIXES for file in walk(folder).files)


def _is_list(file: str) -> bool:
    """Whether a file may list pictures and their classes: a table, or a split file of CoOp."""
    name = file.rpartition("/")[2]
    return suffix_of(name) in _LISTS or (name.startswith("split_") and suffix_of(name) == ".json")


def _tables_beside(args: DataArguments, tree: Tree, metadata_read: bool) -> list[str]:
    """A note on the tables that are not read because the labels come from folders."""
    read = METADATA_FILES if metadata_read else ()
    tables = [file for file in tree.files if _is_list(file) and file.rpartition("/")[2] not in read]
    if not tables:
        return []
    best = next((file for file in tables if split_role(Path(file).stem) == "train"), tables[0])
    more = f" and {len(tables) - 3:,} more" if len(tables) > 3 else ""
    return [
        f"Images and labels were read from folders; not read: {', '.join(tables[:3])}{more}. To train on such a table, with its "
        f"captions, type --dataset_name {shlex.quote(str(Path(args.dataset_name) / best))}."
    ]
