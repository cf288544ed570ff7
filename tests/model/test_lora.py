"""Towers trained whole, by LoRA, or not: what changes, what is saved, and that merged, adapter and resumed model agree."""

import contextlib
import copy
import io
import itertools
import json
import logging
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from processes import run_python
from safetensors.torch import load_file
from training import StopAfter, changed, make_trainer, weights, with_lora
from transformers import CLIPModel, pipeline

import mmft_hf
from mmft_hf import ClassPrototypes, MMFTConfig, load_model, set_towers
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.model.towers import Adapter, parameter_counts

MODES = ("full", "lora", "frozen")
START = {"vision": ("vision_model.", "visual_projection."), "text": ("text_model.", "text_projection.")}
LAYERS = 12  # two blocks of a tower with q, k, v, out, fc1, fc2 each


def outputs(model) -> torch.Tensor:
    """All that a plain forward gives for two fixed texts and pictures."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (2, 9), generator=generator)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    with torch.no_grad():
        out = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
    return torch.cat([out.image_embeds.flatten(), out.text_embeds.flatten(), out.logits_per_image.flatten()])


@pytest.mark.parametrize(("vision", "text"), [pair for pair in itertools.product(MODES, MODES) if set(pair) != {"frozen"}])  # fmt: skip
def test_exactly_what_the_modes_say_changes(clip, tmp_path, vision, text):
    model = with_lora(clip, vision, text)[0]
    before = weights(model)
    make_trainer(clip, tmp_path, evaluate=False, max_steps=2, weight_decay=0.1).train()
    moved = changed(before, weights(model))
    expected = {"logit_scale"}
    for tower, mode in (("vision", vision), ("text", text)):
        own = [name for name in before if name.startswith(START[tower])]
        # k_proj biases shift all logits of a softmax alike: their gradient is zero up to rounding.
        expected |= {
            n for n in own if mode != "frozen" and (".lora_" in n) == (mode == "lora") and "k_proj.bias" not in n
        }
        assert sum(".lora_" in name for name in own) == (2 * LAYERS if mode == "lora" else 0)
    assert {name for name in moved if "k_proj.bias" not in name} == expected


def test_both_towers_frozen_are_refused(clip):
    with pytest.raises(UserError, match="for example full or lora, found both frozen"):
        set_towers(clip[0], "frozen", "frozen")


def test_parameters_are_counted(clip):
    plain = parameter_counts(clip[0])
    counts = parameter_counts(with_lora(clip, "lora", "full", lora_rank=4)[0])
    # Rank 4, two blocks: four matrices of 32 x 32, two of 32 x 64.
    assert counts["vision"] == (2 * 4 * (4 * 64 + 2 * 96), plain["vision"][1], LAYERS)
    assert counts["text"] == plain["text"] == (plain["text"][1], plain["text"][1], 0)


@pytest.mark.parametrize(
    ("vision", "text"), [("lora", "lora"), ("lora", "full"), ("frozen", "lora"), ("last:1", "lora")]
)
def test_merged_model_and_adapter_on_the_base_compute_the_same(clip, _clip, tmp_path, vision, text):
    base = outputs(_clip[0])
    trainer = make_trainer(with_lora(clip, vision, text), tmp_path, evaluate=False, max_steps=4, learning_rate=1e-2)
    trainer.train()
    trained = outputs(clip[0])
    assert (trained - base).abs().max() > 1e-2

    trainer.save_model(str(tmp_path / "merged"))
    merged, info = CLIPModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    Adapter.of(clip[0]).save_pretrained(tmp_path / "adapter", "somebody/clip", "main")
    adapted = PeftModel.from_pretrained(copy.deepcopy(_clip[0]), tmp_path / "adapter")
    torch.testing.assert_close(outputs(merged), trained, atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs(adapted), trained, atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs(adapted.merge_and_unload()), trained, atol=1e-5, rtol=0)
    # Saving the merged model left the trained one as it was.
    assert torch.equal(outputs(clip[0]), trained)

    scale = clip[0].logit_scale
    assert scale != _clip[0].logit_scale
    assert merged.logit_scale == scale == adapted.get_base_model().logit_scale
    prototypes = trainer.build_prototypes()
    assert prototypes.logit_scale == pytest.approx(scale.exp().item())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"], config["r"]) == ("somebody/clip", "main", 8)


@pytest.mark.parametrize(("vision", "text"), [("lora", "lora"), pytest.param("lora", "last:1", marks=pytest.mark.slow)])
def test_resumed_equals_uninterrupted(_clip, tmp_path, caplog, vision, text):
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": None}  # fmt: skip

    def trainer(seed, name):
        model = with_lora(copy.deepcopy(_clip), vision, text, seed, lora_dropout=0.2)
        return make_trainer(model, tmp_path / name, **settings)

    straight = trainer(0, "straight")
    straight.train()
    cut = trainer(0, "cut")
    cut.add_callback(StopAfter(5))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    # Another start of the LoRA matrices: all that is trained comes from the checkpoint.
    resumed = trainer(1, "cut")
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert "missing keys" not in caplog.text
    assert not changed(weights(straight.model), weights(resumed.model))
    assert straight.state.best_global_step == resumed.state.best_global_step

    stored = load_file(tmp_path / "cut" / "checkpoint-4" / "model.safetensors")
    assert set(stored) == {name for name, p in resumed.model.named_parameters() if p.requires_grad}
    assert "logit_scale" in stored


def test_the_best_epoch_is_restored(clip, tmp_path):
    trainer = make_trainer(with_lora(clip), tmp_path, num_train_epochs=6, learning_rate=2e-2, save_total_limit=None)
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    last = load_file(tmp_path / f"checkpoint-{trainer.state.global_step}" / "model.safetensors")
    assert 0 < trainer.state.best_global_step < trainer.state.global_step
    assert best["logit_scale"] != last["logit_scale"]
    found = weights(trainer.model)
    assert all(torch.equal(found[name], value) for name, value in best.items())
    assert trainer.evaluate()["eval_accuracy"] == trainer.state.best_metric


def test_gradient_checkpointing_changes_no_step(clip, _clip, tmp_path):
    models = []
    for on in (False, True):
        model = with_lora(copy.deepcopy(_clip), "lora", "frozen")
        make_trainer(model, tmp_path / str(on), evaluate=False, max_steps=3, gradient_checkpointing=on).train()
        models.append(weights(model[0]))
    assert any((value != 0).any() for name, value in models[1].items() if "vision" in name and ".lora_B" in name)
    torch.testing.assert_close(*models, atol=1e-6, rtol=0)


@pytest.mark.parametrize("other", [{"lora_rank": 4}, {"text": "frozen"}, {"text": "full"}, {"vision": "full", "text": "full"}])  # fmt: skip
def test_a_checkpoint_of_other_towers_is_refused(clip, _clip, tmp_path, other):
    make_trainer(with_lora(clip), tmp_path, max_steps=1, save_total_limit=None).train()
    trainer = make_trainer(with_lora(copy.deepcopy(_clip), **other), tmp_path)
    with pytest.raises(UserError, match="other towers, or other settings of LoRA"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-0"))


def test_checkpointing_that_gives_no_gradient_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected use_reentrant false"):
        MMFTConfig(str(tmp_path), gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})


def test_a_checkpoint_is_no_model(clip, tmp_path):
    make_trainer(with_lora(clip, "lora", "frozen"), tmp_path, max_steps=1, save_total_limit=None).train()
    with pytest.raises(UserError, match=r"holds only what was trained; type the run's output_dir"):
        load_model(str(tmp_path / "checkpoint-0"))


def test_models_that_would_lose_something_are_refused(clip, _clip, tmp_path):
    config = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"without an adapter of PEFT.*set_towers"):
        make_trainer((get_peft_model(copy.deepcopy(_clip[0]), config), clip[1]), tmp_path)
    model = copy.deepcopy(_clip[0])
    model.add_adapter(config)
    with pytest.raises(UserError, match="without an adapter of PEFT"):
        make_trainer((model, clip[1]), tmp_path)
    with pytest.raises(UserError, match="found LoRA layers in it"):
        set_towers(with_lora(clip)[0], "full", "full")


def test_targets(clip, _clip):
    model = with_lora(clip, "frozen", "lora", lora_targets=["q_proj", "text_projection"])[0]
    assert parameter_counts(model)["text"][2] == 3 and parameter_counts(model)["vision"][0] == 0
    for towers, targets, match in (
        (("lora", "lora"), ["q_proj", "query"], r"vision and the text tower \(fc1, fc2, .*; no layer is named query\."),
        (("lora", "full"), ["text_projection"], "no layer is named text_projection"),
        (("lora", "lora"), ["visual_projection"], "the text tower has none of them"),
        (("lora", "lora"), ["proj"], "no layer is named proj"),
    ):
        with pytest.raises(UserError, match=match):
            set_towers(copy.deepcopy(_clip[0]), *towers, lora_targets=targets)


# -- the command line ----------------------------------------------------------------------------------------------------


def arguments(clip_folder, data_folder, output, *more) -> list[str]:
    settings = f"--model_name_or_path {clip_folder} --dataset_name {data_folder} --output_dir {output} --use_cpu true --head prototypes"
    return ["finetune", *settings.split(), "--per_device_train_batch_size", "8", *more]


ONE_TOWER = "--vision_tower lora --text_tower frozen --num_train_epochs 6 --learning_rate 1e-2 --save_total_limit 9"


@pytest.fixture(scope="module")
def run(clip_folder, data_folder, tmp_path_factory):
    """One finished run with LoRA in the image tower: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("lora") / "out"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(arguments(clip_folder, data_folder, folder, *ONE_TOWER.split())) == 0
    return folder, printed.getvalue()


def test_it_says_what_is_trained(run):
    total = {tower: count[1] for tower, count in parameter_counts(CLIPModel.from_pretrained(run[0])).items()}
    trained = 2 * 8 * (4 * 64 + 2 * 96)
    assert f"vision tower lora ({trained:,} of {total['vision']:,} parameters, 12 layers), text tower frozen (0 of {total['text']:,} parameters)\n" in run[1]  # fmt: skip


def test_it_leaves_a_plain_model_and_the_adapter(run, clip_folder, data_folder):
    folder, _ = run
    base, merged = (load_file(path / "model.safetensors") for path in (clip_folder, folder))
    assert base.keys() == merged.keys()
    ends = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")
    targets = {name for name in base if name.startswith("vision_model.") and name.endswith(ends)}
    assert len(targets) == LAYERS
    assert changed(base, merged) == targets | {"logit_scale"}
    assert {p.name for p in (folder / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == clip_folder.name  # of a local path only the last part

    model, processor = load_model(str(folder))
    adapted = PeftModel.from_pretrained(CLIPModel.from_pretrained(clip_folder), folder / "adapter")
    torch.testing.assert_close(outputs(adapted), outputs(model), atol=1e-5, rtol=0)
    saved = ClassPrototypes.from_pretrained(folder)
    train = mmft_hf.load_captioned_dataset(str(data_folder))["train"]
    again = ClassPrototypes.from_captions(model, processor, train)
    torch.testing.assert_close(saved.embeddings, again.embeddings, atol=1e-6, rtol=0)
    assert saved.logit_scale == again.logit_scale


def test_stock_and_own_tools_open_it(run, data_folder, capsys):
    folder, _ = run
    results = json.loads((folder / "all_results.json").read_text())
    assert results["test_accuracy"] > results["zero_shot_test_accuracy"] and results["best_epoch"] > 0
    assert main(["evaluate", "--model_name_or_path", str(folder), "--dataset_name", str(data_folder)]) == 0
    assert f"accuracy        {100 * results['test_accuracy']:.1f} %" in capsys.readouterr().out
    rows = Dataset.from_parquet(str(folder / "predictions_test.parquet"))
    pictures = Dataset.from_parquet(str(data_folder / "test.parquet"))["image"]
    found = pipeline("mmft-image-classification", model=str(folder))(list(pictures), top_k=1)
    assert [top[0]["label"] for top in found] == rows["prediction"][:]
    picture = pictures[0]
    assert len(pipeline("zero-shot-image-classification", model=str(folder))(picture, candidate_labels=["a", "b"])) == 2


def cut(folder, target, checkpoint: str):
    """What a kill after `checkpoint` leaves: no later checkpoint, no results, a record that says so."""
    shutil.copytree(folder, target)
    for path in target.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > int(checkpoint.split("-")[1]):
            shutil.rmtree(path)
    shutil.rmtree(target / "adapter")
    (target / "model.safetensors").unlink()
    record = json.loads((target / "mmft.json").read_text())
    (target / "mmft.json").write_text(json.dumps(record | {"completed": False}))


def test_cut_and_resumed_gives_the_same_files(run, clip_folder, data_folder, tmp_path):
    cut(run[0], tmp_path / "cut", "checkpoint-6")
    command = arguments(clip_folder, data_folder, tmp_path / "cut", *ONE_TOWER.split())
    assert main([*command, "--resume_from_checkpoint", "true"]) == 0
    for name in ("model.safetensors", "prototypes.safetensors", "adapter/adapter_model.safetensors"):
        assert not changed(load_file(run[0] / name), load_file(tmp_path / "cut" / name)), name


def test_a_resume_with_another_rank_is_refused(run, clip_folder, data_folder, capsys):
    command = arguments(clip_folder, data_folder, run[0], *ONE_TOWER.split(), "--resume_from_checkpoint", "true")
    assert main([*command, "--lora_rank", "4"]) == 2
    assert "lora was {'lora_rank': 8," in " ".join(capsys.readouterr().err.split())
    identity = json.loads((run[0] / "mmft.json").read_text())["identity"]
    assert identity["lora"] == {"lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_targets": None}


@pytest.mark.usefixtures("captions_classify_nothing")
def test_the_zero_shot_classifier_wins_where_no_epoch_is_better(run, clip_folder, data_folder, tmp_path):
    """In a folder that is overwritten, so that an adapter of before would be seen, too."""
    shutil.copytree(run[0], tmp_path / "out")
    more = ["--vision_tower", "lora", "--max_steps", "1", "--overwrite_output_dir", "true"]
    assert main(arguments(clip_folder, data_folder, tmp_path / "out", *more)) == 0
    base, found = (load_file(path / "model.safetensors") for path in (clip_folder, tmp_path / "out"))
    assert base.keys() == found.keys() and not changed(base, found)
    assert not (tmp_path / "out" / "adapter").exists()
    assert ClassPrototypes.from_pretrained(tmp_path / "out").source == "template"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--vision_tower lora --lora_rank 0", "--lora_rank: expected 1 or more, found 0"),
        ("--vision_tower lora --lora_alpha -1", "--lora_alpha: expected 1 or more, found -1"),
        ("--vision_tower lora --lora_dropout 1", "--lora_dropout: expected 0 to below 1, found 1.0"),
        ("--text_tower lora --lora_targets query", "(fc1, fc2, k_proj, out_proj, q_proj, text_projection, v_proj)"),
        ("--lora_rank 4", "--lora_rank: expected --vision_tower lora or --text_tower lora with it"),
    ],
)
def test_wrong_settings(words, message, clip_folder, data_folder, tmp_path, capsys):
    assert main(arguments(clip_folder, data_folder, tmp_path / "out", *words.split())) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_equal_one(clip_folder, data_folder, tmp_path):
    # SGD: Adam would blow the rounding of gradients that are zero up to whole steps.
    settings = "--vision_tower lora --text_tower full --max_steps 4 --optim sgd --learning_rate 0.3 --load_best_model_at_end false"  # fmt: skip
    words = arguments(clip_folder, data_folder, tmp_path / "one", *settings.split())
    assert main(words) == 0
    words[words.index("--output_dir") + 1] = str(tmp_path / "two")
    words[words.index("--per_device_train_batch_size") + 1] = "4"
    run_python(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "mmft_hf", *words])
    assert json.loads((tmp_path / "two" / "mmft.json").read_text())["identity"]["world_size"] == 2
    for name in ("adapter/adapter_model.safetensors", "model.safetensors"):
        one, two = (load_file(tmp_path / run / name) for run in ("one", "two"))
        assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-6, name
    start = load_file(clip_folder / "model.safetensors")
    moved = {key: (one[key] - start[key]).abs().max().item() for key in start}
    assert max(v for k, v in moved.items() if k.startswith("text_model.")) > 1e-2
    assert max(v for k, v in moved.items() if k.startswith("vision_model.")) > 1e-4
