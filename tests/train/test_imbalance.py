"""Classes of unequal sizes: logit adjustment, balanced drawing, and what a report says first."""

import contextlib
import io
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from tiny_clip import colour_dataset
from training import make_trainer

import mmft_hf
from mmft_hf import MMFTConfig, MMFTTrainer
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.core.markdown import read_front_matter
from mmft_hf.data.sampling import ClassBalancedSampler
from mmft_hf.predict.fitting.inputs import check
from mmft_hf.predict.fitting.logistic import regression
from mmft_hf.predict.fitting.probe import probe
from mmft_hf.predict.heads import LinearHead
from mmft_hf.predict.metrics import uneven_note
from mmft_hf.train.learnable import share_with_positives
from mmft_hf.train.terms import Batch, ClassTextCrossEntropy, CrossEntropy, LossTerm

SIZES = (20, 4, 3)  # images of the three classes
NAMES = ["a", "b", "c"]


def uneven(sizes=SIZES, seed=0, captions=False):
    """Pictures of one colour for each class, so many of each."""
    whole = colour_dataset(max(sizes), seed, captions)
    seen, rows = Counter(), []
    for i, label in enumerate(whole["label"]):
        if seen[label] < sizes[label]:
            seen[label] += 1
            rows.append(i)
    return whole.select(rows)


# -- logit adjustment --------------------------------------------------------------------------------------------------
def boundary(weights) -> float:
    """The angle at which two class weights in the plane are equally near."""
    x, y = (weights[1] - weights[0]).tolist()
    return math.atan2(-x, y)


def test_the_adjusted_boundary_lies_between_two_gaussians_of_which_one_is_rare():
    """Directions in the plane around -0.3 and 0.3, 50 to 1. The boundary of least error lies at log(50) 0.3² / 0.6 = 0.59."""
    g = torch.Generator().manual_seed(0)
    angles = torch.cat([-0.3 + 0.3 * torch.randn(2000, generator=g), 0.3 + 0.3 * torch.randn(40, generator=g)]).double()
    x, y = torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([0] * 2000 + [1] * 40)
    centres = torch.tensor([-0.3, 0.3]).double()
    inputs = check(x, y, x[:1], torch.stack([centres.cos(), centres.sin()], dim=1), unit_norm=True)
    found = {
        tau: boundary(probe(inputs, scale=10.0, learning_rate=1e-2, epochs=20, adjustment=tau)) for tau in (0.0, 1.0)
    }
    assert abs(found[1.0]) < 0.06  # a tenth of the distance of the two
    assert found[0.0] == pytest.approx(math.log(50) * 0.3**2 / 0.6, abs=0.1)


def test_an_adjusted_logistic_regression_does_not_learn_the_shares_of_the_classes():
    """Where all images are the same, a regression can learn the shares of the classes and nothing else."""
    x = torch.tensor([[1.0, 0.0]] * 60).double()
    inputs = check(x, torch.tensor([0] * 50 + [1] * 10), x[:1], torch.eye(2).double(), unit_norm=True)
    found = {}
    for tau in (0.0, 1.0):
        weight, bias = regression(inputs, 1.0, strength=1e6, adjustment=tau)
        found[tau] = (x[:1] @ weight.T + bias).softmax(dim=1)[0].tolist()
    assert found[0.0] == pytest.approx([50 / 60, 10 / 60], abs=1e-3)
    assert found[1.0] == pytest.approx([0.5, 0.5], abs=1e-3)


def test_both_cross_entropies_add_the_adjustment_to_their_logits():
    g = torch.Generator().manual_seed(0)
    images, classes = (torch.nn.functional.normalize(torch.randn(n, 5, generator=g), dim=1) for n in (6, 3))
    labels, counts = torch.tensor([0, 2, -100, 1, 0, 0]), np.array(SIZES)
    head = LinearHead(7.0 * classes, NAMES, torch.tensor([0.1, -0.2, 0.3]))
    terms = {ClassTextCrossEntropy(): 0.0, CrossEntropy(head): head.bias.double().numpy()}
    for tau in (0.0, 1.5):
        extras = {"class_embeds": classes}
        if tau:
            extras["adjustment"] = tau * torch.tensor(counts / counts.sum()).log().float()
        for term, bias in terms.items():
            batch = Batch(images, labels, 7.0, extras=extras, parameters={term.name: term.parameters})
            logits = 7.0 * images.double().numpy() @ classes.double().numpy().T + bias
            shares = np.exp(logits) * (counts / counts.sum()) ** tau
            shares /= shares.sum(axis=1, keepdims=True)
            expected = -np.mean([np.log(shares[i, c]) for i, c in enumerate(labels.tolist()) if c >= 0])
            assert term(batch)["loss"].item() == pytest.approx(expected, rel=1e-5)


class Witness(LossTerm):
    """Remembers the adjustment that it is given."""

    name = "witness"
    needs = ()
    over_classes = True

    def __call__(self, batch):
        self.seen = batch.extras.get("adjustment")
        return {"loss": batch.image_embeds.sum()}


def test_the_trainer_adjusts_by_the_shares_of_the_training_images(clip, tmp_path):
    for tau, expected in ((2.0, 2 * np.log(np.array(SIZES) / sum(SIZES))), (0.0, None)):
        config = MMFTConfig(str(tmp_path), use_cpu=True, disable_tqdm=True, max_steps=1, logit_adjustment=tau)
        witness = Witness()
        MMFTTrainer(clip[0], config, uneven(), None, clip[1], loss=witness).train()
        if expected is None:
            assert witness.seen is None
        else:
            np.testing.assert_allclose(witness.seen.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("other", [{"class_balance": True}, {"samples_per_class": 2}])
def test_what_makes_up_for_the_sizes_twice_is_refused(tmp_path, other):
    with pytest.raises(
        UserError, match=rf"logit_adjustment: expected 0 with {next(iter(other))}, found 1.* both do so twice"
    ):
        MMFTConfig(str(tmp_path), use_cpu=True, logit_adjustment=1.0, **other)


def test_an_adjustment_that_would_change_nothing_is_refused(clip_folder, tmp_path):
    data = {"train": uneven(), "validation": uneven((2, 2, 2), 1), "test": uneven((2, 2, 2), 2)}
    with pytest.raises(
        UserError,
        match=r"logit_adjustment: expected 0 with head kernel, found 1.*heads linear and logistic, .* or type head linear",
    ):
        mmft_hf.finetune(data, clip_folder, tmp_path / "out", head="kernel", logit_adjustment=1.0, use_cpu=True)
    assert not (tmp_path / "out").exists()


# -- balanced drawing ----------------------------------------------------------------------------------------------------
def test_each_class_is_drawn_equally_often():
    labels = [0] * 300 + [1] * 30 + [2] * 10
    sampler = ClassBalancedSampler(labels, step_size=24, samples_per_class=1, seed=3)
    rows = [key % len(labels) for key in sampler]
    assert len(rows) == len(labels)
    drawn = Counter(labels[row] for row in rows)
    assert max(drawn.values()) - min(drawn.values()) <= 1
    for c, size in enumerate((300, 30, 10)):
        assert len({row for row in rows if labels[row] == c}) == min(size, drawn[c])
    for start in range(0, len(rows), 24):
        assert len(set(rows[start : start + 24])) == len(rows[start : start + 24])


def test_a_run_draws_each_class_equally_often(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path, uneven((16, 4, 4)), False, max_steps=4, class_balance=True)
    labels = [label for batch in trainer.get_train_dataloader() for label in batch["labels"].tolist()]
    assert Counter(labels) == {0: 8, 1: 8, 2: 8}


def test_images_that_meet_another_one_of_their_class_in_balanced_batches():
    """One of each of six classes, then a second one of the first ones: in a batch of 8, two classes have two."""
    assert share_with_positives([10] * 6, 8, 1) == pytest.approx(4 / 8)
    assert share_with_positives([10] * 6, 6, 1) == 0
    assert share_with_positives([10] * 6, 12, 1) == 1


# -- what is said first --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(clip_folder, tmp_path_factory):
    """A run on splits of which only the test split has classes of unequal sizes: its folder, data and what it printed."""
    data = tmp_path_factory.mktemp("data")
    for seed, (name, sizes) in enumerate({"train": (4, 4, 4), "validation": (4, 4, 4), "test": (10, 3, 2)}.items()):
        uneven(sizes, seed).to_parquet(data / f"{name}.parquet")
    folder = tmp_path_factory.mktemp("run") / "out"
    words = ["finetune", "--model_name_or_path", clip_folder, "--dataset_name", data, "--output_dir", folder]
    words += ["--num_train_epochs", 0, "--use_cpu", "true", "--disable_tqdm", "true", "--logit_adjustment", "1"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([str(word) for word in words]) == 0
    return folder, data, printed.getvalue()


SENTENCE = "The largest class has 10 test images and the smallest 2, so accuracy says little about small classes"


def test_the_mean_over_the_classes_comes_first_where_sizes_differ(run, tmp_path, capsys):
    folder, data, printed = run
    results = json.loads((folder / "all_results.json").read_text())
    mean, before = results["test_mean_per_class_accuracy"], results["zero_shot_test_mean_per_class_accuracy"]
    assert mean > before
    assert printed.index("mean per class") < printed.index("new head")
    assert f"{100 * mean:.1f} %, zero-shot {100 * before:.1f} %   {100 * (mean - before):+.1f} points" in printed
    assert SENTENCE in printed and "Type --metric_for_best_model mean_per_class_accuracy" in printed

    assert main(["evaluate", "--model_name_or_path", str(folder), "--dataset_name", str(data)]) == 0
    evaluated = capsys.readouterr().out
    assert evaluated.index("mean per class") < evaluated.index("accuracy  ") and SENTENCE in evaluated

    front, card = read_front_matter((folder / "README.md").read_text())
    sizes = (results["test_images_of_smallest_class"], results["test_images_of_largest_class"])
    assert f"{uneven_note(*sizes)} The head gained " in card or f"{uneven_note(*sizes)} Fine-tuning gained " in card
    assert (
        SENTENCE in card and f"gained {100 * (mean - before):.1f} points of it. What follows is about accuracy" in card
    )
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert (
        "mean over the classes" in rows[2]
        and "mean over the classes** | **" in rows[3]
        and "over all images" in rows[4]
    )
    assert [m["type"] for m in front["model-index"][0]["results"][0]["metrics"][:2]] == [
        "mean_per_class_accuracy",
        "accuracy",
    ]


def test_another_head_is_shown_by_its_mean_over_the_classes(run, tmp_path, capsys):
    assert main(["head", str(run[0]), "--head", "prototypes", "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for folder, word in ((run[0], "before"), (tmp_path / "out", "now")):
        mean = json.loads((folder / "all_results.json").read_text())["test_mean_per_class_accuracy"]
        (line,) = [line for line in printed.splitlines() if line.strip().startswith(word)]
        assert f"mean per class {100 * mean:.1f} %, accuracy " in line
    assert SENTENCE in printed


def test_where_sizes_are_alike_accuracy_comes_first(run, clip_folder, tmp_path, capsys):
    folder, data, _ = run
    words = ["evaluate", "--model_name_or_path", str(folder), "--dataset_name", str(data), "--test_split", "validation"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed.index("accuracy  ") < printed.index("mean per class") and "The largest class" not in printed
