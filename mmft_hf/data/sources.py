"""Opens what `--dataset_name` names: Hub dataset, folder or file. Columns keep their own names."""

from __future__ import annotations

from pathlib import Path

from datasets import load_dataset

from ..core.arguments import DataArguments
from ..core.builtin import builtin
from ..core.errors import UserError
from .folders import open_folder
from .hub_data import check_hub_data
from .raw import NO_ROWS, RawData, empty_split
from .tables import open_table


def open_source(args: DataArguments) -> RawData:
    """Opens a Hub id, a local folder (tables, or pictures in class folders), a table or a CoOp split file.

    If a file is called `train.…`, the files `validation.…` and `test.…` next to it (same suffix) are further splits.

    Raises:
        UserError: there is nothing, nothing that can be read, or two ways to read it.
    """
    name, path = args.dataset_name, Path(builtin(args.dataset_name))
    if path.is_file():
        return open_table(name, path, args)
    if path.is_dir():
        return open_folder(args, path)
    try:
        splits = load_dataset(name, args.dataset_config_name, revision=args.dataset_revision)
        check_hub_data(splits, args)
        return RawData(splits)
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
