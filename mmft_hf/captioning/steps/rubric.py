"""`rubric`: a judge rates each caption by several criteria."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...core.console import percent
from ...core.errors import UserError
from .asking import Ask, Asking, quoted
from .base import Embeddings, Row, Step, Told, place_of, scored_texts
from .claims import UNANSWERED

DIMENSIONS = {
    "specificity": "it says what sets this image apart from similar ones",
    "visible_evidence": "all that it says can be seen in the image",
    "discriminative_attributes": "it names the shape, colour, material, parts or texture by which such things are told apart",
    "grammar": "it is correct and fluent",
}
HIGHEST = 5
FLAT = 0.9  # share of one rating from which a criterion tells little
RESERVED = ("rubric", "style")


@dataclass(frozen=True)
class Rubric(Step):
    """Has each caption rated from 0 to 5 by several criteria, and perhaps its style named. The judge sees the picture.

    Writes a score for each criterion, `rubric`, their mean, and `style`, its number in `styles`, from 0 on.

    Args:
        dimensions: names of criteria, some of `DIMENSIONS`; or names with what each one means.
        styles: names of styles, of which the judge chooses one.
    """

    dimensions: tuple[str, ...] | dict[str, str] = tuple(DIMENSIONS)
    styles: tuple[str, ...] = ()

    name: ClassVar[str] = "rubric"
    about: ClassVar[str] = "has a judge rate each caption by several criteria"
    after: ClassVar[str] = "Cream of the Crop (arXiv 2503.13383): capability scores and style"
    differs: ClassVar[str] = (
        "A model that is asked rates captions. The paper trains scorers for 14 capabilities and 9 styles of training samples, and "
        "selects these."
    )

    def __post_init__(self):
        unknown = [] if isinstance(self.dimensions, Mapping) else [d for d in self.dimensions if d not in DIMENSIONS]
        if unknown:
            raise UserError(
                f"step rubric, dimensions: expected some of {', '.join(DIMENSIONS)}, or names with what they mean, found "
                f"{unknown[0]!r}. For example, write dimensions: {{{unknown[0]}: what it means}}."
            )
        for found in self.dimensions or [""]:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", found) or found in RESERVED:
                raise UserError(
                    "step rubric, dimensions: expected one or more names of small letters, digits and underscores, other than "
                    f"{' and '.join(RESERVED)}, found {found!r}."
                )
        if len(self.styles) == 1 or len(set(map(str.casefold, self.styles))) < len(self.styles):
            raise UserError(
                f"step rubric, styles: expected two or more different ones, found {', '.join(self.styles)}."
            )

    def writes(self) -> tuple[str, ...]:
        return (*self.dimensions, "rubric", *(("style",) if self.styles else ()))

    def roles(self) -> tuple[str, ...]:
        return ("judge",)

    def bound(self, row: Row, fitted: Any) -> Counter:
        return Counter(judge=len(row.texts())) if row.image_sha256 else Counter()

    def ask(self, row: Row, fitted: Any) -> Asking:
        texts = row.texts()
        if row.image_sha256 is None or not texts:
            return None
        answers = yield [self._ask(row, text) for text in texts]
        return {text: self._read(answer) for text, answer in zip(texts, answers, strict=True)}

    def _ask(self, row: Row, text: str) -> Ask:
        meanings = self.dimensions if isinstance(self.dimensions, Mapping) else DIMENSIONS
        lines = [
            f"Rate this caption of the image by each of these criteria, with a whole number from 0 (not at all) to {HIGHEST} "
            "(fully). Its length does not count.",
            *(f"{found}: {meanings[found]}" for found in self.dimensions),
        ]
        if self.styles:
            lines.append(f"style: the style of the caption, one of {', '.join(map(quoted, self.styles))}")
        keys = [*self.dimensions, *(["style"] if self.styles else [])]
        prompt = "\n".join([*lines, f"Caption: {quoted(text)}"])
        return Ask("judge", prompt, row.picture(), f"json:{','.join(keys)}")

    def _read(self, answer: Mapping[str, Any] | None) -> dict[str, float]:
        """The ratings of an answer, as far as they are numbers in range."""
        answer = answer or {}
        found = {
            name: float(value)
            for name in self.dimensions
            if type(value := answer.get(name)) in (int, float) and 0 <= value <= HIGHEST
        }
        if len(found) == len(self.dimensions):
            found["rubric"] = sum(found.values()) / len(found)
        styles = [style.casefold() for style in self.styles]
        if str(answer.get("style")).strip().casefold() in styles:
            found["style"] = float(styles.index(str(answer["style"]).strip().casefold()))
        return found

    def apply(
        self, rows: Sequence[Row], scorer: Embeddings | None = None, found: Sequence[Any] = ()
    ) -> list[list[dict]]:
        return scored_texts(rows, found)

    def told(self, rows: Sequence[Row], found: Sequence[Any]) -> Told:
        every = [(text, scores) for own in found for text, scores in (own or {}).items()]
        figures: dict[str, Any] = {
            "captions": len(every),
            UNANSWERED: sum("rubric" not in scores for _, scores in every),
        }
        notes = []
        for name in self.dimensions:
            values = [scores[name] for _, scores in every if name in scores]
            counts = [sum(round(value) == rating for value in values) for rating in range(HIGHEST + 1)]
            figures[name] = counts
            if len(values) > 1 and max(counts) >= FLAT * len(values):
                notes.append(
                    f"{percent(max(counts) / len(values))} of the ratings of {name} are {counts.index(max(counts))}, so it "
                    "hardly tells captions apart."
                )
        for k, style in enumerate(self.styles):
            figures[f"style {style}"] = sum(scores.get("style") == k for _, scores in every)
        pairs = [(len(text.split()), scores["rubric"]) for text, scores in every if "rubric" in scores]
        if pairs and all(len(set(column)) > 1 for column in zip(*pairs, strict=True)):
            figures["correlation_with_words"] = float(np.corrcoef(np.array(pairs).T)[0, 1])
        details = [
            {
                "image_sha256": row.image_sha256,
                "record": place_of(row.records[k]),
                "kind": name,
                "text": row.records[k]["text"],
                "verdict": UNANSWERED if value is None else f"{value:g}",
                "votes": [],
            }
            for row, own in zip(rows, found, strict=True)
            for k in row.captions()
            for name in self.dimensions
            if own is not None
            for value in [own[row.records[k]["text"]].get(name)]
        ]
        return Told(figures, details, notes)
