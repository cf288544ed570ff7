"""`mmft-hf evaluate --unknown_split`: pictures of classes that a classifier does not know, told from the test pictures."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from tiny_clip import COLOURS, colour_dataset, striped_dataset

import mmft_hf
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.predict.classifier import ImageClassifier
from mmft_hf.predict.evaluation import Predictions
from mmft_hf.predict.heads import ClassPrototypes
from mmft_hf.predict.metrics import area_under_roc


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 40), (30, 7), (200, 300)])
def test_the_area_is_that_of_scikit_learn_also_with_ties(m, n):
    rng = np.random.default_rng(m + n)
    for known, unknown in (
        (rng.normal(1, 1, m), rng.normal(0, 1, n)),
        (rng.integers(0, 4, m), rng.integers(0, 3, n)),
        (np.ones(m), np.ones(n)),
    ):
        area, low, high = area_under_roc(known, unknown)
        scores, truth = np.concatenate([known, unknown]), [1] * m + [0] * n
        assert area == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
        assert 0 <= low <= area <= high <= 1 and high - low > 0.05


def test_the_interval_holds_the_true_area_in_95_of_100_cases():
    rng = np.random.default_rng(0)
    for shift in (0.0, 1.0, 2.5):
        true, hits = norm.cdf(shift / np.sqrt(2)), 0
        for _ in range(400):
            _, low, high = area_under_roc(rng.normal(shift, 1, 40), rng.normal(0, 1, 60))
            hits += low <= true <= high
        assert 0.92 <= hits / 400 <= 0.99


def test_pairs_that_are_all_in_order_have_an_interval():
    area, low, high = area_under_roc(np.arange(10, 20), np.arange(5))
    assert (area, high) == (1, 1) and 0.6 < low < 0.95
    assert area_under_roc(np.arange(5), np.arange(10, 20))[0] == 0


def test_unreadable_pictures_do_not_count():
    def answers(scores, strongest, labels):
        return Predictions(
            np.array(scores), np.array(labels), np.zeros(len(labels)), ["a", "b"], None, 0.5, np.array(strongest)
        )

    test = answers([[0.9, 0.1], [0.4, 0.6], [1.0, 0.0]], [5.0, 2.0, -9.0], [0, 0, -100])
    others = answers([[0.5, 0.5], [0.3, 0.7], [0.0, 1.0]], [1.0, 3.0, 99.0], [0, 0, -100])
    found = test.unknown(others, 0.65)
    assert (found["examples"], found["skipped"], found["answered_unknown"]) == (2, 1, 0.5)
    assert (found["auroc_logit"], found["auroc_probability"]) == (0.75, 0.75)
    assert test.unknown(others, None)["answered_unknown"] is None
    test.rescale(2.0)
    assert test.strongest.tolist() == [2.5, 1.0, -4.5]


# -- the command --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved(_clip, tmp_path_factory):
    """A classifier with prototypes of the training images."""
    folder = tmp_path_factory.mktemp("classifier")
    head = ClassPrototypes.from_images(*_clip, colour_dataset(4))
    ImageClassifier(*_clip, head).save_pretrained(folder)
    return folder


def strangers(names=("grey thing", "Red_Thing")) -> Dataset:
    """Nine grey pictures, and three of a class that the classifier knows by nearly the same name."""
    rng = np.random.default_rng(0)
    grey = [PILImage.fromarray(rng.integers(90, 140, (20, 24, 3)).astype(np.uint8)) for _ in range(9)]
    red = [PILImage.new("RGB", (20, 20), (200 + i, 20, 20)) for i in range(3)]
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": grey + red, "label": [0] * 9 + [1] * 3}, features=features)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    colour_dataset(5, seed=3, captions=False).to_parquet(folder / "test.parquet")
    strangers().to_parquet(folder / "others-00000-of-00001.parquet")
    (folder / "shots" / "below").mkdir(parents=True)
    for i, row in enumerate(strangers().select(range(4))):
        row["image"].save(folder / "shots" / "below" / f"{i}.png")
    return folder


def evaluate(saved, data, capsys, *more) -> tuple[int, str]:
    names = ("--model_name_or_path", str(saved), "--dataset_name", str(data))
    code = main(["evaluate", *names, *map(str, more)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err, err[-1500:]
    return code, out + err


def test_a_split_of_other_classes_is_told_from_the_test_pictures(saved, data, capsys, tmp_path):
    more = ("--unknown_split", "others", "--reject_below", 0.34, "--output_dir", tmp_path)
    code, out = evaluate(saved, data, capsys, *more)
    found = json.loads((tmp_path / "report.json").read_text())["unknown_split"]
    classifier = ImageClassifier.from_pretrained(saved)
    pictures = {"test": colour_dataset(5, seed=3, captions=False), "others": strangers().select(range(9))}
    logits = {name: classifier(classifier.preprocess(rows["image"])).detach() for name, rows in pictures.items()}
    truth = [1] * 15 + [0] * 9
    for key, of in (("auroc_logit", lambda x: x), ("auroc_probability", lambda x: x.softmax(dim=1))):
        scores = [value for name in logits for value in of(logits[name]).amax(dim=1).tolist()]
        assert found[key] == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)
        assert f"{found[key]:.2f} ({found[f'{key}_ci_low']:.2f} to {found[f'{key}_ci_high']:.2f})" in out
    share = (logits["others"].softmax(dim=1).amax(dim=1) < 0.34).double().mean().item()
    assert (code, found["examples"], found["answered_unknown"]) == (0, 9, pytest.approx(share))
    assert f"others, 9 images: {100 * share:.1f} %" in out and "answered unknown" in out
    assert "3 of 12 images of 'others' are of the classifier's own classes and are left out." in out


def test_a_folder_of_pictures_and_no_threshold(saved, data, capsys, tmp_path):
    for place in ("shots", data / "shots"):  # below the data, or anywhere
        code, out = evaluate(saved, data, capsys, "--unknown_split", place, "--output_dir", tmp_path)
        found = json.loads((tmp_path / "report.json").read_text())["unknown_split"]
        assert (code, found["examples"], found["answered_unknown"]) == (0, 4, None)
        assert f"{place}, 4 images: no threshold, so each gets a class: type --reject_below" in out


def test_pictures_that_are_in_the_test_split_too_are_named(saved, data, capsys, tmp_path):
    colour_dataset(5, seed=3)[0]["image"].save(tmp_path / "copy.png")
    _, out = evaluate(saved, data, capsys, "--unknown_split", tmp_path)
    assert f"1 of {tmp_path} in test too" in out


def test_refusals(saved, data, capsys, tmp_path):
    def refused(*more):
        code, out = evaluate(saved, data, capsys, "--unknown_split", *more)
        assert code == 2
        return out

    assert (
        "expected a split of" in (message := refused("other")) and "Its splits are" in message and "others" in message
    )
    colour_dataset(1, captions=False).to_parquet(data / "known-00000-of-00001.parquet")
    assert "expected pictures of classes that the classifier does not know, found none" in refused("known")
    (data / "known-00000-of-00001.parquet").unlink()
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert "cannot be read" in refused(tmp_path)
    assert "expected pictures that can be read, found none" in refused(tmp_path, "--on_bad_image", "skip")


def test_a_run_measures_them_and_its_card_tells(clip_folder, data, tmp_path, capsys):
    folder, new = tmp_path / "pictures", tmp_path / "new"
    for seed, (split, per_class) in enumerate((("train", 4), ("validation", 18), ("test", 5))):
        colour_dataset(per_class, seed + 3, captions=False).to_parquet(folder / f"{split}.parquet")
    strangers().to_parquet(folder / "others-00000-of-00001.parquet")
    run = ["finetune", "--dataset_name", folder, "--model_name_or_path", clip_folder, "--output_dir", tmp_path / "out"]
    run = [*map(str, run), "--use_cpu", "true", "--disable_tqdm", "true", "--num_train_epochs", "0"]
    measured = [*run, "--unknown_split", "others", "--reject_below", "0.5"]
    assert main(measured) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "all_results.json").read_text())["unknown_split"]
    classifier = ImageClassifier.from_pretrained(tmp_path / "out")
    pictures = [colour_dataset(5, 5, captions=False), strangers().select(range(9))]
    with torch.no_grad():
        logits = [classifier(classifier.preprocess(rows["image"][:])) for rows in pictures]
    truth, scores = [1] * 15 + [0] * 9, torch.cat(logits)
    assert found["auroc_logit"] == pytest.approx(roc_auc_score(truth, scores.amax(dim=1)), abs=1e-9)
    assert found["auroc_probability"] == pytest.approx(
        roc_auc_score(truth, scores.softmax(dim=1).amax(dim=1)), abs=1e-9
    )
    share = (logits[1].softmax(dim=1).amax(dim=1) < 0.5).double().mean().item()
    assert (found["name"], found["examples"], found["answered_unknown"]) == ("others", 9, pytest.approx(share))
    assert "others, 9 images: " in said and "3 of 12 images of 'others' are of the classifier's own classes" in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Of 9 pictures of other classes (`others`), {100 * share:.1f} %" in card
    assert f"area under the ROC curve of {found['auroc_logit']:.2f} (" in card
    # Another head was not measured on them, and a finished run is not measured again without a word.
    assert main(["head", str(tmp_path / "out"), "--head", "prototypes", "--output_dir", str(new)]) == 0
    assert "unknown_split" not in json.loads((new / "all_results.json").read_text())
    assert "pictures of other classes" not in (new / "README.md").read_text()
    again = ["--resume_from_checkpoint", "true"]
    assert main([*measured, *again]) == 0
    (folder / "others-00000-of-00001.parquet").unlink()  # its classes would be those of the classifier
    run[run.index("--output_dir") + 1] = str(tmp_path / "plain")
    assert main(run) == 0
    capsys.readouterr()
    shots = str(data / "shots")
    assert main([*run, "--unknown_split", shots, *again]) == 2
    assert "Type mmft-hf evaluate --model_name_or_path" in capsys.readouterr().err
    assert main([*run, "--unknown_split", shots, "--overwrite_output_dir", "true"]) == 0
    found = json.loads((tmp_path / "plain" / "all_results.json").read_text())["unknown_split"]
    assert (found["examples"], found["answered_unknown"]) == (4, None) and shots not in json.dumps(found)
    assert "since there is no threshold" in (tmp_path / "plain" / "README.md").read_text()
    assert main([*run, "--unknown_split", "nowhere", "--output_dir", str(tmp_path / "no")]) == 2
    assert "expected a split of" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_a_split_of_data_in_memory(clip_folder, tmp_path):
    parts = {"train": colour_dataset(4), "validation": colour_dataset(4, 1), "test": colour_dataset(4, 2)}
    data = DatasetDict({**parts, "others": strangers()})
    settings = {"model": str(clip_folder), "num_train_epochs": 0, "use_cpu": True, "disable_tqdm": True}
    found = mmft_hf.finetune(data, output_dir=str(tmp_path / "out"), unknown_split="others", **settings)
    assert found.metrics["unknown_split"]["examples"] == 9
    assert ImageClassifier.from_pretrained(tmp_path / "out").class_names == list(COLOURS)
    with pytest.raises(UserError, match=r"label 'grey thing' is outside .* may be the unknown_split"):
        mmft_hf.finetune(data, output_dir=str(tmp_path / "no"), **settings)


def test_several_labels_have_no_unknown(_clip, data, capsys, tmp_path):
    head = ClassPrototypes.from_templates(*_clip, list(COLOURS), "a photo of a {}.")
    head.several_labels = True
    ImageClassifier(*_clip, head).save_pretrained(tmp_path / "several")
    striped_dataset(8).to_parquet(tmp_path / "striped" / "test.parquet")
    code, out = evaluate(tmp_path / "several", tmp_path / "striped", capsys, "--unknown_split", data / "shots")
    assert code == 2 and "--unknown_split: expected a classifier with one class for each picture" in out
