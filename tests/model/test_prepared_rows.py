"""Pictures become pixels one by one as they are read: the same pixels, and never a batch of pictures in full size."""

import weakref

import numpy as np
import pytest
import tiny_encoders
import torch
from data_tools import with_bad_picture
from PIL import Image as PILImage
from tiny_clip import COLOURS, colour_dataset
from torch.utils.data import DataLoader

from mmft_hf import MMFTConfig, MMFTTrainer
from mmft_hf.data import views
from mmft_hf.data.images import read_image
from mmft_hf.data.sampling import IGNORED, PADDING
from mmft_hf.data.views import ImageView, TextView, TrainingView
from mmft_hf.model.collator import MMFTDataCollator, PreparedRows
from mmft_hf.model.features import image_features
from mmft_hf.predict import classifier as classifiers
from mmft_hf.predict.classifier import ImageClassifier
from mmft_hf.predict.evaluation import classify
from mmft_hf.predict.heads import ClassPrototypes

NAMES = list(COLOURS)


@pytest.mark.parametrize("kind", tiny_encoders.KINDS)
def test_pixels_are_those_of_the_processor_on_a_list_of_pictures(kind):
    _, processor = tiny_encoders.KINDS[kind]()
    data = colour_dataset(3)
    view = ImageView(data)
    expected = processor.image_processor([row["image"] for row in data], return_tensors="pt")["pixel_values"]
    collator = MMFTDataCollator(processor)
    for rows in (view, PreparedRows(view, collator)):
        (batch,) = DataLoader(rows, len(view), collate_fn=collator)
        assert torch.equal(batch["pixel_values"], expected)
        assert batch["labels"].tolist() == data["label"][:]


def test_crops_padding_and_unreadable_rows_are_the_same_prepared_or_not(clip):
    _, processor = clip
    view = TrainingView(with_bad_picture(2), TextView(NAMES, "a {}.", seed=1), 0.5, "skip")
    collator = MMFTDataCollator(processor)
    keys = [0, 2, 5, PADDING, len(view) + 1]
    plain = collator([view[key] for key in keys])
    prepared = [PreparedRows(view, collator)[key] for key in keys]
    assert all("image" not in row and row["pixel_values"].shape == (3, 16, 16) for row in prepared)
    for name, values in collator(prepared).items():
        assert torch.equal(values, plain[name]), name
    # An oracle for the crop: cut out by hand, then resized.
    row = view[0]
    left, top, right, bottom = row["box"]
    crop = row["image"].resize((16, 16), PILImage.Resampling.BICUBIC, box=(left, top, right, bottom))
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255
    assert torch.allclose(plain["pixel_values"][0], (pixels - mean) / std, atol=1e-5)
    evaluation = collator([PreparedRows(ImageView(with_bad_picture(2), "skip"), collator)[2]])
    assert evaluation["labels"].tolist() == [IGNORED] and evaluation["skipped"].tolist() == [1]


def test_a_collator_of_another_class_gets_pictures(clip):
    class Own(MMFTDataCollator):
        pass

    view = ImageView(colour_dataset(1))
    assert PreparedRows.of(view, Own(clip[1])) is view
    assert PreparedRows.of(view, lambda rows: rows) is view
    assert "pixel_values" in PreparedRows.of(view, MMFTDataCollator(clip[1]))[0]


@pytest.fixture
def alive(monkeypatch):
    """The largest number of pictures that were alive at once, of those that were read."""
    living, most = weakref.WeakValueDictionary(), [0]

    def counted(source):
        picture = read_image(source)
        living[id(picture)] = picture
        most[0] = max(most[0], len(living))
        return picture

    for module in (views, classifiers):
        monkeypatch.setattr(module, "read_image", counted)
    return most


@pytest.mark.parametrize("way", ["evaluate", "features", "predict", "train"])
def test_no_batch_of_full_pictures_is_ever_held(way, clip, alive, tmp_path, monkeypatch):
    monkeypatch.setenv("MMFT_HF_CACHE", str(tmp_path))
    model, processor = clip
    data = colour_dataset(8)
    classifier = ImageClassifier(model, processor, ClassPrototypes.from_templates(model, processor, NAMES, "a {}."))
    if way == "evaluate":
        classify(classifier, data, batch_size=24, progress=False)
    elif way == "features":
        image_features(model, processor, data, 24)
    elif way == "predict":
        classifier.predict([row["image"] for row in data], batch_size=24)
    else:
        config = MMFTConfig(
            str(tmp_path), use_cpu=True, disable_tqdm=True, report_to=[], max_steps=1, per_device_train_batch_size=24
        )
        MMFTTrainer(model, config, data, data, processor).train()
    assert 1 <= alive[0] <= 2
