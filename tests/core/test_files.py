"""What is ours in a folder, and how files are written."""

import shutil
from pathlib import Path

import pytest

from mmft_hf.core.files import is_ours

EDITION = Path(__file__).parents[1] / "fixtures" / "first_edition"


@pytest.mark.parametrize("backend", ["anthropic", "columns", "template"])
def test_a_captioned_folder_is_recognized(backend):
    assert is_ours(EDITION / "captioned" / backend)


def test_run_checkpoint_journal_and_benchmark_are_recognized(tmp_path):
    for files in (
        ["run/mmft.json"],
        ["bare/checkpoint-12/trainer_state.json"],
        ["asked/journal/journal-00000.sqlite"],
        ["grid/results.jsonl", "grid/claims/data.lock"],
        ["copied/results.jsonl", "copied/report.html"],
    ):
        for file in files:
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    ours = [tmp_path / name for name in ("run", "bare/checkpoint-12", "asked", "grid", "copied")]
    assert all(map(is_ours, ours))
    shutil.copytree(tmp_path / "run", tmp_path / "odd [1] name")
    assert is_ours(tmp_path / "odd [1] name")


def test_what_people_have_is_not_ours(tmp_path):
    for file in (
        "coco/captions.json",  # the captions of a data set, without our page beside them
        "checkpoint-7/cat.png",  # a class of that name
        "results.jsonl",
        "journal/cover.png",
        "cats/report.html",
    ):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert not any(map(is_ours, [tmp_path, *(path for path in tmp_path.iterdir()), tmp_path / "missing"]))
