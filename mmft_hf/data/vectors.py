"""Vectors of texts on disk, each kept as soon as it is known: an encoder that is killed has lost only the batch it was at.

Every process writes a file of its own, one record after another, and reads those of all. A record that is cut or damaged is
passed over, and its text is encoded again.

Shapes: `n` texts, `d` size of the vectors.
"""

from __future__ import annotations

import hashlib
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .cache import cannot_write


class KeptVectors:
    """The vectors of one encoder, in half precision.

    Args:
        folder: theirs alone. Another encoder, or another setting of it, needs another one.
        size: `d`.
    """

    def __init__(self, folder: Path, size: int):
        self.folder = folder
        # The hash of the text, whether it was truncated, the vector, and a checksum of these three.
        fields = [("text", "V32"), ("cut", "u1"), ("vector", "<f2", (size,)), ("crc", "<u4")]
        self._record = np.dtype(fields)
        self._file = folder / f"{uuid.uuid4().hex}.vectors"
        self._broken = False

    def read(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Vectors `(n, d)`, float16; whether texts were truncated, and whether their vectors are there, bool `(n,)` both."""
        places = {_name(text): i for i, text in enumerate(texts)}
        vectors = np.zeros((len(texts), *self._record["vector"].shape), np.float16)
        cut, there = np.zeros(len(texts), bool), np.zeros(len(texts), bool)
        for path in sorted(self.folder.glob("*.vectors")):
            whole = path.stat().st_size // self._record.itemsize
            if not whole:
                continue
            for record in np.memmap(path, self._record, "r", shape=(whole,)):
                place = places.get(record["text"].tobytes())
                if place is not None and not there[place] and _checksum(record) == record["crc"]:
                    vectors[place], cut[place], there[place] = record["vector"], record["cut"], True
        return vectors, cut, there

    def append(self, texts: Sequence[str], vectors: np.ndarray, cut: np.ndarray) -> None:
        """Keeps the vectors `(n, d)` of texts. If that fails (full disk, no permission), warns once and goes on without."""
        if self._broken:
            return
        records = np.zeros(len(texts), self._record)
        records["vector"], records["cut"] = vectors, cut
        for record, text in zip(records, texts, strict=True):
            record["text"] = np.void(_name(text))
            record["crc"] = _checksum(record)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self._file, "ab", buffering=0) as file:
                if file.write(records.tobytes()) != records.nbytes:
                    raise OSError("the disk took only a part of it")
        except OSError as error:
            self._broken = True  # what follows a record that was cut would not be found
            cannot_write(self.folder, error.strerror or str(error))


def _name(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _checksum(record: np.void) -> int:
    return zlib.crc32(record.tobytes()[:-4])
