"""Sentences of a text, and parts of a text that are short enough for a text tower."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import pairwise

_SENTENCE_END = re.compile(r"[.!?…][\"')\]]*(?=\s+[^a-z\s]|\s*$)|[。！？][」』\"]?")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:st|mr|mrs|ms|dr|vs|approx|cf|no|fig|e\.g|i\.e|[A-Za-z])\.$", re.IGNORECASE)


def sentence_ends(text: str) -> list[int]:
    """Positions after the end of each sentence. `St. Bernard` and `3.5` do not end one."""
    return [m.end() for m in _SENTENCE_END.finditer(text) if not _ABBREVIATION.search(text[: m.start() + 1][-10:])]


def sentences_of(text: str) -> list[str]:
    """The sentences of a text."""
    ends = [0, *sentence_ends(text), len(text)]
    return [part for a, b in pairwise(ends) if (part := text[a:b].strip())]


def parts_that_fit(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Splits a text into parts that fit, each with as many whole sentences as possible.

    A line ends a sentence. A sentence that does not fit is split at words, and a word that does not fit at characters. If not
    even a character fits, the text stays whole.

    Args:
        fits: whether a part is short enough. A longer text must never fit where its beginning does not.

    Returns:
        One or more parts. They hold all the words of the text, in its order; spaces between sentences become single ones.
    """
    if fits(text) or not text:
        return [text]
    if not fits(text[:1]):
        return [text]
    sentences = [sentence for line in text.splitlines() for sentence in sentences_of(line)]
    return _packed((piece for sentence in sentences for piece in _pieces(sentence, fits)), " ", fits)


def _pieces(sentence: str, fits: Callable[[str], bool]) -> list[str]:
    """The sentence, or parts of it that fit."""
    if fits(sentence):
        return [sentence]
    words = (piece for word in sentence.split() for piece in ([word] if fits(word) else _packed(word, "", fits)))
    return _packed(words, " ", fits)


def _packed(pieces: Iterable[str], between: str, fits: Callable[[str], bool]) -> list[str]:
    """The pieces joined to as few parts as possible, in their order."""
    parts: list[str] = []
    for piece in pieces:
        if parts and fits(joined := f"{parts[-1]}{between}{piece}"):
            parts[-1] = joined
        else:
            parts.append(piece)
    return parts
