"""Markdown for cards. Text from data, models and people never becomes markup, a link or a local path."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

import yaml

from .console import printable_text, separator
from .errors import UserError
from .reading import parse_yaml

_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---[ \t]*\r?\n", re.DOTALL)


def public_name(name: str) -> str:
    """A Hub id or `builtin/…` as it is. Of a local path only the last part, because paths are private."""
    return Path(os.path.abspath(name)).name if Path(name).is_absolute() or Path(name).exists() else name


def without_local_paths(record):
    """A JSON value in which each local path is replaced by its last part."""
    if isinstance(record, dict):
        return {key: without_local_paths(value) for key, value in record.items()}
    if isinstance(record, list):
        return [without_local_paths(value) for value in record]
    try:
        return public_name(record) if isinstance(record, str) and len(record) < 1000 else record
    except OSError:  # too long for a file name
        return record


def one_line(text: object, limit: int = 120) -> str:
    """The text on one line, without control characters, truncated to `limit` characters."""
    plain = " ".join(printable_text(str(text)).split())
    return plain if len(plain) <= limit else plain[: limit - 1] + "…"


def md(text: object, limit: int = 120) -> str:
    """Escapes text for Markdown: it cannot contain HTML, table cells, lines, emphasis, formulas or links."""
    safe = re.sub(r"([\\|*_`~\[\]#])", r"\\\1", escape(one_line(text, limit), quote=False))
    for mark, entity in (("$", "&#36;"), ("@", "&#64;"), ("://", "&#58;//"), ("www.", "www&#46;")):
        safe = safe.replace(mark, entity)
    return safe


def code(text: object, limit: int = 120) -> str:
    """Text as inline code, which is also safe in a table."""
    return "`" + (one_line(text, limit).replace("`", "'").replace("|", "¦") or " ") + "`"


def fenced(text: object, language: str = "text") -> str:
    """Text as a code block that no content can close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", str(text))), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def listed(names: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`; `a; b, c; and d` where a name has a comma; empty for no names."""
    *first, last = [*names] or [""]
    between = separator([*first, last])
    comma = ";" if between == "; " else ""
    return f"{between.join(first)}{comma} and {last}" if first else last


def read_front_matter(text: str) -> tuple[dict, str]:
    """The metadata of a card and the Markdown below. The metadata is empty if it is missing or cannot be read."""
    found = _FRONT.match(text)
    if not found:
        return {}, text
    try:
        front = parse_yaml(found[1], "card")
    except UserError:
        return {}, text
    return (front, text[found.end() :]) if isinstance(front, dict) else ({}, text)


def front_matter(front: dict) -> str:
    """The metadata as the first lines of a card."""
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)}---\n"
