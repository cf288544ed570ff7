"""Languages that a text can be written in: their names, and their scripts as Unicode names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...core.console import some
from ...core.errors import UserError, nearest
from ...core.reading import read_yaml

LANGUAGES = {
    "ar": ("Arabic", ("ARABIC",)),
    "bg": ("Bulgarian", ("CYRILLIC",)),
    "bn": ("Bengali", ("BENGALI",)),
    "cs": ("Czech", ("LATIN",)),
    "da": ("Danish", ("LATIN",)),
    "de": ("German", ("LATIN",)),
    "el": ("Greek", ("GREEK",)),
    "en": ("English", ("LATIN",)),
    "es": ("Spanish", ("LATIN",)),
    "fa": ("Persian", ("ARABIC",)),
    "fi": ("Finnish", ("LATIN",)),
    "fr": ("French", ("LATIN",)),
    "he": ("Hebrew", ("HEBREW",)),
    "hi": ("Hindi", ("DEVANAGARI",)),
    "hu": ("Hungarian", ("LATIN",)),
    "id": ("Indonesian", ("LATIN",)),
    "it": ("Italian", ("LATIN",)),
    "ja": ("Japanese", ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "CJK")),
    "ko": ("Korean", ("HANGUL", "CJK")),
    "nl": ("Dutch", ("LATIN",)),
    "no": ("Norwegian", ("LATIN",)),
    "pl": ("Polish", ("LATIN",)),
    "pt": ("Portuguese", ("LATIN",)),
    "ro": ("Romanian", ("LATIN",)),
    "ru": ("Russian", ("CYRILLIC",)),
    "sr": ("Serbian", ("CYRILLIC", "LATIN")),
    "sv": ("Swedish", ("LATIN",)),
    "ta": ("Tamil", ("TAMIL",)),
    "th": ("Thai", ("THAI",)),
    "tr": ("Turkish", ("LATIN",)),
    "uk": ("Ukrainian", ("CYRILLIC",)),
    "vi": ("Vietnamese", ("LATIN",)),
    "zh": ("Chinese", ("CJK",)),
}


def read_class_names(path: str, class_names: Sequence[str]) -> list[list[str]]:
    """Names of each class in another language, of a YAML file with a name, or a list of them, for each class.

    Raises:
        UserError: no such file, or it lacks a class.
    """
    where = f"--class_names_file {path}"
    try:
        found = read_yaml(Path(path))
    except FileNotFoundError:
        raise UserError(f"{where}: expected a YAML file, found no such file.") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected a name for each class (dog: собака), found {type(found).__name__}.")
    for name, own in found.items():
        if name not in class_names:
            raise UserError(f"{where}: expected class names, found {name!r}.{nearest(str(name), class_names)}")
        names = own if isinstance(own, list) else [own]
        if not names or not all(isinstance(one, str) and one.strip() for one in names):
            raise UserError(f"{where}, {name}: expected a name or a list of names, found {own!r}.")
    if missing := [name for name in class_names if name not in found]:
        raise UserError(f"{where}: expected a name for each class, found none for {some(missing)}.")
    return [own if isinstance(own := found[name], list) else [own] for name in class_names]
