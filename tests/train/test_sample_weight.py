"""Weights of captions after a score: what they are, what they do to the loss, and that training stays exact."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
import torch
from datasets import load_dataset
from scipy.stats import rankdata
from tiny_clip import colour_dataset
from training import StopAfter, changed, make_trainer, weights

from mmft_hf import MMFTConfig, MMFTTrainer
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.data.caption_weights import WEIGHTS, weights_of, with_caption_weights
from mmft_hf.data.views import TextView, TrainingView
from mmft_hf.model.losses import Batch, batch_supcon
from mmft_hf.predict.heads import LinearHead
from mmft_hf.train.terms import CrossEntropy


def scored(data, score=lambda row, k: row - 10.5 * k, name="clip_gain"):
    """The images with a record for each caption; `score(row, number of the caption)`, None: it has none."""
    records, common = [], {"aspect": "visual", "model": "m", "prompt_id": "p"}
    for row, captions in enumerate(data["captions"][:]):
        own = [{"text": None, "status": "failed", "scores": None, **common}]
        for k, text in enumerate(captions):
            scores = [{"name": "clip", "value": 0.5}]
            if (value := score(row, k)) is not None:
                scores.append({"name": name, "value": value})
            own.append({"text": f" {text}", "status": "ok", "scores": scores, **common})
        records.append(own[::-1])
    return data.add_column("caption_records", records)


# -- weights -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [2, 3, 8, 50])
def test_weights_are_eighths_of_the_average_ranks(n):
    scores = np.random.default_rng(n).integers(-5, 6, n) / 10
    expected = [(2 * min(int(8 * (rank - 0.5) / n), 7) + 1) / 8 for rank in rankdata(scores)]
    assert weights_of(scores).tolist() == expected
    shuffled = np.random.default_rng(0).permutation(n)
    assert weights_of(scores[shuffled]).tolist() == weights_of(scores)[shuffled].tolist()
    assert weights_of(np.exp(7 * scores)).tolist() == expected  # only the order counts
    assert weights_of(np.arange(800)).mean() == 1 and set(weights_of(np.arange(800))) == {
        0.125 * k for k in range(1, 16, 2)
    }


def test_each_caption_gets_the_weight_of_its_own_score():
    data = scored(colour_dataset(4))
    found, notes = with_caption_weights(data, "score:clip_gain")
    values = [[row - 10.5 * k for k in range(2)] for row in range(12)]
    assert np.array(found[WEIGHTS][:]).ravel().tolist() == weights_of(np.ravel(values)).tolist() and notes == []
    some, notes = with_caption_weights(scored(colour_dataset(4), lambda row, k: row if k else None), "score:clip_gain")
    assert [own[0] for own in some[WEIGHTS][:]] == [1.0] * 12
    assert [own[1] for own in some[WEIGHTS][:]] == weights_of(np.arange(12)).tolist()
    assert notes == ["12 captions of 24 have no score clip_gain and count as an average one."]


def test_scores_that_are_missing_are_refused():
    data = colour_dataset(4)
    for dataset, setting, expected in (
        (data, "score:clip", "expected columns captions and caption_records, found image, label, captions"),
        (
            scored(data),
            "score:clip_gian",
            r"found no 'clip_gian'. Did you mean 'clip_gain'\? .* have: clip, clip_gain.",
        ),
        (scored(data, lambda row, k: float("nan")), "score:clip_gain", "found no 'clip_gain'"),
        (scored(data), "score:clip", "expected scores that differ, found 0.5 for each caption"),
    ):
        with pytest.raises(UserError, match=expected):
            with_caption_weights(dataset, setting)
    for setting in ("clip_gain", "score:", "column:x"):
        with pytest.raises(UserError, match=f"sample_weight: expected score:NAME.*found '{setting}'"):
            MMFTConfig("somewhere", use_cpu=True, sample_weight=setting)


def test_a_draw_has_its_weight_and_is_what_it_would_be_without():
    data = scored(colour_dataset(4))
    weighted, _ = with_caption_weights(data, "score:clip_gain")
    texts = TextView(data.features["label"].names, caption_dropout=0.3, seed=3)
    plain, found = TrainingView(data, texts, crop_min_area=0.5), TrainingView(weighted, texts, crop_min_area=0.5)
    names = data.features["label"].names
    expected = [
        {
            f"a photo of a {names[row['label']]}. {text.strip()}": own
            for text, own in zip(row["captions"], row[WEIGHTS], strict=True)
        }
        for row in weighted
    ]
    seen = set()
    for key in range(6 * len(data)):
        one, other = plain[key], found[key]
        assert (one["text"], one["box"]) == (other["text"], other["box"]) and "weight" not in one
        assert other["weight"] == pytest.approx(expected[key % len(data)].get(other["text"], 1.0))
        seen.add(other["weight"])
    assert len(seen) > 5 and found[-1]["weight"] == 1.0  # a row that fills up a batch


# -- the loss --------------------------------------------------------------------------------------------------------------
def test_the_loss_is_that_of_a_plain_loop():
    g = torch.Generator().manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(5, 4, generator=g).double(), dim=1) for _ in range(2))
    labels, counting = torch.tensor([0, 1, 0, -100, 1]), torch.tensor([0.125, 1.875, 1.0, 5.0, 0.625]).double()
    batch = Batch.gathered(images, labels, 3.0, texts, weights=counting)
    rows = [0, 1, 2, 4]

    def anchor(own, others, i, positives):
        logits = {j: 3.0 * float(own[i] @ others[j]) for j in rows}
        total = np.log(sum(np.exp(value) for value in logits.values()))
        return -np.mean([logits[j] - total for j in positives])

    clip, supcon, total = 0.0, 0.0, sum(counting[rows].tolist())
    for own, others in ((images, texts), (texts, images)):
        clip += sum(float(counting[i]) * anchor(own, others, i, [i]) for i in rows) / total / 2
        same = {i: [j for j in rows if labels[i] == labels[j] and i != j] for i in rows}
        supcon += sum(float(counting[i]) * anchor(own, others, i, same[i]) for i in rows) / total / 2
    assert batch.clip_loss.item() == pytest.approx(clip, abs=1e-12)
    assert batch_supcon(batch)[0].item() == pytest.approx(supcon, abs=1e-12)
    plain, alike = (Batch.gathered(images, labels, 3.0, texts, weights=own) for own in (None, 0 * counting + 0.7))
    assert plain.clip_loss.item() == pytest.approx(alike.clip_loss.item(), abs=1e-12)
    assert batch_supcon(plain)[0].item() == pytest.approx(batch_supcon(alike)[0].item(), abs=1e-12)


def trained(clip, folder, data, epochs=2, callback=None, resume=None, **settings):
    model, processor = copy.deepcopy(clip)
    settings = {
        "num_train_epochs": epochs,
        "crop_min_area": 1.0,
        "evaluate": False,
        "optim": "sgd",
        "learning_rate": 0.1,
    } | settings
    trainer = make_trainer((model, processor), folder, data, **settings)
    if callback:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return weights(trainer.model)


def test_weights_change_what_is_learnt_and_a_column_of_that_name_alone_does_not(clip, tmp_path):
    data, by = colour_dataset(4), {"sample_weight": "score:clip_gain"}
    plain = trained(clip, tmp_path, data)
    assert changed(trained(clip, tmp_path, scored(data), **by), plain)
    unused = data.add_column(WEIGHTS, ["a column of the user's"] * 12)  # is not touched without the setting
    assert not changed(trained(clip, tmp_path, unused), plain)


def test_a_loss_without_texts_has_nothing_to_weigh(clip, tmp_path):
    model, processor = copy.deepcopy(clip)
    head = LinearHead(torch.randn(3, 32), list(colour_dataset(1).features["label"].names), torch.zeros(3))
    args = MMFTConfig(str(tmp_path), use_cpu=True, sample_weight="score:clip_gain")
    with pytest.raises(UserError, match="expected a loss of images and texts, found one without texts"):
        MMFTTrainer(model, args, scored(colour_dataset(4)), None, processor, loss=CrossEntropy(head))


@pytest.mark.slow
def test_a_resumed_training_ends_bit_for_bit_as_one_that_was_not_interrupted(clip, tmp_path):
    settings = {"sample_weight": "score:clip_gain", "caption_dropout": 0.2, "epochs": 3}
    data = scored(colour_dataset(4))
    straight = trained(clip, tmp_path / "straight", data, **settings)
    with pytest.raises(KeyboardInterrupt):
        trained(clip, tmp_path / "cut", data, callback=StopAfter(3), **settings)
    resumed = trained(clip, tmp_path / "cut", data, resume=True, **settings)
    assert not changed(straight, resumed)


# -- the command -----------------------------------------------------------------------------------------------------------
def test_finetune_says_records_and_resumes_with_the_same_weights_alone(clip_folder, data_folder, tmp_path, capsys):
    folder = tmp_path / "refined"
    folder.mkdir()
    for name in ("train", "validation", "test"):
        data = load_dataset("parquet", data_files=str(data_folder / f"{name}.parquet"), split="train")
        scored(data).to_parquet(folder / f"{name}.parquet")
    words = f"finetune --model_name_or_path {clip_folder} --dataset_name {folder} --output_dir {tmp_path / 'out'}"
    words += " --max_steps 2 --per_device_train_batch_size 8 --use_cpu true --head prototypes"
    words = [*words.split(), "--sample_weight", "score:clip_gain"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(words) == 0
    assert "they count by score:clip_gain" in printed.getvalue()
    identity = json.loads((tmp_path / "out" / "mmft.json").read_text())["identity"]
    assert identity["other_settings"]["sample_weight"] == "score:clip_gain" and len(identity["caption_weights"]) == 16
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `sample_weight` | `score:clip_gain` |" in card
    assert "A pair of image and caption counts by the caption's `score:clip_gain`" in card
    train = load_dataset("parquet", data_files=str(folder / "train.parquet"), split="train")
    scored(train.remove_columns("caption_records"), lambda row, k: -row).to_parquet(folder / "train.parquet")
    assert main([*words, "--resume_from_checkpoint", "true"]) == 2
    assert "caption_weights was" in capsys.readouterr().err
    assert main([*words[:-1], "score:sr_pct", "--overwrite_output_dir", "true"]) == 2
    assert (
        "--sample_weight score:sr_pct: expected a score of the captions, found no 'sr_pct'" in capsys.readouterr().err
    )
