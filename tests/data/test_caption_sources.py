"""`--text_mix`: which texts are drawn how often, and that no other draw moves."""

import numpy as np
import pytest
from datasets import List, Value
from tiny_clip import colour_dataset

from mmft_hf.core.errors import UserError
from mmft_hf.data.caption_sources import SOURCES, parse_mix, with_caption_sources
from mmft_hf.data.views import TextView


def test_words_and_mappings_are_one_mix():
    words = ["short=0.5", "template=.2", "dense=0"]
    assert list(parse_mix(words).items()) == [("template", 0.2), ("short", 0.5)]
    assert parse_mix({"short": 0.5, "template": 0.2}) == parse_mix(words)
    assert parse_mix(["captions=0.3", "a=b=0.7"]) == {"a=b": 0.7}
    assert parse_mix(['{"short": 0.5, "template": 0.2}']) == parse_mix(words)  # a mapping in a YAML file
    assert parse_mix([]) == {}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["short"], "found 'short'"),
        (["short=much"], "found 'short=much'"),
        (["short=1.1"], "found 'short=1.1'"),
        (["short=nan"], "found 'short=nan'"),
        (["=0.5"], "found '=0.5'"),
        (["{short: 0.5}"], "expected JSON"),
        (['{"short": "much"}'], "much"),
        (["a=0.1", "a=0.2"], "found 'a=0.2'"),
        (["a=0.6", "b=0.6"], "expected a sum of at most 1, found 1.2"),
        (["a=0.5", "captions=0.1"], "expected a sum of 1 with captions among them, found 0.6"),
        ([f"s{i}=0.001" for i in range(61)], "expected at most 60 sources, found 61"),
    ],
)
def test_other_mixes_are_refused(words, found):
    with pytest.raises(UserError, match=f"text_mix.*{found}"):
        parse_mix(words)


def recorded(images=2):
    """Four captions of each image: two of the aspect visual, one rewritten by the step short, one by dense; the last image has none of
    short."""
    data = colour_dataset(images)
    captions, records = [], []
    for row in range(len(data)):
        own = [(f"first {row}", "", "visual", "aa"), (f"second {row}", None, "visual", "bb")]
        own += [(f"brief {row}", "short", "visual-short", "cc")] if row < len(data) - 1 else []
        own += [(f"everything {row}", "dense", "visual-dense", "dd")]
        captions.append([text for text, *_ in own])
        failed = {"text": None, "step": "broken", "aspect": "broken", "prompt_id": "ee"}
        records.append(
            [failed] + [{"text": f"{t} ", "step": s, "aspect": a, "prompt_id": p} for t, s, a, p in own[::-1]]
        )
    data = data.remove_columns("captions").add_column("captions", captions, feature=List(Value("string")))
    return data.add_column("caption_records", records)


def test_sources_are_known_by_step_aspect_and_prompt():
    found, notes = with_caption_sources(
        recorded(), parse_mix(["template=0.1", "visual=0.1", "short=0.2", "bb=0.1", "dense=0.1"])
    )
    # In the order of the names: bb 1, dense 2, short 4, visual 8.
    assert found[SOURCES][:] == [[8, 9, 4, 2]] * 5 + [[8, 9, 2]]
    assert notes == ["1 training image of 6 with captions has none of short: the class template takes its place."]
    same, notes = with_caption_sources(recorded(), parse_mix(["template=0.1"]))
    assert SOURCES not in same.column_names and notes == []


def test_a_source_that_no_caption_has_is_refused():
    with pytest.raises(
        UserError, match=r"found 'shot'. Did you mean 'short'\? Known: aa, bb, cc, dd, dense, short, visual, "
    ):
        with_caption_sources(recorded(), {"shot": 0.5})
    with pytest.raises(UserError, match="found 'broken'"):  # it wrote nothing
        with_caption_sources(recorded(), {"broken": 0.5})
    with pytest.raises(UserError, match="expected columns captions and caption_records"):
        with_caption_sources(colour_dataset(1), {"short": 0.5})


def draws(row, place=0, epochs=3000, **settings):
    view = TextView(colour_dataset(1).features["label"].names, ("a {}.", "one {}."), seed=5, **settings)
    crop = lambda rng: tuple(rng.integers(1000, size=2))  # noqa: E731
    found = [view.draw(row, epoch, place, crop) for epoch in range(epochs)]
    assert {text for text, _, _ in found} <= set(view.possible_texts(row))
    return found


def test_draws_have_the_shares_and_no_other_draw_moves():
    data = with_caption_sources(recorded(), mix := {"template": 0.2, "short": 0.3, "visual": 0.25})[0]
    row = data[0] | {"caption_weights": [1.0, 2.0, 3.0, 4.0]}
    plain, mixed = draws(row), draws(row, mix=tuple(mix.items()))
    counts = dict.fromkeys(["template", "brief", "first", "second", "everything"], 0)
    for (before, box, _), (text, other, weight) in zip(plain, mixed, strict=True):
        assert box == other and before.split(".")[0] == text.split(".")[0]  # crop and template
        caption = text.split(". ")[1].split()[0] if ". " in text else "template"
        counts[caption] += 1
        assert weight == {"template": 1, "first": 1, "second": 2, "brief": 3, "everything": 4}[caption]
    rest = 0.25 / 4
    shares = {"template": 0.2, "brief": 0.3 + rest, "first": 0.125 + rest, "second": 0.125 + rest, "everything": rest}
    for name, share in shares.items():
        assert abs(counts[name] - 3000 * share) < 4 * np.sqrt(3000 * share * (1 - share)), counts
    kept = [before == text for (before, *_), (text, *_) in zip(plain, mixed, strict=True)]
    assert np.mean(kept) > 0.25  # what falls to all captions is the caption that it was
    lacking = draws(data[5], place=5, mix=tuple(mix.items()))
    assert np.mean([". " not in text for text, *_ in lacking]) == pytest.approx(0.5, abs=0.04)


def test_caption_dropout_is_a_mix_bit_for_bit():
    row = recorded()[0]
    assert draws(row, caption_dropout=0.3) == draws(row, mix=(("template", 0.3),)) != draws(row)
    assert draws(row, mix=()) == draws(row, caption_dropout=0.0)
