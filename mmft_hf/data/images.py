"""Reads one picture in whatever form it comes, and draws crops."""

from __future__ import annotations

import hashlib
import io
import math
import os
import stat
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..core.errors import UserError

# Above this many pixels a picture counts as bad before it is decoded: Pillow itself only warns up to twice the limit.
MAX_PIXELS = 178_956_970
# Formats that are decoded. Pillow knows more; those with large or rarely tested parsers (EPS, PSD, FLI …) are excluded.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_FILE_BYTES = 256 * 2**20


class BadImage(UserError):
    """A picture that cannot be read: corrupt, missing or far too large."""


def read_image(source) -> Image.Image:
    """Returns a picture as RGB, turned upright by its EXIF tag, with white behind transparent parts.

    Args:
        source: a `PIL.Image`, a path, bytes, or the `{"bytes", "path"}` of an undecoded `datasets.Image`.

    Raises:
        BadImage: it cannot be read, has none of the `FORMATS`, or has more than `MAX_PIXELS` pixels (checked in the
            header, before decoding).
    """
    with reading():
        return upright_rgb(open_image(source))


def open_image(source) -> Image.Image:
    """Opens a picture without decoding: size and format are known, pixels are not. Call it within `reading()`."""
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if source is None:
        raise BadImage("expected a picture, found nothing (no bytes and no path)")
    image = source
    if not isinstance(source, Image.Image):
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"expected at most {MAX_PIXELS:,} pixels, found {image.width:,} x {image.height:,}")
    return image


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decodes a picture to upright RGB, with white behind transparent parts. Call it within `reading()`."""
    return _to_rgb(ImageOps.exif_transpose(image))


@contextmanager
def reading():
    """Turns any exception of Pillow into `BadImage`: for damaged files its decoders raise all kinds of errors."""
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(f"expected a picture ({', '.join(FORMATS)}), found a file of none of these formats") from error
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # 16-bit grey (X-rays): Pillow's own conversion clips everything above 255 to white.
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        image = Image.fromarray(((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def original_bytes(image: dict | None) -> bytes:
    """The bytes of an undecoded image, from the dataset or from the file that it names.

    Raises:
        BadImage: there are no bytes. A network address is never fetched, and only pictures are read from files: a foreign dataset
            may name an endless device, or a file with a secret.
    """
    data = stored_bytes(image)
    if (image or {}).get("bytes") is None:
        with reading():
            open_image(data)
    return data


def stored_bytes(image: dict | None) -> bytes:
    """Returns the same bytes as `original_bytes`, but does not check that a file holds a picture: for comparing content."""
    image = image or {}
    if image.get("bytes") is not None:
        return image["bytes"]
    path = image.get("path")
    if not path:
        raise BadImage("expected a picture, found nothing (no bytes and no path)")
    if "://" in path:
        raise BadImage(f"expected a file, found an address ({path[:80]}), and addresses inside data are not fetched")
    try:
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):
            raise BadImage(f"{Path(path).name}: expected a regular file, found something else")
        if found.st_size > MAX_FILE_BYTES:
            raise BadImage(f"expected a file of at most {MAX_FILE_BYTES:,} bytes, found a larger one")
        return Path(path).read_bytes()
    except OSError as error:
        raise BadImage(f"{Path(path).name}: {error.strerror or error}") from error


def content_hash(image: dict | None) -> bytes:
    """sha256 of an undecoded image's bytes, stored or in the file that it names; 32 zeros if there are none."""
    image = image or {}
    if image.get("bytes") is not None:
        return hashlib.sha256(image["bytes"]).digest()
    digest = hashlib.sha256()
    try:
        if not stat.S_ISREG(os.stat(image.get("path") or "").st_mode):
            return bytes(32)
        with open(image["path"], "rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    except OSError:
        return bytes(32)
    return digest.digest()


def random_crop_box(width: int, height: int, min_area: float, rng: np.random.Generator) -> tuple[float, ...]:
    """A random crop `(left, top, right, bottom)` in pixels with `min_area` to 1 of the area and a ratio of 3/4 to 4/3.

    If ten draws find none that fits, as in a picture wider than 4:3 with a large `min_area`, the crop is the middle of the
    picture at the nearest allowed ratio.

    References: Szegedy et al. 2015, "Going Deeper with Convolutions", section 6 (random resized crop).
    """
    for _ in range(10):
        area = width * height * rng.uniform(min_area, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            return int(left), int(top), int(left) + w, int(top) + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
