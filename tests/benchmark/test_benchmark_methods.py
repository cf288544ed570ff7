"""The methods that train: what they share, how many steps they get, and what validation chooses."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch
from tiny_clip import colour_dataset

from mmft_hf import ClassPrototypes, MMFTConfig
from mmft_hf.benchmark.run import trainings
from mmft_hf.benchmark.run.context import Context, Trained
from mmft_hf.benchmark.run.inference import FeatureHead
from mmft_hf.benchmark.run.methods import METHODS, fit
from mmft_hf.benchmark.run.protocol import Task
from mmft_hf.benchmark.run.trainings import Training, halfway, none_without_captions, settings_for
from mmft_hf.core.errors import UserError
from mmft_hf.data.texts import TEMPLATES, check_template
from mmft_hf.data.views import TextView, TrainingView


@pytest.fixture
def context(clip_folder, tmp_path):
    config = MMFTConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=6, use_cpu=True, learning_rate=1e-3)
    return Context(str(clip_folder), None, config)


@pytest.fixture
def task():
    train, validation = colour_dataset(4, seed=1), colour_dataset(3, seed=2)
    return Task(train, validation, train.features["label"].names, shots=4, seed=0, policy="val-k")


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.slow
def test_every_training_trains_what_it_should_and_leaves_the_untuned_model_alone(context, task):
    before, trained = weights(context.model), {}
    first = {method.training: name for name, method in reversed(METHODS.items()) if method.training}
    del first[none_without_captions]  # which trains nothing
    assert len(first) == 27
    for training, name in first.items():
        found = context.train(training, task, 1e-3)
        assert found.steps == 2 and found.seconds > 0
        assert list(weights(found.model)) == list(before), name  # LoRA is merged, a head taken out again
        moved = {
            key.split(".")[0] for key, value in weights(found.model).items() if not torch.equal(value, before[key])
        }
        of_images = {"vision_model", "visual_projection"}
        if name.startswith("2sfs"):
            assert moved == {"vision_model", "text_model"} and not torch.equal(
                found.head.weight, found.first_head.weight
            )
        elif name in ("ce", "ce-frozen", "lp-ft", "ce-last4", "ce-last4-gram"):
            assert moved == of_images, name
            assert torch.equal(found.head.weight, found.first_head.weight) == (name == "ce-frozen")
        else:
            towers = {"vision_model", "text_model"} - {name.replace("mmft-frozen-", "") + "_model"}
            assert towers == moved & {"vision_model", "text_model"} and found.head is None, name
        trained[name] = weights(found.model)["visual_projection.weight"]
    assert all(torch.equal(value, before[key]) for key, value in weights(context.model).items())
    # Two rows with the same training under two names would show here. The captions of these images are
    # alike within a class, so shuffling them there changes little, and LoRA leaves the projection as it is.
    # mmft-weighted is mmft where captions have no scores, mmft-text-mix where no mix is named.
    alike = {"mmft-shuffle-within", "mmft-weighted", "mmft-text-mix"}
    left_out = alike | {"mmft-lora", "mmft-lora-all", "clip-lora", "2sfs", "2sfs-cap", "ce", "ce-frozen"}
    different = [weight for name, weight in trained.items() if name not in left_out]
    for i, one in enumerate(different):
        assert not any(torch.equal(one, other) for other in different[:i])


@pytest.mark.slow
def test_methods_with_one_training_share_it_and_its_seconds(context, task):
    calls = []

    own = METHODS["mmft"].training

    def train(context, task, learning_rate):
        calls.append(learning_rate)
        return dataclasses.replace(own(context, task, learning_rate), seconds=100.0)

    other = Training(train)
    sharing = {
        name: dataclasses.replace(method, training=other) for name, method in METHODS.items() if method.training is own
    }
    assert {"mmft", "mmft+wise", "mmft-train-captions", "mmft-mixed"} <= set(sharing)
    found = [fit(method, context, task) for method in sharing.values()]
    assert calls == [1e-3] and all(one.seconds > 100 and one.steps == 2 for one in found)
    assert [one.policy for one in found] == ["val-k" if method.auto else "last" for method in sharing.values()]
    fit(sharing["mmft"], context, dataclasses.replace(task, seed=1))
    assert len(calls) == 2
    fit(sharing["mmft"], context, task)  # the last task alone is kept
    assert len(calls) == 3


def test_a_training_is_gone_when_the_next_begins(context, task):
    model = weakref.ref(context.train(METHODS["mmft"].training, task, 1e-3).model)
    gc.disable()  # what is collected by chance is collected late
    try:
        assert context.train(lambda *args: Trained(model(), task.train), task, 1e-3).model is None
    finally:
        gc.enable()


def test_a_choice_on_validation_for_a_head_decides_the_policy(context, task):
    found = fit(METHODS["lp-ft"], context, task)  # with one learning rate
    assert found.policy == "val-k" and found.chosen.keys() == {"C"}
    assert fit(METHODS["ce"], context, task).policy == "last"


def test_a_schedule_of_w_does_not_reach_methods_with_a_w_of_their_own(context, task, monkeypatch):
    context.config.supcon_weight_end = 0.7
    seen = []

    def settings(*args, **more):
        seen.append(settings_for(*args, **more))
        return seen[-1]

    monkeypatch.setattr(trainings, "settings_for", settings)
    for name in ("mmft", "flyp", "mmft-w1"):
        context.train(METHODS[name].training, task, 1e-3)
    assert [(c.supcon_weight, c.supcon_weight_end) for c in seen] == [(0.1, 0.7), (0.0, None), (1.0, None)]


def test_validation_chooses_among_learning_rates_the_first_of_the_best(clip_folder, task, tmp_path):
    config = MMFTConfig(str(tmp_path), max_steps=1, use_cpu=True)
    context = Context(str(clip_folder), None, config, learning_rates=(1e-5, 2e-5, 3e-5))
    right = {1e-5: 1, 2e-5: 7, 3e-5: 7}
    seen = []

    def train(context, task, learning_rate):
        seen.append(learning_rate)
        return Trained(context.model, task.train, int(learning_rate * 1e5), seconds=1.0)

    def inference(context, task, trained):
        def scores(features):
            assert len(features) == len(task.validation)
            answers = np.array(task.validation["label"]) + (np.arange(9) >= right[trained.steps / 1e5])
            return np.eye(3)[answers % 3]

        return FeatureHead(scores)

    found = fit(dataclasses.replace(METHODS["mmft"], training=Training(train), inference=inference), context, task)
    assert seen == [1e-5, 2e-5, 3e-5] and found.tried == 3
    assert found.chosen == {"learning_rate": 2e-5} and found.policy == "val-k" and found.steps == 2
    assert found.validation_accuracy == pytest.approx(7 / 9) and found.seconds >= 3


@pytest.mark.parametrize(("metric", "best"), [("mean_per_class_accuracy", 1e-4), ("loss", 1e-3)])
def test_a_named_metric_chooses_among_learning_rates(clip_folder, task, tmp_path, monkeypatch, metric, best):
    """By accuracy all are equal, since it is the untuned model each time."""
    config = MMFTConfig(str(tmp_path), use_cpu=True, metric_for_best_model=metric)
    context = Context(str(clip_folder), None, config, learning_rates=(1e-3, 1e-4))
    found = {1e-3: {"mean_per_class_accuracy": 0.2, "loss": 0.5}, 1e-4: {"mean_per_class_accuracy": 0.6, "loss": 0.7}}
    judged = iter(found.values())
    monkeypatch.setattr(context, "report", lambda model, head, dataset, *more: next(judged))
    training = Training(lambda context, task, rate: Trained(context.model, task.train, 1))
    assert fit(dataclasses.replace(METHODS["flyp"], training=training), context, task).chosen == {"learning_rate": best}


def test_every_metric_that_can_select_is_measured(context, task):
    head = METHODS["zs"].inference(context, task, Trained(context.model, task.train))
    found = context.report(context.model, head, task.validation)
    logits = head.logits(context.encoded(context.model, task.validation)[0])
    labels = torch.tensor(task.validation["label"])
    assert found["accuracy"] == (logits.argmax(dim=1) == labels).double().mean().item()
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["mean_per_class_accuracy"] == pytest.approx(found["accuracy"])  # three images of each class


@pytest.mark.slow
def test_a_learning_rate_that_diverges_is_not_chosen(clip_folder, task, tmp_path):
    config = MMFTConfig(str(tmp_path), max_steps=2, use_cpu=True)
    alone, both, wild = (Context(str(clip_folder), None, config, rates) for rates in ((1e-4,), (1e9, 1e-4), (1e9,)))
    found, expected = (fit(METHODS["mmft"], context, task) for context in (both, alone))
    assert found.chosen == {"learning_rate": 1e-4, "failed_rates": "1e+09"} and found.tried == 2
    assert np.array_equal(found.classifier(task.validation), expected.classifier(task.validation))
    with pytest.raises(UserError, match="became"):
        fit(METHODS["mmft"], wild, task)


def test_few_images_get_min_steps_and_all_images_their_epochs(clip_folder, task, tmp_path):
    config = MMFTConfig(str(tmp_path), num_train_epochs=3, per_device_train_batch_size=6, use_cpu=True)
    context = Context(str(clip_folder), None, config, min_steps=7)

    def steps(shots, least=7):
        context.min_steps = least
        found = settings_for(context, dataclasses.replace(task, shots=shots), 1e-3, str(tmp_path))
        assert found.save_only_model  # what is never resumed need not be written
        return found.max_steps, found.eval_strategy, found.load_best_model_at_end

    assert steps(4) == (7, "no", False)  # two batches, three epochs: six steps
    assert steps(4, least=6) == (-1, "no", False)
    assert steps("full") == (-1, "epoch", True)
    context.config.max_steps = 2
    assert steps(4)[0] == 2
    assert context.config.eval_strategy == "epoch"  # the context's own settings stay


def test_interpolated_weights_are_between_the_two(context, task):
    trained = context.train(METHODS["mmft"].training, task, 1e-2)
    model, end, start = halfway(trained, context.model, 0.25).model, weights(trained.model), weights(context.model)
    for name, value in weights(model).items():
        expected = 0.75 * start[name] + 0.25 * end[name] if value.is_floating_point() else start[name]
        torch.testing.assert_close(value, expected)
    assert not torch.equal(weights(model)["logit_scale"], start["logit_scale"])
    assert torch.equal(weights(trained.model)["logit_scale"], end["logit_scale"])


@pytest.mark.slow
def test_each_method_compares_with_the_texts_of_its_row(context, task):
    names = ("mmft", "mmft-mixed", "mmft-train-captions", "mmft-no-captions", "mmft-test-captions", "flyp", "flyp-ens")
    rows = [METHODS[name] for name in names]
    found = {row.name: row.inference(context, task, context.train(row.training, task, 1e-3)) for row in rows}
    sources = {name: prototypes.source for name, prototypes in found.items()}
    assert sources == {
        "mmft": "captions",
        "mmft-mixed": "captions",
        "mmft-train-captions": "template",
        "mmft-no-captions": "template",
        "mmft-test-captions": "captions",
        "flyp": "template",
        "flyp-ens": "templates",
    }
    halfway = found["mmft"].embeddings + found["mmft-train-captions"].embeddings
    torch.testing.assert_close(found["mmft-mixed"].embeddings, torch.nn.functional.normalize(halfway, dim=1))


def test_there_are_80_templates_and_each_image_is_read_with_one_of_them():
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 80
    assert all(check_template(template) and template == template.strip() for template in TEMPLATES)
    data = colour_dataset(8, captions=False)
    names = data.features["label"].names
    view = TrainingView(data, TextView(names, TEMPLATES, seed=0))
    texts = [view[row]["text"] for row in range(len(data))]
    allowed = [{template.replace("{}", names[label]) for template in TEMPLATES} for label in data["label"]]
    assert all(text in texts_of for text, texts_of in zip(texts, allowed, strict=True))
    assert len(set(texts)) > 12
    assert texts == [view[row]["text"] for row in range(len(data))]
    assert [view[len(data) + row]["text"] for row in range(len(data))] != texts  # another epoch
    one, several = TrainingView(data, TextView(names, "a {}.", seed=0)), view
    assert all(one[row]["box"] == several[row]["box"] for row in range(len(data)))  # the crops stay


def test_permuted_labels_leave_images_with_their_captions(task):
    found = trainings.permuted_labels(task)
    assert found["captions"][:] == task.train["captions"][:] and found.features == task.train.features
    assert sorted(found["label"]) == sorted(task.train["label"]) and found["label"][:] != task.train["label"][:]
    assert trainings.permuted_labels(task)["label"][:] == found["label"][:]
    other = trainings.permuted_labels(dataclasses.replace(task, seed=1))
    assert other["label"][:] != found["label"][:]


def test_what_was_tried_on_validation_is_counted(context, task):
    tried = {name: fit(METHODS[name], context, task).tried for name in ("zs", "lp", "gda", "lp++", "flyp")}
    assert tried == {"zs": 1, "lp": 96, "gda": 7, "lp++": 1, "flyp": 1}


@pytest.mark.slow
def test_a_linear_probe_of_permuted_labels_falls_to_chance(context, task):
    task = dataclasses.replace(task, train=colour_dataset(16, seed=1))
    test = colour_dataset(40, seed=3)
    labels = np.array(test["label"])

    def accuracy(name, seed):
        return (
            fit(METHODS[name], context, dataclasses.replace(task, seed=seed)).classifier(test).argmax(axis=1) == labels
        ).mean()

    assert accuracy("lp", 0) > 0.9
    assert 0.2 < np.mean([accuracy("lp-permuted-labels", seed) for seed in range(8)]) < 0.47


HEADS = (
    "proker",
    "proker-cap",
    "gda-cap",
    "tip-cap",
    "tip-f-cap",
    "zs-lp-cap",
    "clap-cap",
    "timo-cap",
    "zs+mean",
    "zs+kernel",
)


@pytest.mark.parametrize("name", [*HEADS, "zs+auto", "zs-no-captions+auto"])
def test_rows_with_heads_of_captions_and_images(name, context, task):
    found = fit(METHODS[name], context, task)
    assert found.classifier(task.validation).shape == (len(task.validation), 3) and found.steps is None
    if name.endswith("+auto"):
        assert found.chosen == {"head": "kernel", "head_alpha": 0.0}  # nine validation images choose nothing
    bare = dataclasses.replace(task, train=trainings.without_captions(task))
    if name == "timo-cap":
        with pytest.raises(UserError, match="expected captions"):
            fit(METHODS[name], context, bare)
        return
    same = np.array_equal(
        fit(METHODS[name], context, bare).classifier(task.validation), found.classifier(task.validation)
    )
    assert same == (name in ("proker", "zs-no-captions+auto"))


def rows(embeddings) -> torch.Tensor:
    return torch.nn.functional.normalize(embeddings, dim=1)


def test_ce_last4_trains_the_last_blocks_from_captions_and_templates(context, task):
    """The model of the tests has two blocks: all of them, and not what comes before."""
    found = context.train(METHODS["ce-last4"].training, task, 1e-3)
    before, after = weights(context.model), weights(found.model)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    blocks = "vision_model.encoder.layers."
    assert {f"{blocks}{i}" for i in (0, 1)} == {key[: len(blocks) + 1] for key in moved if key.startswith(blocks)}
    others = {key.rsplit(".", 1)[0] for key in moved if not key.startswith(blocks)}
    assert others == {"vision_model.post_layernorm", "visual_projection"}
    captions = ClassPrototypes.from_captions(context.model, context.processor, task.train)
    templates = context.zero_shot_prototypes(task.class_names)
    expected = context.scale * rows(captions.embeddings + templates.embeddings)
    torch.testing.assert_close(found.first_head.weight, expected, atol=1e-4, rtol=0)
    assert not torch.equal(found.head.weight, found.first_head.weight)


def test_the_anchor_keeps_the_embeddings_of_ce_last4_nearer_to_the_untuned_ones(context, task):
    context.config.max_steps = 8
    images = [context.encoded(context.model, task.train)[0]]
    for name in ("ce-last4", "ce-last4-gram"):
        found = context.train(METHODS[name].training, task, 1e-3)
        images.append(context.encoded(found.model, task.train)[0])
    untuned, plain, anchored = (x @ x.T for x in images)
    assert 0 < (anchored - untuned).abs().mean() < 0.9 * (plain - untuned).abs().mean()


def test_a_mix_adds_trained_and_untuned_logits(context, task):
    context.config.max_steps = 8
    method = METHODS["ce-last4-gram+mix"]
    assert method.share == 0.3 and method.needs_captions
    trained = context.train(method.training, task, 1e-3)
    found = fit(method, context, task).classifier(task.validation)
    parts = [
        context.encoded(model, task.validation)[0] @ head.weight.T + (0 if head.bias is None else head.bias)
        for model, head in ((trained.model, trained.head), (context.model, trained.first_head))
    ]
    np.testing.assert_allclose(found, (0.3 * parts[0] + 0.7 * parts[1]).numpy(), atol=1e-4)
    assert (parts[0] - parts[1]).abs().max() > 0.01
    # What chooses among learning rates is the mix, too.
    labels = torch.tensor(task.validation["label"][:])
    report = context.report(trained.model, trained.head, task.validation, lambda _: found)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(found), labels).item()
    assert report["loss"] == pytest.approx(expected, abs=1e-5)
    assert report["accuracy"] == (found.argmax(axis=1) == labels.numpy()).mean()
    assert {name.removesuffix("+mix") for name in METHODS if name.endswith("+mix")} == {
        "ce", "ce-frozen", "lp-ft", "ce-last4", "ce-last4-gram", "2sfs", "2sfs-cap"
    }  # fmt: skip


def test_2sfs_starts_its_head_at_tuned_class_texts_or_captions(context, task):
    """Two steps leave the head near its start, and `+wise` goes back to the same texts of the untuned model."""
    context.config.max_steps = 4
    heads = {}
    for name, source in (("2sfs", "template"), ("2sfs-cap", "captions")):
        found = fit(METHODS[name], context, task)
        assert found.steps == 4
        trained = context.train(METHODS[name].training, task, 1e-3)
        if source == "captions":
            start = ClassPrototypes.from_captions(trained.model, context.processor, task.train)
        else:
            template = context.config.class_template
            start = ClassPrototypes.from_templates(trained.model, context.processor, task.class_names, template)
        # Two steps of AdamW at 1e-2 move no number of a row of length one by more than 0.02.
        distance = (trained.head.weight / context.scale - start.embeddings).abs().max()
        assert 1e-4 < distance < 0.03
        untuned = METHODS[f"{name}+wise"]
        assert torch.equal(halfway(trained, context.model, 0.0).head.weight, trained.first_head.weight)
        assert fit(untuned, context, task).steps == 4
        heads[name] = trained.head.weight
    assert (heads["2sfs"] - heads["2sfs-cap"]).abs().max() > 0.1


def test_auto_takes_weights_between_untuned_and_trained(context, task):
    found = fit(METHODS["mmft+auto"], context, task)
    assert found.steps == 2 and found.chosen == {"head": "kernel", "head_alpha": 0.5}
    kernel = fit(METHODS["mmft+kernel"], context, task)
    assert kernel.steps == 2 and not np.array_equal(
        found.classifier(task.validation), kernel.classifier(task.validation)
    )
