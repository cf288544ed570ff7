"""Scores and selection without calls: planted truths on given embeddings, and on the embedded data with a model that knows it."""

import numpy as np
import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage
from step_rows import Vectors, auroc, row, scores

from mmft_hf.captioning.ask.pictures import part
from mmft_hf.captioning.steps.clip_score import REGIONS, ClipScore
from mmft_hf.captioning.steps.scorer import Scorer
from mmft_hf.captioning.steps.settings import make_step
from mmft_hf.core.errors import UserError


# -- options ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("clip_score", {"views": "quadrants"}, "views: expected a list, each entry a text, found 'quadrants'"),
        ("clip_score", {"views": [1]}, "views: expected a list, each entry a text"),
        ("clip_score", {"views": ["corner"]}, "expected some of whole, quadrants, centre, found corner"),
        ("clip_score", {"views": []}, "expected some of whole, quadrants, centre, found none"),
        ("clip_score", {"per": "word"}, "expected caption or sentence"),
    ],
)
def test_options_that_cannot_be(name, options, said):
    with pytest.raises(UserError, match=said):
        make_step(name, options)


def test_a_plan_names_only_options_that_were_chosen():
    """A new option with its default value does not make earlier results another step's."""
    assert make_step("clip_score", {"bins": "uniform"}).spec() == {"step": "clip_score", "version": 1}
    assert make_step("clip_score", {"views": ["centre"]}).spec()["views"] == ["centre"]


# -- views ------------------------------------------------------------------------------------------------------------
def test_the_best_view_of_each_sentence_counts():
    """One sentence speaks of the whole, the other of quadrant 2."""
    axes = np.eye(4)
    texts = {"One. Two.": [0.5, 0.5, 0, 0], "One.": [0.9, 0.1, 0, 0], "Two.": [0.1, 0.7, 0, 0]}
    scorer = Vectors(axes[:1], texts, {name: axes[[1 if name == "quadrant:2" else 3]] for name in REGIONS[1:]})
    rows = [row(0, ["One. Two."])]
    found = ClipScore(views=("whole", "quadrants"), per="sentence").apply(rows, scorer)
    assert np.allclose(scores(found, "clip_best"), [[(0.9 + 0.7) / 2]]) and np.allclose(scores(found, "clip"), [[0.5]])
    assert scores(found, "clip_view") == [[0]]  # 0.5 on average, 0.4 for quadrant 2
    found = ClipScore(views=("quadrants", "centre")).apply(rows, scorer)
    assert np.allclose(scores(found, "clip_best"), [[0.5]]) and scores(found, "clip_view") == [[3]]


def test_the_whole_alone_is_the_plain_score():
    rows, scorer = [row(0, ["t", "A. B."])], Vectors(np.eye(2), {"t": [0.6, 0.8], "A. B.": [0.3, 0.2]})
    assert ClipScore(views=("whole",)).apply(rows, scorer) == ClipScore().apply(rows, scorer)
    by_sentence = ClipScore(per="sentence").apply([row(0, ["t"])], scorer)
    assert scores(by_sentence, "clip_best") == scores(by_sentence, "clip")


def test_the_scorer_encodes_regions(clip_folder):
    """A picture of four colours: each quadrant is encoded as a picture of that colour alone is."""
    colours = ["red", "green", "blue", "yellow"]
    collage = PILImage.new("RGB", (64, 64))
    for k, colour in enumerate(colours):
        collage.paste(colour, (k % 2 * 32, k // 2 * 32, k % 2 * 32 + 32, k // 2 * 32 + 32))

    def scorer(pictures):
        columns = {"image": pictures, "label": [0] * len(pictures)}
        return Scorer(str(clip_folder), Dataset.from_dict(columns).cast_column("image", Image()))

    alone = scorer([PILImage.new("RGB", (32, 32), colour) for colour in colours]).images()
    both = scorer([collage])
    assert np.allclose(np.concatenate([both.images(region) for region in REGIONS[1:5]]), alone, atol=1e-5)
    assert np.allclose(both.encode([part(both.picture(0), region) for region in REGIONS[1:5]]), alone, atol=1e-5)
    assert not np.allclose(both.images(), alone[:1], atol=1e-3)  # a file of the cache belongs to one region


@pytest.mark.slow
def test_a_caption_of_a_part_is_seen_in_its_view(emoji):
    """Collages of four drawings, a caption of a part against a foreign one: .61 for the whole picture, .98 for the best view."""
    rows, scorer = emoji
    rng = np.random.default_rng(0)
    drawn = [rng.choice(len(rows), 8, replace=False) for _ in range(60)]
    pictures, planted = [], []
    for number, parts in enumerate(drawn):
        collage = PILImage.new("RGB", (144, 144), "white")
        for k, i in enumerate(parts[:4]):
            picture = scorer.picture(int(i)).resize((72, 72))
            collage.paste(picture, (k % 2 * 72, k // 2 * 72))
        pictures.append(collage)
        planted.append(row(number, [rng.choice(rows[j].records)["text"] for j in parts]))
    columns = {"image": pictures, "label": [0] * 60}
    both = Scorer("builtin/tiny-clip", Dataset.from_dict(columns).cast_column("image", Image()))
    found = ClipScore(views=("whole", "quadrants", "centre")).apply(planted, both)
    whole, best = (np.array(scores(found, name)) for name in ("clip", "clip_best"))
    assert auroc(best[:, :4].ravel(), best[:, 4:].ravel()) >= 0.95
    assert auroc(whole[:, :4].ravel(), whole[:, 4:].ravel()) <= 0.7
    view = np.array(scores(found, "clip_view"))
    assert np.mean(view[:, :4] == [1, 2, 3, 4]) >= 0.9
