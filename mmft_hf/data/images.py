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

# Above this many pixels a picture counts as bad before it is decoded: Pillow itself only warns up to twice the limit.
MAX_PIXELS = 178_956_970


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
        file = io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source)
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError as error:
            found = _other_format(file)
            raise BadImage(f"expected a picture ({', '.join(FORMATS)}), found {found}") from error
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
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _other_format(file: io.BytesIO | str) -> str:
    """What a file that Pillow does not know is, in words, with the command that makes it readable."""
    if isinstance(file, io.BytesIO):
        start = file.getvalue()[:32]
    else:
        with open(file, "rb") as opened:
            start = opened.read(32)
    # A file of the ISO base media kind names its brand, then the compatible ones.
    brands = start[8:] if start[4:8] == b"ftyp" else b""
    for name, suffix, known in (
        ("AVIF", ".avif", (b"avif", b"avis")),
        ("HEIC", ".heic", (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")),
    ):
        if any(brand in brands for brand in known) and suffix in UNREADABLE_SUFFIXES:
            return f"{name}: type {_INSTALL[suffix]}"
    return "a file of none of these formats"


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
