"""Predictions for inspection: a table with all of them, and a contact sheet with some pictures."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, Image
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from ..data.images import BadImage, read_image
from .evaluation import Predictions
from .figures import legible

CELL, TEXT = 128, 44  # pixels: side of a picture, height of the two lines below it
GREEN, RED, GREY = (22, 120, 50), (190, 30, 30), (90, 90, 90)


def predictions_table(predictions: Predictions) -> Dataset:
    """One row per test image: `index`, `label`, `prediction` (names; null label: unreadable image), `score` (0 to 1)."""
    names, predicted = predictions.class_names, predictions.predicted
    return Dataset.from_dict(
        {
            "index": list(range(len(predicted))),
            "label": [names[label] if label >= 0 else None for label in predictions.labels],
            "prediction": [
                names[p] if label >= 0 else None for p, label in zip(predicted, predictions.labels, strict=True)
            ],
            "score": predictions.scores.max(axis=1).tolist(),
        }
    )


def contact_sheet(dataset: Dataset, predictions: Predictions, columns: int = 8, rows: int = 4) -> PILImage.Image:
    """Pictures spread evenly over the split, with prediction and score; green is right, red is wrong and has the true class."""
    readable = np.flatnonzero(predictions.labels >= 0)
    chosen = readable[np.linspace(0, len(readable) - 1, min(columns * rows, len(readable))).astype(int)]
    undecoded = dataset.cast_column("image", Image(decode=False))
    lines = -(-len(chosen) // columns)
    sheet = PILImage.new("RGB", (columns * CELL, lines * (CELL + TEXT)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for place, index in enumerate(chosen.tolist()):
        x, y = place % columns * CELL, place // columns * (CELL + TEXT)
        try:
            picture = read_image(undecoded[index]["image"])
        except BadImage:
            continue
        picture.thumbnail((CELL - 12, CELL - 12))
        sheet.paste(picture, (x + (CELL - picture.width) // 2, y + (CELL - picture.height) // 2))
        predicted, truth = int(predictions.predicted[index]), int(predictions.labels[index])
        names, score = predictions.class_names, predictions.scores[index, predicted]
        name = legible(names[predicted], predicted)
        right = predicted == truth
        draw.text((x + 5, y + CELL), fit(f"{score:.0%} {name}", CELL - 8, font), GREEN if right else RED, font)
        if not right:
            draw.text((x + 5, y + CELL + 18), fit(f"is {legible(names[truth], truth)}", CELL - 8, font), GREY, font)
    return sheet


def fit(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """The text, truncated to `width` pixels."""
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text
