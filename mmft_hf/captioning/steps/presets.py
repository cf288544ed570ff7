"""Presets: what a writer or captioner is asked, as YAML data with named slots."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ...core.builtin import ASSETS
from ...core.errors import UserError, nearest
from ...core.reading import read_yaml

FOLDER = ASSETS / "caption_presets"
SLOTS = {
    "captions": "captions of the image",
    "others": "captions of other images of the class",
    "column": "a column of the dataset",
    "hints": "columns of the dataset, by name",
    "language": "the language to write in",
    "question": "a question",
    "class_name": "the class of the image",
    "other_class": "the class of the neighbour",
    "region": "where the region is",
    "rival": "where the region is that a description fits as well",
    "fields": "the fields of the answer",
    "field": "one of the fields",
    "words": "number of words",
    "this": "whether the image is the first or the second of two",
    "other": "whether its neighbour is the first or the second of two",
}
CAPTIONS = ("none", "each", "together", "sentences", "failed")
PICTURES = ("self", "region", "marked", "rival", "neighbour")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Preset:
    """A prompt, and what is done with its answer.

    Args:
        name: as it is typed; also the `step` of the records that it writes.
        version: to be raised with any change that matters.
        about: what it does, in a sentence.
        role: `captioner` sees the picture, `writer` works on text alone.
        prompt: with slots in braces, some of `SLOTS`.
        after: the work that it follows; `differs`: in what it differs from it.
        faithful: whether it does what that work does.
        captions: what `{captions}` holds: `each` (a question for each caption), `together` (one question for all captions, or
            the best ones), `sentences` (those sentences of all captions that fit what they describe) or `failed` (a question for
            each text of a region that was dropped because it fits another one as well, while its region has no caption).
        least: with fewer captions or sentences nothing is asked.
        replaces: whether the new text takes the place of the captions that it was made from.
        accepted: False: the new text is kept to be looked at, but never is a caption.
        pictures: what is shown, in this order: `self`, `region` (cut out), `marked` (a region outlined), `rival` (the region that a
            failed text fits best), `neighbour` (the most similar image of another class). With regions or neighbours there is a
            question for each of them.
        fields: keys of a JSON answer. If there is no such answer, they are asked for one by one with `single`.
        single: the prompt for one field.
        joined: whether the fields form one caption; else each is one.
        words: default of `{words}`.
        exact_words: whether a text is asked for again that is more than a quarter longer or shorter.
        check: a judge's prompt with `{captions}`, the new text, that has to be true of the image and false of its neighbour.
        partner: whether `{captions}` also holds a caption of another image, which `refs` of the new record names.
        apart: whether a text is dropped that fits another region of its image as well.
    """

    name: str
    version: int
    about: str
    role: str
    prompt: str
    after: str
    differs: str
    faithful: bool = False
    captions: str = "none"
    least: int = 1
    replaces: bool = False
    accepted: bool = True
    pictures: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    single: str = ""
    joined: bool = False
    words: int | None = None
    exact_words: bool = False
    check: str = ""
    partner: bool = False
    apart: bool = False

    def slots(self) -> set[str]:
        """Names of the slots of its prompts."""
        return {name for prompt in (self.prompt, self.single) for name in _SLOT.findall(prompt)}

    def sees_label(self) -> bool:
        """Whether a question may hold the name of a class."""
        return not self.slots().isdisjoint(("class_name", "other_class"))

    def digest(self) -> str:
        """Equal for presets that ask and do the same."""
        said = {
            key: value for key, value in asdict(self).items() if key not in ("about", "after", "differs", "faithful")
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def filled(prompt: str, values: Mapping[str, str]) -> str:
    """The prompt with a value for each slot. What looks like a slot within a value stays text."""
    return _SLOT.sub(lambda slot: values[slot[1]], prompt)


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_preset(name: str) -> Preset:
    """A preset of this package, or of a YAML file.

    Raises:
        UserError: there is none of this name, or the file is no preset.
    """
    own = name.endswith((".yaml", ".yml"))
    path = Path(name) if own else FOLDER / f"{name}.yaml"
    if not own and name not in preset_names():
        known = preset_names()
        raise UserError(
            f"step rewrite, preset: expected one of {', '.join(known)}, or a YAML file, found {name!r}.{nearest(name, known)}"
        )
    try:
        found = read_yaml(path)
    except FileNotFoundError:
        raise UserError(f"preset {path}: expected a YAML file, found no such file.") from None
    return _preset(found, f"preset {name}")


def _preset(found: Any, where: str) -> Preset:
    known = {field.name: field for field in fields(Preset)}
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected the keys of a preset, found {type(found).__name__}.")
    if unknown := next((key for key in found if key not in known), None):
        raise UserError(f"{where}: unknown key {unknown!r}.{nearest(str(unknown), known)}")
    needed = ("name", "version", "about", "role", "prompt", "after", "differs")
    if missing := [key for key in needed if not found.get(key)]:
        raise UserError(f"{where}: expected the keys {', '.join(needed)}, found no {missing[0]}.")
    lists = {key: tuple(value) for key, value in found.items() if isinstance(value, list)}
    for key, value in {**found, **lists}.items():
        kinds = {"int": int, "bool": bool, "str": str, "int | None": int}
        kind = kinds.get(known[key].type, tuple)
        if type(value) is not kind or (kind is tuple and not all(isinstance(one, str) for one in value)):
            words = {int: "a whole number", bool: "true or false", str: "a text", tuple: "a list of texts"}
            raise UserError(f"{where}, {key}: expected {words[kind]}, found {value!r}.")
    return _checked(Preset(**{**found, **lists}), where)


def _checked(preset: Preset, where: str) -> Preset:
    """Raises `UserError` for a preset that contradicts itself."""
    for key, values, allowed in (
        ("role", (preset.role,), ("captioner", "writer")),
        ("captions", (preset.captions,), CAPTIONS),
        ("pictures", preset.pictures, PICTURES),
        ("prompt, slot", sorted(preset.slots()), tuple(SLOTS)),
    ):
        for value in values:
            if value not in allowed:
                raise UserError(
                    f"{where}, {key}: expected one of {', '.join(allowed)}, found {value!r}.{nearest(value, allowed)}"
                )
    if bool(preset.pictures) != (preset.role == "captioner"):
        raise UserError(f"{where}, pictures: expected pictures for a captioner and none for a writer.")
    if ("captions" in preset.slots()) != (preset.captions != "none"):
        raise UserError(f"{where}, captions: expected the slot {{captions}} where captions are given, and only there.")
    if preset.replaces and preset.captions == "none":
        raise UserError(f"{where}, replaces: expected captions, whose place the new text takes, found none.")
    if (preset.captions == "failed") != ("rival" in preset.pictures):
        raise UserError(f"{where}, pictures: expected the picture rival with captions: failed, and only there.")
    if bool(preset.fields) != bool(preset.single):
        raise UserError(f"{where}, single: expected the prompt of one field where there are fields, and only there.")
    if preset.check and "neighbour" not in preset.pictures:
        raise UserError(
            f"{where}, check: expected the picture neighbour, found {', '.join(preset.pictures) or 'none'}."
        )
    return preset
