"""Pictures decoded once and kept smaller: near the picture, never stale, never half-written, and off unless asked for."""

import copy
import io
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from tiny_clip import colour_dataset
from torch.utils.data import DataLoader
from training import make_trainer, weights

from mmft_hf import MMFTConfig, MMFTDataCollator
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.data import cache
from mmft_hf.data.cache import DecodedPictures
from mmft_hf.data.images import BadImage, read_image
from mmft_hf.data.views import ImageView, TextView, TrainingView


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFT_HF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pictures"


def picture(width=90, height=60, seed=0, **options) -> dict:
    """A smooth picture as an undecoded `datasets.Image` holds it."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(small).resize((width, height), PILImage.Resampling.BICUBIC).save(buffer, "PNG", **options)
    return {"bytes": buffer.getvalue(), "path": None}


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("size", "expected"), [((90, 60), (48, 32)), ((60, 91), (32, 49)), ((500, 40), (400, 32))])
def test_the_short_side_is_what_was_asked_for(size, expected, folder):
    source = picture(*size)
    pictures = DecodedPictures(32)
    for found in (pictures.read(source), pictures.read(source)):  # made, and read
        assert found.size == expected and found.mode == "RGB"
        wanted = read_image(source).resize(expected, PILImage.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(found), np.asarray(wanted))
    assert len(files(folder)) == 1


def test_a_small_picture_is_kept_as_it_is(folder):
    source = picture(40, 20)
    for found in (DecodedPictures(32).read(source), DecodedPictures(32).read(source)):
        assert np.array_equal(np.asarray(found), np.asarray(read_image(source)))


def test_what_is_read_again_is_upright_and_laid_on_white(folder):
    exif = PILImage.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    buffer = io.BytesIO()
    PILImage.new("RGBA", (20, 10), (0, 0, 0, 0)).save(buffer, "PNG", exif=exif)
    source = {"bytes": buffer.getvalue(), "path": None}
    for _ in range(2):
        found = DecodedPictures(32).read(source)
        assert found.size == (10, 20) and found.getpixel((0, 0)) == (255, 255, 255)


def test_a_hit_decodes_nothing_and_other_bytes_are_another_picture(folder, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(picture()["bytes"])
    source = {"bytes": None, "path": str(path)}
    first = np.asarray(DecodedPictures(32).read(source))
    reads = []
    monkeypatch.setattr(cache, "read_image", lambda content: reads.append(1) or read_image(content))
    assert np.array_equal(np.asarray(DecodedPictures(32).read(source)), first)
    assert np.array_equal(np.asarray(DecodedPictures(32).read(picture())), first)  # the same bytes, elsewhere
    assert not reads
    path.write_bytes(picture(seed=1)["bytes"])  # the same path
    assert not np.array_equal(np.asarray(DecodedPictures(32).read(source)), first) and len(reads) == 1
    DecodedPictures(48).read(source)
    assert len(reads) == 2 and len(files(folder)) == 3


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "another size"])
def test_a_damaged_entry_is_made_again_and_said(folder, caplog, damage):
    source = picture()
    whole = np.asarray(DecodedPictures(32).read(source))
    path = files(folder)[0]
    content = bytearray(path.read_bytes())
    if damage == "one bit":
        content[-300] ^= 1
    if damage == "another size":  # a whole file of numpy, as an older make might have left
        buffer = io.BytesIO()
        np.save(buffer, np.zeros((3, 3)))
        content = buffer.getvalue()
    path.write_bytes({"truncated": content[:-100], "empty": b""}.get(damage, bytes(content)))
    assert np.array_equal(np.asarray(DecodedPictures(32).read(source)), whole)
    assert "is damaged" in caplog.text and path.name in caplog.text
    caplog.clear()
    assert np.array_equal(np.asarray(DecodedPictures(32).read(source)), whole) and not caplog.text


def test_a_bad_picture_is_bad_every_time(folder):
    for source in ({"bytes": b"no picture", "path": None}, {"bytes": None, "path": "nowhere.png"}, None):
        for _ in range(2):
            with pytest.raises(BadImage):
                DecodedPictures(32).read(source)
    assert not files(folder)


def test_a_disk_that_refuses_loses_the_cache_and_not_the_run(folder, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MMFT_HF_CACHE", str(tmp_path / "file"))
    for _ in range(3):
        assert DecodedPictures(32).read(picture()).size == (48, 32)
    assert caplog.text.count("Nothing can be kept in") == 1


def read_all(folder: str, barrier, found) -> None:
    os.environ["MMFT_HF_CACHE"] = folder
    pictures = DecodedPictures(32)
    barrier.wait()
    found.put([np.asarray(pictures.read(picture(seed=seed))).tobytes() for seed in range(40)])


def test_several_processes_write_at_once(tmp_path, folder):
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(3), context.Queue()
    processes = [context.Process(target=read_all, args=(str(tmp_path / "cache"), barrier, found)) for _ in range(3)]
    for process in processes:
        process.start()
    results = [found.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert results[0] == results[1] == results[2]
    assert len(files(folder)) == 40 and all(path.suffix == ".npy" for path in files(folder))


def test_training_reads_them_and_evaluation_does_not(clip, tmp_path, folder):
    big = [PILImage.fromarray(np.asarray(image)).resize((60, 80)) for image in colour_dataset(8)["image"]]
    data = Dataset.from_dict({**colour_dataset(8)[:], "image": big}, features=colour_dataset(8).features)
    assert TrainingView(data, TextView(["a", "b", "c"], "{}"), short_side=20)[0]["image"].size == (20, 27)
    assert ImageView(data)[0]["image"].size == (60, 80)
    settings = {"num_train_epochs": 1, "eval_on_start": False, "load_best_model_at_end": False, "save_strategy": "no"}
    found = []
    for short_side in (None, 20, 20):
        trainer = make_trainer(copy.deepcopy(clip), tmp_path / "out", data, decode_cache=short_side, **settings)
        trainer.train()
        found.append(weights(trainer.model))
    assert len(files(folder)) == 24
    assert all(torch.equal(found[1][name], found[2][name]) for name in found[1])
    assert not all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_workers_share_it(clip, folder):
    view = TrainingView(colour_dataset(8), TextView(["a", "b", "c"], "{}"), short_side=18)
    loader = DataLoader(view, batch_size=4, num_workers=2, collate_fn=MMFTDataCollator(clip[1]))
    first, second = ([batch["pixel_values"] for batch in loader] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(files(folder)) == 24


@pytest.mark.parametrize("value", ["0", "-5"])
def test_a_size_below_one_is_refused(value):
    with pytest.raises(UserError, match=f"decode_cache: expected 1 or more, found {value}"):
        MMFTConfig(output_dir="out", decode_cache=int(value))


def test_a_size_below_the_models_input_is_refused(clip, tmp_path):
    with pytest.raises(UserError, match=r"decode_cache: expected at least 16.*found 15"):
        make_trainer(clip, tmp_path, decode_cache=15)
    make_trainer(clip, tmp_path, decode_cache=16)


def test_the_run_says_that_it_was_on(clip_folder, data_folder, tmp_path, capsys):
    settings = f"--model_name_or_path {clip_folder} --dataset_name {data_folder} --output_dir {tmp_path / 'out'}"
    settings += " --max_steps 1 --use_cpu true --decode_cache 18"
    assert main(["finetune", *settings.split()]) == 0
    record = json.loads((tmp_path / "out" / "mmft.json").read_text())
    assert record["identity"]["other_settings"]["decode_cache"] == 18
    capsys.readouterr()
    assert (
        main(["finetune", *settings.replace(" --decode_cache 18", "").split(), "--resume_from_checkpoint", "true"]) == 2
    )
    assert "other_settings" in capsys.readouterr().err


def test_env_says_where_it_is_and_how_large(tmp_path, folder, capsys):
    DecodedPictures(32).read(picture())
    assert main(["env"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("cache:"))
    assert str(tmp_path / "cache") in line and "0.0 MB" in line
    (tmp_path / "cache" / "more").write_bytes(bytes(2_500_000))
    assert main(["env"]) == 0 and "(2.5 MB; it may be deleted" in capsys.readouterr().out


def test_labels_and_captions_are_those_of_the_row(folder):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    data = Dataset.from_dict({"image": [picture(seed=s) for s in range(2)], "label": [1, 0]}, features=features)
    view = TrainingView(data, TextView(["a", "b"], "{}"), short_side=32, crop_min_area=1)
    assert [view[row]["label"] for row in (0, 1)] == [1, 0] and [view[row]["text"] for row in (0, 1)] == ["b", "a"]
