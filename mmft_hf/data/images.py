"""Reads one picture in whatever form it comes, and draws crops."""

from __future__ import annotations

import hashlib
import importlib
import io
import math
import os
import stat
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..core.errors import UserError
from ..core.reading import FETCH, POINTER

# Above this many pixels a picture counts as bad before it is decoded: Pillow itself only warns up to twice the limit.
MAX_PIXELS = 178_956_970
# Of a picture that is longer than this many times its width, or wider than this many times its height, only the middle is
# used. Models look at a square: a processor that enlarges the shorter side to 224 pixels makes 224 x 4,480,000 of 1 x 20,000.
MAX_RATIO = 100


def _heif() -> bool:
    """Teaches Pillow HEIC if a plug-in is installed."""
    for name in ("pillow_heif", "pi_heif"):
        try:
            importlib.import_module(name).register_heif_opener()
            return True
        except (ImportError, AttributeError):  # missing, broken, or an unrelated folder of this name
            continue
    return False


def _avif() -> bool:
    """Whether Pillow reads AVIF: by itself since 11.3, before with a plug-in."""
    for name in ("PIL._avif", "pillow_avif"):
        try:
            importlib.import_module(name)
            return True
        except ImportError:
            continue
    return False


HEIF, AVIF = _heif(), _avif()
# Formats that are decoded. Pillow knows more; those with large or rarely tested parsers (EPS, PSD, FLI …) are excluded.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *["AVIF"] * AVIF, *["HEIF"] * HEIF)

_HEIF_SUFFIXES = (".heic", ".heif", ".hif")
PICTURE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm .pfm".split()
    + [".avif"] * AVIF
    + [*_HEIF_SUFFIXES] * HEIF
)
"""Suffixes, in small letters, of files that are read as pictures here and now."""

_INSTALL = {".avif": 'pip install "pillow>=11.3"'} | dict.fromkeys(_HEIF_SUFFIXES, 'pip install "mmft_hf[heic]"')
UNREADABLE_SUFFIXES = dict.fromkeys(
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl .sr2 .srf "
    ".srw .x3f .ai .dcm .dicom .dds .eps .exr .fits .hdr .ico .j2c .j2k .jls .jp2 .jpf .jpx .jxl .jxr .nii .pcx .pdf "
    ".psb .psd .qoi .svg .svgz .tga .wdp .wmf .xcf".split(),
    "convert them to JPEG or PNG",
) | {suffix: command for suffix, command in _INSTALL.items() if suffix not in PICTURE_SUFFIXES}
"""Suffixes, in small letters, of pictures that cannot be read, each with what to do about them."""

MAX_FILE_BYTES = 256 * 2**20


class BadImage(UserError):
    """A picture that cannot be read: corrupt, missing or far too large."""


def read_image(source) -> Image.Image:
    """Returns a picture as RGB, turned upright by its EXIF tag, with white behind transparent parts.

    Grey values of 16 or 32 bits are scaled to 8, see `to_bytes`. Of an extremely long or wide picture (`MAX_RATIO`) this is the
    middle; of an animation, the first frame.

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
        file = io.BytesIO(source) if isinstance(source, bytes) else _regular_file(os.fspath(source))
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError as error:
            found = _other_format(file)
            raise BadImage(f"expected a picture ({', '.join(FORMATS)}), found {found}") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"expected at most {MAX_PIXELS:,} pixels, found {image.width:,} x {image.height:,}")
    return image


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decodes a picture to upright RGB, with white behind transparent parts. Call it within `reading()`.

    Of a picture more than `MAX_RATIO` times as long as wide, or as wide as long, this is the middle.
    """
    image = ImageOps.exif_transpose(image)  # a copy, even if there is nothing to turn
    width, height = image.size
    w, h = min(width, MAX_RATIO * height), min(height, MAX_RATIO * width)
    if (w, h) != (width, height):
        left, top = (width - w) // 2, (height - h) // 2
        image = image.crop((left, top, left + w, top + h))
    return _to_rgb(image)


@contextmanager
def reading():
    """Turns any exception of Pillow into `BadImage`: for damaged files its decoders raise all kinds of errors."""
    try:
        yield
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _other_format(file: io.BytesIO | str) -> str:
    """What a file that Pillow does not know is, in words, with the command that makes it readable."""
    if isinstance(file, io.BytesIO):
        start = file.getvalue()[: len(POINTER)]
    else:
        with open(file, "rb") as opened:
            start = opened.read(len(POINTER))
    if start == POINTER:
        return FETCH
    # A file of the ISO base media kind names its brand, then the compatible ones.
    brands = start[8:32] if start[4:8] == b"ftyp" else b""
    for name, suffix, known in (
        ("AVIF", ".avif", (b"avif", b"avis")),
        ("HEIC", ".heic", (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")),
    ):
        if any(brand in brands for brand in known) and suffix in UNREADABLE_SUFFIXES:
            return f"{name}: type {_INSTALL[suffix]}"
    return "a file of none of these formats"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # Pillow's own conversion clips everything above 255 to white.
        image = Image.fromarray(to_bytes(np.asarray(image)))
    if image.mode in ("RGBa", "La"):  # premultiplied; from here Pillow converts to the plain kind alone
        image = image.convert(image.mode.upper())
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Scales grey values of 16 or 32 bits `(height, width)` linearly to 0..255: the smallest to 0, the largest to 255.

    A few pixels (four, or one of 10,000 if that is more) do not decide alone: if leaving them out at either end leaves less
    than a quarter of the range, they are clipped to what the others span. If the others are all equal, those few are the
    picture and nothing is clipped. Infinite values become 0 or 255, undefined ones (NaN) 0.
    """
    numbers = values[np.isfinite(values)] if values.dtype.kind == "f" else values.ravel()
    if not numbers.size:
        return np.zeros(values.shape, np.uint8)
    few = min(max(4, numbers.size // 10_000), numbers.size // 4)
    ordered = np.partition(numbers, (0, few, numbers.size - 1 - few, numbers.size - 1))
    low, first, last, high = ordered[[0, few, -1 - few, -1]].astype(np.float64).tolist()
    if 0 < 4 * (last - first) < high - low:
        low, high = first, last
    shifted = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low).clip(low, high) - low
    # Subnormal numbers have no reciprocal.
    return (shifted * (255 / max(high - low, float(np.finfo(np.float32).tiny)))).astype(np.uint8)


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
    try:
        return Path(_regular_file(path, MAX_FILE_BYTES)).read_bytes()
    except OSError as error:
        raise BadImage(f"{Path(path).name}: {error.strerror or error}") from error
    except BadImage as error:
        raise BadImage(f"{Path(path).name}: {error}") from error


def _regular_file(path: str, most_bytes: float = math.inf) -> str:
    """The path; raises `BadImage` unless it names a regular file: a pipe would wait for ever."""
    if "://" in path:
        raise BadImage(f"expected a file, found an address ({path[:80]}), and addresses inside data are not fetched")
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise BadImage("expected a picture, found no such file") from None
    if not stat.S_ISREG(found.st_mode):
        raise BadImage("expected a regular file, found something else")
    if found.st_size > most_bytes:
        raise BadImage(f"expected a file of at most {most_bytes:,} bytes, found a larger one")
    return path


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
