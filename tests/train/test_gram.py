"""The anchor to the untuned image tower: zero where nothing changed, blind to rotations, and held by the Trainer."""

import copy

import pytest
import tiny_encoders
import torch
import torch.nn.functional as F
from test_terms import trainer_of
from tiny_clip import colour_dataset
from training import weights

from mmft_hf import set_towers
from mmft_hf.model.loading import encode_images
from mmft_hf.train.terms import Batch, Clip, Gram

EVERY_STEP = {"logging_strategy": "steps", "logging_steps": 1}


def unit(n=6, d=5, seed=0):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def gram(tuned, untuned, labels=None) -> torch.Tensor:
    labels = torch.zeros(len(tuned), dtype=torch.long) if labels is None else labels
    return Gram()(Batch(tuned, labels, 1.0, extras={"untuned_image_embeds": untuned}))["loss"]


def by_loop(tuned, untuned, rows) -> float:
    found = [
        abs(sum((tuned[i] * tuned[j]).tolist()) - sum((untuned[i] * untuned[j]).tolist()))
        for i in rows
        for j in rows
        if i != j
    ]
    return sum(found) / len(found)


def test_it_is_the_mean_change_of_the_cosines_of_examples():
    tuned, untuned, labels = unit(), unit(seed=1), torch.tensor([0, 1, -100, 0, -100, 2])
    assert gram(tuned, untuned).item() == pytest.approx(by_loop(tuned, untuned, range(6)), abs=1e-12)
    assert gram(3 * tuned, untuned / 2).item() == pytest.approx(gram(tuned, untuned).item(), abs=1e-12)
    assert gram(tuned, untuned, labels).item() == pytest.approx(by_loop(tuned, untuned, (0, 1, 3, 5)), abs=1e-12)


def tokens(seed=0) -> torch.Tensor:
    """Four tokens of each of three images."""
    return torch.stack([unit(4, seed=seed + 10 * i) for i in range(3)])


def patches(tuned, untuned) -> torch.Tensor:
    return Gram().local({"image_tokens": tuned, "untuned_image_tokens": untuned})["gram_patches"]


def test_it_adds_the_mean_change_of_the_cosines_within_each_image():
    tuned, untuned, labels = tokens(), tokens(seed=1), torch.tensor([0, -100, 2])
    found = patches(tuned, untuned)
    expected = [by_loop(one, other, range(4)) for one, other in zip(tuned, untuned, strict=True)]
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    extras = {"untuned_image_embeds": unit(3, seed=1), "gram_patches": found}
    values = Gram()(Batch(unit(3), labels, 1.0, extras=extras))
    assert values["gram_patches"].item() == pytest.approx((expected[0] + expected[2]) / 2, abs=1e-12)
    alone = gram(unit(3), unit(3, seed=1), labels)
    assert values["loss"].item() == pytest.approx((alone + values["gram_patches"]).item(), abs=1e-12)
    same = tokens().requires_grad_()
    patches(same, tokens()).sum().backward()
    assert (same.grad == 0).all() and (patches(same, tokens()) == 0).all()
    assert Gram(patches=False).local({"image_tokens": tuned, "untuned_image_tokens": untuned}) == {}
    assert patches(tuned[:, :1], untuned[:, :1]).tolist() == [0, 0, 0]  # a tower that pools to one token


def test_it_is_zero_without_a_change_after_a_rotation_and_for_a_single_image():
    tuned = unit().requires_grad_()
    value = gram(tuned, tuned.detach().clone())
    value.backward()
    assert value == 0 and (tuned.grad == 0).all()
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    assert gram(unit() @ rotation, unit()).item() < 1e-12
    assert patches(tokens() @ rotation, tokens()).max() < 1e-12
    one = unit(1).requires_grad_()
    gram(one, unit(1, seed=2)).backward()
    assert (one.grad == 0).all()


def test_it_grows_with_a_change_that_is_no_rotation():
    untuned, step = unit(), unit(seed=3)
    found = [gram(F.normalize(untuned + share * step, dim=1), untuned).item() for share in (0, 0.01, 0.1, 0.5)]
    assert found[0] == 0 and found == sorted(set(found))
    tuned = (untuned + 0.3 * step).requires_grad_()
    value = gram(tuned, untuned)
    value.backward()
    with torch.no_grad():
        assert gram(tuned - 1e-3 * tuned.grad, untuned) < value  # its gradient leads back
    assert torch.autograd.gradcheck(lambda x: gram(x, untuned), tuned.detach().requires_grad_())


@pytest.mark.parametrize(("vision", "crop"), [("full", 0.9), ("lora", 0.9), ("head", 1.0), ("frozen", 1.0)])
def test_the_trainer_compares_with_the_tower_that_it_got(clip, tmp_path, vision, crop):
    """On the same crops, also where a trunk is kept: zero in the first step, and later what the two models give."""
    torch.manual_seed(0)
    set_towers(clip[0], vision, "full")
    untuned = copy.deepcopy(clip[0])
    trainer = trainer_of([Clip(), Gram(0.0)], clip, tmp_path, crop_min_area=crop, learning_rate=1.0, **EVERY_STEP)
    seen = []
    plain = trainer._prepare_inputs
    trainer._prepare_inputs = lambda inputs: seen.append(plain(inputs)) or seen[-1]
    trainer.train()
    logs = [log for log in trainer.state.log_history if "gram_loss" in log]
    first, *later = [log["gram_loss"] for log in logs]
    assert first < 1e-6 and all(("gram_patches" in log) == (vision in ("full", "lora")) for log in logs)
    if vision == "frozen":
        assert max(later) < 1e-6
        return
    assert all(value > 1e-4 for value in later)
    assert (
        max((untuned.state_dict()[name] - value).abs().max() for name, value in weights(trainer._untuned).items()) == 0
    )
    assert not any(p.requires_grad for p in trainer._untuned.parameters())
    if vision == "full":
        pixels = seen[-1]["pixel_values"]
        with torch.no_grad():
            now, before = (encode_images(m.eval(), pixels) for m in (trainer.model, untuned))
            outputs = [m.vision_model(pixels).last_hidden_state for m in (trainer.model, untuned)]
        within = [F.normalize(x, dim=2) for x in outputs]
        within = sum(by_loop(one, other, range(5)) for one, other in zip(*within, strict=True)) / len(pixels)
        expected = gram(now, before).item() + within
        assert within > 1e-4
        trainer.model.train()
        trainer.compute_loss(trainer.model, dict(seen[-1]))
        assert trainer._sums["gram_loss"].item() == pytest.approx(expected, abs=1e-6) and expected > 1e-4


def test_it_holds_the_embeddings_where_they_were(clip, tmp_path):
    moved = []
    pixels = clip[1].image_processor(colour_dataset(4)["image"][:], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        before = encode_images(clip[0].eval(), pixels)
    for weight in (0.0, 2.0):
        own = copy.deepcopy(clip)
        trainer_of([Clip(), Gram(weight)], own, tmp_path, num_train_epochs=4, learning_rate=0.1).train()
        with torch.no_grad():
            moved.append(gram(encode_images(own[0].eval(), pixels), before).item())
    assert moved[1] < 0.8 * moved[0], moved


@pytest.mark.parametrize("kind", ["siglip", "align", "vit_bert"])
def test_other_kinds_have_tokens_too(kind, tmp_path):
    """Without a class token, with places of a convolution, and as one of any two towers."""
    torch.manual_seed(0)
    pair = tiny_encoders.KINDS[kind]()
    trainer = trainer_of([Clip(), Gram()], pair, tmp_path, max_steps=2, learning_rate=1e-2, **EVERY_STEP)
    trainer.train()
    found = [log["gram_patches"] for log in trainer.state.log_history if "gram_patches" in log]
    assert len(found) == 2 and found[0] < 1e-6 and found[1] > 1e-5
