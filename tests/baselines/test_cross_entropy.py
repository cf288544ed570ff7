"""Fine-tuning by cross-entropy against a plain loop, and what of a model moves, is saved and comes back."""

import copy

import numpy as np
import pytest
import tiny_encoders
import torch
import torch.nn.functional as F
from tiny_clip import COLOURS, colour_dataset
from torch.func import functional_call
from training import changed, weights
from transformers import set_seed

from mmft_hf import ClassPrototypes, ImageClassifier, MMFTConfig, MMFTTrainer, load_model, set_towers
from mmft_hf.baselines import cross_entropy, linear
from mmft_hf.baselines.clip_lora import QUERY_KEY_VALUE, class_texts_trainer, clip_lora
from mmft_hf.baselines.cross_entropy import head_trainer, train_head
from mmft_hf.core.errors import UserError
from mmft_hf.data.sampling import EpochSampler
from mmft_hf.model.embedding import remove_embedding_forward
from mmft_hf.model.towers import TOWERS, lora_layers
from mmft_hf.predict.evaluation import classify
from mmft_hf.predict.heads import LinearHead

NAMES = list(COLOURS)
TEMPLATE = "a photo of a {}."
PLAIN = {"optim": "sgd", "lr_scheduler_type": "constant", "weight_decay": 0.0, "crop_min_area": 1.0, "max_steps": 3}


def config(folder, **settings) -> MMFTConfig:
    settings = {"learning_rate": 0.1, "per_device_train_batch_size": 8, "seed": 5} | settings
    return MMFTConfig(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **settings)


def zero_shot_head(clip) -> LinearHead:
    return LinearHead.from_prototypes(ClassPrototypes.from_templates(*clip, NAMES, TEMPLATE))


def length_of_rows(head: LinearHead) -> float:
    """The power of two that is nearest to it, on a logarithmic scale."""
    mean = head.weight.square().sum(dim=1).sqrt().mean()
    return 2.0 ** torch.log2(mean).round().item()


def unit(values: torch.Tensor) -> torch.Tensor:
    return values / values.norm(dim=1, keepdim=True)


def steps_of(processor, train, steps=3, size=8, seed=5):
    """Pixels and labels of the first steps, in the order that the sampler gives."""
    rows = list(EpochSampler(len(train), seed))
    for k in range(steps):
        batch = [train[row] for row in rows[size * k : size * k + size]]
        pixels = processor.image_processor([row["image"] for row in batch], return_tensors="pt")["pixel_values"]
        yield pixels, torch.tensor([row["label"] for row in batch])


def images_of(model, pixels, parameters=None):
    """Unit-norm image embeddings by the parts of the model, not by the code of this package."""
    parameters = dict(model.named_parameters()) | (parameters or {})
    own = {n.removeprefix("vision_model."): p for n, p in parameters.items() if n.startswith("vision_model.")}
    pooled = functional_call(model.vision_model, own, (pixels,)).pooler_output
    return unit(F.linear(pooled, parameters["visual_projection.weight"]))


def texts_of(model, tokens, parameters=None):
    """Unit-norm embeddings of the class texts, in the same way."""
    parameters = dict(model.named_parameters()) | (parameters or {})
    own = {n.removeprefix("text_model."): p for n, p in parameters.items() if n.startswith("text_model.")}
    pooled = functional_call(model.text_model, own, (), {"input_ids": tokens}).pooler_output
    return unit(F.linear(pooled, parameters["text_projection.weight"]))


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# -- against a plain loop --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("fixed", "bias"), [(False, False), (False, True), (True, False)])
def test_a_head_is_trained_as_a_plain_loop_does(clip, tmp_path, fixed, bias):
    model, processor = clip
    train, start = colour_dataset(8), zero_shot_head(clip)
    start.bias = torch.tensor([0.3, -0.2, 0.1]) if bias else None
    plain = copy.deepcopy(model)

    found, steps = train_head(model, processor, config(tmp_path, **PLAIN), train, start, fixed=fixed)
    assert steps == 3

    scale = length_of_rows(start)
    weight, offset = start.weight / scale, torch.zeros(3) if start.bias is None else start.bias / scale
    trained = [p for n, p in plain.named_parameters() if n.startswith(("vision_model.", "visual_projection."))]
    trained += [] if fixed else [weight.requires_grad_()]
    trained += [offset.requires_grad_()] if bias else []
    for pixels, labels in steps_of(processor, train):
        log_prob = (scale * (images_of(plain, pixels) @ weight.T + offset)).log_softmax(dim=1)
        gradients = torch.autograd.grad(-log_prob[range(len(labels)), labels].mean(), trained, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= 0 if gradient is None else 0.1 * gradient
    same(model.state_dict(), plain.state_dict())
    same({"weight": found.weight / scale}, {"weight": weight})
    if bias:
        same({"bias": found.bias / scale}, {"bias": offset})
    else:
        assert found.bias is None


def test_adamw_is_the_trainers_own(clip, tmp_path):
    """Schedule, weight decay and all: a fixed head is what the plain optimizer makes of the same losses."""
    model, processor = clip
    train, start = colour_dataset(8), zero_shot_head(clip)
    model.vision_model.encoder.requires_grad_(
        False
    )  # k_proj.bias has a gradient of rounding alone, which AdamW blows up
    plain = copy.deepcopy(model)
    settings = {"crop_min_area": 1.0, "max_steps": 3, "weight_decay": 0.1, "learning_rate": 1e-3}
    found, _ = train_head(model, processor, config(tmp_path, **settings), train, start)

    scale = length_of_rows(start)
    weight = (start.weight / scale).requires_grad_()
    named = [(n, p) for n, p in plain.named_parameters() if p.requires_grad and n.startswith("vis")] + [("w", weight)]
    norms = [p for n, p in named if "layernorm" in n or "layrnorm" in n or "bias" in n]
    others = [p for _, p in named if not any(p is q for q in norms)]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], 1e-3
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for pixels, labels in steps_of(processor, train):
        optimizer.zero_grad()
        F.cross_entropy(scale * images_of(plain, pixels) @ weight.T, labels).backward()
        optimizer.step()
        schedule.step()
    same(model.state_dict(), plain.state_dict())
    same({"weight": found.weight / scale}, {"weight": weight})


def test_class_texts_are_trained_as_a_plain_loop_does(clip, tmp_path):
    model, processor = clip
    train, plain = colour_dataset(8), copy.deepcopy(model)
    class_texts_trainer(model, processor, config(tmp_path, **PLAIN), train).train()

    texts = [TEMPLATE.format(name) for name in NAMES]
    tokens = processor.tokenizer(texts, padding="max_length", return_tensors="pt")["input_ids"]
    plain.logit_scale.requires_grad_(False)
    trained = [p for p in plain.parameters() if p.requires_grad]
    for pixels, labels in steps_of(processor, train):
        logits = plain.logit_scale.exp() * images_of(plain, pixels) @ texts_of(plain, tokens).T
        gradients = torch.autograd.grad(F.cross_entropy(logits, labels), trained, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= 0 if gradient is None else 0.1 * gradient
    same(model.state_dict(), plain.state_dict())


def test_clip_lora_is_trained_as_a_plain_loop_does(clip, tmp_path):
    model, processor = clip
    train, plain, start = colour_dataset(8), copy.deepcopy(model), copy.deepcopy(model)
    set_seed(3)
    clip_lora(model, processor, config(tmp_path, **PLAIN | {"learning_rate": 1.0}), train, dropout=0.0)

    set_seed(3)
    set_towers(start, "lora", "lora", 2, 1, 0.0, ["q_proj", "k_proj", "v_proj"])
    plain.requires_grad_(False)
    names = [n for tower in ("vision", "text") for i in range(2) for n in
             (f"{tower}_model.encoder.layers.{i}.self_attn.{x}_proj" for x in "qkv")]  # fmt: skip
    layers = lora_layers(start)
    assert set(layers) == set(names)
    a = {n: layers[n].lora_A["default"].weight.detach().clone().requires_grad_() for n in names}
    assert {x.shape for x in a.values()} == {(2, 32)}
    b = {n: torch.zeros(32, 2, requires_grad=True) for n in names}
    texts = processor.tokenizer([TEMPLATE.format(name) for name in NAMES], padding="max_length", return_tensors="pt")

    def adapted():
        return {f"{n}.weight": plain.get_parameter(f"{n}.weight") + 0.5 * b[n] @ a[n] for n in names}

    for pixels, labels in steps_of(processor, train):
        now = adapted()
        logits = plain.logit_scale.exp() * images_of(plain, pixels, now) @ texts_of(plain, texts["input_ids"], now).T
        trained = [*a.values(), *b.values()]
        gradients = torch.autograd.grad(F.cross_entropy(logits, labels), trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= gradient
    assert min((b[n] @ a[n]).abs().max() for n in names) > 1e-4  # every layer takes part
    same(model.state_dict(), plain.state_dict() | adapted())


@pytest.mark.parametrize(
    ("settings", "atol"),
    [({"loss_chunk_size": 3}, 1e-6), ({"gradient_checkpointing": True}, 1e-6), ({"bf16": True}, 0.02)],
)
def test_chunks_checkpointing_and_bfloat16_train_the_same(clip, _clip, tmp_path, settings, atol):
    found = []
    for more in ({}, settings):
        model, processor = copy.deepcopy(_clip)
        own = config(tmp_path / str(len(found)), **PLAIN, **more)
        head, _ = train_head(model, processor, own, colour_dataset(8), zero_shot_head(clip))
        class_texts_trainer(model, processor, own, colour_dataset(8)).train()
        remove_embedding_forward(model)
        found.append(weights(model) | {"head": head.weight / length_of_rows(zero_shot_head(clip))})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=atol, rtol=0)


# -- what moves --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fixed", [False, True])
def test_only_the_image_tower_and_a_free_head_move(clip, tmp_path, monkeypatch, fixed):
    model, processor = clip
    before, start = weights(model), zero_shot_head(clip)
    monkeypatch.setenv("MMFT_HF_CACHE", str(tmp_path / "cache"))  # where no text of another test is
    monkeypatch.setattr(type(model), "get_text_features", lambda *a, **k: pytest.fail("a text was encoded"))
    found, _ = train_head(
        model, processor, config(tmp_path, num_train_epochs=1, weight_decay=0.1), colour_dataset(8), start, fixed=fixed
    )
    moved = changed(before, weights(model))
    assert moved and all(name.startswith(("vision_model.", "visual_projection.")) for name in moved)
    assert torch.equal(found.weight, start.weight) == fixed
    assert before.keys() == weights(model).keys()  # the head is gone from the model
    assert "forward" not in vars(model)


def test_clip_lora_moves_queries_keys_and_values_alone(clip, tmp_path):
    model, processor = clip
    before = weights(model)
    clip_lora(model, processor, config(tmp_path, num_train_epochs=1), colour_dataset(8))
    moved = changed(before, weights(model))
    assert len(moved) == 2 * 2 * 3
    assert all(name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) for name in moved)
    for name in moved:
        assert torch.linalg.matrix_rank(weights(model)[name] - before[name], rtol=1e-3) <= 2


@pytest.mark.parametrize("kind", tiny_encoders.KINDS)
def test_every_kind_of_dual_encoder_has_both(kind, tmp_path):
    model, processor = load_model(str(tiny_encoders.save(kind, tmp_path / "model")))
    plain, before, train = copy.deepcopy(model), weights(model), colour_dataset(8)
    settings = config(tmp_path, max_steps=2, learning_rate=1e-2, weight_decay=0.1)
    train_head(model, processor, settings, train, zero_shot_head((model, processor)))
    moved = changed(before, weights(model))
    vision = {n for n, p in plain.named_parameters() if p.requires_grad and n.startswith(TOWERS["vision"])}
    assert moved == vision  # of ALIGN not the statistics of its batch norms

    if kind == "align":
        with pytest.raises(UserError, match="the vision tower has none of them"):
            clip_lora(plain, processor, settings, train)
        return
    clip_lora(plain, processor, settings, train)
    moved = changed(before, weights(plain))
    assert {n.split(".")[-2] for n in moved} <= set(QUERY_KEY_VALUE)
    assert {n.split(".")[0] for n in moved} == {"vision_model", "text_model"}
    assert len(moved) == 3 * 2 * 2  # of two layers in each tower


def test_pictures_and_crops_are_those_of_mmft(clip, tmp_path, monkeypatch):
    """With random crops, both see the same pixels in the same steps."""
    seen = {}
    for name in ("mmft", "ce", "texts"):
        model, processor = copy.deepcopy(clip)
        own = seen[name] = []
        stock = type(model).get_image_features

        def spy(self, pixel_values, own=own, stock=stock):
            own.append(pixel_values.clone())
            return stock(self, pixel_values=pixel_values)

        monkeypatch.setattr(type(model), "get_image_features", spy)
        settings = config(tmp_path / name, num_train_epochs=2)
        train = colour_dataset(8)
        if name == "mmft":
            MMFTTrainer(model, settings, train, None, processor).train()
        elif name == "ce":
            train_head(model, processor, settings, train, zero_shot_head((model, processor)))
        else:
            class_texts_trainer(model, processor, settings, train).train()
        monkeypatch.undo()
    for name in ("ce", "texts"):
        assert len(seen[name]) == len(seen["mmft"]) == 6
        assert all(torch.equal(x, y) for x, y in zip(seen[name], seen["mmft"], strict=True))


# -- validation ----------------------------------------------------------------------------------------------------------------
def test_validation_restores_the_head_of_the_best_epoch(clip, tmp_path, monkeypatch):
    model, processor = clip
    validation = colour_dataset(4, seed=1, captions=False)
    start = zero_shot_head(clip)
    heads, accuracies = [], []

    class Watched(MMFTTrainer):
        def evaluation_loop(self, *args, **kwargs):
            output = super().evaluation_loop(*args, **kwargs)
            heads.append(copy.deepcopy(self.prototypes))
            accuracies.append(output.metrics["eval_accuracy"])
            if len(heads) == 3:  # what comes after is nothing
                with torch.no_grad():
                    self.model.loss_terms["cross_entropy"]["weight"].mul_(-100)
            return output

    monkeypatch.setattr(cross_entropy, "MMFTTrainer", Watched)
    settings = config(tmp_path, num_train_epochs=4, learning_rate=3e-3)
    trainer = head_trainer(model, processor, settings, colour_dataset(8), start, validation)
    trainer.train()
    best = int(np.argmax(accuracies))
    assert best == trainer.state.best_global_step / 3
    assert 0 < best < 4 and accuracies[best] > accuracies[-1]
    assert torch.equal(heads[0].weight, start.weight)  # the untuned classifier is a candidate
    restored = trainer.current_prototypes()
    assert torch.equal(restored.weight, heads[best].weight)
    assert not torch.equal(restored.weight, heads[-1].weight)
    assert trainer.evaluate()["eval_accuracy"] == accuracies[best]
    found = classify(ImageClassifier(model, processor, restored), validation, progress=False)
    assert found.report()["accuracy"] == accuracies[best]


def test_validation_compares_with_the_class_texts_of_the_best_epoch(clip, tmp_path):
    model, processor = clip
    train, validation = colour_dataset(8), colour_dataset(4, seed=1, captions=False)
    settings = config(tmp_path, num_train_epochs=2, learning_rate=1e-3)  # whose prototypes are of captions
    trainer = class_texts_trainer(model, processor, settings, train, validation)
    trainer.train()
    assert settings.prototypes == "captions"  # as it was
    trainer.evaluate()
    expected = ClassPrototypes.from_templates(model, processor, NAMES, TEMPLATE)
    torch.testing.assert_close(trainer.prototypes.embeddings, expected.embeddings)
    assert trainer.prototypes.logit_scale == pytest.approx(expected.logit_scale)
    found = classify(ImageClassifier(model, processor, expected), validation, progress=False).report()["accuracy"]
    assert found == trainer.state.best_metric


def test_it_learns_colours(clip, tmp_path):
    train, validation = colour_dataset(8, captions=False), colour_dataset(4, seed=1, captions=False)
    settings = {"num_train_epochs": 6, "learning_rate": 3e-3}
    head, _ = train_head(*clip, config(tmp_path / "a", **settings), train, zero_shot_head(clip), validation)
    assert classify(ImageClassifier(*clip, head), validation, progress=False).report()["accuracy"] == 1.0


def test_a_loss_that_is_not_finite_stops_the_training(clip, tmp_path):
    head = zero_shot_head(clip)
    head.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="the loss became nan at step 1"):
        train_head(*clip, config(tmp_path, num_train_epochs=1), colour_dataset(8), head)


# -- heads -----------------------------------------------------------------------------------------------------------------------
def test_a_head_of_prototypes_gives_their_logits(clip):
    prototypes = ClassPrototypes.from_templates(*clip, NAMES)
    images = unit(torch.randn(5, 32))
    torch.testing.assert_close(LinearHead.from_prototypes(prototypes).logits(images), prototypes.logits(images))


def test_heads_are_interpolated_with_their_bias():
    start, end = LinearHead(torch.zeros(2, 3), ["a", "b"]), LinearHead(torch.ones(2, 3), ["a", "b"], torch.ones(2))
    half = end.interpolated(start, 0.25)
    assert half.weight.unique().item() == half.bias.unique().item() == 0.25
    assert end.interpolated(start, 0).bias.abs().max() == 0
    assert end.interpolated(start, 1).weight.min() == 1
    assert start.interpolated(start, 0.5).bias is None
    elsewhere = LinearHead(end.weight.to("meta"), end.class_names, end.bias.to("meta"))  # trained on another device
    assert elsewhere.interpolated(start, 0.5).weight.device.type == "meta"


@pytest.mark.parametrize("classes", [2, 4])
def test_the_head_of_a_logistic_regression_gives_its_scores(classes):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), np.arange(40) % classes
    weights, bias = linear.head(x, y, C=3.0)
    assert weights.shape == (classes, 6) and bias.shape == (classes,)
    assert np.allclose(x @ weights.T + bias, linear.logistic_regression(x, y, x, C=3.0), atol=1e-12)


def test_a_head_of_other_classes_is_refused(clip, tmp_path):
    head = zero_shot_head(clip)
    head.class_names = head.class_names[::-1]
    with pytest.raises(UserError, match="head: expected weights of shape"):
        train_head(*clip, config(tmp_path), colour_dataset(8), head)
