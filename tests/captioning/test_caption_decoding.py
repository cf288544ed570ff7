"""Decoding: diverse beams and guidance, on chains whose texts are known, then with a model in this process."""

import functools
import io
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor
from vlm_requests import LONG, ask, picture, request

from mmft_hf.captioning.ask.backends.beams import diverse_beams
from mmft_hf.captioning.ask.backends.transformers import TransformersBackend
from mmft_hf.captioning.ask.captioner import Captioner
from mmft_hf.captioning.types import Decoding, Request, Sampling
from mmft_hf.core.errors import UserError

A, B, C, E = range(4)
CHAIN = {(): [0.5, 0.3, 0.2, 0], A: [0.1, 0.4, 0.3, 0.2], B: [0.3, 0.1, 0.2, 0.4], C: [0.2, 0.2, 0.1, 0.5]}


def chain(prefixes):
    with np.errstate(divide="ignore"):
        return np.log([CHAIN[prefix[-1] if prefix else ()] for prefix in prefixes])


def names(beam) -> str:
    return "".join("ABCE"[token] for token in beam.tokens)


# -- the search ---------------------------------------------------------------------------------------------------------
def test_groups_avoid_each_others_tokens():
    """By hand: at λ .5 the second group still starts with A, the third takes B, the fourth C."""
    found = diverse_beams(chain, 4, 4, 0.5, {E}, 4)
    assert [[names(beam) for beam in group] for group in found] == [["ABE"], ["ACE"], ["BE"], ["CE"]]
    assert np.allclose([group[0].log_prob for group in found], [-2.526, -2.590, -2.120, -2.303], atol=5e-4)
    found = diverse_beams(chain, 4, 4, 1.0, {E}, 4)
    assert [names(group[0]) for group in found] == ["ABE", "BE", "CABE", "ACAB"]


def test_without_a_penalty_all_groups_are_the_same():
    found = diverse_beams(chain, 4, 2, 0.0, {E}, 4)
    assert [[names(beam) for beam in group] for group in found] == [["ABE", "ACE"]] * 2


def test_one_group_with_all_beams_finds_the_likeliest_text():
    """With a beam for every prefix it is an exhaustive search."""
    texts = {}
    for length in range(1, 5):
        for tokens in itertools.product(range(4), repeat=length):
            if E not in tokens[:-1] and (tokens[-1] == E or length == 4):
                texts[tokens] = sum(chain([tokens[:i]])[0, token] for i, token in enumerate(tokens))
    (found,) = diverse_beams(chain, 256, 1, 0.5, {E}, 4)
    best = sorted(texts.items(), key=lambda item: (-item[1], item[0]))
    assert [beam.tokens for beam in found[:40]] == [tokens for tokens, _ in best[:40]]
    assert np.allclose([beam.log_prob for beam in found[:40]], [value for _, value in best[:40]])


def test_a_text_that_does_not_end_is_cut_off_and_an_impossible_token_is_never_taken():
    (found,) = diverse_beams(chain, 1, 1, 0.0, (), 3)
    assert names(found[0]) == "ABE" and not found[0].ended
    (found,) = diverse_beams(lambda prefixes: np.full((len(prefixes), 3), -np.inf), 2, 1, 0.0, (), 3)
    assert [beam.tokens for beam in found] == [()]


# -- with a model -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def plain(vlm):
    """Log-probabilities of the next token after a prompt and tokens, of the whole sequence at once; with a picture or without."""
    processor = AutoProcessor.from_pretrained(vlm)
    model = AutoModelForImageTextToText.from_pretrained(vlm, dtype=torch.float32).eval()
    never = model.generation_config.suppress_tokens

    @torch.inference_mode()
    def log_probs(prompt: str, tokens, colour: str | None = "red"):
        image = None if colour is None else Image.open(io.BytesIO(picture(colour).data))
        text = f"<s>user: {'<image>' if image else ''}{prompt}\nassistant:"
        inputs = processor(images=image, text=text, add_special_tokens=False, return_tensors="pt")
        ids = torch.cat([inputs.pop("input_ids"), torch.tensor([tokens], dtype=torch.long)], dim=1)
        inputs["attention_mask"] = torch.ones_like(ids)
        return model(input_ids=ids, **inputs).logits[0, -1].double()

    return log_probs, never, processor.tokenizer


def masked(logits, never):
    logits = logits.clone()
    logits[never] = -torch.inf
    return logits.log_softmax(dim=-1)


def beams(**decoding) -> Sampling:
    return Sampling(decoding=Decoding(**decoding))


def test_beams_of_a_model_are_those_of_its_log_probabilities(vlm, plain):
    log_probs, never, tokenizer = plain

    def chain(prefixes):
        return np.stack([masked(log_probs("Colour?", prefix), never).numpy() for prefix in prefixes])

    expected = diverse_beams(chain, 6, 3, 2.0, {tokenizer.eos_token_id}, 5)
    wanted = [tokenizer.decode(group[0].tokens, skip_special_tokens=True) for group in expected]
    backend = TransformersBackend(str(vlm), sampling=beams(beams=6, groups=3, diversity=2.0))
    rows = [Request((picture("red"),), "Colour?", 5, ("visual",), 0, sample) for sample in range(3)]
    assert [answer.text for answer in ask(backend, rows)] == wanted and len({*wanted}) == 3
    assert ask(backend, rows[2:])[0].text == wanted[2]


def test_all_groups_are_searched_once(vlm, monkeypatch):
    real, sizes = LlavaForConditionalGeneration.generate, []

    def generate(model, *args, **inputs):
        sizes.append(tuple(inputs["input_ids"].shape))
        return real(model, *args, **inputs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", generate)
    backend = TransformersBackend(str(vlm), sampling=beams(beams=4, groups=2))
    found = ask(backend, [Request((picture("red"),), "Colour?", 3, ("a",), 7 + k, k) for k in range(2)])
    assert len(sizes) == 3 and max(n for n, _ in sizes) <= 4
    assert [length - sizes[0][1] for _, length in sizes] == [0, 1, 2]
    assert all(answer.tokens_out <= 3 and answer.tokens_in == sizes[0][1] for answer in found)


def test_one_beam_is_greedy(vlm):
    rows = [request("red", "Describe it.", 8), request("blue", LONG, 4)]
    greedy = ask(TransformersBackend(str(vlm), sampling=Sampling(temperature=0)), rows)
    assert ask(TransformersBackend(str(vlm), sampling=beams(beams=1)), rows) == greedy


def test_guidance_follows_its_formula_and_shows_the_empty_branch_no_pixels(vlm, plain, monkeypatch):
    log_probs, never, tokenizer = plain
    tokens, gamma = [], 2.0
    for _ in range(6):
        without = log_probs("Colour?", tokens, None).log_softmax(dim=-1)
        mixed = without + gamma * (log_probs("Colour?", tokens).log_softmax(dim=-1) - without)
        tokens.append(int(masked(mixed, never).argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    real, pixels = LlavaForConditionalGeneration.forward, []

    @functools.wraps(real)  # generate looks at its signature
    def forward(model, *args, **inputs):
        # Newer versions of transformers encode the picture beforehand.
        pixels.append(any(inputs.get(name) is not None for name in ("pixel_values", "mm_encoder_outputs")))
        return real(model, *args, **inputs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", forward)
    row = request("red", "Colour?", 6)
    guided = Sampling(temperature=0, decoding=Decoding(guidance=gamma))
    (answer,) = ask(TransformersBackend(str(vlm), sampling=guided), [row])
    assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert pixels[:2] == [True, False] and sum(pixels) == 1  # the first of each branch, then cached ones
    other = request("blue", LONG, 6)
    both = ask(TransformersBackend(str(vlm), sampling=guided), [row, other])
    assert both[0].text == answer.text
    plain_answer = ask(TransformersBackend(str(vlm), sampling=Sampling(temperature=0)), [row])
    assert plain_answer[0].text != answer.text
    assert (
        ask(TransformersBackend(str(vlm), sampling=Sampling(temperature=0, decoding=Decoding(guidance=1))), [row])
        == plain_answer
    )
    # Beams are guided, too: one beam is the greedy text.
    assert ask(TransformersBackend(str(vlm), sampling=beams(beams=1, guidance=gamma)), [row])[0].text == answer.text


@pytest.mark.parametrize(("gamma", "expected"), [(1, [0.6652, 0.2447, 0.0900]), (2, [0.9503, 0.0473, 0.0024])])
def test_guided_log_probabilities_of_three_tokens(gamma, expected):
    class Empty:
        def __call__(self, *args, **inputs):
            return type("Output", (dict,), {"logits": torch.tensor([[[0.0, 1.0, 2.0]]])})()

    guide = UnbatchedClassifierFreeGuidanceLogitsProcessor(gamma, Empty())
    found = guide(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[2.0, 1.0, 0.0]])).softmax(dim=-1)
    assert np.allclose(found[0], expected, atol=5e-5)


# -- keys and refusals --------------------------------------------------------------------------------------------------
def test_decoding_is_part_of_the_key_only_where_it_is_set():
    assert json.dumps(Sampling(decoding=Decoding(guidance=1, diversity=0.1)).spec()) == json.dumps(Sampling().spec())
    assert Sampling().spec() == {"temperature": 0.2, "seed": 0, "options": {}}
    specs = [Decoding(**own).spec() for own in ({"beams": 4}, {"beams": 4, "groups": 2}, {"guidance": 2}, {"beams": 1})]
    assert len({json.dumps(spec) for spec in specs}) == 4
    assert Sampling(decoding=Decoding(guidance=2)).spec()["decoding"] == {"guidance": 2.0}


@pytest.mark.parametrize(("options", "message"), [
    ({"beam": 3}, "found 'beam'. Did you mean 'beams'"),
    ({"beams": 3, "groups": 2}, "a multiple of groups, found beams 3 and groups 2"),
    ({"beams": 0}, "a multiple of groups"),
    ({"groups": 2}, "Write beams: 2"),
    ({"beams": "3"}, "beams: expected a whole number, found '3'"),
    ({"guidance": True}, "guidance: expected a number, found True"),
    ({"guidance": float("nan")}, "guidance: expected a number"),
    ({"guidance": 0}, "guidance above 0"),
    ({"beams": 1, "diversity": -1}, "diversity from 0 on"),
])  # fmt: skip
def test_decoding_out_of_range_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Decoding.of(options)


def test_who_cannot_decode_so_is_refused_before_any_call(vlm, tmp_path):
    with pytest.raises(UserError, match=r"expected captioner transformers, found openai.*samples 3"):
        Captioner("openai", "m", sampling=beams(beams=2))
    with pytest.raises(UserError, match=r"Type samples 3"):
        Captioner("transformers", "m", sampling=beams(beams=6, groups=3))
    with pytest.raises(UserError, match=r"temperature: expected none with beams"):
        Captioner("transformers", "m", sampling=Sampling(temperature=1, decoding=Decoding(beams=1)))
    config = json.loads((vlm / "config.json").read_text())
    for file in vlm.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llava_next"}))
    with pytest.raises(UserError, match=r"tested to write without its picture \(llava\).*llava_next"):
        TransformersBackend(str(tmp_path), sampling=Sampling(decoding=Decoding(guidance=2))).identity()
