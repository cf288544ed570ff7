"""`attribute_entropy`: how evenly the values of visual attributes occur among the images of a class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...core.errors import UserError
from .asking import Ask, Asking, quoted
from .base import ByRow, Embeddings, Row, Step, Told

NONE = "none of the above"
DEFAULT = 0.8  # share of a value that is called the default of its class


@dataclass(frozen=True)
class AttributeEntropy(Step):
    """Has a writer name attributes of each class with closed values, and a judge tell the value of each image.

    It changes no caption. It tells the mean entropy of the values of an attribute, 0 (all images alike) to 1, and how many
    attributes have one value in four fifths of the images of a class or more.

    Args:
        questions: most attributes of a class.
    """

    questions: int = 5

    name: ClassVar[str] = "attribute_entropy"
    about: ClassVar[str] = "tells how evenly visual attributes occur among the images of a class"
    after: ClassVar[str] = "GRADE (Rassin et al. 2024, arXiv 2410.22592)"
    differs: ClassVar[str] = "It looks at the images of a data set, not at generated ones, and at one class at a time."
    sees_label: ClassVar[bool] = True

    def __post_init__(self):
        if self.questions < 1:
            raise UserError(f"step attribute_entropy, questions: expected 1 or more, found {self.questions}.")

    def roles(self) -> tuple[str, ...]:
        return ("writer", "judge")

    def bound(self, row: Row, fitted: Any) -> Counter:
        return Counter(writer=1, judge=self.questions) if row.image_sha256 else Counter()

    def ask(self, row: Row, fitted: Any) -> Asking:
        if row.image_sha256 is None:
            return []
        [answer] = yield [
            Ask(
                "writer",
                f"Think of pictures of this class: {quoted(row.class_name)}. Write at most {self.questions} concrete questions about "
                "what may differ between them and can be seen, each with two to six short possible answers that exclude each "
                "other. Each string has the form: question? | answer | answer | …",
                answer="list",
            )
        ]
        asked = proposed(answer or ())[: self.questions]
        if not asked:
            return []
        picks = yield [
            Ask("judge", f"Look at the picture. {quoted(question)}", row.picture(), "choice", (*values, NONE))
            for question, values in asked
        ]
        return [(question, values, pick) for (question, values), pick in zip(asked, picks, strict=True)]

    def apply(
        self, rows: Sequence[Row], scorer: Embeddings | None = None, found: Sequence[Any] = ()
    ) -> Sequence[list[dict]]:
        return ByRow(rows, lambda i, row: list(row.records))

    def told(self, rows: Sequence[Row], found: Sequence[Any]) -> Told:
        counts: dict[tuple, list[int]] = {}
        unanswered = 0
        for row, own in zip(rows, found, strict=True):
            for question, values, pick in own or ():
                number = counts.setdefault((row.class_name, question, values), [0] * len(values))
                unanswered += pick is None
                if pick is not None and pick < len(values):
                    number[pick] += 1
        seen = [number for number in counts.values() if sum(number)]
        figures = {
            "attributes": len(seen),
            "mean_entropy": float(np.mean([attribute_entropy(number) for number in seen])) if seen else None,
            "defaults": sum(max(number) >= DEFAULT * sum(number) for number in seen),
            "unanswered": unanswered,
        }
        details = [
            {
                "image_sha256": None,
                "record": name,
                "kind": "attribute",
                "text": question,
                "verdict": f"{value}: {count}",
            }
            | {"votes": []}
            for (name, question, values), number in counts.items()
            for value, count in zip(values, number, strict=True)
        ]
        return Told(figures, details)


def proposed(answers: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Questions with two or more different values. What has another form is left out."""
    found = []
    for text in answers:
        question, *values = (part.strip() for part in text.split("|"))
        values = tuple(dict.fromkeys(value for value in values if value and value.casefold() != NONE))
        if question and len(values) > 1:
            found.append((question, values))
    return found


def attribute_entropy(counts: Sequence[int]) -> float:
    """Entropy of how often each proposed value of an attribute was found, 0 (one value) to 1 (all equally often).

    It is divided by the logarithm of the number of proposed values, found or not.

    Raises:
        ValueError: fewer than two proposed values, or nothing was found.
    """
    if len(counts) < 2 or not sum(counts):
        raise ValueError(f"expected counts of two values or more, not all 0, found {list(counts)}")
    shares = np.array([count for count in counts if count]) / sum(counts)
    return float(-(shares * np.log(shares)).sum() / np.log(len(counts))) + 0.0
