"""Captioning as people run it: the command, a real server with a real model in it, the same model in this process."""

import hashlib
import json
from pathlib import Path

import pytest
from datasets import load_dataset
from processes import run_python
from tiny_clip import COLOURS, colour_images

from mmft_hf.cli import main

ROOT = Path(__file__).parents[2]
# The model writes random words: what would turn them down is off, so that there are texts to compare.
SETTINGS = ["--temperature", "0", "--max_tokens", "24", "--words", "10", "--aspects", "visual", "shape"]
SETTINGS += ["--on_check", "truncated=keep", "repetition=keep", "empty=keep"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with one subfolder per class, one picture of them twice, one that breaks off."""
    folder = tmp_path_factory.mktemp("data") / "colours"
    names = [name.replace(" ", "_") for name in COLOURS]
    for i, (image, label) in enumerate(colour_images(4)):
        (folder / names[label]).mkdir(parents=True, exist_ok=True)
        image.save(folder / names[label] / f"{i:02d}.png")
    whole = (folder / names[0] / "00.png").read_bytes()
    (folder / names[0] / "again.png").write_bytes(whole)
    (folder / names[0] / "broken.png").write_bytes(whole[: len(whole) // 2])
    return folder


def texts(folder: Path) -> dict[tuple[str, str, str], str]:
    """Text by picture, class and aspect."""
    data = load_dataset(str(folder), split="train")
    names = data.features["label"].names
    found = {}
    for row in data.select_columns(["label", "caption_records", "image_sha256"]):
        for record in row["caption_records"]:
            if record["text"]:
                found[row["image_sha256"], names[row["label"]], record["aspect"]] = record["text"]
    return found


@pytest.fixture(scope="module")
def in_process(pictures, vlm, tmp_path_factory):
    out = tmp_path_factory.mktemp("in_process") / "captioned"
    command = [
        "caption",
        "--captioner",
        "transformers",
        "--captioner_model",
        vlm,
        "--dataset_name",
        pictures,
        *SETTINGS,
    ]
    assert main([str(word) for word in (*command, "--output_dir", out)]) == 0
    return out


def test_a_model_in_this_process(in_process, pictures):
    found = texts(in_process)
    good = [path for path in pictures.rglob("*.png") if path.name not in ("broken.png", "again.png")]
    digests = {(hashlib.sha256(path.read_bytes()).hexdigest(), path.parent.name) for path in good}
    assert {key[:2] for key in found} == digests and len(found) == 2 * len(digests)
    data = load_dataset(str(in_process), split="train")
    assert len(data) == len(good) + 2
    broken = [row for row in data.select_columns(["captions", "caption_records"]) if not row["captions"]]
    assert [record["status"] for row in broken for record in row["caption_records"]] == ["bad_image"] * 2
    assert {record["model"] for row in data["caption_records"] for record in row if record["text"]} == {"tiny-vlm"}
    record = json.loads((in_process / "captions.json").read_text())
    assert record["complete"] and record["statuses"]["bad_image"] == 2
    assert str(pictures) not in (in_process / "captions.json").read_text()


@pytest.mark.slow
def test_the_same_model_behind_a_real_server(server, in_process, pictures, vlm, tmp_path, capsys):
    command = ["caption", "--captioner", "openai", "--captioner_model", vlm, "--base_url", server, *SETTINGS]
    command = [str(word) for word in (*command, "--dataset_name", pictures, "--output_dir", tmp_path / "out")]
    assert main(command) == 0
    assert texts(tmp_path / "out") == texts(in_process)
    assert "24 calls answered of 24 tried" in capsys.readouterr().out  # twelve distinct pictures, two aspects
    assert main(command) == 0
    assert "Nothing to do" in capsys.readouterr().out
    page = (tmp_path / "out" / "captions.html").read_text()
    assert "data:image" in page and "<script" not in page


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_share_the_pictures(in_process, pictures, vlm, tmp_path):
    out = tmp_path / "out"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    command += [ROOT / "recipes" / "caption.py", "--captioner", "transformers", "--captioner_model", vlm, *SETTINGS]
    command += ["--dataset_name", pictures, "--output_dir", out]
    printed, _ = run_python(command)
    assert texts(out) == texts(in_process)
    assert len(list((out / "journal").glob("journal-*.sqlite"))) == 2
    assert not list((out / "journal").glob("*.done"))
    assert printed.count("For example") == 1


def test_captions_that_are_made_are_trained_on(in_process, clip_folder, tmp_path, capsys):
    command = ["finetune", "--dataset_name", in_process, "--model_name_or_path", clip_folder, "--max_steps", 1]
    command += ["--per_device_train_batch_size", 4, "--on_bad_image", "skip", "--use_cpu", "true"]
    assert main([str(word) for word in (*command, "--output_dir", tmp_path / "run")]) == 0
    assert "per training image" in capsys.readouterr().out
    assert (tmp_path / "run" / "head.safetensors").is_file()
