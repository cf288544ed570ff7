"""Printing for people, from the main process only."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Sequence


def is_main() -> bool:
    """Whether this is the main process, under any launcher."""
    return os.environ.get("RANK", "0") == "0"


def plain(text: object, lines: bool = True) -> str:
    """A text for a terminal, which obeys nothing in it.

    Names of classes and files come from others. Control characters, escape sequences, marks that reverse the direction of
    writing and bytes that are no text become visible: `\\x1b`, `\\u202e`, `\\udcff`. Joiners within words and pictures stay.

    Args:
        lines: new lines and tabs stay, too; otherwise the text is one line.
    """
    text = str(text)
    if text.isprintable():
        return text
    kept = "\n\t\u200c\u200d" if lines else "\u200c\u200d"
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _OBEYED and c not in kept else c for c in text
    )


_OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats such as directions, half characters, separators of lines


class PlainFormatter(logging.Formatter):
    """Of log records that go to a terminal, see `plain`."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def say(text: object = "") -> None:
    """Prints a text in the main process, see `plain`."""
    if is_main():
        print(plain(text), flush=True)


def table(rows: dict[str, object]) -> None:
    """Prints `name  value` lines in two aligned columns."""
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        say(f"  {name:<{width}}  {value}")


def seconds(count: float) -> str:
    """`0.4 s`, `35 s`, `12 min`, `3.1 h`."""
    if count < 100:
        return f"{count:.2g} s" if count < 10 else f"{count:.0f} s"
    return f"{count / 60:.0f} min" if count < 6000 else f"{count / 3600:.1f} h"


def percent(share: float, interval: tuple[float, float] | None = None) -> str:
    """`31.5 %`, or `31.5 % (26.2 to 37.3)` with a 95 % interval."""
    text = f"{100 * share:.1f} %"
    return f"{text} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else text


def many(count: int, noun: str) -> str:
    """`1 caption`, `2,223 captions`."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def some(names: Sequence, most: int = 8) -> str:
    """The first names, for a message: `a, b, c, …`; `a; b, c; d` where a name has a comma."""
    first = [plain(name, lines=False) for name in names[:most]]
    return separator(first).join(first + ["…"] * (len(names) > most))


def separator(names: Sequence[str]) -> str:
    """What stands between names in a list: a comma, or a semicolon where a name has a comma."""
    return "; " if any(", " in name for name in names) else ", "


def printable_text(text: str) -> str:
    """Replaces control characters, which could send commands to a terminal, by spaces."""
    return "".join(character if character.isprintable() else " " for character in text)
