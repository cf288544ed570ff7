"""Columns from metadata files: `metadata.jsonl`, `.csv` or `.parquet`, whose rows name pictures in their folder or below."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets import Dataset, Value, concatenate_datasets

from ..core.arguments import DataArguments
from ..core.console import some
from ..core.errors import UserError
from .columns import LISTS
from .labels import class_label
from .tables import open_files
from .walk import Tree

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"  # the column with a picture's path, relative to the metadata file
_TEXT = (Value("string"), Value("large_string"))


@dataclass
class Metadata:
    """The rows of all metadata files of a folder.

    Args:
        rows: all columns but `file_name`.
        files: the picture of each row, relative to the folder that was opened.
        notes: on rows and files that are not read.
    """

    rows: Dataset
    files: list[str]
    notes: list[str] = field(default_factory=list)

    def row_of(self) -> dict[str, int]:
        return {file: row for row, file in enumerate(self.files)}


def read_metadata(args: DataArguments, tree: Tree, pictures: Sequence[str]) -> Metadata | None:
    """Reads the metadata files of a folder.

    Args:
        pictures: the pictures of the folder. Rows that name others are left out, and counted.

    Returns:
        None if there are no metadata files with a column `file_name`.

    Raises:
        UserError: a file that cannot be read; two rows for a picture; no row names a picture of the folder.
    """
    found = [file for file in tree.files if posixpath.basename(file) in METADATA_FILES]
    if not found:
        return None
    # The pictures are named by `file_name`, so no column holds paths that have to be checked here.
    no_image = replace(args, image_column=FILE_NAME + "?", image_root=None)
    read = open_files(args.dataset_name, {file: [Path(tree.path(file))] for file in found}, no_image)
    opened = {file: rows for file, rows in read.splits.items() if rows.features.get(FILE_NAME) in _TEXT}
    if not opened:
        return None
    there, files, parts, absent = set(pictures), [], [], []
    for file, rows in opened.items():
        folder = posixpath.dirname(file)
        names = [posixpath.normpath(posixpath.join(folder, name or "")) for name in rows[FILE_NAME]]
        names = [name if name in there else name.replace("\\", "/") for name in names]  # as Windows writes paths
        kept = [i for i, name in enumerate(names) if name in there]
        absent += [name for name in names if name not in there]
        files += [names[i] for i in kept]
        parts.append(rows.select(kept).remove_columns(FILE_NAME))
    if not files:
        raise UserError(
            f"{tree.path(found[0])}: expected paths of pictures, relative to this file, in column {FILE_NAME}; found none that "
            f"is there ({some(absent, 2)}). Correct the paths, or take the file away."
        )
    if twice := [file for file, count in Counter(files).items() if count > 1]:
        raise UserError(
            f"{tree.path(found[0])}: expected one row for each picture, found several for {len(twice):,}, for example {twice[0]}. "
            "Merge them: a picture's captions are a list in one row."
        )
    notes = [f"Metadata rows that name no picture of the folder, left out: {len(absent):,} ({some(absent, 2)})."]
    return Metadata(concatenate_datasets(parts), files, read.notes + (notes if absent else []))


def with_metadata(
    args: DataArguments, splits: Mapping[str, Sequence[tuple[str, str | None]]], metadata: Metadata
) -> tuple[dict[str, Sequence[tuple[str, object]]], dict[str, Dataset], list[str]]:
    """Keeps the pictures that metadata lists, in splits where it lists any.

    Returns:
        The pictures of each split, with the label that metadata gives, or else their own; the further columns of each split;
        and a note on pictures that are in no metadata file.

    Raises:
        UserError: labels are numbers in metadata and names of folders in other splits.
    """
    row_of = metadata.row_of()
    rows, label = metadata.rows, args.label_column
    kind = rows.features.get(label)
    values = rows[label][:] if kind else []
    if named := class_label(kind):

        def name(value: int | None) -> str | None:
            return None if value is None or value < 0 else named.names[value]

        lists = isinstance(kind, LISTS)
        values = [(v and list(map(name, v))) if lists else name(v) for v in values]
    columns = [name for name in rows.column_names if name not in (label, "image")]
    pictures, further, left, total = {}, {}, 0, 0
    for split, own in splits.items():
        total += len(own)
        listed = sorted((row_of[file], file, name) for file, name in own if file in row_of)
        if listed:
            left += len(own) - len(listed)
            pictures[split] = [(file, values[row] if kind else name) for row, file, name in listed]
            further[split] = rows.select_columns(columns).select([row for row, _, _ in listed])
        else:
            pictures[split] = list(own)
            further[split] = rows.select_columns(columns).select([])
    labels = {type(value) for own in pictures.values() for _, value in own} - {type(None)}
    if len(labels) > 1:
        raise UserError(
            f"dataset {args.dataset_name!r}: expected class names in column {label!r} of the metadata files, like the folders of "
            f"splits without metadata, found {kind}. Write the names."
        )
    notes = [f"{left:,} of {total:,} images are in no metadata file and are left out."] if left else []
    return pictures, further, metadata.notes + notes
