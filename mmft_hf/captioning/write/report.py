"""The caption report: a page and a picture for people, and the card of a captioned data set."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping
from html import escape
from pathlib import Path
from string import Template

from datasets import Dataset, Image
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from ...data.images import BadImage, read_image
from ...data.texts import clean_class_name, printable
from ...version import __version__
from ..judge.checks import CHECKS, TABLE
from ..types import OPEN
from .card import PAGE, PICTURE, TEMPLATES, caption_card, figures, origin, share, spread, title, with_all
from .statistics import CaptionTally, caption_statistics

__all__ = ["caption_card", "caption_report", "caption_statistics"]

SAMPLES, ODD_SAMPLES, ON_PICTURE = 12, 12, 6
THUMBNAIL = 320  # pixels: longer side of a picture on the page


def caption_report(
    dataset: Dataset,
    folder: str | Path,
    details: Mapping,
    unaccepted: Callable[[int, int], str | None] = lambda row, place: None,
) -> Path:
    """Writes `captions.html`, one page without scripts or outside resources, and `captions.png`, a picture for the card.

    Args:
        dataset: with the columns `image`, `label`, `caption_records` and `image_sha256`. Only the images that are shown are
            read.
        folder: must exist.
        details: how the captions were made, as in `captions.json`; every entry may be missing. Read are `made_from`
            (`dataset_name`, `split`), `model`, `run_id`, `prompt_texts` by aspect, `spent`, `last_run`, `checks` and `complete`.
        unaccepted (*optional*): the text of an answer that was not accepted, which the data set does not hold, by its row and
            its place in `caption_records`.

    Returns:
        The page.
    """
    tally = CaptionTally(dataset)
    pictures = dataset.cast_column("image", Image(decode=False))
    rows = tally.rows_to_show(SAMPLES)
    odd = [(row, place, kind) for turn in range(3) for kind, kept in sorted(tally.odd.items(), key=_gravity)
           for row, place in kept[turn : turn + 1]][:ODD_SAMPLES]  # fmt: skip
    statistics = tally.statistics()
    body = [
        _tiles(statistics),
        _section("Samples", "One image of each of some classes, drawn by chance.", _samples(pictures, rows, tally)),
        _section("By aspect", _lengths_note(details), _lengths(statistics, tally, details)),
        _section("Checks", "How many answers each check found something in. Answers that were asked again count too.",
                 _checks(statistics)),
        _section("Overlap of aspects", "Words that two captions of one image share, of all their words (mean Jaccard index).",
                 _overlap(statistics)),
        _section("What is missing", _missing_note(statistics), _failures(statistics)),
        _section("Worth a look", "Answers that were not accepted, and accepted ones that a check is about.",
                 _odd(pictures, odd, tally, unaccepted)),
        _section("Classes with the fewest captions", "", _classes(statistics)),
        _section("How they were made", "", _made(statistics, details)),
    ]  # fmt: skip
    missing = sum(statistics["statuses"].get(status, 0) for status in OPEN)
    state = f"{missing:,} captions are missing" if missing else "complete"
    page = Template((TEMPLATES / "captions.html").read_text(encoding="utf-8")).substitute(
        title=escape(title(details)),
        subtitle=escape(" · ".join([*origin(details), state])),
        body="\n".join(part for part in body if part),
        footer=escape(f"mmft_hf {__version__}"),
    )
    path = Path(folder) / PAGE
    path.write_text(page, encoding="utf-8")
    _sheet(pictures, rows[:ON_PICTURE] or list(range(min(ON_PICTURE, len(pictures)))), tally).save(
        path.with_name(PICTURE), optimize=True
    )
    return path


# -- tables -----------------------------------------------------------------------------------------------------------
def _tiles(statistics: dict) -> str:
    tiles = (
        f"<div class=tile><b>{escape(v)}</b><span>{escape(k)}</span></div>" for k, v in figures(statistics).items()
    )
    return f"<div class=tiles>{''.join(tiles)}</div>"


def _section(heading: str, note: str, content: str) -> str:
    return f"<h2>{escape(heading)}</h2>\n<p class=soft>{escape(note)}</p>\n{content}" if content else ""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells that are HTML already; a cell that begins with `<t` brings its own tags."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = []
    for first, *rest in rows:
        cells = "".join(cell if cell.startswith("<t") else f"<td>{cell}</td>" for cell in rest)
        lines.append(f"<tr><th>{first}</th>{cells}</tr>")
    return f"<div class=wide><table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _limit(details: Mapping) -> int | None:
    return (details.get("checks") or {}).get("token_limit")


def _lengths_note(details: Mapping) -> str:
    limit = _limit(details)
    text = "Tokens are those of the caption alone, begin and end tokens counted"
    return f"{text}; the text tower reads {limit} (dashed line), class template included." if limit else f"{text}."


def _lengths(statistics: dict, tally: CaptionTally, details: Mapping) -> str:
    rows = []
    for name, counts in with_all(statistics):
        seen = tally.all if counts is statistics["all"] else tally.aspects[name]
        captions = counts["captions"]
        rows.append(
            [
                escape(name),
                f"{captions:,}",
                spread(counts["words"]),
                spread(counts["clip_tokens"]),
                _histogram(seen.tokens or seen.words, _limit(details) if seen.tokens else None),
                share(counts["checks"]["over_token_limit"], counts["answers"]) if counts["clip_tokens"] else "–",
                share(counts["trimmed"], captions),
                share(counts["mentions_label"], captions),
            ]
        )
    lengths = "median · 95 % · most"
    head = ["aspect", "captions", f"words<br>{lengths}", f"tokens<br>{lengths}", "", "over limit", "cut", "name class"]
    return _table(head, rows)


def _histogram(counts: Mapping[int, int], limit: int | None) -> str:
    """Lengths as bars, with the limit as a line."""
    if not counts:
        return ""
    bins, top = 36, max(*counts, limit or 1, 1)
    bars = [0] * bins
    for length, count in counts.items():
        bars[min(length * bins // (top + 1), bins - 1)] += count
    most = max(bars)
    drawn = "".join(
        f'<rect x="{4 * i}" y="{36 - 36 * n / most:.1f}" width="3" height="{36 * n / most:.1f}"/>'
        for i, n in enumerate(bars)
        if n
    )
    x = 4 * bins * limit / (top + 1) if limit else 0
    line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="36"/>' if limit else ""
    return f'<svg viewBox="0 0 {4 * bins} 36" preserveAspectRatio="none" role="img" aria-label="lengths">{drawn}{line}</svg>'


def _bar(count: int, total: int) -> str:
    part = 100 * count / total if total else 0
    return f'<td class=bar style="--share:{part:.1f}%">{count:,} <small>{part:.1f} %</small></td>'


def _checks(statistics: dict) -> str:
    columns = with_all(statistics)
    names = list(statistics["all"]["checks"])
    fired = [name for name in names if statistics["all"]["checks"][name]]
    rows = [
        [
            f"{escape(name)}<small>{escape(TABLE[name].meaning if name in TABLE else '')}</small>",
            *(_bar(c["checks"].get(name, 0), c["answers"]) for _, c in columns),
        ]
        for name in fired
    ]
    never = ", ".join(name for name in names if name not in fired)
    silent = f"<p class=soft>Found nowhere: {escape(never)}.</p>" if never else ""
    return (_table(["check", *(escape(name) for name, _ in columns)], rows) if rows else "") + silent


def _overlap(statistics: dict) -> str:
    found = {tuple(entry["aspects"]): entry["jaccard"] for entry in statistics["overlap"]}
    names = sorted({name for pair in found for name in pair})

    def cell(a: str, b: str) -> str:
        value = found.get(tuple(sorted((a, b))))
        if value is None:
            return ""
        return f'<td class=bar style="--share:{100 * value:.1f}%">{value:.2f}</td>'

    rows = [[escape(a), *(cell(a, b) if a != b else "" for b in names)] for a in names]
    return _table(["", *map(escape, names)], rows) if found else ""


def _missing_note(statistics: dict) -> str:
    statuses = ", ".join(f"{name} {count:,}" for name, count in statistics["statuses"].items())
    again = f" {statistics['asked_again']:,} answers were asked again." if statistics["asked_again"] else ""
    return f"Captions by status: {statuses or 'none'}.{again}"


def _failures(statistics: dict) -> str:
    total = sum(statistics["statuses"].values())
    rows = [[escape(kind), _bar(count, total)] for kind, count in statistics["failures"].items()]
    return _table(["why there is no caption", "captions"], rows) if rows else "<p>Nothing.</p>"


def _classes(statistics: dict) -> str:
    classes = statistics["classes"]
    rows = [
        [
            escape(printable(entry["label"])),
            f"{entry['images']:,}",
            f"{entry['captions']:,}",
            f"{entry['captions'] / entry['images']:.2f}",
        ]
        for entry in classes["fewest"]
    ]
    return _table(["class", "images", "captions", "per image"], rows) if rows else ""


def _made(statistics: dict, details: Mapping) -> str:
    spent = [("model", f"{name or 'unknown'}: {count:,} captions") for name, count in statistics["models"].items()]
    spent += [(name.replace("_", " "), f"{statistics[name]:,}") for name in ("tokens_in", "tokens_out", "attempts")
              if statistics[name]]  # fmt: skip
    runs = [("all runs", details.get("spent") or {}), ("last run", details.get("last_run") or {})]
    for when, name, value in ((when, name, value) for when, found in runs for name, value in found.items()):
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} {count}" for key, count in value.items())
        if value not in (None, "", []):
            value = f"{value:,}" if isinstance(value, (int, float)) else str(value)
            spent.append((f"{when}: {name.replace('_', ' ')}", value))
    rows = [[escape(name), f"<td class=words>{escape(value)}</td>"] for name, value in spent]
    prompts = "".join(
        f"<p>Prompt of <b>{escape(str(aspect))}</b>:</p><pre>{escape(str(text))}</pre>"
        for aspect, text in (details.get("prompt_texts") or {}).items()
    )
    return (_table(["", ""], rows) if rows else "") + prompts


# -- samples ----------------------------------------------------------------------------------------------------------
def _class_name(tally: CaptionTally, label: int | None) -> str:
    known = label is not None and 0 <= label < len(tally.class_names)
    return printable(clean_class_name(tally.class_names[label])) if known else "no label"


def _thumbnail(image: dict) -> str:
    """An `img` element that holds the picture itself, or a few words where it cannot be read."""
    try:
        picture = read_image(image)
    except BadImage:
        return "cannot be read"
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img src="data:image/jpeg;base64,{data}" width={picture.width} height={picture.height} alt="" loading="lazy">'
    )


def _card(image: dict, heading: str, entries: Iterable[tuple[str, str]], tags: Iterable[str] = ()) -> str:
    marks = "".join(f"<span class=tag>{escape(tag)}</span>" for tag in tags)
    texts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in entries)
    return (
        f"<article class=sample><div class=picture>{_thumbnail(image)}</div><div class=text><h3>{escape(heading)}</h3>{marks}"
        f"<dl>{texts}</dl></div></article>"
    )


def _accepted(row: Mapping) -> list[tuple[str, str]]:
    return [
        (r["aspect"] or "", r["text"]) for r in row["caption_records"] if r["status"] in ("ok", "trimmed") and r["text"]
    ]


def _samples(pictures: Dataset, rows: list[int], tally: CaptionTally) -> str:
    cards = []
    for index in rows:
        row = pictures[index]
        cards.append(_card(row["image"], _class_name(tally, row["label"]), _accepted(row)))
    return f"<div class=samples>{''.join(cards)}</div>" if cards else ""


def _gravity(entry: tuple[str, list]) -> tuple:
    """Denied labels first, then what was not accepted, then what was."""
    kind = entry[0]
    return "label_contradicted" not in kind, kind in CHECKS, kind


def _odd(pictures: Dataset, odd: list[tuple[int, int, str]], tally: CaptionTally, unaccepted: Callable) -> str:
    cards = []
    for index, place, kind in odd:
        row = pictures[index]
        record = row["caption_records"][place]
        tags = [kind, *(check for check in record["checks"] or () if check not in (*kind.split(": "), "refusal"))]
        text = record["text"] or unaccepted(index, place) or ""
        entries = [(record["aspect"] or "", text)]
        if name := Path(row["image"]["path"] or "").name:
            entries.append(("file", printable(name)))
        cards.append(_card(row["image"], _class_name(tally, row["label"]), entries, tags))
    return f"<div class=samples>{''.join(cards)}</div>" if cards else ""


def _sheet(pictures: Dataset, rows: list[int], tally: CaptionTally) -> PILImage.Image:
    """Images with their captions, two beside each other."""
    side, width, height, gap = 150, 470, 216, 14  # pixels
    font, bold = ImageFont.load_default(13), ImageFont.load_default(15)
    lines = max(-(-len(rows) // 2), 1)
    sheet = PILImage.new("RGB", (2 * (width + gap) + gap, lines * (height + gap) + gap), "#fbfaf8")
    draw = ImageDraw.Draw(sheet)
    for place, index in enumerate(rows):
        row = pictures[index]
        x, y = gap + place % 2 * (width + gap), gap + place // 2 * (height + gap)
        draw.rounded_rectangle((x, y, x + width, y + height), 8, "white", "#e4e2dd")
        try:
            picture = read_image(row["image"])
            picture.thumbnail((side, height - 24))
            sheet.paste(picture, (x + 12 + (side - picture.width) // 2, y + (height - picture.height) // 2))
        except BadImage:
            draw.text((x + 24, y + height // 2), "cannot be read", "#656d76", font)
        left, top, room = x + side + 26, y + 10, width - side - 38
        draw.text((left, top), _wrapped(draw, _class_name(tally, row["label"]), bold, room, 1)[0], "#1f2328", bold)
        top += 24
        texts = _accepted(row) or [("", "no caption")]
        most = max(2, 10 // min(len(texts), 4))
        for aspect, text in texts[:4]:
            head = f"{aspect}: {text}" if aspect and len(texts) > 1 else text
            for line in _wrapped(draw, head, font, room, most):
                draw.text((left, top), line, "#3b424a", font)
                top += 16
            top += 5
    return sheet


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font, room: int, most: int) -> list[str]:
    """The text in at most `most` lines of `room` pixels."""
    lines, words = [""], text.split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= room or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
        if len(lines) > most:
            break
    cut = len(lines) > most
    lines = lines[:most]
    for i, line in enumerate(lines):
        ending = "…" if cut and i == most - 1 else ""
        while len(line) > 1 and draw.textlength(line + ending, font) > room:
            line, ending = line[:-1], "…"
        lines[i] = line + ending
    return lines
