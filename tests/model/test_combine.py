"""Two towers from folders as one dual encoder: what is decided for the user, and what is refused."""

import json
import shutil

import pytest
import tiny_encoders
import torch
import transformers as hf
from transformers import AutoConfig, AutoImageProcessor, AutoModel, BaseImageProcessor, BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmft_hf import load_model
from mmft_hf.core.errors import UserError
from mmft_hf.model.combine import _timm_processor, combine_towers
from mmft_hf.model.loading import load_image_processor


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """An image tower and text towers, as folders."""
    top, tokenizer = tmp_path_factory.mktemp("towers"), tiny_encoders.word_pieces()
    settings = tiny_encoders.text(tokenizer)
    models = {
        "vit": hf.ViTModel(hf.ViTConfig(**tiny_encoders.VISION)),
        "bert": hf.BertModel(hf.BertConfig(**settings)),
        "gpt": hf.GPT2Model(hf.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=77)),
        "t5": hf.T5Model(
            hf.T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
    }
    for name, model in models.items():
        model.save_pretrained(top / name)
        tokenizer.save_pretrained(top / name)
    hf.ViTImageProcessor(size=tiny_encoders.SQUARE).save_pretrained(top / "vit")
    return top


def edited(folder, target, file="config.json", **changes):
    shutil.copytree(folder, target)
    content = json.loads((target / file).read_text()) | changes
    (target / file).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
    return target


def test_towers_of_dual_encoders_are_taken_out_of_them(towers):
    model, processor, notes = combine_towers("builtin/tiny-clip", towers / "bert")
    assert type(model.vision_model).__name__ == "CLIPVisionModel" and not notes
    assert processor.tokenizer.vocab_size == 133
    stock = load_model("builtin/tiny-clip")[0].vision_model.state_dict()
    assert all(torch.equal(stock[name], value) for name, value in model.vision_model.state_dict().items())


def test_what_sentence_transformers_says_is_used_and_noted(towers, tmp_path):
    folder = shutil.copytree(towers / "bert", tmp_path / "sentences")
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    (folder / "modules.json").write_text(json.dumps([{"path": path, "type": f"x.{kind}"} for path, kind in modules]))
    (folder / "1_Pooling").mkdir()
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 33}')
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    model, processor, notes = combine_towers(towers / "vit", folder)
    assert (model.config.text_pooling, processor.tokenizer.model_max_length) == ("last", 33)
    assert "(Dense)" in notes[0] and "takes the last token, as of a language model: --text_pooling last" in notes[1]
    model, _, notes = combine_towers(towers / "vit", folder, "mean")
    assert model.config.text_pooling == "mean" and len(notes) == 1
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    model, _, notes = combine_towers(towers / "vit", folder)
    assert (
        not hasattr(model.config, "text_pooling")
        and "its pooling (max_tokens) is none of mean, first, last" in notes[1]
    )


def test_a_language_model_needs_a_pooling(towers):
    with pytest.raises(
        UserError, match=r"found neither: a GPT2Model .* Type text_pooling mean .* last \(language models\)"
    ):
        combine_towers(towers / "vit", towers / "gpt")
    model, processor, _ = combine_towers(towers / "vit", towers / "gpt", "last")
    tokens = processor.tokenizer(["a b", "c"], padding=True, return_tensors="pt")
    features = model.get_text_features(**{k: tokens[k] for k in ("input_ids", "attention_mask")}).pooler_output
    assert features.shape == (2, 512)


def test_missing_weights_are_noted(towers, tmp_path):
    bare = hf.BertModel(hf.BertConfig(**tiny_encoders.text(tiny_encoders.word_pieces())), add_pooling_layer=False)
    folder = shutil.copytree(towers / "bert", tmp_path / "bare")
    bare.save_pretrained(folder)
    notes = combine_towers(towers / "vit", folder)[2]
    assert (
        len(notes) == 1
        and "no weights for 2 of the tower's parameters, which are random: pooler.dense.bias, …" in notes[0]
    )


@pytest.mark.parametrize(
    ("vision", "text", "pooling", "said"),
    [
        ("vit", "t5", None, r"text_model .*T5Model, which fails at a first one"),
        ("vit", "t5", "mean", r"text_model .*T5Model, which fails at a first one"),
        ("vit", "bert", "max", r"text_pooling: expected one of mean, first, last, found 'max'"),
        ("bert", "bert", None, r"expected a model of pictures, found a BertModel\. Is it the text_model\?"),
        ("vit", "vit", None, r"expected a model of texts, found a ViTModel\. Is it the vision_model\?"),
    ],
)
def test_towers_that_cannot_be_used_are_refused(vision, text, pooling, said, towers):
    with pytest.raises(UserError, match=said):
        combine_towers(towers / vision, towers / text, pooling)


def test_missing_files_are_named(towers, tmp_path):
    folder = shutil.copytree(towers / "vit", tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"expected a preprocessor_config\.json .*CLIPImageProcessor\("):
        combine_towers(folder, towers / "bert")
    proportions = edited(towers / "vit", tmp_path / "sizes", "preprocessor_config.json", size={"shortest_edge": 16})
    with pytest.raises(UserError, match=r"gives all pictures one size, found size \{'shortest_edge': 16\}"):
        combine_towers(proportions, towers / "bert")
    with pytest.raises(UserError, match=r"expected a tokenizer of 200 tokens, .* found 133"):
        wide = hf.BertModel(hf.BertConfig(**tiny_encoders.text(tiny_encoders.word_pieces(), vocab_size=200)))
        folder = shutil.copytree(towers / "bert", tmp_path / "wide")
        wide.save_pretrained(folder)
        combine_towers(towers / "vit", folder)


# -- kinds and processors that transformers does not know ------------------------------------------------------------------


def test_an_unknown_kind_is_named_with_its_nearest_alone(towers, tmp_path):
    with pytest.raises(UserError) as refused:
        combine_towers(edited(towers / "vit", tmp_path / "own", model_type="convnextt"), towers / "bert")
    message = str(refused.value)
    assert "found 'convnextt'. Did you mean 'convnext'?" in message and "AutoConfig.register" in message
    assert len(message) < 600
    dual = tiny_encoders.save("vit_bert", tmp_path / "dual")
    config = json.loads((dual / "config.json").read_text())
    own = edited(dual, tmp_path / "dual own", vision_config=config["vision_config"] | {"model_type": "my-tower"})
    with pytest.raises(UserError, match=r"vision_config\.model_type: .* found 'my-tower'") as refused:
        load_model(str(own))
    assert len(str(refused.value)) < 600


class OwnConfig(hf.PreTrainedConfig):
    model_type = "mmft-test-own"
    channels: int = 8


class OwnModel(hf.PreTrainedModel):
    config_class, main_input_name, base_model_prefix = OwnConfig, "pixel_values", "own"

    def __init__(self, config):
        super().__init__(config)
        self.convolution = torch.nn.Conv2d(3, config.channels, 4, stride=4)
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        hidden = self.convolution(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden.mean(dim=(2, 3)))


def test_own_classes_work_once_they_are_registered(towers, tmp_path):
    folder = tmp_path / "own"
    OwnModel(OwnConfig()).save_pretrained(folder)
    hf.ViTImageProcessor(size=tiny_encoders.SQUARE).save_pretrained(folder)
    with pytest.raises(UserError, match="found 'mmft-test-own'"):
        combine_towers(folder, towers / "bert")
    AutoConfig.register("mmft-test-own", OwnConfig)
    with pytest.raises(UserError, match="expected a model that transformers") as refused:
        combine_towers(folder, towers / "bert")
    assert len(str(refused.value)) < 600  # it would name all classes that there are
    AutoModel.register(OwnConfig, OwnModel)
    model, processor, notes = combine_towers(folder, towers / "bert")
    assert model.config.vision_config.hidden_size == 8 and not notes
    model.save_pretrained(tmp_path / "both")
    processor.save_pretrained(tmp_path / "both")
    again = load_model(str(tmp_path / "both"))[0]
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())


class OwnImageProcessor(BaseImageProcessor):
    """As timm's: without sizes, and with a setting that must be there."""

    def __init__(self, pretrained_cfg, **kwargs):
        super().__init__(**kwargs)

    def __call__(self, images, **kwargs):
        return BatchFeature({"pixel_values": torch.zeros(1, 3, 16, 16)})


def test_an_image_processor_of_another_library_says_what_to_write(tmp_path):
    AutoImageProcessor.register(OwnConfig, OwnImageProcessor, exist_ok=True)
    dual = tiny_encoders.save("vit_bert", tmp_path / "dual")
    path = dual / "processor_config.json"
    settings = json.loads(path.read_text())
    for more in ({}, {"pretrained_cfg": {}}):
        settings["image_processor"] = {"image_processor_type": "OwnImageProcessor", **more}
        path.write_text(json.dumps(settings))
        with pytest.raises(UserError, match=r"expected one of transformers' own, with a size, .*CLIPImageProcessor\("):
            load_model(str(dual))


def test_timm_s_settings_become_a_processor_of_transformers(towers):
    config = hf.PreTrainedConfig()
    config.pretrained_cfg = {
        "input_size": [3, 20, 24],
        "crop_pct": 0.5,
        "interpolation": "bilinear",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    }
    found = _timm_processor(config)
    assert dict(found.size) == {"shortest_edge": 40} and dict(found.crop_size) == {"height": 20, "width": 24}
    assert (found.resample, list(found.image_mean), list(found.image_std)) == (2, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert type(found) is type(
        load_image_processor("builtin/tiny-clip".replace("builtin/", "mmft_hf/assets/").replace("-", "_"))
    )
