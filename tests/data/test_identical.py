"""Identical pictures across splits and with two labels: found by their bytes, said once by finetune and evaluate."""

import io
import shutil

import pytest
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from tiny_clip import COLOURS, colour_images

from mmft_hf.cli import main
from mmft_hf.data import identical
from mmft_hf.data.identical import find_identical

NAMES = list(COLOURS)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("RGB", (8 + number % 7, 8 + number // 7), (number, 255 - number, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(*pictures: tuple[int | None, int]) -> Dataset:
    """Rows of `(number of the picture, label)`; None is a picture without bytes and without a file."""
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    images = [{"bytes": None if n is None else png(n), "path": f"/x/{NAMES[c][:3]}/{n}.png"} for n, c in pictures]
    return Dataset.from_dict({"image": images, "label": [label for _, label in pictures]}, features=features)


def test_every_kind_of_identity():
    found = find_identical(
        {
            "train": rows((1, 0), (2, 0), (3, 1), (2, 0), (None, 0)),
            "validation": rows((4, 0), (2, 0), (None, 1)),
            "test": rows((2, 2), (2, 0), (5, 1), (4, 0), (5, 1), (6, 1), (6, 2)),
        }
    )
    assert found.across == [
        {"splits": ["train", "validation"], "images": ["red/2.png", "red/2.png"]},
        {"splits": ["train", "test"], "images": ["red/2.png", "blu/2.png"]},
        {"splits": ["train", "test"], "images": ["red/2.png", "red/2.png"]},
        {"splits": ["validation", "test"], "images": ["red/4.png", "red/4.png"]},
    ]
    assert found.labels == [
        {"labels": ["red thing", "blue thing"], "images": ["red/2.png", "blu/2.png"]},
        {"labels": ["green thing", "blue thing"], "images": ["gre/6.png", "blu/6.png"]},
    ]
    across, labels = found.notes()
    assert across == (
        "Identical pictures in several splits: 1 of validation in train too; 2 of test in train too; 1 of test in validation too, "
        "such as red/2.png (red/2.png). Metrics on them say nothing about new pictures."
    )
    assert labels == (
        "Identical pictures with different labels: 2 pictures, such as red/2.png (red thing) and blu/2.png (blue thing). At most one "
        "of the labels is right."
    )


def test_different_pictures_are_not_mentioned_and_hardly_read(tmp_path, monkeypatch):
    files = []
    for number in range(30):
        (tmp_path / f"{number}.png").write_bytes(png(number) + b"\0" * number * 100)  # no two of one size
        files.append(str(tmp_path / f"{number}.png"))
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    data = Dataset.from_dict({"image": [*files, files[3]], "label": [0] * 31}, features=features)
    hashed = []
    real = identical.content_hash
    monkeypatch.setattr(identical, "content_hash", lambda image: hashed.append(image["path"]) or real(image))
    assert find_identical({"train": data.select(range(20)), "test": data.select(range(20, 30))}).notes() == []
    assert hashed == []
    (note,) = find_identical({"train": data.select(range(20)), "test": data.select(range(20, 31))}).notes()
    assert "1 of test in train too" in note and sorted(hashed) == [files[3]] * 2


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """Folders of pictures; two of train are in test too, one of them with another label."""
    folder = tmp_path_factory.mktemp("leaky")
    for seed, (split, per_class) in enumerate((("train", 6), ("validation", 3), ("test", 3))):
        for number, (image, label) in enumerate(colour_images(per_class, seed)):
            path = folder / split / NAMES[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    first = (folder / "train" / NAMES[0] / "0.png").read_bytes()
    (folder / "test" / NAMES[0] / "copy.png").write_bytes(first)
    (folder / "test" / NAMES[1] / "copy.png").write_bytes(first)
    return folder


def test_finetune_and_evaluate_say_it_in_one_line_each(leaky, clip_folder, tmp_path, capsys):
    out = str(tmp_path / "out")
    settings = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--use_cpu", "true", "--disable_tqdm", "true"]
    command = ["finetune", "--model_name_or_path", str(clip_folder), "--dataset_name", str(leaky), "--output_dir", out]
    assert main([*command, *settings]) == 0
    both = (
        "Identical pictures in several splits: 2 of test in train too, such as green thing/copy.png (red thing/0.png).",
        "Identical pictures with different labels: 1 picture, such as red thing/0.png (red thing) and green thing/copy.png (green",
    )
    found = capsys.readouterr().out
    assert all(found.count(f"Note: {words}") == 1 for words in both), found
    assert main(["evaluate", "--model_name_or_path", out, "--dataset_name", str(leaky)]) == 0
    found = capsys.readouterr().out
    assert all(found.count(f"Note: {words}") == 1 for words in both), found
    command = ["evaluate", "--model_name_or_path", out, "--dataset_name", str(leaky)]
    assert main([*command, "--test_split", "validation"]) == 0
    assert "Identical" not in capsys.readouterr().out
    assert main([*command, "--test_split", "train"]) == 0
    assert "Identical" not in capsys.readouterr().out
    other = shutil.copytree(leaky, tmp_path / "other")  # it trains on a class that the model does not know
    shutil.copytree(other / "train" / NAMES[0], other / "train" / "mauve thing")
    assert main(["evaluate", "--model_name_or_path", out, "--dataset_name", str(other)]) == 0
    found = capsys.readouterr().out
    assert found.count("Note: Identical pictures in the training split were not looked for. ") == 1 and "mauve" in found
    assert f"Note: {both[0]}" not in found and found.count("Note: Identical pictures with different labels: 1") == 1
