"""What cannot be learnt is refused before the first step, and what hardly can is said."""

from itertools import combinations

import numpy as np
import pytest
import torch
from tiny_clip import colour_dataset
from training import make_trainer, with_lora

from mmft_hf import MMFTConfig, MMFTTrainer
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.predict.heads import LinearHead
from mmft_hf.train.learnable import check_learnable, share_with_positives
from mmft_hf.train.terms import Clip, CrossEntropy, SupCon, terms_of


def config(tmp_path, **settings) -> MMFTConfig:
    return MMFTConfig(output_dir=str(tmp_path), use_cpu=True, **{"per_device_train_batch_size": 4, **settings})


def said(tmp_path, labels, terms=None, **settings) -> list[str]:
    made = config(tmp_path, **settings)
    return check_learnable(labels, terms or terms_of(None, made), made)


@pytest.mark.parametrize(
    ("labels", "settings", "message"),
    [
        ([0, 0, 0], {}, "expected training images of two classes or more, found 3 of 1"),
        ([0, 0, -100], {}, "found 2 of 1"),
        ([0, 1] * 4, {"per_device_train_batch_size": 1}, "per_device_train_batch_size: expected 2 or more, found 1"),
        (
            [0] * 8 + [1] * 8,
            {"samples_per_class": 4},
            "every batch would be of a single class. Type samples_per_class 2",
        ),
    ],
)
def test_nothing_can_be_learnt(tmp_path, labels, settings, message):
    with pytest.raises(UserError) as refused:
        said(tmp_path, labels, **settings)
    assert message in str(refused.value)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_weights_that_would_not_minimize_are_refused(clip, tmp_path, weight):
    model, processor = clip
    with pytest.raises(UserError, match="loss: expected a weight of 0 or more for supcon"):
        said(tmp_path, [0, 1] * 4, [SupCon(weight), Clip(0.9)])
    with pytest.raises(UserError, match="loss: expected a weight of 0 or more for clip"):
        MMFTTrainer(model, config(tmp_path), colour_dataset(4), None, processor, loss=[SupCon(1), Clip(weight)])
    with pytest.raises(UserError, match="expected a term with a weight above 0, found none"):
        said(tmp_path, [0, 1] * 4, [SupCon(0), Clip(0.0)])


def test_a_schedule_that_turns_negative_is_refused_before_the_first_step(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path, evaluate=False, num_train_epochs=3)
    trainer.terms[0].weight = lambda step, steps: 0.5 - step / steps
    with pytest.raises(UserError, match=r"weight of 0 or more for supcon, found -0\.05.* \(step 6 of 9\)"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_positives_that_are_missing_or_rare_are_said(tmp_path):
    assert said(tmp_path, [0, 0, 1, 1] * 2) == []
    (note,) = said(tmp_path, list(range(8)))
    assert "no image has a positive in any batch" in note and "--include_self true" in note
    assert said(tmp_path, list(range(8)), include_self=True) == []
    assert said(tmp_path, list(range(8)), supcon_weight=0.0) == []
    (note,) = said(tmp_path, list(range(100)) * 2)
    assert "only 1.5% of the images" in note and "--samples_per_class 2" in note  # 3 of the 199 others are in the batch
    assert said(tmp_path, list(range(100)) * 2, samples_per_class=2) == []


def test_a_last_batch_of_one_is_said(tmp_path):
    (note,) = said(tmp_path, [0, 1, 1] * 3)
    assert "The last batch of each epoch has a single image" in note and "--per_device_train_batch_size 3" in note
    assert said(tmp_path, [0, 1, 1] * 3, per_device_train_batch_size=3) == []


@pytest.mark.parametrize("counts", [(1, 1), (3, 2), (4, 1, 1), (2, 2, 2, 1)])
@pytest.mark.parametrize("batch", [2, 3, 5, 20])
def test_the_expected_share_is_that_of_all_batches(counts, batch):
    labels = np.repeat(np.arange(len(counts)), counts)
    batches = list(combinations(labels, min(batch, len(labels))))
    shares = [np.mean([list(one).count(label) > 1 for label in one]) for one in batches]
    assert share_with_positives(counts, batch) == pytest.approx(np.mean(shares), abs=1e-12)


def test_frozen_towers(clip, tmp_path):
    model, _ = with_lora(clip, "frozen", "lora")
    terms, labels = terms_of(None, config(tmp_path)), [0, 1] * 4
    assert check_learnable(labels, terms, config(tmp_path), model) == []
    with pytest.raises(
        UserError, match="prototypes: expected captions, template or templates with vision_tower frozen"
    ):
        check_learnable(labels, terms, config(tmp_path, prototypes="images"), model)
    head = LinearHead(torch.eye(2, 32), ["a", "b"])
    assert check_learnable(labels, [CrossEntropy(head)], config(tmp_path), model) == []
    with pytest.raises(UserError, match=r"nothing would be learnt\. Type vision_tower lora"):
        check_learnable(labels, [CrossEntropy(head, fixed=True)], config(tmp_path), model)


@pytest.mark.parametrize("epochs", ["0", "1"])
def test_one_class_is_refused_also_where_a_head_alone_is_fitted(epochs, clip_folder, tmp_path, capsys):
    data = colour_dataset(4)
    data = data.select([i for i, label in enumerate(data["label"]) if label == 0]).remove_columns("label")
    data.add_column("label", ["red"] * len(data)).to_parquet(tmp_path / "data" / "train.parquet")
    words = ["finetune", "--dataset_name", tmp_path / "data", "--model_name_or_path", clip_folder, "--use_cpu", "true"]
    words += ["--output_dir", tmp_path / "out", "--num_train_epochs", epochs]
    assert main([*map(str, words)]) == 2
    assert "expected training images of two classes or more, found" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_before_it_writes(data_folder, clip_folder, tmp_path, capsys):
    words = [
        "finetune",
        "--dataset_name",
        str(data_folder),
        "--model_name_or_path",
        str(clip_folder),
        "--use_cpu",
        "true",
    ]
    words += ["--output_dir", str(tmp_path / "out"), "--per_device_train_batch_size", "1"]
    assert main(words) == 2
    assert "--per_device_train_batch_size: expected 2 or more, found 1" in capsys.readouterr().err
    assert not (tmp_path / "out" / "mmft.json").exists()
