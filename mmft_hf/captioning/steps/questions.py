"""`questions`: how many questions about an image a reader can answer from its caption alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...core.errors import UserError
from ..judge.wording import ClassWords
from .asking import Ask, Asking, quoted
from .base import Embeddings, Row, Step, Told, place_of, scored_texts
from .claims import UNANSWERED

ORDERS, ENOUGH = 3, 2  # orders of the options in which a question is asked, and how many of the answers must agree


@dataclass(frozen=True)
class Question:
    """A question with its options; `right`: the index of the one that the bank calls right, if it does."""

    text: str
    options: tuple[str, ...]
    right: int | None = None


@dataclass(frozen=True)
class Fitted:
    """What `Questions.fit` takes from all rows: class names, and the image that stands for each class, by label."""

    words: ClassWords
    first: Mapping[int, str]


@dataclass
class Quiz:
    """Questions about an image that are kept, the index of the right option of each, and the answers by caption."""

    questions: list[Question]
    right: list[int]
    left_out: Counter
    answers: dict[str, list[int | None]]


@dataclass(frozen=True)
class Questions(Step):
    """Asks questions with options about the image, and a reader who sees only the caption. Writes `utility`.

    `utility` is (a − 1/m) / (1 − 1/m), where a is the share of right answers and m the number of options: 1 if the caption
    answers all questions, 0 for guessing. Questions are left out that name a class, that the judge does not answer alike with
    the picture in 2 of 3 orders of the options, and that the reader answers without a caption.

    Args:
        per: `image`: the judge writes questions about each image. `class`: about the first image of each class; their answers
            are found by the judge for each image.
        number: of questions; `options`: of options of each one.
        bank (*optional*): questions with their options, for all images: nobody writes any.
    """

    per: str = "image"
    number: int = 5
    options: int = 4
    bank: dict[str, tuple[str, ...]] | None = None

    name: ClassVar[str] = "questions"
    about: ClassVar[str] = "counts the questions about an image that its caption answers"
    after: ClassVar[str] = "CapRL (arXiv 2509.22647): questions answered from the caption alone"
    differs: ClassVar[str] = (
        "Captions are only scored: no captioner is trained on the reward. The filter of questions is our own. Scores are corrected "
        "for guessing."
    )

    def __post_init__(self):
        if self.per not in ("image", "class"):
            raise UserError(f"step questions, per: expected image or class, found {self.per!r}.")
        for name, least, most in (("number", 1, 20), ("options", 2, 26)):
            if not least <= (value := getattr(self, name)) <= most:
                raise UserError(f"step questions, {name}: expected {least} to {most}, found {value}.")
        for text, options in (self.bank or {}).items():
            if len(set(options)) < 2 or len(options) > 26:
                raise UserError(
                    f"step questions, bank: expected 2 to 26 different options for each question, found {len(set(options))} for "
                    f"{text!r}."
                )
        if self.bank is not None and not self.bank:
            raise UserError("step questions, bank: expected questions, found none.")

    def writes(self) -> tuple[str, ...]:
        return ("utility",)

    def roles(self) -> tuple[str, ...]:
        return ("judge", "writer")

    def bound(self, row: Row, fitted: Any) -> Counter:
        captions, number = len(row.texts()), len(self.bank or ()) or self.number
        if not captions or row.image_sha256 is None:
            return Counter()
        return Counter(judge=(not self.bank) + ORDERS * number, writer=(ORDERS + captions) * number)

    def fit(self, rows: Sequence[Row], scorer: Embeddings | None) -> Fitted:
        first: dict[int, str] = {}
        for row in rows:
            if row.image_sha256 is not None and row.captions():
                first[row.label] = min(row.image_sha256, first.get(row.label, row.image_sha256))
        return Fitted(ClassWords(sorted({row.class_name for row in rows})), first)

    def ask(self, row: Row, fitted: Fitted) -> Asking:
        texts = row.texts()
        if row.image_sha256 is None or not texts:
            return None
        bank = yield from self._bank(row, fitted)
        if bank is None:
            return None
        quiz = Quiz([], [], Counter(), {})
        named = [any(fitted.words.mark(text, 0)[1:]) for text in (f"{q.text} {' | '.join(q.options)}" for q in bank)]
        quiz.left_out["names a class"] = sum(named)
        bank = [question for question, is_named in zip(bank, named, strict=True) if not is_named]
        if bank:
            yield from self._keep(row, bank, quiz)
        if quiz.questions:
            asks = [_reading(question, text) for text in texts for question in quiz.questions]
            answers = iter((yield asks))
            quiz.answers = {text: [next(answers) for _ in quiz.questions] for text in texts}
        return quiz

    def _bank(self, row: Row, fitted: Fitted) -> Iterator:
        """The questions about a row; None if there is no answer."""
        if self.bank:
            return [Question(text, tuple(options)) for text, options in self.bank.items()]
        shown = row if self.per == "image" else Row(fitted.first[row.label], row.label, "", "", ())
        about = "this image" if self.per == "image" else "images of the kind of this one"
        aim = (
            "whose answer can be seen"
            if self.per == "image"
            else "whose answers can be seen and differ from image to image"
        )
        prompt = (
            f"Write {self.number} questions about {about}, {aim}: colours, shapes, parts, numbers, places, background. Give each one "
            f"{self.options} short options, of which one is right{' and comes first' if self.per == 'image' else ''}. Name nothing by "
            "its kind or species. Write each question as an object with two keys. question: its text. options: the list of its "
            "options."
        )
        [answer] = yield [Ask("judge", prompt, shown.picture(), "json:questions")]
        return read_bank(answer, self.number, self.options, 0 if self.per == "image" else None)

    def _keep(self, row: Row, bank: Sequence[Question], quiz: Quiz) -> Iterator:
        """Adds the questions that can be answered with the picture, and not without it."""
        orders = range(ORDERS)
        seen = [
            _choice("judge", "Answer this question about the image.", q, row.picture(), k) for q in bank for k in orders
        ]
        blind = [
            _choice("writer", "Guess the answer to this question about an image.", q, (), k)
            for q in bank
            for k in orders
        ]
        answers = yield [*seen, *blind]
        for k, question in enumerate(bank):
            with_picture = _agreed(answers[k * ORDERS : (k + 1) * ORDERS])
            start = len(seen) + k * ORDERS
            if with_picture is None or question.right not in (None, with_picture):
                quiz.left_out["not answered alike with the picture"] += 1
            elif _agreed(answers[start : start + ORDERS]) == with_picture:
                quiz.left_out["answered without a caption"] += 1
            else:
                quiz.questions.append(question)
                quiz.right.append(with_picture)

    def apply(
        self, rows: Sequence[Row], scorer: Embeddings | None = None, found: Sequence[Quiz | None] = ()
    ) -> list[list[dict]]:
        scores = [
            {text: {"utility": utility(answers, quiz)} for text, answers in quiz.answers.items()} if quiz else None
            for quiz in found
        ]
        return scored_texts(rows, scores)

    def told(self, rows: Sequence[Row], found: Sequence[Quiz | None]) -> Told:
        every = [quiz for quiz in found if quiz]
        answers = [answer for quiz in every for own in quiz.answers.values() for answer in own]
        figures = {
            "images": len(every),
            "images_without_questions": sum(not quiz.questions for quiz in every),
            "questions": sum(len(quiz.questions) for quiz in every),
            **{f"left out: {why}": n for why, n in sum((quiz.left_out for quiz in every), Counter()).items()},
            UNANSWERED: sum(answer is None for answer in answers),
        }
        details = [
            {
                "image_sha256": row.image_sha256,
                "record": place_of(row.records[k]),
                "kind": "question",
                "text": question.text,
                "verdict": UNANSWERED if answer is None else "right" if answer == right else "wrong",
                "votes": [] if answer is None else [question.options[answer]],
            }
            for row, quiz in zip(rows, found, strict=True)
            if quiz and quiz.questions
            for k in row.captions()
            for question, right, answer in zip(
                quiz.questions, quiz.right, quiz.answers[row.records[k]["text"]], strict=True
            )
        ]
        return Told(figures, details)


def utility(answers: Sequence[int | None], quiz: Quiz) -> float | None:
    """Right answers beyond those of guessing: 1 all right, 0 as by chance. None if nothing was answered."""
    known = [
        (answer == right, 1 / len(question.options))
        for answer, right, question in zip(answers, quiz.right, quiz.questions, strict=True)
        if answer is not None
    ]
    if not known:
        return None
    share, chance = (sum(column) / len(known) for column in zip(*known, strict=True))
    return (share - chance) / (1 - chance)


def read_bank(answer: Mapping[str, Any] | None, number: int, options: int, right: int | None) -> list[Question] | None:
    """The questions of an answer, at most `number`; None if it has another form. Questions with other options are left out."""
    found = (answer or {}).get("questions")
    if not isinstance(found, list):
        return None
    bank = []
    for one in found[:number]:
        if (
            not isinstance(one, dict)
            or not isinstance(one.get("question"), str)
            or not isinstance(one.get("options"), list)
        ):
            return None
        own = tuple(option.strip() for option in one["options"] if isinstance(option, str))
        if len(one["options"]) == options and len({option.casefold() for option in own} - {""}) == options:
            bank.append(Question(one["question"].strip(), own, right))
    return bank


def _choice(role: str, task: str, question: Question, pictures: tuple, order: int = 0, caption: str = "") -> Ask:
    prompt = f"{task}\nQuestion: {quoted(question.text)}{caption}"
    return Ask(role, prompt, pictures, "choice", options=tuple(map(quoted, question.options)), sample=order)


def _reading(question: Question, caption: str) -> Ask:
    task = "Answer this question about an image from its caption alone. Guess if the caption does not say it."
    return _choice("writer", task, question, (), caption=f"\nCaption: {quoted(caption)}")


def _agreed(answers: Sequence[int | None]) -> int | None:
    """The option that enough of the answers agree on."""
    [(option, count)] = Counter(answers).most_common(1)
    return option if option is not None and count >= ENOUGH else None
