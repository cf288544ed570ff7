"""What the README promises is what happens."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import mmft_hf

ROOT = Path(mmft_hf.__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_it_is_short():
    assert len(README.splitlines()) <= 180


FINETUNE, TRAINER = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize(
    "snippet", [pytest.param(FINETUNE, marks=pytest.mark.slow, id="finetune"), pytest.param(TRAINER, id="trainer")]
)
def test_python_of_the_readme_runs(tmp_path, monkeypatch, snippet):
    assert len(snippet.strip().splitlines()) <= 12
    # Two steps in place of two epochs: the same calls in a tenth of the time.
    few = "max_steps=2, per_device_train_batch_size=8"
    short = snippet.replace("num_train_epochs=2", few).replace("epochs=2", few)
    assert short != snippet
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(short, "README", "exec"), {})
    assert printed.getvalue().count("'score'") == 3


def test_links_of_the_readme_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) >= 6
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_settings_of_the_readme_exist():
    import importlib

    from mmft_hf.cli import VERBS

    fields = {"config", "help"}
    for verb in VERBS:
        for dataclass in importlib.import_module(f"mmft_hf.commands.{verb}").ARGUMENTS:
            fields |= set(dataclass.__dataclass_fields__)
    guides = "".join(path.read_text() for path in (ROOT / "docs" / "guides").glob("*.md"))
    named = set(re.findall(r"--([a-z_0-9]+)", README + guides))
    assert (
        named - {"num_processes", "nproc_per_node", "data", "limit", "async"} <= fields
    )  # of accelerate, torchrun, vLLM
