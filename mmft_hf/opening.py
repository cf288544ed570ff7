"""Opens what `--dataset_name` names, as it is: no column has the contract's name yet."""

from __future__ import annotations

import os
import re
from pathlib import Path

from datasets import DatasetDict, load_dataset
from datasets.config import HF_DATASETS_CACHE
from datasets.fingerprint import Hasher

from .builtin import builtin
from .errors import UserError
from .split_files import read_split_file


def _cache_of(folder: Path) -> str | None:
    """Where a folder with a card is cached. `datasets` goes by the folder's name and its card alone there, and would open
    what it held before, or another folder of that name."""
    if not (folder / "README.md").is_file():
        return None
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.resolve().glob("**/*.*") if p.is_file()]
    files = sorted(entry for entry in files if "/journal/" not in entry[0])  # that of the captions grows meanwhile
    return str(Path(HF_DATASETS_CACHE) / "folders" / Hasher.hash(files))


def load_raw(
    name: str, config: str | None = None, revision: str | None = None, image_root: str | None = None
) -> DatasetDict:
    """Opens a Hub id, a local folder (parquet, or images in class folders), a CSV/JSONL file or a split file of CoOp.

    Raises:
        UserError: nothing there, or nothing that `datasets` can open.
    """
    path = Path(builtin(name))
    try:
        if path.is_file():
            kind = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(path.suffix.lower())
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
            return load_dataset(kind, data_files={"train": str(path)})
        if path.is_dir() and not any(path.rglob("*.*")):
            raise UserError(
                f"data set {name!r}: expected parquet files, or one subfolder of images per class; found an empty folder."
            )
        if path.is_dir():
            # Not `.`, which has no name to be cached by.
            return load_dataset(os.path.abspath(path), config, cache_dir=_cache_of(path))
        return load_dataset(name, config, revision=revision)
    except UserError:
        raise
    except Exception as error:  # datasets raises a different class for each builder
        empty = re.search(r'Instruction "(.*)" corresponds to no data', str(error))
        if empty:
            raise UserError(empty_split(name, empty[1])) from error
        # Around the reason, a builder wraps "An error occurred while generating the dataset".
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"data set {name!r}: expected a Hub id, a folder of parquet files, a folder with one subfolder of images per "
            f"class, a CSV/JSONL file or a split file of CoOp; it could not be opened ({reason[0].rstrip('.')})."
        ) from error


def empty_split(name: str, split: str) -> str:
    """What is said of a split without images."""
    return f"data set {name!r}: expected images in split {split!r}, found none: it is empty. Remove it, or fill it."
