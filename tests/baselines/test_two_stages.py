"""2SFS against a plain loop, and which weights move in which stage."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_cross_entropy import NAMES, PLAIN, TEMPLATE, config, images_of, same, steps_of, texts_of, unit, zero_shot_head
from tiny_clip import colour_dataset
from training import changed, weights

from mmft_hf import ClassPrototypes, MMFTConfig
from mmft_hf.baselines import two_stages as module
from mmft_hf.baselines.cross_entropy import train_head
from mmft_hf.baselines.two_stages import two_stages


def template(model, processor):
    return lambda: ClassPrototypes.from_templates(model, processor, NAMES, TEMPLATE)


def test_both_stages_are_trained_as_a_plain_loop_does(clip, tmp_path):
    model, processor = clip
    train, plain = colour_dataset(8), copy.deepcopy(model)
    settings = config(tmp_path, **PLAIN | {"max_steps": 5})
    head, steps = two_stages(model, processor, settings, train, template(model, processor))
    assert steps == (3, 2)

    tokens = processor.tokenizer([TEMPLATE.format(n) for n in NAMES], padding="max_length", return_tensors="pt")
    trained = [p for n, p in plain.named_parameters() if "norm" in n or "layrnorm" in n]
    assert (
        len(trained) == 2 * (2 * 2 * 2) + 2 * 3
    )  # two towers of two blocks with two norms; one and two outside of the blocks
    scale = plain.logit_scale.exp().detach()
    for pixels, labels in steps_of(processor, train, steps=3):
        logits = scale * images_of(plain, pixels) @ texts_of(plain, tokens["input_ids"]).T
        gradients = torch.autograd.grad(F.cross_entropy(logits, labels), trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= 0.1 * gradient
    same(model.state_dict(), plain.state_dict())

    # Rows that the optimizer sees have about unit length, and logits their cosines times the scale.
    factor = 2.0 ** torch.log2(scale).round()
    with torch.no_grad():
        weight = scale * texts_of(plain, tokens["input_ids"]) / factor
    for pixels, labels in steps_of(processor, train, steps=2):
        weight.requires_grad_()
        logits = scale * images_of(plain, pixels).detach() @ unit(weight).T
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels), weight)
        weight = (weight - 0.1 * gradient).detach()
    same({"weight": head.weight / scale}, {"weight": unit(weight)})
    assert head.bias is None


def test_the_scale_stays_and_the_head_starts_at_the_tuned_weights(clip, tmp_path):
    model, processor = clip
    before, seen = weights(model), []

    def prototypes():
        seen.append(changed(before, weights(model)))
        return template(model, processor)()

    two_stages(model, processor, config(tmp_path, max_steps=4, weight_decay=0.1), colour_dataset(8), prototypes)
    moved = changed(before, weights(model))
    assert seen == [moved] and "logit_scale" not in moved
    assert moved and all("norm" in name or "layrnorm" in name for name in moved)
    assert before.keys() == weights(model).keys() and "forward" not in vars(model)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_steps": 10}, (6, 4)),
        ({"max_steps": 2}, (1, 1)),
        ({"max_steps": 1}, (1, 1)),
        ({"num_train_epochs": 2}, (4, 2)),  # 24 images in batches of 8
        ({"num_train_epochs": 2, "gradient_accumulation_steps": 2}, (2, 2)),
        ({"num_train_epochs": 1.5}, (3, 2)),
    ],
)
def test_the_steps_are_shared_by_the_stages(clip, tmp_path, monkeypatch, settings, expected):
    seen = []

    class Ended(Exception):
        pass

    def first(model, processor, settings, *args):
        seen.append(settings.max_steps)
        return type("Trainer", (), {"train": lambda self: None, "state": None})()

    def second(model, processor, settings, *args, **kwargs):
        seen.append(settings.max_steps)
        raise Ended

    monkeypatch.setattr(module, "class_texts_trainer", first)
    monkeypatch.setattr(module, "train_head", second)
    own = MMFTConfig(str(tmp_path), per_device_train_batch_size=8, use_cpu=True, **settings)
    with pytest.raises(Ended):
        two_stages(*clip, own, colour_dataset(8), template(*clip))
    assert tuple(seen) == expected
    assert own.max_steps == settings.get("max_steps", -1)


def test_validation_selects_the_epoch_of_each_stage(clip, tmp_path):
    """Each in a folder of its own, so that no stage takes a checkpoint of the other."""
    model, processor = clip
    settings = config(tmp_path / "out", num_train_epochs=2, learning_rate=1e-2, save_total_limit=None)
    head, steps = two_stages(
        model, processor, settings, colour_dataset(8), template(model, processor), colour_dataset(4, 1)
    )
    assert steps == (4, 2) and head.weight.isfinite().all()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"towers", "head"}
    assert (tmp_path / "out" / "head" / "checkpoint-2").is_dir()


def test_rows_of_a_cosine_head_keep_their_length(clip, tmp_path):
    start = zero_shot_head(clip)
    for cosine in (False, True):
        model, processor = copy.deepcopy(clip)
        found, _ = train_head(
            model, processor, config(tmp_path / str(cosine), max_steps=3), colour_dataset(8), start, cosine=cosine
        )
        lengths = found.weight.norm(dim=1)
        same_length = torch.allclose(lengths, start.weight.norm(dim=1), rtol=1e-5)
        assert same_length == cosine and (found.weight - start.weight).abs().max() > 1e-3
