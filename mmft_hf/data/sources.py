"""Opens what `--dataset_name` names: Hub dataset, folder or file. Columns keep their own names."""

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
from ..core.files import CARD_FILE
from .split_files import read_split_file

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
NO_ROWS = re.compile(r'Instruction "(.*)" corresponds to no data')  # how `datasets` reports an empty split
NULL = Value("null")  # the type of a JSON column in which no row has a value
FORMATS = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_raw(
    name: str, config: str | None = None, revision: str | None = None, image_root: str | None = None
) -> DatasetDict:
    """Opens a Hub id, a local folder (parquet, or images in class folders), a CSV/JSONL file or a CoOp split file.

    If a file is called `train.…`, the files `validation.…` and `test.…` next to it (same suffix) are further splits.

    Raises:
        UserError: there is nothing, or nothing that `datasets` can open.
    """
    path = Path(builtin(name))
    try:
        if path.is_file():
            return _open_file(name, path, image_root)
        if path.is_dir():
            if not any(path.rglob("*.*")):
                raise UserError(
                    f"dataset {name!r}: expected parquet files, or one subfolder of images per class; found an empty folder."
                )
            # An absolute path, because `datasets` cannot name the cache of `.`.
            return _open_folder(os.path.abspath(path), config, _cache_of(path))
        return load_dataset(name, config, revision=revision)
    except UserError:
        raise
    except Exception as error:  # datasets raises a different class for each builder
        if empty := NO_ROWS.search(str(error)):
            raise UserError(empty_split(name, empty[1])) from error
        # A builder wraps the reason into "An error occurred while generating the dataset".
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"dataset {name!r}: expected a Hub id, a folder of parquet files, a folder with one subfolder of images per "
            f"class, a CSV/JSONL file or a CoOp split file; it could not be opened ({reason[0].rstrip('.')})."
        ) from error


def empty_split(name: str, split: str) -> str:
    """The message for a split without images."""
    return f"dataset {name!r}: expected images in split {split!r}, found none: it is empty. Remove it, or fill it."


# -- files ------------------------------------------------------------------------------------------------------------
def _open_file(name: str, path: Path, image_root: str | None) -> DatasetDict:
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        pickle = " A pickle can run any code when it is opened: type --dataset_name split_zhou_X.json --shots 16."
        raise UserError(
            f"dataset {name!r}: expected a .csv, .jsonl or .parquet file, or a CoOp split file (.json), found "
            f"{path.suffix!r}. For a folder of images type --dataset_name FOLDER.{pickle * (path.suffix == '.pkl')}"
        )
    if suffix == ".json" and (splits := read_split_file(name, image_root)):
        return splits
    files = {"train": path} | _other_splits(path)
    return _same_columns({s: load_dataset(FORMATS[suffix], data_files={s: str(f)})[s] for s, f in files.items()})


def _other_splits(path: Path) -> dict[str, Path]:
    """The files of other splits next to a file called `train.csv` or the like, by the name of their split."""
    if path.stem.lower() not in SPLIT_NAMES["train"]:
        return {}
    names = (*SPLIT_NAMES["validation"], *SPLIT_NAMES["test"])
    return {name: file for name in names if (file := path.with_name(name + path.suffix)).is_file()}


def _same_columns(parts: dict[str, Dataset]) -> DatasetDict:
    """Gives all splits the columns of all, with the same types: captions may be in the training file alone."""
    features: dict = {}
    for rows in parts.values():
        features |= {c: kind for c, kind in rows.features.items() if features.get(c, NULL) == NULL}
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
                        f"{rows.features[column]}. Use the same type in both files."
                    ) from error
        parts[split] = rows.select_columns(list(features))
    return DatasetDict(parts)


# -- folders ----------------------------------------------------------------------------------------------------------
def _cache_of(folder: Path) -> str | None:
    """Where `datasets` caches a folder with a card. By default it identifies such a folder by name and card alone, and
    would open what the folder held before, or another folder of that name."""
    if not (folder / CARD_FILE).is_file():
        return None
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.resolve().glob("**/*.*") if p.is_file()]
    files = sorted(entry for entry in files if "/journal/" not in entry[0])  # the captions' journal keeps growing
    return str(Path(HF_DATASETS_CACHE) / "folders" / Hasher.hash(files))


def _open_folder(folder: str, config: str | None, cache: str | None) -> DatasetDict:
    """`load_dataset`, but images next to a metadata.jsonl also get labels from their folders.

    `datasets` gives no labels there, and hides the images of a split without metadata if another split has some.
    """
    metadata = any(Path(folder).rglob("metadata.*"))
    try:
        data = load_dataset(folder, config, cache_dir=cache)
    except ValueError as error:
        if not NO_ROWS.search(str(error)) or not metadata:
            raise
        images = load_dataset("imagefolder", data_dir=folder, drop_metadata=True, cache_dir=cache)
        builder = load_dataset_builder(folder, config, cache_dir=cache)
        builder.download_and_prepare()
        data = DatasetDict()
        for split, info in builder.info.splits.items():
            if not info.num_examples and split not in images:
                raise
            data[split] = builder.as_dataset(split) if info.num_examples else images[split].select_columns("image")
    if not metadata or not _is_image_folder(data):
        return data
    return _same_columns({split: _with_labels(rows) for split, rows in data.items()})


def _is_image_folder(data: DatasetDict) -> bool:
    """Whether `datasets` opened the data as a folder of images."""
    return all(rows.info.builder_name == "imagefolder" for rows in data.values())


def _with_labels(rows: Dataset) -> Dataset:
    """Adds the folders' names as labels if the images have no labels and lie in several folders."""
    paths = [Path(image["path"] or "") for image in rows.cast_column("image", Image(decode=False))["image"]]
    if "label" in rows.column_names or len({path.parent for path in paths}) < 2:
        return rows
    return rows.add_column("label", [path.parent.name for path in paths])


# -- notes ------------------------------------------------------------------------------------------------------------
def what_was_read(name: str, data: DatasetDict) -> list[str]:
    """Sentences about files that were read, or not read, contrary to what a user may expect.

    Args:
        data: what `load_raw(name)` opened.
    """
    path = Path(builtin(name))
    if path.is_dir() and _is_image_folder(data):
        return _lists_and_metadata(path, data)
    others = [file.name for file in _other_splits(path).values()] if path.is_file() else []
    if others and path.suffix.lower() in FORMATS:
        return [
            f"{' and '.join(others)} next to {path.name} {'are' if len(others) > 1 else 'is'} read as further splits."
        ]
    return []


def _lists_and_metadata(folder: Path, data: DatasetDict) -> list[str]:
    """The notes on a folder of images: images that no metadata file lists, and tables that are not read."""
    notes, images, metadata = [], 0, False
    for file in folder.rglob("*.*"):
        images += file.suffix.lower() in ImageFolder.EXTENSIONS
        metadata |= file.name in ImageFolder.METADATA_FILENAMES
    rows = sum(map(len, data.values()))
    if metadata and rows < images:
        notes.append(f"{images - rows:,} of {images:,} images are in no metadata file and are left out.")
    tables = sorted(
        path
        for path in (*folder.glob("*.*"), *folder.glob("*/*.*"))
        if path.suffix.lower() in (".csv", ".jsonl", ".parquet") and path.name not in ImageFolder.METADATA_FILENAMES
    )
    if tables:
        best = next((path for path in tables if path.stem in SPLIT_NAMES["train"]), tables[0])
        shown = ", ".join(str(path.relative_to(folder)) for path in tables[:3])
        more = f" and {len(tables) - 3:,} more" if len(tables) > 3 else ""
        notes.append(
            f"Images and labels were read from folders; not read: {shown}{more}. To train on such a table, with its "
            f"captions, type --dataset_name {best}."
        )
    return notes
