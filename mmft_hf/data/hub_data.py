"""Checks a dataset that `datasets` opened from the Hub: what it says about classes and pictures is somebody else's word."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import DatasetDict, Features, Image, config
from huggingface_hub import constants, try_to_load_from_cache

from ..core.arguments import DataArguments
from ..core.console import some
from ..core.errors import UserError
from .columns import TEXT, column_of, is_image, undecoded
from .image_paths import is_inside
from .labels import class_label

_FILE = re.compile(r"hf://datasets/(?P<repo_id>[^/]+/[^/@]+)@(?P<revision>[0-9a-f]{40})/(?P<filename>.+\.parquet)")


def check_hub_data(splits: DatasetDict, args: DataArguments) -> None:
    """Checks classes and paths. Nothing is downloaded: the files are those that were downloaded to open the dataset.

    Raises:
        UserError: the files number their classes differently, which `datasets` does not notice; a path that names a file of this
            machine.
    """
    for rows in splits.values():
        for url in rows.info.download_checksums or ():
            if known := _FILE.fullmatch(url):
                _check_classes(rows.features, known.groupdict(), args)
    for split, rows in splits.items():
        _check_paths(rows, split, args)


def _check_classes(features: Features, place: dict[str, str], args: DataArguments) -> None:
    file = try_to_load_from_cache(**place, repo_type="dataset")
    if not isinstance(file, str):
        return
    try:
        own = Features.from_arrow_schema(pq.read_schema(file))
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError):
        return  # `datasets` has read it without these names
    for column, kind in features.items():
        kind, there = class_label(kind), class_label(own.get(column))
        if kind and there and there.names != kind.names:
            raise UserError(
                f"dataset {args.dataset_name!r}: expected the same classes in all files, found others in {place['filename']}, column "
                f"{column!r}: {some(there.names)} instead of {some(kind.names)}. Type hf download {place['repo_id']} --repo-type "
                f"dataset --local-dir FOLDER, and --dataset_name FOLDER: there they are joined by name."
            )


def _check_paths(rows, split: str, args: DataArguments) -> None:
    column = args.image_column
    kind = rows.features.get(column)
    if not (isinstance(kind, Image) or kind in TEXT or is_image(kind)):
        return
    where = f"dataset {args.dataset_name!r}, split {split!r}, column {column!r}"
    own = Path(constants.HF_HUB_CACHE) / f"datasets--{args.dataset_name.replace('/', '--')}"
    allowed = [str(own), str(config.DOWNLOADED_DATASETS_PATH), str(config.EXTRACTED_DATASETS_PATH)]
    stored = column_of(undecoded(rows, column, where), column)
    content, paths = pc.struct_field(stored, "bytes"), pc.struct_field(stored, "path")
    if not content.null_count:
        return
    for row, (path, empty) in enumerate(zip(paths.to_pylist(), content.is_null().to_pylist(), strict=True)):
        if empty and path and not any(is_inside(path, folder) for folder in allowed):
            raise UserError(
                f"{where}, row {row}: expected pictures within the dataset, found only the path {path[:100]}. What it names on this "
                "machine is not read. Download the pictures, and type --dataset_name FILE.csv with their paths."
            )
