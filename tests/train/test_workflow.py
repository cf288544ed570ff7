"""`mmft_hf.finetune`: the main job in Python, the same as the command."""

import json

import pytest
from datasets import Dataset, DatasetDict, load_dataset
from safetensors.torch import load_file
from tiny_clip import COLOURS, colour_dataset

import mmft_hf
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.train.workflow import Reporter

FAST = {"epochs": 3, "learning_rate": 5e-3, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True}


class Remembering(Reporter):
    def __init__(self):
        self.seen = []

    def started(self, plan):
        self.seen.append(("started", plan.zero_shot_accuracy, len(plan.splits.train)))

    def finished(self, result):
        self.seen.append(("finished", result.test_accuracy, result.repeated))


@pytest.fixture(scope="module")
def in_python(clip_folder, data_folder, tmp_path_factory):
    folder, reporter = tmp_path_factory.mktemp("python") / "out", Remembering()
    return mmft_hf.finetune(str(data_folder), str(clip_folder), folder, reporter=reporter, **FAST), reporter


def test_the_result_has_the_numbers_and_the_classifier(in_python, tmp_path):
    result, reporter = in_python
    assert result.metrics == json.loads((result.output_dir / "all_results.json").read_text())
    assert result.test_accuracy == result.metrics["test_accuracy"]
    assert result.zero_shot_test_accuracy == result.metrics["zero_shot_test_accuracy"]
    assert [seen[0] for seen in reporter.seen] == ["started", "finished"]
    assert reporter.seen[0][1:] == (result.metrics["zero_shot_validation_accuracy"], 24)
    colour_dataset(1)[0]["image"].save(tmp_path / "one.png")
    found = result.classifier(str(tmp_path / "one.png"))
    assert {answer["label"] for answer in found} == set(COLOURS)
    loaded = mmft_hf.ImageClassifier.from_pretrained(result.output_dir).predict(tmp_path / "one.png")
    assert [a["label"] for a in found] == [a["label"] for a in loaded]
    assert [a["score"] for a in found] == pytest.approx([a["score"] for a in loaded], abs=1e-5)


def test_the_command_leaves_the_same_folder(in_python, clip_folder, data_folder, tmp_path, capsys):
    result, _ = in_python
    settings = [f"--{name}={value}" for name, value in FAST.items() if name != "epochs"]
    names = ["--dataset_name", str(data_folder), "--model_name_or_path", str(clip_folder)]
    assert main(["finetune", *names, "--output_dir", str(tmp_path / "out"), "--num_train_epochs=3", *settings]) == 0
    assert "Test accuracy on" in capsys.readouterr().out
    files = {path.name for path in result.output_dir.iterdir()}
    assert files == {path.name for path in (tmp_path / "out").iterdir()}
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (result.output_dir / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    heads = [load_file(folder / "head.safetensors") for folder in (result.output_dir, tmp_path / "out")]
    assert heads[0].keys() == heads[1].keys() and all(heads[0][name].equal(heads[1][name]) for name in heads[0])


@pytest.mark.slow
def test_data_sets_in_memory_train_as_their_files_do(in_python, clip_folder, data_folder, tmp_path):
    result, _ = in_python
    files = {split: str(data_folder / f"{split}.parquet") for split in ("train", "validation", "test")}
    data = load_dataset("parquet", data_files=files)
    shuffled = data["test"].shuffle(seed=3)  # an index into other rows
    for splits in (data, {**data, "test": shuffled}):
        other = mmft_hf.finetune(splits, str(clip_folder), tmp_path / str(len(list(tmp_path.iterdir()))), **FAST)
        assert other.test_accuracy == result.test_accuracy
        found, expected = (load_file(one.output_dir / "head.safetensors") for one in (other, result))
        assert all((found[name] == expected[name]).all() for name in expected)
    assert "in-memory data" in (other.output_dir / "README.md").read_text()


@pytest.mark.slow
def test_one_data_set_is_split(clip_folder, tmp_path):
    reporter = Remembering()
    data = colour_dataset(10)
    result = mmft_hf.finetune(data, clip_folder, tmp_path / "out", reporter=reporter, shots=4, **{**FAST, "epochs": 1})
    assert reporter.seen[0][2] == 12 and result.metrics["test_images"] == 6
    assert isinstance(data, Dataset) and "captions" in data.column_names


def test_a_finished_run_is_not_repeated(in_python, clip_folder, data_folder):
    result, _ = in_python
    reporter = Remembering()
    again = mmft_hf.finetune(
        str(data_folder), str(clip_folder), result.output_dir, resume_from_checkpoint=True, reporter=reporter, **FAST
    )
    assert again.repeated and again.metrics == result.metrics
    assert reporter.seen == [("finished", result.test_accuracy, True)]


def test_unknown_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"unknown setting learning_rte\. Did you mean 'learning_rate'"):
        mmft_hf.finetune(DatasetDict(), output_dir=tmp_path, learning_rte=1)


@pytest.mark.parametrize("wrong", [{"learning_rate": "fast"}, {"shots": "few"}, {"epochs": "many"}])
def test_a_text_in_place_of_a_number_is_refused(tmp_path, data_folder, wrong):
    with pytest.raises(UserError, match=f"expected .*, found '{next(iter(wrong.values()))}'"):
        mmft_hf.finetune(str(data_folder), output_dir=tmp_path, **wrong)


@pytest.mark.parametrize("wrong", [None, 3, {"train": [1, 2]}])
def test_what_is_no_dataset_is_refused(tmp_path, wrong):
    with pytest.raises(UserError, match="expected a Hub id, a folder, a Dataset or Datasets by split name, found"):
        mmft_hf.finetune(wrong, output_dir=tmp_path)
