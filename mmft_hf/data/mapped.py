"""Tables on disk: written once to the cache of `datasets`, mapped into memory from there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, NamedSplit, config
from datasets.fingerprint import Hasher
from datasets.table import MemoryMappedTable

from ..core.files import atomic_write


def mapped(
    key: object, features: Features, batches: Iterable[pa.RecordBatch], split: NamedSplit | None = None
) -> Dataset:
    """A dataset whose rows stay on disk. What `datasets.map` makes of it stays on disk, too.

    Args:
        key: identifies the rows. The same key opens the file that was written before.
        features: the columns and their types.
        split (*optional*): the name of the dataset's split.
        batches: the rows, with the storage types of `features`. They are read only if the file is missing.
    """
    digest = Hasher.hash((key, features, 1))
    # A folder of its own, in which `datasets` keeps what is derived from this table.
    file = Path(config.HF_DATASETS_CACHE) / "tables" / digest / "table.arrow"
    if not file.is_file():
        with (
            atomic_write(file) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_stream(sink, features.arrow_schema.remove_metadata()) as writer,
        ):
            for batch in batches:
                writer.write_batch(batch)
    table = MemoryMappedTable.from_file(str(file))
    return Dataset(table, info=DatasetInfo(features=features), split=split, fingerprint=digest)
