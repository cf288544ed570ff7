"""`mmft-hf finetune --text_trunk`, and what follows it: prediction without the caption encoder, other class names with it."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from processes import run_python
from safetensors.torch import load_file
from tiny_clip import COLOURS, colour_dataset, colour_images
from tiny_trunks import WORDS, save_bert, save_llama, word_tokenizer

import mmft_hf
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.hub.publish import model_files
from mmft_hf.model.caption_encoder import CaptionEncoder
from mmft_hf.model.loading import load_model
from mmft_hf.train.workflow import Reporter

OPENING = "Opening the caption encoder"


@pytest.fixture(scope="module")
def place(tmp_path_factory, clip_folder, data_folder):
    """A folder with a trunk, and a run that was trained on it."""
    place = tmp_path_factory.mktemp("adapted")
    save_llama(place / "llama", tokenizer=word_tokenizer([*WORDS, "thing", "no", "very"]))
    save_bert(place / "bert")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMFT_HF_CACHE", str(place / "cache"))
        assert finetune(place, clip_folder, data_folder, "run") == 0
    colour_images(1)[1][0].save(place / "green.png")
    return place


@pytest.fixture(autouse=True)
def cache(place, monkeypatch):
    monkeypatch.setenv("MMFT_HF_CACHE", str(place / "cache"))


def finetune(place: Path, clip_folder, data_folder, name: str, *more, trunk: str = "llama") -> int:
    settings = {
        "model_name_or_path": clip_folder,
        "text_trunk": place / trunk,
        "dataset_name": data_folder,
        "output_dir": place / name,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": "1e-3",
        "use_cpu": "true",
        "disable_tqdm": "true",
    }
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    return main(["finetune", *words, *more])


def test_the_plan_and_the_first_line_name_the_trunk(place, clip_folder, data_folder, capsys, caplog):
    assert finetune(place, clip_folder, data_folder, "plan", "--max_steps", "1", "--head", "prototypes") == 0
    out = capsys.readouterr().out
    assert "learning rate 0.001 (adaptor 0.01), seed" in out
    assert "texts      vectors of llama (34,704 parameters), computed once, in place of the text tower" in out
    assert "adaptor full (" in out and "epoch   0.0/1 | ridge start from 30 texts, compared with captions" in out
    # Once for all texts: of the training, its prototypes and its head.
    assert [text for text in caplog.messages if OPENING in text] == [f"{OPENING} llama to encode 30 texts."]


def test_what_the_run_leaves(place):
    run = place / "run"
    names = {path.name for path in run.iterdir() if path.is_file()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "head.safetensors", "mmft.json"} <= names
    assert [path.name for path in (run / "text_trunk").iterdir()] == ["caption_encoder.json"]
    trunk = CaptionEncoder.from_pretrained(place / "llama")
    assert json.loads((run / "text_trunk" / "caption_encoder.json").read_text()) == trunk.record()
    weights = load_file(run / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {
        *("vision_model", "visual_projection", "text_model", "text_projection", "logit_scale"),
    }
    sizes = {name: tuple(value.shape) for name, value in weights.items()}
    assert sizes["text_model.layers.3.up.weight"] == (96, 48) and sizes["text_projection.1.weight"] == (32, 48)
    record = json.loads((run / "mmft.json").read_text())
    assert record["identity"]["text_trunk"] == str(place / "llama")
    assert record["sources"]["text_trunk"] == {
        **{"name": "llama", "kind": "local", "type": "model", "revision": None, "parameters": 34704, "lora": False}
    }
    assert "text_trunk/caption_encoder.json" in record["files"]
    card = (run / "README.md").read_text()
    assert (
        "The texts were encoded once by the caption encoder llama, which was frozen: 34,704 parameters, licence unknown."
        in card
    )
    assert "Image tower and adaptor were trained in full" in card


PREDICTING = """
import json, sys
from transformers import pipeline
import mmft_hf
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.hub.publish import model_files
run, picture, data = sys.argv[1:]
found = pipeline("mmft-image-classification", model=run)(picture)
classifier = mmft_hf.ImageClassifier.from_pretrained(run)
codes = [main(["predict", picture, "--model_name_or_path", run])]
codes += [main(["evaluate", "--dataset_name", data, "--model_name_or_path", run])]
modules = [name for name in sys.modules if "caption_encoder" in name or "models.llama" in name]
print(json.dumps([codes, modules, found, classifier.predict(picture)]))
"""


def test_predicting_neither_imports_nor_needs_the_trunk(place, data_folder):
    """A fresh process, in which neither the base model of the trunk nor the folder `text_trunk` is to be found."""
    lonely = place / "lonely"
    shutil.copytree(place / "run", lonely, ignore=shutil.ignore_patterns("text_trunk", "checkpoint-*"))
    (place / "llama").rename(place / "away")
    try:
        out, err = run_python(["-c", PREDICTING, lonely, place / "green.png", data_folder])
    finally:
        (place / "away").rename(place / "llama")
    codes, modules, piped, own = json.loads(out.splitlines()[-1])
    assert codes == [0, 0] and modules == [] and OPENING not in out + err
    assert piped == own == mmft_hf.ImageClassifier.from_pretrained(place / "run").predict(place / "green.png")
    assert "zero-shot" in out  # of the base model, by its own text tower


def test_other_class_names_open_the_trunk_and_its_size_is_said_first(place, capsys, caplog):
    names = ["a green thing", "red", "a very blue thing"]
    command = ["predict", str(place / "green.png"), "--model_name_or_path", str(place / "run"), "--classes", *names]
    assert main(command) == 0
    assert [text for text in caplog.messages if OPENING in text] == [
        f"{OPENING} llama (34,704 parameters) to encode 3 texts."
    ]
    vectors = CaptionEncoder.from_pretrained(place / "llama").encode([f"a photo of a {name}." for name in names])
    model, processor = load_model(place / "run")
    with torch.no_grad():
        texts = F.normalize(model.get_text_features(vectors.half().float()).pooler_output, dim=-1)
        pixels = processor(images=colour_images(1)[1][0])["pixel_values"]
        image = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
        scores = (model.logit_scale.exp() * image @ texts.T).softmax(dim=1)[0]
    best = scores.argsort(descending=True).tolist()
    said = ", ".join(f"{names[i]} {scores[i]:.1%}" for i in best)
    assert capsys.readouterr().out == f"{place / 'green.png'}: {said}\n"


def test_other_class_names_of_a_model_of_tokens(place, clip_folder, capsys):
    """They need no run: any dual encoder will do."""
    names = ["a green thing", "red"]
    command = ["predict", str(place / "green.png"), "--model_name_or_path", str(clip_folder), "--classes", *names]
    assert main(command) == 0
    head = mmft_hf.ClassPrototypes.from_templates(*load_model(clip_folder), names)
    expected = mmft_hf.ImageClassifier(*load_model(clip_folder), head).eval().predict(place / "green.png")
    said = ", ".join(f"{one['label']} {one['score']:.1%}" for one in expected)
    assert capsys.readouterr().out == f"{place / 'green.png'}: {said}\n"


@pytest.mark.parametrize("names", [["one"], ["one", "one"], ["one", " "]])
def test_class_names_that_tell_nothing_apart_are_refused(place, clip_folder, names, capsys):
    command = ["predict", str(place / "green.png"), "--model_name_or_path", str(clip_folder), "--classes", *names]
    assert main(command) == 2
    assert "--classes: expected two or more different names" in capsys.readouterr().err


def test_a_missing_base_model_is_named_with_what_to_do(place, capsys):
    (place / "llama").rename(place / "away")
    command = ["predict", str(place / "green.png"), "--model_name_or_path", str(place / "run"), "--classes", "a", "b"]
    try:
        assert main(command) == 2
    finally:
        (place / "away").rename(place / "llama")
    err = capsys.readouterr().err
    assert f"expected its base model {str(place / 'llama')!r}, which caption_encoder.json names" in err
    assert "pictures are classified without it" in err and "leave the new class names out" in err


def test_what_is_published_of_a_run(place):
    """Whole: the trunk by the last part of its path alone. `--parts vision`: a stock model, the head, and no trunk."""
    whole = model_files(place / "run", "me/x")
    assert json.loads(whole["text_trunk/caption_encoder.json"])["base"] == "llama"
    assert "mmft-hf predict YOUR_PICTURE.jpg --model_name_or_path me/x --classes" in whole["README.md"].decode()
    tower = model_files(place / "run", "me/x", parts="vision")
    assert whole.keys() - tower.keys() == {"text_trunk/caption_encoder.json"}
    (place / "tower").mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (place / "tower" / name).write_bytes(tower[name])
    stock, found = transformers.CLIPVisionModelWithProjection.from_pretrained(place / "tower", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    model, processor = load_model(place / "run")
    pixels = processor(images=colour_images(1)[1][0])["pixel_values"]
    assert torch.equal(stock(pixels).image_embeds, model.get_image_features(pixels).pooler_output)


def test_an_image_tower_that_transformers_has_no_class_for_is_not_published_alone(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = tmp_path / "run" / "config.json"
    content = json.loads(config.read_text())
    content["vision_config"]["model_type"] = "efficientnet"
    config.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"expected an image tower of CLIP or MetaCLIP 2.*found efficientnet"):
        model_files(tmp_path / "run", "me/x", parts="vision")


def test_a_trunk_that_cannot_be_opened_is_refused_before_anything_is_written(place, clip_folder, data_folder, capsys):
    (place / "ggufs").mkdir(exist_ok=True)
    (place / "ggufs" / "model.gguf").write_bytes(b"GGUF")
    for trunk, message in {"nowhere": "nowhere", "ggufs/model.gguf": "gguf", "ggufs": "type its name, too"}.items():
        assert finetune(place, clip_folder, data_folder, "refused", trunk=trunk) == 2
        assert message in capsys.readouterr().err
        assert not (place / "refused").exists() or not any((place / "refused").iterdir())


def test_the_rate_of_an_adaptor_without_an_adaptor_is_refused(place, clip_folder, data_folder, capsys):
    command = ["finetune", "--model_name_or_path", str(clip_folder), "--dataset_name", str(data_folder), "--output_dir"]
    assert main([*command, str(place / "refused"), "--head_learning_rate", "1e-3", "--use_cpu", "true"]) == 2
    assert (
        "--head_learning_rate: expected a model with an adaptor, as --text_trunk makes one" in capsys.readouterr().err
    )


def test_a_resume_with_another_trunk_is_refused(place, clip_folder, data_folder, capsys):
    again = ("--resume_from_checkpoint", "true")
    assert finetune(place, clip_folder, data_folder, "run", *again, trunk="bert") == 2
    assert f"text_trunk was {str(place / 'llama')!r}, now {str(place / 'bert')!r}" in capsys.readouterr().err
    assert finetune(place, clip_folder, data_folder, "run", *again) == 0
    assert "already holds this run, complete" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_a_model_for_another_head_and_another_training(place, data_folder, capsys):
    assert main(["head", str(place / "run"), "--output_dir", str(place / "head"), "--head", "linear"]) == 0
    found = mmft_hf.ImageClassifier.from_pretrained(place / "head")
    assert found.head.kind == "linear" and (place / "head" / "text_trunk" / "caption_encoder.json").is_file()
    command = ["finetune", "--model_name_or_path", str(place / "run"), "--dataset_name", str(data_folder)]
    command += [
        "--output_dir",
        str(place / "second"),
        "--max_steps",
        "2",
        "--vision_tower",
        "lora",
        "--use_cpu",
        "true",
    ]
    assert main([*command, "--load_best_model_at_end", "false", "--head_learning_rate", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "untuned model, compared with captions" in out
    first, second = (load_file(place / name / "model.safetensors") for name in ("run", "second"))
    assert first.keys() == second.keys()
    # Its start can be had, so the adapter can be used.
    assert (place / "second" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_sentence_encoder_is_a_trunk_and_lora_leaves_no_adapter(place, clip_folder, data_folder):
    """An adapter belongs to a base that others can have; the start of an adaptor is nowhere to be had."""
    more = ("--vision_tower", "lora", "--text_tower", "head", "--load_best_model_at_end", "false")
    assert finetune(place, clip_folder, data_folder, "lora", *more, "--head", "prototypes", trunk="bert") == 0
    assert not (place / "lora" / "adapter").exists()
    names = load_file(place / "lora" / "model.safetensors")
    assert not any("lora_" in name for name in names)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_equal_one(place, clip_folder, data_folder):
    """Each encodes its share of the texts, with an empty cache."""

    def finetuned(launcher: list[str], name: str, batch: int) -> dict:
        settings = {
            **{"model_name_or_path": clip_folder, "text_trunk": place / "llama", "dataset_name": data_folder},
            **{"output_dir": place / name, "num_train_epochs": 2, "per_device_train_batch_size": batch},
            # Adam would blow the rounding of gradients that are zero (those of k_proj.bias) up to whole steps.
            **{"optim": "sgd", "learning_rate": 0.03, "use_cpu": "true", "load_best_model_at_end": "false"},
            "head": "prototypes",
        }
        words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
        out, err = run_python(["-m", *launcher, "mmft_hf", "finetune", *words], MMFT_HF_CACHE=place / f"cache-{name}")
        assert out.count("ridge start from 30 texts") == 1 and (out + err).count(f"{OPENING} llama") == 1
        return load_file(place / name / "model.safetensors") | load_file(place / name / "head.safetensors")

    one = finetuned([], "one", 8)
    two = finetuned(["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"], "two", 4)
    assert one.keys() == two.keys()
    assert one["text_model.layers.0.down.weight"].abs().max() > 1e-4  # it was zero
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 2e-6


@pytest.mark.slow
def test_from_python_no_encoder_is_in_memory_once_the_training_starts(place, clip_folder, monkeypatch):
    opened, alive = [], []

    def remembered(*args, own=CaptionEncoder.from_pretrained, **options):
        encoder = own(*args, **options)
        opened.append(weakref.ref(encoder.model))
        return encoder

    class Watch(Reporter):
        def started(self, plan):
            gc.collect()
            alive.extend(one() is not None for one in opened)

    monkeypatch.setattr(CaptionEncoder, "from_pretrained", remembered)
    data = {"train": colour_dataset(8), "validation": colour_dataset(4, 1), "test": colour_dataset(6, 2)}
    settings = {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "report_to": "none", "head": "prototypes"}
    settings["reporter"] = Watch()
    result = mmft_hf.finetune(data, clip_folder, place / "python", text_trunk=str(place / "llama"), **settings)
    assert alive == [False] and len(opened) == 1
    assert {one["label"] for one in result.classifier(str(place / "green.png"))} == set(COLOURS)
