"""Schemas of files: a `TypedDict` for each file says which fields it has and of which types. `conform` checks a value.

Types are `str`, `int`, `float` (finite; whole numbers too), `bool`, `dict`, `list`, `list[X]`, `dict[str, X]`, `X | None`,
`tuple[X, …]` (a list in JSON), `Literal[…]`, `Any`, another `TypedDict`, and `Annotated[X, allowed]`, where `allowed` is a `Range` or anything else with `in` and
a text. Fields that a schema does not name are allowed: a newer version may have written them.
"""

from __future__ import annotations

import math
import types
from functools import lru_cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from .errors import UserError

LONGEST_NAME = 1000  # characters of a class name
_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}


class _ClassNames:
    """Allows lists of distinct names that can be printed in a table."""

    def __contains__(self, names: list[str]) -> bool:
        return len(set(names)) == len(names) > 0 and all(0 < len(name) <= LONGEST_NAME for name in names)

    def __str__(self) -> str:
        return f"one name or more, each once and of 1 to {LONGEST_NAME:,} characters"


ClassNames = Annotated[list[str], _ClassNames()]


def conform(value: Any, kind: Any, file: str, remedy: str = "") -> None:
    """Raises `UserError` unless a value has a type; the message names the file and the field.

    Args:
        remedy: what to type, as a sentence.
    """
    if wrong := mismatch(value, kind):
        place, expected, found = wrong
        where = f", {place}" if place else ""
        raise UserError(f"{file}{where}: expected {expected}, found {found}.{' ' if remedy else ''}{remedy}")


def mismatch(value: Any, kind: Any, place: str = "") -> tuple[str, str, str] | None:
    """The first part of a value that has not its type: its place, what was expected and what was found; None if all have."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return None
    if origin is Annotated:
        wrong = mismatch(value, args[0], place)
        return wrong or (None if value is None or value in args[1] else (place, str(args[1]), shown(value)))
    if origin in (Union, types.UnionType):
        wrongs = [mismatch(value, one, place) for one in args]
        if None in wrongs:
            return None
        deepest = max(wrongs, key=lambda wrong: len(wrong[0]))
        return deepest if deepest[0] != place else (place, " or ".join(map(_name, args)), shown(value))
    if origin is Literal:
        same = any(type(value) is type(one) and value == one for one in args)
        return None if same else (place, _name(kind), shown(value))
    if is_typeddict(kind) or origin is dict or kind is dict:
        return _of_object(value, kind, args, place)
    if origin in (list, tuple) or kind is list:
        if not isinstance(value, list):
            return place, _name(kind), shown(value)
        wrongs = (mismatch(one, args[0], f"{place}[{i}]") for i, one in enumerate(value)) if args else ()
        return next((wrong for wrong in wrongs if wrong), None)
    if kind is None or kind is type(None):
        fits = value is None
    elif kind is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    elif kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, kind)
    return None if fits else (place, _name(kind), shown(value))


def _of_object(value: Any, kind: Any, args: tuple, place: str) -> tuple[str, str, str] | None:
    if not isinstance(value, dict):
        return place, "an object", shown(value)
    if not is_typeddict(kind):
        inner = dict.fromkeys(value, args[1]) if args else {}
    else:
        inner = _fields(kind)
        if missing := sorted(kind.__required_keys__ - value.keys()):
            return _below(place, missing[0]), _name(inner[missing[0]]), "no such field"
    wrongs = (mismatch(value[key], one, _below(place, key)) for key, one in inner.items() if key in value)
    return next((wrong for wrong in wrongs if wrong), None)


@lru_cache(maxsize=100)
def _fields(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _below(place: str, key: object) -> str:
    key = str(key)
    key = key if len(key) <= 40 else key[:39] + "…"
    return f"{place}.{key}" if place else f"field {key}"


def _name(kind: Any) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return str(args[1])
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_name, args))
    if origin in (list, tuple):
        return f"a list of {_name(args[0]).removeprefix('a ')}"
    if kind is None or kind is type(None):
        return "null"
    return _WORDS.get(kind, "an object" if origin is dict or is_typeddict(kind) else str(kind))


def shown(value: Any) -> str:
    """A value for a message, whatever it is."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:59] + "…")
    if isinstance(value, list):
        inside = ", ".join(shown(one) for one in value[:3] if not isinstance(one, (list, dict)))
        return f"a list of {len(value):,}" + (f" ({inside}{', …' if len(value) > 3 else ''})" if inside else "")
    return "an object" if isinstance(value, dict) else repr(value)[:60]
