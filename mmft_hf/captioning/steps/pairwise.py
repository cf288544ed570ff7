"""`pairwise`: a judge compares the captions of an image two by two, in both orders."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...core.errors import UserError
from .arena import Game, caption_arena
from .asking import Ask, Asking, quoted
from .base import Embeddings, Row, Step, Told, place_of, scored_texts
from .claims import UNANSWERED, number_of

SOURCES = ("model", "aspect", "step")
NEITHER, FIRST, SECOND = 0, 1, 2  # answers of the judge
RESULTS = {(FIRST, SECOND): 1.0, (SECOND, FIRST): 0.0}  # all others are ties


@dataclass(frozen=True)
class Compared:
    """Two captions, and which of them the judge preferred: as shown first, and with the places swapped. None: unanswered."""

    first: str
    second: str
    straight: int | None
    swapped: int | None

    def result(self) -> float | None:
        """1 if the first caption wins in both orders, 0 if the second does, otherwise 0.5. None if an answer is missing."""
        if None in (self.straight, self.swapped):
            return None
        return RESULTS.get((self.straight, self.swapped), 0.5)


@dataclass(frozen=True)
class Pairwise(Step):
    """Shows the judge the picture and two of its captions, in both orders. A caption wins if it is preferred in both.

    Writes `wins`, the share of its comparisons that a caption won; ties count half. The report ranks sources of captions by
    Bradley-Terry strengths.

    Args:
        rounds: with how many others, twice, a caption is compared at most; None: with all of them.
        images: number of images, drawn by their sha256; None: all.
        sources: what the strengths are of: `model`, `aspect` or `step`, the fields of a caption record.
    """

    rounds: int | None = None
    images: int | None = None
    sources: str = "model"

    name: ClassVar[str] = "pairwise"
    about: ClassVar[str] = "has a judge compare the captions of each image two by two"
    after: ClassVar[str] = "CapArena (arXiv 2503.12329)"
    differs: ClassVar[str] = (
        "Each pair is shown in both orders, and a win needs both; the paper shows one. Strengths are of Bradley and Terry, with ties "
        "as half wins and a bootstrap over images; the paper has online Elo, and scores against fixed baselines. They are of your "
        "images, and no result of that benchmark."
    )

    def __post_init__(self):
        for name in ("rounds", "images"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"step pairwise, {name}: expected 1 or more, found {value}.")
        if self.sources not in SOURCES:
            raise UserError(f"step pairwise, sources: expected one of {', '.join(SOURCES)}, found {self.sources!r}.")

    def writes(self) -> tuple[str, ...]:
        return ("wins",)

    def roles(self) -> tuple[str, ...]:
        return ("judge",)

    def fit(self, rows: Sequence[Row], scorer: Embeddings | None) -> frozenset[str] | None:
        """The images that take part; None: all."""
        if self.images is None:
            return None
        able = {row.image_sha256 for row in rows if row.image_sha256 and len(row.texts()) > 1}
        return frozenset(sorted(able, key=number_of)[: self.images])

    def bound(self, row: Row, fitted: frozenset[str] | None) -> Counter:
        return Counter(judge=2 * len(list(self._pairs(row, fitted))))

    def _pairs(self, row: Row, fitted: frozenset[str] | None) -> Iterator[tuple[str, str]]:
        """Each caption with those that come after it in an order that depends on the image and the captions alone."""
        if row.image_sha256 is None or (fitted is not None and row.image_sha256 not in fitted):
            return
        texts = sorted(row.texts(), key=lambda text: number_of(row.image_sha256, text))
        number = len(texts)
        met = set()
        for away in range(1, min(self.rounds or number, number // 2) + 1):
            for i in range(number):
                pair = (texts[i], texts[(i + away) % number])
                if frozenset(pair) not in met:
                    met.add(frozenset(pair))
                    yield pair

    def ask(self, row: Row, fitted: frozenset[str] | None) -> Asking:
        pairs = list(self._pairs(row, fitted))
        if not pairs:
            return None
        answers = iter((yield [_ask(row, *order) for a, b in pairs for order in ((a, b), (b, a))]))
        return [Compared(a, b, next(answers), next(answers)) for a, b in pairs]

    def apply(
        self, rows: Sequence[Row], scorer: Embeddings | None = None, found: Sequence[Any] = ()
    ) -> list[list[dict]]:
        scores = []
        for own in found:
            points = defaultdict(list)
            for pair in own or ():
                if (result := pair.result()) is not None:
                    points[pair.first].append(result)
                    points[pair.second].append(1 - result)
            scores.append({text: {"wins": sum(won) / len(won)} for text, won in points.items()})
        return scored_texts(rows, scores)

    def told(self, rows: Sequence[Row], found: Sequence[Any]) -> Told:
        pairs = [pair for own in found for pair in own or ()]
        decided = [pair for pair in pairs if pair.result() is not None]
        games, words, details = [], defaultdict(list), []
        for row, own in zip(rows, found, strict=True):
            records = {row.records[k]["text"]: row.records[k] for k in reversed(row.captions())}
            sources = {text: str(record.get(self.sources) or "caption") for text, record in records.items()}
            for text, source in sources.items() if own else ():
                words[source].append(len(text.split()))
            for pair in own or ():
                result, a, b = pair.result(), sources[pair.first], sources[pair.second]
                if result is not None and a != b:
                    games.append(Game(row.image_sha256, a, b, result))
                details.append(
                    {
                        "image_sha256": row.image_sha256,
                        "record": place_of(records[pair.first]),
                        "kind": "better than",
                        "text": pair.second,
                        "verdict": {1.0: "yes", 0.0: "no", 0.5: "tie", None: UNANSWERED}[result],
                        "votes": [UNANSWERED if vote is None else str(vote) for vote in (pair.straight, pair.swapped)],
                    }
                )
        figures: dict[str, Any] = {"pairs": len(pairs), UNANSWERED: len(pairs) - len(decided)}
        if decided:
            figures["ties"] = sum(pair.result() == 0.5 for pair in decided)
            figures["position_bias"] = position_bias(decided)
        strengths = caption_arena(games)
        for one in strengths:
            figures[f"strength {one.source}"] = [v for v in (one.value, one.low, one.high) if v is not None]
            figures[f"words {one.source}"] = sum(words[one.source]) / len(words[one.source])
        notes = []
        if strengths and strengths[0].value is None:
            notes.append("There are no strengths, because some sources won, or lost, all comparisons with the others.")
        elif strengths:
            notes.append("Strengths: " + ", ".join(f"{one.source} {one.value:+.2f}" for one in strengths) + ".")
        return Told(figures, details, notes)


def position_bias(pairs: Sequence[Compared]) -> float:
    """The share of pairs of which the judge preferred the one that was shown first, in both orders."""
    return sum((pair.straight, pair.swapped) == (FIRST, FIRST) for pair in pairs) / len(pairs)


def _ask(row: Row, first: str, second: str) -> Ask:
    prompt = (
        "Which of these two captions describes the image better? A good one says much that can be seen, and nothing that cannot; its "
        f"length does not count. Answer {NEITHER} if neither is better.\nCaption {FIRST}: {quoted(first)}\nCaption {SECOND}: "
        f"{quoted(second)}"
    )
    return Ask("judge", prompt, row.picture(), f"score:{NEITHER}-{SECOND}")
