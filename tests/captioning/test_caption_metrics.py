"""Metrics of captions: formulas by hand, planted truths, and the embedded data with a model that knows it."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from step_rows import Vectors, auroc, row, unit, with_values

from mmft_hf.captioning.metrics.best_of import best_of
from mmft_hf.captioning.metrics.conditional import conditional_ranks, conditional_retrieval
from mmft_hf.captioning.metrics.difference import propose, ranked
from mmft_hf.captioning.metrics.explained import explained_images, held_out, moments, nullified, sce
from mmft_hf.captioning.metrics.reconstruction import reconstruction
from mmft_hf.captioning.metrics.table import check_scores, metric_of
from mmft_hf.captioning.steps.asking import answered, rendered
from mmft_hf.captioning.steps.attribute_entropy import AttributeEntropy, attribute_entropy, proposed
from mmft_hf.captioning.steps.diversity import contextual_vendi
from mmft_hf.captioning.write.figures import as_before, caption_figures
from mmft_hf.core.errors import UserError


# -- what captions explain --------------------------------------------------------------------------------------------
def test_two_labels_of_two_modes():
    """Texts that name the label leave the two modes of each: two eigenvalues of a quarter."""
    images, texts = np.eye(4), np.eye(4)[[0, 0, 1, 1]]
    explained, rest = moments(images, texts)
    assert np.trace(rest) == pytest.approx(0.5) and sce(rest) == pytest.approx(0.3466, abs=1e-4)
    assert np.allclose(explained + rest, images.T @ images / 4)


def test_a_label_that_decides_everything_leaves_nothing():
    explained, rest = moments(np.eye(4)[[0, 1]], np.eye(4)[[2, 3]])
    assert sce(rest) == 0 and np.abs(rest).max() < 1e-9 and sce(explained) == pytest.approx(np.log(2))


def test_nullified_images_do_not_know_their_label():
    images, labels = np.eye(4), np.eye(4)[[0, 0, 1, 1]]
    assert np.allclose(nullified(images, labels), np.eye(4) - np.array([[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2) / 2)


def test_a_linear_relation_holds_on_the_other_half():
    rng = np.random.default_rng(0)
    texts, noise = rng.normal(size=(400, 5)), rng.normal(size=(400, 8))
    halves = np.arange(400) % 2 == 0
    assert held_out(texts @ rng.normal(size=(5, 8)) * 10, texts, halves) > 0.99
    assert -0.1 < held_out(noise, texts, halves) < 0.02


@pytest.mark.slow
def test_captions_explain_more_than_class_names_and_than_chance(emoji):
    """On groups that the fit has not seen: .51, .35 for class names, -.14 for shuffled captions."""
    rows, scorer = emoji
    own, label, shuffled, beyond, rest, control = explained_images(rows, scorer).values()
    assert 0.4 < own < 0.6 and label < own - 0.1 and shuffled < 0 and 0 < beyond < own and rest < control
    images = scorer.images().astype(float)
    prompts = scorer.texts([f"a photo of a {r.class_name}." for r in rows]).astype(float)
    labels, groups = np.array([r.label for r in rows]), np.array([r.group for r in rows])
    classes = np.stack([prompts[labels == c][0] for c in range(labels.max() + 1)])

    def known(embeds):
        cosines = unit(embeds) @ unit(embeds).T
        np.fill_diagonal(cosines, -2)
        return np.mean((embeds @ classes.T).argmax(axis=1) == labels), np.mean(groups[cosines.argmax(axis=1)] == groups)

    before, after = known(images), known(nullified(images, prompts))
    assert before[0] >= 0.5 and after[0] <= 0.1 and after[1] >= 0.85


def test_too_few_groups_explain_nothing():
    rows = [row(i, ["t"], group="g") for i in range(6)]
    assert set(explained_images(rows, Vectors(np.eye(6), {})).values()) == {None}


# -- diversity --------------------------------------------------------------------------------------------------------
def test_captions_are_as_different_as_their_images_at_equal_numbers():
    """Four images on four axes with two texts, each of them twice; a class with one image does not count."""
    texts = {"x": [1, 0, 0, 0], "y": [0, 1, 0, 0], "z": [1, 0, 0, 0]}
    rows = [row(i, [text]) for i, text in enumerate("xyxy")] + [row(9, ["x"], label=1)]
    images = np.eye(4)[[0, 1, 2, 3, 0]]
    assert list(contextual_vendi(rows, Vectors(images, texts)).values()) == pytest.approx([2, 4, 0.5])
    more = [*rows, row(7, [f"text {k}" for k in range(40)])]  # many captions of one image: still as many as images
    said, seen, _ = contextual_vendi(more, Vectors(np.eye(4)[[0, 1, 2, 3, 0, 0]], texts)).values()
    assert said <= 2 and seen <= 4
    alike = [row(i, [text]) for i, text in enumerate("xzxz")]
    assert contextual_vendi(alike, Vectors(images[:4], texts))["different captions of a class (Vendi)"] < 1.01
    assert set(contextual_vendi(rows[4:], Vectors(images[4:], texts)).values()) == {None}


def test_entropy_is_divided_by_the_proposed_values():
    assert attribute_entropy([8, 1, 1, 0]) == pytest.approx(0.461, abs=5e-4)
    assert attribute_entropy([8, 1, 1]) == pytest.approx(0.582, abs=5e-4)
    assert attribute_entropy([9, 0]) == 0 and attribute_entropy([3, 3, 3]) == pytest.approx(1)
    with pytest.raises(ValueError, match="not all 0"):
        attribute_entropy([0, 0])


def test_attributes_of_a_class_are_asked_of_its_images():
    """Of four images three are red, one is unanswered and none is wild: the values of the other question are left unseen."""
    colours = [0, 0, 0, None]
    rows = [row(i, ["t"]) for i in range(4)] + [replace(row(4, []), image_sha256=None)]
    asked = []

    def respond(ask):
        asked.append(ask)
        if ask.role == "writer":
            return ["Colour? | red | blue | green | gold", "Wild? | yes | no", "no values", "One? | a | a"]
        return colours[int(ask.pictures[0].image_sha256, 16)] if "Colour" in ask.prompt else 2  # none of the above

    step = AttributeEntropy()
    found = [answered(step.ask(own, None), respond) for own in rows]
    judged = [ask for ask in asked if ask.role == "judge"]
    assert len(judged) == 8 and judged[0].options[-1] == "none of the above"
    assert (
        not any("class 0" in ask.prompt for ask in judged) and len({ask for ask in asked if ask.role == "writer"}) == 1
    )
    assert step.apply(rows, None, found) == [list(own.records) for own in rows]
    told = step.told(rows, found)
    assert told.figures == {"attributes": 1, "mean_entropy": 0, "defaults": 1, "unanswered": 1}
    assert [d["verdict"] for d in told.details][:2] == ["red: 3", "blue: 0"]
    assert answered(step.ask(rows[0], None), lambda ask: None) == []  # unanswered: nothing is asked of the judge
    assert sum(step.bound(rows[0], None).values()) == 6 and not step.bound(rows[4], None)


def test_proposals_in_another_form_are_left_out():
    assert proposed(["a? | x | none of the above | y", "b? | x", "", "| x | y"]) == [("a?", ("x", "y"))]


def test_density_by_hand():
    records = row(0, ["A red cat. It sleeps on the red mat."]).records
    found = caption_figures([("s", records)])
    assert (found["words"], found["words_per_sentence"]) == (9, 4.5)
    assert (found["content_words"], found["distinct_words"]) == (5, 4)  # red cat sleeps red mat
    assert caption_figures([])["content_words"] is None


@pytest.mark.slow
def test_doubled_captions_are_half_as_different(emoji):
    """.126 and .288 were measured; captions of two data sets halve the first, and say no more of an image."""
    rows, _ = emoji
    once = caption_figures((r.image_sha256, r.records) for r in rows)
    assert once["distinct_1"] == pytest.approx(0.13, abs=0.01) and once["distinct_2"] == pytest.approx(0.29, abs=0.01)
    twice = caption_figures(
        (r.image_sha256, [*r.records, *(x | {"text": x["text"] + "!"} for x in r.records)]) for r in rows
    )
    assert twice["distinct_1"] == pytest.approx(once["distinct_1"] / 2, abs=1e-3)
    assert twice["distinct_words"] == once["distinct_words"]


def test_captions_before_the_steps():
    """A dropped and a replaced caption were there; what a step wrote was not, whatever became of it."""
    made = row(0, list("abcde"))
    changes = [
        {},
        {"status": "dropped", "step": "select"},
        {"status": "replaced", "step": "rewrite"},
        {"step": "rewrite", "parents": ["a#2@caption"]},
        {"status": "dropped", "step": "select", "parents": ["a#2@caption"]},
    ]
    records = [record | change for record, change in zip(made.records, changes, strict=True)]
    assert [r["text"] for r in as_before(records)] == ["a", "b", "c"]


# -- best of k --------------------------------------------------------------------------------------------------------
def test_the_best_of_one_is_the_score_and_never_falls():
    rows = with_values("s", [[1, 3, 2], [4, 0, 8], [5, None]])
    assert list(best_of(rows, "s", 1).values()) == [10 / 3, 0]
    assert list(best_of(rows, "s", 2).values()) == [3.5, 1] and list(best_of(rows, "s", 3).values()) == [5.5, 1]
    same = rows[:2]
    values = [next(iter(best_of(same, "s", k).values())) for k in (1, 2, 3)]
    assert values == sorted(values) and list(best_of(same, "s", 4).values()) == [None, 2]


# -- conditional retrieval ----------------------------------------------------------------------------------------------
def planted(count, text):
    """`count` pairs of images that share a caption; images are the sum of what is theirs and of what the text says."""
    rng = np.random.default_rng(0)
    said = unit(rng.normal(size=(count, 64)))
    images = unit(unit(rng.normal(size=(2 * count, 64))) + 2 * said.repeat(2, axis=0))
    rows = [row(i, [f"t{i // 2}"]) for i in range(2 * count)]
    texts = {f"t{k}": said[k] if text else unit(rng.normal(size=64)) for k in range(count)}
    return rows, images, texts


def test_an_image_and_a_caption_find_the_other_image():
    rows, images, texts = planted(60, True)
    first, second, third = conditional_retrieval(rows, Vectors(images, texts)).values()
    assert 0.95 <= first <= second <= third


def test_random_embeddings_find_by_chance():
    rng = np.random.default_rng(0)
    query, gallery = unit(rng.normal(size=(3000, 16))), unit(rng.normal(size=(3000, 10, 16)))
    assert np.mean(conditional_ranks(query, gallery) <= 1) == pytest.approx(0.1, abs=0.03)
    assert conditional_ranks(np.eye(2)[:1], np.eye(2)[[[0, 0, 1]]]).tolist() == [1.5]


def test_no_shared_caption_no_question():
    rows = [row(i, [f"t{i}"]) for i in range(12)]
    assert set(conditional_retrieval(rows, Vectors(np.eye(12), {})).values()) == {None}


# -- what tells two sets apart ------------------------------------------------------------------------------------------
def test_statements_are_proposed_from_both_sets_and_quoted():
    asked = []

    def respond(ask):
        asked.append(ask)
        return None if len(asked) == 2 else [f"seen {len(asked)}", "a hat ", " "]

    found = answered(propose(['say "no"'] * 30, ["b"] * 3), respond)
    assert found == ["seen 1", "a hat", "seen 3"] and len(asked) == 3
    assert {ask.role for ask in asked} == {"writer"} and not any(ask.pictures for ask in asked)
    assert rendered(asked[0]).count('"say \\"no\\""') == 20 and rendered(asked[0]).count('\n"b"') == 3


def test_holm_and_auroc_by_hand():
    first, second = np.array([[3.0, 0], [4, 0]]), np.array([[1.0, 0], [2, 0]])
    found = ranked(["up", "none"], np.eye(2), first, second)
    assert [(s.text, s.auroc) for s in found] == [("up", 1), ("none", 0.5)]
    # t = 2 / sqrt(.25 + .25) = 2.828; the smaller of two p values counts twice.
    assert found[0].p == pytest.approx(2 * 0.002339, abs=1e-5) and found[1].p == pytest.approx(0.5)
    with pytest.raises(ValueError, match="two images or more"):
        ranked(["x"], np.eye(2)[:1], first[:1], second)


@pytest.mark.slow
def test_the_name_of_a_class_tells_it_from_another(emoji):
    """All 24 names for each pair of classes: .915 was measured for the true one, .88 in the top five."""
    rows, scorer = emoji
    images, labels = scorer.images(), np.array([r.label for r in rows])
    names = [next(r.class_name for r in rows if r.label == c) for c in range(labels.max() + 1)]
    texts, rng = scorer.texts([f"a photo of a {name}." for name in names]), np.random.default_rng(0)
    true, top, chance = [], [], []
    for c, name in enumerate(names):
        for other in set(range(len(names))) - {c}:
            found = ranked(names, texts, images[labels == c], images[labels == other])
            order = [one.text for one in found]
            true.append(found[order.index(name)].auroc)
            top.append(name in order[:5])
        mixed = rng.permutation(np.flatnonzero(np.isin(labels, (c, other))))
        chance.append(np.mean([one.auroc for one in ranked(names, texts, images[mixed[::2]], images[mixed[1::2]])]))
    assert np.mean(true) >= 0.88 and np.mean(top) >= 0.7 and np.mean(chance) == pytest.approx(0.5, abs=0.1)


# -- reconstruction -----------------------------------------------------------------------------------------------------
class Colours(Vectors):
    """Encodes a picture as the axis of its first pixel."""

    def encode(self, pictures):
        return np.stack([np.eye(3, dtype=np.float32)[picture.getpixel((0, 0))] for picture in pictures])


def test_reconstruction_reads_the_gap_to_the_class_name():
    asked = []

    def generator(text, seed):
        asked.append((text, seed))
        return Image.new("L", (1, 1), int(text) if text.isdigit() else 2)

    rows = [row(0, ["0"]), row(1, ["1", "0"]), row(2, [])]
    scorer = Colours(np.eye(3), {})
    assert list(reconstruction(rows, scorer, generator, seeds=2).values()) == pytest.approx([2 / 3, 0])
    assert sorted(asked) == [(t, s) for t in ("0", "1", "a photo of a class 0.") for s in (0, 1)]  # equal texts once
    shuffled = [replace(rows[0], records=rows[1].records), replace(rows[1], records=rows[0].records)]
    assert next(iter(reconstruction(shuffled, scorer, generator).values())) < 2 / 3
    assert list(reconstruction(rows[2:], Colours(np.eye(3)[2:], {}), generator).values()) == [None, None]


# -- as they are typed --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("vend", "Did you mean 'vendi'"),
        ("clip@max_0", "expected some of vendi, sce"),
        ("reconstruction", "reconstruction=package.module:function"),
        ("reconstruction=no", "expected package.module:function, found 'no'"),
        ("reconstruction=no_such_module:f", "expected a module no_such_module"),
        ("reconstruction=json:no_such", "expected a function no_such in json"),
    ],
)
def test_metrics_that_cannot_be(word, said):
    with pytest.raises(UserError, match=said):
        metric_of(word)


def test_the_best_of_a_score_that_no_caption_has():
    check_scores(["vendi", "clip@max_2"], ["clip"])
    with pytest.raises(
        UserError, match=r"expected a score that the captions have \(clip, sr_pct\), found 'clipp'. Did you mean 'clip'"
    ):
        check_scores(["clipp@max_2"], ["clip", "sr_pct"])


def test_a_function_of_the_working_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_generator_of_tests.py").write_text("def make(text, seed):\n    return text\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    metric, needs_scorer = metric_of("reconstruction=my_generator_of_tests:make")
    assert metric.keywords["generator"]("x", 0) == "x" and needs_scorer and sys.path == path
    assert auroc([1, 2], [0, 1]) == 0.875
