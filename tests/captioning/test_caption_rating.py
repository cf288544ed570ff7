"""`sentence_rating`: which clauses of a caption the picture has made likelier, planted and with a model."""

import io
import itertools
import json

import numpy as np
import pytest
import torch
from caption_server import serving
from PIL import Image
from step_rows import row
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlm_requests import ask, picture

from mmft_hf.captioning.ask.backends.transformers import TransformersBackend
from mmft_hf.captioning.ask.captioner import Captioner
from mmft_hf.captioning.ask.roles import check_features, open_roles
from mmft_hf.captioning.steps.asking import Ask, answered, forced, parsed, rendered
from mmft_hf.captioning.steps.sentence_rating import _WORD, FUNCTION_WORDS, SentenceRating, clause_gaps, clauses
from mmft_hf.captioning.steps.settings import make_step
from mmft_hf.captioning.types import Request, Sampling
from mmft_hf.core.errors import UserError


def refined(text, gap_of, step=None):
    """The captions of an image, and the records; `gap_of`: of each word."""
    step, own = step or SentenceRating(), row(1, [text])

    def respond(asked: Ask):
        assert forced(asked) == text and rendered(asked) == "Describe this image."
        spans = [(*m.span(), m[0]) for m in _WORD.finditer(text)]
        return [(a, b, -5 + (gap_of(word) if asked.pictures else 0), 7.0) for a, b, word in spans]

    (records,) = step.apply([own], None, [answered(step.ask(own, None), respond)])
    return [r["text"] for r in records if r["status"] == "ok"], records


# -- planted ------------------------------------------------------------------------------------------------------------
def test_planted_clauses_are_cut_and_no_others():
    """Every choice of true clauses among five: all that is true stays, and nothing else."""
    parts = ["a dog", "with brown fur", "near a lamp", "on wet grass", "holding balls"]
    for chosen in itertools.product([True, False], repeat=5):
        true = {word for part, own in zip(parts, chosen, strict=True) if own for word in part.split()}
        kept, _ = refined(
            f"{', '.join(parts)}.", lambda word, true=true: 1.0 if word in true - FUNCTION_WORDS else -1.0
        )
        expected = ", ".join(part for part, own in zip(parts, chosen, strict=True) if own)
        expected = f"{expected}." if expected else f"{', '.join(parts)}."
        assert kept[0].lower() == expected.lower()


def test_a_function_word_saves_no_clause_and_one_content_word_does():
    gaps = {"with": 9.0, "hat": -0.1, "red": -3.0, "ball": 0.5}
    assert refined("a red ball, with hat.", lambda word: gaps.get(word, 0.0))[0] == ["A red ball."]
    # The mean of red and ball is below 0: a mean would have cut the first clause.
    assert sum(gaps[word] for word in ("red", "ball")) / 2 < 0


def test_a_sentence_that_loses_its_last_clause_still_ends():
    kept, records = refined(
        "A cat sits, asleep. It is 3.5 m long! Blue sky", lambda word: -1.0 if word in ("asleep", "long", "m") else 1.0
    )
    assert kept == ["A cat sits. It is 3.5 m long! Blue sky"]
    assert records[-1]["parents"] == ["a#0@caption"] and records[0]["status"] == "replaced"
    kept, _ = refined("One, two.\nthree, four?", lambda word: -1.0 if word in ("two", "three", "one") else 1.0)
    assert kept == ["Four?"]
    assert [c.end for c in clauses("a 3.5, b\nc d.")] == [",", "\n", "."]


def test_an_empty_result_keeps_the_original_with_its_gap():
    kept, (record,) = refined("a cat, a dog.", lambda word: -2.0 if word == "cat" else -1.0)
    assert kept == ["a cat, a dog."] and record["scores"] == [{"name": "gap", "value": -1.5}]
    assert refined("a cat, a dog.", lambda word: 0.4, SentenceRating(threshold=0.3))[0] == ["a cat, a dog."]
    assert refined("a cat, a dog.", lambda word: 0.4, SentenceRating(raw=True))[1][0]["scores"][0]["value"] == 0.0


def test_what_is_not_answered_changes_nothing():
    step, own = SentenceRating(), row(1, ["a cat.", "a dog."])
    found = answered(step.ask(own, None), lambda asked: None if asked.pictures else [])
    assert step.apply([own], None, [found]) == [list(own.records)]
    assert parsed(Ask("captioner", "x", (), "log_probs", ("y",)), "none") is None
    assert sum(step.bound(own, None).values()) == 4


def test_a_word_of_several_tokens_counts_with_the_largest():
    ((_, gap),) = clause_gaps("a hippo", [(0, 1, 9.0), (1, 4, -1.0), (4, 7, 2.0)])
    assert gap == 2.0


# -- with a model -------------------------------------------------------------------------------------------------------
def test_log_probabilities_of_a_given_text_are_those_of_the_model(vlm):
    processor = AutoProcessor.from_pretrained(vlm)
    model = AutoModelForImageTextToText.from_pretrained(vlm, dtype=torch.float32).eval()
    text = " red thing with stripes"
    tokens = processor.tokenizer(text, add_special_tokens=False).input_ids
    backend = TransformersBackend(str(vlm), sampling=Sampling(temperature=0))
    shown = (picture("red"),)
    requests = [Request(pictures, "Describe it.", 9, ("a",), forced=text) for pictures in (shown, ())]
    plain = Request(shown, "Describe it.", 5, ("a",))
    first, written, second = ask(backend, [requests[0], plain, requests[1]])
    assert written == ask(backend, [plain])[0]
    for answer, image in ((first, "<image>"), (second, "")):
        pictures = Image.open(io.BytesIO(shown[0].data)) if image else None
        inputs = processor(
            images=pictures,
            text=f"<s>user: {image}Describe it.\nassistant:",
            add_special_tokens=False,
            return_tensors="pt",
        )
        ids, width = inputs.pop("input_ids"), inputs["attention_mask"].shape[1]
        expected = []
        for n, token in enumerate(tokens):  # one position at a time
            whole = torch.cat([ids, torch.tensor([tokens[:n]], dtype=torch.long)], dim=1)
            inputs["attention_mask"] = torch.ones_like(whole)
            with torch.inference_mode():
                logits = model(input_ids=whole, **inputs).logits[0, -1].double()
            expected.append((logits.log_softmax(-1)[token].item(), logits[token].item()))
        found = parsed(Ask("captioner", "", (), "log_probs", (text,)), answer.text)
        assert np.allclose([token[2:] for token in found], expected, atol=1e-4)
        assert [text[int(a) : int(b)].strip() for a, b, *_ in found] == text.split()
        assert answer.tokens_in == width + len(tokens)
    assert json.loads(first.text) != json.loads(second.text)


def test_a_server_is_refused_before_any_call_and_keys_hold_the_text(vlm, tmp_path):
    with serving({}, tmp_path / "requests.jsonl") as server:
        roles = open_roles({"captioner": Captioner("openai", "m", base_url=f"{server.url}/v1")}, 1, None, 0.0, None)
        with pytest.raises(
            UserError, match=r"step 1 sentence_rating expected .*log-probabilities.*captioner transformers"
        ):
            check_features([make_step("sentence_rating", {})], roles)
        assert not server.requests()
    roles = open_roles({"captioner": Captioner("transformers", str(vlm))}, 1, None, 0.0, None)
    check_features([make_step("sentence_rating", {})], roles)
    keys = {
        roles["captioner"].key(Ask("captioner", "x", (), *form), "x", 0)
        for form in (("log_probs", ("a",)), ("log_probs", ("b",)), ("text",))
    }
    assert len(keys) == 3
