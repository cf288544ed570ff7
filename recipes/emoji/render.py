"""Pictures of the icons: SVG through rsvg-convert, 128 pixels, on white."""

import io
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 128
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{body}</svg>'
)
DEFAULTS = {"width": 16, "height": 16, "left": 0, "top": 0}  # Iconify's


def icon_svg(icons: dict, name: str) -> bytes:
    """The SVG of one icon of an Iconify set."""
    icon = icons["icons"][name]
    box = {key: icon.get(key, icons.get(key, default)) for key, default in DEFAULTS.items()}
    return SVG.format(**box, body=icon["body"]).encode()


def draw(source: bytes | Path) -> bytes | None:
    """SVG text, or the path of an SVG or WebP file -> PNG, `SIZE` x `SIZE`, RGB; None if it fails or is blank."""
    if isinstance(source, Path) and source.suffix == ".webp":
        image = Image.open(source).convert("RGBA")
    else:
        command = [
            "rsvg-convert",
            "-w",
            str(2 * SIZE),
            "-h",
            str(2 * SIZE),
            "--keep-aspect-ratio",
            "--unlimited",
            "-f",
            "png",
        ]
        words, text = ([str(source)], None) if isinstance(source, Path) else ([], source)
        done = subprocess.run(command + words, input=text, capture_output=True, timeout=60)
        if done.returncode or not done.stdout:
            return None
        image = Image.open(io.BytesIO(done.stdout)).convert("RGBA")
    image = _square(image)
    if np.asarray(image).std() < 3.0:
        return None
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _square(image: Image.Image) -> Image.Image:
    """In the middle of a white square, its proportions kept."""
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(white, image).convert("RGB")
    scale = SIZE / max(image.size)
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    square = Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
    square.paste(image.resize((width, height), Image.LANCZOS), ((SIZE - width) // 2, (SIZE - height) // 2))
    return square
