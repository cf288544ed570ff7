"""Convolutional image towers: LoRA, batch norms, configurations without `hidden_size`, pooled outputs of one pixel."""

import pytest
import tiny_encoders
import torch
import transformers as hf
from torch import nn
from training import changed, make_trainer, weights

from mmft_hf import load_model, set_towers
from mmft_hf.core.errors import UserError
from mmft_hf.model.combine import combine_towers
from mmft_hf.model.loading import encode_images
from mmft_hf.model.towers import lora_layers, merge

KINDS = tiny_encoders.CONVOLUTIONAL


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("bert"), tiny_encoders.word_pieces()
    torch.manual_seed(0)
    hf.BertModel(hf.BertConfig(**tiny_encoders.text(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def _folders(tmp_path_factory):
    """The image towers, as folders that their makers could have published."""
    found = {}
    for kind, (config, _, _) in KINDS.items():
        torch.manual_seed(0)
        tower = hf.AutoModel.from_config(config)
        for layer in tower.modules():  # as after a training; at first pictures hardly differ
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(std=0.1)
                for values in (layer.running_var, layer.weight.data):
                    values.uniform_(0.5, 2)
        found[kind] = tmp_path_factory.mktemp(kind)
        tower.save_pretrained(found[kind])
        hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(found[kind])
    return found


@pytest.fixture(scope="module")
def _pairs(_folders, text_tower, tmp_path_factory):
    found = {}
    for kind, folder in _folders.items():
        model, processor, notes = combine_towers(folder, text_tower, projection_dim=12)
        assert not notes and model.config.vision_config.hidden_size == KINDS[kind][1]
        path = tmp_path_factory.mktemp(f"{kind} and bert")
        model.save_pretrained(path)
        processor.save_pretrained(path)
        found[kind] = (model, path)
    return found


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def pixels(n=5):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_two_folders_become_one_that_opens(kind, _folders, _pairs):
    combined, path = _pairs[kind]
    model, _ = load_model(str(path))
    assert not changed(weights(model), weights(combined))
    tower = hf.AutoModel.from_pretrained(_folders[kind]).eval()
    pooled = tower(pixel_values=pixels()).pooler_output.flatten(1)
    expected = nn.functional.normalize(pooled @ model.visual_projection.weight.T, dim=-1)
    torch.testing.assert_close(encode_images(model.eval(), pixels()), expected, atol=1e-5, rtol=0)
    assert pooled.std(dim=0).max() > 1e-3  # the pictures differ


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("resnet", "full"),
        ("resnet", "lora"),
        pytest.param("efficientnet", "full", marks=pytest.mark.slow),
        pytest.param("efficientnet", "lora", marks=pytest.mark.slow),
        pytest.param("convnext", "lora", marks=pytest.mark.slow),
    ],
)
def test_it_is_trained_merged_and_saved(kind, mode, _pairs, tmp_path):
    model, processor = load_model(str(_pairs[kind][1]))
    torch.manual_seed(0)
    set_towers(model, mode, "frozen")
    layers = {type(layer.get_base_layer()) for layer in lora_layers(model).values()}
    assert layers == ({nn.Conv2d if KINDS[kind][2] else nn.Linear} if mode == "lora" else set())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    before = weights(model)
    settings = {"max_steps": 2, "learning_rate": 1e-2, "loss_chunk_size": 3, "crop_min_area": 1.0}
    trainer = make_trainer((model, processor), tmp_path / "run", evaluate=False, **settings)
    trainer.train()
    moved = changed(before, weights(model))
    assert moved <= trained and "logit_scale" in moved  # so no statistic of a batch norm
    assert len(moved) > 0.8 * len(trained)
    trainer.save_model(str(tmp_path / "saved"))
    with torch.no_grad():
        expected = encode_images(model.eval(), pixels())
        torch.testing.assert_close(encode_images(load_model(str(tmp_path / "saved"))[0].eval(), pixels()), expected, atol=1e-5, rtol=0)  # fmt: skip
        if mode == "lora":
            merge(model)
            torch.testing.assert_close(encode_images(model, pixels()), expected, atol=1e-5, rtol=0)


def test_a_frozen_tower_with_batch_norms_is_encoded_once_and_stays_as_it_is(_pairs, tmp_path, capsys):
    """With the cache or without it: the same weights."""
    found = []
    for on in (True, False):
        model, processor = load_model(str(_pairs["resnet"][1]))
        torch.manual_seed(0)
        set_towers(model, "frozen", "full")
        before = weights(model)
        settings = {"max_steps": 2, "crop_min_area": 1.0, "cache_frozen_features": on}
        make_trainer((model, processor), tmp_path / str(on), evaluate=False, **settings).train()
        found.append(weights(model))
        assert not any(name.startswith("vision_model.") for name in changed(before, found[-1]))
        assert ("Frozen vision tower: 24 training images encoded once" in capsys.readouterr().out) == on
    for name, value in found[0].items():
        if name.endswith("key.bias"):  # its gradient is rounding alone
            continue
        torch.testing.assert_close(value, found[1][name], atol=1e-5, rtol=0)


def test_gradient_checkpointing_says_what_to_type_instead(_pairs, tmp_path):
    model, processor = load_model(str(_pairs["resnet"][1]))
    with pytest.raises(UserError, match=r"_checkpointing: .* found a VisionTextDualEncoderModel. Type loss_chunk_size"):
        make_trainer((model, processor), tmp_path, gradient_checkpointing=True)
