"""Every kind of dual encoder through the same contract: loading, encoding, training, saving, the command line, the card."""

import copy
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import tiny_encoders
import torch
import transformers as hf
from card_tools import execute, snippets
from peft import PeftModel
from tiny_clip import colour_dataset, colour_images
from torch import nn
from training import changed, make_trainer, weights
from transformers import AutoModel, AutoProcessor, pipeline

from mmft_hf import ClassPrototypes, MMFTDataCollator, MMFTLoss, load_model, set_towers
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.hub.publish import model_files
from mmft_hf.model.adapted_clip import MODEL_TYPE
from mmft_hf.model.collator import tokenize
from mmft_hf.model.families import FAMILIES
from mmft_hf.model.loading import (
    embedding_size,
    encode_images,
    encode_texts,
    load_image_processor,
    load_tokenizer,
    logit_scale,
)
from mmft_hf.model.towers import Adapter, frozen_batch_norms, lora_layers, parameter_counts
from mmft_hf.train.checkpoints import check_same_model

KINDS = list(tiny_encoders.KINDS)
TEXTS = ["a", "Red thing no 7, very red", "green"]
LONG = "a b " * 100
# Shifts all logits of a softmax alike: the gradient is zero up to rounding.
KEY_BIAS = ("k_proj.bias", "key.bias")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """The folder of each kind."""
    top = tmp_path_factory.mktemp("kinds")
    return {kind: tiny_encoders.save(kind, top / kind) for kind in KINDS}


@pytest.fixture(scope="session")
def _loaded(folders):
    return {kind: load_model(str(folder)) for kind, folder in folders.items()}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def pair(kind, _loaded):
    """A fresh copy of (model, processor)."""
    return copy.deepcopy(_loaded[kind])


def batch_of(processor) -> dict:
    rows = [{"image": image, "label": label, "text": TEXTS[label]} for image, label in colour_images(1)]
    return MMFTDataCollator(processor)(rows)


# -- loading and encoding ------------------------------------------------------------------------------------------------


def test_every_kind_is_tested(_loaded):
    """Those that read tokens; the one that reads vectors of a caption encoder has test_adapted_clip.py and test_adapted.py."""
    of_tokens = {kind for kind, family in FAMILIES.items() if family.texts == "tokens"}
    assert {model.config.model_type for model, _ in _loaded.values()} == of_tokens == set(FAMILIES) - {MODEL_TYPE}


def test_what_is_loaded_is_what_was_saved(kind, pair, folders, tmp_path):
    model, processor = pair
    family = FAMILIES[model.config.model_type]
    assert (type(model).__name__, type(processor).__name__) == (family.model, family.processor)
    assert not changed(weights(AutoModel.from_pretrained(folders[kind])), weights(model))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor) and again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert not changed(weights(model), weights(load_model(str(tmp_path))[0]))


@torch.no_grad()
def test_embeddings_are_those_of_the_stock_model(kind, pair, folders):
    """Texts of several lengths in one batch of ours, one at a time in the stock model's: padding must not matter."""
    model, processor = pair
    batch = batch_of(processor)
    names = ("input_ids", "attention_mask")
    ours = (
        encode_texts(model.eval(), *(batch[name] for name in names if name in batch)),
        encode_images(model, batch["pixel_values"]),
    )
    stock, its_processor = AutoModel.from_pretrained(folders[kind]).eval(), AutoProcessor.from_pretrained(folders[kind])
    pillow = load_image_processor(str(folders[kind]))  # with torchvision installed, the stock one gives other pixels
    for i, (image, label) in enumerate(colour_images(1)):
        pixels = pillow(image, return_tensors="pt")["pixel_values"]
        if kind == "siglip":
            options = {"padding": "max_length", "max_length": 64}
            tokens = {
                "input_ids": its_processor.tokenizer([TEXTS[label].lower()], return_tensors="pt", **options)[
                    "input_ids"
                ]
            }
        else:
            tokens = its_processor.tokenizer([TEXTS[label]], return_tensors="pt")
        out = stock(pixel_values=pixels, **tokens)
        torch.testing.assert_close(ours[0][i], out.text_embeds[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(ours[1][i], out.image_embeds[0], atol=1e-6, rtol=0)
        bias = stock.logit_bias if kind == "siglip" else 0
        logit = logit_scale(model) * ours[1][i] @ ours[0][i] + bias
        torch.testing.assert_close(logit.reshape(1, 1), out.logits_per_image, atol=1e-4, rtol=1e-5)
    assert embedding_size(model) == ours[0].shape[1] == ours[1].shape[1]
    assert logit_scale(model).shape == ()


@torch.no_grad()
def test_long_texts_are_cut_at_the_limit_and_said_to_be(kind, pair, folders):
    model, processor = pair
    tokens, cut = tokenize(processor, ["a", LONG])
    assert cut.tolist() == [False, True]
    limits = {"siglip": 64, "align": 64, "altclip": 75, "clip_roberta": 75}  # of 77 two are before the first position
    limit = limits.get(kind, 77)
    assert tokens["input_ids"].shape == (2, limit)
    assert encode_texts(model, **tokens).isfinite().all()
    assert processor.tokenizer.model_max_length == load_tokenizer(str(folders[kind])).model_max_length == limit
    last = {"clip": "<|endoftext|>", "vit_bert": "[SEP]", "chinese_clip": "[SEP]", "align": "[SEP]", "siglip": None}
    if end := last.get(kind, "</s>"):
        assert processor.tokenizer.convert_ids_to_tokens(tokens["input_ids"][1, -1].item()) == end


def test_siglip_reads_lower_case_texts_of_one_length_without_a_mask(_loaded):
    _, processor = _loaded["siglip"]
    tokens, _ = tokenize(processor, ["A Cat"])
    assert tokens.keys() == {"input_ids"} and tokens["input_ids"].shape == (1, 64)
    assert torch.equal(tokens["input_ids"], tokenize(processor, ["a cat"])[0]["input_ids"])
    assert not torch.equal(*(tokenize(_loaded["metaclip_2"][1], [t])[0]["input_ids"] for t in ("A cat", "a cat")))


def test_a_tokenizer_in_python_says_what_is_cut_too():
    processor = hf.VisionTextDualEncoderProcessor(tiny_encoders.cropped(), hf.ByT5Tokenizer(model_max_length=8))
    tokens, cut = tokenize(processor, ["1234567", "12345678", ""])  # and an end token
    assert cut.tolist() == [False, True, False]
    assert tokens["input_ids"].shape == tokens["attention_mask"].shape == (3, 8)


def test_a_temperature_that_stepped_below_zero_is_set_back(_loaded):
    model = copy.deepcopy(_loaded["align"][0])
    assert logit_scale(model).item() == pytest.approx(10)
    model.temperature.data.fill_(-0.5)
    scale = logit_scale(model)
    assert scale.item() == pytest.approx(1000) and model.temperature.item() == pytest.approx(0.001)
    scale.backward()
    assert model.temperature.grad.item() == pytest.approx(-1e6)  # so that it can come back


# -- training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", [("full", "full"), ("lora", "lora"), ("frozen", "lora"), ("last:1", "norms")])
def test_whatever_is_trainable_gets_a_gradient(kind, pair, modes):
    """Else DDP would wait for it. And what is frozen by `load_model` stays so."""
    model, processor = pair
    unused = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert unused == {
        "siglip": {"logit_bias"},
        "align": {"text_model.pooler.dense.weight", "text_model.pooler.dense.bias"},
    }.get(kind, set())
    set_towers(model, *modes)
    frozen_batch_norms(model.train())
    batch = batch_of(processor)
    texts = encode_texts(model, batch["input_ids"], batch.get("attention_mask"))
    images = encode_images(model, batch["pixel_values"])
    MMFTLoss(0.1)(images, texts, torch.tensor([0, 1, 1]), logit_scale(model))["loss"].backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not unused & with_gradient and FAMILIES[model.config.model_type].scale in with_gradient


def test_lora_goes_into_all_linear_layers_of_the_blocks(kind, pair):
    model = pair[0]
    set_towers(model, "lora", "lora")
    found = set(lora_layers(model))
    if kind == "align":  # an image tower of convolutions; the first block does not expand
        inside = [
            ("squeeze_excite.reduce", "squeeze_excite.expand", "projection.project_conv"),
            ("expansion.expand_conv",),
        ]
        names = {(0, name) for name in inside[0]} | {(1, name) for name in (*inside[0], *inside[1])}
        convolutions = {f"vision_model.encoder.blocks.{i}.{name}" for i, name in names}
        assert convolutions == {name for name in found if name.startswith("vision_model.")}
        found -= convolutions
    # Two blocks of a tower with q, k, v, output and the two of the MLP each, by whatever names.
    assert len(found) == (12 if kind == "align" else 24)
    assert parameter_counts(model)["text"][0] == 2 * 8 * (4 * 64 + 2 * (32 + 48))
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".lora_" not in name}
    inside = {name.removesuffix(".base_layer") for name in linear if ".layers." in name or ".layer." in name}
    assert found == {name for name in inside if kind != "align" or name.startswith("text_model.")}


WITH_LORA = ("clip", "siglip", "align", "vit_bert")  # the others consist of the same blocks


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, "full") for kind in KINDS]
    + [pytest.param(kind, "lora", marks=[pytest.mark.slow] * (kind not in WITH_LORA)) for kind in KINDS],
)
def test_two_steps_change_what_is_trained_and_the_saved_folder_predicts_the_same(kind, pair, folders, tmp_path, mode):
    model, processor = pair
    torch.manual_seed(0)
    set_towers(model, mode, mode)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    before = weights(model)
    trainer = make_trainer(pair, tmp_path / "run", evaluate=False, max_steps=2, weight_decay=0.1, learning_rate=1e-2)
    trainer.train()
    moved = changed(before, weights(model))
    assert {n for n in moved if not n.endswith(KEY_BIAS)} == {n for n in trained if not n.endswith(KEY_BIAS)}
    if kind == "align" and mode == "full":  # among what did not change are the statistics of its batch norms
        norms = [n for n in before if n.endswith("running_mean")]
        assert norms and {n.replace("running_mean", "weight") for n in norms} <= moved

    folder = tmp_path / "saved"
    prototypes = trainer.build_prototypes()
    trainer.save_model(str(folder))
    prototypes.save_pretrained(folder)
    pictures = [image for image, _ in colour_images(2, seed=3)]
    with torch.no_grad():
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        scores = prototypes.logits(encode_images(model.eval(), pixels)).softmax(dim=1)
    found = pipeline("mmft-image-classification", model=str(folder))(pictures, top_k=1)
    assert [top[0]["label"] for top in found] == [prototypes.class_names[i] for i in scores.argmax(dim=1)]
    assert [top[0]["score"] for top in found] == pytest.approx(scores.max(dim=1).values.tolist(), abs=1e-5)
    plain, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(plain) is type(model) and not info["missing_keys"] and not info["unexpected_keys"]
    assert logit_scale(plain).item() == pytest.approx(prototypes.logit_scale)
    again = ClassPrototypes.from_captions(*load_model(str(folder)), colour_dataset(8))
    torch.testing.assert_close(again.embeddings, prototypes.embeddings, atol=1e-5, rtol=0)
    if mode == "lora":
        Adapter.of(model).save_pretrained(tmp_path / "adapter", "somebody/base")
        base = AutoModel.from_pretrained(folders[kind])
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
        assert logit_scale(adapted).item() == pytest.approx(prototypes.logit_scale)
        with torch.no_grad():
            again = prototypes.logits(encode_images(adapted.eval(), pixels)).softmax(dim=1)
        torch.testing.assert_close(again, scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("altclip", "full"),
        ("altclip", "lora"),
        ("vit_bert", "full"),
        pytest.param("vit_bert", "lora", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_gives_back_every_weight(kind, mode, folders, tmp_path):
    """save_pretrained renames some weights of these models, so the stock Trainer reads back only the others."""

    def trainer(name):
        pair = load_model(str(folders[kind]))
        torch.manual_seed(0)
        set_towers(pair[0], mode, mode)
        settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        return make_trainer(
            pair, tmp_path / name, max_steps=4, save_total_limit=None, load_best_model_at_end=False, **settings
        )

    straight, resumed = trainer("straight"), trainer("resumed")
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert not changed(weights(straight.model), weights(resumed.model))
    best = trainer("best")
    best.state.best_model_checkpoint = str(tmp_path / "straight" / "checkpoint-4")
    best._load_best_model()
    assert not changed(weights(straight.model), weights(best.model))
    if mode == "full":
        opened = load_model(str(tmp_path / "straight" / "checkpoint-4"))[0]
        assert not changed(weights(straight.model), weights(opened))


def test_a_checkpoint_of_another_kind_is_refused(_loaded, folders):
    with pytest.raises(UserError, match=r"another model\. Expected model_type siglip \(found clip\)"):
        check_same_model(folders["clip"], _loaded["siglip"][0])


# -- the command line and the card ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "modes"),
    [
        ("siglip", "lora frozen"),
        pytest.param("align", "full lora", marks=pytest.mark.slow),
        pytest.param("chinese_clip", "full full", marks=pytest.mark.slow),
        ("vit_bert", "frozen lora"),
    ],
)
@pytest.mark.slow
def test_command_line_card_and_publication(kind, modes, folders, data_folder, tmp_path, capsys, monkeypatch):
    vision, text = modes.split()
    out = tmp_path / "out"
    words = f"--model_name_or_path {folders[kind]} --dataset_name {data_folder} --output_dir {out} --use_cpu true"
    words += f" --vision_tower {vision} --text_tower {text} --num_train_epochs 2 --learning_rate 1e-2"
    assert main(["finetune", *words.split(), "--per_device_train_batch_size", "8"]) == 0
    printed = capsys.readouterr().out
    assert f"vision tower {vision} (" in printed and ("12 layers" in printed) == ("lora" in modes)
    accuracy = json.loads((out / "all_results.json").read_text())["test_accuracy"]
    assert main(["evaluate", "--model_name_or_path", str(out), "--dataset_name", str(data_folder)]) == 0
    assert f"accuracy        {100 * accuracy:.1f} %" in capsys.readouterr().out

    monkeypatch.chdir(out)
    assert main(["predict", "predictions_test.png", "--model_name_or_path", "."]) == 0
    label, score = capsys.readouterr().out.split(": ")[1].split(", ")[0].rsplit(" ", 1)
    card = Path("README.md").read_text()
    family = FAMILIES[json.loads(Path("config.json").read_text())["model_type"]]
    assert f"{family.title} model (one that" in card and f"a plain `{family.model}`:" in card
    assert "CLIPModel" not in card.replace(family.model, "") and "sentence-transformers" not in card
    ours, stock, *more = [snippet for snippet in snippets(card) if "peft" not in snippet]
    assert label in execute(ours)
    first, probability = execute(stock).splitlines()[0].rsplit(" ", 1)
    assert first == label and 100 * float(probability) == pytest.approx(float(score.rstrip("%\n")), abs=0.2)
    assert len(more) == family.zero_shot and all("score" in execute(snippet) for snippet in more)
    assert ("sigmoid" in card) == (kind == "siglip")

    published = tmp_path / "published"
    published.mkdir()
    for name, content in model_files(out, "somebody/colours", with_inference_code=True).items():
        if isinstance(content, bytes):
            (published / name).write_bytes(content)
        else:
            shutil.copy(content, published / name)
    load_model(str(published))
    (published / "mmft_inference.txt").unlink(missing_ok=True)
    remote = pipeline("image-classification", model=str(published), trust_remote_code=True)
    assert remote("predictions_test.png", top_k=1)[0]["label"] == label


# -- what is refused -----------------------------------------------------------------------------------------------------


def with_config(folder, target, **changes):
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return str(target)


def test_other_kinds_are_refused(folders, tmp_path):
    with pytest.raises(UserError, match=r"NaFlex kind, .* size have model_type siglip\. For example, type") as naflex:
        load_model(with_config(folders["siglip"], tmp_path / "naflex", model_type="siglip2"))
    assert all(kind in str(naflex.value) for kind in FAMILIES)
    with pytest.raises(UserError, match=r"\(model_type clip, .*\), found model_type 'blip'\. For example, type"):
        load_model(with_config(folders["clip"], tmp_path / "blip", model_type="blip"))
    with pytest.raises(UserError, match="found BertModel"):
        make_trainer((hf.BertModel(hf.BertConfig(**tiny_encoders.text(tiny_encoders.word_pieces()))), None), tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="it is installed")
def test_a_tokenizer_that_needs_sentencepiece_says_so(folders, tmp_path):
    folder = shutil.copytree(folders["siglip"], tmp_path / "siglip")
    (folder / "tokenizer.json").rename(folder / "spiece.model")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer", "model_max_length": 64}')
    with pytest.raises(UserError, match=r"SiglipTokenizer requires .* pip install sentencepiece protobuf\."):
        load_model(str(folder))


def test_pictures_without_one_size_are_refused(folders, tmp_path):
    folder = shutil.copytree(folders["clip"], tmp_path / "clip")
    tiny_encoders.cropped(do_center_crop=False).save_pretrained(folder)
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"]["do_center_crop"] = False
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"gives all pictures one size, found size \{'shortest_edge': 16\}"):
        load_model(str(folder))


def test_towers_without_a_pooled_output_are_refused(tmp_path):
    tokenizer = tiny_encoders.word_pieces()
    words = hf.DistilBertConfig(vocab_size=len(tokenizer), dim=32, hidden_dim=48, n_layers=1, n_heads=2)
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(hf.ViTConfig(**tiny_encoders.VISION), words)
    hf.VisionTextDualEncoderModel(config).save_pretrained(tmp_path)
    pictures = hf.ViTImageProcessor(size=tiny_encoders.SQUARE)
    hf.VisionTextDualEncoderProcessor(pictures, tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"pooled output each, .* found ViTModel and DistilBertModel"):
        load_model(str(tmp_path))


def test_lora_where_there_is_nothing_for_it_is_refused(_loaded):
    model = copy.deepcopy(_loaded["vit_bert"][0])
    model.vision_model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(UserError, match=r"Sequential has none\. Type vision_tower full or vision_tower frozen"):
        set_towers(model, "lora", "frozen")
    # Of the grouped convolutions by name: they are none of the layers that get LoRA.
    with pytest.raises(
        UserError, match=r"\(convolution, expand, .*\), found depthwise_conv; no layer is named depthwise_conv"
    ):
        set_towers(copy.deepcopy(_loaded["align"][0]), "lora", "frozen", lora_targets=["depthwise_conv"])
    # The text pooler's layer is called dense as well, but nothing reads it.
    model = copy.deepcopy(_loaded["align"][0])
    set_towers(model, "frozen", "lora", lora_targets=["dense"])
    assert set(lora_layers(model)) == {
        f"text_model.encoder.layer.{i}.{name}.dense" for i in (0, 1) for name in ("attention.output", "intermediate", "output")
    }  # fmt: skip
    # SigLIP's attention pooling reads the weight of its output layer past the layer.
    model = copy.deepcopy(_loaded["siglip"][0])
    set_towers(model, "lora", "frozen", lora_targets=["out_proj"])
    assert len(lora_layers(model)) == 2
