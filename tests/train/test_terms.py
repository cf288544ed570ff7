"""Loss terms: every registered one is exact over chunks (over processes: test_distributed.py), and the Trainer sums, logs and
trains them.
"""

import copy

import pytest
import torch
from safetensors.torch import load_file
from term_cases import term_of
from tiny_clip import colour_dataset
from training import StopAfter, changed, make_trainer, weights

from mmft_hf import MMFTConfig, MMFTLoss, MMFTTrainer
from mmft_hf.model.losses import contrast
from mmft_hf.train.terms import TERMS, Batch, Clip, LossTerm, SupCon

SGD = {"optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 8, "num_train_epochs": 1}


def trainer_of(loss, clip, folder, validation=None, **settings) -> MMFTTrainer:
    config = MMFTConfig(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **SGD | settings)
    return MMFTTrainer(clip[0], config, colour_dataset(8), validation, clip[1], loss=loss)


# -- every term --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TERMS)
def test_chunks_equal_the_whole_batch(clip, tmp_path, name):
    found = []
    for chunk in (None, 3):
        own = copy.deepcopy(clip)
        # An anchor has no gradient before something else has moved the embeddings.
        terms = [term_of(name, 32)] + [Clip()] * (name == "gram")
        trainer = trainer_of(terms, own, tmp_path / str(chunk), loss_chunk_size=chunk)
        trainer.train()
        log = next(log for log in trainer.state.log_history if "loss" in log)
        assert {f"{name}_loss", f"{name}_weight"} <= log.keys()
        found.append(weights(trainer.model) | {"loss": torch.tensor(log[f"{name}_loss"])})
    assert max((found[0][key] - start).abs().max() for key, start in weights(clip[0]).items()) > 1e-3
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, atol=1e-6, rtol=0)


# -- the sum -----------------------------------------------------------------------------------------------------------
def test_mmfts_own_loss_is_the_sum_of_its_two_terms():
    g = torch.Generator().manual_seed(0)
    images, texts, labels = torch.randn(9, 5, generator=g), torch.randn(9, 5, generator=g), torch.arange(9) % 4
    batch = Batch(images, labels, 7.0, texts)
    total = 0.3 * SupCon()(batch)["loss"] + 0.7 * Clip()(batch)["loss"]
    assert torch.equal(total, MMFTLoss(0.3)(images, texts, labels, 7.0)["loss"])


class Centred(LossTerm):
    """A toy: the mean embedding of the images is drawn to a point that is trained, too."""

    name = "centred"
    needs = ()
    weight = 0.5

    def __init__(self):
        self.parameters = {"point": torch.nn.Parameter(torch.zeros(32))}

    def __call__(self, batch):
        distance = (batch.image_embeds.mean(dim=0) - batch.parameters[self.name]["point"] - 1).square().sum()
        return {"loss": distance, "distance": distance.sqrt()}


def test_a_list_of_terms_is_summed_logged_and_shown(clip, tmp_path, capsys):
    validation = colour_dataset(4, seed=1)
    trainer = trainer_of([Clip(), SupCon(lambda step, steps: step / steps), Centred()], clip, tmp_path, validation)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["supcon_weight"] == pytest.approx((0 + 1 / 3 + 2 / 3) / 3) and log["clip_weight"] == 1
    assert log["distance"] ** 2 == pytest.approx(log["centred_loss"], rel=0.1)
    line = next(line for line in capsys.readouterr().out.splitlines() if "loss" in line)
    assert f"~ 1 x clip {log['clip_loss']:.3f} + 0.333 x supcon" in line
    assert f"0.5 x centred {log['centred_loss']:.3f}" in line and f"distance {log['distance']:.3g}" in line
    assert trainer.model.loss_terms["centred"]["point"].abs().max() > 1e-3


@pytest.mark.slow
def test_what_a_term_trains_is_in_checkpoints_resumed_and_not_in_the_saved_model(clip, tmp_path):
    settings = {"learning_rate": 1e-3, "optim": "adamw_torch", "num_train_epochs": 3}
    straight = trainer_of(Centred(), copy.deepcopy(clip), tmp_path / "straight", colour_dataset(4), **settings)
    straight.train()
    interrupted = trainer_of(Centred(), copy.deepcopy(clip), tmp_path / "other", colour_dataset(4), **settings)
    interrupted.add_callback(StopAfter(5))
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert "loss_terms.centred.point" in load_file(tmp_path / "other" / "checkpoint-3" / "model.safetensors")
    resumed = trainer_of(Centred(), copy.deepcopy(clip), tmp_path / "other", colour_dataset(4), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert not changed(weights(straight.model), weights(resumed.model))
    resumed.save_model(str(tmp_path / "saved"))
    assert not [name for name in load_file(tmp_path / "saved" / "model.safetensors") if "loss_terms" in name]


def test_a_term_of_weight_zero_is_logged_and_changes_nothing(clip, tmp_path):
    found = []
    for terms in ([Clip()], [Clip(), SupCon(0.0)]):
        trainer = trainer_of(terms, copy.deepcopy(clip), tmp_path)
        trainer.train()
        found.append(weights(trainer.model))
    assert not changed(*found)
    assert trainer.state.log_history[0]["supcon_loss"] > 0


@pytest.mark.parametrize("loss", [[], [Clip(), Clip(0.5)]])
def test_terms_of_one_name_and_no_terms_are_refused(clip, tmp_path, loss):
    with pytest.raises(ValueError, match="loss: expected one or more terms of different names, found"):
        trainer_of(loss, clip, tmp_path)


@pytest.mark.parametrize("loss", [["supcon"], torch.nn.CrossEntropyLoss(), [Clip(), 0.5]])
def test_what_is_no_term_is_refused(clip, tmp_path, loss):
    with pytest.raises(TypeError, match=r"loss: expected terms such as SupCon\(0.1\), found"):
        trainer_of(loss, clip, tmp_path)


# -- several texts of an image -----------------------------------------------------------------------------------------
def several_texts(**weights) -> Batch:
    """3 images, 5 texts, with logits that are known: the scale turns cosines of unit vectors into them."""
    logits = torch.tensor([[4.0, 3, 1, 0, 2], [1, 0, 5, 2, 1], [2, 1, 0, 3, 4]])
    batch = Batch(torch.zeros(3, 2), torch.tensor([0, 1, 0]), 1.0, torch.zeros(5, 2), torch.tensor([0, 0, 1, 2, 2]))
    batch.__dict__["_logits"] = logits
    batch.weights, batch.text_weights = weights.get("weights"), weights.get("text_weights")
    return batch


def test_owners_say_which_texts_belong_to_an_image():
    # Computed by hand, texts weighted by 1 / texts of their image.
    batch = several_texts(weights=torch.ones(3), text_weights=torch.tensor([0.5, 0.5, 1, 0.5, 0.5]))
    assert batch.clip_loss.item() == pytest.approx(0.407820, abs=1e-6)
    assert SupCon()(batch)["loss"].item() == pytest.approx(2.833276, abs=1e-6)
    assert several_texts().text_labels.tolist() == [0, 0, 1, 0, 0]


def test_contrast_against_a_plain_loop():
    g = torch.Generator().manual_seed(0)
    logits, positives = torch.randn(4, 6, generator=g), torch.rand(4, 6, generator=g) < 0.4
    positives[2] = False
    row_weights = torch.tensor([1.0, 2.0, 5.0, 0.5])
    total = weight = 0.0
    for row, own, w in zip(logits.tolist(), positives.tolist(), row_weights.tolist(), strict=True):
        if not any(own):
            continue
        norm = sum(torch.tensor(x).exp().item() for x in row)
        losses = [-torch.tensor(torch.tensor(x).exp().item() / norm).log().item() for x, p in zip(row, own, strict=True) if p]  # fmt: skip
        total, weight = total + w * sum(losses) / len(losses), weight + w
    assert contrast(logits, positives, row_weights).item() == pytest.approx(total / weight, abs=1e-5)


def test_a_text_without_an_image_is_left_out():
    g = torch.Generator().manual_seed(0)
    images, texts, labels = torch.randn(4, 3, generator=g), torch.randn(6, 3, generator=g), torch.tensor([0, 0, 1, 1])
    owner = torch.tensor([0, 1, 2, 3, -1, -1])
    found, expected = Batch(images, labels, 3.0, texts, owner), Batch(images, labels, 3.0, texts[:4])
    assert found.clip_loss.item() == pytest.approx(expected.clip_loss.item(), abs=1e-6)
    assert SupCon()(found)["loss"].item() == pytest.approx(SupCon()(expected)["loss"].item(), abs=1e-6)


def test_default_terms_follow_the_settings(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path, supcon_weight=0.3, include_self=True)
    assert [(term.name, term.weight) for term in trainer.terms] == [("supcon", 0.3), ("clip", 0.7)]
    assert trainer.terms[0].include_self
