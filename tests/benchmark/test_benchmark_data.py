"""The data of a benchmark: splits that are refused, and `data.json`."""

import json

import numpy as np
import pytest
from benchmark_tools import command, parts_of, with_bad_picture
from datasets import Image, concatenate_datasets
from PIL import Image as PILImage
from tiny_clip import COLOURS, colour_dataset

from mmft_hf import MMFTConfig
from mmft_hf.benchmark.report.figures import compared
from mmft_hf.benchmark.run.context import Context
from mmft_hf.benchmark.run.methods import METHODS, fit
from mmft_hf.benchmark.run.protocol import Cell, SealedTest, Task
from mmft_hf.benchmark.run.results import RESULTS_FILE, read_results
from mmft_hf.cli import main
from mmft_hf.core.arguments import DataArguments
from mmft_hf.data.identical import find_identical
from mmft_hf.data.splits import labels_of, load_splits


def without_labels(data):
    return data.remove_columns("label").add_column("label", [-1] * len(data)).cast(data.features)


def test_a_test_split_without_labels_is_refused_before_anything_is_run(clip_folder, tmp_path, capsys):
    data = parts_of(tmp_path / "data", test=without_labels(colour_dataset(6, 2)))
    assert main(command(clip_folder, data, tmp_path / "out")) == 2
    expected = "split 'test': expected labels to judge the methods by, found none. Type --test_split NAME"
    assert expected in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_shifts_that_cannot_be_judged_on_are_refused(clip_folder, tmp_path, capsys):
    more = {"sketch": colour_dataset(3, 3), "blank": without_labels(colour_dataset(3, 4))}
    words = command(clip_folder, parts_of(tmp_path / "data", **more), tmp_path / "out", "--shift_splits")
    for names, expected in (
        (["sketches"], "expected a split of the dataset, found"),
        (["validation"], "found it as validation split, too. Splits that are free: "),
        (["sketch", "sketch"], "found it as a shift twice"),
        (["blank"], "expected images with labels, found 9 images without any"),
    ):
        assert main([*words, *names]) == 2
        assert expected in capsys.readouterr().err
    assert main([*words, "sketch", "--group_column", "concept"]) == 2
    assert "--group_column concept: expected a column of split 'test'" in capsys.readouterr().err
    assert not (tmp_path / "out" / RESULTS_FILE).exists()


def test_too_few_images_are_refused_before_anything_is_run(clip_folder, data_folder, tmp_path, capsys):
    words = command(clip_folder, data_folder, tmp_path / "out", "--methods", "lp", "--shots", 2, 9, "--seeds", 0)
    assert main(words) == 2
    assert "--shots 9: expected this many training images of every class" in capsys.readouterr().err
    assert not (tmp_path / "out" / RESULTS_FILE).exists()


def test_pictures_in_two_splits_are_counted_named_and_kept(clip_folder, tmp_path, capsys):
    train, shift = colour_dataset(8), colour_dataset(2, 5)
    # Twice in one split, which tells no method anything, but with another label.
    again = shift.select([0]).map(lambda row: {"label": 2})
    shift = concatenate_datasets([shift, again])
    test = concatenate_datasets([colour_dataset(6, 2), train.select([3, 4])])
    groups = [f"g{i // 2}" for i in range(len(test))]
    parts = {"train": train, "validation": colour_dataset(4, 1), "test": test, "sketch": shift}
    concepts = {"train": ["b"] * 24, "validation": ["c"] * 12, "test": groups, "sketch": [*["a", None] * 3, "a"]}
    data = parts_of(
        tmp_path / "data", **{name: part.add_column("concept", concepts[name]) for name, part in parts.items()}
    )
    words = ("--methods", "lp", "--shots", 2, "--seeds", 0, "--shift_splits", "sketch", "--group_column", "concept")
    assert main(command(clip_folder, data, tmp_path / "out", *words)) == 0
    printed = capsys.readouterr().out
    assert "20 test, 7 sketch" in printed
    assert "Note: 2 pictures are in two splits, byte for byte (row 3 of train is row 18 of test; " in printed
    assert "different labels: 1 picture, such as row 0 (red thing) and row 6 (blue thing). At most one" in printed
    described = json.loads((tmp_path / "out" / "data.json").read_text())
    assert described["duplicates_count"] == len(described["duplicates"]) == 2
    assert described["duplicates"][1] == {"splits": ["train", "test"], "images": ["row 4", "row 19"]}
    assert described["two_labels"] == [{"labels": ["red thing", "blue thing"], "images": ["row 0", "row 6"]}]
    assert described["labels"] == {"test": labels_of(test).tolist(), "sketch": labels_of(shift).tolist()}
    assert described["groups"]["test"] == groups and described["groups"]["sketch"][:2] == ["a", "row 1"]
    assert described["train_images_per_class"] == [8, 8, 8] and described["validation_images"] == 12
    assert described["captions"]["images"] == 24 and described["captions"]["captions"] == 48
    assert described["captions"]["calls"] is None
    (row,) = read_results(tmp_path / "out" / RESULTS_FILE)
    for split, labels in described["labels"].items():
        right = np.mean(np.array(row["predictions"][split]) == labels)
        assert right == pytest.approx(row["test_accuracy"] if split == "test" else row["shift_accuracy"][split])


def test_duplicates_are_named_with_their_folders(tmp_path):
    for split in ("train", "validation", "test"):
        for label, (name, colour) in enumerate(COLOURS.items()):
            for i in range(2):  # every class has a 0.png; the same one twice in blue alone
                same = name == "blue thing" and i == 0 and split != "validation"
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                size = (9, 9) if same else (10 + i, 10 + len(split) + label)
                PILImage.new("RGB", size, colour).save(tmp_path / split / name / f"{i}.png")
    splits = load_splits(DataArguments(dataset_name=str(tmp_path)))
    before = splits.fingerprint()
    (found,) = find_identical({"train": splits.train, "test": splits.test}).across
    assert found == {"splits": ["train", "test"], "images": ["blue thing/0.png"] * 2}
    assert splits.fingerprint() == before
    packed = splits.train.select([0]).remove_columns("image")
    inside = {"bytes": b"x", "path": "zip://bird/1.png::/home/me/birds.zip"}
    packed = packed.add_column("image", [inside], feature=Image(decode=False))
    assert find_identical({"a": packed, "b": packed}).across[0]["images"] == ["bird/1.png"] * 2


def test_a_control_at_chance_does_not_set_the_axes():
    methods = ["zs", "lp", "lp-permuted-labels", "mmft", "mmft-no-captions", "mmft-permuted-labels", "mmft-w0", "new"]
    assert compared(methods) == ["zs", "lp", "mmft", "mmft-no-captions", "new"]


def test_unreadable_pictures_have_no_effect_on_training_and_choice(clip_folder, tmp_path):
    train, validation = colour_dataset(4), colour_dataset(3, 1)
    config = MMFTConfig(str(tmp_path), use_cpu=True, on_bad_image="skip")
    context = Context(str(clip_folder), None, config)
    found = []
    for parts in (
        (with_bad_picture(train, 5), with_bad_picture(validation, 7)),
        (train.select([i for i in range(12) if i != 5]), validation.select([i for i in range(9) if i != 7])),
    ):
        task = Task(*parts, train.features["label"].names, shots=4, seed=0, policy="val-k")
        for name in ("gda", "lp++", "zs"):
            fitted = fit(METHODS[name], context, task)
            found.append((fitted.classifier(colour_dataset(4, 2)), fitted.chosen, fitted.validation_accuracy))
    for one, other in zip(found[:3], found[3:], strict=True):
        np.testing.assert_allclose(one[0], other[0], atol=1e-4)  # other batches round otherwise
        assert one[1:] == other[1:]


def test_unreadable_test_pictures_are_not_counted():
    data = with_bad_picture(colour_dataset(2), 4)
    sealed = SealedTest({"test": data}, list(COLOURS), skip_bad_images=True)
    scores = np.eye(3)[labels_of(data)]
    scores[4] = np.nan
    found = sealed.judge(Cell("a", 1, 0), lambda dataset: scores)
    assert found["test_images"] == 5 and found["test_accuracy"] == 1
    assert found["predictions"]["test"] == [0, 1, 2, 0, -1, 2]
    with pytest.raises(ValueError, match="not finite"):
        SealedTest({"test": data}, list(COLOURS)).judge(Cell("a", 1, 0), lambda dataset: scores)
    with pytest.raises(ValueError, match="expected 6 x 3 scores, found"):
        sealed.judge(Cell("b", 1, 0), lambda dataset: scores[:4])
