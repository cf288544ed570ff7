"""Captions beyond the token limit: read in parts, or by a stretched text tower, which stays a stock model."""

import copy
from itertools import pairwise

import long_captions
import numpy as np
import pytest
import tiny_encoders
import torch
import torch.nn.functional as F
from tiny_clip import colour_dataset
from transformers import CLIPModel, CLIPProcessor
from word_trunk import HashedWords

from mmft_hf import ClassPrototypes
from mmft_hf.core.errors import UserError
from mmft_hf.data.texts import class_prompt
from mmft_hf.data.views import TextView
from mmft_hf.model.adapted_processor import AdaptedProcessor, TextTrunk
from mmft_hf.model.collator import tokenize
from mmft_hf.model.features import image_features
from mmft_hf.model.long_captions import Windows, share_cut, stretched, stretched_positions
from mmft_hf.predict.fitting.data import head_data

LONG = (
    "It stands on a table. It is red and round. The light comes from the left. Behind it are two chairs and a window."
)


# -- windows -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", tiny_encoders.KINDS)
def test_each_part_is_read_whole_after_the_class_prompt(kind):
    torch.manual_seed(0)
    _, processor = tiny_encoders.KINDS[kind]()
    processor.tokenizer.model_max_length = limit = min(processor.tokenizer.model_max_length, 48)
    caption = " ".join([LONG] * 4)
    windows, prompt = Windows(processor), class_prompt("a photo of a {}.", "red thing")
    parts = windows(prompt, caption)
    assert len(parts) > 1 and " ".join(parts) == caption
    assert not tokenize(processor, [f"{prompt} {part}" for part in parts])[1].any()
    assert share_cut(processor, [f"{prompt} {caption}", *parts[:3]]) == 0.25
    # As many as fit: no part would have room for the first word of the next one.
    for part, after in pairwise(parts):
        whole = after.split(". ")[0] if part.endswith(".") else after.split()[0]
        text = f"{prompt} {part} {whole}"
        assert (
            len(processor.tokenizer(text.lower() if kind == "siglip" else text)["input_ids"]) > limit
            or "." not in after
        )
    assert windows(prompt, "short") == ("short",)


def test_a_prompt_that_fills_the_tower_leaves_the_caption_as_it_is(clip):
    prompt = "a photo of a " + "very " * 20 + "red thing."
    assert Windows(clip[1])(prompt, LONG) == (LONG,)


def test_a_caption_encoder_has_no_need_of_parts(clip):
    processor = AdaptedProcessor(clip[1].image_processor, TextTrunk(HashedWords(8)))
    with pytest.raises(UserError, match="long_captions: expected cut with a caption encoder"):
        Windows(processor)
    assert share_cut(processor, [LONG * 9]) == 0


def row_of(*captions) -> dict:
    return {"label": 0, "captions": list(captions)}


def test_one_part_is_drawn_and_no_other_draw_moves(clip):
    row, crop = row_of(LONG, "short", LONG.upper()), lambda rng: tuple(rng.integers(1000, size=2))
    whole = TextView(["red thing"], ("a {}.", "one {}."), 0.2, seed=5)
    parts = TextView(["red thing"], ("a {}.", "one {}."), 0.2, seed=5, windows=Windows(clip[1]))
    possible, counts = set(parts.possible_texts(row)), {}
    for epoch in range(1500):
        (before, box, weight), found = whole.draw(row, epoch, 3, crop), parts.draw(row, epoch, 3, crop)
        assert found[1:] == (box, weight) and found[0] in possible
        own = [text for text in parts.caption_texts(row) if found[0] in text]
        if len(own) == 1 and len(own[0]) > 1:
            assert " ".join([own[0][0], *(text.split(". ", 1)[1] for text in own[0][1:])]) == before
            counts.setdefault(own[0], []).append(own[0].index(found[0]))
        else:
            assert found[0] == before
    assert len(counts) == 4  # two captions after two templates
    for drawn in counts.values():  # evenly: within 4 standard deviations
        n, parts_drawn = len(drawn), np.bincount(drawn)
        assert np.abs(parts_drawn - n / len(parts_drawn)).max() < 4 * np.sqrt(n / len(parts_drawn)), parts_drawn


def test_prototypes_and_heads_count_each_caption_once(clip):
    """Against plain loops: two captions of a class, one of them in parts."""
    longest = f"{LONG} It casts a shadow."
    data = colour_dataset(1).remove_columns("captions")
    data = data.add_column("captions", [[longest, "very red", longest], ["green"], []])
    model, processor = clip
    with torch.no_grad():

        def embed(caption, name):
            prompt = class_prompt("a photo of a {}.", name)
            texts = [f"{prompt} {part}" for part in Windows(processor)(prompt, caption)]
            return F.normalize(encode(texts), dim=-1)

        def encode(texts):
            return torch.cat(
                [
                    model.get_text_features(**processor.tokenizer([text], return_tensors="pt")).pooler_output
                    for text in texts
                ]
            )

        parts = embed(longest, "red thing")
        assert len(parts) > 2
        means = torch.stack([parts.mean(0), embed("very red", "red thing")[0], parts.mean(0)])
        found = ClassPrototypes.from_captions(model, processor, data, long_captions="windows")
        torch.testing.assert_close(found.embeddings[0], F.normalize(means.mean(0), dim=0), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.embeddings[1], embed("green", "green thing")[0], atol=1e-5, rtol=0)
        assert found.fallback_classes == ("blue thing",)
        heads = head_data(model, processor, data, found, long_captions="windows")
        assert heads.caption_labels.sort().values.tolist() == [0, 0, 1]  # different ones alone
        expected = torch.stack([F.normalize(parts.sum(0), dim=0), embed("very red", "red thing")[0]])
        torch.testing.assert_close(heads.captions[heads.caption_labels == 0], expected, atol=1e-5, rtol=0)


def accuracy(clip, long: str, say=long_captions.fact) -> float:
    """By prototypes of captions, on average over all colours that a kind can have, so that what does not know them is at chance."""
    found = []
    for shift in range(3):
        prototypes = ClassPrototypes.from_captions(
            *clip, long_captions.planted(2, shift=shift, say=say), long_captions=long
        )
        images, labels = image_features(*clip, long_captions.planted(10, seed=3, shift=shift))
        found.append((prototypes.logits(images).argmax(1) == labels).double().mean())
    return np.mean(found)


def test_a_fact_behind_filler_is_found_in_parts_alone(tmp_path, monkeypatch):
    """The control: parts without the fact know nothing either."""
    monkeypatch.setenv("MMFT_HF_CACHE", str(tmp_path))
    knowing = long_captions.knows_colours()
    assert len(knowing[1].tokenizer(long_captions.FILLER)["input_ids"]) > 80
    assert accuracy(knowing, "windows") >= 0.9
    assert accuracy(knowing, "cut") == pytest.approx(1 / 3)
    assert accuracy(knowing, "windows", lambda _: "It is old.") == pytest.approx(1 / 3)


# -- stretch -----------------------------------------------------------------------------------------------------------
def test_positions_against_interpolation_by_numpy():
    positions = torch.randn(77, 5, dtype=torch.float64)
    found = stretched_positions(positions).numpy()
    assert found.shape == (248, 5) and np.array_equal(found[:20], positions[:20])
    longer = np.vstack([positions, 2 * positions[-1:] - positions[-2:-1]])
    for column in range(5):
        expected = np.interp(20 + np.arange(228) / 4, np.arange(78), longer[:, column])
        np.testing.assert_allclose(found[20:, column], expected, atol=1e-12)


@pytest.mark.parametrize("kind", ["clip", "metaclip_2"])
def test_a_stretched_model_is_a_stock_one_that_reads_more(kind, tmp_path):
    torch.manual_seed(0)
    model, processor = tiny_encoders.KINDS[kind]()
    limit = model.config.text_config.max_position_embeddings
    processor.tokenizer.model_max_length = limit
    before = {name: value.clone() for name, value in model.state_dict().items()}
    longer, own = stretched(model.eval(), processor)
    assert (type(longer), type(own)) == (type(model), type(processor)) and not longer.training
    assert longer.config.text_config.max_position_embeddings == own.tokenizer.model_max_length == 4 * limit - 60
    assert model.config.text_config.max_position_embeddings == processor.tokenizer.model_max_length == limit
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    changed = {n for n, value in longer.state_dict().items() if value.shape != before[n].shape}
    assert changed == {"text_model.embeddings.position_embedding.weight"}
    assert longer.text_model.embeddings.position_embedding.weight.requires_grad

    short, long = ["red", "a red one"], [LONG, LONG[:70]]
    with torch.no_grad():
        for texts, same in ((short, True), (long, False)):
            tokens, cut = tokenize(own, texts)
            assert not cut.any() and (tokens["attention_mask"].sum(1) <= 20).all() == same
            fewer, were_cut = tokenize(processor, texts)
            assert were_cut[0] != same
            found = longer.get_text_features(**tokens).pooler_output
            difference = (found - model.get_text_features(**fewer).pooler_output).abs().max().item()
            assert difference < 1e-5 if same else difference > 1e-3

    longer.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    plain, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    read = CLIPProcessor.from_pretrained(tmp_path)(text=[LONG], return_tensors="pt", truncation=True)
    assert read["input_ids"].shape[1] == tokenize(own, [LONG])[0]["input_ids"].shape[1] > limit
    with torch.no_grad():
        found = plain.eval().get_text_features(**read).pooler_output
        torch.testing.assert_close(found, longer.get_text_features(**tokenize(own, [LONG])[0]).pooler_output)
    if kind == "clip":
        assert isinstance(plain, CLIPModel)


@pytest.mark.parametrize("kind", ["siglip", "chinese_clip", "altclip", "align", "vit_bert", "clip_roberta"])
def test_other_positions_are_refused(kind):
    torch.manual_seed(0)
    with pytest.raises(
        UserError, match=r"expected stretch with learned positions of CLIP, MetaCLIP 2, .* long_captions windows"
    ):
        stretched(*tiny_encoders.KINDS[kind]())


def test_a_model_is_stretched_once(clip):
    longer = stretched(*copy.deepcopy(clip))
    with pytest.raises(UserError, match="expected stretch with a text tower of about 77 tokens, found one of 248"):
        stretched(*longer)
