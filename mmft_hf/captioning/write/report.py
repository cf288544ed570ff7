"""The report on a captioned dataset: an HTML page and a picture for the card. The page is `templates/captions.html.j2`."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import wrap

import numpy as np
from datasets import Dataset, Image
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from ...core.pages import render_page
from ...data.images import BadImage, read_image
from ...data.texts import clean_class_name, printable
from ...version import __version__
from ..judge.checks import CHECKS, TABLE
from ..types import ACCEPTED, OPEN
from .card import TEMPLATES, captioned_splits, title
from .output_folder import PAGE_FILE, PICTURE_FILE
from .statistics import CaptionStatistics, percentage, spread

SAMPLES, NOTABLE_SAMPLES, ON_PICTURE = 12, 12, 6
THUMBNAIL = 320  # pixels: longer side of a picture on the page
BINS = 36  # of a histogram of lengths


def caption_report(
    statistics: CaptionStatistics,
    folder: str | Path,
    details: Mapping,
    rejected_text: Callable[[int, int], str | None] = lambda row, position: None,
) -> Path:
    """Writes `captions.html`, one page without scripts or external resources, and `captions.png`, a picture for the card.

    Args:
        statistics: of the captioned split. Only the images that are shown are read.
        folder: must exist.
        details: how the captions were made, as in `captions.json`; every entry may be missing. The page shows `made_from`
            (`dataset_name`, `split`), `model`, `run_id`, `prompt_texts` by aspect, `spent`, `last_run`, and the
            `token_limit` of `checks`.
        rejected_text (*optional*): the text of an answer that was not accepted, which the dataset does not hold, from its
            row and its position in `caption_records`.

    Returns:
        The page.
    """
    figures, names = statistics.figures, statistics.class_names
    images = statistics.dataset.cast_column("image", Image(decode=False))
    chosen = statistics.sample_rows(SAMPLES)
    kinds = sorted(statistics.notable.items(), key=_severity)
    notable = [(kind, *places[turn]) for turn in range(3) for kind, places in kinds if turn < len(places)]
    page = render_page(
        TEMPLATES / "captions.html.j2",
        title=title(details),
        splits=captioned_splits(details),
        missing=sum(figures["statuses"].get(status, 0) for status in OPEN),
        statistics=statistics,
        figures=figures,
        details=details,
        samples=[_sample(images[row], names) for row in chosen],
        notable=[
            _notable_sample(images[row], names, kind, position, rejected_text(row, position))
            for kind, row, position in notable[:NOTABLE_SAMPLES]
        ],
        limit=(details.get("checks") or {}).get("token_limit"),
        histogram_of=_histogram,
        overlap={tuple(pair["aspects"]): pair["jaccard"] for pair in figures["overlap"]},
        checks=TABLE,
        printable=printable,
        percentage=percentage,
        spread=spread,
        version=__version__,
    )
    path = Path(folder) / PAGE_FILE
    path.write_text(page, encoding="utf-8")
    rows = chosen[:ON_PICTURE] or list(range(min(ON_PICTURE, len(images))))
    _sheet(images, rows, names).save(path.with_name(PICTURE_FILE), optimize=True)
    return path


# -- samples ----------------------------------------------------------------------------------------------------------
def _class_name(names: list[str], label: int | None) -> str:
    known = label is not None and 0 <= label < len(names)
    return printable(clean_class_name(names[label])) if known else "no label"


def _accepted(row: Mapping) -> list[tuple[str, str]]:
    """Aspects and texts of a row's captions."""
    return [(r["aspect"] or "", r["text"]) for r in row["caption_records"] if r["status"] in ACCEPTED and r["text"]]


def _sample(row: Mapping, names: list[str]) -> dict:
    """What the page shows of one row; `picture` is None if the image cannot be read."""
    try:
        picture, buffer = read_image(row["image"]), io.BytesIO()
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        picture.save(buffer, "JPEG", quality=82, optimize=True)
    except BadImage:
        buffer = None
    jpeg = buffer and buffer.getvalue()
    return {"picture": jpeg, "heading": _class_name(names, row["label"]), "entries": _accepted(row), "tags": []}


def _notable_sample(row: Mapping, names: list[str], kind: str, position: int, rejected_text: str | None) -> dict:
    """What the page shows of one record: its text, its checks and the file name of its image."""
    record = row["caption_records"][position]
    tags = [kind, *(check for check in record["checks"] or () if check not in (*kind.split(": "), "refusal"))]
    entries = [(record["aspect"] or "", record["text"] or rejected_text or "")]
    if name := Path(row["image"]["path"] or "").name:
        entries.append(("file", printable(name)))
    return _sample(row, names) | {"entries": entries, "tags": tags}


def _severity(entry: tuple[str, list]) -> tuple:
    """Sorts kinds of notable records: denied labels, then what was not accepted, then what was."""
    kind = entry[0]
    return "label_contradicted" not in kind, kind in CHECKS, kind


def _histogram(lengths: Mapping[int, int], limit: int | None) -> dict:
    """Heights of the bars from 0 to 1, and the place of the limit among them."""
    top = max(*lengths, limit or 1, 1) + 1
    bars, _ = np.histogram(list(lengths), BINS, (0, top), weights=list(lengths.values()))
    return {"bars": (bars / bars.max()).tolist(), "limit": limit and BINS * limit / top}


# -- the picture ------------------------------------------------------------------------------------------------------
def _sheet(images: Dataset, rows: list[int], names: list[str]) -> PILImage.Image:
    """A few images with their captions, in two columns."""
    width, height, gap = 470, 216, 14  # pixels
    lines = max(-(-len(rows) // 2), 1)
    sheet = PILImage.new("RGB", (2 * (width + gap) + gap, lines * (height + gap) + gap), "#fbfaf8")
    for place, row in enumerate(rows):
        tile = _tile(images[row], names, width, height)
        sheet.paste(tile, (gap + place % 2 * (width + gap), gap + place // 2 * (height + gap)))
    return sheet


def _tile(row: Mapping, names: list[str], width: int, height: int) -> PILImage.Image:
    """One image with its class and the first of its captions."""
    side, left = 150, 176  # pixels: of the picture, and where the text begins
    font, bold = ImageFont.load_default(13), ImageFont.load_default(15)
    tile = PILImage.new("RGB", (width, height), "#fbfaf8")
    draw = ImageDraw.Draw(tile)
    draw.rounded_rectangle((0, 0, width - 1, height - 1), 8, "white", "#e4e2dd")
    try:
        picture = read_image(row["image"])
        picture.thumbnail((side, height - 24))
        tile.paste(picture, (12 + (side - picture.width) // 2, (height - picture.height) // 2))
    except BadImage:
        draw.text((24, height // 2), "cannot be read", "#656d76", font)
    draw.text((left, 10), _lines(_class_name(names, row["label"]), 36, 1), "#1f2328", bold)
    captions, top = _accepted(row) or [("", "no caption")], 34
    for aspect, text in captions[:4]:
        text = f"{aspect}: {text}" if aspect and len(captions) > 1 else text
        text = _lines(text, 44, max(2, 10 // min(len(captions), 4)))
        draw.multiline_text((left, top), text, "#3b424a", font, spacing=3)
        top += 16 * len(text.split("\n")) + 5
    return tile


def _lines(text: str, characters: int, most: int) -> str:
    """The text in at most `most` lines."""
    return "\n".join(wrap(text, characters, max_lines=most, placeholder=" …"))
