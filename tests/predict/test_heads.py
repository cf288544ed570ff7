"""Heads: one file for every kind, which says what it holds."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import colour_dataset

from mmft_hf import ClassPrototypes
from mmft_hf.core.errors import UserError
from mmft_hf.hub.publish import inference_code
from mmft_hf.predict.heads import HEADS, KernelHead, LinearHead, load_head

NAMES = ["red thing", "green thing", "blue thing"]


def linear(size=16, bias=True) -> LinearHead:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, size, generator=generator)
    return LinearHead(weight, NAMES, torch.randn(3, generator=generator) if bias else None, temperature=1.7)


def kernel(size=16, bias=True, top_k=None) -> KernelHead:
    generator = torch.Generator().manual_seed(1)
    keys = torch.nn.functional.normalize(torch.randn(9, size, generator=generator), dim=1)
    base, values = linear(size, bias), torch.randn(9, 3, generator=generator)
    return KernelHead(keys, values, base.weight, NAMES, 2.0, base.bias, top_k, temperature=1.3)


@pytest.mark.parametrize("top_k", [None, 2, 50])
def test_a_kernel_head_is_a_sum_over_its_keys(top_k, tmp_path):
    saved = kernel(top_k=top_k)
    saved.save_pretrained(tmp_path)
    read = load_head(tmp_path)
    images = torch.nn.functional.normalize(torch.randn(5, 16), dim=1)
    for x, found in zip(images, read.logits(images), strict=True):
        expected = saved.weight @ x + saved.bias
        similar = [
            (math.exp(-2 * (1 - float(k @ x))), v)
            for k, v in zip(saved.keys.float(), saved.values.float(), strict=True)
        ]
        for share, value in sorted(similar, key=lambda pair: -pair[0])[:top_k]:
            expected = expected + share * value
        torch.testing.assert_close(found, expected / 1.3)


def test_a_kernel_head_that_is_too_large_is_refused():
    with pytest.raises(UserError, match=r"at most 64 MB .* found 80 MB for 20,000 pictures and 1,000 classes"):
        KernelHead(
            torch.zeros(20_000, 1000),
            torch.zeros(20_000, 1000),
            torch.zeros(1000, 1000),
            [str(c) for c in range(1000)],
            1.0,
        )


def test_a_kind_is_the_name_it_is_listed_by():
    assert all(head.kind == kind for kind, head in HEADS.items())


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_head_is_saved_and_read_back(bias, tmp_path):
    saved = linear(bias=bias)
    saved.save_pretrained(tmp_path)
    read = load_head(tmp_path)
    assert isinstance(read, LinearHead) and (read.class_names, read.temperature) == (NAMES, 1.7)
    images = torch.nn.functional.normalize(torch.randn(5, 16), dim=1)
    expected = images @ saved.weight.T + (saved.bias if bias else 0)
    torch.testing.assert_close(read.logits(images), expected / 1.7)
    torch.testing.assert_close(read.scores(images).sum(1), torch.ones(5))
    assert [path.name for path in tmp_path.iterdir()] == ["head.safetensors"]


@pytest.mark.parametrize("bias", [True, False])
def test_the_published_formula_gives_the_logits(bias, clip):
    images = torch.nn.functional.normalize(torch.randn(5, clip[0].config.projection_dim), dim=1)
    size = images.shape[1]
    for head in (
        ClassPrototypes.from_templates(*clip, NAMES),
        linear(size, bias),
        kernel(size, bias),
        kernel(size, bias, 4),
    ):
        published: dict = {}
        exec(inference_code(head), published)
        torch.testing.assert_close(published["logits"](images, **vars(head)), head.logits(images))
        known = {"x": images, "torch": torch, **vars(head)}
        torch.testing.assert_close(eval(head.formula, known), head.raw_logits(images))


def test_prototypes_are_written_for_the_first_edition_too(clip, tmp_path):
    saved = ClassPrototypes.from_captions(*clip, colour_dataset(2))
    saved.save_pretrained(tmp_path)
    both = load_head(tmp_path)
    (tmp_path / "head.safetensors").unlink()
    old = load_head(tmp_path)
    assert isinstance(both, ClassPrototypes) and vars(both).keys() == vars(old).keys()
    for name, value in vars(saved).items():
        for read in (both, old):
            found = getattr(read, name)
            assert torch.equal(found, value) if name == "embeddings" else (found == value), name


def test_another_head_leaves_no_prototypes_behind(clip, tmp_path):
    ClassPrototypes.from_templates(*clip, NAMES).save_pretrained(tmp_path)
    linear().save_pretrained(tmp_path)
    assert isinstance(load_head(tmp_path), LinearHead)
    assert not (tmp_path / "prototypes.safetensors").exists()
    with pytest.raises(UserError, match="expected a head of kind prototypes, found 'linear'"):
        ClassPrototypes.from_pretrained(tmp_path)


def edited(folder, **metadata):
    """Writes the head of `folder` again, with other metadata."""
    path = linear().save_pretrained(folder)
    known = {"kind": "linear", "class_names": json.dumps(NAMES), "bias": "null", "temperature": "1.0"}
    content = {"weight": load_file(path)["weight"]}
    save_file(content, path, {k: v for k, v in (known | metadata).items() if v is not None})


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"kind": "oracle"}, "expected a head of kind kernel, prototypes, linear, found 'oracle'.*newer"),
        ({"threshold": "0.5"}, "found also threshold.*newer mmft_hf"),
        ({"class_names": None}, "damaged"),
        ({"class_names": "[red]"}, "damaged"),
    ],
)
def test_a_file_that_says_something_else_is_refused(metadata, message, tmp_path):
    edited(tmp_path)
    load_head(tmp_path)
    edited(tmp_path, **metadata)
    with pytest.raises(UserError, match=message):
        load_head(tmp_path)


def test_a_head_of_another_model_or_of_other_classes_is_refused(clip):
    model, _ = clip
    size = model.config.projection_dim
    linear(size).check_model(model, "here")
    with pytest.raises(UserError, match=rf"embedding size {size} .* found weight \(3, {size + 1}\)"):
        linear(size + 1).check_model(model, "here")
    model.config.id2label = {0: "red thing", 1: "blue thing", 2: "green thing"}
    with pytest.raises(UserError, match="the model's 3 classes red thing, blue thing, green thing, found 3 classes"):
        linear(size).check_model(model, "here")
