"""Texts of 50,000 characters without a blank: no pattern takes minutes."""

import signal

import pytest

from mmft_hf.captioning.ask.driver import parse_joint
from mmft_hf.captioning.judge import cleaning, wording
from mmft_hf.core.markdown import code, fenced, md
from mmft_hf.data.sentences import sentence_ends

UNITS = [
    "a",
    "a-",
    "a.b",
    "www.",
    "字",
    "é",
    "1",
    "!",
    "(",
    "<",
    "<a",
    "[",
    "[a](",
    "*",
    "*a",
    "_a",
    "**a",
    "`",
    '"',
    "“",
    "#",
    "~",
]
UNITS += [
    "</think>",
    "<think>",
    "<|a",
    "1.",
    "-\n",
    "\n",
    "\t",
    "the-",
    "not-a-",
    "@",
    "a@",
    "word-count:",
    "\u0301",
    "abcdefghij",
]
ENDS = ["", "@", ".com", " x.com", " x@y.org"]


@pytest.fixture
def alarm():
    """Ends what takes 20 seconds: a pattern with nested repetitions needs minutes, all others milliseconds."""

    def ring(*_):
        raise TimeoutError("a pattern takes minutes")

    before = signal.signal(signal.SIGALRM, ring)
    yield lambda: signal.alarm(20)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("end", ENDS)
def test_checks_and_cards(alarm, end):
    classes = wording.ClassWords(["cat", "red dog", "字"])
    for unit in UNITS:
        raw = unit * (50_000 // len(unit)) + end
        alarm()
        text = cleaning.clean_caption(raw)[0]
        sentence_ends(text), cleaning.fold(text)
        wording.contradicts(classes.mark(text, 0)[0]), wording.REFUSAL.match(text), wording.is_foreign(text)
        found = wording.has_url(text)
        assert found or not (end.startswith(" x") and end in text)
        wording.has_loop(wording.words_of(text))
        assert len(md(raw)) < 1500 and len(code(raw)) < 200 and fenced(raw)


def test_an_answer_in_json(alarm):
    for gap in ("\n" * 50_000, " " * 50_000, "\t" * 50_000):
        alarm()
        assert parse_joint(f"```json{gap}{{}}x{gap}y", ("visual",)) is None
        assert parse_joint(f'```json{gap}{{"visual": "red"}}{gap}```', ("visual",)) == {"visual": "red"}
