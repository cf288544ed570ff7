"""What is shipped: assets in the wheel with their licences, metadata in setup.cfg, no word about this or that machine."""

import configparser
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import mmft_hf
from mmft_hf.core.builtin import ASSETS

ROOT = Path(__file__).parent.parent


def test_assets_are_small():
    total = sum(p.stat().st_size for p in ASSETS.rglob("*") if p.is_file())
    assert total <= 45_000_000  # 29 of them are builtin/photo; PyPI takes files of up to 100


def test_the_wheel_holds_assets_templates_and_licences(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path)], check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tracked = {str(p.relative_to(ROOT)) for p in ASSETS.rglob("*") if p.is_file()} | {
        "mmft_hf/core/page.css",
        "mmft_hf/hub/templates/model_card.md.j2",
        "mmft_hf/captioning/write/templates/captions.html.j2",
        "mmft_hf/captioning/write/templates/caption_card.md.j2",
        "mmft_hf/benchmark/report/templates/report.html.j2",
    }
    assert tracked <= set(names)
    assert any(name.endswith("/LICENSE") for name in names)
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    for requirement in (
        "torch",
        "transformers<6,>=5.2",
        "datasets",
        "accelerate",
        "peft",
        "evaluate",
        "huggingface_hub",
    ):
        assert f"Requires-Dist: {requirement}" in metadata, requirement
    assert "torchvision" not in metadata


def test_metadata_lives_in_setup_cfg():
    assert not re.search(r"^\[project", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["metadata"]["name"] == "mmft_hf"


def test_builtin_model_is_a_clip_in_half_precision_that_loads_in_float32():
    from safetensors.torch import load_file

    stored = load_file(ASSETS / "tiny_clip" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float16}
    model, processor = mmft_hf.load_model("builtin/tiny-clip")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert processor.tokenizer.model_max_length == model.config.text_config.max_position_embeddings == 77
    assert processor.tokenizer("a cat")["input_ids"][-1] == model.config.text_config.eos_token_id


def test_builtin_model_opens_in_the_stock_zero_shot_pipeline():
    from transformers import pipeline

    data = mmft_hf.load_captioned_dataset("builtin/emoji-mini")["validation"]
    classifier = pipeline("zero-shot-image-classification", model=str(ASSETS / "tiny_clip"))
    found = classifier(data[0]["image"], candidate_labels=data.features["label"].names)
    assert len(found) == 24


def test_public_names_are_those_of_the_contract():
    expected = (
        "MMFTTrainer MMFTConfig MMFTDataCollator MMFTLoss supcon_loss clip_loss ClassPrototypes load_model "
        "load_captioned_dataset few_shot_split caption_dataset Captioner ClassificationReport "
        "MMFTImageClassificationPipeline"
    ).split()
    for name in expected:
        assert getattr(mmft_hf, name).__doc__, name
    with pytest.raises(AttributeError, match="no_such_name"):
        mmft_hf.no_such_name  # noqa: B018


def test_make_targets_of_the_readme_exist():
    makefile, readme = (ROOT / "Makefile").read_text(), (ROOT / "README.md").read_text()
    for target in set(re.findall(r"make (\w+)", readme)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    ci = (ROOT / ".ci" / "run").read_text()
    assert "make test-all" in ci and "make docs" in ci


def test_constraints_pin_what_is_installed():
    import importlib.metadata

    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    not_for_tests = {"mkdocstrings-python"} | set(
        re.findall(r"^[\w-]+", config["options.extras_require"]["docs"], re.M)
    )
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" in line:
            name, version = line.split(";")[0].split("==")
            try:
                installed = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                assert name in not_for_tests, name
            else:
                assert installed.split("+")[0] == version, name
