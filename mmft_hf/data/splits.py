"""Loads datasets under the contract's column names, checks them, and splits them. No image is opened here.

Columns after loading: `image`, `label` (a `ClassLabel` whose names are the class names, or lists of it) and, if there are captions,
`captions` (a text or a list of texts per image; null and empty are allowed). Other columns stay as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Image, List

from ..core.arguments import DataArguments
from ..core.builtin import builtin
from ..core.console import some
from ..core.errors import UserError, in_python, nearest
from .columns import NULL, TEXT, check_plain, column_of, undecoded
from .join import join_captions
from .labels import ClassList, Labels, has_several, images_per_class, labels_of, named_labels
from .raw import RawData, empty_split, split_for, split_role
from .sampling import few_shot_split, hold_out
from .sources import open_source

logger = logging.getLogger(__name__)

NO_CAPTIONS = "There are no captions: training uses the class template alone."  # a note of `load_splits`


@dataclass
class Splits:
    """The data of a run. `notes` are sentences about decisions that were made for the user; `unlabelled` are the numbers of the
    rows without a class that were left out of the split that is trained on."""

    train: Dataset
    validation: Dataset
    test: Dataset
    class_names: list[str]
    has_captions: bool
    notes: list[str] = field(default_factory=list)
    unlabelled: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def several_labels(self) -> bool:
        """Whether a picture may have several labels."""
        return has_several(self.train)

    def captions_per_image(self) -> np.ndarray:
        """Number of captions of each training image, `(rows,)`."""
        return np.array([len(captions_of(value)) for value in self.train["captions"][:]])

    def fingerprint(self) -> str:
        """16 hex digits that depend on the class names, the labels and images of each split, and the training captions.

        Images are identified by file name and size, so none is opened. The folder that holds them does not count.
        """
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for split in (self.train, self.validation, self.test):
            labels = labels_of(split)
            digest.update(labels.astype("<i8" if labels.ndim == 1 else "u1").tobytes())
            digest.update(json.dumps(split["image_id"][:]).encode())
            if self.has_captions and split is self.train:
                digest.update(json.dumps([captions_of(c) for c in split["captions"]]).encode())
        return digest.hexdigest()[:16]


def _add_ids(dataset: Dataset) -> Dataset:
    """Adds `source_row`, which still names a row after a split was divided, and `image_id`, file name and size."""
    ids = []
    for chunk in column_of(dataset, "image").chunks:
        content, paths = chunk.field("bytes"), chunk.field("path")
        for size, path in zip(pc.binary_length(content).to_pylist(), paths.to_pylist(), strict=True):
            if size is None and path:
                try:
                    size = os.path.getsize(path)
                except (OSError, ValueError):
                    size = -1
            ids.append(f"{_file_name(path)}:{size}")
    own = [name for name in ("source_row", "image_id") if name in dataset.column_names]
    return (
        dataset.remove_columns(own)
        .add_column("source_row", np.arange(len(dataset)))
        .add_column("image_id", pa.array(ids, pa.string()))
    )


def _file_name(path: str | None) -> str:
    """The last part of a path. A `Path` takes long to make, and there is one per picture."""
    name = (path or "").rpartition(os.sep)[2]
    return name if name not in ("", ".") else Path(path or "").name


def captions_of(value: str | list | None) -> list[str]:
    """The captions of one row as a list. Blank ones are dropped."""
    texts = [value] if isinstance(value, str) else value or []
    return [text.strip() for text in texts if text and text.strip()]


def _map_columns(raw: DatasetDict, args: DataArguments) -> tuple[DatasetDict, bool]:
    """Gives the columns of the contract their names and checks their types. Pictures become undecoded `Image`s."""
    features = next(iter(raw.values())).features
    wanted = {"image": args.image_column, "label": args.label_column}
    captions = args.captions_column or ("captions" if "captions" in features else None)
    if captions:
        wanted["captions"] = captions
    if list(features) == ["image"] and Path(builtin(args.dataset_name)).is_dir():
        raise UserError(
            f"dataset {args.dataset_name!r}: expected one subfolder of images per class, and two classes or more; found "
            "images without a class. Move them, or type --dataset_name FILE.csv with columns image and label."
        )
    for role, column in wanted.items():
        if column not in features:
            lists = [name for name, kind in features.items() if role == "captions" and is_text(kind)]
            raise UserError(
                f"column {column!r} for the {role} is missing: found {', '.join(features)}."
                + (f" Columns of text: {', '.join(lists)}." if lists else "")
                + f"{nearest(column, features)} Type --{role}_column NAME."
            )
    if captions and not is_text(features[captions]) and features[captions] not in (NULL, List(NULL)):
        raise UserError(
            f"column {captions!r}: expected text or a list of texts as captions, found {features[captions]}. "
            "Type --captions_column NAME, or leave it out to train with the class template alone."
        )
    mapped, embedded = DatasetDict(), True
    for split, dataset in raw.items():
        # Another column that already has a name of the contract is dropped.
        in_the_way = [role for role, column in wanted.items() if role != column and role in dataset.column_names]
        dataset = dataset.remove_columns(in_the_way)
        dataset = dataset.rename_columns({column: role for role, column in wanted.items() if role != column})
        mapped[split] = dataset = undecoded(dataset, "image", f"column {args.image_column!r}, split {split!r}")
        found = [(chunk.field("bytes"), chunk.field("path")) for chunk in column_of(dataset, "image").chunks]
        if not any(len(content) > content.null_count or len(path) > path.null_count for content, path in found):
            raise UserError(
                f"split {split!r}: expected images, or their paths, in column {args.image_column!r}, found none."
            )
        embedded &= not any(content.null_count for content, _ in found)
    if args.image_root and embedded:
        raise UserError(
            f"--image_root: expected paths of images in column {args.image_column!r}, found Image with all pictures in it. "
            "Leave it out."
        )
    return mapped, bool(captions)


def is_text(kind) -> bool:
    """Whether a column's type is text or a list of texts."""
    return (kind.feature if isinstance(kind, List) else kind) in TEXT


def text_columns(dataset: Dataset) -> list[str]:
    """Names of the columns with a list of texts per row, which could be captions."""
    return [name for name, kind in dataset.features.items() if isinstance(kind, List) and is_text(kind)]


def _find_split(data: DatasetDict, role: str, name: str | None) -> str | None:
    if name is not None:
        if name not in data:
            raise UserError(
                f"split {name!r} is missing: found {', '.join(data)}.{nearest(name, data)} Type --{role}_split NAME."
            )
        return name
    return split_for(role, data)


def load_captioned_dataset(name: str = "builtin/emoji-mini", config: str | None = None, **options) -> DatasetDict:
    """Loads labelled images and their captions under the contract's column names.

    Args:
        name: Hub id, folder of parquet files, folder of images in class folders, CSV/JSONL file, CoOp split file, or
            `builtin/emoji-mini`.
        config: configuration of a Hub dataset.
        options: any field of `DataArguments`, e.g. `captions_column="text"`.

    Returns:
        All splits, each with `image` (decoded on access), `label` (`ClassLabel`) and, if there are any, `captions`.

    Raises:
        UserError: no such dataset, a missing column, a wrong type, a label outside the class list, two equal class names.
    """
    args = DataArguments(dataset_name=name, dataset_config_name=config, **options)
    loaded = _with_captions(_load(args), args)
    for note in loaded.notes:
        logger.warning(in_python(note))
    return DatasetDict({split: loaded.rows(split).cast_column("image", Image()) for split in loaded.splits})


def _with_captions(loaded: _Loaded, args: DataArguments) -> _Loaded:
    """Joins the captions of `--captions_dataset` to the training images."""
    if args.captions_dataset:
        train = _find_split(loaded.splits, "train", args.train_split) or next(iter(loaded.splits))
        captions = open_source(DataArguments(dataset_name=args.captions_dataset)).splits
        loaded.splits[train], notes = join_captions(loaded.splits[train], captions, args.captions_dataset)
        loaded.notes += notes
        loaded.has_captions = True
    return loaded


@dataclass
class _Loaded:
    """Splits under the contract's names, all rows. `kept` are the numbers of the rows that have a class."""

    splits: DatasetDict
    kept: dict[str, np.ndarray]
    classes: ClassList
    has_captions: bool
    notes: list[str]

    def rows(self, split: str) -> Dataset:
        """A split without the rows that have no class."""
        dataset, kept = self.splits[split], self.kept[split]
        return dataset if len(kept) == len(dataset) else dataset.select(kept)


def _load(
    args: DataArguments,
    dataset: DatasetDict | None = None,
    known: ClassList | None = None,
    only: Callable[[DatasetDict], str | None] | None = None,
) -> _Loaded | None:
    """Opens the splits and numbers their labels alike.

    Args:
        known: the classes of a model. Default: those of the training split.
        only: finds the only split to be loaded; None, and the result is None, if there is none.
    """
    if dataset is not None:
        for split, rows in dataset.items():
            check_plain(f"split {split!r}", rows)
    opened = RawData(DatasetDict(dataset)) if dataset else open_source(args)
    raw, notes = opened.splits, list(opened.notes)
    strangers = None
    if args.unknown_split in raw and len(raw) > 1:
        strangers = named_labels(raw[args.unknown_split], args.label_column)
        raw = DatasetDict({split: rows for split, rows in raw.items() if split != args.unknown_split})
    if len(raw) == 1:
        notes += _split_columns(next(iter(raw.values())))
    if only is not None:
        split = only(raw)
        if split is None:
            return None
        raw, train = DatasetDict({split: raw[split]}), split
    if empty := [split for split, rows in raw.items() if len(rows) == 0]:
        raise UserError(empty_split(args.dataset_name, empty[0]))
    if only is None:
        train = _find_split(raw, "train", args.train_split)
        if train is None:
            if len(raw) > 1:
                raise UserError(f"no training split: found {', '.join(raw)}. Type --train_split NAME.")
            train = next(iter(raw))
    data, has_captions = _map_columns(raw, args)
    labels = {
        s: Labels.of(rows, f"column {args.label_column!r}, split {s!r}", args.class_names, args.label_separator)
        for s, rows in data.items()
    }
    if strangers:  # files of one table share their list of classes
        unknown = set(strangers.used()).difference(*(own.used() for own in labels.values() if own.names))
        labels = {split: own.without(unknown) if own.names else own for split, own in labels.items()}
    for split in sorted(data.keys() - {train, args.validation_split, args.test_split}):
        if not labels[split].has_any():  # for example the test split of a challenge
            del data[split], labels[split]
            notes.append(f"Split {split!r} has no labels and is left out.")
    _refuse_mixed(labels)
    if any(own.several for own in labels.values()):
        notes += _single_lists(labels.values())
    elif labels[train].names:
        notes += _joined_texts(labels[train].names)
    kept = {split: _rows_with_class(own, args.on_missing_label, notes) for split, own in labels.items()}
    classes = known
    if known is None or args.class_names:
        classes = ClassList.of(labels[train], args.class_names, partial=known is not None)
        notes += [classes.note] * bool(classes.note)
    for split, own in labels.items():
        codes = own.under(classes)
        if known is not None and classes is not known:
            codes = replace(own, codes=codes, names=classes.names, ordered=True).under(known)
        names = (known or classes).names
        unchanged = data[split].features["label"] == ClassLabel(names=names) and np.array_equal(codes, own.codes)
        if not unchanged:
            values, feature = own.column(codes, names)
            data[split] = data[split].remove_columns("label").add_column("label", values, feature=feature)
    for split, rows in data.items():
        _refuse_absent(rows, f"column {args.image_column!r}, split {split!r}")
    return _Loaded(data, kept, known or classes, has_captions, notes)


def _refuse_mixed(labels: dict[str, Labels]) -> None:
    """Raises `UserError` if pictures have one label in some splits and lists of labels in others."""
    kinds = {own.several: own.where for own in reversed(labels.values()) if own.has_any()}
    if len(kinds) > 1:
        raise UserError(
            f"{kinds[False]}: expected lists of labels, as in {kinds[True]}, found one label per picture. Write lists, or one "
            "label per picture, in all splits."
        )


def _single_lists(labels: Iterable[Labels]) -> list[str]:
    """A note if each list has exactly one label."""
    if any(
        (np.bincount(own.row_of, minlength=len(own.listed))[own.listed] != 1).any() for own in labels if own.several
    ):
        return []
    return [
        "Each list of labels has exactly one. If the classes exclude each other, write one label per picture instead of a list: more "
        "heads know that, and scores of the classes then add up to 100 %."
    ]


def _joined_texts(names: Sequence[str]) -> list[str]:
    """A note if class names look like several labels in one text. They are not split unless that is typed."""
    if any(name.startswith("[") and name.endswith("]") for name in names):
        return [
            "Class names look like lists written as text. For several labels per picture, write red;round instead, and type "
            "--label_separator ';'."
        ]
    for separator in ";|,":
        joined = {name: [part.strip() for part in name.split(separator)] for name in names if separator in name}
        count = Counter(part for parts in joined.values() for part in parts)
        if joined and all(part in names or count[part] > 1 for part in count):
            example = max(joined, key=lambda name: sum(map(bool, joined[name])))  # rather than the separator alone
            return [
                f"Class names such as {example!r} may be several labels in one text. If they are, type --label_separator {separator!r}."
            ]
    return []


def _split_columns(dataset: Dataset) -> list[str]:
    """A note on each column that says which rows are for training and which for the test: it does not take part."""
    notes = []
    for column in ("split", "subset", "set", "partition", "phase", "usage"):
        name = next((name for name in dataset.column_names if name.lower() == column), None)
        if name and dataset.features[name] in TEXT:
            words = [word for word in pc.unique(column_of(dataset, name)).to_pylist() if word]
            if len({split_role(word) for word in words} - {None}) > 1:
                notes.append(
                    f"Column {name!r} ({some(words, 3)}) is not read: its rows are one split. To keep them apart, write a file for each."
                )
    return notes


def _refuse_absent(dataset: Dataset, where: str) -> None:
    """Raises `UserError` if all pictures are files, and none of them is there."""
    chunks = column_of(dataset, "image").chunks
    if any(chunk.field("bytes").null_count < len(chunk) for chunk in chunks):
        return
    paths = (path.as_py() for chunk in chunks for path in chunk.field("path"))
    first = next(filter(None, paths))
    if not os.path.exists(first) and not any(map(os.path.exists, filter(None, paths))):
        raise UserError(
            f"{where}: expected the pictures' files, found none of {len(dataset):,}; missing is for example {first}. Type "
            "--image_root FOLDER, which the paths are relative to."
        )


def _rows_with_class(labels: Labels, on_missing: str, notes: list[str]) -> np.ndarray:
    """The numbers of the rows that have a class. Adds a note on the others, or raises `UserError`."""
    kept = np.flatnonzero(labels.labelled)
    rows = len(labels.labelled)
    missing = rows - len(kept)
    if not missing:
        return kept
    found = f"{missing:,} of {rows:,} rows have no class (no label, or -1)"
    if on_missing == "skip" and len(kept):
        notes.append(f"{labels.where}: {found} and are left out.")
        return kept
    row = int(np.flatnonzero(~labels.labelled)[0])
    how = (
        "Correct them"
        if on_missing == "skip" or not len(kept)
        else "Correct them, or type --on_missing_label skip to leave them out"
    )
    raise UserError(f"{labels.where}, row {row}: expected a class, found none; {found}. {how}.")


def load_test_split(args: DataArguments, class_names: list[str]) -> Dataset | None:
    """Loads the test split, with its labels matched by name to the classes of a trained model.

    Returns:
        The split named by `test_split` (default `test`). None if no split is named and there is no `test`.

    Raises:
        UserError: as `load_captioned_dataset`, and for a class that the model does not know.
    """
    known = ClassList.of_names(class_names)
    loaded = _load(args, known=known, only=lambda raw: _find_split(raw, "test", args.test_split))
    if loaded is None:
        return None
    for note in loaded.notes:
        logger.warning(in_python(note))
    (split,) = loaded.splits
    loaded.splits[split] = _add_ids(loaded.splits[split])
    return loaded.rows(split)


def load_train_split(args: DataArguments, class_names: list[str]) -> Dataset | None:
    """Loads the training split beside a test split, for comparison with it; None if there is none.

    Raises:
        UserError: as `load_test_split`.
    """

    def find(raw: DatasetDict) -> str | None:
        name = _find_split(raw, "train", args.train_split)
        return None if name == args.test_split else name

    loaded = _load(args, known=ClassList.of_names(class_names), only=find)
    return loaded and loaded.rows(next(iter(loaded.splits)))


def load_splits(args: DataArguments, dataset: DatasetDict | None = None) -> Splits:
    """Loads a dataset and decides which images are for training, validation and test.

    If a split is missing, part of each class of the training split is held out for it. `shots_seed` alone decides which
    part, so it does not depend on the seed of the training. Few-shot subsets (`shots`) are drawn from the rest;
    validation and test stay whole.

    Args:
        dataset: splits in memory, used instead of `args.dataset_name`.

    Raises:
        UserError: as `load_captioned_dataset`, and for a class without a training image.
    """
    loaded = _with_captions(_load(args, dataset), args)
    names, has_captions, notes = loaded.classes.names, loaded.has_captions, loaded.notes
    loaded.splits = DatasetDict({name: _add_ids(split) for name, split in loaded.splits.items()})
    data = DatasetDict({name: loaded.rows(name) for name in loaded.splits})
    train_name = _find_split(data, "train", args.train_split) or next(iter(data))
    train = data[train_name]
    chosen, used = {}, {train_name: "train"}
    for role, share in (("test", args.test_size), ("validation", args.validation_size)):
        named = getattr(args, f"{role}_split")
        found = _find_split(data, role, named)
        tested = found is not None and found == args.test_split and named is None
        if tested:
            found = (
                None  # the validation split is the test split, so part of the training split is held out for selection
            )
        if found in used:
            raise UserError(
                f"split {found!r}: expected one role for each split, found {used[found]} and {role}. Found splits: "
                f"{', '.join(data)}. Type --{used[found]}_split NAME or --{role}_split NAME."
            )
        if found is not None:
            chosen[role], used[found] = data[found], role
            continue
        rest, held = hold_out(labels_of(train), share, args.shots_seed)
        if not held:
            left = " beside those held out for the test" if len(train) < len(data[train_name]) else ""
            raise UserError(
                f"no {role} split, and no class of {train_name!r} has two images{left}, so none can be held out. Add images or a "
                f"{role} split, or type --{role}_split NAME."
            )
        chosen[role], train = train.select(held), train.select(rest)
        notes.append(
            f"There is no {role} split{' but the one that is tested on' * tested}: {len(held)} images ({share:.0%} of each "
            f"class, seed {args.shots_seed}) were held out of {train_name!r} for it."
        )
    counts = images_per_class(train)
    if (counts == 0).any():
        missing = [names[c] for c in np.flatnonzero(counts == 0)]
        raise UserError(
            f"{len(missing)} of {len(names)} classes have no training image: {some(missing)}. Add images of them, or take "
            "them out of the class list."
        )
    if args.shots:
        train = train.select(few_shot_split(labels_of(train), args.shots, args.shots_seed))
        count = f"{args.shots} or more" if has_several(train) else f"at most {args.shots}"
        notes.append(f"Few-shot: {len(train)} images, {count} of each class (seed {args.shots_seed}).")
        notes.append("Validation stays at full size (selection policy val-full).")
    if not has_captions:
        text = text_columns(train) or [c for c in ("text", "caption") if is_text(train.features.get(c))]
        hint = (
            f" It has texts in {', '.join(text)}: type --captions_column {text[0]} to train with them." if text else ""
        )
        notes.append(f"{NO_CAPTIONS}{hint}")
    unlabelled = np.setdiff1d(np.arange(len(loaded.splits[train_name])), loaded.kept[train_name])
    return Splits(train, chosen["validation"], chosen["test"], names, has_captions, notes, unlabelled)
