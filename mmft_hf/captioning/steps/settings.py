"""Reads steps as they are typed: names, or a YAML file that also holds their options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ...core.errors import UserError, nearest
from ...core.reading import read_yaml
from .agreement import Agreement
from .attribute_entropy import AttributeEntropy
from .base import Step
from .choice import Choice
from .clip_score import ClipScore
from .cycle import Cycle
from .pairwise import Pairwise
from .presets import preset_names
from .questions import Questions
from .representatives import Representatives
from .reward import Reward
from .rewrite import Rewrite
from .rubric import Rubric
from .select import Select
from .self_retrieval import SelfRetrieval
from .sentence_rating import SentenceRating
from .verify import Verify

STEPS: dict[str, type[Step]] = {
    kind.name: kind
    for kind in (
        ClipScore,
        SelfRetrieval,
        Cycle,
        Reward,
        Select,
        Representatives,
        Rewrite,
        SentenceRating,
        Verify,
        Rubric,
        Choice,
        Questions,
        Agreement,
        Pairwise,
        AttributeEntropy,
    )
}
EXAMPLE = "Write steps: [clip_score, select: {by: clip, keep: 2}]."


@dataclass(frozen=True)
class Recipe:
    """The content of a file of steps. None: the file does not say."""

    steps: tuple[Step, ...]
    scorer: str | None = None
    scorer_is_student: bool | None = None
    group_column: str | None = None


def read_recipe(words: Sequence[str]) -> Recipe:
    """The steps of `--steps`: one YAML file, or names of steps.

    Raises:
        UserError: no step; an unknown step, option or key; a value that an option cannot have.
    """
    files = [word for word in words if word.endswith((".yaml", ".yml"))]
    if not files:
        return Recipe(tuple(_step_without_options(word) for word in words))
    if len(words) > 1:
        raise UserError(f"--steps: expected names of steps, or one YAML file, found {' '.join(words)}.")
    path = Path(words[0])
    try:
        found = read_yaml(path)
    except FileNotFoundError as error:
        raise UserError(f"--steps {path}: expected a YAML file, but {error.strerror.lower()}.") from error
    except UserError as error:
        raise UserError(f"--steps {error}") from error
    where, keys = f"--steps {path}", {f.name: kind for f, kind in zip(fields(Recipe), _kinds(Recipe), strict=True)}
    if not isinstance(found, dict) or not isinstance(found.get("steps"), list):
        raise UserError(f"{where}: expected a list of steps under the key steps, found none. {EXAMPLE}")
    for key, value in found.items():
        if key not in keys:
            raise UserError(f"{where}: unknown key {key!r}.{nearest(str(key), keys)}")
        if key != "steps" and not _fits(value, keys[key]):
            raise UserError(f"{where}, {key}: expected {_words(keys[key])}, found {value!r}.")
    steps = tuple(make_step(*named_step(entry, where)) for entry in found.pop("steps"))
    return Recipe(steps, **found)


def _step_without_options(name: str) -> Step:
    try:
        return make_step(name, {})
    except UserError as error:
        if name not in STEPS and name not in preset_names():
            raise
        raise UserError(
            f"{error} Options stand in a YAML file: write steps: [{name}: {{OPTION: VALUE}}] and type --steps FILE.yaml."
        ) from error


def named_step(entry: Any, where: str) -> tuple[str, Mapping]:
    """Name and options of an entry: `clip_score`, or `select: {by: clip, keep: 2}`."""
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, dict) and len(entry) == 1:
        name, options = next(iter(entry.items()))
        if options is None or isinstance(options, dict):
            return str(name), options or {}
    raise UserError(f"{where}: expected a step, or a step with its options, found {entry!r}. {EXAMPLE}")


def make_step(name: str, options: Mapping[str, Any]) -> Step:
    """A step of its name and options; the name of a preset stands for `rewrite` with it.

    Raises:
        UserError: an unknown name or option, or a value of another type.
    """
    if name not in STEPS and name in preset_names():
        name, options = Rewrite.name, {"preset": name, **options}
    kind = STEPS.get(name)
    if kind is None:
        known = [*STEPS, *preset_names()]
        raise UserError(
            f"--steps: expected one of {', '.join(STEPS)}, a preset ({', '.join(preset_names())}), or a YAML file, found {name!r}."
            f"{nearest(name, known)}"
        )
    known = {field.name: hint for field, hint in zip(fields(kind), _kinds(kind), strict=True)}
    for key, value in options.items():
        if key not in known:
            raise UserError(
                f"step {name}: expected options among {', '.join(known)}, found {key!r}.{nearest(str(key), known)}"
            )
        if not _fits(value, known[key]):
            raise UserError(f"step {name}, {key}: expected {_words(known[key])}, found {value!r}.")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()})


def _kinds(of: type) -> list:
    hints = get_type_hints(of)
    return [hints[field.name] for field in fields(of)]


def _fits(value: Any, kind) -> bool:
    """Whether a value of YAML is of a type such as `float | None`. A whole number is a float, but true is no number.

    `tuple[str, ...]` takes a list of texts, `dict[str, float]` a mapping.
    """
    if get_origin(kind) in (Union, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(_fits(one, get_args(kind)[0]) for one in value)
    if get_origin(kind) is dict:
        pair = get_args(kind)
        return isinstance(value, dict) and all(_fits(k, pair[0]) and _fits(v, pair[1]) for k, v in value.items())
    return type(value) is kind or (type(value) is int and kind is float)


def _words(kind) -> str:
    """`a number`, for messages."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_words(one) for one in get_args(kind) if one is not type(None))
    if get_origin(kind) is tuple:
        return f"a list, each entry {_words(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"a mapping of names to entries, each {_words(get_args(kind)[1])}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]


def check_order(steps: Sequence[Step], present: Iterable[str]) -> None:
    """Raises `UserError` for steps in an order that cannot work.

    Args:
        present: names of the scores that the captions have already.
    """
    if not steps:
        raise UserError(f"--steps: expected one or more of {', '.join(STEPS)}, or a YAML file, found none.")
    written: dict[str, int] = {}
    present = set(present)
    texts = 0  # the last step that may have written texts, whose scores are not those of the texts before
    for number, step in enumerate(steps, 1):
        for score in step.reads():
            if score in written or score in present:
                continue
            later = [f"step {k} {s.title}" for k, s in enumerate(steps, 1) if k > number and score in s.writes()]
            known = sorted(present | set(written))
            found = f"only {later[0]} after it" if later else ", ".join(known) or "no scores"
            raise UserError(
                f"--steps, step {number} {step.title}: expected the score {score!r} to be written by a step before it, found "
                f"{found}.{nearest(score, known) if not later else ''}"
            )
        if again := next((score for score in step.writes() if written.get(score, 0) > texts), None):
            raise UserError(
                f"--steps: expected each score to be written once for the same captions, found {again!r} in step "
                f"{written[again]} and in step {number} {step.title}. Leave one of them out."
            )
        written |= dict.fromkeys(step.writes(), number)
        if earlier := next((k for k, other in enumerate(steps[: number - 1], 1) if other == step and k > texts), None):
            raise UserError(
                f"--steps: expected each step once, found step {number} {step.title} to repeat step {earlier}."
            )
        if {"writer", "captioner"} & set(step.roles()):
            texts = number
