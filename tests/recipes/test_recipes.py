"""Every recipe parses, and the scripts do what their verbs do."""

import importlib
from pathlib import Path

import pytest
from launch_tools import launch
from processes import end, run_python

from mmft_hf.cli import VERBS
from mmft_hf.commands.parser import parse

RECIPES = Path(__file__).parents[2] / "recipes"
# A file is named after its verb.
YAMLS = sorted(p for p in RECIPES.rglob("*.yaml") if p.stem in VERBS)
BENCHMARK = RECIPES / "speed.py"
MEMORY = RECIPES / "memory.py"
SCRIPTS = sorted(path for path in RECIPES.glob("*.py") if path not in (BENCHMARK, MEMORY))


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_yaml_parses_and_changes_something(path):
    command = importlib.import_module(f"mmft_hf.commands.{path.stem}")
    filled = parse(path.stem, command, ["--config", str(path)])
    assert [str(a) for a in filled] != [str(a) for a in parse(path.stem, command, [])]


def test_quickstart_recipe_is_what_make_runs():
    makefile = (RECIPES.parent / "Makefile").read_text()
    (caption,) = (p for p in YAMLS if p.parent.name == "quickstart" and p.stem == "caption")
    _, arguments, _ = parse("caption", importlib.import_module("mmft_hf.commands.caption"), ["--config", str(caption)])
    assert f"--dataset_name {arguments.output_dir} --captions_column captions" in makefile


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_scripts_are_thin_and_named_after_their_verb(path):
    assert path.stem in VERBS
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.slow
def test_accelerate_launch_runs_the_finetune_recipe(clip_folder, data_folder, tmp_path):
    settings = f"""
model_name_or_path: {clip_folder}
dataset_name: {data_folder}
output_dir: {tmp_path / "out"}
max_steps: 2
learning_rate: 1e-3
per_device_train_batch_size: 8
"""
    (tmp_path / "finetune.yaml").write_text(settings)
    options = "--cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    words = ["--config", tmp_path / "finetune.yaml"]
    out, _ = end(launch(*options, script=RECIPES / "finetune.py", words=words))
    assert "Test accuracy on 18 images" in out
    assert (tmp_path / "out" / "head.safetensors").is_file()


@pytest.mark.slow
def test_the_benchmark_of_speed_prints_its_tables():
    words = "--geometries tiny-clip --batches 4 --rounds 1 --sections steps chunks --chunks 2 6".split()
    out, _ = run_python([BENCHMARK, *words])
    assert out.count("| ours |") == 2 and out.count("| plain |") == 2
    assert "- overhead of a step over the floor: " in out
    assert "| 6 | 2 | " in out
