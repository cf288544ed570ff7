"""`choice`: a judge picks the best caption of an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .asking import Ask, Asking, quoted
from .base import Embeddings, Row, Step, Told, scored_texts
from .claims import UNANSWERED

MOST = 26  # options have letters


@dataclass(frozen=True)
class Choice(Step):
    """Shows a judge the picture and its captions, in an order that depends on them alone, and has it choose one.

    Writes `chosen`: 1 for that one, 0 for the others. An image with one caption is not asked about, and at most 26 captions
    take part.
    """

    name: ClassVar[str] = "choice"
    about: ClassVar[str] = "has a judge choose the best caption of each image"
    after: ClassVar[str] = "Multi-LLM Collaborative Caption Generation (arXiv 2501.02552)"
    differs: ClassVar[str] = (
        "The judge sees the picture and chooses; the preset refine repairs what it chose. The paper has one model do both, for "
        "captions of scientific figures."
    )

    def writes(self) -> tuple[str, ...]:
        return ("chosen",)

    def roles(self) -> tuple[str, ...]:
        return ("judge",)

    def bound(self, row: Row, fitted: Any) -> Counter:
        return Counter(judge=1) if row.image_sha256 and len(row.texts()) > 1 else Counter()

    def ask(self, row: Row, fitted: Any) -> Asking:
        texts = sorted(row.texts())[:MOST]
        if row.image_sha256 is None or len(texts) < 2:
            return None
        prompt = "Which of these captions describes the image best? A good one says much that can be seen, and nothing that cannot."
        [chosen] = yield [Ask("judge", prompt, row.picture(), "choice", options=tuple(map(quoted, texts)))]
        return {} if chosen is None else {text: {"chosen": float(k == chosen)} for k, text in enumerate(texts)}

    def apply(
        self, rows: Sequence[Row], scorer: Embeddings | None = None, found: Sequence[Any] = ()
    ) -> list[list[dict]]:
        return scored_texts(rows, found)

    def told(self, rows: Sequence[Row], found: Sequence[Any]) -> Told:
        asked = [own for own in found if own is not None]
        figures: Counter = Counter({"images": len(asked), UNANSWERED: sum(not own for own in asked)})
        for row, own in zip(rows, found, strict=True):
            sources = {
                row.records[k].get("model")
                for k in row.captions()
                if (own or {}).get(row.records[k]["text"], {}).get("chosen")
            }
            figures.update(f"chosen of {source}" for source in sources if source)
        return Told(dict(figures))
