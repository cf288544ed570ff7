"""Publishing and using: from pictures to a prediction through the local Hub, each step as somebody else would take it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from conftest import COLOURS, colour_images
from hub_tools import client, content, in_one, pictures, training
from local_hub import local_hub

import mmft_hf  # noqa: F401 - makes the pipeline known

ROOT = Path(__file__).parent.parent
LORA = ["--vision_tower", "lora", "--text_tower", "lora"]


@pytest.fixture(scope="module")
def hub(clip_folder):
    with local_hub() as hub:
        hub.put("alice/clip", {path.name: path.read_bytes() for path in clip_folder.iterdir()})
        yield hub


@pytest.fixture(scope="module")
def alice(hub):
    with client(hub, "hf_alice", "alice") as alice:
        yield alice


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Captions made of class templates, of eight pictures of each colour."""
    folder = tmp_path_factory.mktemp("captions")
    out = folder / "captioned"
    in_one(
        "caption", "--captioner", "template", "--dataset_name", pictures(folder / "pictures", 8), "--output_dir", out
    )
    return out


@pytest.fixture(scope="module")
def published(hub, alice, captioned):
    """The captions at alice/captions; what was said."""
    code, said = alice.mmft("push", captioned, "--repo_id", "alice/captions")
    assert code == 0, said
    return said


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "one.png"
    colour_images(1, seed=5)[1][0].save(path)
    return path


@pytest.fixture(scope="module")
def runs(hub, published, tmp_path_factory):
    """Folders of a full and of a LoRA run on what the Hub has, pushed as alice/full and alice/lora; and the child."""
    folder = tmp_path_factory.mktemp("runs")
    with client(hub, "hf_alice", "training") as child:
        out = child.run(
            "import datasets\n"
            "data = datasets.load_dataset('alice/captions', split='train')\n"
            "out.update(rows=len(data), columns=data.column_names, names=data.features['label'].names, row=data[0]['captions'])"
        )
        assert (out["rows"], out["names"]) == (24, sorted(COLOURS)) and out["row"]
        assert {"image", "label", "captions", "caption_records", "image_sha256"} <= set(out["columns"])
        for name, towers in (("full", ()), ("lora", LORA)):
            code, said = child.mmft("finetune", *from_hub(name, folder), *towers)
            assert code == 0 and f"{hub.url}/alice/{name}/commit/" in said, said
        yield folder, child


def from_hub(name: str, folder: Path) -> list[str]:
    names = [
        "--dataset_name",
        "alice/captions",
        "--model_name_or_path",
        "alice/clip",
        "--output_dir",
        str(folder / name),
    ]
    # The last weights, so that what is pushed is not the untuned model.
    names += ["--load_best_model_at_end", "false"]
    return training(*names, "--push_to_hub", "true", "--hub_model_id", f"alice/{name}")


def predictions(folder: Path, picture: Path) -> list[dict]:
    return transformers.pipeline("mmft-image-classification", model=str(folder))(str(picture))


def test_from_the_hub_to_a_prediction(hub, runs, picture):
    """With an empty cache: our pipeline, stock transformers, the adapter with peft; the token is in none of it."""
    folder, child = runs
    for parts in ("adapter", "both"):
        code, said = child.mmft("push", folder / "lora", "--repo_id", f"alice/lora-{parts}", "--parts", parts)
        assert code == 0, said
    code = """
import transformers, mmft_hf, torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor
image = Image.open(args[0])
for name in ("full", "lora", "lora-both", "lora-adapter"):
    out[name] = transformers.pipeline("mmft-image-classification", model=f"alice/{name}")(args[0])
zero_shot = transformers.pipeline("zero-shot-image-classification", model="alice/lora")
out["stock"] = sorted(row["label"] for row in zero_shot(image, candidate_labels=["red", "green"]))
from peft import PeftModel
pixels = CLIPProcessor.from_pretrained("alice/lora")(images=image, return_tensors="pt")
def features(model):
    return model.eval().get_image_features(**pixels).pooler_output
base = CLIPModel.from_pretrained("alice/clip")
with torch.no_grad():
    merged, before = features(CLIPModel.from_pretrained("alice/lora")), features(base)
    tuned = PeftModel.from_pretrained(base, "alice/lora-adapter")
    both = PeftModel.from_pretrained(CLIPModel.from_pretrained("alice/clip"), "alice/lora-both", subfolder="adapter")
    out["differ"] = [(features(m) - merged).abs().max().item() for m in (tuned, both)]
    out["moved"] = (merged - before).abs().max().item()
"""
    with client(hub, None, "empty") as anybody:
        out = anybody.run(code, picture)
    for name in ("full", "lora", "lora-both", "lora-adapter"):
        expected = predictions(folder / name.split("-")[0], picture)
        assert [row["label"] for row in out[name]] == [row["label"] for row in expected]
        assert [row["score"] for row in out[name]] == pytest.approx([row["score"] for row in expected], abs=1e-6)
    assert out["stock"] == ["green", "red"]
    assert max(out["differ"]) < 1e-5 < out["moved"]
    files = {name: set(hub.files(f"alice/{name}")) for name in ("lora", "lora-both", "lora-adapter")}
    assert "adapter_model.safetensors" in files["lora-adapter"] and "model.safetensors" not in files["lora-adapter"]
    assert files["lora-both"] == files["lora"] | {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "towers"), [("full2", []), ("lora2", LORA)])
def test_two_processes(hub, published, picture, tmp_path, name, towers):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "recipes" / "finetune.py"), *from_hub(name, tmp_path), *towers]
    env = hub.environment("hf_alice", "training")
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("It is at") == 1, done.stdout
    (hub.folder / name).mkdir()
    for path, data in hub.files(f"alice/{name}").items():
        (hub.folder / name / path).write_bytes(data)
    assert predictions(hub.folder / name, picture) == predictions(tmp_path / name, picture)
