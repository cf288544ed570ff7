"""`verify`: whether what a caption claims is true of its image, claim by claim."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from PIL.Image import Image

from ...core.console import many, percent
from ...core.errors import UserError
from ...core.functions import named_function, source_digest
from ..experts import is_expert
from ..judge.wording import FUNCTION_WORDS, words_of
from ..types import DROPPED
from .asking import NO, UNSURE, YES, Ask, Asking, quoted
from .base import ByRow, Embeddings, Row, Step, Told, place_of, readable, removed, text_of, with_scores, written
from .claims import (
    KINDS,
    NOT_ASKED,
    UNANSWERED,
    Claim,
    accuracy,
    claim_ask,
    clauses,
    decoy,
    dnli,
    foreign_caption,
    foreign_captions,
    majority,
    number_of,
    numbered_ask,
    object_hallucination,
    read_claims,
    read_numbered,
    share,
    split_ask,
)

FACTS = 8  # facts that the judge lists itself
CHOICES = {
    "claims": ("writer", "clauses"),
    "per_call": ("one", "all"),
    "then": ("flag", "drop", "rewrite"),
    "on_unanswered": ("keep", "reject"),
}
WHICH_ARE_TRUE = "Which of these statements are true of the image? Judge each one by itself, by what can be seen."


@dataclass
class Judged:
    """What was found out about one caption.

    Args:
        claims: None if they are not known.
        unread: number of claims that the writer listed in another form, and that nobody judges.
        verdicts, votes: of each claim.
        decoys: statements about another class, with verdict and votes.
        facts: what the judge sees, and whether the caption says it.
        new: the text without what was denied.
    """

    claims: list[Claim] | None
    unread: int = 0
    verdicts: list[str] = field(default_factory=list)
    votes: list[list[str | None]] = field(default_factory=list)
    decoys: list[tuple[str, str, list[str | None]]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    new: str | None = None

    def denied(self) -> list[str]:
        """The claims that were denied, and those that were not asked because they depend on one."""
        wrong = {k for k, verdict in enumerate(self.verdicts) if verdict == NO}
        return [
            claim.text
            for k, claim in enumerate(self.claims or ())
            if k in wrong or (wrong and self.verdicts[k] == NOT_ASKED and wrong.intersection(claim.of))
        ]

    def unknown(self) -> bool:
        """Whether nothing, or not everything, was answered."""
        return self.claims is None or self.unread > 0 or UNANSWERED in self.verdicts


@dataclass(frozen=True)
class Fitted:
    """What `Verify.fit` takes from all rows: captions of all classes, and the verdicts of the scorer."""

    captions: list[tuple[int, str]]
    verdicts: Mapping[tuple[str, int, str], str]


@dataclass(frozen=True)
class Verify(Step):
    """Splits a caption into claims and judges each one. Writes `accuracy`, the supported share of the decided claims.

    Statements about another class are judged among them, unmarked. The share of these decoys that is denied says how far to
    trust the judge: below `trust`, captions are only scored.

    Args:
        claims: `writer` asks for the claims; `clauses` cuts the caption at commas and sentences, without a question.
        by: `judge` answers with the picture. `scorer` asks nobody: a claim is true if it fits the image better than `rivals`
            clauses of other images of its class. Or `package.module:function`, such as a detector, which is called with picture and claim
            and returns True, False or None.
        per_call: judge `one` claim, or `all` claims of a caption, in a question.
        levels: judge entities first, then attributes, then relations, and leave out what depends on a denied entity.
        votes: questions about each claim, of which the majority counts.
        decoys: statements about another class for each caption.
        trust: the share of decoys that must be denied.
        completeness: the judge also lists facts without seeing the caption; `completeness` is the share that the caption says.
        then: what follows from a denied claim. `flag` adds the check `contradicted`; `drop` also drops the caption, unless the
            image has no better one; `rewrite` has it written without the claim.
        rivals: see `by`.
        most: claims of a caption that are judged.
        hints: columns of the dataset that captions were written with. It is told how many of their words, among those that the claims
            took over, were denied.
        on_unanswered: `keep` a caption whose claims are not all answered, or `reject` it as if one was denied.
    """

    claims: str = "writer"
    by: str = "judge"
    per_call: str = "one"
    levels: bool = False
    votes: int = 1
    decoys: int = 1
    trust: float = 0.8
    completeness: bool = False
    then: str = "flag"
    rivals: int = 9
    most: int = 12
    on_unanswered: str = "keep"
    hints: tuple[str, ...] = ()

    name: ClassVar[str] = "verify"
    version: ClassVar[int] = 2
    about: ClassVar[str] = "judges what each caption claims, and may remove what is not true"
    after: ClassVar[str] = (
        "Visual Fact Checker (arXiv 2404.19752); levels and completeness after HMGIE (arXiv 2412.05685); what the student can see "
        "after KnowAda (arXiv 2411.09018)"
    )
    differs: ClassVar[str] = (
        "Claims are judged by questions about the picture alone: no object detector is shipped, and there is no 3D. Levels are weighted "
        "equally. Statements about another class measure the judge. by: scorer compares claims with those of other images of "
        "the class, where KnowAda asks the model to be tuned ten questions about each image."
    )

    def __post_init__(self):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"step verify, {name}: expected one of {', '.join(known)}, found {getattr(self, name)!r}."
                )
        if self._function:
            named_function(self.by, "step verify, by")
        elif self.by not in ("judge", "scorer"):
            raise UserError(f"step verify, by: expected judge, scorer or package.module:function, found {self.by!r}.")
        for name, least in (("votes", 1), ("decoys", 0), ("rivals", 1), ("most", 1)):
            if getattr(self, name) < least:
                raise UserError(f"step verify, {name}: expected {least} or more, found {getattr(self, name)}.")
        if not 0 <= self.trust <= 1:
            raise UserError(f"step verify, trust: expected a share between 0 and 1, found {self.trust:g}.")
        if self.by != "judge" and self.claims != "clauses":
            raise UserError(
                f"step verify, by: expected claims: clauses with by: {self.by}, which asks nobody, found claims: writer."
            )
        if self.by != "judge" and self.votes > 1:
            raise UserError(
                f"step verify, votes: expected 1 with by: {self.by}, which always says the same, found more."
            )
        if self.levels and self.claims == "clauses":
            raise UserError(
                "step verify, levels: expected claims: writer, because clauses have no kind, found claims: clauses."
            )

    @property
    def _function(self) -> bool:
        return is_expert(self.by)

    @property
    def _who(self) -> str:
        """Who judges, in a sentence."""
        return f"the function {self.by}" if self._function else f"the {self.by}"

    def spec(self) -> dict:
        """The options, and what the function is written in."""
        if not self._function:
            return super().spec()
        return super().spec() | {"code": source_digest(named_function(self.by, "step verify, by"))}

    def typed_options(self) -> dict:
        return {key: value for key, value in super().typed_options().items() if key != "code"}

    def writes(self) -> tuple[str, ...]:
        return ("accuracy", "completeness") if self.completeness else ("accuracy",)

    def needs_scorer(self) -> bool:
        """Also for a function: pictures are read through the scorer."""
        return self.by != "judge"

    def columns(self) -> tuple[str, ...]:
        return self.hints

    def roles(self) -> tuple[str, ...]:
        judge = self.by == "judge" or self.completeness
        writer = self.claims == "writer" or self.completeness or self.then == "rewrite"
        return (("judge",) if judge else ()) + (("writer",) if writer else ())

    def samples(self) -> int:
        return self.votes

    def bound(self, row: Row, fitted: Any) -> Counter:
        captions = len(row.texts())
        found: Counter = Counter()
        if captions and self.by == "judge":
            calls = self.most + self.decoys if self.per_call == "one" else len(KINDS) if self.levels else 1
            found["judge"] += captions * calls * self.votes
        if captions and self.completeness:
            found += Counter(judge=1, writer=captions)
        if captions:
            # The captions that decoys are taken from are split for their own images.
            found["writer"] += captions * ((self.claims == "writer") + (self.then == "rewrite"))
        return +found

    # -- before the first question ------------------------------------------------------------------------------------
    def fit(self, rows: Sequence[Row], scorer: Embeddings | None) -> Fitted:
        captions = foreign_captions(rows)
        if self.by == "judge":
            return Fitted(captions, {})
        return Fitted(captions, (self._called if self._function else self._scored)(rows, captions, scorer))

    def _called(self, rows: Sequence[Row], captions: list, scorer: Embeddings) -> dict[tuple[str, int, str], str]:
        """The verdict of a function on each clause and decoy of each image that can be read."""
        function, found = named_function(self.by, "step verify, by"), {}
        for i in readable(rows, scorer.images()):
            decoys = [text for one in self._decoys(rows[i], captions, clauses).values() for text in one]
            if statements := dict.fromkeys([*_clauses_of(rows[i]), *decoys]):
                picture = scorer.picture(i)
                for text in statements:
                    verdict = _called(function, self.by, picture, text)
                    found[rows[i].image_sha256, rows[i].label, text] = verdict
        return found

    def _scored(self, rows: Sequence[Row], captions: list, scorer: Embeddings) -> dict[tuple[str, int, str], str]:
        """The verdict of the scorer on each clause and decoy of each image that can be read."""
        images = scorer.images()
        pools: dict[int, dict[str, set]] = {}  # label -> clause -> the groups and pictures that have it
        for row in rows:
            for claim in _clauses_of(row):
                pools.setdefault(row.label, {}).setdefault(claim, set()).update((row.group, row.image_sha256))
        ordered = {label: sorted(pool) for label, pool in pools.items()}
        compared = []
        for i in readable(rows, images):
            if own := _clauses_of(rows[i]):
                decoys = [text for one in self._decoys(rows[i], captions, clauses).values() for text in one]
                rivals = self._rivals(rows[i], own, pools[rows[i].label], ordered[rows[i].label])
                compared.append((i, rivals, [*own, *decoys]))
        texts = sorted({text for _, rivals, own in compared for text in (*rivals, *own)})
        if not texts:
            return {}
        number, embeds = {text: k for k, text in enumerate(texts)}, scorer.texts(texts)
        found = {}
        for i, rivals, own in compared:
            cosines = embeds[[number[text] for text in (*rivals, *own)]] @ images[i]
            highest = cosines[: len(rivals)].max() if rivals else None
            for text, cosine in zip(own, cosines[len(rivals) :].tolist(), strict=True):
                verdict = UNSURE if highest is None else YES if cosine > highest else NO
                found[rows[i].image_sha256, rows[i].label, text] = verdict
        return found

    def _rivals(self, row: Row, own: Sequence[str], pool: Mapping[str, set], ordered: Sequence[str]) -> list[str]:
        """Clauses of other images of the class, drawn by the picture."""
        found: list[str] = []
        for k in np.random.default_rng(number_of(row.image_sha256)).permutation(len(ordered)):
            if len(found) == self.rivals:
                break
            if ordered[k] not in own and not pool[ordered[k]] & {row.group, row.image_sha256}:
                found.append(ordered[k])
        return found

    # -- the questions ------------------------------------------------------------------------------------------------
    def ask(self, row: Row, fitted: Fitted) -> Asking:
        texts = row.texts()
        if row.image_sha256 is None or not texts:
            return None
        split, unread, facts = yield from self._split(row, texts, fitted)
        found = {text: Judged(split[text], unread.get(text, 0)) for text in texts}
        decoys = self._decoys(row, fitted.captions, split.get)
        yield from self._judge(row, fitted, found, decoys)
        if facts:
            asks = [_covered_ask(text, facts) for text in texts]
            for one, answer in zip(found.values(), (yield asks), strict=True):
                verdicts = [verdict or UNANSWERED for verdict in read_numbered(answer, len(facts))]
                one.facts = list(zip(facts, verdicts, strict=True))
        wrong = {text: one.denied() for text, one in found.items()} if self.then == "rewrite" else {}
        # A caption of which nothing was affirmed has nothing that could stay.
        wrong = {text: claims for text, claims in wrong.items() if claims and YES in found[text].verdicts}
        if wrong:
            asks = [_rewrite_ask(text, claims, row.class_name) for text, claims in wrong.items()]
            for text, answer in zip(wrong, (yield asks), strict=True):
                found[text].new = answer if answer != text else None
        return found

    def _split(self, row: Row, texts: list[str], fitted: Fitted) -> Iterator:
        """The claims of the captions, and of those that decoys come from; how many could not be read; and the facts that the judge sees."""
        foreign = [foreign_caption(fitted.captions, row, text, k) for text in texts for k in range(self.decoys)]
        wanted = list(dict.fromkeys([*texts, *filter(None, foreign)]))
        asks = [split_ask(text, self.most) for text in wanted] if self.claims == "writer" else []
        answers = (
            (yield [*asks, *([_facts_ask(row)] if self.completeness else [])]) if asks or self.completeness else []
        )
        facts = (answers[-1] or [])[:FACTS] if self.completeness else []
        if not asks:
            return {text: clauses(text) for text in wanted}, {}, facts
        read = {text: read_claims(answer) for text, answer in zip(wanted, answers[: len(wanted)], strict=True)}
        return {text: own for text, (own, _) in read.items()}, {text: lost for text, (_, lost) in read.items()}, facts

    def _decoys(self, row: Row, captions: list, split: Callable[[str], list[Claim] | None]) -> dict[str, list[str]]:
        """The decoys of each caption. `captions`: of `foreign_captions`; `split`: gives the claims of a caption."""
        texts = row.texts()
        own = [claim.text for text in texts for claim in split(text) or ()]
        found: dict[str, list[str]] = {text: [] for text in texts}
        for text in texts:
            for k in range(self.decoys if split(text) is not None else 0):
                if source := foreign_caption(captions, row, text, k):
                    one = decoy(split(source) or (), [*own, *found[text]], row.image_sha256, text)
                    found[text] += [one] if one else []
        return found

    def _judge(self, row: Row, fitted: Fitted, found: dict[str, Judged], decoys: Mapping[str, list[str]]) -> Iterator:
        """Fills in the verdicts of claims and decoys."""
        for one in found.values():
            number = len(one.claims or ())
            one.verdicts, one.votes = [NOT_ASKED] * number, [[] for _ in range(number)]
        for level in (*KINDS,) if self.levels else (None,):
            open_claims = {text: self._open(one, level) for text, one in found.items()}
            hidden = decoys if level in (None, KINDS[0]) else {}
            statements = {
                text: list(dict.fromkeys([*(found[text].claims[k].text for k in numbers), *hidden.get(text, ())]))
                for text, numbers in open_claims.items()
            }
            votes = yield from self._votes(row, fitted, statements)
            for text, numbers in open_claims.items():
                one = found[text]
                for k in numbers:
                    one.votes[k] = votes[text][one.claims[k].text]
                    one.verdicts[k] = majority(one.votes[k])
                one.decoys += [(d, majority(votes[text][d]), votes[text][d]) for d in hidden.get(text, ())]

    def _open(self, one: Judged, level: str | None) -> list[int]:
        """The numbers of the claims of a level that depend on nothing that was denied, or not asked for that reason."""
        return [
            k
            for k, claim in enumerate(one.claims or ())
            if k < self.most
            and level in (None, claim.kind)
            and not (self.levels and any(one.verdicts[parent] == NO for parent in claim.of))
        ]

    def _votes(self, row: Row, fitted: Fitted, statements: Mapping[str, list[str]]) -> Iterator:
        """The votes on the statements of each caption."""
        if self.by != "judge":
            verdicts = fitted.verdicts
            return {
                text: {one: [verdicts.get((row.image_sha256, row.label, one))] for one in own}
                for text, own in statements.items()
            }
        samples = range(self.votes)
        if self.per_call == "one":
            distinct = list(dict.fromkeys(one for own in statements.values() for one in own))
            asks = [claim_ask(row.picture(), one, k) for one in distinct for k in samples]
            answers = iter((yield asks) if asks else ())
            votes = {one: [next(answers) for _ in samples] for one in distinct}
            return {text: {one: votes[one] for one in own} for text, own in statements.items()}
        # The order must not tell which of them are decoys.
        mixed = {t: sorted(own, key=lambda one: number_of(row.image_sha256, one)) for t, own in statements.items()}
        asks = [
            numbered_ask("judge", WHICH_ARE_TRUE, own, row.picture(), k)
            for own in mixed.values()
            if own
            for k in samples
        ]
        answers = iter((yield asks) if asks else ())
        found: dict[str, dict[str, list]] = {}
        for text, own in mixed.items():
            read = [read_numbered(next(answers), len(own)) for _ in samples] if own else []
            found[text] = {one: [vote[n] for vote in read] for n, one in enumerate(own)}
        return found

    # -- the result ---------------------------------------------------------------------------------------------------
    def apply(
        self, rows: Sequence[Row], scorer: Embeddings | None = None, found: Sequence[dict | None] = ()
    ) -> Sequence[list[dict]]:
        then = self.then if self.trusted(found) else "flag"
        return ByRow(rows, lambda i, row: self._records(row, found[i] or {}, then))

    def trusted(self, found: Sequence[dict | None]) -> bool:
        """Whether enough decoys were denied; without decoys, it is taken for granted."""
        recall = decoy_recall(found)
        return not self.decoys or (recall is not None and recall >= self.trust)

    def _records(self, row: Row, judged: Mapping[str, Judged], then: str) -> list[dict]:
        records = list(row.records)
        bad, new = [], []
        for k in row.captions():
            one = judged.get(records[k]["text"])
            if one is None:
                continue
            scores = {"accuracy": accuracy(one.verdicts)}
            if self.completeness:
                scores["completeness"] = share([verdict for _, verdict in one.facts], YES)
            checks = [name for name, is_so in (("contradicted", one.denied()), (UNANSWERED, one.unknown())) if is_so]
            records[k] = with_scores(records[k], scores)
            records[k]["checks"] = list(dict.fromkeys([*(records[k]["checks"] or ()), *checks]))
            if then == "rewrite" and one.denied() and one.new:
                new.append(written(row, self.name, one.new, [records[k]]))
                records[k] = removed(records[k], self.name)
            elif one.denied() and (then == "drop" or (then == "rewrite" and YES not in one.verdicts)):
                bad.append(k)
            elif one.unknown() and then != "flag" and self.on_unanswered == "reject":
                bad.append(k)
        if bad and not new and len(bad) == len(row.captions()):
            bad.remove(min(bad, key=lambda k: -(accuracy(judged[records[k]["text"]].verdicts) or 0)))
        for k in bad:
            records[k] = removed(records[k], self.name, DROPPED)
        return records + new

    def told(self, rows: Sequence[Row], found: Sequence[dict | None]) -> Told:
        every = [one for own in found for one in (own or {}).values()]
        verdicts = [verdict for one in every for verdict in one.verdicts]
        kinds = {
            kind: [v for one in every for c, v in zip(one.claims or (), one.verdicts, strict=True) if c.kind == kind]
            for kind in KINDS
        }
        facts = [verdict for one in every for _, verdict in one.facts]
        recall = decoy_recall(found)
        figures = {
            "claims": len(verdicts),
            **{name: verdicts.count(name) for name in (YES, NO, UNSURE, UNANSWERED, NOT_ASKED)},
            "captions_without_claims": sum(one.claims is None for one in every),
            **({"claims_unread": unread} if (unread := sum(one.unread for one in every)) else {}),
            "decoys": sum(len(one.decoys) for one in every),
            "decoy_recall": recall,
            **{f"accuracy_{kind}": accuracy(own) for kind, own in kinds.items()},
            "object_hallucination": object_hallucination(kinds["entity"]),
            **dnli(verdicts, facts),
        }
        notes = []
        if self.hints:
            words = [verdict for row, own in zip(rows, found, strict=True) for verdict in self._hinted(row, own or {})]
            figures |= {"hint_words": len(words), "hint_words_denied": share(words, NO)}
            if words:
                notes.append(
                    f"Of {many(len(words), 'word')} of hints in the claims, {self._who} denied {percent(share(words, NO))}."
                )
        if self.decoys and recall is None:
            notes.append(
                f"{self._who[0].upper()}{self._who[1:]} answered no statement about another class, so it is not known whether it can be trusted. Verdicts "
                "are recorded and no caption is changed."
            )
        elif self.decoys:
            notes.append(
                f"Of {figures['decoys']:,} statements about other classes among the claims, {self._who} denied {percent(recall)}."
            )
        if recall is not None and not self.trusted(found):
            notes.append(f"Below {percent(self.trust)}, verdicts are recorded and no caption is changed.")
        return Told({name: value for name, value in figures.items() if value is not None}, _details(rows, found), notes)

    def _hinted(self, row: Row, judged: Mapping[str, Judged]) -> list[str]:
        """The verdict on each word of the hints of an image that a decided claim has: `no` if no affirmed one has it."""
        words = {word for name in self.hints for word in words_of(text_of(row.columns.get(name)))} - FUNCTION_WORDS
        found: dict[str, str] = {}
        for one in judged.values():
            for claim, verdict in zip(one.claims or (), one.verdicts, strict=True):
                for word in words.intersection(words_of(claim.text)) if verdict in (YES, NO) else ():
                    found[word] = YES if YES in (verdict, found.get(word)) else NO
        return list(found.values())


def _called(function: Callable[[Image, str], bool | None], name: str, picture: Image, text: str) -> str:
    """What a function of the user's own says of a statement."""
    try:
        said = function(picture, text)
    except Exception as error:
        raise UserError(
            f"step verify, by {name}: expected True, False or None for {text!r}, but it raised {type(error).__name__}: {error}"
        ) from error
    if said is not None and not isinstance(said, bool | np.bool_):
        raise UserError(f"step verify, by {name}: expected True, False or None for {text!r}, found {said!r}.")
    return UNSURE if said is None else YES if said else NO


def decoy_recall(found: Sequence[Mapping[str, Judged] | None]) -> float | None:
    """The share of decoys that was denied among those that were answered; None without any."""
    return share([verdict for own in found for one in (own or {}).values() for _, verdict, _ in one.decoys], NO)


def _details(rows: Sequence[Row], found: Sequence[Mapping[str, Judged] | None]) -> list[dict]:
    details = []
    for row, own in zip(rows, found, strict=True):
        for k in row.captions():
            one = (own or {}).get(row.records[k]["text"])
            if one is None:
                continue
            lines = [
                *(
                    (c.kind, c.text, v, votes)
                    for c, v, votes in zip(one.claims or (), one.verdicts, one.votes, strict=True)
                ),
                *(("decoy", text, verdict, votes) for text, verdict, votes in one.decoys),
                *(("fact", text, verdict, [verdict]) for text, verdict in one.facts),
            ]
            place = {"image_sha256": row.image_sha256, "record": place_of(row.records[k])}
            details += [
                {**place, "kind": kind, "text": text, "verdict": verdict, "votes": [v or UNANSWERED for v in votes]}
                for kind, text, verdict, votes in lines
            ]
    return details


def _clauses_of(row: Row) -> list[str]:
    return list(dict.fromkeys(claim.text for text in row.texts() for claim in clauses(text)))


def _facts_ask(row: Row) -> Ask:
    prompt = (
        f"List at most {FACTS} facts that can be seen in this image, the most important first. Each one is a short statement that "
        "can be understood by itself."
    )
    return Ask("judge", prompt, row.picture(), "list")


def _covered_ask(caption: str, facts: Sequence[str]) -> Ask:
    question = f"Which of these statements does the caption say, or imply?\nCaption: {quoted(caption)}"
    return numbered_ask("writer", question, facts)


def _rewrite_ask(caption: str, wrong: Sequence[str], class_name: str) -> Ask:
    listed = "\n".join(map(quoted, wrong))
    prompt = (
        "Rewrite this caption without what the statements below say, because they are not true of its image. Change nothing else "
        f"and add nothing. Write the caption alone.\nCaption: {quoted(caption)}\nStatements:\n{listed}"
    )
    return Ask("writer", prompt, answer="caption", class_name=class_name)
