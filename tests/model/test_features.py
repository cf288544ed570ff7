"""Features of towers that do not change: a hit is what a fresh pass gives to the last bit, and nothing stale is ever read."""

import copy
import io
import json
import os
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from processes import run_python
from safetensors import safe_open
from tiny_clip import colour_dataset

from mmft_hf.core.errors import UserError
from mmft_hf.model import features as module
from mmft_hf.model.features import image_features, text_features

TEXTS = ["a photo of a red thing", "no", "a photo of a red thing", "x" * 200, "ünïcode 🎈"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFT_HF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def passes(monkeypatch):
    """How many batches each tower has encoded."""
    counts = {"images": 0, "texts": 0}

    def counting(kind, encode):
        def encoded(*args, **kwargs):
            counts[kind] += 1
            return encode(*args, **kwargs)

        return encoded

    monkeypatch.setattr(module, "encode_images", counting("images", module.encode_images))
    monkeypatch.setattr(module, "encode_texts", counting("texts", module.encode_texts))
    return counts


def stock(model, processor, images, texts):
    """Embeddings by the stock forward, padded to the model's 77 tokens."""
    inputs = processor.image_processor([image.convert("RGB") for image in images], return_tensors="pt")
    tokens = processor.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model.eval()(**inputs, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return outputs.image_embeds, outputs.text_embeds


def test_features_are_those_of_the_stock_forward_in_row_order(clip, folder):
    data = colour_dataset(3)
    embeds, labels = image_features(*clip, data, batch_size=4)
    texts = text_features(*clip, TEXTS, batch_size=2)
    expected_images, expected_texts = stock(*clip, data["image"], TEXTS)
    assert embeds.dtype == texts.dtype == torch.float32 and embeds.device.type == "cpu"
    assert (embeds - expected_images).abs().max() < 1e-6
    assert (texts - expected_texts).abs().max() < 1e-6
    assert (expected_images[0] - expected_images[1]).abs().max() > 1e-3  # they do differ
    assert labels.tolist() == data["label"]
    assert sorted(path.name.split("-")[0] for path in folder.iterdir()) == ["images", "texts"]
    assert {path.suffix for path in folder.iterdir()} == {".safetensors"}


def test_a_hit_encodes_nothing_and_has_the_same_bytes(clip, folder, passes):
    data = colour_dataset(3)
    first = image_features(*clip, data, batch_size=4)[0], text_features(*clip, TEXTS)
    assert passes == {"images": 3, "texts": 1}
    again = image_features(*clip, data, batch_size=4)[0], text_features(*clip, list(reversed(TEXTS))).flip(0)
    assert passes == {"images": 3, "texts": 1}
    for path in folder.iterdir():
        path.unlink()
    fresh = image_features(*clip, data, batch_size=4)[0], text_features(*clip, TEXTS)
    assert passes == {"images": 6, "texts": 2}
    for a, b, c in zip(first, again, fresh, strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes() == c.numpy().tobytes()


def test_the_embeddings_are_mapped_from_the_file(clip, folder):
    embeds, _ = image_features(*clip, colour_dataset(3))
    path = next(folder.iterdir())
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(path) in maps.read_text()
    assert len(embeds) == 9


def changed_weight(clip, tower):
    model = copy.deepcopy(clip[0])
    name = {"vision": "visual_projection.weight", "text": "text_projection.weight"}[tower]
    with torch.no_grad():
        model.get_parameter(name)[0, 0] += 1e-3
    return model, clip[1]


def changed_processor(clip):
    processor = copy.deepcopy(clip[1])
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    return clip[0], processor


def changed_limit(clip):
    processor = copy.deepcopy(clip[1])
    processor.tokenizer.model_max_length = 20
    return clip[0], processor


def as_files(data: Dataset, folder: Path) -> Dataset:
    """Writes the pictures to files and names them by their paths."""
    folder.mkdir()
    paths = []
    for row, image in enumerate(data["image"]):
        paths.append(str(folder / f"{row}.png"))
        image.save(paths[-1])
    features = Features({"image": Image(), "label": ClassLabel(names=data.features["label"].names)})
    return Dataset.from_dict({"image": paths, "label": data["label"]}, features=features)


def test_whatever_the_features_depend_on_is_in_the_key(clip, passes, tmp_path):
    data = colour_dataset(2)
    files = as_files(data, tmp_path / "files")
    pixels = np.asarray(data[3]["image"]).copy()
    pixels[0, 0, 0] ^= 1
    one_byte = [*data["image"][:3], PILImage.fromarray(pixels), *data["image"][4:]]
    changed = Dataset.from_dict({"image": one_byte, "label": data["label"]}, features=data.select_columns(["image", "label"]).features)  # fmt: skip
    image_features(*clip, data), image_features(*clip, files), text_features(*clip, TEXTS)
    passes.update(images=0, texts=0)
    # What does not count: labels and captions, the other tower, the names of classes.
    named = copy.deepcopy(clip[0])
    named.config.id2label = {0: "cat"}
    image_features(named, clip[1], data.remove_columns("captions"))
    image_features(*changed_weight(clip, "text"), data)
    text_features(*changed_weight(clip, "vision"), TEXTS)
    text_features(*changed_processor(clip), TEXTS)
    assert passes == {"images": 0, "texts": 0}
    # What counts.
    misses = [
        lambda: image_features(*changed_weight(clip, "vision"), data),
        lambda: image_features(*changed_processor(clip), data),
        lambda: image_features(*clip, changed),
        lambda: image_features(*clip, data.select([1, 0, *range(2, 6)])),
        lambda: image_features(*clip, data.select(range(5))),
        lambda: image_features(*clip, data, on_bad_image="skip"),
        lambda: image_features(*clip, data, autocast=torch.bfloat16),
    ]
    for n, miss in enumerate(misses, 1):
        miss()
        assert passes["images"] == n
    image_features(*clip, changed)
    image_features(*clip, files)
    assert passes["images"] == len(misses)  # the same pictures, in the table or in files
    pixels[0, 0, 0] ^= 2
    PILImage.fromarray(pixels).save(tmp_path / "files" / "3.png")  # the path is the same
    image_features(*clip, files)
    assert passes["images"] == len(misses) + 1
    text_features(*changed_weight(clip, "text"), TEXTS)
    text_features(*changed_limit(clip), TEXTS)
    text_features(*clip, [*TEXTS[:-1], "unicode"])
    text_features(*clip, TEXTS, autocast=torch.bfloat16)
    assert passes["texts"] == 4


@pytest.mark.parametrize("damage", ["truncated", "one bit", "empty", "no header"])
def test_a_damaged_file_is_made_again_and_said(clip, folder, passes, caplog, damage):
    data = colour_dataset(3)
    whole = image_features(*clip, data)[0].clone()
    path = next(folder.iterdir())
    content = bytearray(path.read_bytes())
    if damage == "one bit":
        content[-40] ^= 1
    path.unlink()  # not in place: the mapped pages would change, too
    path.write_bytes({"truncated": content[:-8], "empty": b"", "no header": b"\xff" * 64}.get(damage, bytes(content)))
    found = image_features(*clip, data)[0]
    assert passes["images"] == 2 and torch.equal(found, whole)
    assert "is damaged" in caplog.text and path.name in caplog.text
    caplog.clear()
    assert torch.equal(image_features(*clip, data)[0], whole)
    assert passes["images"] == 2 and not caplog.text


def test_a_disk_that_refuses_loses_the_cache_and_not_the_run(clip, folder, passes, caplog, monkeypatch):
    data = colour_dataset(3)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    embeds, _ = image_features(*clip, data)
    assert len(embeds) == 9 and "No space left on device" in caplog.text
    assert list(folder.iterdir()) == []
    monkeypatch.undo()
    # A file where the folder should be.
    monkeypatch.setenv("MMFT_HF_CACHE", str(folder / "not_a_folder"))
    (folder / "not_a_folder").write_text("")
    assert torch.equal(image_features(*clip, data)[0], embeds)
    assert "Nothing can be kept in" in caplog.text and "MMFT_HF_CACHE" in caplog.text


def test_an_unreadable_picture_has_no_label_or_ends_the_pass(clip, passes):
    good = io.BytesIO()
    colour_dataset(1)[0]["image"].save(good, "PNG")
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": good.getvalue(), "path": None}, {"bytes": b"no picture", "path": None}] * 2}
    data = Dataset.from_dict({**rows, "label": [1, 1, 0, 0]}, features=features)
    for n in (1, 1):  # made, and read
        embeds, labels = image_features(*clip, data, on_bad_image="skip")
        assert labels.tolist() == [1, -100, 0, -100] and embeds.isfinite().all() and passes["images"] == n
    # Other labels for the same pictures: nothing stale is told.
    other = Dataset.from_dict({**rows, "label": [0, 0, 0, 1]}, features=features)
    assert image_features(*clip, other, on_bad_image="skip")[1].tolist() == [0, -100, 0, -100] and passes["images"] == 1
    with pytest.raises(UserError, match="row 1 cannot be read"):
        image_features(*clip, data)


def test_the_model_is_left_in_the_mode_it_was_in(clip):
    clip[0].train()
    text_features(*clip, TEXTS)
    assert clip[0].training


def test_an_argument_moves_the_folder_and_its_default_is_under_the_hub_home(clip, tmp_path, monkeypatch, folder):
    text_features(*clip, TEXTS, folder=tmp_path / "elsewhere")
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1 and not folder.exists()
    from huggingface_hub import constants

    from mmft_hf.data.cache import cache_folder

    monkeypatch.delenv("MMFT_HF_CACHE")
    assert cache_folder("features") == Path(constants.HF_HOME) / "mmft_hf" / "features"


WORKER = textwrap.dedent(
    """
    import json, os, sys
    sys.path.insert(0, sys.argv[1])
    import torch
    import torch.distributed as dist
    from tiny_clip import build_clip, colour_dataset
    from safetensors.torch import load_file, save_file
    from mmft_hf.model import features
    from mmft_hf.model.features import image_features, text_features

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    texts = [f"text no {i}" for i in range(11)]
    counts = {"images": 0, "texts": 0}
    for name in counts:
        def encode(*args, _encode=getattr(features, f"encode_{name}"), _name=name, **kwargs):
            counts[_name] += 1
            return _encode(*args, **kwargs)
        setattr(features, f"encode_{name}", encode)
    model, processor = build_clip()

    def both():
        images, labels = image_features(model, processor, colour_dataset(4), batch_size=5, shard=True)  # 3 batches
        found = {"images": images, "labels": labels}
        return found | {"texts": text_features(model, processor, texts, batch_size=100, shard=True)}  # one batch

    once = both()
    made = dict(counts)
    again = both()
    hit = dict(counts)
    assert all(torch.equal(once[name], again[name]) for name in once)
    os.environ["MMFT_HF_CACHE"] = "/dev/null/none"  # nothing can be kept: all get the rows all the same
    lost = both()
    assert all(torch.equal(once[name], lost[name]) for name in once)
    # Only one of the machines has the files: all encode.
    os.environ["MMFT_HF_CACHE"] = sys.argv[2] + ("/cache" if rank == 0 else "/other")
    half = both()
    assert all(torch.equal(once[name], half[name]) for name in once)
    assert counts == {name: 3 * n for name, n in made.items()}, counts
    if rank:  # other weights in one process are no model
        with torch.no_grad():
            model.visual_projection.weight += 1
    try:
        image_features(model, processor, colour_dataset(1), shard=True)
        refused = ""
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    save_file(once, f"{sys.argv[2]}/rank{rank}.safetensors")
    with open(f"{sys.argv[2]}/rank{rank}.json", "w") as file:
        json.dump({"made": made, "hit": hit, "refused": refused}, file)
    dist.destroy_process_group()
    os._exit(0)  # without the end of the interpreter, in which threads of gloo may abort: see mmft_hf/launch.py
    """
)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_share_the_work_and_get_the_bits_of_one(tmp_path, clip):
    from safetensors.torch import load_file

    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    run_python([*command, Path(__file__).parent, tmp_path], MMFT_HF_CACHE=tmp_path / "cache")
    said = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [s["made"] for s in said] == [{"images": 2, "texts": 1}, {"images": 1, "texts": 0}]
    assert [s["hit"] for s in said] == [s["made"] for s in said]
    assert all("same model" in s["refused"] and s["refused"].startswith("UserError") for s in said)
    data = colour_dataset(4)
    os.environ["MMFT_HF_CACHE"] = str(tmp_path / "one")
    images, labels = image_features(*clip, data, batch_size=5)
    one = {"images": images, "labels": labels, "texts": text_features(*clip, [f"text no {i}" for i in range(11)], 100)}
    for rank in (0, 1):
        two = load_file(tmp_path / f"rank{rank}.safetensors")
        assert {n: v.numpy().tobytes() for n, v in one.items()} == {n: v.numpy().tobytes() for n, v in two.items()}
    # One process finds what two have made.
    names = {path.name for path in (tmp_path / "cache" / "features").iterdir()}
    assert {path.name for path in (tmp_path / "one" / "features").iterdir()} <= names
    for path in (tmp_path / "cache" / "features").iterdir():
        with safe_open(path, "pt") as file:
            assert file.metadata()["key"] in path.name


def test_a_kept_trunk_gives_the_embeddings_of_any_projection(clip, monkeypatch):
    data, forward = colour_dataset(3), type(clip[0].vision_model).forward
    first, labels = image_features(*clip, data, batch_size=4, trunk=True)
    assert (first - stock(*clip, data["image"], TEXTS)[0]).abs().max() < 1e-6 and labels.tolist() == data["label"]
    with torch.no_grad():
        clip[0].visual_projection.weight.copy_(clip[0].visual_projection.weight.flip(0) * torch.linspace(0.5, 2, 32))
    expected = stock(*clip, data["image"], TEXTS)[0]
    monkeypatch.setattr(type(clip[0].vision_model), "forward", lambda *args, **kwargs: pytest.fail("a second pass"))
    second, _ = image_features(*clip, data, batch_size=4, trunk=True)
    assert (second - expected).abs().max() < 1e-6 < (second - first).abs().max()
    monkeypatch.setattr(type(clip[0].vision_model), "forward", forward)
    # Nor is it taken for embeddings.
    assert (image_features(*clip, data, batch_size=4)[0] - expected).abs().max() < 1e-6
