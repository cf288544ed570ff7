"""Projections from one regression: against independent solvers, and on data where aligned towers know what random ones do not."""

import json

import numpy as np
import pytest
import tiny_encoders
import torch
import torch.nn.functional as F
import transformers as hf
from sklearn.linear_model import Ridge
from tiny_clip import COLOURS, colour_dataset
from torch import nn

from mmft_hf import ClassPrototypes, load_model
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.model.align import (
    align_towers,
    classifier_rows,
    cosines,
    from_class_rows,
    from_pairs,
    ridge_regression,
)
from mmft_hf.model.combine import combine_towers
from mmft_hf.model.features import image_features
from mmft_hf.predict.classifier import ImageClassifier
from mmft_hf.predict.evaluation import classify

STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- the solution --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "width"), [(40, 6), (5, 12)])
def test_the_regression_is_that_of_scikit_learn_and_of_least_squares(n, width):
    inputs, targets, ridge = random(n, width), random(n, 4, seed=1), 0.3
    found = ridge_regression(inputs, targets, ridge)
    penalty = ridge * inputs.square().sum().item() / width  # of the sum of squared errors
    theirs = Ridge(alpha=penalty, fit_intercept=False).fit(inputs.numpy(), targets.numpy()).coef_.T
    np.testing.assert_allclose(found.numpy(), theirs, atol=1e-6)
    # The penalty as further rows of an ordinary least-squares problem.
    rows = np.vstack([inputs.numpy(), penalty**0.5 * np.eye(width)])
    theirs = np.linalg.lstsq(rows, np.vstack([targets.numpy(), np.zeros((width, 4))]), rcond=None)[0]
    np.testing.assert_allclose(found.numpy(), theirs, atol=1e-6)
    again = ridge_regression(1000 * inputs, targets, ridge)  # the ridge has no unit
    torch.testing.assert_close(1000 * again, found)


def test_pairs_map_pictures_to_their_texts():
    images, texts = random(50, 9), random(50, 5, seed=1)
    found = from_pairs(images, texts, 0.1)
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (images.numpy(), texts.numpy()))
    theirs = Ridge(alpha=0.1 * (x**2).sum() / 9, fit_intercept=False).fit(x, y).coef_
    np.testing.assert_allclose(found.vision.numpy(), theirs, atol=1e-6)
    np.testing.assert_allclose(found.text.numpy(), np.eye(5))


@pytest.mark.parametrize(("width", "words"), [(9, 5), (5, 9)])
def test_class_rows_order_pictures_as_the_regression_does(width, words):
    rows, texts = random(30, width), random(30, words, seed=1)
    found = from_class_rows(rows, texts, 0.1)
    y, x = (
        rows.numpy() - rows.numpy().mean(axis=0),
        texts.numpy() / np.linalg.norm(texts.numpy(), axis=1, keepdims=True),
    )
    theirs = Ridge(alpha=0.1 * (x**2).sum() / words, fit_intercept=False).fit(x, y).coef_
    np.testing.assert_allclose((found.vision.T @ found.text).numpy(), theirs, atol=1e-6)
    assert len(found.vision) == len(found.text) == min(width, words)
    images, new = random(7, width, seed=2), random(4, words, seed=3)
    mapped = new.numpy() @ theirs.T
    scores = images.numpy() @ (mapped / np.linalg.norm(mapped, axis=1, keepdims=True)).T
    expected = scores / np.linalg.norm(images.numpy() @ found.vision.numpy().T, axis=1, keepdims=True)
    np.testing.assert_allclose(cosines(found, images, new).numpy(), expected, atol=1e-6)


# -- towers --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """An image classifier of three colours, and a sentence encoder, as folders."""
    vision, text = tmp_path_factory.mktemp("resnet"), tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    names = dict(enumerate(["red thing, crimson", "green thing", "blue thing"]))
    model = hf.ResNetForImageClassification(hf.ResNetConfig(**STAGES, id2label=names, image_size=32))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    processor = hf.ViTImageProcessor(size={"height": 32, "width": 32})
    data, features = colour_dataset(8, seed=5), []
    for image in data["image"]:
        with torch.no_grad():
            pixels = processor(image, return_tensors="pt")["pixel_values"]
            features.append(model.eval().resnet(pixel_values=pixels).pooler_output.flatten())
    solved = Ridge(alpha=1e-4).fit(
        torch.stack(features).numpy(), np.eye(3)[data["label"]]
    )  # trained, if not by descent
    model.classifier[1].weight.data = torch.tensor(solved.coef_, dtype=torch.float32)
    model.classifier[1].bias.data = torch.tensor(solved.intercept_, dtype=torch.float32)
    model.save_pretrained(vision)
    processor.save_pretrained(vision)
    tokenizer = tiny_encoders.word_pieces()
    hf.BertModel(hf.BertConfig(**tiny_encoders.text(tokenizer))).save_pretrained(text)
    tokenizer.save_pretrained(text)
    modules = [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
    (text / "modules.json").write_text(json.dumps(modules))
    (text / "1_Pooling").mkdir()
    (text / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    return vision, text


def zero_shot(model, processor) -> float:
    head = ClassPrototypes.from_templates(model, processor, list(COLOURS), "a photo of a {}.")
    data = colour_dataset(6, seed=9, captions=False)
    return classify(ImageClassifier(model, processor, head), data, progress=False).report()["accuracy"]


@pytest.mark.parametrize("source", ["captions", "templates", "class rows"])
def test_aligned_towers_know_classes_and_random_projections_do_not(source, towers):
    model, processor, notes = combine_towers(*towers)
    assert model.config.text_pooling == "mean" and "takes the mean of the tokens" in notes[0]
    features, labels = image_features(model, processor, data := colour_dataset(6, seed=9, captions=False))
    chance = []
    for seed in range(30):
        torch.manual_seed(seed)
        guesses = features @ F.normalize(torch.randn(3, features.shape[1]), dim=1).T
        chance.append((guesses.argmax(dim=1) == labels).double().mean().item())
    assert np.mean(chance) == pytest.approx(1 / 3, abs=0.1)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = classifier_rows(towers[0]) if source == "class rows" else None
    train = colour_dataset(8, captions=source == "captions")
    found = align_towers(model, processor, train, class_rows=rows)
    assert found.pictures == 6 and found.targets == (3 if rows else 24)
    assert zero_shot(model, processor) > 0.9
    assert found.accuracy > 0.9
    moved = {
        name for name, value in model.state_dict().items() if name not in before or not torch.equal(value, before[name])
    }
    assert moved <= {"visual_projection.weight", "text_projection.weight", "logit_scale"}
    again = combine_towers(*towers)[0]
    assert align_towers(again, processor, train, class_rows=rows) == found  # seeded
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert len(data) == 18


def test_towers_of_another_kind_and_too_few_pictures_are_refused(towers, clip):
    with pytest.raises(UserError, match=r"expected a model of two towers, found a CLIPModel\. Use combine_towers"):
        align_towers(*clip, colour_dataset(4))
    model, processor, _ = combine_towers(*towers)
    with pytest.raises(
        UserError, match=r"dataset_name: expected two classes or more with at least two training pictures"
    ):
        align_towers(model, processor, colour_dataset(1))
    for parameter in model.vision_model.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(
        UserError, match=r"vision_model: expected an image tower whose outputs are finite and not all zero"
    ):
        align_towers(model, processor, colour_dataset(4))


def test_rows_of_what_is_no_classifier_are_refused(towers, tmp_path):
    names, rows = classifier_rows(towers[0])
    assert names[0] == "red thing, crimson" and rows.shape == (3, 16)
    hf.AutoModel.from_pretrained(towers[0]).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"class_rows true: .* found no trained classifier"):
        classifier_rows(tmp_path / "bare")
    with pytest.raises(UserError, match=r"class_rows true: expected an image classifier"):
        classifier_rows(towers[1])
    hf.ViTForImageClassification(hf.ViTConfig(**tiny_encoders.VISION)).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match=r"on the tower's pooled output, found a ViTForImageClassification"):
        classifier_rows(tmp_path / "vit")
    numbers = hf.ResNetForImageClassification(hf.ResNetConfig(**STAGES, num_labels=4, image_size=32))
    numbers.save_pretrained(tmp_path / "numbers")
    with pytest.raises(UserError, match=r"id2label\), found only numbers"):
        classifier_rows(tmp_path / "numbers")


# -- the command line ----------------------------------------------------------------------------------------------------


def test_from_two_folders_to_a_classifier(towers, data_folder, tmp_path, capsys):
    out = tmp_path / "aligned"
    words = ["--vision_model", str(towers[0]), "--text_model", str(towers[1]), "--dataset_name", str(data_folder)]
    assert main(["align", *words, "--output_dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "24 training pictures and their texts" in printed and "text vector   mean" in printed
    assert f"mmft-hf finetune --model_name_or_path {out}" in printed
    assert json.loads((out / "config.json").read_text())["text_pooling"] == "mean"
    assert zero_shot(*load_model(str(out))) > 0.9
    assert main(["align", *words, "--output_dir", str(out), "--class_rows", "true"]) == 0  # over the first
    assert "the names and weights of 3 classes" in capsys.readouterr().out

    run = tmp_path / "run"
    words = f"--model_name_or_path {out} --dataset_name {data_folder} --output_dir {run} --use_cpu true --num_train_epochs 1"
    assert main(["finetune", *words.split(), "--vision_tower", "lora", "--text_tower", "frozen"]) == 0
    assert main(["evaluate", "--model_name_or_path", str(run), "--dataset_name", str(data_folder)]) == 0
    capsys.readouterr()
    assert main(["predict", str(run / "predictions_test.png"), "--model_name_or_path", str(run)]) == 0
    assert "thing" in capsys.readouterr().out
    assert main(["align", *words.split()[2:4], "--vision_model", str(towers[0]), "--text_model", str(towers[1]), "--output_dir", str(run)]) == 2  # fmt: skip
    assert "expected a new folder, or one with a model alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--text_model", "TEXT"], "--vision_model: expected a Hub id or a folder, found none"),
        (["--vision_model", "VISION"], "--text_model: expected a Hub id or a folder, found none"),
        (["--vision_model", "TEXT", "--text_model", "TEXT"], "expected a model of pictures, found a BertModel"),
        (["--vision_model", "VISION", "--text_model", "VISION"], "expected a model of texts, found a ResNetModel"),
        (["--vision_model", "VISION", "--text_model", "TEXT", "--text_pooling", "max"], "invalid choice: 'max'"),
        (["--vision_model", "VISION", "--text_model", "TEXT", "--seed", "-1"], "--seed: expected 0 or more, found -1"),
        (
            ["--vision_model", "nowhere/at/all", "--text_model", "TEXT"],
            "type --vision_model facebook/convnext-tiny-224",
        ),
    ],
)
def test_bad_towers_end_with_what_to_type(words, said, towers, data_folder, tmp_path, capsys):
    words = [{"VISION": str(towers[0]), "TEXT": str(towers[1])}.get(word, word) for word in words]
    code = main(["align", *words, "--dataset_name", str(data_folder), "--output_dir", str(tmp_path / "out")])
    assert (code, (tmp_path / "out").exists()) == (2, False)
    assert said in capsys.readouterr().err
