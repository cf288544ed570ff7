"""Language models and sentence encoders as caption encoders: pooling, direction, padding, instruction, saving, refusals."""

import json

import pytest
import tiny_trunks
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file, save_file

from mmft_hf.core.errors import UserError
from mmft_hf.model.caption_encoder import RECORD, CaptionEncoder

TEXTS = ["a red cat", "the small blue dog sits under a large tree near the house .", "two", "azure feline on the left"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_trunks.save_llama(tmp_path_factory.mktemp("llama") / "llama")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_trunks.save_bert(tmp_path_factory.mktemp("bert") / "bert")


def opened(folder, **options) -> CaptionEncoder:
    return CaptionEncoder.from_pretrained(folder, device="cpu", **options)


@torch.no_grad()
def by_hand(folder, text: str, first: int = 0, pooling: str = "mean", **flags) -> torch.Tensor:
    """The vector `(d,)` of one text, without a batch: states from `first` on are pooled."""
    tokens = hf.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    config = hf.AutoConfig.from_pretrained(folder)
    config.update(flags)
    model = hf.AutoModel.from_pretrained(folder, config=config).eval()
    states = model(input_ids=tokens["input_ids"]).last_hidden_state[0, first:]
    return F.normalize({"mean": states.mean(0), "first": states[0], "last": states[-1]}[pooling], dim=0)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_decoder_pools_the_mean_of_the_words(llama, bidirectional):
    found = opened(llama, bidirectional=bidirectional).encode(TEXTS, batch_size=3)
    wanted = [by_hand(llama, text, first=1, is_causal=not bidirectional) for text in TEXTS]  # without <s>
    torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=1e-5)


def test_a_decoder_reads_in_both_directions_by_default(llama):
    both, one = opened(llama), opened(llama, bidirectional=False)
    assert (both.is_causal, one.is_causal) == (False, True)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    for encoder, same in ((both, False), (one, True)):
        states = encoder.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0]
        assert torch.equal(*states) is same


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_an_encoder_pools_as_asked(bert, pooling):
    found = opened(bert, pooling=pooling).encode(TEXTS)
    wanted = torch.stack([by_hand(bert, text, pooling=pooling) for text in TEXTS])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_the_files_of_sentence_transformers_are_followed(tmp_path):
    folder = tiny_trunks.save_bert(tmp_path / "sentences", pooling="cls_token", max_tokens=6)
    encoder = opened(folder)
    assert (encoder.pooling, encoder.max_length) == ("first", 6)
    torch.testing.assert_close(
        encoder.encode(TEXTS[:1])[0], by_hand(folder, TEXTS[0], pooling="first"), rtol=0, atol=1e-5
    )
    assert encoder.encode_batch(TEXTS)[1].tolist() == [False, True, False, True]
    assert opened(folder, pooling="mean").pooling == "mean"


def test_a_model_that_pads_on_the_left_is_padded_on_the_right(tmp_path, caplog):
    """GPT-2 counts positions from the padding, so that its vectors of left-padded texts depend on the batch."""
    folder = tiny_trunks.save_gpt2(tmp_path / "gpt2")
    encoder = opened(folder)
    assert "no pad token" in caplog.text
    alone = torch.stack([encoder.encode([text])[0] for text in TEXTS])
    torch.testing.assert_close(encoder.encode(TEXTS), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(alone[0], by_hand(folder, TEXTS[0], first=1, is_causal=False), rtol=0, atol=1e-5)


def test_an_instruction_is_read_and_not_pooled(llama):
    encoder = opened(llama, instruction="the photo shows ")
    wanted = by_hand(llama, "the photo shows a red cat", first=4, is_causal=False)
    torch.testing.assert_close(encoder.encode(["a red cat"])[0], wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(encoder.encode(["a red cat"])[0], opened(llama).encode(["a red cat"])[0], atol=1e-3)


def test_vectors_without_normalization(llama):
    plain, unit = opened(llama, normalize=False).encode(TEXTS), opened(llama).encode(TEXTS)
    assert (plain.norm(dim=-1) - 1).abs().min() > 1e-3
    torch.testing.assert_close(F.normalize(plain, dim=-1), unit)


def test_texts_without_words_have_a_vector(llama, bert):
    for folder in (llama, bert):
        for instruction in (None, "a photo of "):
            found = opened(folder, instruction=instruction).encode(["", "  ", "a"])
            assert found.isfinite().all()
            torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))


def test_sizes(llama):
    encoder = opened(llama)
    values = [tensor.numel() for tensor in load_file(llama / "model.safetensors").values()]
    assert encoder.parameters_count == sum(values) and encoder.bytes == 4 * sum(values)
    assert encoder.size == 48 and encoder.encode(TEXTS).shape == (4, 48)


# -- LoRA, saving ----------------------------------------------------------------------------------------------------
def tuned(folder, **options) -> CaptionEncoder:
    encoder = opened(folder, **options)
    torch.manual_seed(1)
    encoder.add_lora(rank=4, alpha=8)
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return encoder


def test_lora_alone_is_trained(llama, tmp_path):
    encoder = opened(llama)
    before = encoder.encode(TEXTS)
    encoder.add_lora()
    torch.testing.assert_close(encoder.encode(TEXTS), before)
    encoder.train()
    encoder(encoder.tokens(TEXTS)[0]).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad is (".lora_" in name), name
        assert (parameter.grad is not None) is (".lora_" in name), name
    layers = {name.split(".")[-4] for name, _ in encoder.named_parameters() if ".lora_A" in name}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_save_and_load(kind, tmp_path):
    folder = getattr(tiny_trunks, f"save_{kind}")(tmp_path / kind)
    encoder = tuned(folder, instruction="a photo of ", max_length=20, normalize=False)
    encoder.save_pretrained(tmp_path / "saved")
    files = {file.name for file in (tmp_path / "saved").iterdir()}
    assert files == {RECORD, "adapter_config.json", "adapter_model.safetensors"}
    again = opened(tmp_path / "saved")
    torch.testing.assert_close(again.encode(TEXTS), encoder.encode(TEXTS), rtol=0, atol=1e-6)
    assert again.identity() == encoder.identity()
    assert not any(parameter.requires_grad for parameter in again.parameters())
    # PEFT itself does not know that the model reads in both directions.
    from peft import PeftModel

    stock = PeftModel.from_pretrained(hf.AutoModel.from_pretrained(folder), tmp_path / "saved").eval()
    tokens = again.tokens(TEXTS)[0]
    with torch.no_grad():
        states = stock(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        ours = again.model(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    assert (states - ours).abs().max() > 0.1


def test_saving_without_lora_removes_an_older_adapter(llama, tmp_path):
    tuned(llama).save_pretrained(tmp_path)
    opened(llama, pooling="last").save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [RECORD]
    again = opened(tmp_path)
    assert again.pooling == "last" and again.lora_digest is None


def test_identity_tells_every_setting(llama, tmp_path):
    other = tiny_trunks.save_llama(tmp_path / "llama", seed=1)
    encoders = [
        opened(llama),
        opened(other),
        opened(llama, pooling="last"),
        opened(llama, bidirectional=False),
        opened(llama, instruction="a "),
        opened(llama, normalize=False),
        opened(llama, max_length=9),
        tuned(llama),
    ]
    identities = [json.dumps(encoder.identity(), sort_keys=True) for encoder in encoders]
    assert len(set(identities)) == len(identities)
    assert json.dumps(opened(llama).identity(), sort_keys=True) == identities[0]


# -- refusals --------------------------------------------------------------------------------------------------------
def refused(folder, *parts: str, **options) -> None:
    with pytest.raises(UserError) as error:
        opened(folder, **options)
    for part in parts:
        assert part in str(error.value)


def test_another_setting_than_the_saved_one_is_refused(llama, tmp_path):
    tuned(llama).save_pretrained(tmp_path)
    refused(tmp_path, "pooling", "'mean'", "'last'", pooling="last")
    refused(tmp_path, "bidirectional", bidirectional=False)
    refused(tmp_path, "dtype", "float32", dtype=torch.bfloat16)
    assert opened(tmp_path, pooling="mean", bidirectional=True).lora_digest


def test_damaged_folders_are_refused(llama, tmp_path):
    other = tiny_trunks.save_llama(tmp_path / "other", seed=1)
    saved = tmp_path / "saved"
    tuned(llama).save_pretrained(saved)
    record = json.loads((saved / RECORD).read_text())
    for change, parts in (
        ({"base": str(tmp_path / "gone")}, ("its base model", "gone", "field base")),
        ({"base": str(other)}, ("other weights there",)),
        ({"dtype": "int3"}, ("dtype", "float32")),
        ({"pooling": 3}, ("pooling",)),
    ):
        (saved / RECORD).write_text(json.dumps(record | change))
        refused(saved, *parts)
    (saved / RECORD).write_text(json.dumps({k: v for k, v in record.items() if k != "weights"}))
    refused(saved, "weights", "found none")
    (saved / RECORD).write_text(json.dumps(record))
    weights = load_file(saved / "adapter_model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, saved / "adapter_model.safetensors")
    refused(saved, "found another one")
    (saved / "adapter_model.safetensors").unlink()
    refused(saved, "its LoRA adapter", "Copy the whole folder again")


def test_a_decoder_that_ignores_the_flag_is_refused(tmp_path):
    tokenizer = tiny_trunks.word_tokenizer()
    config = hf.MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4)
    hf.MambaModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    refused(tmp_path, "MambaModel ignores is_causal", "bidirectional false")
    assert opened(tmp_path, bidirectional=False).is_causal


def test_other_models_are_refused(bert, llama, tmp_path):
    refused("builtin/tiny-clip", "expected a model that reads texts", "CLIPModel")
    refused(bert, "found an encoder", bidirectional=False)
    refused(bert, "pooling", "mean or first or last", pooling="max")
    refused(llama, "first token of a decoder", pooling="first", bidirectional=False)
    refused(llama, "max_length", instruction="a photo of a ", max_length=4)
    refused(tmp_path / "none", "expected a Hub id or a folder with a config.json")
    hf.T5Config(vocab_size=99, d_model=16, num_layers=1).save_pretrained(tmp_path)
    refused(tmp_path, "expected a decoder or an encoder, found both", "t5")


def test_tokenizers_are_checked(tmp_path):
    neither = tiny_trunks.word_tokenizer(pad=None, end=None)
    folder = tiny_trunks.save_llama(tmp_path / "neither", tokenizer=neither)
    refused(folder, "a pad token or an end token", "tokenizer.pad_token")
    folder = tiny_trunks.save_llama(tmp_path / "few")
    tiny_trunks.word_tokenizer(tiny_trunks.WORDS[:9]).save_pretrained(folder)
    refused(folder, "expected a tokenizer of about 43 tokens")


def test_pickles_and_gguf_files_are_refused(llama, tmp_path, monkeypatch):
    pickled = tmp_path / "pickled"
    model = hf.AutoModel.from_pretrained(llama)
    model.config.save_pretrained(pickled)
    tiny_trunks.word_tokenizer().save_pretrained(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    refused(pickled, "found only a pickle", "allow_pickle true")
    torch.testing.assert_close(opened(pickled, allow_pickle=True).encode(TEXTS), opened(llama).encode(TEXTS))

    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    refused(folder, "found GGUF files", f"type its name, too: {folder}/tiny.gguf")
    refused(folder / "tiny.gguf", "expected weights and a tokenizer")
    refused(folder, "expected one of tiny.gguf, found other.gguf", gguf_file="other.gguf")
    refused(folder, "expected weights and a tokenizer", gguf_file="tiny.gguf")
    monkeypatch.setattr("mmft_hf.model.caption_encoder.is_gguf_available", lambda: False)
    refused(folder, "pip install 'mmft_hf[llm]'", gguf_file="tiny.gguf")
