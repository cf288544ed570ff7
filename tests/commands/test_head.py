"""`mmft-hf head`: another head for a finished run, of this version or of the first, without training and without touching it."""

import contextlib
import io
import json
import shutil
from hashlib import sha256
from pathlib import Path

import datasets
import pytest
import torch
from datasets import ClassLabel
from safetensors.torch import load_file
from tiny_clip import colour_dataset

import mmft_hf
from mmft_hf.cli import main
from mmft_hf.commands.push import keys_note
from mmft_hf.predict.heads import load_head

FIRST = Path(__file__).parents[1] / "fixtures" / "first_edition"


def content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Without captions."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    for seed, (split, per_class) in enumerate((("train", 4), ("validation", 18), ("test", 3))):
        colour_dataset(per_class, seed, captions=False).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def run(clip_folder, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    names = ["--model_name_or_path", str(clip_folder), "--dataset_name", str(data), "--output_dir", str(folder)]
    settings = ["--max_steps", "2", "--head", "prototypes", "--use_cpu", "true", "--disable_tqdm", "true"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["finetune", *names, *settings, "--learning_rate", "5e-3"]) == 0
    return folder


@pytest.fixture
def fails(run, capsys):
    """Runs the command, expects exit code 2 and these words, and that the run is as it was."""

    def check(*words, told, folder=run):
        before = content(run)
        assert main(["head", *map(str, (folder, *words))]) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in told) and "Traceback" not in said, said
        assert content(run) == before

    return check


def test_another_head_for_a_run(run, data, tmp_path, capsys):
    before, out = content(run), tmp_path / "new"
    assert main(["head", str(run), "--head", "kernel", "--output_dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert content(run) == before
    assert "before     " in printed and "head prototypes" in printed and "head kernel" in printed
    assert f"mmft-hf predict YOUR_PICTURE.jpg --model_name_or_path {out}" in printed
    one, other = (load_file(folder / "model.safetensors") for folder in (run, out))
    assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()
    head = load_head(str(out))
    assert head.kind == "kernel" and head.keys.shape == (12, 32) and head.temperature != 1
    old, new = (json.loads((folder / "all_results.json").read_text()) for folder in (run, out))
    assert (new["head"], new["refitted"]) == ("kernel", True)
    assert new["test_accuracy"] == 1.0 > old["test_accuracy"]
    for name in ("zero_shot_test_accuracy", "zero_shot_validation_accuracy", "best_epoch", "train_loss"):
        assert new[name] == old[name], name
    card = (out / "README.md").read_text()
    assert "and again for this head" in card and "of kind `kernel`" in card
    records = [json.loads((folder / "mmft.json").read_text()) for folder in (run, out)]
    assert records[0]["identity"] == records[1]["identity"] and records[1]["completed"]
    # The new folder is a run like any other.
    assert main(["evaluate", "--model_name_or_path", str(out), "--dataset_name", str(data)]) == 0
    assert "100.0 %" in capsys.readouterr().out
    assert (
        main(["head", str(out), "--head", "prototypes", "--calibrate", "false", "--output_dir", str(tmp_path / "b")])
        == 0
    )
    back, first = (mmft_hf.ClassPrototypes.from_pretrained(folder) for folder in (tmp_path / "b", run))
    torch.testing.assert_close(back.embeddings, first.embeddings, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_another_head_for_a_run_of_the_first_edition(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for part in ("clip", "colours", f"runs/{name}"):
        shutil.copytree(FIRST / part, part)
    before = content(tmp_path / "runs" / name)
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["head", f"runs/{name}/", "--head", "kernel"]) == 0  # the default folder
    assert content(tmp_path / "runs" / name) == before
    old, new = (
        json.loads((Path(f"runs/{folder}") / "all_results.json").read_text()) for folder in (name, f"{name}-kernel")
    )
    assert new["head"] == "kernel" and new["zero_shot_test_accuracy"] == old["zero_shot_test_accuracy"]
    one, other = (load_file(f"runs/{folder}/model.safetensors") for folder in (name, f"{name}-kernel"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    classifier = mmft_hf.ImageClassifier.from_pretrained(f"runs/{name}-kernel")
    rows = datasets.load_dataset("parquet", data_files=f"runs/{name}-kernel/predictions_test.parquet", split="train")
    pictures = mmft_hf.load_captioned_dataset("colours")["test"]["image"][:]
    assert [best[0]["label"] for best in classifier.predict(pictures)] == rows["prediction"][:]


def test_a_threshold_is_fitted_or_it_is_said_that_none_was_found(run, tmp_path, capsys):
    words = ["head", str(run), "--head", "kernel", "--output_dir"]
    assert main([*words, str(tmp_path / "a"), "--reject_for_accuracy", "0.99"]) == 0
    assert "No threshold was found from which on answers are right in 99 % of all cases" in capsys.readouterr().out
    assert load_head(str(tmp_path / "a")).reject_below is None
    assert "No threshold was found" in (tmp_path / "a" / "README.md").read_text()
    assert main([*words, str(tmp_path / "b"), "--reject_for_accuracy", "0.9"]) == 0
    assert "the answer to a picture whose best class has less than" in capsys.readouterr().out
    assert 0 < load_head(str(tmp_path / "b")).reject_below <= 1
    colour_dataset(1, seed=4)["image"][0].save(tmp_path / "one.png")
    command = ["predict", str(tmp_path / "one.png"), "--model_name_or_path", str(tmp_path / "b"), "--top_k", "3"]
    for least, first in (("0", "red thing"), ("1", "unknown")):
        assert main([*command, "--reject_below", least, "--output_file", str(tmp_path / "a.jsonl")]) == 0
        (answer,) = (json.loads(line)["predictions"] for line in (tmp_path / "a.jsonl").read_text().splitlines())
        assert answer[0]["label"] == first and len(answer) == 3


@pytest.mark.slow
def test_the_linear_head_is_fitted_with_adjusted_logits(run, fails, tmp_path):
    words = ["head", str(run), "--head", "linear", "--logit_adjustment"]
    for tau in ("0", "1"):
        assert main([*words, tau, "--output_dir", str(tmp_path / tau)]) == 0
    plain, adjusted = (load_head(str(tmp_path / tau)) for tau in ("0", "1"))
    assert adjusted.fitted["adjustment"] == 1 and "adjustment" not in plain.fitted
    torch.testing.assert_close(plain.weight, adjusted.weight)  # classes of equal sizes: the same number for each
    fails(
        "--head",
        "kernel",
        "--logit_adjustment",
        "1",
        told=("--logit_adjustment", "Leave it out, or type --head linear"),
    )


# -- what is refused -----------------------------------------------------------------------------------------------------
def test_folders_that_are_no_finished_run(fails, clip_folder, tmp_path):
    fails(folder=tmp_path / "nothing", told=("expected the folder of a finished run", "found no mmft.json"))
    fails(folder=clip_folder, told=("expected the folder of a finished run", "found no mmft.json"))
    shutil.copy(FIRST / "runs" / "full_cut" / "mmft.json", tmp_path)
    fails(folder=tmp_path, told=("found an interrupted one", "--resume_from_checkpoint true"))
    fails("another", told=("expected one folder of a finished run, found 2",))


def test_data_that_are_not_those_of_the_run(fails, data, tmp_path):
    shutil.copytree(data, tmp_path / "changed")
    colour_dataset(4, seed=7, captions=False).to_parquet(tmp_path / "changed" / "train.parquet")
    fails(
        "--dataset_name",
        tmp_path / "changed",
        "--output_dir",
        tmp_path / "out",
        told=("expected the data of the run", "fingerprint"),
    )
    fails("--dataset_name", tmp_path / "gone", "--output_dir", tmp_path / "out", told=("gone",))
    assert not (tmp_path / "out").exists()


def test_output_folders_that_are_in_use(fails, run, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    for folder in (tmp_path / "used", tmp_path / "used" / "notes.txt", run):
        fails("--output_dir", folder, told=("expected a new or empty folder", "Type another --output_dir"))
    assert (tmp_path / "used" / "notes.txt").read_text() == "mine"


def test_heads_that_do_not_fit_the_data(fails, tmp_path):
    fails(
        "--head", "text", "--output_dir", tmp_path / "out", told=("--head text: expected captions", "mmft-hf caption")
    )
    fails("--head", "knn", "--output_dir", tmp_path / "out", told=("knn",))
    fails("--reject_below", "2", "--output_dir", tmp_path / "out", told=("reject_below", "0 to 1"))
    both = ("--reject_below", "0.5", "--reject_for_accuracy", "0.9")
    fails(*both, "--output_dir", tmp_path / "out", told=("expected one of them, found both",))
    assert not (tmp_path / "out").exists()


def test_a_class_named_unknown_is_refused_before_anything_is_trained(clip_folder, data, tmp_path, capsys):
    names = ["red thing", "unknown", "blue thing"]
    for split in ("train", "validation", "test"):
        rows = datasets.load_dataset("parquet", data_files=str(data / f"{split}.parquet"), split="train")
        rows.cast_column("label", ClassLabel(names=names)).to_parquet(tmp_path / "data" / f"{split}.parquet")
    words = [
        "finetune",
        "--model_name_or_path",
        str(clip_folder),
        "--dataset_name",
        str(tmp_path / "data"),
        "--use_cpu",
        "true",
    ]
    words += [
        "--output_dir",
        str(tmp_path / "out"),
        "--num_train_epochs",
        "0",
        "--head",
        "gda",
        "--disable_tqdm",
        "true",
    ]
    for option in ("--reject_below", "--reject_for_accuracy"):
        assert main([*words, option, "0.9"]) == 2
        assert "found a class named 'unknown'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(words) == 0
    for verb in (
        ["head"],
        ["predict", "--model_name_or_path"],
        ["evaluate", "--dataset_name", str(tmp_path / "data"), "--model_name_or_path"],
    ):
        more = ["--output_dir", str(tmp_path / "new")] if verb == ["head"] else []
        picture = [str(tmp_path / "one.png")] if verb[0] == "predict" else []
        colour_dataset(1)["image"][0].save(tmp_path / "one.png")
        assert main([*verb, str(tmp_path / "out"), *picture, *more, "--reject_below", "0.9"]) == 2
        assert "found a class named 'unknown'" in capsys.readouterr().err, verb


def test_a_finished_run_does_not_silently_keep_another_head(run, clip_folder, data, capsys):
    words = [
        "finetune",
        "--model_name_or_path",
        str(clip_folder),
        "--dataset_name",
        str(data),
        "--output_dir",
        str(run),
    ]
    words += ["--max_steps", "2", "--use_cpu", "true", "--learning_rate", "5e-3", "--resume_from_checkpoint", "true"]
    before = content(run)
    assert main([*words, "--head", "kernel"]) == 2
    assert f"Type mmft-hf head {run}" in capsys.readouterr().err
    assert main([*words, "--head", "prototypes"]) == 0
    assert "already holds this run" in capsys.readouterr().out
    assert content(run) == before


def test_a_push_of_a_kernel_head_says_what_it_holds(run, tmp_path):
    assert main(["head", str(run), "--head", "kernel", "--output_dir", str(tmp_path / "new")]) == 0
    note = keys_note(tmp_path / "new")
    assert "holds the embeddings of the training pictures" in note and f"{tmp_path / 'new'} --head linear" in note
    assert keys_note(run) is None
