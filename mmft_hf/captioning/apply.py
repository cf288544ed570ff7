"""Applies steps to a table of captions, one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..core.console import some
from ..core.errors import UserError
from .caption_table import CaptionTable
from .judge.checks import CaptionChecker
from .spool import Spool
from .steps.asking import Ask, answered
from .steps.base import Embeddings, Row, Step, Told
from .types import ACCEPTED, REPLACED
from .write.dataset import captions_from

SHREDDED = 2.5  # tokens per word from which a tokenizer does not know a language


@dataclass
class Asked:
    """What a step was told.

    Args:
        found: for each row what its `ask` returned.
        figures: of its questions, for `captions.json`.
        model: that wrote its texts.
        rejected: see `ask.questions.Tally`.
    """

    found: Sequence[Any]
    figures: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    rejected: Sequence[Mapping[str, Any]] = ()


@dataclass
class AppliedStep:
    """What a step did.

    Args:
        before, after: number of captions.
        unscored: captions to which it could give no score, or which it kept because they had none.
        dropped, replaced: number of captions that it dropped, and that a new text took the place of, by class.
        written: number of new texts.
        asked: figures of its questions; empty if it asked nobody.
        told: what else it tells.
    """

    step: Step
    before: int
    after: int
    unscored: int
    dropped: Counter = field(default_factory=Counter)
    replaced: Counter = field(default_factory=Counter)
    written: int = 0
    asked: Mapping[str, Any] = field(default_factory=dict)
    told: Told = field(default_factory=Told)

    def summary(self) -> dict:
        """Entry of `captions.json`."""
        step = self.step
        entry = {"name": step.title, "options": step.typed_options(), "about": step.about, "follows": step.after}
        entry |= {"differs": step.differs, "before": self.before, "after": self.after, "unscored": self.unscored}
        entry |= {"dropped": dict(self.dropped), "replaced": dict(self.replaced), "written": self.written}
        if step.roles():
            entry |= {"roles": list(step.roles()), "sees_label": step.sees_label, "asked": dict(self.asked)}
        figures = {name: _rounded(value) for name, value in self.told.figures.items()}
        return entry | {"figures": figures, "notes": list(self.told.notes)}


def apply_steps(
    table: CaptionTable,
    steps: Sequence[Step],
    scorer: Embeddings | None,
    ask: Callable[[Step, Sequence[Row], Any], Asked] | None = None,
    checker: CaptionChecker | None = None,
    allow_empty_classes: bool = False,
) -> list[AppliedStep]:
    """Applies steps to the rows of a table, one after the other.

    Args:
        ask: asks the questions of a step, given its rows and what it has fitted to them.
        checker (*optional*): checks the texts that steps write.

    Raises:
        UserError: a class would lose its last caption.
    """
    applied = []
    for number, step in enumerate(steps, 1):
        before = table.rows
        fitted = step.fit(before, scorer)
        if step.roles():
            if ask is None:
                raise RuntimeError(
                    f"step {step.title} asks the {', '.join(step.roles())}, and nobody is there to answer"
                )
            asked = ask(step, before, fitted)
        else:
            asked = Asked([answered(step.ask(row, fitted), _nobody) for row in before])
        records = step.apply(before, scorer, asked.found)
        table.rows = Spool(
            replace(row, records=[_completed(r, row.label, asked.model, checker, step.scripts()) for r in own])
            for row, own in zip(before, records, strict=True)
        )
        counted = _changes(before, table.rows)
        counts = _by_class(before), _by_class(table.rows)
        lost = [name for name in counts[0] if not counts[1][name]]
        if lost and not allow_empty_classes:
            raise UserError(
                f"step {number} {step.title}: expected each class to keep a caption, but {some(lost)} would lose the last one. "
                "Choose a lower threshold, keep instead of above, or type --allow_empty_classes true. Nothing was written."
            )
        unscored = _unscored(step, before if step.reads() else table.rows)
        totals = counts[0].total(), counts[1].total()
        told = step.told(before, asked.found)
        told = replace(told, details=[*told.details, *asked.rejected])
        if asked.figures.get("questions") == 0:
            told = replace(told, notes=[*told.notes, "No image has what it asks about, so nothing was asked."])
        if step.scripts() and (ratio := _tokens_per_word(before, table.rows)) > SHREDDED:
            note = f"A word of the new texts has {ratio:.1f} tokens on average: the model that will be trained hardly knows the language."
            told = replace(told, notes=[*told.notes, note])
        applied.append(AppliedStep(step, *totals, unscored, *counted, asked.figures, told))
    return applied


def _tokens_per_word(before: Sequence[Row], after: Sequence[Row]) -> float:
    """Mean number of tokens of a word of the texts that are new; 0 if there is none."""
    words = tokens = 0
    for old, new in zip(before, after, strict=True):
        for record in new.records[len(old.records) :]:
            if record["status"] in ACCEPTED and record["clip_tokens"]:
                words, tokens = words + len(record["text"].split()), tokens + record["clip_tokens"] - 2
    return tokens / words if words else 0.0


def _rounded(value: Any) -> Any:
    """Numbers to four digits after the point, for people."""
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


def _nobody(ask: Ask) -> None:
    raise RuntimeError(f"a question to the {ask.role}, whom the step does not name among its roles")


def _completed(
    record: dict, label: int, model: str | None, checker: CaptionChecker | None, scripts: Sequence[str]
) -> dict:
    """A record with its author and the verdict of the checks, if its text is new."""
    if "model" not in record:  # a new text, which may have been refused
        record = {**record, "model": model}
    if not record.get("step") or record["status"] not in ACCEPTED or record.get("clip_tokens") is not None:
        return record
    if model and not record.get("model"):
        record = {**record, "model": model}
    if checker is None:
        return record
    checked = checker.check(record["text"], "stop", label, last_try=True, scripts=scripts)
    verdict = {
        "checks": list(dict.fromkeys([*(record["checks"] or ()), *checked.checks])),
        "clip_tokens": checked.clip_tokens,
        "mentions_label": checked.mentions_label,
    }
    return {**record, **verdict, "status": checked.status, "text": checked.text or record["text"]}


def _changes(before: Sequence[Row], after: Sequence[Row]) -> tuple[Counter, Counter, int]:
    """Captions that were dropped and replaced by class, each text of an image once, and the number of new texts."""
    dropped, replaced, written = Counter(), Counter(), 0
    for old, new in zip(before, after, strict=True):
        was, now = set(captions_from(old.records)), set(captions_from(new.records))
        swapped = {record["text"] for record in new.records if record["status"] == REPLACED}
        dropped[old.class_name] += len(was - now - swapped)
        replaced[old.class_name] += len((was - now) & swapped)
        written += len(now - was)
    return +dropped, +replaced, written


def _unscored(step: Step, rows: Sequence[Row]) -> int:
    """Number of captions without any of the scores that a step reads or writes; 0 for a step without scores."""
    names = {*step.writes(), *step.reads()}
    return sum(
        names.isdisjoint(score["name"] for score in row.records[k].get("scores") or ())
        for row in (rows if names else ())
        for k in row.captions()
    )


def _by_class(rows: Sequence[Row]) -> Counter:
    """Number of captions by class, each text of an image once."""
    found: Counter = Counter()
    for row in rows:
        if count := len(captions_from(row.records)):
            found[row.class_name] += count
    return found
