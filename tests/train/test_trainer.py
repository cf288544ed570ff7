"""The Trainer: what it trains, what it selects, and that a resume changes nothing."""

import copy
import json
import logging
import shutil

import pytest
import torch
from datasets import ClassLabel, Dataset, Image
from tiny_clip import colour_dataset
from training import StopAfter, changed, make_trainer, weights
from transformers import CLIPModel

from mmft_hf import MMFTConfig, MMFTDataCollator, MMFTLoss, MMFTTrainer
from mmft_hf.core.errors import UserError
from mmft_hf.data.sampling import EpochSampler
from mmft_hf.data.views import TextView, TrainingView
from mmft_hf.model.towers import set_towers
from mmft_hf.train.checkpoints import last_complete_checkpoint


def test_it_learns_colours(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path, num_train_epochs=8, learning_rate=3e-3)
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] == 1.0 > before


def test_shuffled_captions_and_labels_teach_nothing_about_colours(clip, tmp_path):
    """A control that must fail: the same run on labels that have nothing to do with the pictures."""
    train = colour_dataset(8)
    wrong = [(i // 3 + i) % 3 for i in range(len(train))]
    features = train.features
    train = train.remove_columns(["label", "captions"]).add_column("label", wrong)
    train = train.cast_column("label", features["label"])
    trainer = make_trainer(clip, tmp_path, train, num_train_epochs=8, learning_rate=3e-3, load_best_model_at_end=False)
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] < 0.8


@pytest.mark.parametrize(("vision", "text"), [("full", "full"), ("full", "frozen"), ("frozen", "full")])
def test_what_is_trainable_changes_and_what_is_frozen_does_not(clip, tmp_path, vision, text):
    set_towers(clip[0], vision, text)
    before = weights(clip[0])
    trainer = make_trainer(clip, tmp_path, evaluate=False, weight_decay=0.1)
    trainer.train()
    moved = changed(before, weights(trainer.model))
    expected = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    # k_proj biases shift all logits of a softmax alike: their gradient is zero up to rounding.
    assert {n for n in expected if "k_proj.bias" not in n} <= moved <= expected
    assert "logit_scale" in moved
    assert any(n.startswith("vision_model") for n in moved) == (vision == "full")
    assert any(n.startswith("text_model") for n in moved) == (text == "full")


def test_accumulated_gradient_is_the_mean_over_its_batches(clip, tmp_path, caplog):
    train = colour_dataset(8)
    start = weights(clip[0])
    settings = {
        "max_steps": 1,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "weight_decay": 0.0,
    }
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(
            clip,
            tmp_path,
            train,
            False,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=3,
            seed=7,
            **settings,
        )
    assert "does not enlarge the contrastive batch" in caplog.text
    trainer.train()
    stepped = weights(trainer.model)

    model = trainer.model
    model.load_state_dict(start)
    model.zero_grad()
    view = TrainingView(train, TextView(trainer.class_names, "a photo of a {}.", seed=7))
    order = list(EpochSampler(len(train), seed=7))
    for k in range(3):
        batch = MMFTDataCollator(trainer.processing_class)([view[i] for i in order[4 * k : 4 * k + 4]])
        out = model(**{k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")})
        loss = MMFTLoss(0.1)(out.image_embeds, out.text_embeds, batch["labels"], model.logit_scale.exp())["loss"]
        (loss / 3).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(start[name] - stepped[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_evaluation_counts_every_image_once_whatever_the_batch(clip, tmp_path):
    results = []
    for batch in (5, 12):
        trainer = make_trainer(clip, tmp_path / str(batch), per_device_eval_batch_size=batch)
        output = trainer.predict(trainer.eval_dataset)
        assert output.predictions.shape == (12, 3)
        assert output.label_ids.tolist() == trainer.eval_dataset["label"][:]
        results.append(trainer.evaluate())
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], abs=1e-5)
    assert results[0]["eval_accuracy"] == results[1]["eval_accuracy"]


def test_own_compute_metrics_gets_class_logits(clip, tmp_path):
    model, processor = clip
    seen = {}

    def metrics(prediction):
        seen["shape"] = prediction.predictions.shape
        return {"share": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}

    args = MMFTConfig(output_dir=str(tmp_path), use_cpu=True, metric_for_best_model="share")
    data = colour_dataset(2)
    trainer = MMFTTrainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=processor,
        compute_metrics=metrics,
    )
    assert "eval_share" in trainer.evaluate()
    assert seen["shape"] == (6, 3)


def test_the_untuned_model_is_a_candidate(clip, tmp_path):
    before = weights(clip[0])
    # Steps too small to change any prediction: a tie, and ties keep the earlier epoch.
    trainer = make_trainer(clip, tmp_path, learning_rate=1e-9)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-0")
    assert not changed(before, weights(trainer.model))


def test_the_best_epoch_is_restored(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path, num_train_epochs=6, learning_rate=3e-3)
    trainer.train()
    evaluations = [(log["step"], log["eval_accuracy"]) for log in trainer.state.log_history if "eval_accuracy" in log]
    best = max(accuracy for _, accuracy in evaluations)
    first = min(step for step, accuracy in evaluations if accuracy == best)
    assert trainer.state.best_global_step == first
    assert trainer.evaluate()["eval_accuracy"] == best
    saved = CLIPModel.from_pretrained(trainer.state.best_model_checkpoint)
    assert not changed(weights(saved), weights(trainer.model))


def test_logged_components(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path, max_steps=1, per_device_train_batch_size=8, evaluate=False, logging_steps=1, logging_strategy="steps", seed=3)  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(0.1 * log["supcon_loss"] + 0.9 * log["clip_loss"], abs=1e-5)
    labels = [trainer.train_dataset["label"][i] for i in list(EpochSampler(24, seed=3))[:8]]
    share = sum(labels.count(label) > 1 for label in labels) / 8
    assert log["anchors_with_positives"] == pytest.approx(share)
    assert log["captions_cut"] == 0 and log["skipped_images"] == 0


def test_share_of_cut_captions_is_logged(clip, tmp_path):
    train = colour_dataset(4)
    long = [["x" * 100] if i % 2 else ["short"] for i in range(len(train))]
    train = train.remove_columns("captions").add_column("captions", long)
    trainer = make_trainer(clip, tmp_path, train, False, max_steps=1, per_device_train_batch_size=12, logging_steps=1, logging_strategy="steps")  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["captions_cut"] == pytest.approx(0.5)


def resume_settings(kind: str) -> dict:
    if kind == "epochs":
        return {"num_train_epochs": 4}
    return {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}


@pytest.mark.parametrize("kind", ["epochs", "within an epoch"])
def test_resumed_equals_uninterrupted(clip, _clip, tmp_path, kind):
    import copy

    straight = make_trainer(clip, tmp_path / "straight", **resume_settings(kind))
    straight.train()

    cut = make_trainer(copy.deepcopy(_clip), tmp_path / "cut", **resume_settings(kind))
    cut.add_callback(StopAfter(5))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert last_complete_checkpoint(tmp_path / "cut").endswith("checkpoint-3" if kind == "epochs" else "checkpoint-4")
    resumed = make_trainer(copy.deepcopy(_clip), tmp_path / "cut", **resume_settings(kind))
    resumed.train(resume_from_checkpoint=True)

    assert not changed(weights(straight.model), weights(resumed.model))
    assert straight.state.best_global_step == resumed.state.best_global_step
    assert straight.state.best_metric == resumed.state.best_metric


def test_a_half_written_checkpoint_is_passed_over(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path, save_total_limit=None)
    trainer.train()
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-6")
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text('{"global_st')
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-3")
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    assert last_complete_checkpoint(tmp_path).endswith("checkpoint-0")
    shutil.rmtree(tmp_path / "checkpoint-0")
    assert last_complete_checkpoint(tmp_path) is None


def test_resume_without_a_checkpoint_starts_anew(clip, tmp_path, caplog):
    trainer = make_trainer(clip, tmp_path, max_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1
    assert "starts from the beginning" in caplog.text


@pytest.mark.slow
def test_the_best_checkpoint_survives_a_move_of_the_folder(clip, _clip, tmp_path):
    import copy

    cut = make_trainer(clip, tmp_path / "old", num_train_epochs=4, learning_rate=1e-9)
    cut.add_callback(StopAfter(5))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    (tmp_path / "old").rename(tmp_path / "new")
    resumed = make_trainer(copy.deepcopy(_clip), tmp_path / "new", num_train_epochs=4, learning_rate=1e-9)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "new" / "checkpoint-0")


def test_a_checkpoint_of_another_model_is_refused(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path, max_steps=1)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-0"
    config = json.loads((checkpoint / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 12
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "checksums.json").unlink()  # as if the other model's run had saved it
    with pytest.raises(UserError, match=r"another model.*num_hidden_layers 2 \(found 12\)"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_without_validation_the_last_step_is_kept(clip, tmp_path, caplog):
    trainer = make_trainer(clip, tmp_path, evaluate=False)
    trainer.train()
    assert trainer.state.best_model_checkpoint is None
    assert "the last step is kept" in caplog.text


@pytest.mark.parametrize("source", ["captions", "template", "templates", "images"])
def test_every_source_of_prototypes_evaluates(clip, tmp_path, source):
    trainer = make_trainer(clip, tmp_path, prototypes=source)
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    assert trainer.prototypes.source == source


@pytest.mark.slow
def test_bf16_autocast_trains(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path, bf16=True, num_train_epochs=8, learning_rate=3e-3)
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.6
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_data_sets_that_do_not_fit_are_refused(clip, tmp_path):
    with pytest.raises(UserError, match="expected columns image and label, found label"):
        make_trainer(clip, tmp_path, colour_dataset(2).remove_columns(["image", "captions"]))
    with pytest.raises(UserError, match="ClassLabel"):
        from datasets import Value

        make_trainer(clip, tmp_path, colour_dataset(2).cast_column("label", Value("int64")))


def test_selection_by_loss_takes_the_lowest(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path, num_train_epochs=4, metric_for_best_model="loss")
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    assert trainer.state.best_global_step == min(losses, key=losses.get) > 0


def test_resume_after_the_last_step_within_an_epoch_trains_no_further(clip, _clip, tmp_path):
    import copy

    settings = {"max_steps": 4, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    settings |= {"load_best_model_at_end": False}
    straight = make_trainer(clip, tmp_path, evaluate=False, **settings)
    straight.train()
    again = make_trainer(copy.deepcopy(_clip), tmp_path, evaluate=False, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert not changed(weights(straight.model), weights(again.model))


def test_a_second_run_in_the_same_folder_has_its_own_candidate(clip, _clip, tmp_path):
    import copy

    for model in (clip, copy.deepcopy(_clip)):
        trainer = make_trainer(model, tmp_path, learning_rate=1e-9)
        trainer.train()
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-0")


def test_an_evaluation_that_is_not_finite_stops(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path)
    trainer.model.visual_projection.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="validation loss became nan"):
        trainer.evaluate()


def test_saved_model_has_no_pickle(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path)
    trainer.save_model(str(tmp_path / "saved"))
    assert {p.suffix for p in (tmp_path / "saved").iterdir()} <= {".json", ".safetensors"}


def test_classes_without_captions_are_logged_once(clip, tmp_path, caplog):
    train = colour_dataset(2)
    captions = [["x"] if label == 0 else [] for label in train["label"]]
    trainer = make_trainer(clip, tmp_path, train.remove_columns("captions").add_column("captions", captions))
    trainer.evaluate()
    trainer.evaluate()
    assert caplog.text.count("green thing, blue thing") == 1


@pytest.mark.slow
def test_a_second_training_is_validated_with_prototypes_of_its_own_weights(clip, tmp_path):
    settings = {"num_train_epochs": 1, "eval_on_start": False, "load_best_model_at_end": False, "save_strategy": "no"}
    trainer = make_trainer(clip, tmp_path, learning_rate=3e-3, **settings)
    trainer.train()
    trainer.train()  # its only validation is at the same step as that of the first
    torch.testing.assert_close(trainer.prototypes.embeddings, trainer.build_prototypes().embeddings, atol=1e-6, rtol=0)


def test_another_data_set_is_evaluated_though_workers_stay(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path, dataloader_num_workers=1)
    seen = []
    trainer.compute_metrics = lambda prediction: seen.append(len(prediction.label_ids)) or {}
    trainer.evaluate()
    trainer.evaluate(colour_dataset(2, seed=5))
    trainer.evaluate()
    assert seen == [12, 6, 12]


@pytest.mark.slow
def test_what_is_evaluated_or_predicted_must_have_labels_and_the_same_classes(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path)
    with pytest.raises(UserError, match="test data: expected columns image and label"):
        trainer.predict(colour_dataset(2).remove_columns("label"))
    names = ["blue thing", "green thing", "pink thing"]  # in another order they would be matched by name
    other = colour_dataset(2).cast_column("label", ClassLabel(names=names))
    with pytest.raises(
        UserError, match=r"validation data: expected the classes of train_dataset .*found others: pink thing"
    ):
        trainer.evaluate(other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples_per_class": 9, "per_device_train_batch_size": 8}, "samples_per_class: expected 2 to 8"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 0}, "Leave it out, or type"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_a_folder_is_taken(settings, message):
    with pytest.raises(UserError, match=message):
        MMFTConfig("somewhere", use_cpu=True, **settings)


def test_eval_loss_is_the_mean_over_every_readable_image_once(clip, tmp_path):
    """Whatever the batches: with a bad image in one of them, and a shorter last one."""
    validation = colour_dataset(4, seed=1, captions=False).cast_column("image", Image(decode=False))
    rows = validation.to_list()
    rows[0]["image"] = {"bytes": b"no picture", "path": None}
    validation = Dataset.from_list(rows, features=validation.features)
    found = []
    for batch in (5, 12):
        trainer = make_trainer(
            copy.deepcopy(clip), tmp_path / str(batch), on_bad_image="skip", per_device_eval_batch_size=batch
        )
        found.append(trainer.evaluate(validation)["eval_loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
