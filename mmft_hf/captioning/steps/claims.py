"""Claims: what a caption says, as statements that can be judged one by one, and what their verdicts come to."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .asking import NO, UNSURE, YES, Ask, View, quoted
from .base import Row

KINDS = ("entity", "attribute", "relation")
CLAUSE = "clause"  # the kind of a claim that was cut out of a caption, without a model
UNANSWERED, NOT_ASKED = "unanswered", "not_asked"  # verdicts beside yes, no and unsure


@dataclass(frozen=True)
class Claim:
    """One statement of a caption.

    Args:
        kind: one of `KINDS`, or `CLAUSE`.
        of: numbers, from 0, of the claims about the entities that it depends on.
    """

    text: str
    kind: str
    of: tuple[int, ...] = ()


def split_ask(caption: str, most: int) -> Ask:
    """Asks the writer for the claims of a caption, at most `most`; `read_claims` reads the answer."""
    return Ask(
        "writer",
        f"List what the caption below says about its image, in at most {most} short statements. Each statement can be "
        "understood by itself and says one thing. Keep numbers and negations. Write each statement as an object with three keys. "
        "claim: the statement. kind: entity (something is in the image), attribute (something about one entity) or relation "
        "(something about two entities). of: a list of the numbers, counted from 1, of the entity statements that it depends "
        f"on, empty for an entity.\nCaption: {quoted(caption)}",
        answer="json:claims",
    )


def read_claims(answer: Mapping[str, Any] | None) -> tuple[list[Claim] | None, int]:
    """The claims of an answer to `split_ask`, and how many of its entries have another form.

    The claims are None if the answer is no list, or a list of which no entry can be read.
    """
    found = (answer or {}).get("claims")
    if not isinstance(found, list):
        return None, 0
    readable = [n for n, one in enumerate(found) if _is_claim(one)]
    place = {n: k for k, n in enumerate(readable)}
    claims = []
    for one in (found[n] for n in readable):
        of = one.get("of") if isinstance(one.get("of"), list) else ()
        parents = tuple(place[n - 1] for n in of if type(n) is int and n - 1 in place)
        claims.append(Claim(one["claim"].strip(), one["kind"], parents))
    return (None if found and not claims else claims), len(found) - len(claims)


def _is_claim(one: Any) -> bool:
    claim = one.get("claim") if isinstance(one, dict) else None
    return isinstance(claim, str) and bool(claim.strip()) and one.get("kind") in KINDS


def clauses(caption: str) -> list[Claim]:
    """The parts of a caption between commas, semicolons and the ends of sentences, each once."""
    parts = (part.strip() for part in re.split(r"[,;!?\n]|\.(?!\d)", caption))
    return [Claim(text, CLAUSE) for text in dict.fromkeys(filter(None, parts))]


def number_of(*words: Any) -> int:
    """A number that depends on these words alone: for draws that neither the order of rows nor another run can change."""
    return int(hashlib.sha256(repr(words).encode()).hexdigest()[:15], 16)


def foreign_captions(rows: Sequence[Row]) -> list[tuple[int, str]]:
    """`(label, caption)` of all rows, each once, in order."""
    return sorted({(row.label, row.records[k]["text"]) for row in rows for k in row.captions()})


def foreign_caption(captions: Sequence[tuple[int, str]], row: Row, *seed: Any) -> str | None:
    """A caption of another class that the image does not have, drawn by its picture and the seed.

    Args:
        captions: of `foreign_captions`.
    """
    first, last = (bisect_left(captions, (label,)) for label in (row.label, row.label + 1))
    number, own = len(captions) - (last - first), set(row.texts())
    if not number:
        return None
    start = number_of(row.image_sha256, *seed)
    for away in range(min(number, len(own) + 1)):
        place = (start + away) % number
        text = captions[place if place < first else place + last - first][1]
        if text not in own:
            return text
    return None


def decoy(claims: Iterable[Claim], own: Iterable[str], *seed: Any) -> str | None:
    """One of the claims about another class, of an entity if there is one, which is none of `own`, the image's claims."""
    known = {text.casefold() for text in own}
    fitting = [claim for claim in claims if claim.text.casefold() not in known]
    entities = [claim for claim in fitting if claim.kind == "entity"] or fitting
    return min((claim.text for claim in entities), key=lambda text: number_of(text, *seed), default=None)


# -- asking the judge -------------------------------------------------------------------------------------------------
def claim_ask(pictures: tuple[View, ...], claim: str, sample: int = 0) -> Ask:
    """Asks the judge whether one claim is true of a picture."""
    prompt = f"Is this statement true of the image? Judge by what can be seen.\nStatement: {quoted(claim)}"
    return Ask("judge", prompt, pictures, "yes_no", sample=sample)


def numbered_ask(
    role: str, question: str, statements: Sequence[str], pictures: tuple[View, ...] = (), sample: int = 0
) -> Ask:
    """Asks about several statements at once; `read_numbered` reads the answer."""
    listed = "\n".join(f"{number}. {quoted(text)}" for number, text in enumerate(statements, 1))
    keys = ",".join(map(str, range(1, len(statements) + 1)))
    prompt = f"{question}\n{listed}\nEach value is yes, no or unsure."
    return Ask(role, prompt, pictures, f"json:{keys}", sample=sample)


def read_numbered(answer: Mapping[str, Any] | None, number: int) -> list[str | None]:
    """The verdicts of an answer to `numbered_ask`; None where there is none."""
    words = [str((answer or {}).get(str(n), "")).strip().lower() for n in range(1, number + 1)]
    return [{"true": YES, "false": NO}.get(word, word if word in (YES, NO, UNSURE) else None) for word in words]


def majority(votes: Sequence[str | None]) -> str:
    """The most frequent vote; `unsure` if there are several, `unanswered` if no vote was answered."""
    ranked = Counter(vote for vote in votes if vote is not None).most_common(2)
    if not ranked:
        return UNANSWERED
    return UNSURE if len(ranked) == 2 and ranked[0][1] == ranked[1][1] else ranked[0][0]


# -- figures ----------------------------------------------------------------------------------------------------------
def share(verdicts: Sequence[str], of: str, among: Sequence[str] = (YES, NO, UNSURE)) -> float | None:
    """How many of the verdicts `among` these are `of` this kind; None if there are none."""
    counted = [verdict for verdict in verdicts if verdict in among]
    return counted.count(of) / len(counted) if counted else None


def accuracy(verdicts: Sequence[str]) -> float | None:
    """Supported claims as a share of the decided ones, after the hierarchical scores of arXiv 2412.05685."""
    return share(verdicts, YES, (YES, NO))


def object_hallucination(verdicts: Sequence[str]) -> float | None:
    """1 − share of affirmed entities among those that were judged, unsure ones included (after arXiv 2312.03631)."""
    affirmed = share(verdicts, YES)
    return None if affirmed is None else 1 - affirmed


def dnli(verdicts: Sequence[str], reference: Sequence[str]) -> dict[str, float | None]:
    """Precision, recall and contradiction of a caption (after DNLI, arXiv 2411.09018, where a language model judges texts).

    Args:
        verdicts: of the claims of the caption.
        reference: of the facts of a reference: whether the caption says them.
    """
    return {
        "precision": share(verdicts, YES),
        "recall": share(reference, YES),
        "contradiction": share(verdicts, NO),
    }
