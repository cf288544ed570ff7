"""`--text_mix` in a training: what it draws, its record, a resume."""

import copy
import io
import json
from contextlib import redirect_stdout

import pytest
import torch
from datasets import load_dataset
from tiny_clip import colour_dataset
from training import StopAfter, changed, make_trainer, weights

from mmft_hf import MMFTConfig, MMFTTrainer, set_towers
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.predict.heads import LinearHead
from mmft_hf.train.terms import CrossEntropy

ALONE = {"evaluate": False, "load_best_model_at_end": False}


def with_steps(data):
    """The second caption of each image is of the step short. The records are the user's own and say nothing else."""
    records = [
        [
            {
                "text": text,
                "step": "short" if k else None,
                "aspect": "visual",
                "prompt_id": "aa",
            }
            for k, text in enumerate(own)
        ]
        for own in data["captions"][:]
    ]
    return data.add_column("caption_records", records)


def trained(clip, folder, data=None, callback=None, resume=None, towers=("full", "full"), **settings):
    model, processor = copy.deepcopy(clip)
    set_towers(model, *towers)
    settings = {"num_train_epochs": 1} | settings
    trainer = make_trainer((model, processor), folder, data or with_steps(colour_dataset(4)), **ALONE, **settings)
    if callback:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return weights(trainer.model)


def test_a_source_alone_trains_as_if_there_were_no_other_captions(clip, tmp_path):
    """One draw of one caption is left: the mix takes it, as a dataset with that caption alone does."""
    data = colour_dataset(4)
    alone = data.map(lambda row: {"captions": row["captions"][1:]})
    settings = {"crop_min_area": 1.0, "save_strategy": "no"}
    mixed = trained(clip, tmp_path, text_mix=["short=1"], **settings)
    assert not changed(mixed, trained(clip, tmp_path, alone, **settings))
    assert changed(mixed, trained(clip, tmp_path, data, **settings))
    dropped = [
        trained(clip, tmp_path, **how, **settings)
        for how in ({"text_mix": {"template": 0.5}}, {"caption_dropout": 0.5})
    ]
    assert not changed(*dropped) and changed(dropped[0], mixed)


@pytest.mark.slow
def test_a_frozen_text_tower_knows_every_text_of_a_mix(clip, tmp_path):
    settings = {
        "text_mix": ["template=0.3", "short=0.4"],
        "towers": ("full", "frozen"),
        "optim": "sgd",
        "num_train_epochs": 3,
    }
    found = [trained(clip, tmp_path, cache_frozen_features=cache, **settings) for cache in (True, False)]
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_resumed_training_ends_bit_for_bit_as_one_that_was_not_interrupted(clip, tmp_path):
    settings = {"text_mix": ["template=0.3", "short=0.4"], "num_train_epochs": 3}
    straight = trained(clip, tmp_path / "straight", **settings)
    with pytest.raises(KeyboardInterrupt):
        trained(clip, tmp_path / "cut", callback=StopAfter(3), **settings)
    assert not changed(straight, trained(clip, tmp_path / "cut", resume=True, **settings))


def test_what_cannot_be_mixed_is_refused(clip, tmp_path):
    with pytest.raises(UserError, match=r"caption_dropout: expected 0 with text_mix, found 0\.5"):
        MMFTConfig(str(tmp_path), use_cpu=True, text_mix=["short=0.5"], caption_dropout=0.5)
    model, processor = copy.deepcopy(clip)
    head = LinearHead(torch.randn(3, 32), list(colour_dataset(1).features["label"].names), torch.zeros(3))
    args = MMFTConfig(str(tmp_path), use_cpu=True, text_mix=["template=0.5"])
    with pytest.raises(UserError, match="text_mix: expected a loss of images and texts, found one without texts"):
        MMFTTrainer(model, args, colour_dataset(4), None, processor, loss=CrossEntropy(head))


# -- the command -------------------------------------------------------------------------------------------------------
def test_finetune_says_records_and_resumes_with_the_same_sources_alone(clip_folder, data_folder, tmp_path, capsys):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("train", "validation", "test"):
        data = load_dataset("parquet", data_files=str(data_folder / f"{name}.parquet"), split="train")
        with_steps(data).to_parquet(folder / f"{name}.parquet")
    words = f"finetune --model_name_or_path {clip_folder} --dataset_name {folder} --output_dir {tmp_path / 'out'}"
    words = [*f"{words} --max_steps 2 --per_device_train_batch_size 8 --use_cpu true --head prototypes".split()]
    mix = ["--text_mix", "short=0.25", "template=0.2"]
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main([*words, *mix]) == 0
    assert "; sources template=0.2, short=0.25, otherwise all captions" in " ".join(printed.getvalue().split())
    identity = json.loads((tmp_path / "out" / "mmft.json").read_text())["identity"]
    assert identity["text_mix"] == ["template=0.2", "short=0.25"] and len(identity["caption_sources"]) == 16
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `text_mix` |" in card and "short=0.25" in card
    again = [*words, "--resume_from_checkpoint", "true"]
    assert main([*again, "--text_mix", "template=0.2", "short=0.25"]) == 0
    assert "already holds this run, complete" in capsys.readouterr().out
    assert main([*again, "--text_mix", "template=0.2"]) == 2
    assert "text_mix was ['template=0.2', 'short=0.25'], now ['template=0.2']" in capsys.readouterr().err
    assert main([*words, "--text_mix", "shrt=0.2", "--overwrite_output_dir", "true"]) == 2
    assert (
        "--text_mix: expected template, captions or a step, aspect or prompt_id of the captions, found 'shrt'"
        in capsys.readouterr().err
    )
    config = tmp_path / "mix.yaml"
    config.write_text("text_mix: {template: 0.2, short: 0.25}\n")
    assert main([*again, "--config", str(config)]) == 0
