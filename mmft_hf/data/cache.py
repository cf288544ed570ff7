"""The cache on disk: features of frozen towers and decoded pictures.

Files are named by their content and can be computed again, so the folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image
from safetensors import SafetensorError

from ..core.errors import UserError
from ..core.files import atomic_write
from .images import BadImage, read_image, stored_bytes

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

VARIABLE = "MMFT_HF_CACHE"


def cache_folder(kind: str = "") -> Path:
    """The folder of one kind of content (`features`, `pictures`): in `$MMFT_HF_CACHE`, else in `$HF_HOME/mmft_hf`."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get(VARIABLE) or Path(HF_HOME) / "mmft_hf", kind)


class Features(NamedTuple):
    """What a frozen tower, or its trunk, gives, see `model.features`.

    `embeds` `(n, D)`, float32, mapped from the file if there is one: unit-norm embeddings, or pooled outputs of the trunk; `flags` `(n,)`, bool: which pictures
    could be read, or which texts were truncated; `hit`: whether they were on disk already.
    """

    embeds: Tensor
    flags: Tensor
    hit: bool


def folder_size(folder: Path) -> int:
    """Total size in bytes of all files in and below a folder; 0 if it does not exist."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.path.getsize(os.path.join(place, name))
            except OSError:  # deleted in between
                continue
    return size


def keep(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file of the cache atomically. If that fails (full disk, no permission), warns once and continues."""
    try:
        with atomic_write(path) as temporary:
            write(temporary)
    except (OSError, SafetensorError) as error:  # safetensors wraps an OSError in its own class
        cannot_write(path.parent, getattr(error, "strerror", None) or str(error).splitlines()[0])


@cache
def cannot_write(folder: Path, reason: str) -> None:
    """Warns, once, that a folder of the cache cannot be written to."""
    logger.warning(
        "Nothing can be kept in %s: %s. It is computed again when needed. To use another folder, set %s.",
        folder,
        reason,
        VARIABLE,
    )


def check_short_side(short_side: int, size: tuple[int, int] | None) -> None:
    """Raises `UserError` if kept pictures would be smaller than what the model sees (`size`; None if it has none)."""
    if size and short_side < min(size):
        raise UserError(
            f"--decode_cache: expected at least {min(size)}, the side in pixels of what the model sees, found {short_side}."
        )


class DecodedPictures:
    """Pictures decoded and shrunk once, and kept as uint8 `(height, width, 3)`, one file each.

    Later crops start from the smaller picture, so the result is not bit-equal. A file's name is the sha256 of the
    picture's bytes; a damaged file is written again; several processes may write at once. Files are uncompressed, since
    reading one is then faster than decoding a JPEG of the same size.

    Args:
        short_side: in pixels, at least 1. Smaller pictures keep their size.
        folder: default `pictures` of the cache.
    """

    def __init__(self, short_side: int, folder: Path | None = None):
        self.short_side = short_side
        # 1: version of the format.
        self.folder = (folder or cache_folder("pictures")) / f"1-{short_side}"

    def read(self, source: dict | None) -> Image.Image:
        """The picture of an undecoded `datasets.Image`.

        Raises:
            BadImage: it cannot be read.
        """
        try:
            content = stored_bytes(source)
        except BadImage:  # there are no bytes, or too many to hold twice: the same as without a cache
            return read_image(source)
        name = hashlib.sha256(content).hexdigest()
        path = self.folder / name[:2] / f"{name}.npy"
        found = self._load(path)
        if found is not None:
            return found
        image = read_image(content)
        scale = self.short_side / min(image.size)
        if scale < 1:
            size = [max(self.short_side, round(side * scale)) for side in image.size]
            image = image.resize(size, Image.Resampling.BICUBIC)
        keep(path, lambda file: file.write_bytes(_packed(np.asarray(image))))
        return image

    def _load(self, path: Path) -> Image.Image | None:
        try:
            data = path.read_bytes()
        except OSError:
            return None
        try:
            if zlib.crc32(memoryview(data)[:-4]) != int.from_bytes(data[-4:], "little"):
                raise ValueError("its checksum does not match")
            return Image.fromarray(np.load(io.BytesIO(data), allow_pickle=False))
        except (ValueError, EOFError, TypeError) as error:
            logger.warning("%s is damaged (%s) and is written again.", path, error)
            return None


def _packed(pixels: np.ndarray) -> bytes:
    """A `.npy` file followed by its checksum, as bytes."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(pixels), allow_pickle=False)
    return buffer.getvalue() + zlib.crc32(buffer.getvalue()).to_bytes(4, "little")
