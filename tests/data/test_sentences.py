"""Texts in parts: whole sentences where they fit, words where a sentence does not, and nothing lost."""

import numpy as np
import pytest

from mmft_hf.data.sentences import parts_that_fit


def in_words(limit):
    return lambda text: len(text.split()) <= limit


def in_letters(limit):
    return lambda text: len(text) <= limit


@pytest.mark.parametrize(
    ("text", "limit", "parts"),
    [
        ("One two. Three four.", 4, ["One two. Three four."]),
        ("One two. Three four. Five six.", 4, ["One two. Three four.", "Five six."]),
        ("One two. Three four. Five six.", 3, ["One two.", "Three four.", "Five six."]),
        ("One. Two three four five. Six.", 3, ["One.", "Two three four", "five. Six."]),
        ("first line\nsecond line\n\nthird line", 2, ["first line", "second line", "third line"]),
        ("  two   blanks  stay ", 3, ["  two   blanks  stay "]),  # as it fits
        ("A St. Bernard weighs 70.5 kg. It sleeps.", 6, ["A St. Bernard weighs 70.5 kg.", "It sleeps."]),
        ("", 0, [""]),
        ("nothing fits", 0, ["nothing fits"]),
    ],
)
def test_parts_are_whole_sentences_where_they_fit(text, limit, parts):
    assert parts_that_fit(text, in_words(limit)) == parts


def test_a_word_that_does_not_fit_is_split_at_letters():
    assert parts_that_fit("ab 字字字字字 c", in_letters(3)) == ["ab", "字字字", "字字", "c"]
    assert parts_that_fit("字字。字字！字", in_letters(3)) == ["字字。", "字字！", "字"]


def test_every_word_is_in_one_part_and_no_two_neighbours_fit_together():
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = " ".join("abcdefgh"[: rng.integers(1, 9)] + rng.choice(["", "", ".", "!"]) for _ in range(30))
        limit = int(rng.integers(10, 60))
        parts = parts_that_fit(text, in_letters(limit))
        assert " ".join(parts).split() == text.split()
        assert max(map(len, parts)) <= limit
