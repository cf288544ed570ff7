"""Prepares pictures for a captioner: decodes, shrinks and encodes them."""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import asdict, dataclass

from PIL import Image, ImageDraw

from ...data.images import MAX_RATIO, BadImage, open_image, reading, upright_rgb
from ..types import Picture

SENT_AS_THEY_ARE = ("JPEG", "PNG", "WEBP")  # formats that every provider reads
# Fields of a header that tell nothing about people or places.
HARMLESS = set(
    "jfif jfif_version jfif_unit jfif_density dpi gamma srgb chromaticity icc_profile progressive progression interlace adobe "
    "adobe_transform aspect loop timestamp background".split()
)


@dataclass(frozen=True)
class PicturePolicy:
    """How a picture is changed before it is sent. Part of every request's key.

    Args:
        max_side: longer side in pixels to which larger pictures are reduced.
        quality: JPEG quality of the pictures that are encoded again.
    """

    max_side: int = 512
    quality: int = 92

    def spec(self) -> dict:
        return {**asdict(self), "version": 1}


def sha256(data: bytes) -> str:
    """Hex digest, which identifies an image."""
    return hashlib.sha256(data).hexdigest()


def prepare(data: bytes, policy: PicturePolicy) -> Picture:
    """Decodes the whole picture, which finds damage before it is paid for, and encodes what is sent.

    Small upright JPEG, PNG and WebP files without transparency are sent as they are. Anything else becomes an RGB JPEG, so
    that neither EXIF data (places, names) nor rare formats leave the machine.

    Raises:
        BadImage: it cannot be decoded, or has far too many pixels.
    """
    with reading():
        image = open_image(data)
        kind, (width, height) = image.format, image.size
        plain = image.mode in ("RGB", "L") and set(image.info) <= HARMLESS and not getattr(image, "is_animated", False)
        small = max(width, height) <= min(policy.max_side, MAX_RATIO * min(width, height))
        if kind in SENT_AS_THEY_ARE and plain and small:
            image.load()
            return Picture(data, Image.MIME[kind], width, height)
        if kind == "JPEG":
            image.draft(
                "RGB", (policy.max_side, policy.max_side)
            )  # decodes at a half, a quarter or an eighth of the size
        return _encoded(_reduced(upright_rgb(image), policy), policy)


def shown(data: bytes, what: str, policy: PicturePolicy) -> Picture:
    """What is sent of a picture: the whole, a part, or the whole with an outline. The stored bytes stay as they are.

    Args:
        what: see `asking.View`.

    Raises:
        BadImage: it cannot be decoded, or the box lies outside of it.
        ValueError: an unknown view.
    """
    if what == "whole":
        return prepare(data, policy)
    with reading():
        image = upright_rgb(open_image(data))
    kind, _, where = what.partition(":")
    if kind == "marked":
        return _encoded(outlined(image, _box(where, image.size), policy), policy)
    return _encoded(_reduced(part(image, what), policy), policy)


def part(image: Image.Image, what: str) -> Image.Image:
    """A view that is a part of an upright picture: a quarter, the middle half of each side, or a box.

    Raises:
        BadImage: the box lies outside of the picture.
        ValueError: an unknown view.
    """
    width, height = image.size
    kind, _, where = what.partition(":")
    if kind == "whole":
        return image
    if kind == "quadrant" and where in ("0", "1", "2", "3"):
        row, column = divmod(int(where), 2)
        x, y = width // 2 * column, height // 2 * row
        box = (x, y, width if column else max(1, width // 2), height if row else max(1, height // 2))
    elif kind == "centre":
        box = (width // 4, height // 4, width - width // 4, height - height // 4)
    elif kind == "box":
        box = _box(where, image.size)
    else:
        raise ValueError(f"a view {what!r}")
    return image.crop(box)


OUTLINE, OUTLINE_NAME = (255, 0, 255), "magenta"  # hardly ever the colour of an object


def outlined(image: Image.Image, box: tuple[int, int, int, int], policy: PicturePolicy) -> Image.Image:
    """The picture, reduced, with an outline just inside of a box. No other pixel changes."""
    small = _reduced(image.copy(), policy)
    wide, high = small.width / image.width, small.height / image.height
    x0, y0 = int(box[0] * wide), int(box[1] * high)
    x1, y1 = max(x0, math.ceil(box[2] * wide) - 1), max(y0, math.ceil(box[3] * high) - 1)
    ImageDraw.Draw(small).rectangle((x0, y0, x1, y1), outline=OUTLINE, width=max(1, max(small.size) // 170))
    return small


def _box(where: str, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part of a box `x0,y0,x1,y1` that lies within a picture of this size, in whole pixels."""
    x0, y0, x1, y1 = map(float, where.split(","))
    left, top = max(0, math.floor(x0)), max(0, math.floor(y0))
    right, bottom = min(size[0], math.ceil(x1)), min(size[1], math.ceil(y1))
    if left >= right or top >= bottom:
        raise BadImage(f"expected a box within {size[0]} x {size[1]} pixels, found {where}")
    return left, top, right, bottom


def _reduced(image: Image.Image, policy: PicturePolicy) -> Image.Image:
    image.thumbnail((policy.max_side, policy.max_side), Image.Resampling.LANCZOS)
    return image


def _encoded(image: Image.Image, policy: PicturePolicy) -> Picture:
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=policy.quality)
    return Picture(encoded.getvalue(), "image/jpeg", *image.size)
