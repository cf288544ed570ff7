"""Steps that ask a judge or a writer about captions: planted truths, answered by scripted responders."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from mmft_hf.captioning.steps.agreement import Agreement
from mmft_hf.captioning.steps.arena import Game, bradley_terry, caption_arena
from mmft_hf.captioning.steps.asking import answered, parsed
from mmft_hf.captioning.steps.choice import Choice
from mmft_hf.captioning.steps.pairwise import Pairwise
from mmft_hf.captioning.steps.questions import Questions, read_bank
from mmft_hf.captioning.steps.rubric import DIMENSIONS, Rubric
from mmft_hf.captioning.steps.settings import make_step, read_recipe
from mmft_hf.core.errors import UserError
from tests.helpers.judged_steps import KINDS, axes, planted, ran, responder, texts
from tests.helpers.step_rows import row, scores
from tests.helpers.tiny_encoders import word_pieces


# -- rubric -----------------------------------------------------------------------------------------------------------
def test_a_judge_that_counts_true_names_rates_captions():
    rows = [row(0, ["cat0, cat1", "cat0, cat2", "cat2"])]
    respond = responder({rows[0].image_sha256: ["cat0", "cat1"]})
    step = Rubric()
    found, records = ran(step, rows, respond)
    assert scores(records, "rubric") == scores(records, "grammar") == [[5, 2, 0]]  # 2.5 is rounded to the even number
    told = step.told(rows, found)
    assert told.figures["grammar"] == [1, 0, 1, 0, 0, 1] and not told.notes and len(told.details) == 12
    assert all(dimension in respond.asked[0].prompt for dimension in DIMENSIONS)


def test_ratings_in_another_form_are_left_out():
    step = Rubric(dimensions=("grammar", "specificity"), styles=("plain", "Poetic"))
    good = {"grammar": 4, "specificity": 1, "style": "poetic "}
    for answer, expected in [
        (good, {"grammar": 4, "specificity": 1, "rubric": 2.5, "style": 1}),
        (good | {"grammar": 6, "style": "odd"}, {"specificity": 1}),
        (good | {"grammar": True, "specificity": "5"}, {"style": 1}),
        (None, {}),
    ]:
        [found], [records] = ran(step, [row(0, ["a"])], lambda ask, answer=answer: answer)
        assert found["a"] == expected and {s["name"]: s["value"] for s in records[0]["scores"]} == expected
    assert step.told([row(0, ["a"])], [{"a": {}}]).figures["unanswered"] == 1


def test_a_criterion_that_is_always_rated_alike_is_noted():
    rows = [row(i, ["a b", "c"]) for i in range(10)]
    step = Rubric(dimensions={"colours": "it names colours"})
    found, records = ran(step, rows, lambda ask: {"colours": 5} if "it names colours" in ask.prompt else None)
    [note] = step.told(rows, found).notes
    assert "ratings of colours are 5" in note and scores(records, "rubric") == [[5, 5]] * 10


# -- choice -----------------------------------------------------------------------------------------------------------
def writers(number, kinds=4):
    """Images with a caption of each writer, of which one names more that is true, and its number."""
    rng, rows, truth, best = np.random.default_rng(0), [], {}, []
    for i in range(number):
        own, other = KINDS[0][:8], KINDS[1]
        best.append(int(rng.integers(kinds)))
        said = [[*own[: 5 if k == best[-1] else 2], other[k]] for k in range(kinds)]
        made = row(i, [", ".join(rng.permutation(names)) for names in said])
        for k, record in enumerate(made.records):
            record["model"] = f"writer {k}"
        rows.append(made)
        truth[made.image_sha256] = own
    return rows, truth, best


def test_a_judge_that_counts_true_names_chooses_the_best_writer():
    rows, truth, best = writers(200)
    step = Choice()
    found, records = ran(step, rows, responder(truth))
    assert scores(records, "chosen") == [[float(k == b) for k in range(4)] for b in best]
    assert step.told(rows, found).figures["chosen of writer 0"] == best.count(0)


def test_a_judge_that_always_says_a_prefers_no_writer():
    rows, _, _ = writers(400)
    _, records = ran(Choice(), rows, lambda ask: parsed(ask, "A"))
    share = np.mean(scores(records, "chosen"), axis=0)
    assert np.all(np.abs(share - 0.25) < 3 * np.sqrt(0.25 * 0.75 / 400)), share


def test_one_caption_is_not_asked_about_and_no_answer_is_no_choice():
    respond = responder({})
    _, [records] = ran(Choice(), [row(0, ["a", "a"])], respond)
    assert not respond.asked and scores([records], "chosen") == [[None, None]]
    _, records = ran(Choice(), [row(0, ["a", "b"])], lambda ask: None)
    assert scores(records, "chosen") == [[None, None]]


# -- questions --------------------------------------------------------------------------------------------------------
FACTS = [("colour", "crimson"), ("shape", "oblong"), ("ground", "meadow"), ("light", "dusk"), ("number", "seven")]


class Quizmaster:
    """Writes five questions, of which `named` names the class; answers with the picture; reads by looking for an option."""

    def __init__(self, extra=(), blind=lambda ask: None, seen=lambda ask: 0):
        asked = [(f"Which {kind}?", [right, *(f"{kind} {k}" for k in range(3))]) for kind, right in FACTS]
        self.bank = [{"question": text, "options": options} for text, options in (*asked, *extra)]
        self.blind, self.seen = blind, seen

    def __call__(self, ask):
        if ask.answer == "json:questions":
            return {"questions": self.bank}
        if ask.role == "judge":
            return self.seen(ask)
        if "Caption: " not in ask.prompt:
            return self.blind(ask)
        said = ask.prompt.split("Caption: ")[1]
        fitting = [k for k, option in enumerate(ask.options) if option.strip('"') in said]
        return fitting[0] if fitting else parsed(ask, "A")


@pytest.mark.parametrize("known", range(6))
def test_utility_is_the_share_of_facts_that_the_caption_tells(known):
    caption = " ".join(right for _, right in FACTS[:known])
    rows = [row(i, [f"image {i}: {caption}"]) for i in range(300)]
    _, records = ran(Questions(), rows, Quizmaster())
    found = np.array(scores(records, "utility"))
    assert np.mean(found) == pytest.approx(known / 5, abs=0.06)
    if known == 5:
        assert np.all(found == 1)


def test_a_reader_that_always_says_a_is_right_by_chance():
    rows = [row(i, [f"image {i}"]) for i in range(1000)]
    found, records = ran(Questions(), rows, Quizmaster())
    right = [answer == 0 for quiz in found for own in quiz.answers.values() for answer in own]
    assert np.mean(right) == pytest.approx(0.25, abs=0.03)
    assert np.mean(scores(records, "utility")) == pytest.approx(0, abs=0.05)


def test_questions_that_need_no_caption_or_no_picture_are_left_out():
    def blind(ask):
        return 0 if "colour" in ask.prompt else 1

    def seen(ask):
        if "shape" in ask.prompt:
            return 2  # not what the bank calls right
        return ask.sample if "light" in ask.prompt else 0  # another one in each order

    extra = [("What is class 0 like?", ["red", "green", "blue", "grey"]), ("What else?", ["a class 1", "b", "c", "d"])]
    rows = [row(0, ["crimson"]), row(1, ["crimson"], label=1)]
    step = Questions(number=7)
    found, _ = ran(step, rows, Quizmaster(extra, blind, seen))
    assert [question.text for question in found[0].questions] == ["Which ground?", "Which number?"]
    figures = step.told(rows, found).figures
    assert figures["left out: names a class"] == 4 and figures["left out: answered without a caption"] == 2
    assert figures["left out: not answered alike with the picture"] == 4 and figures["questions"] == 4


def test_a_bank_of_ones_own_is_answered_for_each_image():
    rows = [row(0, ["it is red"]), row(1, ["it is blue"])]
    step = Questions(bank={"Which colour?": ("red", "blue")})

    def respond(ask):
        if ask.role == "judge":
            return int(ask.pictures[0].image_sha256, 16)
        if "Caption: " not in ask.prompt:
            return None
        return int('"it is blue"' in ask.prompt)

    found, records = ran(step, rows, respond)
    assert [quiz.right for quiz in found] == [[0], [1]] and scores(records, "utility") == [[1], [1]]
    assert [d["verdict"] for d in step.told(rows, found).details] == ["right", "right"]


def test_questions_about_a_class_are_asked_for_once():
    rows = [row(i, ["crimson"], label=i % 2) for i in range(6)]
    respond, asked = Quizmaster(), set()

    def counting(ask):
        asked.add(ask)
        return respond(ask)

    ran(Questions(per="class"), rows[::-1], counting)
    banks = {ask.pictures[0].image_sha256 for ask in asked if ask.answer == "json:questions"}
    assert banks == {rows[0].image_sha256, rows[1].image_sha256}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"questions": [{"question": "q", "options": ["a", "b", "c", "d"]}] * 9}, 5),
        ({"questions": [{"question": "q", "options": ["a", "A", "c", "d"]}]}, 0),
        ({"questions": [{"question": "q", "options": ["a", "b"]}]}, 0),
        ({"questions": [{"question": 3, "options": []}]}, None),
        ({"questions": "q"}, None),
        (None, None),
    ],
)
def test_a_bank_is_read_or_unknown(answer, expected):
    found = read_bank(answer, 5, 4, 0)
    assert found is None if expected is None else len(found) == expected


# -- agreement --------------------------------------------------------------------------------------------------------
def test_the_caption_that_contradicts_the_others_is_last():
    rng, rows, odd = np.random.default_rng(0), [], []
    for i in range(200):
        odd.append(int(rng.integers(4)))
        rows.append(row(i, [f"text {k} says {'no' if k == odd[-1] else 'yes'}" for k in range(4)]))

    def writer(ask):  # it is wrong in a tenth of the answers
        truth = len({word for word in ("says no", "says yes") if word in ask.prompt}) == 2
        return "yes" if truth != (rng.random() < 0.1) else "no"

    step = Agreement()
    found = [answered(step.ask(r, None), writer) for r in rows]
    lowest = [int(np.argmin(own)) for own in scores(step.apply(rows, None, found), "nli")]
    assert np.mean(np.array(lowest) == odd) >= 0.9
    honest, records = ran(step, rows, lambda a: "yes" if "says no" in a.prompt and "says yes" in a.prompt else "no")
    assert [int(np.argmin(own)) for own in scores(records, "nli")] == odd
    assert sorted(scores(records, "nli")[0]) == pytest.approx([-1, 1 / 3, 1 / 3, 1 / 3])
    assert step.told(rows, honest).figures == {"pairs": 1200, "contradictions": 600, "unsure": 0, "unanswered": 0}


def test_undecided_pairs_do_not_count():
    [_], [records] = ran(Agreement(), [row(0, ["a", "b", "c"])], lambda ask: "yes" if '"a"' not in ask.prompt else None)
    assert scores([records], "nli") == [[None, -1, -1]]
    assert scores(ran(Agreement(), [row(0, ["a", "a"])], None)[1], "nli") == [[None, None]]


def inference_model(folder, labels):
    """A random model with these classes, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = word_pieces()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        id2label=dict(enumerate(labels)),
        label2id={word: i for i, word in enumerate(labels)},
        max_position_embeddings=64,
        initializer_range=1.0,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def test_a_local_model_judges_all_pairs_in_both_directions(tmp_path):
    model, tokenizer = inference_model(tmp_path, ["ENTAILMENT", "NEUTRAL", "CONTRADICTION"])
    rows = [row(0, ["a b c", "d e", "f"]), row(1, ["g"]), row(2, ["a b c", "l o n g " * 40])]
    step = Agreement(model=str(tmp_path))
    assert step.roles() == () and not step.needs_scorer()
    found, records = ran(step, rows, None)

    def contradiction(premise, text):  # one pair at a time, without padding
        with torch.no_grad():
            logits = model(**tokenizer(premise, text, return_tensors="pt", truncation=True, max_length=62)).logits
        return logits.softmax(dim=-1)[0, 2].item()

    for r, own in zip(rows, scores(records, "nli"), strict=True):
        for text, value in zip(r.texts(), own, strict=True):
            others = [contradiction(other, text) for other in r.texts() if other != text]
            assert value == (pytest.approx(1 - 2 * np.mean(others), abs=1e-5) if others else None)
    assert len({round(value, 4) for value in found[0].values()}) == 6  # the direction counts
    assert step.told(rows, found).figures["pairs"] == 8


def test_a_model_without_a_class_for_contradiction_is_refused(tmp_path):
    inference_model(tmp_path, ["bad", "good"])
    with pytest.raises(UserError, match="a class contradiction, found bad, good"):
        Agreement(model=str(tmp_path)).fit([row(0, ["a", "b"])], None)
    with pytest.raises(UserError, match="none: expected a model of natural language inference"):
        Agreement(model=str(tmp_path / "none")).fit([row(0, ["a", "b"])], None)


# -- pairwise and the arena ---------------------------------------------------------------------------------------------
def test_strengths_by_hand():
    wins = np.array([[0, 8, 9], [2, 0, 6], [1, 4, 0]])
    assert bradley_terry(wins) == pytest.approx([1.1702, -0.3417, -0.8285], abs=1e-4)
    ties = np.zeros((3, 3))
    ties[0, 1] = ties[1, 0] = 1  # two ties
    assert bradley_terry(wins + ties) == pytest.approx([1.0365, -0.2361, -0.8003], abs=1e-4)
    assert np.isnan(bradley_terry([[0, 3], [0, 0]])).all()  # the first one never lost
    both = bradley_terry(np.stack([wins, wins.T, np.zeros((3, 3))]))
    assert both[0] == pytest.approx(-both[1]) and np.isnan(both[2]).all()


def test_the_arena_finds_planted_strengths():
    """Results are drawn with strengths 0, .7 and −.7; the interval of each has the true value."""
    rng, true = np.random.default_rng(0), {"a": 0.0, "b": 0.7, "c": -0.7}
    games = []
    for i in range(300):
        for x, y in (("a", "b"), ("b", "c"), ("c", "a")):
            games.append(Game(str(i), x, y, float(rng.random() < 1 / (1 + np.exp(true[y] - true[x])))))
    found = caption_arena(games)
    assert [one.source for one in found] == ["b", "a", "c"]
    for one in found:
        assert one.low < true[one.source] < one.high and one.low < one.value < one.high and one.games == 600
    assert caption_arena(games[::-1]) == found


def test_both_orders_must_agree_for_a_win():
    rows, truth, best = writers(60)
    step = Pairwise()
    found, records = ran(step, rows, responder(truth))
    assert [int(np.argmax(own)) for own in scores(records, "wins")] == best
    assert all(sorted(own) == pytest.approx([1 / 3] * 3 + [1]) for own in scores(records, "wins"))
    figures = step.told(rows, found).figures
    assert figures["position_bias"] == 0 and figures["pairs"] == 360 and figures["ties"] == 180
    assert figures["words writer 0"] == np.mean([len(r.records[0]["text"].split()) for r in rows])


def test_a_judge_that_always_prefers_the_first_decides_nothing():
    rows, _, _ = writers(20)
    step = Pairwise()
    found, records = ran(step, rows, lambda ask: 1)
    figures = step.told(rows, found).figures
    assert figures["position_bias"] == 1 and figures["ties"] == figures["pairs"] == 120
    assert scores(records, "wins") == [[0.5] * 4] * 20
    assert figures["strength writer 0"] == pytest.approx([0, 0, 0], abs=1e-9)
    missing, _ = ran(step, rows, lambda ask: None)
    assert step.told(rows, missing).figures == {"pairs": 120, "unanswered": 120}


def test_rounds_and_images_bound_the_comparisons():
    rows, truth, _ = writers(30)
    step = Pairwise(rounds=1, images=10)
    found, _ = ran(step, rows, responder(truth))
    asked = [own for own in found if own]
    assert len(asked) == 10 and all(len(own) == 4 for own in asked)  # each caption meets two others
    again, _ = ran(step, rows[::-1], responder(truth))
    assert again == found[::-1]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("rubric", {"dimensions": ["gramar"]}, "found 'gramar'"),
        ("rubric", {"dimensions": {"Style X": "a"}}, "small letters"),
        ("rubric", {"dimensions": []}, "one or more names"),
        ("rubric", {"styles": ["one"]}, "two or more"),
        ("questions", {"options": 1}, "expected 2 to 26"),
        ("questions", {"per": "split"}, "image or class"),
        ("questions", {"bank": {"Which?": ["one", "one"]}}, "2 to 26 different options"),
        ("questions", {"bank": {}}, "found none"),
        ("pairwise", {"rounds": 0}, "1 or more"),
        ("pairwise", {"sources": "label"}, "expected one of model"),
    ],
)
def test_options_of_judges_that_cannot_be(name, options, said):
    with pytest.raises(UserError, match=said):
        make_step(name, options)


# -- recipes ----------------------------------------------------------------------------------------------------------
def refined(name, rows, respond, scorer=None):
    """The records after all steps of a recipe, and what each step told."""
    told = []
    for step in read_recipe([f"recipes/captions/steps/{name}.yaml"]).steps:
        found, records = ran(step, rows, respond, scorer)
        told.append(step.told(rows, found))
        rows = [replace(r, records=own) for r, own in zip(rows, records, strict=True)]
    return rows, told


def test_the_recipe_of_facts_leaves_true_names():
    rows, truth = planted(40)
    scorer = axes(rows, truth)
    found, told = refined("fact_checked", rows, responder(truth), Lists(scorer))
    for r in found:
        [caption] = texts(r.records)
        assert set(caption.split(", ")) == set(truth[r.image_sha256])
    assert told[0].figures["decoy_recall"] == 1 and told[0].figures["no"] == 40


def test_the_recipe_of_several_writers_repairs_the_chosen_one():
    rows, truth, best = writers(30)
    found, told = refined("judge_select_refine", rows, responder(truth))
    repaired = 0
    for r, winner in zip(found, best, strict=True):
        [caption] = [record for record in r.records if record["status"] == "ok"]
        if caption["step"] == "refine":
            repaired += 1
            dropped = texts(r.records, "dropped")
            assert caption["parents"][0] == f"a#{winner}@caption" and len(caption["parents"]) == 4 - len(dropped)
        else:  # the judge dropped all others, so that nothing could be settled
            assert caption is r.records[winner] and len(texts(r.records, "dropped")) == 3
    assert repaired > 20
    assert told[2].figures["images"] >= repaired


def test_the_recipe_of_the_arena_ranks_the_writers():
    rows, truth, best = writers(40)
    found, [told] = refined("arena", rows, responder(truth))
    assert [texts(r.records) for r in found] == [texts(r.records) for r in rows]
    strengths = [told.figures[f"strength writer {k}"][0] for k in range(4)]
    assert int(np.argmax(strengths)) == max(range(4), key=best.count)


class Lists:
    """A scorer that embeds a list of names as their mean."""

    def __init__(self, scorer):
        self.scorer, self.scale, self.images = scorer, scorer.scale, scorer.images

    def texts(self, texts):
        return np.stack([self.scorer.texts(text.split(", ")).mean(axis=0) for text in texts])
