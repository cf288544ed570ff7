"""`agreement`: whether the captions of an image contradict each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, ClassVar

from .asking import NO, UNSURE, YES, Ask, Asking, quoted
from .base import Embeddings, Row, Step, Told, place_of, scored_texts
from .claims import UNANSWERED

Pair = tuple[str, str]  # premise and text


@dataclass(frozen=True)
class Agreement(Step):
    """Asks the writer of each pair of captions of an image whether they contradict each other, or a local model.

    Writes `nli`, 2·(1 − c) − 1, where c is the share of the other captions that contradict this one, or the mean probability
    that they do: 1 if none does, −1 if all do. Pairs that were not decided do not count; a single caption has no score.

    Args:
        model (*optional*): Hub id or folder of a model of natural language inference. Then nobody is asked.
    """

    model: str | None = None

    name: ClassVar[str] = "agreement"
    about: ClassVar[str] = "scores each caption by how few of the image's others contradict it"
    after: ClassVar[str] = "MOCHa (arXiv 2312.03631): agreement by natural language inference"
    differs: ClassVar[str] = (
        "Captions are only scored: no captioner is trained on the reward. Without the option model, a writer that is asked once for "
        "each pair takes the place of the model of inference. There is no BERTScore. Captions of one model share its mistakes, so agreement is no proof."
    )

    def writes(self) -> tuple[str, ...]:
        return ("nli",)

    def needs_scorer(self) -> bool:
        return False

    def roles(self) -> tuple[str, ...]:
        return () if self.model else ("writer",)

    def bound(self, row: Row, fitted: Any) -> Counter:
        number = len(row.texts())
        return Counter() if self.model else Counter(writer=number * (number - 1) // 2)

    def fit(self, rows: Sequence[Row], scorer: Embeddings | None) -> dict[Pair, float] | None:
        """With a model, the probability of each pair. Loads torch."""
        if not self.model:
            return None
        from .nli import Inference

        return Inference(self.model).contradictions(pair for row in rows for pair in permutations(row.texts(), 2))

    def ask(self, row: Row, fitted: dict[Pair, float] | None) -> Asking:
        pairs = list(permutations(sorted(row.texts()), 2))
        if not pairs:
            return None
        if fitted is not None:
            return {pair: fitted[pair] for pair in pairs}
        once = [pair for pair in pairs if pair[0] < pair[1]]
        answers = dict(zip(once, (yield [_ask(*pair) for pair in once]), strict=True))
        return answers | {(b, a): answer for (a, b), answer in answers.items()}

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
        details, figures = [], Counter()
        for row, own in zip(rows, found, strict=True):
            records = {row.records[k]["text"]: place_of(row.records[k]) for k in reversed(row.captions())}
            for (a, b), answer in (own or {}).items():
                if self.model or a < b:
                    place = {"image_sha256": row.image_sha256, "record": records[b]}
                    verdict = UNANSWERED if answer is None else f"{answer:.3f}" if self.model else answer
                    details.append({**place, "kind": "contradicted by", "text": a, "verdict": verdict, "votes": []})
                    figures.update(
                        {
                            "pairs": 1,
                            "contradictions": (_contradicts(answer) or 0) >= 0.5,
                            UNSURE: answer == UNSURE,
                            UNANSWERED: answer is None,
                        }
                    )
        return Told(dict(figures), details)


def _contradicts(answer: str | float | None) -> float | None:
    """How far one caption contradicts the other, from 0 to 1; None if that was not decided."""
    return answer if isinstance(answer, float) else {YES: 1.0, NO: 0.0}.get(answer)


def _score(text: str, answers: Mapping[Pair, str | float | None]) -> float | None:
    own = [_contradicts(answer) for (_, other), answer in answers.items() if other == text]
    known = [value for value in own if value is not None]
    return 2 * (1 - sum(known) / len(known)) - 1 if known else None


def _ask(first: str, second: str) -> Ask:
    prompt = (
        "Do these two captions of one image contradict each other, so that not both can be true? Saying more or less is no "
        f"contradiction.\nCaption: {quoted(first)}\nCaption: {quoted(second)}"
    )
    return Ask("writer", prompt, answer="yes_no")
