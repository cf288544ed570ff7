"""What a step may ask of a model: the question, how it is worded, and what its answer says.

A step asks by a generator (`Step.ask`), which yields the questions of a round and is sent their answers. It waits for nothing and
stores nothing: the same questions with the same answers lead to the same result, so a run that was killed replays what it knows.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("captioner", "judge", "writer")
"""`captioner` writes with the picture, `judge` answers with the picture, `writer` works on text alone."""
LONGEST_DATA = 4_000  # characters of a caption or column within a prompt
YES, NO, UNSURE = "yes", "no", "unsure"


@dataclass(frozen=True)
class View:
    """A picture of a question: sha256 of the image, and what of it is shown.

    Args:
        what: `whole`; `quadrant:0` to `quadrant:3` (row by row); `centre`; `box:x0,y0,x1,y1` in pixels of the stored image as
            it is seen (upright), cut out; `marked:x0,y0,x1,y1`, outlined.
    """

    image_sha256: str
    what: str = "whole"


@dataclass(frozen=True)
class Ask:
    """One question. Equal questions are asked once, whichever step or row asks them.

    Args:
        role: who is asked: one of `ROLES`.
        prompt: captions and columns in it are data: see `quoted`.
        pictures: none for the writer.
        answer: `text`; `caption` (a text that has to pass the checks of captions); `yes_no`; `choice`, one of `options`;
            `score:0-5`; `json:name,name`, an object with these keys; `list`, a JSON list of texts; `log_probs`, how likely the
            model is to answer with the one text of `options`.
        options: for `choice`. They are shown in an order that depends on the question, and lead to the index in this one.
        sample: the same question again, for votes: 0, 1, ….
        class_name: for `caption`: the class whose name the checks look for. The model does not see it.
        scripts: for `caption`: those of the language that is asked for, as Unicode names them. Class names are not looked for then.
    """

    role: str
    prompt: str
    pictures: tuple[View, ...] = ()
    answer: str = "text"
    options: tuple[str, ...] = ()
    sample: int = 0
    class_name: str | None = None
    scripts: tuple[str, ...] = ()


Asking = Generator[Sequence[Ask], Sequence[Any], Any]
"""Yields the questions of a round, is sent their answers in the same order (None: unanswered), returns what `apply` gets."""


def quoted(data: str) -> str:
    """Text of a dataset or a model within a prompt: a JSON string, at most `LONGEST_DATA` characters, so that it stays data."""
    return json.dumps(data[:LONGEST_DATA], ensure_ascii=False)


def _order(ask: Ask) -> list[int]:
    """The order in which the options are shown."""
    seed = hashlib.sha256(json.dumps([ask.prompt, ask.options, ask.sample], ensure_ascii=False).encode()).hexdigest()
    order = list(range(len(ask.options)))
    random.Random(seed).shuffle(order)
    return order


def rendered(ask: Ask) -> str:
    """The whole text of a question: the prompt, and in which form to answer.

    Raises:
        ValueError: an unknown form of answer.
    """
    kind, _, form = ask.answer.partition(":")
    if kind in ("text", "caption", "log_probs"):
        return ask.prompt
    if kind == "yes_no":
        return f"{ask.prompt}\nAnswer with one word: yes, no or unsure."
    if kind == "choice":
        shown = "\n".join(f"{chr(65 + place)}. {ask.options[i]}" for place, i in enumerate(_order(ask)))
        return f"{ask.prompt}\n{shown}\nAnswer with the letter alone."
    if kind == "score":
        low, high = form.split("-")
        return f"{ask.prompt}\nAnswer with one whole number from {low} to {high}."
    if kind == "json":
        keys = ", ".join(json.dumps(name) for name in form.split(","))
        return f"{ask.prompt}\nAnswer with one JSON object with the keys {keys} and nothing else."
    if kind == "list":
        return f"{ask.prompt}\nAnswer with one JSON list of strings and nothing else."
    raise ValueError(f"an answer of the form {ask.answer!r}")


def parsed(ask: Ask, text: str) -> Any:
    """What an answer says; None if that cannot be told, which is never a "no".

    Returns:
        A text; `"yes"`, `"no"` or `"unsure"`; the index of the chosen option; a number; a dict; a list of texts; or for `log_probs` a
        list with begin and end of each token in the text, its log-probability and its logit.
    """
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).strip()
    kind, _, form = ask.answer.partition(":")
    if kind in ("text", "caption"):
        return text or None
    if kind == "log_probs":
        return _tokens(text)
    if kind in ("json", "list"):
        return _parsed_json(text, form.split(",") if form else None)
    word = text.strip(" \t\n.,:;!()*\"'`").split("\n")[0]
    if kind == "yes_no":
        found = re.match(r"(yes|no|unsure)\b", word.lower())
        return found.group(1) if found else None
    if kind == "choice":
        found = re.match(r"([A-Za-z])(?![A-Za-z])", word)
        place = ord(found.group(1).upper()) - 65 if found else -1
        return _order(ask)[place] if 0 <= place < len(ask.options) else None
    low, high = map(int, form.split("-"))
    found = re.match(r"(\d+)(?![\d.])", word)
    return int(found.group(1)) if found and low <= int(found.group(1)) <= high else None


def _tokens(text: str) -> list[tuple[float, ...]] | None:
    """A list of four numbers for each token."""
    try:
        found = [tuple(token) for token in json.loads(text)]
    except (ValueError, TypeError, RecursionError):
        return None
    return found if all(len(token) == 4 and all(isinstance(x, int | float) for x in token) for token in found) else None


def _parsed_json(text: str, keys: Sequence[str] | None) -> dict | list | None:
    """An object with exactly these keys, or a list of texts. A Markdown fence around it is removed; nothing is guessed."""
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        found = json.loads(fenced.group(1) if fenced else text)
    except (ValueError, RecursionError):
        return None
    if keys is None:
        return found if isinstance(found, list) and all(isinstance(one, str) for one in found) else None
    return found if isinstance(found, dict) and set(found) == set(keys) else None


def forced(ask: Ask) -> str | None:
    """The text whose log-probabilities are asked for; None: the model writes one."""
    return ask.options[0] if ask.answer == "log_probs" else None


def answered(asking: Asking, respond: Callable[[Ask], Any], most_rounds: int = 8) -> Any:
    """Runs one generator to its end.

    Args:
        respond: the parsed answer to a question.

    Raises:
        RuntimeError: it asks for more than `most_rounds` rounds.
    """
    try:
        asks = next(asking)
        for _ in range(most_rounds):
            asks = asking.send([respond(ask) for ask in asks])
    except StopIteration as end:
        return end.value
    raise RuntimeError(f"a step asks for more than {most_rounds} rounds")
