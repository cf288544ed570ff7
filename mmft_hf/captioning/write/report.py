"""The report on a captioned dataset: an HTML page and a picture for the card. The page is `templates/captions.html.j2`."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from textwrap import wrap

from datasets import Image
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from ...core.files import CARD_FILE, PAGE_FILE, PICTURE_FILE
from ...core.pages import render_page
from ...data.images import BadImage, read_image
from ...data.texts import LONGEST_NAMES, clean_class_name, printable
from ...version import __version__
from ..judge.checks import CHECKS, MEANINGS
from ..types import ACCEPTED, OPEN
from .card import TEMPLATES, captioned_splits, title
from .statistics import CaptionStatistics, percentage, spread

SAMPLES, NOTABLE_SAMPLES, ON_PICTURE = 12, 12, 6
THUMBNAIL = 320  # pixels: longer side of a picture on the page


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
    kinds = sorted(statistics.notable.items(), key=_severity)
    notable = [(kind, *places[turn]) for turn in range(3) for kind, places in kinds if turn < len(places)]
    rows = statistics.sample_rows(SAMPLES) or range(min(SAMPLES, len(images)))
    samples = [show_row(images[row], names) for row in rows]
    page = render_page(
        TEMPLATES / "captions.html.j2",
        title=title(details),
        splits=captioned_splits(details),
        missing=sum(figures["statuses"].get(status, 0) for status in OPEN),
        statistics=statistics,
        figures=figures,
        details=details,
        samples=samples,
        notable=[
            _notable_sample(images[row], names, kind, position, rejected_text(row, position))
            for kind, row, position in notable[:NOTABLE_SAMPLES]
        ],
        limit=(details.get("checks") or {}).get("token_limit"),
        checks=MEANINGS,
        percentage=percentage,
        spread=spread,
        card=CARD_FILE,
        version=__version__,
    )
    path = Path(folder) / PAGE_FILE
    path.write_text(page, encoding="utf-8")
    _sheet(samples[:ON_PICTURE]).save(path.with_name(PICTURE_FILE), optimize=True)
    return path


# -- samples ----------------------------------------------------------------------------------------------------------
def _class_name(names: list[str], label: int | list[int] | None) -> str:
    if isinstance(label, list):
        return printable(clean_class_name(", ".join(names[c] for c in label)), LONGEST_NAMES) or "no label"
    known = label is not None and 0 <= label < len(names)
    return printable(clean_class_name(names[label])) if known else "no label"


def _accepted(row: Mapping) -> list[tuple[str, str]]:
    """Aspects and texts of a row's captions."""
    records = row.get("caption_records") or ()
    return [(r["aspect"] or "", r["text"]) for r in records if r["status"] in ACCEPTED and r["text"]]


def show_row(row: Mapping, names: list[str]) -> dict:
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
    return show_row(row, names) | {"entries": entries, "tags": tags}


def _severity(entry: tuple[str, list]) -> tuple:
    """Sorts kinds of notable records: denied labels, then what was not accepted, then what was."""
    kind = entry[0]
    return "label_contradicted" not in kind, kind in CHECKS, kind


# -- the picture ------------------------------------------------------------------------------------------------------
def _sheet(samples: list[dict]) -> PILImage.Image:
    """A few images in two columns, each next to its class and the first of its captions."""
    width, height, margin, left = 470, 216, 12, 176  # pixels; `left` is where the text begins
    sheet = PILImage.new("RGB", (2 * width, height * max(-(-len(samples) // 2), 1)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for place, sample in enumerate(samples):
        x, y = place % 2 * width, place // 2 * height + margin
        if sample["picture"]:
            picture = PILImage.open(io.BytesIO(sample["picture"]))
            picture.thumbnail((left - 2 * margin, height - 2 * margin))
            sheet.paste(picture, (x + margin, y))
        else:
            draw.text((x + margin, y), "cannot be read", "gray", font)
        captions = [f"{aspect}: {text}" for aspect, text in sample["entries"][:4]] or ["no caption"]
        lines = [wrap(text, 44, max_lines=max(2, 10 // len(captions)), placeholder=" …") for text in captions]
        text = "\n".join([*wrap(sample["heading"], 44, max_lines=1), "", *chain(*lines)])
        draw.multiline_text((x + left, y), text, "black", font)
    return sheet
