"""Opens folders: images in class folders, images with a metadata file, or tables in the layout of the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from datasets import Dataset, DatasetDict, Image, load_dataset, load_dataset_builder
from datasets.config import HF_DATASETS_CACHE
from datasets.fingerprint import Hasher
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ..core.errors import UserError
from ..core.files import CARD_FILE
from .raw import NO_ROWS, SPLIT_NAMES, RawData
from .tables import same_columns


def open_folder(name: str, path: Path, config: str | None) -> RawData:
    """Opens a folder of parquet files, or of images in class folders."""
    if not any(path.rglob("*.*")):
        raise UserError(
            f"dataset {name!r}: expected parquet files, or one subfolder of images per class; found an empty folder."
        )
    # An absolute path, because `datasets` cannot name the cache of `.`.
    data = _open_folder(os.path.abspath(path), config, _cache_of(path))
    return RawData(data, _lists_and_metadata(path, data) if _is_image_folder(data) else [])


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
    parts = same_columns([_with_labels(rows) for rows in data.values()], [f"split {split!r}" for split in data])
    return DatasetDict(zip(data, parts, strict=True))


def _is_image_folder(data: DatasetDict) -> bool:
    """Whether `datasets` opened the data as a folder of images."""
    return all(rows.info.builder_name == "imagefolder" for rows in data.values())


def _with_labels(rows: Dataset) -> Dataset:
    """Adds the folders' names as labels if the images have no labels and lie in several folders."""
    paths = [Path(image["path"] or "") for image in rows.cast_column("image", Image(decode=False))["image"]]
    if "label" in rows.column_names or len({path.parent for path in paths}) < 2:
        return rows
    return rows.add_column("label", [path.parent.name for path in paths])


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
