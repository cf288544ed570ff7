"""Reading one picture, whatever form it comes in, and cropping it."""

from __future__ import annotations

import io
import math
import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import UserError

# Above this many pixels a picture counts as bad before it is decoded: Pillow itself only warns up to twice the limit.
MAX_PIXELS = 178_956_970


class BadImage(UserError):
    """A picture that cannot be read: corrupt, missing or far too large."""


def read_image(source) -> Image.Image:
    """Returns a picture as RGB, turned upright by its EXIF tag and laid on white where it is transparent.

    Args:
        source: a `PIL.Image`, a path, bytes, or the `{"bytes", "path"}` of an undecoded `datasets.Image`.

    Raises:
        BadImage: it cannot be read, or has more than `MAX_PIXELS` pixels (its header is asked before any decoding).
    """
    try:
        if isinstance(source, dict):
            source = source["bytes"] if source.get("bytes") is not None else source.get("path")
        if source is None:
            raise BadImage("expected a picture, found nothing (no bytes and no path)")
        image = (
            source
            if isinstance(source, Image.Image)
            else Image.open(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source))
        )
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"expected at most {MAX_PIXELS:,} pixels, found {image.width:,} x {image.height:,}")
        return _to_rgb(ImageOps.exif_transpose(image))
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage("expected a picture, found a file of no known image format") from error
    except Exception as error:  # at a damaged file, Pillow's decoders raise whatever they stumble over
        raise BadImage(f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # Sixteen-bit grey (X-rays): Pillow's own conversion would clip everything above 255 to white.
        values = np.asarray(image, dtype=np.float64)
        low, high = values.min(), values.max()
        image = Image.fromarray(((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def random_crop_box(width: int, height: int, min_area: float, rng: np.random.Generator) -> tuple[float, ...]:
    """A random crop `(left, top, right, bottom)` in pixels with `min_area` to 1 of the area and a ratio of 3/4 to 4/3.

    Where ten draws find none that fits, as in a picture wider than 4:3 at a large `min_area`, it is the middle of the
    picture at the nearest ratio allowed.

    References: Szegedy et al. 2015, "Going Deeper with Convolutions", section 6 (random resized crop).
    """
    for _ in range(10):
        area = width * height * rng.uniform(min_area, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            return int(left), int(top), int(left) + w, int(top) + h
    # No such crop fits, as in a wide picture: its middle at the nearest ratio allowed.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
