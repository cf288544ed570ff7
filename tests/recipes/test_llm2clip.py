"""recipes/llm2clip/README.md: its commands, typed one after the other, on tiny models."""

import re
import shlex
from pathlib import Path

import pytest
from processes import run_python
from tiny_clip import colour_images
from tiny_trunks import WORDS, save_llama, word_tokenizer

from mmft_hf.commands import push
from mmft_hf.commands.parser import parse

RECIPE = Path(__file__).parents[2] / "recipes" / "llm2clip"


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```\n(.*?)^```", (RECIPE / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def test_every_command_is_one_of_ours():
    starts = [tuple(words[:2]) for words in commands()]
    assert starts == [
        ("python", "recipes/llm2clip/cc.py"),
        *[("mmft-hf", verb) for verb in ("finetune", "predict", "predict", "push", "push")],
    ]
    for words in commands():
        if words[1] == "push":
            assert parse("push", push, words[2:])


@pytest.mark.slow
def test_the_commands_end_with_a_classifier_that_needs_no_language_model(clip_folder, data_folder, tmp_path):
    save_llama(tmp_path / "llama", tokenizer=word_tokenizer([*WORDS, "thing", "no", "very"]))
    colour_images(1)[0][0].save(tmp_path / "picture.jpg")
    names = {
        "HuggingFaceTB/SmolLM2-135M": str(tmp_path / "llama"),
        "openai/clip-vit-base-patch32": str(clip_folder),
        "YOUR_DATA": str(data_folder),
        "recipes/llm2clip/cc.py": str(RECIPE / "cc.py"),
    }
    more = {
        "cc.py": ["--num_train_epochs", "1", "--per_device_train_batch_size", "8"],
        "finetune": ["--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--use_cpu", "true"],
    }
    said = []
    for words in commands()[:4]:
        words = [names.get(word, word) for word in words]
        script = ["-m", "mmft_hf"] if words[0] == "mmft-hf" else []
        words = [*script, *words[1:], *more.get(Path(words[1]).name, [])]
        if words[2:3] == ["predict"] and "--classes" not in words:
            (tmp_path / "llama").rename(tmp_path / "away")  # it is not missed
        said.append("".join(run_python(words, cwd=tmp_path, MMFT_HF_CACHE=tmp_path / "cache")))
        if (tmp_path / "away").exists():
            (tmp_path / "away").rename(tmp_path / "llama")
    assert "ridge start from" in said[1] and "vectors of llama" in said[1]
    assert "picture.jpg: " in said[2] and "Opening the caption encoder" not in said[2]
    assert "Opening the caption encoder llama" in said[3] and "lynx" in said[3]
    trunk = tmp_path / "outputs" / "adapted" / "text_trunk"
    assert {path.name for path in trunk.iterdir()} == {
        *("caption_encoder.json", "adapter_config.json", "adapter_model.safetensors"),
    }
    assert "with LoRA weights of its own" in (tmp_path / "outputs" / "adapted" / "README.md").read_text()
