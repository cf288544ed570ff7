"""Where captions come from. A captioner turns one row into captions; all of them have the same small shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ...data import captions_of
from ...prompts import DEFAULT_TEMPLATE, check_template, class_prompt


@dataclass(frozen=True)
class Caption:
    """One text about one image, before it is checked: its aspect, who wrote it, and from which prompt."""

    aspect: str
    text: str
    model: str
    prompt_id: str


class Captioner(Protocol):
    """Anything that has `columns` (those it reads, beside the label) and can be called with a row of them."""

    columns: tuple[str, ...]

    def __call__(self, row: dict, class_name: str) -> list[Caption]:
        """Captions of one row; `class_name` is the name of its label."""
        ...


class ColumnsCaptioner:
    """Takes the texts that the data set already has: people's own words, no model.

    Args:
        columns: of text, or of lists of texts. The column's name is recorded as the aspect.
    """

    def __init__(self, columns: Sequence[str]):
        self.columns = tuple(columns)

    def __call__(self, row: dict, class_name: str) -> list[Caption]:
        return [Caption(c, text, "columns", c) for c in self.columns for text in captions_of(row[c])]


class TemplateCaptioner:
    """Writes class templates, the same for every image of a class: the control that any captions must beat.

    Args:
        templates: with `{}` for the class name.
    """

    columns = ()

    def __init__(self, templates: Sequence[str] = (DEFAULT_TEMPLATE,)):
        self.templates = tuple(check_template(t) for t in templates)

    def __call__(self, row: dict, class_name: str) -> list[Caption]:
        return [Caption("template", class_prompt(t, class_name), "template", t) for t in self.templates]
