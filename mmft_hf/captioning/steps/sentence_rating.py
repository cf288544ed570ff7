"""`sentence_rating`: cuts clauses out of a caption that the model would write without the picture just as well."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .asking import Ask, Asking
from .base import ByRow, Embeddings, Row, Step, removed, with_scores, written

PROMPT = "Describe this image."
# Words that say nothing about a picture, in place of a tagger: only the others decide.
FUNCTION_WORDS = frozenset(
    "a about above across after against all along also although among an and another any are around as at away be because been "
    "before behind being below beneath beside between both but by can could did do does down during each either for from had has "
    "have he her here hers his how if in inside into is it its itself just like may might more most much near no nor not of off on "
    "one onto or other our out outside over own per she should so some such than that the their them then there these they this "
    "those through to toward towards under until up upon very via was we were what when where which while who whose will with "
    "within without would you your".split()
)
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_END = re.compile(r"[,.?!](?=\s|$)|\n")  # not within 3.5
Token = tuple[float, float, float]


@dataclass(frozen=True)
class Clause:
    """A part of a text up to a comma, the end of a sentence or of a line. `end`: its last character, or none at the end."""

    start: int
    stop: int
    end: str


@dataclass(frozen=True)
class SentenceRating(Step):
    """Compares the log-probability of each token with the picture and without, which is its gap, and cuts clauses out.

    A clause stays if the largest gap of its content words is above the threshold. Writes `gap`, the mean of these maxima. If
    nothing would be left, or if a question is not answered, the caption stays.

    Args:
        threshold: see above.
        raw: compares logits, as ScaleCap does.
    """

    threshold: float = 0.0
    raw: bool = False

    name: ClassVar[str] = "sentence_rating"
    about: ClassVar[str] = "cuts out clauses that the captioner would write without the picture just as well"
    after: ClassVar[str] = (
        "ScaleCap: Inference-Time Scalable Image Captioning via Dual-Modality Debiasing (arXiv 2506.19848)"
    )
    differs: ClassVar[str] = (
        "It compares log-probabilities, where ScaleCap compares logits (raw: true), and a list of function words takes the place of a "
        "tagger. Captions may be those of another model than the one that rates them."
    )

    def roles(self) -> tuple[str, ...]:
        return ("captioner",)

    def needs(self) -> Mapping[str, Sequence[str]]:
        return {"captioner": ("logprobs", "text")}

    def writes(self) -> tuple[str, ...]:
        return ("gap",)

    def bound(self, row: Row, fitted: Any) -> Counter:
        return Counter(captioner=2 * len(row.captions()) if row.image_sha256 else 0)

    def ask(self, row: Row, fitted: Any) -> Asking:
        captions = row.captions() if row.image_sha256 else []
        texts = [row.records[k]["text"] for k in captions]
        asks = [
            Ask("captioner", PROMPT, pictures, "log_probs", (text,))
            for text in texts
            for pictures in (row.picture(), ())
        ]
        answers = (yield asks) if asks else []
        place = 3 if self.raw else 2
        found = {}
        for k, seen, unseen in zip(captions, answers[::2], answers[1::2], strict=True):
            if seen is not None and unseen is not None and len(seen) == len(unseen):
                pairs = zip(seen, unseen, strict=True)
                found[k] = [(one[0], one[1], one[place] - other[place]) for one, other in pairs]
        return found

    def apply(self, rows: Sequence[Row], scorer: Embeddings | None, found: Sequence[Any] = ()) -> Sequence[list[dict]]:
        return ByRow(rows, lambda i, row: self._records(row, found[i] or {}))

    def _records(self, row: Row, found: Mapping[int, Sequence[Token]]) -> list[dict]:
        records, new = list(row.records), []
        for k, tokens in found.items():
            text = records[k]["text"]
            gaps = clause_gaps(text, tokens)
            known = [gap for _, gap in gaps if gap is not None]
            records[k] = with_scores(records[k], {"gap": sum(known) / len(known) if known else None})
            kept = shortened(text, gaps, self.threshold)
            if kept and kept != text:
                new.append(written(row, self.name, kept, [records[k]], scores=records[k]["scores"]))
                records[k] = removed(records[k], self.name)
        return [*records, *new]


def clauses(text: str) -> list[Clause]:
    """The clauses of a text, in order."""
    found, start = [], 0
    for match in _END.finditer(text):
        found.append(Clause(start, match.start(), match[0]))
        start = match.end()
    return [clause for clause in (*found, Clause(start, len(text), "")) if text[clause.start : clause.stop].strip()]


def clause_gaps(text: str, tokens: Sequence[Token]) -> list[tuple[Clause, float | None]]:
    """The largest gap of the content words of each clause; None if it has none.

    Args:
        tokens: begin and end in the text, and gap.
    """
    words = [m.span() for m in _WORD.finditer(text) if m[0].lower() not in FUNCTION_WORDS]
    found = []
    for clause in clauses(text):
        own = [(a, b) for a, b in words if clause.start <= a and b <= clause.stop]
        gaps = [gap for start, stop, gap in tokens if any(start < b and a < stop for a, b in own)]
        found.append((clause, max(gaps, default=None)))
    return found


def shortened(text: str, gaps: Sequence[tuple[Clause, float | None]], threshold: float) -> str:
    """The clauses whose gap is above the threshold. A sentence that loses its last clause ends as it did."""
    if all(gap is not None and gap > threshold for _, gap in gaps):
        return text
    kept: list[tuple[str, str]] = []
    within = False  # whether the sentence has a clause already
    for clause, gap in gaps:
        part = " ".join(text[clause.start : clause.stop].split())
        if gap is not None and gap > threshold:
            kept.append((part if within else part[0].upper() + part[1:], clause.end))
            within = True
        elif clause.end != "," and within:
            kept[-1] = (kept[-1][0], clause.end)
        if clause.end != ",":
            within = False
    return " ".join(part + ("" if end == "\n" else end) for part, end in kept)
