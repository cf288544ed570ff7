"""Opens what `--dataset_name` names, as it is: no column has the contract's name yet."""

from __future__ import annotations

import os
import re
from pathlib import Path

from datasets import Dataset, DatasetDict, Image, Value, load_dataset, load_dataset_builder
from datasets.config import HF_DATASETS_CACHE
from datasets.fingerprint import Hasher
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ..core.builtin import builtin
from ..core.errors import UserError
from .split_files import read_split_file

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
NO_ROWS = re.compile(r'Instruction "(.*)" corresponds to no data')  # what `datasets` says of an empty split
NOTHING = Value("null")  # the type of a column of JSON in which no row has a value
KINDS = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def _cache_of(folder: Path) -> str | None:
    """Where a folder with a card is cached. `datasets` goes by the folder's name and its card alone there, and would open
    what it held before, or another folder of that name."""
    if not (folder / "README.md").is_file():
        return None
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.resolve().glob("**/*.*") if p.is_file()]
    files = sorted(entry for entry in files if "/journal/" not in entry[0])  # that of the captions grows meanwhile
    return str(Path(HF_DATASETS_CACHE) / "folders" / Hasher.hash(files))


def files_beside(path: Path) -> dict[str, Path]:
    """Where a file is called `train.csv` or the like: the files of other splits beside it, by their own name."""
    if path.stem.lower() not in SPLIT_NAMES["train"]:
        return {}
    names = (*SPLIT_NAMES["validation"], *SPLIT_NAMES["test"])
    return {name: file for name in names if (file := path.with_name(name + path.suffix)).is_file()}


def _alike(parts: dict[str, Dataset]) -> DatasetDict:
    """The columns of all parts in each of them, of one type: captions, say, may be in the file of training alone."""
    features: dict = {}
    for rows in parts.values():
        features |= {c: kind for c, kind in rows.features.items() if features.get(c, NOTHING) == NOTHING}
    alike = DatasetDict()
    for split, rows in parts.items():
        for column, kind in features.items():
            if column not in rows.features:
                rows = rows.add_column(column, [None] * len(rows), feature=kind)
            elif rows.features[column] != kind:
                try:
                    rows = rows.cast_column(column, kind)
                except (TypeError, ValueError, NotImplementedError) as error:
                    raise UserError(
                        f"column {column!r}, split {split!r}: expected {kind} as in split {next(iter(parts))!r}, found "
                        f"{rows.features[column]}. Write it alike in both files."
                    ) from error
        alike[split] = rows.select_columns(list(features))
    return alike


def _of_pictures(data: DatasetDict) -> bool:
    """Whether `datasets` opened pictures that lie in folders."""
    return all(rows.info.builder_name == "imagefolder" for rows in data.values())


def _open_folder(folder: str, config: str | None, cache: str | None) -> DatasetDict:
    """`load_dataset`; beside metadata.jsonl, pictures may have their labels from folders, as they have without one.

    `datasets` gives no labels there, and hides the pictures of a split without metadata where another split has some.
    """
    metadata = any(Path(folder).rglob("metadata.*"))
    try:
        data = load_dataset(folder, config, cache_dir=cache)
    except ValueError as error:
        if not NO_ROWS.search(str(error)) or not metadata:
            raise
        pictures = load_dataset("imagefolder", data_dir=folder, drop_metadata=True, cache_dir=cache)
        builder = load_dataset_builder(folder, config, cache_dir=cache)
        builder.download_and_prepare()
        data = DatasetDict()
        for split, info in builder.info.splits.items():
            if not info.num_examples and split not in pictures:
                raise
            data[split] = builder.as_dataset(split) if info.num_examples else pictures[split].select_columns("image")
    if not metadata or not _of_pictures(data):
        return data
    return _alike({split: _labelled(rows) for split, rows in data.items()})


def _labelled(rows: Dataset) -> Dataset:
    """Pictures of several folders with the folders' names as labels, where they have no other."""
    paths = [Path(image["path"] or "") for image in rows.cast_column("image", Image(decode=False))["image"]]
    if "label" in rows.column_names or len({path.parent for path in paths}) < 2:
        return rows
    return rows.add_column("label", [path.parent.name for path in paths])


def load_raw(
    name: str, config: str | None = None, revision: str | None = None, image_root: str | None = None
) -> DatasetDict:
    """Opens a Hub id, a local folder (parquet, or images in class folders), a CSV/JSONL file or a split file of CoOp.

    Beside a file called `train.…`, those called `validation.…` and `test.…` (same suffix) are further splits.

    Raises:
        UserError: nothing there, or nothing that `datasets` can open.
    """
    path = Path(builtin(name))
    try:
        if path.is_file():
            kind = KINDS.get(path.suffix.lower())
            if kind is None:
                pickle = (
                    " A pickle can run anything when it is opened: type --dataset_name split_zhou_X.json --shots 16."
                )
                raise UserError(
                    f"data set {name!r}: expected a .csv, .jsonl or .parquet file, or a split file of CoOp (.json), found "
                    f"{path.suffix!r}. For a folder of images type --dataset_name FOLDER.{pickle * (path.suffix == '.pkl')}"
                )
            if path.suffix.lower() == ".json" and (splits := read_split_file(name, image_root)):
                return splits
            files = {"train": path} | files_beside(path)
            return _alike({s: load_dataset(kind, data_files={s: str(file)})[s] for s, file in files.items()})
        if path.is_dir() and not any(path.rglob("*.*")):
            raise UserError(
                f"data set {name!r}: expected parquet files, or one subfolder of images per class; found an empty folder."
            )
        if path.is_dir():
            folder, cache = os.path.abspath(path), _cache_of(path)  # not `.`, which has no name to be cached by
            return _open_folder(folder, config, cache)
        return load_dataset(name, config, revision=revision)
    except UserError:
        raise
    except Exception as error:  # datasets raises a different class for each builder
        empty = NO_ROWS.search(str(error))
        if empty:
            raise UserError(empty_split(name, empty[1])) from error
        # Around the reason, a builder wraps "An error occurred while generating the dataset".
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"data set {name!r}: expected a Hub id, a folder of parquet files, a folder with one subfolder of images per "
            f"class, a CSV/JSONL file or a split file of CoOp; it could not be opened ({reason[0].rstrip('.')})."
        ) from error


def what_was_read(name: str, data: DatasetDict) -> list[str]:
    """Sentences on files that a user may think are read, or are not, of the `data` that `load_raw` opened."""
    path = Path(builtin(name))
    if path.is_dir() and _of_pictures(data):
        return _lists_and_metadata(path, data)
    beside = [file.name for file in files_beside(path).values()] if path.is_file() else []
    if beside and path.suffix.lower() in KINDS:
        return [
            f"Beside {path.name}, {' and '.join(beside)} {'are' if len(beside) > 1 else 'is'} read as further splits."
        ]
    return []


def _lists_and_metadata(folder: Path, data: DatasetDict) -> list[str]:
    """The same for a folder of pictures."""
    notes, pictures, metadata = [], 0, False
    for file in folder.rglob("*.*"):
        pictures += file.suffix.lower() in ImageFolder.EXTENSIONS
        metadata |= file.name in ImageFolder.METADATA_FILENAMES
    rows = sum(map(len, data.values()))
    if metadata and rows < pictures:
        notes.append(f"{pictures - rows:,} of {pictures:,} pictures are in no metadata file, and are left out.")
    lists = [
        p for p in (*folder.glob("*.*"), *folder.glob("*/*.*")) if p.suffix.lower() in (".csv", ".jsonl", ".parquet")
    ]
    lists = sorted(p for p in lists if p.name not in ImageFolder.METADATA_FILENAMES)
    if lists:
        best = next((p for p in lists if p.stem in SPLIT_NAMES["train"]), lists[0])
        more = f" and {len(lists) - 3:,} more" if len(lists) > 3 else ""
        notes.append(
            f"Pictures and labels were read from folders; not read: {', '.join(str(p.relative_to(folder)) for p in lists[:3])}"
            f"{more}. To train on such a list, with its captions, type --dataset_name {best}."
        )
    return notes


def empty_split(name: str, split: str) -> str:
    """What is said of a split without images."""
    return f"data set {name!r}: expected images in split {split!r}, found none: it is empty. Remove it, or fill it."
