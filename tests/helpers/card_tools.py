"""What stands on a card: its Python, run as a reader would, and whether a picture shows anything."""

import contextlib
import io
import re

import numpy as np
from PIL import Image


def snippets(text: str) -> list[str]:
    return re.findall(r"^(?:`{3,})python\n(.*?)^`{3,}$", text, flags=re.DOTALL | re.MULTILINE)


def execute(snippet: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "card", "exec"), {})
    return printed.getvalue()


def ink(picture: Image.Image) -> float:
    """The share of pixels that are not white."""
    return float((np.asarray(picture.convert("L")) < 250).mean())
