"""What is kept is decided by the metric that the user named: among the epochs, and between them and the untuned model."""

import json

import numpy as np
import pytest
from tiny_clip import COLOURS, colour_dataset
from training import make_trainer

import mmft_hf
from mmft_hf import MMFTConfig, MMFTTrainer, load_model
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.hub.cards import model_card
from mmft_hf.predict.evaluation import Predictions, classify
from mmft_hf.train import workflow
from mmft_hf.train.selection import METRICS, check_metric, is_better, stale

FAST = {"epochs": 1, "learning_rate": 1e-6, "per_device_train_batch_size": 8, "use_cpu": True, "disable_tqdm": True}
FAST |= {"head": "prototypes", "calibrate": False}  # what is kept is one of the epochs, with its own answers


def answers(right_of_each_class, counts, confidence=0.6):
    """Predictions with so many right answers of each class, all with the same confidence; wrong ones fall on the next class."""
    labels, predicted = [], []
    for c, (right, count) in enumerate(zip(right_of_each_class, counts, strict=True)):
        labels += [c] * count
        predicted += [c] * right + [(c + 1) % len(counts)] * (count - right)
    scores = np.full((len(labels), len(counts)), (1 - confidence) / (len(counts) - 1), dtype=np.float32)
    scores[np.arange(len(labels)), predicted] = confidence
    losses = -np.log(scores[np.arange(len(labels)), labels])
    return Predictions(scores, np.array(labels), losses, list(COLOURS))


# Ten images of the first class, two of each other one.
MOSTLY_FIRST = answers((10, 0, 0), (10, 2, 2))
EVEN = answers((5, 2, 2), (10, 2, 2))
SURE = answers((5, 2, 2), (10, 2, 2), confidence=0.99)
VALUES = {
    "mostly": {"accuracy": 10 / 14, "mean_per_class_accuracy": 1 / 3},
    "even": {"accuracy": 9 / 14, "mean_per_class_accuracy": 2.5 / 3},
}


@pytest.fixture
def candidates(monkeypatch):
    """Lets the untuned model and the trained one answer as told, on validation and test alike."""

    def set_answers(untuned, trained):
        def told(classifier, *args, **kwargs):
            return untuned if classifier.head.source == "template" else trained

        monkeypatch.setattr(workflow, "classify", told)

    return set_answers


@pytest.fixture(scope="module")
def images():
    """As many images in each split as the answers stand for: ten of the first class and two of each other one."""

    def split(seed, captions):
        whole = colour_dataset(10, seed, captions)
        return whole.select([i for i in range(len(whole)) if whole[i]["label"] == 0 or i < 6]).sort("label")

    return {name: split(seed, name == "train") for seed, name in enumerate(("train", "validation", "test"))}


@pytest.mark.parametrize(
    ("metric", "untuned", "trained", "won"),
    [
        pytest.param("accuracy", MOSTLY_FIRST, EVEN, True, marks=pytest.mark.slow),
        ("mean_per_class_accuracy", MOSTLY_FIRST, EVEN, False),
        pytest.param("eval_mean_per_class_accuracy", EVEN, MOSTLY_FIRST, True, marks=pytest.mark.slow),
        ("loss", SURE, EVEN, False),  # the same answers; being sure of the wrong ones costs more
    ],
)
def test_the_untuned_model_is_compared_by_the_chosen_metric(
    candidates, images, clip_folder, tmp_path, metric, untuned, trained, won
):
    candidates(untuned, trained)
    result = mmft_hf.finetune(images, clip_folder, tmp_path / "out", metric_for_best_model=metric, **FAST)
    metrics, name = json.loads((tmp_path / "out" / "all_results.json").read_text()), metric.removeprefix("eval_")
    assert metrics["zero_shot_won"] is won and metrics["selection_metric"] == name
    kept = untuned if won else trained
    for which, found in (("", kept), ("zero_shot_", untuned)):
        for split in ("validation", "test"):
            assert metrics[f"{which}{split}_{name}"] == pytest.approx(found.report()[name])
            assert metrics[f"{which}{split}_accuracy"] == pytest.approx(found.report()["accuracy"])
    by = "" if name == "accuracy" else f" by {name}"
    sentence = (
        f"no epoch was better on validation{by}" if won else f"the best on validation{by}; epoch 0 is the untuned model"
    )
    assert metrics["selection"].endswith(sentence)
    assert result.classifier is not None
    card = model_card(tmp_path / "out").replace("\\_", "_")
    assert sentence.split(";")[0] in card
    if won:
        assert "both rows are the same classifier" in card
    elif name == "mean_per_class_accuracy":
        assert "improved `mean_per_class_accuracy`, by which the run was selected, from 33.3 % to 83.3 %." in card
        assert "Accuracy changed by -7.1 points." in card
    elif name == "loss":
        assert f"from {untuned.report()['loss']:.3f} to {trained.report()['loss']:.3f}" in card


def test_the_answers_above_have_the_values_computed_by_hand():
    for name, found in (("mostly", MOSTLY_FIRST), ("even", EVEN), ("even", SURE)):
        for metric, value in VALUES[name].items():
            assert found.report()[metric] == pytest.approx(value)
    assert EVEN.report()["loss"] == pytest.approx(-(9 * np.log(0.6) + 5 * np.log(0.2)) / 14, rel=1e-6)


@pytest.mark.slow
def test_the_terminal_tells_by_which_metric(candidates, images, clip_folder, tmp_path, capsys):
    candidates(EVEN, MOSTLY_FIRST)
    for name, split in images.items():
        split.to_parquet(tmp_path / "data" / f"{name}.parquet")
    settings = [f"--{key}={value}" for key, value in FAST.items() if key != "epochs"]
    names = ["--dataset_name", str(tmp_path / "data"), "--model_name_or_path", str(clip_folder)]
    more = [
        "--num_train_epochs=1",
        "--metric_for_best_model=mean_per_class_accuracy",
        "--output_dir",
        str(tmp_path / "a b"),
    ]
    assert main(["finetune", *names, *more, *settings]) == 0
    printed = capsys.readouterr().out
    assert (
        "the untuned model with the class template: no epoch was better on validation by mean_per_class_accuracy"
        in printed
    )
    assert "Fine-tuning did not help here: the untuned model is as good by mean_per_class_accuracy." in printed
    assert f"--model_name_or_path '{tmp_path / 'a b'}'" in printed


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["accuracy", "mean_per_class_accuracy", "loss"])
def test_the_star_and_the_kept_epoch_follow_the_metric(clip, tmp_path, capsys, metric):
    trainer = make_trainer(clip, tmp_path, num_train_epochs=4, metric_for_best_model=metric, learning_rate=3e-3)
    trainer.train()
    values = [log[f"eval_{metric}"] for log in trainer.state.log_history if f"eval_{metric}" in log][:5]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(values) == len(lines) == 5 and len(set(values)) > 1
    order = [-value for value in values] if metric == "loss" else values
    stars = [line.endswith(" *") for line in lines]
    assert stars == [all(value > before for before in order[:i]) for i, value in enumerate(order)]
    best = values[order.index(max(order))]
    assert trainer.evaluate()[f"eval_{metric}"] == pytest.approx(best, abs=1e-6)
    if metric != "accuracy":
        shown = f"{values[-1]:.3f}" if metric == "loss" else f"{values[-1]:.1%}"
        assert f", {metric.replace('_', ' ')} {shown}" in lines[-1]


@pytest.mark.slow
def test_averaged_weights_and_the_best_checkpoint_alone_are_selected_by_the_metric(clip, tmp_path):
    settings = {
        "metric_for_best_model": "loss",
        "weight_averaging": 0.5,
        "save_strategy": "best",
        "learning_rate": 3e-3,
    }
    trainer = make_trainer(clip, tmp_path, num_train_epochs=4, **settings)
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)


def test_the_loss_outside_of_training_is_that_of_the_trainer(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path, metric_for_best_model="loss")
    expected = trainer.evaluate()["eval_loss"]
    classifier = mmft_hf.ImageClassifier(trainer.model, trainer.processing_class, trainer.build_prototypes())
    for batch_size in (1, 5, 64):
        found = classify(classifier, trainer.eval_dataset, batch_size, progress=False).report()["loss"]
        assert found == pytest.approx(expected, rel=1e-5)


def test_metrics_that_cannot_select_are_refused():
    with pytest.raises(UserError, match=r"depends on the batch size. Type metric_for_best_model loss"):
        check_metric("eval_supcon_loss", "abc")
    with pytest.raises(UserError, match=r"expected one of accuracy, .*, found 'acc'"):
        check_metric("acc", "abc")
    with pytest.raises(UserError, match="expected more than five classes, found 5"):
        check_metric("top5_accuracy", "abcde")
    assert check_metric("eval_top5_accuracy", "abcdef") == "top5_accuracy"
    assert check_metric(None, "abc") == "accuracy"


@pytest.mark.parametrize(
    ("metric", "wrong"), [("accuracy", False), ("eval_loss", True), ("mean_per_class_accuracy", False)]
)
def test_a_direction_against_the_metric_is_refused(tmp_path, metric, wrong):
    with pytest.raises(UserError, match=r"greater_is_better: expected .*the worst epoch would be kept"):
        MMFTConfig(output_dir=str(tmp_path), use_cpu=True, metric_for_best_model=metric, greater_is_better=wrong)
    right = MMFTConfig(
        output_dir=str(tmp_path), use_cpu=True, metric_for_best_model=metric, greater_is_better=not wrong
    )
    assert right.greater_is_better is not wrong
    MMFTConfig(output_dir=str(tmp_path), use_cpu=True, metric_for_best_model="own", greater_is_better=wrong)


def test_equals_are_not_better():
    assert not any(is_better(metric, 0.5, 0.5) for metric in METRICS)
    assert is_better("loss", 0.4, 0.5) and is_better("accuracy", 0.5, 0.4)


@pytest.mark.slow
def test_without_captions_nothing_is_compared_with_captions(clip, tmp_path, capsys):
    trainer = make_trainer(clip, tmp_path, colour_dataset(4, captions=False), num_train_epochs=1)
    trainer.train()
    assert "untuned model, compared with the class template | validation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "greater", "expected"),
    [
        ([], True, 0),
        ([0.5], True, 0),
        ([0.5, 0.4, 0.5], True, 2),
        ([0.1, 0.3, 0.2], True, 1),
        ([2.0, 1.0, 1.0], False, 1),
    ],
)
def test_validations_since_the_best_one_are_counted(values, greater, expected):
    assert stale(values, greater) == expected


def test_a_training_ends_when_validation_stops_improving(clip_folder, tmp_path):
    """At rates so small that no epoch is better than the untuned model."""
    train, validation = colour_dataset(2, seed=1), colour_dataset(2, seed=2)

    def epochs(name, **settings):
        common = {"learning_rate": 1e-12, "use_cpu": True, "disable_tqdm": True, "output_dir": str(tmp_path / name)}
        model, processor = load_model(str(clip_folder))
        trainer = MMFTTrainer(model, MMFTConfig(**common, **settings), train, validation, processor)
        trainer.train()
        return trainer.state.epoch

    assert epochs("patient", num_train_epochs=9, patience=3) == 3
    assert epochs("whole", num_train_epochs=4, patience=None) == 4
