"""Class prototypes against plain loops, and their bounds."""

import pytest
import torch
from plain_prototypes import encode_one_by_one, naive_caption_prototypes
from tiny_clip import colour_dataset

from mmft_hf import ClassPrototypes
from mmft_hf.core.errors import UserError
from mmft_hf.data.images import read_image
from mmft_hf.model import features
from mmft_hf.model.loading import encode_images


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_captions_equal_a_plain_loop_whatever_the_batch(clip, batch_size):
    dataset = colour_dataset(3)
    found = ClassPrototypes.from_captions(*clip, dataset, "a drawing of a {}.", batch_size)
    expected = naive_caption_prototypes(*clip, dataset, "a drawing of a {}.")
    torch.testing.assert_close(found.embeddings, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.embeddings.norm(dim=1), torch.ones(3))


def test_a_caption_counts_once_for_each_image_that_has_it(clip):
    dataset = colour_dataset(2).select(range(4)).remove_columns("captions")
    dataset = dataset.add_column("captions", [["dark"], ["x"], ["y"], ["dark", "dark", "bright and shining"]])
    found = ClassPrototypes.from_captions(*clip, dataset)
    expected = naive_caption_prototypes(*clip, dataset, "a photo of a {}.")
    torch.testing.assert_close(found.embeddings, expected, atol=1e-5, rtol=0)


def test_equal_texts_are_encoded_once_in_batches_of_bounded_size(clip, monkeypatch):
    dataset = colour_dataset(20).remove_columns("captions")
    dataset = dataset.add_column("captions", [["same", f"text {i % 7}"] for i in range(60)])
    sizes = []
    encode = features.encode_texts

    def counting(model, input_ids, attention_mask):
        sizes.append(len(input_ids))
        return encode(model, input_ids, attention_mask)

    monkeypatch.setattr(features, "encode_texts", counting)
    ClassPrototypes.from_captions(*clip, dataset, batch_size=4)
    assert max(sizes) == 4
    assert sum(sizes) == 3 * (1 + 7)


def test_a_class_without_captions_falls_back_to_the_template(clip):
    dataset = colour_dataset(2).remove_columns("captions")
    dataset = dataset.add_column("captions", [["only red"] if i % 3 == 0 else [" "] for i in range(6)])
    found = ClassPrototypes.from_captions(*clip, dataset)
    assert found.fallback_classes == ("green thing", "blue thing")
    templates = ClassPrototypes.from_templates(*clip, found.class_names)
    torch.testing.assert_close(found.embeddings[1:], templates.embeddings[1:])
    assert not torch.allclose(found.embeddings[0], templates.embeddings[0])


def test_without_any_captions_the_source_is_the_template(clip):
    found = ClassPrototypes.from_captions(*clip, colour_dataset(2, captions=False))
    assert (found.source, found.fallback_classes) == ("template", ())


def test_several_templates_are_averaged_after_normalising(clip):
    found = ClassPrototypes.from_templates(*clip, ["cat", "old_dog"], ["a {}", "one {} here"])
    with torch.no_grad():
        for row, name in enumerate(("cat", "old dog")):
            embeds = encode_one_by_one(*clip, [f"a {name}", f"one {name} here"])
            mean = torch.nn.functional.normalize(embeds, dim=1).mean(0)
            torch.testing.assert_close(found.embeddings[row], mean / mean.norm(), atol=1e-5, rtol=0)
    assert found.source == "templates"


def test_images_equal_a_plain_loop(clip):
    model, processor = clip
    dataset = colour_dataset(3)
    found = ClassPrototypes.from_images(model, processor, dataset, batch_size=4)
    with torch.no_grad():
        for c in range(3):
            pictures = [read_image(row["image"]) for row in dataset if row["label"] == c]
            embeds = [
                encode_images(model, processor.image_processor(p, return_tensors="pt")["pixel_values"])
                for p in pictures
            ]
            mean = torch.cat(embeds).mean(0)
            torch.testing.assert_close(found.embeddings[c], mean / mean.norm(), atol=1e-5, rtol=0)


def test_saved_and_read_back(clip, tmp_path):
    saved = ClassPrototypes.from_captions(*clip, colour_dataset(2))
    saved.save_pretrained(tmp_path)
    read = ClassPrototypes.from_pretrained(tmp_path)
    assert torch.equal(read.embeddings, saved.embeddings)
    assert {k: v for k, v in vars(read).items() if k != "embeddings"} == {
        k: v for k, v in vars(saved).items() if k != "embeddings"
    }


def test_the_trained_logit_scale_travels_with_them(clip, tmp_path):
    model, processor = clip
    model.logit_scale.data.fill_(3.3)
    ClassPrototypes.from_templates(model, processor, ["a", "b"]).save_pretrained(tmp_path)
    assert ClassPrototypes.from_pretrained(tmp_path).logit_scale == pytest.approx(torch.tensor(3.3).exp().item())


def test_a_folder_without_prototypes_is_named(tmp_path):
    with pytest.raises(UserError, match=r"prototypes\.safetensors.*mmft-hf finetune"):
        ClassPrototypes.from_pretrained(tmp_path)
