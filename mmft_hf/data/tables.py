"""Opens tables of images: CSV, JSONL and parquet files, and CoOp split files."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, Value, load_dataset

from ..core.errors import UserError
from .raw import SPLIT_NAMES, RawData
from .split_files import read_split_file

NULL = Value("null")  # the type of a JSON column in which no row has a value
FORMATS = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def open_table(name: str, path: Path, image_root: str | None) -> RawData:
    """Opens one file, and the files of other splits next to a file called `train.…` (same suffix)."""
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        pickle = " A pickle can run any code when it is opened: type --dataset_name split_zhou_X.json --shots 16."
        raise UserError(
            f"dataset {name!r}: expected a .csv, .jsonl or .parquet file, or a CoOp split file (.json), found "
            f"{path.suffix!r}. For a folder of images type --dataset_name FOLDER.{pickle * (path.suffix == '.pkl')}"
        )
    if suffix == ".json" and (splits := read_split_file(name, image_root)):
        return RawData(splits)
    others = _other_splits(path)
    files = {"train": path} | others
    data = {s: load_dataset(FORMATS[suffix], data_files={s: str(f)})[s] for s, f in files.items()}
    names = [file.name for file in others.values()]
    verb = "are read as further splits" if len(names) > 1 else "is read as a further split"
    return RawData(same_columns(data), [f"{' and '.join(names)} next to {path.name} {verb}."] if names else [])


def _other_splits(path: Path) -> dict[str, Path]:
    """The files of other splits next to a file called `train.csv` or the like, by the name of their split."""
    if path.stem.lower() not in SPLIT_NAMES["train"]:
        return {}
    names = (*SPLIT_NAMES["validation"], *SPLIT_NAMES["test"])
    return {name: file for name in names if (file := path.with_name(name + path.suffix)).is_file()}


def same_columns(parts: dict[str, Dataset]) -> DatasetDict:
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
