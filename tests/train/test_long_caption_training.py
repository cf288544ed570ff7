"""`--long_captions` in a training: what it learns, its record, a resume."""

import copy
import io
import json
import re
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets, load_dataset
from long_captions import FILLER, NAMES, planted
from tiny_clip import build_clip, colour_dataset
from tiny_trunks import save_llama, word_tokenizer
from training import StopAfter, changed, make_trainer, weights
from transformers import CLIPModel, CLIPTokenizerFast
from word_trunk import HashedWords

from mmft_hf import ClassPrototypes, ImageClassifier, MMFTConfig, MMFTTrainer
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.data.views import TextView
from mmft_hf.model.adapted_processor import TextTrunk
from mmft_hf.model.adapted_start import with_text_trunk
from mmft_hf.model.features import Encoding, image_features
from mmft_hf.model.long_captions import stretched

ALONE = {"evaluate": False, "load_best_model_at_end": False}


def trained(clip, folder, data=None, callback=None, resume=None, **settings):
    trainer = make_trainer(copy.deepcopy(clip), folder, data or planted(4), **ALONE, **settings)
    if callback:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    cut = [log["captions_cut"] for log in trainer.state.log_history if "captions_cut" in log]
    return weights(trainer.model), cut


def test_short_captions_are_trained_as_before_and_long_ones_are_no_longer_cut(clip, tmp_path):
    settings = {"num_train_epochs": 1, "save_strategy": "no"}
    short = [trained(clip, tmp_path, colour_dataset(2), long_captions=how, **settings)[0] for how in ("cut", "windows")]
    assert not changed(*short)
    (cut, share), (parts, none) = (trained(clip, tmp_path, long_captions=how, **settings) for how in ("cut", "windows"))
    assert changed(cut, parts) and share == [1.0] and none == [0.0]


def test_the_trainer_wants_a_model_that_is_stretched(clip, tmp_path):
    args = MMFTConfig(str(tmp_path), use_cpu=True, long_captions="stretch")
    model, processor = copy.deepcopy(clip)
    with pytest.raises(UserError, match="expected a model that was stretched, found one of 77 tokens"):
        MMFTTrainer(model, args, planted(1), planted(1), processor)
    model, processor = stretched(model, processor)
    MMFTTrainer(model, args, planted(1), planted(1), processor)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "windows", "stretch", "words", "llama"])
def test_training_learns_a_fact_behind_filler_unless_it_is_cut(how, tmp_path, monkeypatch):
    """Kinds have any colour, so the colour alone tells which text belongs to an image. Then kinds with one colour each are told
    apart by it, on average over the colours that they can have."""
    monkeypatch.setenv("MMFT_HF_CACHE", str(tmp_path / "cache"))
    data = concatenate_datasets([planted(2, seed=shift, shift=shift) for shift in range(3)])
    model, processor = build_clip()
    if how == "stretch":
        model, processor = stretched(model, processor)
    trunk = how in ("words", "llama")
    if trunk:
        texts = [text for row in data for text in TextView(NAMES).possible_texts(row)]
        words = sorted({word for text in texts for word in re.findall(r"\w+|[.,]", text)})
        source = HashedWords(32) if how == "words" else save_llama(tmp_path / "llama", tokenizer=word_tokenizer(words))
        model, processor = with_text_trunk(model, processor, TextTrunk(source), texts, Encoding())
    long = "cut" if trunk else how
    settings = {"num_train_epochs": 50, "supcon_weight": 0, "crop_min_area": 1.0, "per_device_train_batch_size": 9}
    settings |= {"save_strategy": "no", "head_learning_rate": 1e-3 if trunk else None}
    trainer = make_trainer((model, processor), tmp_path, data, long_captions=long, **ALONE, **settings)
    trainer.train()
    found = []
    for shift in range(3):
        kinds = planted(2, seed=7, shift=shift)
        prototypes = ClassPrototypes.from_captions(model, processor, kinds, long_captions=long)
        images, labels = image_features(model, processor, planted(10, seed=3, shift=shift))
        found.append((prototypes.logits(images).argmax(1) == labels).double().mean())
    if how == "cut":
        assert np.mean(found) == pytest.approx(1 / 3)  # the same answers, whatever the colours
    else:
        assert np.mean(found) >= 0.9


@pytest.mark.slow
def test_a_resumed_training_ends_bit_for_bit_as_one_that_was_not_interrupted(clip, tmp_path):
    settings = {"long_captions": "windows", "num_train_epochs": 3}
    straight, _ = trained(clip, tmp_path / "straight", **settings)
    with pytest.raises(KeyboardInterrupt):
        trained(clip, tmp_path / "cut", callback=StopAfter(3), **settings)
    assert not changed(straight, trained(clip, tmp_path / "cut", resume=True, **settings)[0])


# -- the command -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def long_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    for name, images in (("train", 4), ("validation", 2), ("test", 2)):
        planted(images, seed=images).to_parquet(folder / f"{name}.parquet")
    return folder


@pytest.fixture
def finetune(clip_folder, long_folder, tmp_path, monkeypatch):
    """Runs `finetune` with further words; returns its exit code and what it printed."""
    monkeypatch.setenv("MMFT_HF_CACHE", str(tmp_path / "cache"))
    words = f"finetune --model_name_or_path {clip_folder} --dataset_name {long_folder} --output_dir {tmp_path / 'out'}"
    words += " --max_steps 2 --per_device_train_batch_size 6 --use_cpu true --head prototypes"

    def run(*more):
        printed = io.StringIO()
        with redirect_stdout(printed):
            code = main([*words.split(), *map(str, more)])
        return code, printed.getvalue()

    return run


def test_many_cut_captions_are_noted_and_read_in_parts(finetune, long_folder, tmp_path, capsys):
    note = "100% of the captions, with the class template before them, are longer than the 77 tokens"
    code, printed = finetune()
    assert code == 0 and note in printed and "type --long_captions windows." in " ".join(printed.split())
    assert "captions truncated 100.0%" in printed
    assert note in (tmp_path / "out" / "README.md").read_text()

    code, printed = finetune("--long_captions", "windows", "--overwrite_output_dir", "true")
    assert code == 0 and note not in printed and "captions truncated 0.0%" in printed
    assert "; long ones are read in parts" in printed
    record = json.loads((tmp_path / "out" / "mmft.json").read_text())
    assert record["identity"]["long_captions"] == "windows"
    assert "| `long_captions` | `windows` |" in (tmp_path / "out" / "README.md").read_text()
    assert finetune("--resume_from_checkpoint", "true")[0] == 2
    assert "long_captions was 'windows', now 'cut'" in capsys.readouterr().err
    # Another head takes the captions as the run did.
    assert main(["head", str(tmp_path / "out"), "--head", "prototypes", "--output_dir", str(tmp_path / "head")]) == 0
    loaded, train = (
        ImageClassifier.from_pretrained(tmp_path / "head"),
        load_dataset("parquet", data_files=str(long_folder / "train.parquet"), split="train"),
    )
    expected = ClassPrototypes.from_captions(loaded.model, loaded.processor, train, long_captions="windows")
    torch.testing.assert_close(loaded.head.embeddings, expected.embeddings, atol=1e-5, rtol=0)


def test_a_stretched_run_leaves_a_stock_model_with_the_new_limit(finetune, tmp_path):
    code, printed = finetune("--long_captions", "stretch", "--text_tower", "lora", "--head", "auto")
    assert code == 0 and "the text tower is stretched for long ones" in printed and "captions truncated 0.0%" in printed
    out = tmp_path / "out"
    model, loading = CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    assert model.text_model.embeddings.position_embedding.num_embeddings == 248
    assert json.loads((out / "config.json").read_text())["text_config"]["max_position_embeddings"] == 248
    tokenizer = CLIPTokenizerFast.from_pretrained(out)
    assert tokenizer.model_max_length == 248 and not (out / "adapter").exists()
    assert len(tokenizer(FILLER, truncation=True)["input_ids"]) > 77


def test_a_caption_encoder_reads_long_captions_anyway(finetune, capsys):
    assert finetune("--long_captions", "windows", "--text_trunk", "somewhere")[0] == 2
    assert (
        "--long_captions: expected cut with --text_trunk, whose caption encoder reads whole captions"
        in capsys.readouterr().err
    )
