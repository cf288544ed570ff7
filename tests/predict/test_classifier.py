"""`ImageClassifier`: pixels to logits, the same numbers from the pipeline, the command line and the folder of a Trainer."""

import importlib
import json
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image as PILImage
from tiny_clip import COLOURS, colour_dataset
from transformers import pipeline

from mmft_hf import ClassPrototypes, ImageClassifier, MMFTConfig, MMFTTrainer
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.data.images import BadImage
from mmft_hf.model.loading import encode_images
from mmft_hf.predict import heads
from mmft_hf.predict.heads import Head, KernelHead, LinearHead
from mmft_hf.train import pushes

NAMES = list(COLOURS)


@pytest.fixture
def classifier(clip) -> ImageClassifier:
    return ImageClassifier(*clip, ClassPrototypes.from_captions(*clip, colour_dataset(2))).eval()


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    data = colour_dataset(2, seed=3, captions=False)
    for i, row in enumerate(data):
        row["image"].save(tmp_path / f"{i}.png")
    return [str(tmp_path / f"{i}.png") for i in range(len(data))]


@torch.no_grad()
def test_one_module_from_pixels_to_logits(classifier, pictures):
    pixels = classifier.preprocess(pictures)
    logits = classifier(pixels)
    assert logits.shape == (6, 3)
    assert torch.equal(logits, classifier.head.logits(encode_images(classifier.model, pixels)))


def test_predict_takes_one_picture_or_many_and_names_a_bad_one(classifier, pictures, tmp_path):
    many = classifier.predict(pictures, top_k=2, batch_size=4)
    assert [len(found) for found in many] == [2] * 6
    for i in (0, 5):
        one = classifier.predict(pictures[i], top_k=2)
        assert [found["label"] for found in one] == [found["label"] for found in many[i]]
        assert [found["score"] for found in one] == pytest.approx([found["score"] for found in many[i]], abs=1e-6)
    everything = classifier.predict(pictures[0], top_k=99)
    assert {found["label"] for found in everything} == set(NAMES)
    assert sum(found["score"] for found in everything) == pytest.approx(1)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(BadImage):
        classifier.predict(tmp_path / "bad.png")


def test_the_folder_of_a_trainer_predicts(clip, tmp_path, pictures):
    model, processor = clip
    config = MMFTConfig(str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, num_train_epochs=1)
    data = colour_dataset(4)
    trainer = MMFTTrainer(model, config, data, processing_class=processor)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))

    loaded = ImageClassifier.from_pretrained(tmp_path / "saved")
    assert loaded.class_names == NAMES == list(loaded.model.config.id2label.values())
    expected = ImageClassifier(model, processor, ClassPrototypes.from_captions(model, processor, data)).predict(
        pictures
    )
    from_pipeline = pipeline("mmft-image-classification", model=str(tmp_path / "saved"))(pictures)
    for other in (loaded.predict(pictures), from_pipeline):
        assert [[p["label"] for p in row] for row in other] == [[p["label"] for p in row] for row in expected]
        for found, wanted in zip(other, expected, strict=True):
            assert [p["score"] for p in found] == pytest.approx([p["score"] for p in wanted], abs=1e-5)

    # A head of other classes, put into that folder from Python, is refused by everything that reads it.
    ClassPrototypes.from_templates(model, processor, ["cat", "dog", "cow"]).save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="expected a head for the model's 3 classes red thing"):
        ImageClassifier.from_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="expected a head for the model's 3 classes red thing"):
        pipeline("mmft-image-classification", model=str(tmp_path / "saved"))


def test_what_the_trainer_publishes_is_the_folder_that_it_saves(clip, tmp_path, monkeypatch):
    model, processor = clip
    config = MMFTConfig(str(tmp_path / "run"), use_cpu=True, disable_tqdm=True)
    trainer = MMFTTrainer(model, config, colour_dataset(2), processing_class=processor)
    pushed = {}
    monkeypatch.setattr(pushes, "push_files", lambda files, *args, **kwargs: pushed.update(files))
    trainer.hub_model_id, trainer.push_in_progress = "somebody/colours", None
    trainer.push_to_hub()
    trainer.save_model(str(tmp_path / "saved"))
    saved = {path.name: path for path in (tmp_path / "saved").iterdir()}
    assert pushed.keys() - saved.keys() == {"mmft.json"} and not saved.keys() - pushed.keys()
    assert json.loads(pushed["config.json"].read_text())["id2label"] == {str(i): name for i, name in enumerate(NAMES)}
    heads_of = [ClassPrototypes.from_file(files["head.safetensors"]) for files in (pushed, saved)]
    assert heads_of[0].embeddings.equal(heads_of[1].embeddings) and heads_of[0].class_names == NAMES


TOY = '''
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mmft_hf.predict.heads.base import Head


@dataclass
class NearestMean(Head):
    """Minus the squared distance to each class's mean image embedding."""

    kind: ClassVar[str] = "nearest-mean"

    means: Tensor
    class_names: list[str]

    def raw_logits(self, image_embeds):
        return -10 * torch.cdist(image_embeds, self.means.to(image_embeds.device)) ** 2
'''


@pytest.fixture
def nearest_mean(tmp_path, monkeypatch):
    """A new kind of head: one file, and one entry in the table of kinds."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "nearest_mean.py").write_text(textwrap.dedent(TOY))
    monkeypatch.syspath_prepend(tmp_path / "plugins")
    module = importlib.import_module("nearest_mean")
    monkeypatch.setitem(heads.HEADS, "nearest-mean", module.NearestMean)
    yield module.NearestMean
    del sys.modules["nearest_mean"]


@pytest.mark.parametrize("kind", ["nearest-mean", "linear"])
def test_any_head_is_saved_loaded_and_used_everywhere(
    kind, nearest_mean, clip, data_folder, pictures, tmp_path, capsys
):
    model, processor = clip
    train = load_dataset("parquet", data_files=str(data_folder / "train.parquet"), split="train")
    means = ClassPrototypes.from_images(model, processor, train)
    head = nearest_mean(means.embeddings, NAMES) if kind == "nearest-mean" else LinearHead.from_prototypes(means)
    folder = tmp_path / "saved"
    ImageClassifier(model, processor, head).save_pretrained(folder)

    loaded = ImageClassifier.from_pretrained(folder)
    assert loaded.head.kind == kind
    pixels = loaded.preprocess(pictures)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels), head.logits(encode_images(model, pixels)))
    expected = loaded.predict(pictures[0])
    found = pipeline("mmft-image-classification", model=str(folder))(pictures[0])
    assert [(p["label"], pytest.approx(p["score"], abs=1e-6)) for p in found] == [tuple(p.values()) for p in expected]

    report = tmp_path / "report"
    names = ["--model_name_or_path", str(folder), "--dataset_name", str(data_folder), "--output_dir", str(report)]
    assert main(["evaluate", *names]) == 0
    assert f"{kind} head" in capsys.readouterr().out
    assert json.loads((report / "report.json").read_text())["accuracy"] == 1.0
    assert main(["predict", pictures[0], "--model_name_or_path", str(folder), "--top_k", "1"]) == 0
    assert f"{expected[0]['label']} {expected[0]['score']:.1%}" in capsys.readouterr().out


def test_what_is_no_tensor_of_pixels_names_predict(clip):
    classifier = ImageClassifier(*clip, ClassPrototypes.from_templates(*clip, list(COLOURS), "a {}."))
    for wrong in (PILImage.new("RGB", (4, 4)), "cat.jpg", np.zeros((1, 3, 16, 16)), torch.zeros(3, 16, 16)):
        with pytest.raises(
            UserError, match=r"expected pixels \(B, 3, height, width\), found .*classifier.predict\(…\)"
        ):
            classifier(wrong)
    for wrong, start in (
        ("no/such.jpg", r"no/such.jpg: expected a picture, found no such file"),
        (b"x", r"bytes: expected a picture \(JPEG, .*\), found a file of none of these formats"),
    ):
        with pytest.raises(BadImage, match=rf"^{start}. Type the path of a picture"):
            classifier.predict(wrong)


# -- as a graph --------------------------------------------------------------------------------------------------------
def head_of(name: str, clip) -> Head:
    """A head for the tiny CLIP; `kernel-2` counts the two nearest keys alone."""
    if name == "prototypes":
        return ClassPrototypes.from_captions(*clip, colour_dataset(2))
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 32, generator=generator), torch.randn(3, generator=generator)
    if name == "linear":
        return LinearHead(weight, NAMES, bias)
    keys = torch.nn.functional.normalize(torch.randn(9, 32, generator=generator), dim=1)
    top_k = 2 if name == "kernel-2" else None
    return KernelHead(keys, torch.randn(9, 3, generator=generator), weight, NAMES, 2.0, bias, top_k)


KINDS = ("prototypes", "linear", "kernel", "kernel-2")


def test_every_kind_of_head_is_among_these():
    assert {name.removesuffix("-2") for name in KINDS} == heads.HEADS.keys()


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [pytest.param(kind, marks=() if kind == "kernel" else pytest.mark.slow) for kind in KINDS]
)
def test_traced_and_exported_it_gives_the_same_numbers(clip, pictures, name):
    """Also for another number of pictures than the one that it was traced with."""
    classifier = ImageClassifier(*clip, replace(head_of(name, clip), temperature=1.7)).eval()
    pixels = classifier.preprocess(pictures)
    expected = classifier(pixels)
    traced = torch.jit.trace(classifier, (pixels[:2],))
    exported = torch.export.export(
        classifier, (pixels[:2],), dynamic_shapes=({0: torch.export.Dim("B", min=1, max=64)},)
    )
    for graph in (traced, exported.module()):
        torch.testing.assert_close(graph(pixels), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(graph(pixels[3:4]), expected[3:4], atol=1e-5, rtol=0)
