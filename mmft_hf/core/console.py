"""Printing for people, from the main process only."""

from __future__ import annotations

import os
from collections.abc import Sequence


def is_main() -> bool:
    """Whether this is the main process, under any launcher."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str = "") -> None:
    """Prints a text in the main process."""
    if is_main():
        print(text, flush=True)


def table(rows: dict[str, object]) -> None:
    """Prints `name  value` lines in two aligned columns."""
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        say(f"  {name:<{width}}  {value}")


def percent(share: float, interval: tuple[float, float] | None = None) -> str:
    """`31.5 %`, or `31.5 % (26.2 to 37.3)` with a 95 % interval."""
    text = f"{100 * share:.1f} %"
    return f"{text} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else text


def many(count: int, noun: str) -> str:
    """`1 caption`, `2,223 captions`."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def some(names: Sequence, most: int = 8) -> str:
    """The first names, for a message: `a, b, c, …`."""
    return ", ".join(map(str, names[:most])) + (", …" if len(names) > most else "")


def printable_text(text: str) -> str:
    """Replaces control characters, which could send commands to a terminal, by spaces."""
    return "".join(character if character.isprintable() else " " for character in text)
