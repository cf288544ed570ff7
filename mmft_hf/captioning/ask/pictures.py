"""Pictures on their way to a captioner: original bytes read when they are due, checked, made small, and encoded."""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict, dataclass

from PIL import Image

from ...data.images import open_image, reading, upright_rgb
from ..types import Picture

SENT_AS_THEY_ARE = ("JPEG", "PNG", "WEBP")  # what every provider reads
# What a header may say beside the pixels without telling of people or places.
HARMLESS = {"jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi", "gamma", "srgb", "chromaticity", "icc_profile"}
HARMLESS |= {
    "progressive",
    "progression",
    "interlace",
    "adobe",
    "adobe_transform",
    "aspect",
    "loop",
    "timestamp",
    "background",
}


@dataclass(frozen=True)
class PicturePolicy:
    """How a picture is changed before it is sent. Part of every request's key.

    Args:
        max_side: the longer side is made at most this many pixels; smaller pictures are not enlarged.
        quality: of the JPEG, where one has to be made.
    """

    max_side: int = 512
    quality: int = 92

    def spec(self) -> dict:
        return {**asdict(self), "version": 1}


def sha256(data: bytes) -> str:
    """Hex digest: what an image is known by."""
    return hashlib.sha256(data).hexdigest()


def prepare(data: bytes, policy: PicturePolicy) -> Picture:
    """Decodes the whole picture, which finds damage before it is paid for, and encodes what is sent.

    A small upright JPEG, PNG or WebP without transparency goes as it is. All else becomes an RGB JPEG, so that neither
    EXIF data (places, people's names) nor rare formats leave the machine.

    Raises:
        BadImage: it cannot be decoded, or has far too many pixels.
    """
    with reading():
        image = open_image(data)
        kind, (width, height) = image.format, image.size
        plain = image.mode in ("RGB", "L") and set(image.info) <= HARMLESS and not getattr(image, "is_animated", False)
        if kind in SENT_AS_THEY_ARE and plain and max(width, height) <= policy.max_side:
            image.load()
            return Picture(data, Image.MIME[kind], width, height)
        if kind == "JPEG":
            image.draft("RGB", (policy.max_side, policy.max_side))  # decodes at a half, a quarter or an eighth
        image = upright_rgb(image)
        image.thumbnail((policy.max_side, policy.max_side), Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=policy.quality)
        return Picture(encoded.getvalue(), "image/jpeg", *image.size)
