"""Settings of texts in a benchmark: `--text_mix` and `--long_captions`."""

import pytest
from benchmark_tools import command, parts_of
from long_captions import planted
from tiny_clip import colour_dataset

from mmft_hf.benchmark.run.results import RESULTS_FILE, read_results
from mmft_hf.cli import main

SOME = ("--shots", 2, "--seeds", 0, "--methods")


def numbers(folder) -> dict:
    rows = read_results(folder / RESULTS_FILE)
    assert [row["status"] for row in rows] == ["done"] * len(rows), rows
    return {row["method"]: (row["validation_accuracy"], row["test_accuracy"], row["predictions"]) for row in rows}


@pytest.mark.slow
def test_a_mix_is_for_its_method_alone(clip_folder, tmp_path):
    """With the template for half of the texts it is `mmft-dropout`."""
    train = colour_dataset(4)
    records = [[{"text": own[1], "step": "short"}, {"text": own[0], "step": None}] for own in train["captions"][:]]
    data = parts_of(tmp_path / "data", train=train.add_column("caption_records", records)) / "data"

    def run(name, *words):
        assert main(command(clip_folder, data, tmp_path / name, *SOME, *words)) == 0
        return numbers(tmp_path / name)

    found = run("template", "mmft", "mmft-dropout", "mmft-text-mix", "--text_mix", "template=0.5")
    assert found["mmft-text-mix"] == found["mmft-dropout"]
    other = run("short", "mmft", "mmft-text-mix", "--text_mix", "short=1")
    assert other["mmft"] == found["mmft"]
    for row in read_results(tmp_path / "short" / RESULTS_FILE):
        assert len(row["identity"]["sources"][""]) == 16


@pytest.mark.slow
@pytest.mark.parametrize("how", ["windows", "stretch"])
def test_long_captions_are_read_by_all_methods(how, clip_folder, tmp_path):
    parts = {name: planted(images, seed=images) for name, images in (("train", 3), ("validation", 2), ("test", 4))}
    data = parts_of(tmp_path / "data", **parts) / "data"
    words = command(clip_folder, data, tmp_path / "out", *SOME, "zs-cap", "mmft", "zs+mean", "mmft+auto")
    assert main([*words, "--long_captions", how]) == 0
    assert set(numbers(tmp_path / "out")) == {"zs-cap", "mmft", "zs+mean", "mmft+auto"}
    settings = read_results(tmp_path / "out" / RESULTS_FILE)[0]["identity"]["settings"]
    assert settings["long_captions"] == how
