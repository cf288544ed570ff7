"""Fields of the caption records of a dataset, read without the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from .columns import column_of


def fields_of_records(dataset: Dataset, names: Sequence[str]) -> list[list[tuple]]:
    """For each row, these fields of each of its records; None for a field that files of the first edition lack."""
    found = []
    for chunk in column_of(dataset, "caption_records").chunks:
        kind = getattr(chunk.type, "value_type", None)
        known = {kind.field(i).name for i in range(getattr(kind, "num_fields", 0))} if kind else set()
        if "text" not in known:  # no records of ours
            found += [[] for _ in range(len(chunk))]
            continue
        entries = chunk.flatten()
        columns = [
            pc.struct_field(entries, name).to_pylist() if name in known else [None] * len(entries) for name in names
        ]
        lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_pylist()
        ends = np.cumsum([0, *lengths])
        rows = list(zip(*columns, strict=True))
        found += [rows[a:b] for a, b in pairwise(ends)]
    return found
