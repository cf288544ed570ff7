"""Fine-tuning on pictures with several labels, from the table to the pipeline."""

import contextlib
import csv
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from card_tools import execute, snippets
from datasets import Dataset, Image
from sklearn.metrics import average_precision_score, f1_score
from tiny_clip import COLOURS, colour_dataset, striped_dataset
from transformers import pipeline

import mmft_hf
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.data.labels import labels_of
from mmft_hf.hub.cards import model_card
from mmft_hf.hub.publish import model_files
from mmft_hf.predict.evaluation import classify
from mmft_hf.train.terms import ClassTextCrossEntropy

FAST = "--learning_rate 3e-3 --per_device_train_batch_size 16 --use_cpu true --disable_tqdm true".split()


def run_verb(*words) -> tuple[int, str]:
    """The exit code of a command in this process, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = main([str(word) for word in words])
    return code, out.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stripes")
    for seed, (split, images) in enumerate((("train", 64), ("validation", 72), ("test", 40))):
        striped_dataset(images, seed, captions=split == "train").to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def run(clip_folder, data, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a finished run, and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "several"
    settings = [
        "--dataset_name",
        data,
        "--model_name_or_path",
        clip_folder,
        "--output_dir",
        output,
        "--num_train_epochs",
        4,
    ]
    code, said = run_verb("finetune", *settings, *FAST)
    assert code == 0, said
    return output, said


def truth_and_answers(folder: Path) -> tuple[list[set], list[set]]:
    rows = Dataset.from_parquet(str(folder / "predictions_test.parquet"))
    return [set(own) for own in rows["label"]], [set(own) for own in rows["prediction"]]


def test_a_run_is_selected_and_judged_by_metrics_of_several_labels(run, data):
    folder, said = run
    results = json.loads((folder / "all_results.json").read_text())
    assert results["several_labels"] and results["selection_metric"] == "mean_average_precision"
    assert results["test_mean_average_precision"] > results["zero_shot_test_mean_average_precision"] + 0.1
    assert results["test_micro_f1"] > 0.9
    assert {c["head"] for c in results["head_candidates"]} == {"linear", "prototypes", "zero-shot"}
    state = json.loads((folder / "trainer_state.json").read_text())
    measured = [
        log["eval_mean_average_precision"] for log in state["log_history"] if "eval_mean_average_precision" in log
    ]
    assert len(measured) == 5 and state["best_metric"] == max(measured)
    # What was printed and recorded is what the saved answers say.
    names, (truth, answers) = list(COLOURS), truth_and_answers(folder)
    stored = labels_of(Dataset.from_parquet(str(data / "test.parquet")))
    assert [{names[c] for c in row.nonzero()[0]} for row in stored] == truth
    assert results["test_accuracy"] == pytest.approx(sum(a == b for a, b in zip(truth, answers, strict=True)) / 40)
    hot = [[[name in own for name in names] for own in sets] for sets in (truth, answers)]
    assert results["test_micro_f1"] == pytest.approx(f1_score(*hot, average="micro"))
    assert "validation mAP" in said and "Results on 40 test images, exact match with 95 % interval" in said
    for name, key in (("mAP", "mean_average_precision"), ("micro F1", "micro_f1"), ("exact match", "accuracy")):
        (line,) = [line for line in said.splitlines() if line.startswith(f"  {name} ")]
        now, before = results[f"test_{key}"], results[f"zero_shot_test_{key}"]
        assert f" {100 * now:.1f} %" in line
        assert line.endswith(f", zero-shot {100 * before:.1f} %   {100 * (now - before):+.1f} points")
    assert not (folder / "confusion.png").exists() and not (folder / "prototypes.safetensors").exists()


def test_evaluate_predict_pipeline_and_snippet_agree(run, data, tmp_path, monkeypatch):
    folder, _ = run
    results = json.loads((folder / "all_results.json").read_text())
    code, said = run_verb(
        "evaluate", "--model_name_or_path", folder, "--dataset_name", data, "--output_dir", tmp_path / "report"
    )
    assert code == 0 and f"mAP          {100 * results['test_mean_average_precision']:.1f} %" in said
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    for name in ("mean_average_precision", "micro_f1", "macro_f1", "accuracy"):
        assert report[name] == pytest.approx(results[f"test_{name}"], abs=1e-6)
    assert report["zero_shot"]["mean_average_precision"] == pytest.approx(
        results["zero_shot_test_mean_average_precision"], abs=1e-6
    )
    assert sorted(os.listdir(tmp_path / "report")) == ["per_class.csv", "report.json"]

    test = Dataset.from_parquet(str(data / "test.parquet"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        test[i]["image"].save(pictures / f"{i:02}.png")
    answers = truth_and_answers(folder)[1][:12]
    code, said = run_verb(
        "predict", pictures, "--model_name_or_path", folder, "--output_file", tmp_path / "answers.csv"
    )
    with open(tmp_path / "answers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert code == 0 and all(None not in row and None not in row.values() for row in rows)  # as wide as the header
    found = [{value for key, value in row.items() if key.startswith("label_") and value} for row in rows]
    assert found == answers and set() in found
    code, said = run_verb("evaluate", "--model_name_or_path", folder, "--dataset_name", data, "--reject_below", 0)
    assert code == 0 and "recall 100.0 %" in said and "a class holds from a score of 0.0 % on" in said
    code, said = run_verb("predict", pictures / "00.png", "--model_name_or_path", folder)
    assert code == 0 and "00.png: none of the classes" in said  # the first stripes are grey

    classifier = pipeline("mmft-image-classification", model=str(folder))
    assert [{one["label"] for one in classifier(str(pictures / f"{i:02}.png"))} for i in range(12)] == answers
    monkeypatch.chdir(folder)
    card = Path("README.md").read_text()
    several = next(i for i, own in enumerate(answers) if len(own) > 1)
    ours, stock, *_ = (
        code.replace("predictions_test.png", str(pictures / f"{several:02}.png")) for code in snippets(card)
    )
    lines = [line.rsplit(" ", 1) for line in execute(stock).splitlines()]
    assert {name for name, _ in lines} == answers[several] and all(float(score) >= 0.5 for _, score in lines)
    assert all(name in execute(ours) for name in answers[several])


def test_the_card_tells_the_metrics(run):
    folder, _ = run
    results, card = json.loads((folder / "all_results.json").read_text()), (folder / "README.md").read_text()
    assert "A picture may show several of them, or none." in card and "confusion.png" not in card
    assert "mean_average_precision`" not in card and "improved mAP, by which the run was selected, from " in card
    assert "`metric_for_best_model`" not in card  # nobody set it
    row = [results[f"test_{name}"] for name in ("mean_average_precision", "micro_f1", "macro_f1", "accuracy")]
    assert "| " + " | ".join(f"{100 * value:.1f} %" for value in row) in card
    truth, answers = truth_and_answers(folder)
    for name in COLOURS:
        images, right = (
            sum(name in own for own in truth),
            sum(name in a & b for a, b in zip(truth, answers, strict=True)),
        )
        assert f"| {images} | {right} ({100 * right / images:.1f} %) |" in card
    files = model_files(folder, "a/b", with_inference_code=True)
    assert b"top_k=3" not in files["README.md"] and "mmft_inference.py" in files


@pytest.mark.slow
def test_another_head_is_fitted_to_a_finished_run(run, data, tmp_path):
    folder, _ = run
    words = ["--head", "prototypes", "--output_dir", tmp_path / "new", "--reject_below", 0.3]
    code, said = run_verb("head", folder, *words)
    assert code == 0 and "mAP on validation" in said and "a class holds from a score of 30.0 % on" in said
    head = mmft_hf.ImageClassifier.from_pretrained(tmp_path / "new").head
    assert head.kind == "prototypes" and head.several_labels and head.offsets.shape == (3,)
    results = json.loads((tmp_path / "new" / "all_results.json").read_text())
    card = (tmp_path / "new" / "README.md").read_text()
    assert "as answered from a score of 0.3 on" in card and "if scores[i] < 0.3:" in card and "unknown" not in card
    # Nothing was chosen, and the weights alone are those of the run.
    assert results["selection"].endswith("), with the class prototypes; the head that was typed"), results["selection"]
    assert results["selection"].count("with ") == 1 and "Kept: **prototypes**" in card
    # What is read back gives what was measured, and answers from the threshold on.
    classifier = mmft_hf.ImageClassifier.from_pretrained(tmp_path / "new")
    truth, answers = truth_and_answers(tmp_path / "new")
    test = Dataset.from_parquet(str(data / "test.parquet"))
    assert [{one["label"] for one in row} for row in classifier.predict(test["image"][:])] == answers
    assert results["test_accuracy"] == pytest.approx(sum(a == b for a, b in zip(truth, answers, strict=True)) / 40)
    assert classifier.class_names == list(COLOURS)


def test_thresholds_are_chosen_on_validation_and_what_reads_them_agrees(run, data, tmp_path, monkeypatch):
    folder, new = run[0], tmp_path / "new"
    words = ["--head", "prototypes", "--threshold", "f1", "--output_dir", new]
    code, said = run_verb("head", folder, *words)
    assert code == 0 and "a class holds from a score of its own on, " in said
    results, card = json.loads((new / "all_results.json").read_text()), (new / "README.md").read_text()
    classifier = mmft_hf.ImageClassifier.from_pretrained(new)
    own = classifier.head.thresholds.numpy()
    assert results["thresholds"] == pytest.approx(own.tolist()) and results["reject_below"] is None
    validation = Dataset.from_parquet(str(data / "validation.parquet"))
    scores = classify(classifier, validation, progress=False).scores
    truth = labels_of(validation)
    assert (truth.sum(axis=0) >= 10).all()
    for c in range(3):  # no other threshold is better there
        best = max(f1_score(truth[:, c], scores[:, c] >= t) for t in np.linspace(0, 1, 301))
        assert f1_score(truth[:, c], scores[:, c] >= own[c]) >= best - 1e-9
    test = Dataset.from_parquet(str(data / "test.parquet"))
    answers = truth_and_answers(new)[1]
    assert [{one["label"] for one in row} for row in classifier.predict(test["image"][:])] == answers
    assert f"{own.min():.3g} to {own.max():.3g}, by class" in card and "best F1 on validation" in card
    picture = next(i for i, found in enumerate(answers) if found)
    test[picture]["image"].save(tmp_path / "one.png")
    monkeypatch.chdir(new)
    stock = snippets(card)[1].replace("predictions_test.png", str(tmp_path / "one.png"))
    assert {line.rsplit(" ", 1)[0] for line in execute(stock).splitlines()} == answers[picture]
    code, said = run_verb("evaluate", "--model_name_or_path", new, "--dataset_name", data)
    assert code == 0 and "a class holds from a score of its own on" in said
    code, said = run_verb("evaluate", "--model_name_or_path", new, "--dataset_name", data, "--reject_below", 0.4)
    assert code == 0 and "a class holds from a score of 40.0 % on" in said
    code, said = run_verb("head", new, "--head", "linear", "--output_dir", tmp_path / "third")
    assert code == 0 and "thresholds" not in json.loads((tmp_path / "third" / "all_results.json").read_text())


@pytest.mark.slow
def test_a_head_without_training_and_without_captions(clip_folder, tmp_path):
    """A table with a separator, a tenth of it held out; the untuned tower alone."""
    rows, names = striped_dataset(120, 3), list(COLOURS)
    with open(tmp_path / "rows.csv", "w") as file:
        file.write("image,label\n")
        for i, row in enumerate(rows):
            row["image"].save(tmp_path / f"{i}.png")
            file.write(f"{i}.png,{' | '.join(names[c] for c in row['label']) or '|'}\n")
    output = tmp_path / "out"
    words = ["--dataset_name", tmp_path / "rows.csv", "--label_separator", "|", "--model_name_or_path", clip_folder]
    code, said = run_verb("finetune", *words, "--output_dir", output, "--num_train_epochs", 0, "--shots", 12, *FAST)
    assert code == 0, said
    results = json.loads((output / "all_results.json").read_text())
    assert results["test_mean_average_precision"] > results["zero_shot_test_mean_average_precision"] + 0.1
    assert "too few to choose by" in results["head_reason"]
    # The held-out images are found again, and their labels read as for the training.
    code, said = run_verb("evaluate", "--model_name_or_path", output, "--dataset_name", tmp_path / "rows.csv")
    assert code == 0 and f"{100 * results['test_mean_average_precision']:.1f} %" in said
    code, said = run_verb("finetune", *words, "--output_dir", output, "--num_train_epochs", 0, "--shots", 12, *FAST,
                          "--resume_from_checkpoint", "true")  # fmt: skip
    assert code == 0 and "already holds this run" in said


def test_a_split_without_any_class_measures_nothing(run, data, clip_folder, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    test = Dataset.from_parquet(str(data / "test.parquet"))
    without = test.select([i for i, own in enumerate(test["label"]) if not own])
    for split in ("validation", "test"):
        without.to_parquet(tmp_path / "data" / f"{split}.parquet")
        words = [
            "--dataset_name",
            tmp_path / "data",
            "--model_name_or_path",
            clip_folder,
            "--output_dir",
            tmp_path / "o",
        ]
        code, said = run_verb("finetune", *words, *FAST)
        assert code == 2 and "validation split: expected pictures with a class, found" in said
    code, said = run_verb("evaluate", "--model_name_or_path", run[0], "--dataset_name", tmp_path / "data")
    assert code == 2 and f"test split: expected pictures with a class, found {len(without)} empty lists" in said


def test_evaluate_names_classes_without_a_test_image(run, data, tmp_path):
    test = Dataset.from_parquet(str(data / "test.parquet"))
    test.select([i for i, own in enumerate(test["label"]) if 2 not in own]).to_parquet(tmp_path / "test.parquet")
    code, said = run_verb("evaluate", "--model_name_or_path", run[0], "--dataset_name", tmp_path)
    assert code == 0 and f"Without a test image, and so without a figure: {list(COLOURS)[2]}\n" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--head kernel", "--head kernel: expected one class for each picture, found lists of labels"),
        ("--calibrate false", "--calibrate: expected true with several labels"),
        ("--reject_for_accuracy 0.9", "--reject_for_accuracy: expected one class for each picture"),
        ("--samples_per_class 2", "--samples_per_class: expected one class for each image"),
        ("--unknown_split others", "--unknown_split: expected one class for each picture"),
        ("--threshold f1 --reject_below 0.3", "--threshold f1: expected no --reject_below, found 0.3"),
        ("--metric_for_best_model loss", "--metric_for_best_model loss: expected one label per picture, found several"),
    ],
)
def test_settings_for_single_labels_are_refused_before_anything_is_trained(words, message, clip_folder, data, tmp_path):
    given = ["--dataset_name", data, "--model_name_or_path", clip_folder, "--output_dir", tmp_path / "out"]
    code, said = run_verb("finetune", *given, *words.split(), *FAST)
    assert code == 2 and message in said and not (tmp_path / "out").exists()


def test_single_labels_and_lists_are_not_mixed_up(run, data_folder, clip_folder, data, tmp_path):
    folder, _ = run
    code, said = run_verb("evaluate", "--model_name_or_path", folder, "--dataset_name", data_folder)
    assert code == 2 and "expected a list of labels for each picture, as the classifier was trained on" in said
    words = ["--dataset_name", data_folder, "--model_name_or_path", clip_folder, "--output_dir", tmp_path / "out"]
    code, said = run_verb("finetune", *words, "--metric_for_best_model", "mean_average_precision", *FAST)
    assert code == 2 and "expected several labels per picture, found one label" in said
    code, said = run_verb("finetune", *words, "--threshold", "f1", *FAST)
    assert code == 2 and "--threshold f1: expected lists of labels" in said and "--reject_below" in said


def test_the_trainer_learns_several_labels(clip, tmp_path):
    model, processor = clip
    args = mmft_hf.MMFTConfig(
        str(tmp_path), num_train_epochs=10, learning_rate=3e-3, per_device_train_batch_size=16, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", load_best_model_at_end=False,
    )  # fmt: skip
    test = striped_dataset(40, 1)
    trainer = mmft_hf.MMFTTrainer(model, args, striped_dataset(64, captions=True), test, processor)
    before = trainer.evaluate()["eval_mean_average_precision"]
    trainer.train()
    found = trainer.predict(test)
    assert found.metrics["test_mean_average_precision"] > max(before, 0.8)
    assert found.metrics["test_mean_average_precision"] == pytest.approx(
        average_precision_score(labels_of(test), found.predictions, average="macro")
    )
    trainer.save_model(tmp_path / "model")
    assert mmft_hf.ImageClassifier.from_pretrained(tmp_path / "model").head.several_labels
    with pytest.raises(UserError, match="eval_dataset: expected labels as in train_dataset"):
        mmft_hf.MMFTTrainer(model, args, striped_dataset(8), colour_dataset(2), processor)


@pytest.mark.slow
def test_cross_entropy_over_class_texts_learns_several_labels(clip, tmp_path):
    model, processor = clip
    args = mmft_hf.MMFTConfig(
        str(tmp_path), num_train_epochs=12, learning_rate=1e-2, per_device_train_batch_size=16, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", eval_strategy="no", load_best_model_at_end=False, prototypes="template",
    )  # fmt: skip
    data, loss = (striped_dataset(64), striped_dataset(40, 1)), [ClassTextCrossEntropy()]
    trainer = mmft_hf.MMFTTrainer(model, args, *data, processor, loss=loss)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * before


def test_an_unreadable_picture_counts_nowhere(clip, tmp_path):
    from data_tools import with_bad_picture

    model, processor = clip
    args = mmft_hf.MMFTConfig(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        on_bad_image="skip",
        per_device_eval_batch_size=8,
    )
    train, test = striped_dataset(16), striped_dataset(12, 1)
    trainer = mmft_hf.MMFTTrainer(model, args, train, with_bad_picture(3, test), processor)
    left = test.select([i for i in range(12) if i != 3])
    assert trainer.evaluate()["eval_mean_average_precision"] == pytest.approx(
        trainer.evaluate(left)["eval_mean_average_precision"], abs=1e-6
    )
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))
    assert isinstance(test.features["image"], Image)


@pytest.mark.parametrize("damage", ["metric", "predictions"])
def test_results_without_what_several_labels_have_are_refused(damage, run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "copy")
    if damage == "metric":
        results = json.loads((folder / "all_results.json").read_text())
        del results["test_micro_f1"]
        (folder / "all_results.json").write_text(json.dumps(results))
        message = "expected the field test_micro_f1, found none"
    else:
        rows = Dataset.from_parquet(str(folder / "predictions_test.parquet"))
        single = [next(iter(own), None) for own in rows["prediction"]]
        rows.remove_columns("prediction").add_column("prediction", single).to_parquet(
            folder / "predictions_test.parquet"
        )
        message = "expected names of the run's classes, found a list of 3"
    with pytest.raises(UserError, match=message):
        model_card(folder)
