"""Predictions for inspection: a table with all of them, and a contact sheet with some pictures."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from ..data.images import BadImage, read_image
from .evaluation import Predictions
from .figures import legible

CELL, TEXT = 128, 44  # pixels: side of a picture, height of the two lines below it
GREEN, RED, GREY = (22, 120, 50), (190, 30, 30), (90, 90, 90)


def predictions_table(predictions: Predictions) -> Dataset:
    """One row per test image: `index`, `label`, `prediction` (names; null label: unreadable image), `score` (0 to 1).

    With several labels, `label`, `prediction` and `score` are lists; the scores are those of the predicted classes.
    """
    names, predicted = predictions.class_names, predictions.predicted
    if predictions.several_labels:
        rows = list(zip(predictions.labels, predicted, predictions.scores, predictions.known, strict=True))
        columns = {
            "index": list(range(len(rows))),
            "label": [chosen(names, label > 0) if known else None for label, _, _, known in rows],
            "prediction": [chosen(names, found) if known else None for _, found, _, known in rows],
            "score": [scores[found].tolist() if known else None for _, found, scores, known in rows],
        }
        texts = List(Value("string"))
        kinds = {"index": Value("int64"), "label": texts, "prediction": texts, "score": List(Value("float64"))}
        return Dataset.from_dict(columns, Features(kinds))
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
    readable = np.flatnonzero(predictions.known)
    shown = readable[np.linspace(0, len(readable) - 1, min(columns * rows, len(readable))).astype(int)]
    undecoded = dataset.cast_column("image", Image(decode=False))
    lines = -(-len(shown) // columns)
    sheet = PILImage.new("RGB", (columns * CELL, lines * (CELL + TEXT)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for place, index in enumerate(shown.tolist()):
        x, y = place % columns * CELL, place // columns * (CELL + TEXT)
        try:
            picture = read_image(undecoded[index]["image"])
        except BadImage:
            continue
        picture.thumbnail((CELL - 12, CELL - 12))
        sheet.paste(picture, (x + (CELL - picture.width) // 2, y + (CELL - picture.height) // 2))
        answer, truth, right = _said(predictions, index)
        draw.text((x + 5, y + CELL), fit(answer, CELL - 8, font), GREEN if right else RED, font)
        if not right:
            draw.text((x + 5, y + CELL + 18), fit(f"is {truth}", CELL - 8, font), GREY, font)
    return sheet


def _said(predictions: Predictions, index: int) -> tuple[str, str, bool]:
    """The answer to a picture, the truth, and whether they are the same."""
    names = [legible(name, number) for number, name in enumerate(predictions.class_names)]
    predicted, truth = predictions.predicted[index], predictions.labels[index]
    if predictions.several_labels:
        said = [", ".join(chosen(names, own)) or "none" for own in (predicted, truth > 0)]
        return *said, bool((predicted == (truth > 0)).all())
    return f"{predictions.scores[index, predicted]:.0%} {names[predicted]}", names[truth], bool(predicted == truth)


def chosen(names: list[str], which: np.ndarray) -> list[str]:
    """The names of the classes that `which`, bool `(C,)`, marks."""
    return [names[c] for c in np.flatnonzero(which)]


def fit(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """The text, truncated to `width` pixels."""
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text
