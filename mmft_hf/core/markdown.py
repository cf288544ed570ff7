"""Text of others inside our pages: what data, models and people are called never becomes markup, a link or a path."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

import yaml

from .console import printable_text

_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---[ \t]*\r?\n", re.DOTALL)


def public_name(name: str) -> str:
    """A Hub id or `builtin/…` as it is; of a local path only the last part, since paths are nobody's business."""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def one_line(text: object, limit: int = 120) -> str:
    """The text on one line, without control characters, cut at `limit` characters."""
    plain = " ".join(printable_text(str(text)).split())
    return plain if len(plain) <= limit else plain[: limit - 1] + "…"


def md(text: object, limit: int = 120) -> str:
    """For Markdown: no HTML, table cell, line, emphasis, formula or link of its own."""
    safe = re.sub(r"([\\|*_`~\[\]#])", r"\\\1", escape(one_line(text, limit), quote=False))
    for mark, entity in (("$", "&#36;"), ("@", "&#64;"), ("://", "&#58;//"), ("www.", "www&#46;")):
        safe = safe.replace(mark, entity)
    return safe


def code(text: object, limit: int = 120) -> str:
    """For Markdown, as code within a line, in a table, too."""
    return "`" + (one_line(text, limit).replace("`", "'").replace("|", "¦") or " ") + "`"


def fenced(text: object, language: str = "text") -> str:
    """A block of code that no content can close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", str(text))), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def listed(names: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`; empty for no names."""
    *first, last = [*names] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def read_front_matter(text: str) -> tuple[dict, str]:
    """Metadata of a card and the Markdown below; no metadata where there is none, or none that can be read."""
    found = _FRONT.match(text)
    if not found:
        return {}, text
    try:
        front = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return {}, text
    return (front, text[found.end() :]) if isinstance(front, dict) else ({}, text)


def front_matter(front: dict) -> str:
    """Metadata as the first lines of a card."""
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)}---\n"
