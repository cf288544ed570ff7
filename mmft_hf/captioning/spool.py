"""A list on disk, for what grows with the number of images and would not fit into memory."""

from __future__ import annotations

import os
import pickle
import tempfile
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import config

RECENT = 64  # items that were read last stay in memory: a step looks at the same row several times


class Spool(Sequence):
    """Items in a temporary file, which is gone when nothing refers to the object. Items are copies: changing one changes nothing here.

    Args:
        items: the first items.
        length: further items, which are None until they are set.
    """

    def __init__(self, items: Iterable[Any] = (), length: int = 0):
        os.makedirs(config.HF_DATASETS_CACHE, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=config.HF_DATASETS_CACHE)  # closed with the object
        self._starts, self._sizes = array("q"), array("q")
        self._end, self._flushed = 0, True
        self._recent: OrderedDict[int, Any] = OrderedDict()
        for item in items:
            self._starts.append(self._end)
            self._sizes.append(self._write(item))
        self._starts.extend([0] * length)
        self._sizes.extend([0] * length)

    def _write(self, item: Any) -> int:
        data = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
        self._file.write(data)
        self._end, self._flushed = self._end + len(data), False
        return len(data)

    def __len__(self) -> int:
        return len(self._starts)

    def __setitem__(self, i: int, item: Any) -> None:
        self._recent.pop(i, None)
        self._starts[i], self._sizes[i] = self._end, self._write(item)

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        if i in self._recent:
            self._recent.move_to_end(i)
            return self._recent[i]
        if not self._sizes[i]:
            return None
        if not self._flushed:
            self._file.flush()
            self._flushed = True
        item = pickle.loads(os.pread(self._file.fileno(), self._sizes[i], self._starts[i]))
        self._recent[i] = item
        if len(self._recent) > RECENT:
            self._recent.popitem(last=False)
        return item
