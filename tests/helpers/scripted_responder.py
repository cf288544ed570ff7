"""A model whose answers follow from a table: which names are true of which image."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence

from mmft_hf.captioning.steps.asking import Ask, parsed, rendered

STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


class ScriptedResponder:
    """Answers questions by the names that are true of the image, and makes mistakes at a given rate.

    `responder(ask)` is the parsed answer, for `asking.answered`; `reply` the text of it, for a server. Which statement, caption or
    column a prompt is about is told by the JSON strings in it; in which form to answer, by its last line.

        yes, no or unsure   yes if all names of the last string are true, no if one is not, unsure without a name
        whole number        `0-2`: which of the last two strings names more that is true, 0 if equal; other ranges: the share
                            of the names of the last string that are true
        letter              the option with most true names, or without a picture the first one that the last string contains;
                            the first one shown if there is none
        keys `claims`       one entity for each name of the last string
        keys 1, 2, …        a yes or no for each string; without a picture: whether the first string contains the names of it
        other keys          a number from 0 to 5, as `whole number`
        list                names that are true of the image; without a picture, those of the last string
        anything else       the first string without the parts, between commas, that have a name of a later string

    Args:
        truth: the true names, by sha256 of the image.
        error: share of the answers yes and no that are turned into the other one.
        seed: of the mistakes. Equal questions get equal answers.
        names: further names, which are true of no image.

    Attributes:
        asked: the questions in order.
    """

    def __init__(
        self, truth: Mapping[str, Iterable[str]], error: float = 0.0, seed: int = 0, names: Iterable[str] = ()
    ):
        self.truth = {image: set(own) for image, own in truth.items()}
        self.error, self.seed = error, seed
        known = sorted(set(names).union(*self.truth.values()), key=lambda name: (-len(name), name))
        self._name = re.compile(rf"\b(?:{'|'.join(map(re.escape, known))})\b") if known else None
        self.asked: list[Ask] = []

    def __call__(self, ask: Ask):
        self.asked.append(ask)
        return parsed(ask, self.reply(rendered(ask), [view.image_sha256 for view in ask.pictures], ask.sample))

    def names_in(self, text: str) -> list[str]:
        """The names in a text, each once, in order."""
        return list(dict.fromkeys(self._name.findall(text))) if self._name else []

    def reply(self, prompt: str, pictures: Sequence[str] = (), sample: int = 0) -> str:
        """The answer to a rendered prompt. `pictures`: the sha256 of the images that are shown, of which the first counts."""
        *lines, last = prompt.split("\n")
        form = last if last.startswith("Answer with") else ""
        lines += [] if form else [last]
        options = [found.groups() for line in lines if (found := re.fullmatch(r"([A-Z])\. (.*)", line))]
        said = [line for line in lines if not re.fullmatch(r"[A-Z]\. .*", line)]
        strings = [json.loads(found) for found in STRING.findall("\n".join(said))]
        true = self.truth.get(pictures[0], set()) if pictures else None
        asked = (prompt, tuple(pictures), sample)
        if form.startswith("Answer with one word: yes"):
            return self._verdict(strings[-1], true, strings[0], asked)
        if form.startswith("Answer with one whole number"):
            low, high = map(int, re.findall(r"\d+", form))
            return str(self._number(strings, true or set(), low, high))
        if form.startswith("Answer with the letter"):
            return self._letter(options, strings, true)
        if form.startswith("Answer with one JSON object"):
            keys = [json.loads(found) for found in STRING.findall(form)]
            return json.dumps(self._object(keys, strings, true, asked))
        if form.startswith("Answer with one JSON list"):
            return json.dumps(sorted(true) if pictures else self.names_in(strings[-1]))
        return self._without(strings[0], strings[1:])

    def _verdict(self, statement: str, true: set[str] | None, caption: str, asked: tuple) -> str:
        names = self.names_in(statement)
        if not names:
            return "unsure"
        right = set(names) <= (set(self.names_in(caption)) if true is None else true)
        number = int(hashlib.sha256(repr((self.seed, statement, asked)).encode()).hexdigest()[:8], 16)
        return "yes" if right != (number < self.error * 16**8) else "no"

    def _number(self, strings: Sequence[str], true: set[str], low: int, high: int) -> int:
        if (low, high) == (0, 2):
            first, second = (len(true.intersection(self.names_in(text))) for text in strings[-2:])
            return (first > second) + 2 * (second > first)
        names = self.names_in(strings[-1])
        return low + round((high - low) * len(true.intersection(names)) / len(names)) if names else low

    def _letter(self, options: Sequence[tuple[str, str]], strings: Sequence[str], true: set[str] | None) -> str:
        if true is None:
            said = strings[-1] if strings else ""
            fitting = [letter for letter, text in options if text.strip('"') in said]
            return fitting[0] if fitting else options[0][0]
        return max(options, key=lambda option: len(true.intersection(self.names_in(option[1]))))[0]

    def _object(self, keys: Sequence[str], strings: Sequence[str], true: set[str] | None, asked: tuple) -> dict:
        if keys == ["claims"]:
            return {"claims": [{"claim": name, "kind": "entity", "of": []} for name in self.names_in(strings[-1])]}
        if keys[0].isdecimal():
            statements = strings[-len(keys) :]
            return {k: self._verdict(one, true, strings[0], asked) for k, one in zip(keys, statements, strict=True)}
        return dict.fromkeys(keys, self._number(strings[-1:], true or set(), 0, 5))

    def _without(self, text: str, others: Sequence[str]) -> str:
        wrong = {name for other in others for name in self.names_in(other)}
        parts = [part for part in text.split(", ") if not wrong.intersection(self.names_in(part))]
        return ", ".join(parts) or text
