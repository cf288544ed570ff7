"""The default head: how weights and head are chosen, and that whatever opens the saved folder answers as the classifier did."""

import contextlib
import csv
import hashlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from card_tools import execute, snippets
from datasets import load_dataset
from forked import start
from launch_tools import free_port
from safetensors.torch import load_file
from tiny_clip import colour_dataset
from transformers import pipeline

import mmft_hf
from mmft_hf.cli import main
from mmft_hf.hub.publish import model_files
from mmft_hf.predict.fitting.auto import FEWEST
from mmft_hf.predict.fitting.heads import FITTERS
from mmft_hf.predict.heads import load_head
from mmft_hf.train import choice, workflow
from mmft_hf.train.run_folder import RunFolder

FAST = {"learning_rate": 5e-3, "per_device_train_batch_size": 8, "use_cpu": "true", "disable_tqdm": "true"}


def words(clip_folder, data, output, **settings) -> list[str]:
    given = {"model_name_or_path": clip_folder, "dataset_name": data, "output_dir": output} | FAST | settings
    return ["finetune", *(word for key, value in given.items() for word in (f"--{key}", *map(str, _listed(value))))]


def _listed(value):
    return value if isinstance(value, (list, tuple)) else [value]


def finetune(*args, **settings) -> dict:
    """Runs the command in this process; its `all_results.json`."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(words(*args, **settings)) == 0
    return json.loads((Path(args[2]) / "all_results.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """With enough validation images for a choice."""
    folder = tmp_path_factory.mktemp("data")
    for seed, (split, per_class) in enumerate((("train", 8), ("validation", 20), ("test", 4))):
        colour_dataset(per_class, seed, captions=split == "train").to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def run(clip_folder, data, tmp_path_factory):
    """A finished run: its folder, and the classifier as it was in memory."""
    folder, kept = tmp_path_factory.mktemp("run") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        save = RunFolder.save
        patch.setattr(RunFolder, "save", lambda self, *args: kept.append(args[0]) or save(self, *args))
        finetune(clip_folder, data, folder, num_train_epochs=2)
    return folder, kept[0]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    """Left of one class, right of another: no head is certain of them."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = colour_dataset(2, seed=9)["image"]
    for i in range(3):
        one, other = rows[i], rows[i + 1]
        one.paste(other.crop((0, 0, 10, 20)), (0, 0))
        one.save(folder / f"{i}.png")
    return sorted(map(str, folder.iterdir()))


@pytest.fixture(scope="module")
def expected(run, pictures) -> list[dict[str, float]]:
    """The scores of the classifier in memory, by label."""
    found = [by_label(best) for best in run[1].eval().predict(pictures)]
    assert any(max(scores.values()) < 0.999 for scores in found)
    return found


def by_label(best: list[dict]) -> dict[str, float]:
    return {row["label"]: row["score"] for row in best}


def test_the_results_say_what_was_chosen_and_what_the_others_had(run):
    folder, kept = run
    results = json.loads((folder / "all_results.json").read_text())
    assert results["head_validation_images"] == 60 >= FEWEST
    assert results["head_reason"] in results["selection"]
    found = {(c["head"], c["alpha"]): c["validation_loss"] for c in results["head_candidates"]}
    names = ("kernel", "mean", "prototypes", "linear", "logistic")
    assert found.keys() == {(name, a) for name in names for a in (0, 0.5, 1)} | {("zero-shot", 0)}
    # The chosen one is the default, or has a lower loss.
    chosen = found[results["head"], results["head_alpha"]]
    assert chosen <= found["kernel", 0.5]
    assert load_head(str(folder)).fitted["head"] == results["head"] == kept.head.fitted["head"]
    assert results["temperature"] == kept.head.temperature != 1.0


def test_the_saved_folder_the_pipeline_and_predict_answer_as_in_memory(run, pictures, expected, tmp_path):
    folder, _ = run
    loaded = mmft_hf.ImageClassifier.from_pretrained(folder).predict(pictures)
    piped = pipeline("mmft-image-classification", model=str(folder))(pictures)
    command = ["predict", *pictures, "--model_name_or_path", str(folder), "--output_file"]
    assert main([*command, str(tmp_path / "a.jsonl")]) == 0 and main([*command, str(tmp_path / "a.csv")]) == 0
    lines = [json.loads(line)["predictions"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    for answers in (loaded, piped, lines):
        assert [by_label(best) for best in answers] == [pytest.approx(scores, abs=1e-4) for scores in expected]
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    for row, scores in zip(rows, expected, strict=True):
        assert float(row[2]) == pytest.approx(scores[row[1]], abs=1e-4)


def test_evaluate_gives_the_figures_of_the_run(run, data, tmp_path):
    folder, _ = run
    words = ["evaluate", "--model_name_or_path", str(folder), "--dataset_name", str(data)]
    assert main([*words, "--output_dir", str(tmp_path), "--reject_below", "0.5"]) == 0
    found, results = (
        json.loads((tmp_path / "report.json").read_text()),
        json.loads((folder / "all_results.json").read_text()),
    )
    for name in ("accuracy", "mean_per_class_accuracy", "brier_score", "calibration_error", "aurc"):
        assert found[name] == pytest.approx(results[f"test_{name}"], abs=1e-4), name
    assert 0 <= found["answered"] <= 1 and "answered_accuracy" in found


def test_stock_code_on_the_card_and_the_published_code_answer_as_in_memory(
    run, pictures, expected, tmp_path, monkeypatch
):
    folder, _ = run
    published = tmp_path / "published"
    shutil.copytree(folder, published, ignore=shutil.ignore_patterns("checkpoint-*"))
    for name, content in model_files(folder, "someone/colours", with_inference_code=True).items():
        (published / name).write_bytes(content if isinstance(content, bytes) else Path(content).read_bytes())
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    remote = pipeline("image-classification", model=str(published), trust_remote_code=True)
    assert type(remote).__module__.startswith("transformers_modules")
    monkeypatch.chdir(folder)
    _, stock, *_ = snippets(Path("README.md").read_text())
    for path, scores in zip(pictures, expected, strict=True):
        assert by_label(remote(path)) == pytest.approx(scores, abs=1e-4)
        code = stock.replace("predictions_test.png", path).replace("round(scores[i].item(), 3)", "scores[i].item()")
        found = dict(line.rsplit(" ", 1) for line in execute(code).splitlines())
        assert {name: float(score) for name, score in found.items()} == pytest.approx(scores, abs=1e-4)


def test_the_test_split_is_read_after_the_choice(clip_folder, data, tmp_path, monkeypatch):
    from mmft_hf.data import views

    rows = load_dataset("parquet", data_files=str(data / "test.parquet"), split="train").data.column("image")
    sealed = {hashlib.sha256(row["bytes"]).hexdigest() for row in rows.to_pylist()}
    events = []
    read, choose = views.read_image, workflow.choose_classifier

    def reading(source):
        if hashlib.sha256(source["bytes"]).hexdigest() in sealed:
            events.append("test image")
        return read(source)

    def choosing(*args, **kwargs):
        found = choose(*args, **kwargs)
        events.append("chosen")
        return found

    monkeypatch.setattr(views, "read_image", reading)
    monkeypatch.setattr(workflow, "choose_classifier", choosing)
    finetune(clip_folder, data, tmp_path / "out", num_train_epochs=0, cache_frozen_features="false")
    assert events == ["chosen", *["test image"] * 2 * len(sealed)]


@pytest.mark.slow
def test_weights_between_are_computed_once(clip_folder, data, tmp_path, monkeypatch):
    made, interpolated = [], choice.interpolated
    monkeypatch.setattr(choice, "interpolated", lambda *args: made.append(args[-1]) or interpolated(*args))
    monkeypatch.setattr("mmft_hf.predict.fitting.auto.FEWEST", 1000)  # so that the default is taken
    results = finetune(clip_folder, data, tmp_path / "out", max_steps=2, load_best_model_at_end="false")
    assert (results["head_alpha"], made) == (0.5, [0.5])
    assert not results["head_chosen_on_validation"] and results["selection_policy"] == "last"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| validation | 60 | too few to choose the weights and head by |" in card


@pytest.mark.slow
def test_a_metric_that_is_named_chooses_weights_and_head(clip_folder, data, tmp_path, capsys):
    named = {"metric_for_best_model": "mean_per_class_accuracy", "num_train_epochs": 0}
    assert main(words(clip_folder, data, tmp_path / "out", **named)) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["head_metric"] == results["selection_metric"] == "mean_per_class_accuracy"
    found = {c["head"]: c["validation_mean_per_class_accuracy"] for c in results["head_candidates"]}
    assert found[results["head"]] == pytest.approx(results["validation_mean_per_class_accuracy"])
    best = max(found, key=found.get)
    if best != results["head"]:  # not by more than one standard error
        assert "no reason to depart by mean_per_class_accuracy" in results["head_reason"]
    assert f"validation mean per class accuracy {100 * found[results['head']]:.1f} %; " in printed
    card = (tmp_path / "out" / "README.md").read_text()
    assert "by `mean_per_class_accuracy`, which the run named" in card
    assert f"| {100 * found['zero-shot']:.1f} % |" in card and "| validation | 60 | selected the head |" in card
    # The head can be fitted anew, and is chosen by the same metric.
    assert main(["head", str(tmp_path / "out"), "--output_dir", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "all_results.json").read_text())
    assert (again["head"], again["head_metric"]) == (results["head"], results["head_metric"])


# -- without training --------------------------------------------------------------------------------------------------
FASTEST = ("kernel", "text")
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in FITTERS if name not in (*FASTEST, "prototypes")]


@pytest.mark.parametrize("head", [*FASTEST, *OTHERS])
def test_each_head_is_fitted_to_the_untuned_model(clip_folder, data, tmp_path, head):
    results = finetune(clip_folder, data, tmp_path / "out", num_train_epochs=0, head=head)
    assert (results["head"], results["head_alpha"], results["best_epoch"]) == (head, 0, 0)
    assert {c["head"] for c in results["head_candidates"]} == {head}
    before, after = load_file(clip_folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    if head != "text":  # to an untrained model captions say nothing about pictures
        assert results["test_accuracy"] == 1.0 > results["zero_shot_test_accuracy"]
    found = mmft_hf.ImageClassifier.from_pretrained(tmp_path / "out")
    assert found.head.fitted["head"] == head
    assert "Nothing was trained" in (tmp_path / "out" / "README.md").read_text()


def test_validation_pictures_that_are_training_pictures_choose_and_calibrate_nothing(clip_folder, data, tmp_path):
    (tmp_path / "data").mkdir()
    for split, of in (("train", "validation"), ("validation", "validation"), ("test", "test")):
        shutil.copy(data / f"{of}.parquet", tmp_path / "data" / f"{split}.parquet")
    results = finetune(clip_folder, tmp_path / "data", tmp_path / "out", num_train_epochs=0)
    assert results["head"] == "kernel" and results["head_validation_images"] == 0
    assert "60 of validation are among the training images" in results["head_reason"]
    assert results["temperature"] == 1.0
    assert "not calibrated" in (tmp_path / "out" / "README.md").read_text()


# -- LoRA ---------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_an_adapter_is_kept_whole_or_not_at_all(clip_folder, data, tmp_path):
    lora = {"vision_tower": "lora", "text_tower": "lora", "max_steps": 2}
    results = finetune(clip_folder, data, tmp_path / "out", **lora)
    assert {c["alpha"] for c in results["head_candidates"]} == {0, 1} and results["head_alpha"] in (0, 1)
    assert (tmp_path / "out" / "adapter").is_dir() == (results["head_alpha"] == 1)


# -- processes ----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_choose_and_save_what_one_does(clip_folder, data, tmp_path):
    settings = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "cache_frozen_features": "false"}
    alone = finetune(clip_folder, data, tmp_path / "one", **settings)
    where = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = words(clip_folder, data, tmp_path / "two", **settings | {"per_device_train_batch_size": 4})
    ranks = [start(command, tmp_path / f"{rank}.txt", RANK=rank, LOCAL_RANK=rank, **where) for rank in range(2)]
    for rank in ranks:
        assert rank.wait() == 0, "".join(rank.text for rank in ranks)
    both = json.loads((tmp_path / "two" / "all_results.json").read_text())
    for key in ("head", "head_alpha", "head_reason", "head_validation_images", "head_validation_groups"):
        assert both[key] == alone[key], key
    for one, other in zip(alone["head_candidates"], both["head_candidates"], strict=True):
        assert other == pytest.approx(one, abs=1e-4)
    one, two = (load_file(tmp_path / name / "head.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name].float(), tensor.float(), atol=2e-3, rtol=2e-3, msg=name)
    assert both["temperature"] == pytest.approx(alone["temperature"], rel=1e-3)
