"""Presets on the embedded drawings, with a model that knows their captions: what is planted there is found."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmft_hf.captioning.ask.pictures import part
from mmft_hf.captioning.steps.asking import answered, quoted
from mmft_hf.captioning.steps.base import with_scores
from mmft_hf.captioning.steps.diversity import vendi
from mmft_hf.captioning.steps.rewrite import Rewrite
from mmft_hf.captioning.steps.seen import fitting_sentences

pytestmark = pytest.mark.slow
QUARTERS = [f"quadrant:{i}" for i in range(4)]


def first(row):
    return row.records[row.captions()[0]]["text"]


def with_captions(row, texts, views=()):
    records = [{**row.records[row.captions()[0]], "text": text, "sample": k} for k, text in enumerate(texts)]
    records = [{**record, "view": views[k] if views else None} for k, record in enumerate(records)]
    return replace(row, records=records)


def test_a_collapsed_class_gets_its_variety_back(emoji):
    rows, scorer = emoji
    label = rows[0].label
    rows = [with_captions(row, [first(row)]) for row in rows if row.label == label]
    truth = {row.image_sha256: first(row) for row in rows}
    collapsed = [with_captions(row, [first(rows[0])] if i % 10 else [first(row)]) for i, row in enumerate(rows)]
    step = Rewrite("diversify")
    fitted = step.fit(collapsed, None)
    found = []
    for row in collapsed:
        said = truth[row.image_sha256]
        found.append(answered(step.ask(row, fitted), lambda ask, said=said: said))
    after = [[r["text"] for r in own if r["status"] == "ok"] for own in step.apply(collapsed, None, found)]
    scores = [
        vendi(scorer.texts([text for own in side for text in own]))
        for side in ([[first(row)] for row in rows], [[first(row)] for row in collapsed], after)
    ]
    assert scores[1] < 0.5 * scores[0] and abs(scores[2] - scores[0]) < 0.1


def test_the_own_caption_is_among_the_two_that_are_fused(emoji):
    rows, scorer = emoji
    images, rng = scorer.images(), np.random.default_rng(0)
    by_label: dict = {}
    for i, row in enumerate(rows):
        by_label.setdefault(row.label, []).append(i)
    hits = []
    step = Rewrite("rank_and_fuse", rank_by="clip", top_k=2)
    for i in range(0, len(rows), 4):
        foils = [
            k for k in by_label[rows[i].label] if rows[k].group != rows[i].group and first(rows[k]) != first(rows[i])
        ]
        if len(foils) < 3:
            continue
        texts = [first(rows[i]), *(first(rows[k]) for k in rng.choice(foils, 3, replace=False))]
        row = with_captions(rows[i], texts)
        clip = scorer.texts(texts) @ images[i]
        row = replace(
            row, records=[with_scores(r, {"clip": c}) for r, c in zip(row.records, clip.tolist(), strict=True)]
        )
        (ask,) = next(step.ask(row, step.fit([row], None)))
        hits.append(quoted(texts[0]) in ask.prompt)
    assert len(hits) > 100 and np.mean(hits) >= 0.95


class Collages:
    """A scorer of pictures that are made of four drawings each."""

    def __init__(self, scorer, collages):
        self.scorer, self.collages, self.scale, self.known = scorer, collages, scorer.scale, {}
        self.texts = scorer.texts

    def images(self, region="whole"):
        if region not in self.known:
            self.known[region] = self.scorer.encode([part(image, region) for image in self.collages])
        return self.known[region]

    def picture(self, row):
        return self.collages[row]

    def encode(self, pictures):
        return self.scorer.encode(pictures)


@pytest.fixture(scope="module")
def collages(emoji):
    """40 collages of four drawings of different concepts, and the captions of their parts."""
    rows, scorer = emoji
    order, made, texts = np.random.default_rng(1).permutation(len(rows)), [], []
    for start in range(0, 160, 4):
        own = order[start : start + 4]
        canvas = Image.new("RGB", (144, 144), "white")
        for place, i in enumerate(own):
            canvas.paste(scorer.picture(int(i)).resize((72, 72)), (72 * (place % 2), 72 * (place // 2)))
        made.append(canvas)
        texts.append([first(rows[i]) for i in own])
    return (
        [replace(rows[i], image_sha256=f"{i:064x}", group=f"g{i}", records=[]) for i in range(40)],
        Collages(scorer, made),
        texts,
    )


@pytest.mark.parametrize("boxes", [False, True])
def test_texts_of_regions_are_unique_and_one_text_for_all_is_not(collages, boxes):
    rows, scorer, texts = collages
    corners = [[x, y, x + 72, y + 72] for y in (0, 72) for x in (0, 72)]
    rows = [replace(row, columns={"boxes": corners}) for row in rows]
    step = Rewrite("unique_region", regions_column="boxes")
    fitted, margins, same = step.fit(rows, scorer), [], []
    for said, kept in ((lambda own, n: own[n], margins), (lambda own, n: own[0] + " " * n, same)):
        found = []
        for row, own in zip(rows, texts, strict=True):
            answers = iter([said(own, n) for n in range(4)])
            found.append(answered(step.ask(row, fitted), lambda ask, answers=answers: next(answers)))
        if not boxes:
            found = [
                [replace(t, question=replace(t.question, view=QUARTERS[n])) for n, t in enumerate(own)] for own in found
            ]
        values = step._margins(rows, scorer, found)
        kept += [[values[i][n] for n in range(4)] for i in range(len(rows))]
    assert np.mean(np.array(margins) > 0) >= 0.95
    assert (np.sum(np.array(same) <= 0, axis=1) == 3).all()


def test_of_two_contradictory_sentences_the_true_one_fits_its_part_better(collages):
    rows, scorer, texts = collages
    other = texts[1:] + texts[:1]
    rows = [
        with_captions(
            replace(
                row, records=[dict.fromkeys(("aspect", "text", "status", "scores")) | {"status": "ok"} | {"text": "x"}]
            ),
            [text for pair in zip(own, wrong, strict=True) for text in pair],
            [view for view in QUARTERS for _ in range(2)],
        )
        for row, own, wrong in zip(rows, texts, other, strict=True)
    ]
    right = []
    found = fitting_sentences(rows, scorer)
    for row, own, wrong in zip(rows, texts, other, strict=True):
        shown = {(s.place, s.text): s.score for s in found[row.image_sha256, row.label]}
        for view, true, false in zip(QUARTERS, own, wrong, strict=True):
            right.append(shown.get((view, true), -1) > shown.get((view, false), -1))
    assert np.mean(right) >= 0.95
