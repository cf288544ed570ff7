"""`agreement`: whether the captions of an image contradict each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

from .asking import NO, UNSURE, YES, Ask, Asking, quoted
from .base import Embeddings, Row, Step, Told, place_of, scored_texts
from .claims import UNANSWERED


@dataclass(frozen=True)
class Agreement(Step):
    """Asks the writer of each pair of captions of an image whether they contradict each other.

    Writes `nli`, 2·(1 − c) − 1, where c is the share of the other captions that contradict this one: 1 if none does, −1 if all
    do. Pairs that were not decided do not count; a single caption has no score.
    """

    name: ClassVar[str] = "agreement"
    about: ClassVar[str] = "scores each caption by how few of the image's others contradict it"
    after: ClassVar[str] = "MOCHa (arXiv 2312.03631): agreement by natural language inference"
    differs: ClassVar[str] = (
        "Captions are only scored: no captioner is trained on the reward. A writer that is asked once for each pair takes the place "
        "of a model of inference, and there is no BERTScore. Captions of one model share its mistakes, so agreement is no proof."
    )

    def writes(self) -> tuple[str, ...]:
        return ("nli",)

    def roles(self) -> tuple[str, ...]:
        return ("writer",)

    def bound(self, row: Row, fitted: Any) -> Counter:
        number = len(row.texts())
        return Counter(writer=number * (number - 1) // 2)

    def ask(self, row: Row, fitted: Any) -> Asking:
        pairs = list(combinations(sorted(row.texts()), 2))
        if not pairs:
            return None
        answers = yield [_ask(*pair) for pair in pairs]
        return dict(zip(pairs, answers, strict=True))

    def apply(
        self, rows: Sequence[Row], scorer: Embeddings | None = None, found: Sequence[Any] = ()
    ) -> list[list[dict]]:
        return scored_texts(
            rows,
            [
                own and {text: {"nli": _score(text, own)} for text in row.texts()}
                for row, own in zip(rows, found, strict=True)
            ],
        )

    def told(self, rows: Sequence[Row], found: Sequence[Any]) -> Told:
        answers = Counter(answer or UNANSWERED for own in found for answer in (own or {}).values())
        figures = {"pairs": answers.total(), "contradictions": answers[YES]}
        figures |= {UNSURE: answers[UNSURE], UNANSWERED: answers[UNANSWERED]}
        details = []
        for row, own in zip(rows, found, strict=True):
            records = {row.records[k]["text"]: place_of(row.records[k]) for k in reversed(row.captions())}
            for (a, b), answer in (own or {}).items():
                details.append(
                    {
                        "image_sha256": row.image_sha256,
                        "record": records[a],
                        "kind": "contradicts",
                        "text": b,
                        "verdict": answer or UNANSWERED,
                        "votes": [],
                    }
                )
        return Told(figures, details)


def _score(text: str, answers: dict[tuple[str, str], str | None]) -> float | None:
    own = [answer for pair, answer in answers.items() if text in pair and answer in (YES, NO)]
    return 2 * (1 - own.count(YES) / len(own)) - 1 if own else None


def _ask(first: str, second: str) -> Ask:
    prompt = (
        "Do these two captions of one image contradict each other, so that not both can be true? Saying more or less is no "
        f"contradiction.\nCaption: {quoted(first)}\nCaption: {quoted(second)}"
    )
    return Ask("writer", prompt, answer="yes_no")
