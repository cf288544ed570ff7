"""Text towers whose pooled output is made from their tokens: `text_pooling` in a model's configuration."""

import copy
import json
import shutil

import pytest
import tiny_encoders
import torch
import transformers as hf
from peft import PeftModel
from tiny_clip import colour_dataset
from training import changed, make_trainer, weights
from transformers import AutoModel

from mmft_hf import ClassPrototypes, load_model, set_towers
from mmft_hf.core.errors import UserError
from mmft_hf.hub.publish import folder_files
from mmft_hf.model.collator import tokenize
from mmft_hf.model.families import POOLINGS
from mmft_hf.model.loading import encode_texts
from mmft_hf.model.pooling import pool
from mmft_hf.model.sentence_encoders import read_sentence_encoder
from mmft_hf.model.towers import Adapter, lora_layers
from mmft_hf.train.checkpoints import check_same_model

TEXTS = ["a", "Red thing no 7, very red", "green"]


def save(folder, words: hf.PreTrainedConfig, tokenizer, pooling=None):
    torch.manual_seed(0)
    config = hf.VisionTextDualEncoderConfig.from_vision_text_configs(
        hf.ViTConfig(**tiny_encoders.VISION), words, projection_dim=24
    )
    config.text_pooling = pooling
    hf.VisionTextDualEncoderModel(config).save_pretrained(folder)
    pictures = hf.ViTImageProcessor(size=tiny_encoders.SQUARE)
    hf.VisionTextDualEncoderProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A BERT with each pooling, and a DistilBERT, which has no pooled output of its own."""
    top, tokenizer = tmp_path_factory.mktemp("pooling"), tiny_encoders.word_pieces()
    bert = hf.BertConfig(**tiny_encoders.text(tokenizer))
    found = {pooling: save(top / str(pooling), bert, tokenizer, pooling) for pooling in (None, *POOLINGS)}
    distil = hf.DistilBertConfig(vocab_size=len(tokenizer), dim=32, hidden_dim=48, n_layers=1, n_heads=2)
    return found | {"distil": save(top / "distil", distil, tokenizer, "mean")}


@pytest.fixture(scope="module")
def _loaded(folders):
    return {name: load_model(str(folder)) for name, folder in folders.items()}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_matter(pooling, side):
    """Against a loop over texts of their own lengths."""
    torch.manual_seed(0)
    lengths, hidden = [1, 4, 7], torch.randn(3, 7, 5)
    mask = torch.zeros(3, 7, dtype=torch.long)
    expected = []
    for i, n in enumerate(lengths):
        own = slice(0, n) if side == "right" else slice(7 - n, 7)
        mask[i, own] = 1
        tokens = hidden[i, own]
        expected.append({"mean": tokens.mean(dim=0), "first": tokens[0], "last": tokens[-1]}[pooling])
    torch.testing.assert_close(pool(hidden, mask, pooling), torch.stack(expected), atol=1e-6, rtol=0)
    assert torch.equal(pool(hidden, mask * 0, pooling), torch.zeros(3, 5))  # no tokens at all
    whole = pool(hidden, torch.ones(3, 7), pooling)
    assert torch.equal(pool(hidden, None, pooling), whole)


@torch.no_grad()
@pytest.mark.parametrize("name", [*POOLINGS, "distil"])
def test_embeddings_are_the_projection_of_what_is_pooled(name, folders, _loaded):
    model, processor = _loaded[name]
    found = encode_texts(model.eval(), **tokenize(processor, TEXTS)[0])
    stock = AutoModel.from_pretrained(folders[name]).eval()
    for i, text in enumerate(TEXTS):
        hidden = stock.text_model(**processor.tokenizer([text], return_tensors="pt")).last_hidden_state[0]
        pooled = {"first": hidden[0], "last": hidden[-1]}.get(name, hidden.mean(dim=0))
        expected = torch.nn.functional.normalize(stock.text_projection.weight @ pooled, dim=0)
        torch.testing.assert_close(found[i], expected, atol=1e-6, rtol=0)
    own = encode_texts(_loaded[None][0].eval(), **tokenize(processor, TEXTS)[0])
    assert (own - found).abs().max() > 0.01
    # Any way to call the model gives the same.
    features = model.get_text_features(**tokenize(processor, TEXTS)[0]).pooler_output
    torch.testing.assert_close(torch.nn.functional.normalize(features, dim=-1), found)
    out = model(**tokenize(processor, TEXTS)[0], pixel_values=torch.zeros(1, 3, 16, 16))
    torch.testing.assert_close(out.text_embeds, found)
    twin = copy.deepcopy(model)
    twin.text_projection.weight.zero_()
    assert not encode_texts(twin, **tokenize(processor, TEXTS)[0]).any()
    assert torch.equal(encode_texts(model, **tokenize(processor, TEXTS)[0]), found)


@pytest.mark.parametrize(("name", "mode"), [("last", "lora"), ("distil", "full")])
def test_it_is_trained_saved_published_and_loaded_again(name, mode, folders, _loaded, tmp_path):
    model, processor = copy.deepcopy(_loaded[name])
    torch.manual_seed(0)
    set_towers(model, mode, mode)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert not any("pooler" in key for key in (*trained, *lora_layers(model)) if key.startswith("text_model."))
    before = weights(model)
    settings = {"max_steps": 2, "weight_decay": 0.1, "learning_rate": 1e-2, "save_strategy": "steps"}
    settings |= {"save_steps": 2, "eval_strategy": "no", "load_best_model_at_end": False}
    trainer = make_trainer((model, processor), tmp_path / "run", evaluate=False, **settings)
    trainer.train()
    still = {key for key in trained - changed(before, weights(model)) if not key.endswith(("key.bias", "k_lin.bias"))}
    assert not still
    trainer.save_model(str(tmp_path / "saved"))
    prototypes = trainer.build_prototypes()
    again = ClassPrototypes.from_captions(*load_model(str(tmp_path / "saved")), colour_dataset(8))
    torch.testing.assert_close(again.embeddings, prototypes.embeddings, atol=1e-5, rtol=0)
    published = folder_files(tmp_path / "saved")
    pooling = model.config.text_pooling
    for path in (published["config.json"], next((tmp_path / "run").glob("checkpoint-*/config.json"))):
        assert json.loads(path.read_text())["text_pooling"] == pooling
    if mode == "lora":
        Adapter.of(model).save_pretrained(tmp_path / "adapter", "somebody/base")
        base = load_model(str(folders[name]))[0]
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
        tokens = tokenize(processor, TEXTS)[0]
        with torch.no_grad():
            torch.testing.assert_close(encode_texts(adapted.eval(), **tokens), encode_texts(model.eval(), **tokens))


def test_a_checkpoint_of_another_pooling_is_refused(folders, _loaded):
    with pytest.raises(UserError, match=r"Expected text_pooling mean \(found last\)"):
        check_same_model(folders["last"], _loaded["mean"][0])


def edited(folder, target, **changes):
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not ...}))
    return str(target)


def test_unknown_poolings_are_refused(folders, tmp_path):
    for i, value in enumerate(("max", "Mean", 3, ["mean"], True)):
        with pytest.raises(UserError, match=r"text_pooling: expected one of mean, first, last .* found"):
            load_model(edited(folders["mean"], tmp_path / str(i), text_pooling=value))
    clip = tiny_encoders.save("clip", tmp_path / "clip")
    with pytest.raises(UserError, match=r"'mean' in a clip"):
        load_model(edited(clip, tmp_path / "pooled clip", text_pooling="mean"))
    with pytest.raises(UserError, match=r'pooled output .* add a line "text_pooling": "mean" to config\.json'):
        load_model(edited(folders["distil"], tmp_path / "none", text_pooling=...))


# -- sentence-transformers -----------------------------------------------------------------------------------------------


def sentence_files(folder, pooling: dict, more=(), limit=None):
    modules = ["Transformer", "Pooling", *more, "Normalize"]
    entries = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(modules)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(entries))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    if limit:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit}))
    return folder


@pytest.mark.parametrize(
    ("settings", "pooling", "theirs"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean", "mean_tokens"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean", "mean_sqrt_len_tokens"),
        ({"pooling_mode_cls_token": True, "include_prompt": True}, "first", "cls_token"),
        ({"pooling_mode_lasttoken": True}, "last", "lasttoken"),
        ({"pooling_mode": "mean"}, "mean", "mean"),
        ({"pooling_mode": "lasttoken", "include_prompt": True}, "last", "lasttoken"),
        ({"pooling_mode_max_tokens": True}, None, "max_tokens"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, None, "mean_tokens and max_tokens"),
        ({}, None, ""),
    ],
)
def test_the_pooling_of_a_sentence_encoder_is_read(settings, pooling, theirs, tmp_path):
    found = read_sentence_encoder(str(sentence_files(tmp_path, settings, limit=32)))
    assert (found.pooling, found.theirs, found.max_tokens, found.others) == (pooling, theirs, 32, ())


def test_what_is_no_sentence_encoder_and_what_is_damaged(tmp_path):
    assert read_sentence_encoder(str(tmp_path)) is None
    found = read_sentence_encoder(str(sentence_files(tmp_path / "dense", {}, ["Dense"])))
    assert found.others == ("Dense",) and found.max_tokens is None
    (tmp_path / "dense" / "modules.json").write_text('[{"path": 3, "type": "x"}]')
    with pytest.raises(UserError, match=r"modules\.json.*path: expected text, found 3"):
        read_sentence_encoder(str(tmp_path / "dense"))


def test_a_sentence_encoder_without_pooling_is_noted(folders, tmp_path, caplog):
    tower = sentence_files(tmp_path / "sentences", {"pooling_mode_lasttoken": True})
    config = json.loads((folders["mean"] / "config.json").read_text())
    words = config["text_config"] | {"_name_or_path": str(tower)}
    folder = edited(folders["mean"], tmp_path / "model", text_pooling=..., text_config=words)
    load_model(folder)
    load_model(folder)  # which says nothing new
    (note,) = [record.getMessage() for record in caplog.records if "sentence encoder" in record.getMessage()]
    assert str(tower) in note and 'Add a line "text_pooling": "last"' in note and "\n" not in note
    caplog.clear()
    load_model(edited(folders["mean"], tmp_path / "pooled", text_config=words))
    assert not [record for record in caplog.records if "sentence encoder" in record.getMessage()]
