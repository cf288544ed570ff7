"""Training beside a frozen tower whose embeddings are kept: the same weights as without, and nothing encoded twice."""

import copy
import io

import pytest
import tiny_encoders
import torch
from datasets import Dataset
from tiny_clip import colour_dataset
from training import make_trainer, weights, with_lora

import mmft_hf
from mmft_hf import MMFTConfig, MMFTDataCollator, MMFTTrainer
from mmft_hf.core.errors import UserError
from mmft_hf.data import views
from mmft_hf.model.loading import head_of
from mmft_hf.train.frozen import has_dropout

SGD = {"optim": "sgd", "learning_rate": 0.3, "save_strategy": "no", "load_best_model_at_end": False}
# Towers, and what else is set. Chunks and accumulation are not made of pixels and tokens alone.
CASES = {
    "text": (("full", "frozen"), {}),
    "text, chunks": (("full", "frozen"), {"loss_chunk_size": 3, "gradient_accumulation_steps": 2}),
    "vision": (("frozen", "lora"), {"crop_min_area": 1.0}),
    "vision, chunks": (("frozen", "full"), {"crop_min_area": 1.0, "loss_chunk_size": 3}),
    "vision, bf16": (("frozen", "full"), {"crop_min_area": 1.0, "bf16": True}),
    "trunks": (("head", "head"), {"crop_min_area": 1.0}),
    "trunk, bf16": (("head", "frozen"), {"crop_min_area": 1.0, "bf16": True}),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFT_HF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


class Count:
    """Pictures and texts that a model's towers encode."""

    def __init__(self, model):
        self.vision = self.text = 0
        model.vision_model.register_forward_pre_hook(self.pictures, with_kwargs=True)
        model.text_model.register_forward_pre_hook(self.texts, with_kwargs=True)

    def pictures(self, module, args, kwargs):
        self.vision += len(args[0] if args else kwargs["pixel_values"])

    def texts(self, module, args, kwargs):
        self.text += len(args[0] if args else kwargs["input_ids"])


def train(clip, folder, towers, data=None, **settings):
    """The trainer after two epochs, and what its towers encoded on the way."""
    model, processor = with_lora(copy.deepcopy(clip), *towers)
    count = Count(model)
    trainer = make_trainer((model, processor), folder, data, **SGD | settings)
    trainer.train()
    return trainer, count


def difference(one, other) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case not in ("vision", "trunks"))) for case in CASES]
)
def test_kept_embeddings_train_the_same_weights_and_give_the_same_numbers(clip, tmp_path, case, capsys):
    towers, settings = CASES[case]
    start = weights(with_lora(copy.deepcopy(clip), *towers)[0])
    plain, encoded = train(clip, tmp_path / "plain", towers, cache_frozen_features=False, **settings)
    assert "Frozen" not in capsys.readouterr().out
    kept, first = train(clip, tmp_path / "first", towers, **settings)
    said = capsys.readouterr().out
    again, second = train(clip, tmp_path / "second", towers, **settings)
    expected = weights(plain.model)
    assert difference(expected, start) > 1e-3
    # bfloat16 rounds a batch of another size otherwise.
    assert difference(expected, weights(kept.model)) < (2e-3 if "bf16" in case else 1e-6)
    assert difference(weights(kept.model), weights(again.model)) == 0  # read or made: the same bytes
    logs = [[{k: v for k, v in log.items() if "second" not in k and "time" not in k and "flos" not in k} for log in t.state.log_history] for t in (plain, kept)]  # fmt: skip
    for log, other in zip(*logs, strict=True):
        assert log == pytest.approx(other, abs=3e-2 if "bf16" in case else 1e-5)
    # 24 training pictures and 12 of validation, 30 distinct texts; two epochs, three evaluations.
    texts = 24 + 3
    name = "trunk of the {} tower" if "head" in towers else "{} tower"
    if towers[0] in ("frozen", "head"):
        assert encoded.vision == 2 * 24 + 3 * 12
        assert (first.vision, second.vision) == (24 + 12, 0)
        own = name.format("vision")
        assert f"Frozen {own}: 24 training images encoded once in " in said
        assert f"Frozen {own}: 12 validation images encoded once in " in said
        assert f"Frozen {own}: 24 training images read from the cache in " in capsys.readouterr().out
    if towers[1] == "head":
        # Prototypes of the captions are made for each of three evaluations.
        assert (first.text, second.text) == (texts + 3 * texts, 3 * texts)
        assert f"Frozen {name.format('text')}: {texts} training texts encoded once in " in said
    elif towers[1] == "frozen" and towers[0] == "full":
        # The prototypes of the captions are made once more, by their own batches.
        assert encoded.text > 2 * texts and (first.text, second.text) == (2 * texts, texts)
        assert f"Frozen text tower: {texts} training texts encoded once in " in said


def test_pictures_that_are_mirrored_are_not_kept(clip, tmp_path, capsys):
    trainer = make_trainer(with_lora(clip, "frozen", "full"), tmp_path, crop_min_area=1, horizontal_flip=True)
    trainer.get_train_dataloader()
    said = capsys.readouterr().out
    assert "type --crop_min_area 1 --horizontal_flip false." in said and "training images encoded once" not in said


def test_a_trunk_that_changes_is_encoded_again_and_a_projection_that_does_is_not(clip, tmp_path, capsys):
    model, processor = with_lora(clip, "head", "full")
    count = Count(model)
    trainer = make_trainer((model, processor), tmp_path, **SGD)
    losses = [trainer.evaluate()["eval_loss"]]
    with torch.no_grad():
        model.visual_projection.weight.copy_(model.visual_projection.weight.flip(0))
    losses.append(trainer.evaluate()["eval_loss"])
    assert count.vision == 12
    with torch.no_grad():
        model.vision_model.post_layernorm.weight.mul_(torch.linspace(-1, 2, 32))
    losses.append(trainer.evaluate()["eval_loss"])
    assert count.vision == 24 and len(set(losses)) == 3

    def fresh():
        return make_trainer((model, processor), tmp_path, cache_frozen_features=False, **SGD).evaluate()["eval_loss"]

    assert losses[2] == pytest.approx(fresh(), abs=1e-6)
    # What is kept of a trunk is not taken for embeddings.
    model.visual_projection.requires_grad_(False)
    trainer.train()
    assert "Frozen vision tower: 12 validation images encoded once" in capsys.readouterr().out
    assert trainer.evaluate()["eval_loss"] == pytest.approx(fresh(), abs=1e-6)


@pytest.mark.slow
def test_without_the_picture_files_a_second_run_reads_none(clip, tmp_path, monkeypatch):
    train(clip, tmp_path / "first", ("frozen", "full"), crop_min_area=1.0)
    monkeypatch.setattr(views, "read_image", lambda source: pytest.fail("a picture was opened"))
    train(clip, tmp_path / "second", ("frozen", "full"), crop_min_area=1.0)
    with pytest.raises(pytest.fail.Exception):
        train(clip, tmp_path / "third", ("frozen", "full"), crop_min_area=1.0, cache_frozen_features=False)


@pytest.mark.slow
def test_random_crops_are_encoded_anew_and_validation_once(clip, tmp_path, capsys):
    trainer, count = train(clip, tmp_path, ("frozen", "full"))
    said = capsys.readouterr().out
    assert said.count("type --crop_min_area 1.") == 1
    assert "12 validation images encoded once" in said and "training images" not in said
    assert count.vision == 2 * 24 + 12
    plain, _ = train(clip, tmp_path / "plain", ("frozen", "full"), cache_frozen_features=False)
    assert difference(weights(trainer.model), weights(plain.model)) == 0


def test_another_template_is_another_text(clip, tmp_path):
    train(clip, tmp_path / "first", ("full", "frozen"))
    _, count = train(clip, tmp_path / "second", ("full", "frozen"), class_template="one {}.")
    assert count.text == 2 * 27


@pytest.mark.slow
def test_a_bad_picture_gives_way_to_the_next_as_without(clip, tmp_path):
    data = colour_dataset(8)
    pictures = []
    for row, image in enumerate(data["image"]):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        pictures.append({"bytes": b"no picture" if row in (4, 5, 23) else buffer.getvalue(), "path": None})
    data = Dataset.from_dict({**data[:], "image": pictures}, features=data.features)
    settings = {"crop_min_area": 1.0, "on_bad_image": "skip"}
    plain, _ = train(clip, tmp_path / "plain", ("frozen", "full"), data, cache_frozen_features=False, **settings)
    for name in ("first", "second"):
        kept, _ = train(clip, tmp_path / name, ("frozen", "full"), data, **settings)
        assert difference(weights(plain.model), weights(kept.model)) < 1e-6
        skipped = [[log.get("skipped_images") for log in t.state.log_history] for t in (plain, kept)]
        assert skipped[0] == skipped[1] and 4.0 in skipped[0]  # 4 and 5 cost three steps, 23 one
    with pytest.raises(UserError, match="row 4 cannot be read"):
        train(clip, tmp_path / "fail", ("frozen", "full"), data, crop_min_area=1.0)


def test_an_unreadable_validation_picture_counts_for_nothing(clip, tmp_path):
    good = colour_dataset(4, seed=1, captions=False)
    pictures = [{"bytes": b"no", "path": None}, *good.cast_column("image", views.Image(decode=False))["image"][1:]]
    bad = Dataset.from_dict({"image": pictures, "label": good["label"]}, features=good.features)
    found = []
    for on in (True, False):
        model, processor = with_lora(copy.deepcopy(clip), "frozen", "full")
        trainer = make_trainer((model, processor), tmp_path / str(on), on_bad_image="skip", cache_frozen_features=on)
        found.append(trainer.evaluate(bad))
        assert len(trainer.predict(bad).predictions) == 12
    keys = ("eval_accuracy", "eval_loss", "eval_mean_per_class_accuracy")
    assert [found[0][key] for key in keys] == pytest.approx([found[1][key] for key in keys], abs=1e-6)


def test_weights_that_change_are_seen(clip, tmp_path):
    model, processor = with_lora(clip, "frozen", "full")
    trainer = make_trainer((model, processor), tmp_path, **SGD)
    before = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == before
    with torch.no_grad():
        model.visual_projection.weight.copy_(model.visual_projection.weight.flip(0))
    after = trainer.evaluate()["eval_loss"]
    fresh = make_trainer((model, processor), tmp_path, cache_frozen_features=False, **SGD)
    assert after == pytest.approx(fresh.evaluate()["eval_loss"], abs=1e-6) and abs(after - before) > 1e-4


def test_a_tower_that_is_no_longer_frozen_is_trained(clip, tmp_path):
    model, processor = with_lora(clip, "frozen", "full")
    trainer = make_trainer((model, processor), tmp_path, crop_min_area=1.0, **SGD)
    trainer.evaluate()
    model.requires_grad_(True)
    before = weights(model)
    trainer.train()
    assert difference(before, weights(model)) > 1e-3
    assert (before["visual_projection.weight"] - model.visual_projection.weight).abs().max() > 1e-4


def test_a_resume_trains_beside_the_checkpoints_tower(clip, tmp_path):
    settings = {"crop_min_area": 1.0, "optim": "sgd", "max_steps": 3, "save_steps": 2, "save_strategy": "steps", "load_best_model_at_end": False}  # fmt: skip
    model, processor = with_lora(copy.deepcopy(clip), "frozen", "full")
    make_trainer((model, processor), tmp_path, evaluate=False, **settings | {"save_total_limit": None}).train()
    expected = weights(model)
    other, processor = with_lora(clip, "frozen", "full")
    with torch.no_grad():
        other.visual_projection.weight.mul_(-1)
    trainer = make_trainer((other, processor), tmp_path, evaluate=False, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert difference(weights(other), expected) == 0
    # Where weights come after the pictures were encoded, as with DeepSpeed, others are refused.
    with torch.no_grad():
        other.visual_projection.weight.mul_(1)  # written to, but the same
    trainer._frozen.on_train_begin(trainer.args, trainer.state, trainer.control)
    with torch.no_grad():
        other.visual_projection.weight.mul_(-1)
    with pytest.raises(UserError, match="expected the vision tower of the model"):
        trainer._frozen.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_a_resume_goes_on_with_the_projection_of_the_checkpoint(clip, tmp_path, capsys):
    """Though the trunk was encoded before the checkpoint was read."""
    settings = {"crop_min_area": 1.0, "max_steps": 3, "save_steps": 2, "save_strategy": "steps", "learning_rate": 1e-2}
    settings |= {"evaluate": False, "load_best_model_at_end": False, "save_total_limit": None}
    found = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        pair = with_lora(copy.deepcopy(clip), "head", "norms")
        make_trainer(pair, tmp_path, **settings).train(resume_from_checkpoint=resume)
        found.append(weights(pair[0]))
    assert difference(*found) == 0
    assert (found[0]["visual_projection.weight"] - clip[0].visual_projection.weight).abs().max() > 1e-3
    assert "Frozen trunk of the vision tower: 24 training images read from the cache" in capsys.readouterr().out


def test_what_cannot_be_kept_is_encoded_as_before(clip, tmp_path, folder, capsys):
    model, processor = copy.deepcopy(clip)
    model.text_model.encoder.layers[0].self_attn.dropout = 0.1
    train((model, processor), tmp_path / "dropout", ("full", "frozen"))
    assert "The text tower is frozen, but has dropout" in capsys.readouterr().out

    class Own(MMFTDataCollator):
        def __call__(self, rows):
            assert all(isinstance(row["text"], str) for row in rows if "text" in row)
            return super().__call__(rows)

    def collate(rows):
        return Own(clip[1])(rows)

    model, processor = with_lora(clip, "full", "frozen")
    args = MMFTConfig(output_dir=str(tmp_path / "own"), use_cpu=True, disable_tqdm=True, max_steps=1)
    MMFTTrainer(model, args, colour_dataset(8), None, processor, data_collator=collate).train()
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["frozen", "head"])
@pytest.mark.parametrize("frozen", ["vision", "text"])
@pytest.mark.parametrize("kind", tiny_encoders.KINDS)
def test_every_kind_of_dual_encoder(kind, frozen, mode, tmp_path, capsys):
    torch.manual_seed(0)
    pair = tiny_encoders.KINDS[kind]()
    if mode == "head" and head_of(pair[0], frozen) is None:
        return
    towers = (mode, "full") if frozen == "vision" else ("full", mode)
    settings = {"crop_min_area": 1.0, "max_steps": 2, "learning_rate": 0.1, "evaluate": False}
    start = weights(pair[0])
    plain, _ = train(pair, tmp_path / "plain", towers, cache_frozen_features=False, **settings)
    kept, count = train(pair, tmp_path / "kept", towers, **settings)
    assert difference(start, weights(plain.model)) > 1e-4
    if has_dropout(pair[0], frozen):
        assert kind in ("altclip", "chinese_clip", "align", "vit_bert", "clip_roberta")
        what = f"trunk of the {frozen} tower" if mode == "head" else f"{frozen} tower"
        assert f"The {what} is frozen, but has dropout" in capsys.readouterr().out
    else:
        assert difference(weights(kept.model), weights(plain.model)) < 1e-6
        assert getattr(count, frozen) == (24 if frozen == "vision" else 27)


@pytest.mark.slow
def test_a_whole_run_encodes_each_picture_once(clip, data_folder, tmp_path, monkeypatch):
    """The zero-shot baseline, the training, the selection and the test see the same tower."""
    from mmft_hf.train import workflow

    counts, load = [], workflow.load_model

    def counting(*args):
        model, processor = load(*args)
        counts.append(Count(model))
        return model, processor

    base = tmp_path / "base"
    for part in clip:
        part.save_pretrained(base)
    monkeypatch.setattr(workflow, "load_model", counting)
    settings = {"vision_tower": "frozen", "crop_min_area": 1.0, "use_cpu": True, "disable_tqdm": True}
    found = []
    for on in (True, False):
        out = tmp_path / str(on)
        run = workflow.finetune(str(data_folder), base, out, epochs=1, cache_frozen_features=on, **settings)
        found.append(
            {k: v for k, v in run.metrics.items() if isinstance(v, float) and "runtime" not in k and "second" not in k}
        )
    few, many = sum(count.vision for count in counts[:2]), sum(count.vision for count in counts[2:])
    assert found[0] == found[1] and "test_accuracy" in found[0]
    # 24, 12 and 18 pictures, and the two small trials of the memory estimate.
    assert few == 24 + 12 + 18 + 4 < many


@pytest.mark.slow
def test_a_run_that_trains_projections_alone_encodes_each_picture_once(clip, clip_folder, tmp_path, monkeypatch):
    """For the epochs, for three sets of weights that heads are fitted to, and for the scores of all of them."""
    kind, encoded = type(clip[0].vision_model), []
    forward = kind.forward

    def counted(self, pixel_values, *args, **kwargs):
        encoded.append(len(pixel_values))
        return forward(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", counted)
    data = {"train": colour_dataset(4), "validation": colour_dataset(17, seed=1), "test": colour_dataset(5, seed=2)}
    settings = {"vision_tower": "head", "text_tower": "head", "crop_min_area": 1.0, "learning_rate": 1e-2, "epochs": 2}
    settings |= {"per_device_train_batch_size": 6, "use_cpu": True, "disable_tqdm": True}
    found = []
    for on, images in (
        (True, 12 + 51 + 15 + 4),
        (True, 4),
        (False, None),
    ):  # four of them for the estimate of the memory
        encoded.clear()
        out = tmp_path / str(len(found))
        found.append(mmft_hf.finetune(data, clip_folder, out, **settings, cache_frozen_features=on).metrics)
        assert images is None or sum(encoded) == images
    kept, again, plain = found
    assert len({row["alpha"] for row in kept["head_candidates"]}) == 3
    assert kept["head_candidates"] == again["head_candidates"]
    for key in ("test_accuracy", "validation_accuracy", "zero_shot_test_accuracy", "head", "head_alpha"):
        assert kept[key] == plain[key] == again[key]
    for row, other in zip(kept["head_candidates"], plain["head_candidates"], strict=True):
        assert row["validation_loss"] == pytest.approx(other["validation_loss"], abs=1e-4)
