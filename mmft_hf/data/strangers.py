"""Pictures to be classified, wherever they lie, and pictures of classes that a classifier does not know."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image

from ..core.arguments import DataArguments
from ..core.builtin import builtin
from ..core.console import plain, some
from ..core.errors import UserError
from .columns import column_of, undecoded
from .folders import left_out, suffix_of
from .images import PICTURE_SUFFIXES
from .labels import named_labels, same_name
from .sources import open_source
from .walk import walk


def find_images(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The given files, and the pictures in the given folders and below, sorted; and notes on what was left out of the folders.

    Raises:
        UserError: nothing given, no such file, or a folder without pictures.
    """
    if not arguments:
        raise UserError("predict: expected pictures or folders, found none. Type mmft-hf predict PICTURE.jpg.")
    files, notes = [], []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            tree = walk(path)
            found = [os.path.join(argument, file) for file in tree.files if suffix_of(file) in PICTURE_SUFFIXES]
            about = [plain(f"{argument}: {note}") for note in left_out(tree)]
            if not found:
                known = ", ".join(sorted(PICTURE_SUFFIXES))
                raise UserError(
                    " ".join([f"{argument}: expected pictures in this folder ({known}), found none.", *about])
                )
            files += found
            notes += about
        elif path.is_file():
            files.append(argument)
        else:
            raise UserError(f"{argument}: expected a picture or a folder, found nothing there.")
    return files, notes


def unknown_pictures(
    data_args: DataArguments, name: str, class_names: list[str], splits: Mapping[str, Dataset] | None = None
) -> tuple[Dataset, list[str]]:
    """The pictures of a split, or of a folder, that have none of these classes, all with the label 0; and what was left out.

    Args:
        name: of the split, or the path of the folder, below the data or anywhere.
        splits (*optional*): the splits, in place of those of `data_args.dataset_name`.

    Raises:
        UserError: there is no such split or folder, or no picture in it of another class.
    """
    splits = open_source(data_args).splits if splits is None else splits
    column = data_args.image_column
    places = (Path(builtin(data_args.dataset_name)) / name, Path(name))
    if name in splits:
        rows = splits[name]
        if column not in rows.column_names:
            raise UserError(
                f"--unknown_split {name}: expected images in column {column!r}, found {some(rows.column_names)}. Type "
                "--image_column NAME."
            )
        new = _of_other_classes(rows, data_args.label_column, class_names)
        own = f"{len(rows) - len(new):,} of {len(rows):,} images of {name!r} are of the classifier's own classes and are left out."
        notes = [own] if len(new) < len(rows) else []
    elif folder := next((place for place in places if place.is_dir()), None):
        files, notes = find_images([str(folder)])
        rows, column, new = Dataset.from_dict({"image": files}), "image", range(len(files))
    else:
        raise UserError(
            f"--unknown_split {name}: expected a split of {data_args.dataset_name}, or a folder of pictures, found neither. Its "
            f"splits are {some(list(splits))}."
        )
    if not len(new):
        raise UserError(
            f"--unknown_split {name}: expected pictures of classes that the classifier does not know, found none."
        )
    pictures = column_of(undecoded(rows, column, f"--unknown_split {name}"), column)
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=class_names)})
    table = pa.table({"image": pictures, "label": pa.array([0] * len(rows))})
    return Dataset(table.cast(features.arrow_schema), DatasetInfo(features=features)).select(new), notes


def _of_other_classes(rows: Dataset, column: str, class_names: list[str]) -> Sequence[int]:
    """The numbers of the rows whose label is none of these classes, as far as the labels have names."""
    labels = named_labels(rows, column)
    if labels is None:
        return range(len(rows))
    ours = {same_name(name) for name in class_names}
    return [i for i, code in enumerate(labels.codes) if code < 0 or same_name(labels.names[code]) not in ours]
