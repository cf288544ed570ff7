"""`AdaptedCLIP`: the image tower of any dual encoder behind vectors of texts, and the ridge start of its adaptor."""

import copy
import json

import numpy as np
import pytest
import tiny_encoders
import torch
import torch.nn.functional as F
from processes import run_python
from tiny_clip import colour_images
from transformers import AutoModel
from word_trunk import HashedWords

from mmft_hf.core.arguments import DataArguments
from mmft_hf.core.errors import UserError
from mmft_hf.data.labels import class_names_of
from mmft_hf.data.splits import load_splits
from mmft_hf.data.texts import class_prompt
from mmft_hf.data.views import TextView, text_rows
from mmft_hf.model.adapted_clip import AdaptedCLIP, AdaptedCLIPConfig
from mmft_hf.model.adapted_processor import AdaptedProcessor, TextTrunk
from mmft_hf.model.adapted_start import _untrained, ridge_start, with_text_trunk
from mmft_hf.model.collator import same_prompts, tokenize
from mmft_hf.model.features import Encoding, encode_text_batches, image_features
from mmft_hf.model.loading import encode_images, encode_texts, load_model, logit_scale
from mmft_hf.predict.heads import ClassPrototypes

TEXTS = ["a red thing", "a green thing", "something blue", "a blue thing", "no thing", "red and blue"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFT_HF_CACHE", str(tmp_path / "cache"))


def adapted(model, processor, size=24, texts=TEXTS) -> tuple[AdaptedCLIP, AdaptedProcessor]:
    return with_text_trunk(model, processor, TextTrunk(HashedWords(size)), texts, Encoding())


@pytest.mark.parametrize("kind", tiny_encoders.KINDS)
def test_images_and_scale_are_those_of_the_dual_encoder(kind, tmp_path):
    """Also after a round trip, by stock means and by ours."""
    torch.manual_seed(0)
    donor, processor = tiny_encoders.KINDS[kind]()
    pixels = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = encode_images(donor.eval(), pixels)
        model, own = adapted(donor, processor)
        assert torch.equal(encode_images(model.eval(), pixels), expected)
        torch.testing.assert_close(logit_scale(model), logit_scale(donor))
        texts = encode_texts(model, *tokenize(own, TEXTS)[0].values())
        model.save_pretrained(tmp_path)
        own.save_pretrained(tmp_path)
        loaded, found = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not found["missing_keys"] and not found["unexpected_keys"]
        ours, prepared = load_model(tmp_path)
        for one in (loaded, ours):
            assert isinstance(one, AdaptedCLIP)
            torch.testing.assert_close(encode_images(one.eval(), pixels), expected)
            vectors = {"text_vectors": own.trunk.vectors(TEXTS)}
            torch.testing.assert_close(encode_texts(one, **vectors), texts)
    picture = colour_images(1)[0][0]
    for name, value in own.image_processor(picture, return_tensors="pt").items():
        assert torch.equal(prepared.image_processor(picture, return_tensors="pt")[name], value)


def test_the_forward_gives_what_clip_gives(clip):
    model, processor = adapted(*copy.deepcopy(clip))
    pixels = torch.randn(6, 3, 16, 16)
    inputs = processor(text=TEXTS, images=[picture for picture, _ in colour_images(2)])
    assert set(inputs) == {"text_vectors", "pixel_values"} and inputs["text_vectors"].shape == (6, 24)
    found = model.eval()(inputs["text_vectors"], pixels, return_loss=True)
    images = F.normalize(model.visual_projection(model.vision_model(pixels).pooler_output), dim=-1)
    assert torch.equal(found.image_embeds, images)
    own = inputs["text_vectors"]
    for layer in model.text_model.layers:
        hidden = F.layer_norm(own, (24,), layer.norm.weight, layer.norm.bias)
        hidden = F.gelu(hidden @ layer.up.weight.T + layer.up.bias)
        own = own + hidden @ layer.down.weight.T + layer.down.bias
    texts = F.normalize(model.text_projection(own), dim=-1)
    torch.testing.assert_close(found.text_embeds, texts)
    cosines = (texts @ images.T).detach().double().numpy() * np.exp(model.logit_scale.item())
    assert np.allclose(found.logits_per_text.detach(), cosines, atol=1e-4)
    assert torch.equal(found.logits_per_image, found.logits_per_text.T)
    rows = [np.log(np.exp(cosines).sum(axis)) - np.diag(cosines) for axis in (0, 1)]
    assert found.loss.item() == pytest.approx(np.mean(rows), rel=1e-5)


def test_its_public_name_is_enough_for_the_auto_classes(clip, tmp_path):
    """In a fresh process, without anything else of this library."""
    adapted(*copy.deepcopy(clip))[0].save_pretrained(tmp_path)
    code = "import sys; from mmft_hf import AdaptedCLIP; from transformers import AutoModel; "
    code += "assert type(AutoModel.from_pretrained(sys.argv[1])) is AdaptedCLIP"
    run_python(["-c", code, tmp_path])


def test_size_of_the_adaptor():
    config = AdaptedCLIPConfig(
        text_config={"hidden_size": 40}, vision_config=tiny_encoders.clip()[0].config.vision_config
    )
    model = AdaptedCLIP(config)
    assert sum(p.numel() for p in model.text_model.parameters()) == 16 * 40**2 + 20 * 40


def test_vectors_of_another_size_and_token_ids_are_refused(clip):
    model, _ = adapted(*copy.deepcopy(clip))
    with pytest.raises(UserError, match=r"expected vectors \(texts, 24\).*found float32 of shape \(2, 25\)"):
        model.get_text_features(torch.zeros(2, 25))
    with pytest.raises(UserError, match=r"found int64 of shape \(2, 24\)"):
        model.get_text_features(torch.zeros(2, 24, dtype=torch.long))


def test_the_start_is_the_ridge_regression(clip):
    """Against numpy: least squares with rows added for the penalty, and a column for the constant, which has none."""
    model = _untrained(copy.deepcopy(clip[0]), 12)
    vectors, targets = torch.randn(40, 12), F.normalize(torch.randn(40, 32), dim=-1)
    ridge_start(model, lambda start: vectors[start:], targets, ridge=0.7)
    centred = vectors.numpy().astype(float) - vectors.numpy().mean(1, keepdims=True)
    read = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) / np.sqrt(12)
    rows = np.vstack([np.hstack([read, np.ones((40, 1))]), np.hstack([np.sqrt(0.7) * np.eye(12), np.zeros((12, 1))])])
    solution = np.linalg.lstsq(rows, np.vstack([targets.numpy(), np.zeros((12, 32))]), rcond=None)[0]
    expected = np.hstack([read, np.ones((40, 1))]) @ solution
    found = model.get_text_features(vectors).pooler_output.detach().numpy()
    assert np.allclose(found, expected, atol=1e-5)
    assert not any(layer.down.weight.any() for layer in model.text_model.layers)


@pytest.mark.slow
def test_the_start_keeps_the_accuracy_of_the_text_tower_and_a_random_adaptor_does_not():
    """On emoji-mini, prototypes of captions: at most 2 points below the text tower of tiny-clip. Chance is 4 %."""
    splits = load_splits(DataArguments(captions_column="text"))
    model, processor = load_model("builtin/tiny-clip")
    images, labels = image_features(model, processor, splits.test)
    rows = splits.train.select_columns(["label", "captions"])
    names = class_names_of(rows)
    texts = {text for row in text_rows(rows) for text in TextView(names).possible_texts(row)}
    start, own = adapted(model, processor, 768, texts | {class_prompt("a photo of a {}.", name) for name in names})

    def accuracy(model, processor) -> float:
        head = ClassPrototypes.from_captions(model, processor, rows)
        return (head.logits(images).argmax(dim=1) == labels).double().mean().item()

    torch.manual_seed(0)
    random = _untrained(model, 768)
    before, after = accuracy(model, processor), accuracy(start, own)
    assert before > 0.4 and after >= before - 0.02
    assert accuracy(random, own) < 0.12
    assert len(own.trunk._source.encoded) == len(texts | {class_prompt("a photo of a {}.", name) for name in names})


# -- the processor -----------------------------------------------------------------------------------------------------
def test_a_text_is_encoded_once():
    words = HashedWords(16)
    trunk = TextTrunk(words)
    first = trunk.vectors(["red", "blue", "red"])
    assert sorted(words.encoded) == ["blue", "red"] and torch.equal(first[0], first[2])
    again = trunk.vectors(["blue", "green"])
    assert words.encoded[2:] == ["green"] and torch.equal(again[0], first[1])
    assert torch.allclose(first[:2], HashedWords(16).encode(["red", "blue"]), atol=1e-3)


def test_the_same_vector_is_the_same_prompt(clip):
    """Hashed words know no order, and no letters in upper case."""
    _, processor = adapted(*copy.deepcopy(clip))
    assert same_prompts(processor, ["a b", "B A", "c"], "{}") == [["a b", "B A"]]


def test_the_caption_encoder_is_opened_once_for_all_batches(clip, monkeypatch):
    model, processor = adapted(*copy.deepcopy(clip))
    opened = []
    monkeypatch.setattr(processor.trunk, "open", lambda n, known=processor.trunk.open: opened.append(n) or known(n))
    texts = [f"number {i}" for i in range(7)]
    found = torch.cat([embeds for embeds, _ in encode_text_batches(model, processor, texts, batch_size=2)])
    assert opened == [7] and found.shape == (7, 32)


def test_another_caption_encoder_is_refused(clip, tmp_path):
    model, processor = adapted(*copy.deepcopy(clip))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    known = load_model(tmp_path)[1].trunk.known_as
    assert known == {"name": "hashed-words", "parameters": 1_500_000, "digest": known["digest"]}
    assert torch.equal(TextTrunk(HashedWords(24), known).vectors(TEXTS), processor.trunk.vectors(TEXTS))
    with pytest.raises(
        UserError, match="text trunk hashed-words: expected the caption encoder that the model was made with"
    ):
        TextTrunk(HashedWords(24, seed=1), known).vectors(TEXTS)


def test_a_model_without_its_trunk_says_what_new_texts_need(clip, tmp_path):
    model, processor = adapted(*copy.deepcopy(clip))
    model.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    loaded, prepared = load_model(tmp_path)
    assert encode_images(loaded, torch.zeros(1, 3, 16, 16)).shape == (1, 32)
    with pytest.raises(
        UserError, match=r"expected text_trunk/caption_encoder.json.*found none.*leave the new class names"
    ):
        prepared.trunk.vectors(["new"])


def test_saved_files_of_the_trunk_are_copied(clip, tmp_path):
    """A classifier that is loaded and saved elsewhere keeps its folder text_trunk, without opening the encoder."""
    model, processor = adapted(*copy.deepcopy(clip))
    model.save_pretrained(tmp_path / "one")
    processor.save_pretrained(tmp_path / "one")
    load_model(tmp_path / "one")[1].save_pretrained(tmp_path / "two")
    saved = json.loads((tmp_path / "two" / "text_trunk" / "caption_encoder.json").read_text())
    assert saved == json.loads(json.dumps(HashedWords(24).identity()))


@pytest.mark.slow
def test_the_embedded_photograph_model_is_a_dual_encoder_for_it():
    donor, processor = load_model("builtin/photo")
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = encode_images(donor.eval(), pixels)
        model, _ = adapted(donor, processor, 64)
        assert torch.equal(encode_images(model.eval(), pixels), expected)
