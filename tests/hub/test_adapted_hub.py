"""An AdaptedCLIP through the local Hub: what is published, who needs the caption encoder, and the image tower alone."""

import json

import pytest
import transformers
from card_tools import snippets
from hub_tools import client, in_one, pictures, training
from local_hub import local_hub
from processes import run_python
from tiny_clip import colour_images
from tiny_trunks import WORDS, save_llama, word_tokenizer

import mmft_hf
from mmft_hf.hub.publish import model_files

pytestmark = pytest.mark.slow
NAMES = ["a large green thing", "small red cat"]


@pytest.fixture(scope="module")
def hub(clip_folder, tmp_path_factory):
    trunk = save_llama(tmp_path_factory.mktemp("trunk") / "llama", tokenizer=word_tokenizer([*WORDS, "thing"]))
    (trunk / "README.md").write_text("---\nlicense: llama3.2\n---\n# A language model\n")
    with local_hub() as hub:
        for name, folder in (("clip", clip_folder), ("llama", trunk)):
            hub.put(f"alice/{name}", {path.name: path.read_bytes() for path in folder.iterdir()})
        yield hub


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    """A run on models of the Hub, pushed as alice/adapted."""
    place = tmp_path_factory.mktemp("runs")
    words = ["--model_name_or_path", "alice/clip", "--text_trunk", "alice/llama", "--head", "prototypes"]
    words += ["--dataset_name", str(pictures(place / "data", 6)), "--load_best_model_at_end", "false"]
    words += ["--output_dir", str(place / "run"), "--push_to_hub", "true", "--hub_model_id", "alice/adapted"]
    with client(hub, "hf_alice", "alice") as alice:
        code, said = alice.mmft("finetune", *training(*words))
        assert code == 0 and "/alice/adapted/commit/" in said, said
        for parts, name in (("vision", "tower"), ("adapter", "adapter")):
            code, said = alice.mmft("push", place / "run", "--repo_id", f"alice/{name}", "--parts", parts)
            assert (code, "expected the adapter of a LoRA run" in said) == (
                (0, False) if parts == "vision" else (2, True)
            ), said
    colour_images(1, seed=5)[1][0].save(place / "picture.png")
    return place


def test_what_is_published(hub, run):
    files = hub.files("alice/adapted")
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "text_trunk/caption_encoder.json"} <= set(
        files
    )
    assert not any("llama" in name or "tokenizer" in name for name in files)
    trunk = json.loads(files["text_trunk/caption_encoder.json"])
    assert (trunk["base"], trunk["license"], trunk["parameters"]) == ("alice/llama", "llama3.2", 34608)
    card = files["README.md"].decode()
    assert (
        "[alice/llama](https://huggingface.co/alice/llama), which was frozen: 34,608 parameters, licence `llama3.2`."
        in card
    )
    # The weights of the LLM are nowhere.
    assert len(files["model.safetensors"]) < 300_000
    assert "/tmp" not in card and str(run) not in files["mmft.json"].decode() + files["config.json"].decode()


def test_a_local_trunk_is_published_without_its_path(run):
    record = run / "run" / "text_trunk" / "caption_encoder.json"
    before = record.read_text()
    record.write_text(json.dumps(json.loads(before) | {"base": str(run / "data")}))
    try:
        published = json.loads(model_files(run / "run", "alice/x")["text_trunk/caption_encoder.json"])
    finally:
        record.write_text(before)
    assert published["base"] == "data"


def test_somebody_else_predicts_and_only_new_names_fetch_the_language_model(hub, run):
    code = """
import sys, transformers, mmft_hf
out["found"] = transformers.pipeline("mmft-image-classification", model="alice/adapted")(args[0])
out["modules"] = [name for name in sys.modules if "caption_encoder" in name or "models.llama" in name]
"""
    before = len(hub.requests("llama"))
    with client(hub, None, "bob") as bob:
        out = bob.run(code, run / "picture.png", *NAMES)
        asked = len(hub.requests("llama"))
        answer = bob.run(
            "out['code'], out['said'] = mmft('predict', args[0], '--model_name_or_path', 'alice/adapted', '--classes', *args[1:])",
            run / "picture.png",
            *NAMES,
        )
    assert asked == before < len(hub.requests("llama"))
    expected = transformers.pipeline("mmft-image-classification", model=str(run / "run"))(str(run / "picture.png"))
    assert [one["label"] for one in out["found"]] == [one["label"] for one in expected]
    assert [one["score"] for one in out["found"]] == pytest.approx([one["score"] for one in expected], abs=1e-6)
    assert out["modules"] == []
    out = answer
    assert out["code"] == 0 and "caption encoder alice/llama (34,608 parameters) to encode 2 texts" in out["said"], out[
        "said"
    ]
    assert all(name in out["said"] for name in NAMES)


def test_new_names_without_a_network_say_what_they_need(hub, run):
    """A cache that has the model alone, and no Hub."""
    with client(hub, None, "carol") as carol:
        carol.run("import mmft_hf; mmft_hf.ImageClassifier.from_pretrained('alice/adapted')")
    with client(hub, None, "carol", HF_HUB_OFFLINE="1") as carol:
        command = ("predict", run / "picture.png", "--model_name_or_path", "alice/adapted")
        assert carol.mmft(*command)[0] == 0
        code, said = carol.mmft(*command, "--classes", *NAMES)
    assert code == 2 and "text_trunk/caption_encoder.json" in said and "classified without it" in said, said


def test_pushes_during_a_training_have_no_local_path(hub, run, tmp_path):
    trunk = save_llama(tmp_path / "secret" / "llama", tokenizer=word_tokenizer([*WORDS, "thing"]))
    words = ["--model_name_or_path", "alice/clip", "--text_trunk", str(trunk), "--head", "prototypes"]
    words += ["--dataset_name", str(run / "data"), "--output_dir", str(tmp_path / "run")]
    words += ["--push_to_hub", "true", "--hub_model_id", "alice/during", "--hub_strategy", "checkpoint"]
    with client(hub, "hf_alice", "alice") as alice:
        code, said = alice.mmft("finetune", *training(*words, "--hub_always_push", "true"))
        assert code == 0, said
    seen = set()
    for commit in hub.commits("alice/during"):
        for name, content in hub.files("alice/during", commit.sha).items():
            if name.endswith(".json") and "trainer_state" not in name:
                assert b"secret" not in content, name
                seen.add(name)
    assert {"text_trunk/caption_encoder.json", "last-checkpoint/text_trunk/caption_encoder.json"} <= seen


ALONE = """
import sys
sys.modules["mmft_hf"] = None  # an import of it fails
"""


def test_the_image_tower_alone_opens_without_this_library(hub, run, tmp_path):
    files = hub.files("alice/tower")
    assert json.loads(files["config.json"])["architectures"] == ["CLIPVisionModelWithProjection"]
    assert "text_trunk/caption_encoder.json" not in files and "head.safetensors" in files
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    stock, info = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    classifier = mmft_hf.ImageClassifier.from_pretrained(run / "run")
    pixels = classifier.preprocess([run / "picture.png"])
    found = stock(pixel_values=pixels).image_embeds
    expected = classifier.model.get_image_features(pixels).pooler_output
    assert (found - expected).abs().max() < 1e-6

    (snippet,) = snippets(files["README.md"].decode())
    assert 'CLIPVisionModelWithProjection.from_pretrained("alice/tower")' in snippet and "mmft_hf" not in snippet
    out, _ = run_python(["-c", ALONE + snippet], **hub.environment(None, "dave"), inherit=False)
    best = mmft_hf.ImageClassifier.from_pretrained(run / "run").predict(run / "run" / "predictions_test.png", top_k=3)
    assert [line.rsplit(" ", 1)[0] for line in out.splitlines()] == [one["label"] for one in best]
    assert [float(line.rsplit(" ", 1)[1]) for line in out.splitlines()] == pytest.approx(
        [one["score"] for one in best], abs=2e-3
    )


def test_the_image_tower_of_a_plain_clip_with_the_code_for_its_pipeline(clip, run, tmp_path, data_folder):
    """`--parts vision` is for any run on a CLIP; its pipeline then needs transformers alone."""
    words = ["--dataset_name", str(data_folder), "--output_dir", str(tmp_path / "run"), "--head", "prototypes"]
    clip[0].save_pretrained(tmp_path / "clip")
    clip[1].save_pretrained(tmp_path / "clip")
    in_one("finetune", *training(*words, "--model_name_or_path", str(tmp_path / "clip")))
    files = model_files(tmp_path / "run", "alice/x", parts="vision", with_inference_code=True)
    (tmp_path / "tower").mkdir()
    for name, content in files.items():
        (tmp_path / "tower" / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    assert "tokenizer.json" not in files and "processor_config.json" not in files
    code = ALONE + (
        "import json, transformers\n"
        "found = transformers.pipeline('image-classification', model=sys.argv[1], trust_remote_code=True)(sys.argv[2])\n"
        "print(json.dumps(found))"
    )
    out, _ = run_python(["-c", code, tmp_path / "tower", run / "picture.png"])
    expected = mmft_hf.ImageClassifier.from_pretrained(tmp_path / "run").predict(run / "picture.png")
    assert json.loads(out.splitlines()[-1]) == [
        {"label": one["label"], "score": pytest.approx(one["score"], abs=1e-6)} for one in expected
    ]
