"""`rewrite`: a writer or captioner writes new captions, as a preset says."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...core.console import many
from ...core.errors import UserError, nearest
from ...core.functions import named_function, source_digest
from ...core.reading import read_yaml
from ..ask.pictures import OUTLINE_NAME
from ..experts import is_expert
from ..judge.checks import duplicate_key
from ..types import DROPPED
from .asking import Ask, Asking, View, quoted
from .base import ByRow, Embeddings, Row, Step, Told, readable, removed, score_of, text_of, written
from .confused import questions_of_confusions
from .languages import LANGUAGES
from .presets import Preset, filled, read_preset
from .seen import Seen, failed_texts, look, part_embeddings, views_of

OPTIONS = {  # the options that fill slots, and the slots
    "column": ("column",),
    "hints": ("hints",),
    "language": ("language",),
    "words": ("words",),
    "question": ("question",),
    "questions": ("question",),
    "confused": ("question",),
}
PLACES = {
    "quadrant:0": "its upper left quarter",
    "quadrant:1": "its upper right quarter",
    "quadrant:2": "its lower left quarter",
    "quadrant:3": "its lower right quarter",
    "centre": "its centre",
}
NEW = -1  # in place of the position of a caption
TOKENS_PER_WORD = 1.3  # of English in the tokenizer of CLIP
_NOTHING = re.compile(r"\W*(not visible|not applicable|n/?a|none|unknown)\W*", re.IGNORECASE)
_OUTLINE = re.compile(rf"\b({OUTLINE_NAME}|outlin\w+|bounding box)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """A question, and what is known of the text that answers it.

    Args:
        ask: the question.
        parents: positions of the captions that it holds.
        aspect, sample: of the new caption; None: those of the first parent.
        view: the part of the image that is shown; `refs`: sha256 of other images that take part.
        singles: the question for each field, if the fields cannot be had at once.
    """

    ask: Ask
    parents: tuple[int, ...] = ()
    aspect: str | None = None
    sample: int | None = None
    view: str | None = None
    refs: tuple[str, ...] = ()
    singles: Mapping[str, Ask] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """A text that was written. `checks`: what is wrong with it; `refused`: whether it must not be a caption."""

    text: str
    question: Question
    aspect: str | None = None
    checks: tuple[str, ...] = ()
    refused: bool = False


@dataclass(frozen=True)
class Rewrite(Step):
    """Writes new captions with a preset. A question that is not answered leaves the captions as they are.

    Args:
        preset: name of a preset, or a YAML file of your own.
        rank_by: score by which captions are ordered, the best one first. Those without it come last.
        top_k: number of the best captions that are used.
        column: column of the dataset for `{column}`. Images without a text there are left as they are.
        hints: columns of the dataset for `{hints}`, or functions `package.module:function`, which are called with each picture and return a
            text, a list of texts or None. Images without any value are left as they are.
        regions_column: column of the dataset with boxes `[x0, y0, x1, y1]` in pixels of the stored image, upright. Without it, the
            regions of an image are its quarters and its centre.
        language: code of the language to write in.
        words: number of words for `{words}`.
        question: text for `{question}`; `questions`: YAML file with a list of them, or with a list for each class; `confused`: the
            `report.json` of `mmft-hf evaluate` on validation: what tells a class from those that it is confused with most.
        neighbours: number of classes of which the most similar image is shown.
        keep_if_worse: `parents`: a new text stays out that fits the image less than each of those that it was made from.
    """

    preset: str = ""
    rank_by: str | None = None
    top_k: int | None = None
    column: str | None = None
    hints: tuple[str, ...] = ()
    regions_column: str | None = None
    language: str | None = None
    words: int | None = None
    question: str | None = None
    questions: str | None = None
    confused: str | None = None
    neighbours: int = 1
    keep_if_worse: str | None = None

    name: ClassVar[str] = "rewrite"

    def __post_init__(self):
        if not self.preset:
            raise UserError("step rewrite, preset: expected the name of a preset, such as rank_and_fuse, found none.")
        preset = read_preset(self.preset)
        object.__setattr__(self, "hints", (self.hints,) if isinstance(self.hints, str) else tuple(self.hints))
        object.__setattr__(self, "_preset", preset)
        self._check_options(preset)
        object.__setattr__(self, "_questions", self._read_questions())

    def _check_options(self, preset: Preset) -> None:
        where, slots = f"step rewrite, preset {preset.name}", preset.slots()
        given = [name for name in OPTIONS if getattr(self, name)]
        for name in given:
            if slots.isdisjoint(OPTIONS[name]):
                raise UserError(
                    f"{where}: expected no option {name}, for which it has no slot, found it. Leave it out."
                )
        values = {slot for name in given for slot in OPTIONS[name]} | ({"words"} if preset.words else set())
        if missing := sorted({slot for own in OPTIONS.values() for slot in own} & slots - values):
            example = {"words": "15", "language": "de", "hints": "[COLUMN]", "question": "TEXT"}.get(
                missing[0], "COLUMN"
            )
            raise UserError(
                f"{where}: expected a value for its slot {{{missing[0]}}}, found none. Write the option {missing[0]}: {example}."
            )
        asked = [name for name in ("question", "questions", "confused") if getattr(self, name)]
        if len(asked) > 1:
            raise UserError(
                f"{where}: expected question, questions or confused, found {' and '.join(asked)}. Give one of them."
            )
        for name in filter(is_expert, self.hints):
            named_function(name, f"{where}, hints")
        if self.language and self.language not in LANGUAGES:
            raise UserError(
                f"{where}, language: expected one of {', '.join(LANGUAGES)}, found {self.language!r}."
                f"{nearest(self.language, LANGUAGES)}"
            )
        for name, least in (("top_k", 1), ("words", 1), ("neighbours", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise UserError(f"{where}, {name}: expected {least} or more, found {getattr(self, name)}.")
        if (self.top_k is None) != (self.rank_by is None) and preset.captions == "each":
            raise UserError(f"{where}: expected rank_by and top_k together, found one of them.")
        if self.top_k and not self.rank_by:
            raise UserError(
                f"{where}, top_k: expected the score to order by, found none. Write the option rank_by: clip."
            )
        if self.top_k is not None and self.top_k < preset.least:
            raise UserError(f"{where}, top_k: expected {preset.least} or more, found {self.top_k}.")
        if self.rank_by and preset.captions not in ("each", "together"):
            raise UserError(
                f"{where}: expected no option rank_by, since it takes no captions in an order. Leave it out."
            )
        if self.keep_if_worse not in (None, "parents"):
            raise UserError(f"{where}, keep_if_worse: expected parents, found {self.keep_if_worse!r}.")
        if self.keep_if_worse and not preset.replaces:
            raise UserError(f"{where}: expected no option keep_if_worse, since the captions stay anyway. Leave it out.")
        regions = {"region", "marked"} & {*preset.pictures} and "rival" not in preset.pictures
        if self.regions_column and not regions:
            raise UserError(f"{where}: expected no option regions_column, since it shows no regions. Leave it out.")
        if "marked" in preset.pictures and not self.regions_column:
            raise UserError(
                f"{where}: expected the column of boxes, found none. Write the option regions_column: COLUMN."
            )
        if self.neighbours > 1 and "neighbour" not in preset.pictures:
            raise UserError(f"{where}: expected no option neighbours, since it shows none. Leave it out.")

    def _read_questions(self) -> dict[str | None, list[str]]:
        """The questions of each class, or of all (None)."""
        if self.question:
            return {None: [self.question]}
        if self.confused:
            return questions_of_confusions(self.confused, "step rewrite, confused")
        if not self.questions:
            return {None: [""]}
        where = f"step rewrite, questions {self.questions}"
        try:
            found = read_yaml(Path(self.questions))
        except FileNotFoundError:
            raise UserError(f"{where}: expected a YAML file, found no such file.") from None
        if not isinstance(found, dict):
            found = {None: found}
        found = {key: [own] if isinstance(own, str) else own for key, own in found.items()}
        for key, own in found.items():
            texts = isinstance(own, list) and own and all(isinstance(one, str) and one.strip() for one in own)
            if not texts or not isinstance(key, str | None):
                raise UserError(
                    f"{where}: expected a list of questions, or one for each class name, found {own if key is None else key!r}."
                )
        return found or {}

    # -- what it is -----------------------------------------------------------------------------------------------------
    @property
    def title(self) -> str:
        return self._preset.name

    def typed_options(self) -> dict:
        return {
            key: value for key, value in super().typed_options().items() if value != self.title and key != "experts"
        }

    @property
    def about(self) -> str:
        return self._preset.about

    @property
    def after(self) -> str:
        return self._preset.after

    @property
    def differs(self) -> str:
        return self._preset.differs

    @property
    def sees_label(self) -> bool:
        return self._preset.sees_label() or self.confused is not None

    def spec(self) -> dict:
        questions = json.dumps(sorted(self._questions.items(), key=repr), ensure_ascii=False)
        content = hashlib.sha256(f"{self._preset.digest()} {questions}".encode()).hexdigest()[:16]
        experts = {name: source_digest(named_function(name, "hints")) for name in self.hints if is_expert(name)}
        return super().spec() | {"version": f"{self.version} {content}"} | ({"experts": experts} if experts else {})

    def roles(self) -> tuple[str, ...]:
        return (self._preset.role,) + (("judge",) if self._preset.check else ())

    def columns(self) -> tuple[str, ...]:
        return tuple(name for name in (self.column, *self.hints, self.regions_column) if name)

    def needs(self) -> Mapping[str, Sequence[str]]:
        several = ("pictures",) if len(self._preset.pictures) > 1 else ()
        return {self._preset.role: ("text",) if self._preset.role == "writer" else several}

    def scripts(self) -> tuple[str, ...]:
        return LANGUAGES[self.language][1] if self.language else ()

    def cautions(self, token_limit: int | None) -> list[str]:
        words = self.words or self._preset.words or 0
        if self._preset.joined:
            words *= len(self._preset.fields)
        tokens = round(TOKENS_PER_WORD * words)
        if token_limit is None or tokens <= token_limit:
            return []
        return [
            f"{self._preset.name} writes about {words} words, some {tokens} tokens, and the model that will be trained reads "
            f"{token_limit}. Choose fewer words, or another --model_name_or_path."
        ]

    def reads(self) -> tuple[str, ...]:
        return (self.rank_by,) if self.rank_by else ()

    def needs_scorer(self) -> bool:
        preset = self._preset
        looks = "neighbour" in preset.pictures or preset.captions == "sentences" or preset.apart
        return looks or self.keep_if_worse is not None

    # -- what it asks ---------------------------------------------------------------------------------------------------
    def fit(self, rows: Sequence[Row], scorer: Embeddings | None) -> Seen:
        preset = self._preset
        return look(
            rows,
            scorer,
            neighbours=self.neighbours if "neighbour" in preset.pictures else 0,
            others="others" in preset.slots(),
            partners=preset.partner,
            sentences=preset.captions == "sentences",
            rivals=preset.captions == "failed",
        )

    def bound(self, row: Row, fitted: Seen) -> Counter:
        questions, preset = self.asked(row, fitted), self._preset
        again = preset.exact_words or "marked" in preset.pictures
        found = Counter({preset.role: sum((1 + again) * (1 + len(question.singles)) for question in questions)})
        return found + Counter({"judge": 2 * len(questions)} if preset.check else {})

    def ask(self, row: Row, fitted: Seen) -> Asking:
        questions, preset = self.asked(row, fitted), self._preset
        if not questions:
            return []
        answers = yield [question.ask for question in questions]
        if preset.fields:
            return (yield from self._by_field(questions, answers))
        texts = [Written(a, q) for q, a in zip(questions, answers, strict=True) if a]
        texts = yield from self._asked_again(texts)
        if preset.check:
            texts = yield from self._compared(texts)
        return texts

    def asked(self, row: Row, seen: Seen) -> list[Question]:
        """The questions of the first round."""
        preset, captions = self._preset, row.captions()
        if preset.role == "captioner" and not row.image_sha256:
            return []
        data = self._columns_of(row)
        if data is None:
            return []
        same = data | {"words": str(self.words or preset.words or ""), "fields": ", ".join(preset.fields)}
        same |= {"class_name": quoted(row.class_name), "language": LANGUAGES[self.language][0] if self.language else ""}
        same["others"] = _listed(seen.others.get((row.image_sha256, row.label), ()))
        found = []
        for question in self._questions.get(row.class_name, self._questions.get(None, ())):
            for parents, shown in self._groups(row, captions, seen):
                for pictures, place, refs, view in self._pictures(row, seen, parents):
                    values = same | {"question": question, "captions": shown} | place
                    if preset.partner:
                        partner = seen.partners.get(row.image_sha256)
                        if not partner:
                            continue
                        values["captions"] = _listed([row.records[parents[0]]["text"], partner[1]])
                        refs = (partner[0],)
                    ask = self._question(row, preset.prompt, pictures, values)
                    singles = {
                        name: replace(self._question(row, preset.single, pictures, values | {"field": name}))
                        for name in preset.fields
                    }
                    if preset.fields:
                        ask = replace(ask, answer=f"json:{','.join(preset.fields)}", class_name=None)
                    found.append(Question(ask, parents, view=view, refs=refs, singles=singles))
        if not preset.replaces:
            aspect = f"{preset.name}-{self.words}" if preset.exact_words else preset.name
            found = [replace(question, aspect=aspect, sample=i) for i, question in enumerate(found)]
        return found

    def _question(self, row: Row, prompt: str, pictures: tuple[View, ...], values: Mapping[str, str]) -> Ask:
        own = {"answer": "caption", "class_name": row.class_name, "scripts": self.scripts()}
        return Ask(self._preset.role, filled(prompt, values), pictures, **own)

    def _columns_of(self, row: Row) -> dict[str, str] | None:
        """What the columns of a row put into slots; None: nothing, so that nothing is asked."""
        found = {}
        if self.column:
            if not (text := text_of(row.columns.get(self.column))):
                return None
            found["column"] = quoted(text)
        if self.hints:
            hints = {name: text for name in self.hints if (text := text_of(row.columns.get(name)))}
            if not hints:
                return None
            found["hints"] = "{" + ", ".join(f"{quoted(name)}: {quoted(text)}" for name, text in hints.items()) + "}"
        return found

    def _groups(self, row: Row, captions: Sequence[int], seen: Seen) -> Iterable[tuple[tuple[int, ...], str]]:
        """Positions of the captions of each question, and how it shows them."""
        preset = self._preset
        if preset.captions == "none":
            return [((), "")]
        if preset.captions == "failed":
            return [((k,), quoted(row.records[k]["text"])) for k in failed_texts(row)]
        if preset.captions == "sentences":
            sentences = seen.sentences.get((row.image_sha256, row.label), ())
            if len(sentences) < preset.least:
                return []
            rows = (f"[{quoted(s.place)}, {s.score:.3f}, {quoted(s.text)}]" for s in sentences)
            return [(tuple(captions), "[" + ",\n".join(rows) + "]")]
        if self.rank_by:
            captions = sorted(captions, key=lambda k: _rank(row.records[k], self.rank_by))
        # A text that an image has twice is one caption, and goes with all of its records.
        chosen = list(dict.fromkeys(row.records[k]["text"] for k in captions))[: self.top_k]
        captions = [k for text in chosen for k in captions if row.records[k]["text"] == text]
        if preset.captions == "each":
            return [((k,), quoted(row.records[k]["text"])) for k in captions]
        if len(chosen) < preset.least:
            return []
        return [(tuple(captions), _listed(chosen))]

    def _pictures(
        self, row: Row, seen: Seen, parents: Sequence[int]
    ) -> Iterable[tuple[tuple[View, ...], dict, tuple[str, ...], str | None]]:
        """For each question: its pictures, values of slots, sha256 of other images, and the view."""
        kinds = self._preset.pictures
        if not kinds:
            return [((), {}, (), None)]
        if "neighbour" in kinds:
            return [self._pair(row, *neighbour) for neighbour in seen.neighbours.get((row.image_sha256, row.label), ())]
        if not {"region", "marked"} & {*kinds}:
            return [(row.picture(), {}, (), None)]
        regions = [(what, "") for what in self._regions(row)]
        if "rival" in kinds:
            rivals = seen.rivals.get((row.image_sha256, row.label), {})
            regions = [(row.records[k]["view"], rivals[k]) for k in parents if k in rivals]
        found = []
        for what, rival in regions:
            views = {"self": "whole", "region": what, "marked": what.replace("box:", "marked:"), "rival": rival}
            pictures = tuple(View(row.image_sha256, views[kind]) for kind in kinds)
            found.append((pictures, {"region": _place(what), "rival": _place(rival)}, (), what))
        return found

    def _pair(self, row: Row, other: str, other_class: str):
        """Half of the pairs are shown the other way round: which of two pictures comes first may matter to a model."""
        second = int(hashlib.sha256(f"{row.image_sha256} {other}".encode()).hexdigest(), 16) % 2
        pictures = (View(row.image_sha256), View(other))
        order = ("first", "second")[:: -1 if second else 1]
        values = {"this": order[0], "other": order[1], "other_class": quoted(other_class)}
        return pictures[:: -1 if second else 1], values, (other,), None

    def _regions(self, row: Row) -> list[str]:
        if not self.regions_column:
            return list(PLACES)
        boxes = row.columns.get(self.regions_column) or []
        for box in boxes:
            numbers = isinstance(box, list | tuple) and len(box) == 4 and all(isinstance(x, int | float) for x in box)
            if not numbers or not (box[0] < box[2] and box[1] < box[3]):
                raise UserError(
                    f"step rewrite, regions_column {self.regions_column}: expected boxes [x0, y0, x1, y1] in pixels with x0 < x1 "
                    f"and y0 < y1, found {box!r} at the image {row.image_sha256}."
                )
        return [f"box:{','.join(f'{x:g}' for x in box)}" for box in boxes]

    # -- further rounds ---------------------------------------------------------------------------------------------------
    def _by_field(self, questions: Sequence[Question], answers: Sequence[dict | None]) -> Asking:
        """The texts of fields; those of an answer that is no JSON are asked for one by one."""
        singles = [ask for q, a in zip(questions, answers, strict=True) if a is None for ask in q.singles.values()]
        found = iter((yield singles) if singles else ())
        texts = []
        for question, answer in zip(questions, answers, strict=True):
            values = {name: next(found) for name in question.singles} if answer is None else answer
            values = {name: " ".join(str(text or "").split()) for name, text in values.items()}
            values = {n: values[n] for n in self._preset.fields if values[n] and not _NOTHING.fullmatch(values[n])}
            if self._preset.joined:
                whole = " ".join(text if text[-1] in ".!?" else f"{text}." for text in values.values())
                texts += [Written(whole, question)] if whole else []
            else:
                texts += [Written(text, question, aspect=name) for name, text in values.items()]
        return texts

    def _fault(self, text: str) -> tuple[str, str] | None:
        """What is wrong with a text, and what to add to the question."""
        wanted, words = self.words or 0, len(text.split())
        if self._preset.exact_words and abs(words - wanted) > 0.25 * wanted:
            return "length_off", f"Your last answer had {words} words. It has to have {wanted}."
        if "marked" in self._preset.pictures and _OUTLINE.search(text):
            return "speaks_of_mark", "Do not mention the line or its colour."
        return None

    def _asked_again(self, texts: list[Written]) -> Asking:
        """Asks once more where something is wrong. A text of another length is flagged then, any other fault refuses it."""
        faults = {i: fault for i, text in enumerate(texts) if (fault := self._fault(text.text))}
        if not faults:
            return texts
        asks = [texts[i].question.ask for i in faults]
        advice = (said for _, said in faults.values())
        answers = yield [replace(ask, prompt=f"{ask.prompt}\n{said}") for ask, said in zip(asks, advice, strict=True)]
        for i, answer in zip(faults, answers, strict=True):
            text = answer or texts[i].text
            fault = self._fault(text)
            checks = (fault[0],) if fault else ()
            texts[i] = replace(texts[i], text=text, checks=checks, refused=bool(fault) and fault[0] != "length_off")
        return texts

    def _compared(self, texts: list[Written]) -> Asking:
        """Refuses texts that are not true of their own image alone. What is not answered refuses nothing."""
        asks = []
        for text in texts:
            prompt = filled(self._preset.check, {"captions": quoted(text.text)})
            own = {view.image_sha256: view for view in text.question.ask.pictures}
            other = own.pop(text.question.refs[0])
            asks += [Ask("judge", prompt, (view,), "yes_no") for view in (*own.values(), other)]
        answers = (yield asks) if asks else []
        for i, text in enumerate(texts):
            here, there = answers[2 * i : 2 * i + 2]
            refused = here in ("no", "unsure") or there in ("yes", "unsure")
            checks = ("not_different",) if refused else ("unanswered",) if None in (here, there) else ()
            texts[i] = replace(text, checks=(*text.checks, *checks), refused=text.refused or refused)
        return texts

    def told(self, rows: Sequence[Row], found: Sequence[Any]) -> Told:
        """Number of texts by what was wrong with them, and how many images the columns say nothing of."""
        columns = self.columns()
        empty = sum(
            self._columns_of(row) is None or bool(self.regions_column and not self._regions(row)) for row in rows
        )
        has, it = ("has", "it") if empty == 1 else ("have", "them")
        note = f"{empty:,} of {many(len(rows), 'image')} {has} nothing in the column {' or '.join(columns)}, so nothing was asked about {it}."
        counts = Counter(check for texts in found for text in texts or () for check in text.checks)
        return Told(dict(counts), notes=[note] if columns and empty else [])

    # -- what it writes ---------------------------------------------------------------------------------------------------
    def apply(self, rows: Sequence[Row], scorer: Embeddings | None, found: Sequence[Any] = ()) -> Sequence[list[dict]]:
        worse = self._worse(rows, scorer, found) if self.keep_if_worse else {}
        margins = self._margins(rows, scorer, found) if self._preset.apart else {}
        return ByRow(rows, lambda i, row: self._records(row, found[i] or (), worse.get(i, ()), margins.get(i, {})))

    def _records(
        self, row: Row, texts: Sequence[Written], worse: Container[int], margins: Mapping[int, float]
    ) -> list[dict]:
        preset, records, new = self._preset, list(row.records), []
        present = {duplicate_key(row.records[k]["text"]): k for k in row.captions()}
        for number, text in enumerate(texts):
            parents, key = text.question.parents, duplicate_key(text.text)
            if preset.replaces and present.get(key) in parents:
                continue  # the writer has left it as it was
            checks, status = text.checks, "rejected" if text.refused else "ok"
            if not text.refused and key in present:
                checks, status = (*checks, "duplicate"), "rejected"
            elif number in worse:
                checks, status = (*checks, "worse"), DROPPED
            elif margins.get(number, 1.0) <= 0:
                checks, status = (*checks, "not_unique"), DROPPED
            elif not preset.accepted:
                status = DROPPED
            names = {"aspect": text.aspect or text.question.aspect, "sample": text.question.sample}
            names = {name: value for name, value in names.items() if value is not None}
            scores = [{"name": "region_margin", "value": margins[number]}] if number in margins else None
            more = {"view": text.question.view, "refs": list(text.question.refs) or None, "scores": scores}
            source = [row.records[k] for k in parents]
            prompt = f"{preset.name}@{preset.version}"
            new.append(
                written(row, preset.name, text.text, source, **names)
                | {"prompt_id": prompt, "status": status, "checks": list(checks), **more}
            )
            # A text that two captions have led to takes the place of both.
            if preset.replaces and (status == "ok" or present.get(key) == NEW):
                for k in parents:
                    records[k] = removed(row.records[k], preset.name)
            if status == "ok":
                present[key] = NEW
        return [*records, *new]

    def _worse(self, rows: Sequence[Row], scorer: Embeddings, found: Sequence) -> dict[int, set[int]]:
        """For each row, the numbers of the new texts that fit the image less than each of their parents."""
        images, worse = scorer.images(), {}
        for i in readable(rows, images):
            for n, text in enumerate(found[i] or ()):
                parents = [rows[i].records[k]["text"] for k in text.question.parents]
                new, *old = (scorer.texts([text.text, *parents]) @ images[i]).tolist()
                if old and new < min(old):
                    worse.setdefault(i, set()).add(n)
        return worse

    def _margins(self, rows: Sequence[Row], scorer: Embeddings, found: Sequence) -> dict[int, dict[int, float]]:
        """For each row, by how much its new texts fit their own region better than any other region that has a text."""
        margins: dict[int, dict[int, float]] = {}
        again = self._preset.captions == "failed"
        known = {i: views_of(rows[i]) if again else [] for i, own in enumerate(found) if own}
        places = {(i, text.question.view) for i in known for text in found[i]}
        parts = part_embeddings(scorer, places | {(i, view) for i, own in known.items() for view in own})
        for i, texts in enumerate(found):
            texts = {n: text for n, text in enumerate(texts or ()) if (i, text.question.view) in parts}
            views = [text.question.view for text in texts.values()]
            views = list(dict.fromkeys([*views, *(view for view in known.get(i, ()) if (i, view) in parts)]))
            if len(views) < 2:
                continue
            regions = np.stack([parts[i, view] for view in views])
            fits = dict(zip(texts, scorer.texts([text.text for text in texts.values()]) @ regions.T, strict=True))
            for n, text in texts.items():
                own = views.index(text.question.view)
                margins.setdefault(i, {})[n] = float(np.float32(fits[n][own] - np.delete(fits[n], own).max()))
        return margins


def _place(view: str) -> str:
    """Where a region is, in words."""
    return PLACES.get(view) or f"its part from x, y = {view.removeprefix('box:').replace(',', ', ')} in pixels"


def _rank(record: Mapping, score: str) -> tuple:
    value = score_of(record, score)
    better = float("inf") if value is None else value if score == "sr_rank" else -value
    return better, record["aspect"] or "", record["sample"] or 0, record["text"]


def _listed(texts: Iterable[str]) -> str:
    return "\n".join(f"{i}. {quoted(text)}" for i, text in enumerate(texts, 1))
