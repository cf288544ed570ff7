"""Prepares pictures for a captioner: decodes, shrinks and encodes them."""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict, dataclass

from PIL import Image

from ...data.images import MAX_RATIO, open_image, reading, upright_rgb
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
        image = upright_rgb(image)
        image.thumbnail((policy.max_side, policy.max_side), Image.Resampling.LANCZOS)
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=policy.quality)
        return Picture(encoded.getvalue(), "image/jpeg", *image.size)
