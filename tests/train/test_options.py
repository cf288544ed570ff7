"""What may help with few images, each an option: caption dropout, template weight, a weight of the loss that moves."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from plain_prototypes import naive_caption_prototypes
from safetensors.torch import load_file, save_file
from tiny_clip import colour_dataset
from training import changed, make_trainer, weights

from mmft_hf import ClassPrototypes, MMFTConfig, set_towers
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.data.views import TextView, TrainingView

TEMPLATE = "a photo of a {}."


def normalise(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


# -- caption dropout ---------------------------------------------------------------------------------------------------
def drawn(epochs: int, **settings) -> list[tuple]:
    """(text, box, label) of each read; without opening a picture, this takes no time."""
    data = colour_dataset(4)
    view = TrainingView(data, TextView(data.features["label"].names, TEMPLATE, seed=3, **settings), crop_min_area=0.5)
    picture, rows = PILImage.new("RGB", (20, 24)), view.rows[:]
    view.read = lambda row: {"image": picture, "label": rows["label"][row], "captions": rows["captions"][row]}
    reads = [view[key] for key in range(epochs * len(view))]
    return [(read["text"], read["box"], read["label"]) for read in reads]


def test_captions_are_left_out_as_often_as_asked_and_no_other_draw_changes():
    epochs, names = 200, colour_dataset(1).features["label"].names
    plain = drawn(epochs)
    assert drawn(epochs, caption_dropout=0.0) == plain
    some = drawn(epochs, caption_dropout=0.3)
    assert [read[1:] for read in some] == [read[1:] for read in plain]
    left_out = np.array([text == TEMPLATE.format(names[label]) for text, _, label in some])
    assert all(now == before for now, before, out in zip(some, plain, left_out, strict=True) if not out)
    assert not any(text == TEMPLATE.format(names[label]) for text, _, label in plain)
    left_out = left_out.reshape(epochs, 12)
    # 60 of 200 reads of a row are expected, standard deviation 6.5; 3.6 of 12 rows of an epoch, 1.6.
    assert np.abs(left_out.sum(0) - 60).max() < 26
    assert left_out.sum(1).std() == pytest.approx(1.59, abs=0.4)
    assert left_out.mean() == pytest.approx(0.3, abs=0.04)
    assert drawn(3, caption_dropout=0.3) == some[:36]


@pytest.mark.slow
def test_with_every_caption_left_out_training_is_that_without_captions(clip, tmp_path):
    settings = {"num_train_epochs": 1, "crop_min_area": 1.0, "evaluate": False}
    found = []
    for captions, dropout in ((True, 1.0), (False, 0.0), (True, 0.0)):
        trainer = make_trainer(
            copy.deepcopy(clip), tmp_path, colour_dataset(4, captions=captions), caption_dropout=dropout, **settings
        )
        trainer.train()
        found.append(weights(trainer.model))
    assert not changed(found[0], found[1])
    assert changed(found[0], found[2])


@pytest.mark.slow
def test_a_frozen_text_tower_knows_the_templates_that_take_the_place_of_captions(clip, tmp_path):
    found = []
    for cache in (True, False):
        model, processor = copy.deepcopy(clip)
        set_towers(model, "full", "frozen")
        settings = {"caption_dropout": 0.5, "cache_frozen_features": cache, "evaluate": False, "optim": "sgd"}
        trainer = make_trainer((model, processor), tmp_path, colour_dataset(4), num_train_epochs=2, **settings)
        trainer.train()
        found.append(weights(trainer.model))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-6, rtol=0)


# -- template weight ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weight", [0.25, 0.9])
def test_prototypes_are_mixed_as_a_plain_loop_does(clip, weight):
    dataset = colour_dataset(2)
    captions = naive_caption_prototypes(*clip, dataset, TEMPLATE).double().numpy()
    bare = dataset.remove_columns("captions").add_column("captions", [[]] * len(dataset))
    templates = naive_caption_prototypes(*clip, bare, TEMPLATE).double().numpy()
    found = ClassPrototypes.from_captions(*clip, dataset, TEMPLATE, template_weight=weight)
    expected = normalise((1 - weight) * captions + weight * templates)
    np.testing.assert_allclose(found.embeddings, expected, atol=2e-6)
    assert np.abs(captions - templates).max() > 1e-2  # so that the weight matters
    assert (found.source, found.template_weight, found.embeddings.dtype) == ("captions", weight, torch.float32)


def test_weights_at_both_ends_and_classes_without_captions(clip):
    dataset = colour_dataset(2)
    templates = ClassPrototypes.from_templates(*clip, dataset.features["label"].names, TEMPLATE)
    plain = ClassPrototypes.from_captions(*clip, dataset)
    assert torch.equal(ClassPrototypes.from_captions(*clip, dataset, template_weight=0.0).embeddings, plain.embeddings)
    torch.testing.assert_close(plain.interpolate(templates, 1.0).embeddings, templates.embeddings, atol=1e-6, rtol=0)

    captions = [["only red"] if i % 3 == 0 else [] for i in range(6)]
    dataset = dataset.remove_columns("captions").add_column("captions", captions)
    plain = ClassPrototypes.from_captions(*clip, dataset)
    mixed = ClassPrototypes.from_captions(*clip, dataset, template_weight=0.5)
    assert mixed.fallback_classes == plain.fallback_classes == ("green thing", "blue thing")
    torch.testing.assert_close(mixed.embeddings[1:], plain.embeddings[1:], atol=1e-6, rtol=0)
    assert not torch.allclose(mixed.embeddings[0], plain.embeddings[0], atol=1e-3)
    none = ClassPrototypes.from_captions(*clip, colour_dataset(1, captions=False), template_weight=0.5)
    assert (none.source, none.template_weight) == ("template", 0.0)


def test_interpolation_refuses_other_classes_and_weights(clip):
    some, other = (ClassPrototypes.from_templates(*clip, names) for names in (["a", "b"], ["b", "a"]))
    with pytest.raises(ValueError, match="expected the classes a, b"):
        some.interpolate(other, 0.5)
    with pytest.raises(ValueError, match=r"from 0 to 1, found 1\.5"):
        some.interpolate(some, 1.5)


def test_the_weight_is_saved_and_an_old_file_of_prototypes_has_none(clip, tmp_path):
    mixed = ClassPrototypes.from_captions(*clip, colour_dataset(1), template_weight=0.3)
    path = mixed.save_pretrained(tmp_path)
    assert ClassPrototypes.from_pretrained(tmp_path).template_weight == 0.3
    metadata = {"class_names": '["a"]', "logit_scale": "1", "source": "captions", "template": "{}", "fallback_classes": "[]"}  # fmt: skip
    tensors = {"prototypes": load_file(path)["embeddings"]}
    path.unlink()
    save_file(tensors, tmp_path / "prototypes.safetensors", metadata)
    assert ClassPrototypes.from_pretrained(tmp_path).template_weight == 0.0


def test_the_trainer_validates_with_mixed_prototypes(clip, tmp_path):
    trainer = make_trainer(clip, tmp_path, template_weight=0.4)
    trainer.evaluate()
    expected = ClassPrototypes.from_captions(*clip, trainer.train_dataset, TEMPLATE, template_weight=0.4)
    torch.testing.assert_close(trainer.prototypes.embeddings, expected.embeddings, atol=1e-6, rtol=0)
    for source in ("images", "template"):
        with pytest.raises(UserError, match=f"expected 0 with prototypes {source}, found 0.4.*Leave it out"):
            MMFTConfig("somewhere", use_cpu=True, prototypes=source, template_weight=0.4)


# -- a weight of SupCon that moves --------------------------------------------------------------------------------------
def test_the_weight_of_each_step_lies_on_the_line_from_start_to_end(clip, tmp_path):
    settings = {"supcon_weight": 0.8, "supcon_weight_end": 0.2, "gradient_accumulation_steps": 2, "logging_steps": 1}
    trainer = make_trainer(clip, tmp_path, evaluate=False, per_device_train_batch_size=4, logging_strategy="steps", **settings)  # fmt: skip
    trainer.train()
    steps = [log for log in trainer.state.log_history if "supcon_loss" in log]
    found = [log["supcon_weight"] for log in steps]
    assert found == pytest.approx([0.8, 0.7, 0.6, 0.5, 0.4, 0.3], abs=1e-6)  # both batches of a step alike
    for log, w in zip(steps, found, strict=True):
        assert log["loss"] == pytest.approx(w * log["supcon_loss"] + (1 - w) * log["clip_loss"], abs=1e-5)
    assert max(abs(log["supcon_loss"] - log["clip_loss"]) for log in steps) > 1e-2  # so that the weight matters


def test_an_epoch_logs_the_mean_of_its_weights_and_prints_it(clip, tmp_path, capsys):
    trainer = make_trainer(clip, tmp_path, supcon_weight=0.6, supcon_weight_end=0.0)
    trainer.train()
    found = [log["supcon_weight"] for log in trainer.state.log_history if "supcon_loss" in log]
    assert found == pytest.approx([0.5, 0.2], abs=1e-6)
    printed = capsys.readouterr().out
    assert "~ 0.5 x supcon" in printed and "~ 0.2 x supcon" in printed and "0.8 x clip" in printed


@pytest.mark.slow
def test_a_weight_that_ends_where_it_starts_is_one_that_stays(clip, tmp_path):
    found = []
    for end in (None, 0.1):
        trainer = make_trainer(copy.deepcopy(clip), tmp_path, evaluate=False, supcon_weight_end=end)
        trainer.train()
        found.append(weights(trainer.model))
    assert not changed(*found)


# -- values that cannot be ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["caption_dropout", "template_weight", "supcon_weight_end"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_shares_lie_between_0_and_1(name, value):
    with pytest.raises(UserError, match=f"{name}: expected 0 to 1, found {value}"):
        MMFTConfig("somewhere", use_cpu=True, **{name: value})


# -- the command -------------------------------------------------------------------------------------------------------
SETTINGS = {"caption_dropout": 0.4, "template_weight": 0.3, "supcon_weight_end": 0.0, "weight_averaging": 0.9}


@pytest.fixture(scope="module")
def run(clip_folder, data_folder, tmp_path_factory):
    """A finished run with all of it: its arguments, folder and what it printed."""
    folder = tmp_path_factory.mktemp("options") / "out"
    words = ["finetune", "--model_name_or_path", clip_folder, "--dataset_name", data_folder, "--output_dir", folder]
    words += ["--num_train_epochs", 4, "--learning_rate", 5e-3, "--per_device_train_batch_size", 8, "--use_cpu", "true"]
    words += ["--head", "prototypes"]  # whose card says how they were made
    words += [word for name, value in SETTINGS.items() for word in (f"--{name}", value)]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([str(word) for word in words]) == 0
    return [str(word) for word in words], folder, printed.getvalue()


def test_a_run_records_its_options_and_says_what_they_do(run, data_folder, capsys):
    _, folder, printed = run
    identity = json.loads((folder / "mmft.json").read_text())["identity"]
    assert {name: identity[name] for name in SETTINGS} == SETTINGS
    assert "left out with probability 0.4" in printed
    assert "compared with captions and, with weight 0.3, the class template" in printed
    assert "w SupCon + (1 - w) CLIP with w from 0.1 to 0, learning rate" in printed
    assert "weights averaged with decay 0.9" in printed and " averaged weights\n" in printed
    card = (folder / "README.md").read_text()
    assert "with w from 0.1 at the start to 0 at the end, draws an image" in card
    assert "drawn towards its class template with weight 0.3" in card
    for name, value in SETTINGS.items():
        assert f"| `{name}` | `{value:g}` |" in card, name
    assert ClassPrototypes.from_pretrained(folder).template_weight == 0.3
    assert main(["evaluate", "--model_name_or_path", str(folder), "--dataset_name", str(data_folder)]) == 0
    assert "compared with captions and, with weight 0.3, the class template" in capsys.readouterr().out


def test_a_run_from_before_there_were_these_options_had_their_defaults(run, capsys):
    words, folder, _ = run
    path = folder / "mmft.json"
    record = json.loads(path.read_text())
    older = {k: v for k, v in record["identity"].items() if k not in SETTINGS}
    path.write_text(json.dumps(record | {"identity": older}))
    words = [*words, "--resume_from_checkpoint", "true"]
    assert main(words) == 2
    assert "template_weight was 0.0, now 0.3" in capsys.readouterr().err
    default = [word for name in SETTINGS if name != "supcon_weight_end" for word in (f"--{name}", "0")]
    at = words.index("--supcon_weight_end")
    assert main([*words[:at], *words[at + 2 :], *default]) == 0
    assert "already holds this run, complete" in capsys.readouterr().out
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resume_with_another_value_is_refused(run, name, capsys):
    words, _, _ = run
    assert main([*words, f"--{name}", "0.1", "--resume_from_checkpoint", "true"]) == 2
    assert f"{name} was {SETTINGS[name]}, now 0.1" in capsys.readouterr().err
