"""Base models as the Hub has them: safetensors, the Hub's conversion of a pickle, or a pickle alone.

What a conversion holds differs from the pickle here, so that it shows which of them was read: by the logit scale.
"""

import io
import json
import math

import pytest
import torch
from hub_tools import client, pictures, training
from local_hub import local_hub
from safetensors.torch import save
from tiny_clip import COLOURS, colour_images

import mmft_hf

PLAIN, CONVERTED, PICKLED = 2.0, 3.0, 4.0
SCALE = """
import warnings, mmft_hf, logging, io
said = io.StringIO()
handler = logging.StreamHandler(said)
logging.getLogger("mmft_hf").addHandler(handler)
try:
    model, _ = mmft_hf.load_model(args[0], args[1] or None, allow_pickle=args[2] == "True")
    weights = model.mmft_weights.record()
    out.update(scale=model.logit_scale.item(), weights=weights, name=model.name_or_path)
except mmft_hf.core.errors.UserError as error:
    out["refused"] = str(error)
logging.getLogger("mmft_hf").removeHandler(handler)
out["said"] = said.getvalue()
"""
CLASSIFY = """
import transformers, mmft_hf
try:
    kwargs = {"model_kwargs": {"allow_pickle": True}} if args[2] == "True" else {}
    classify = transformers.pipeline("mmft-image-classification", model=args[0], **kwargs)
    out.update(answers=classify(args[1]), scale=classify.model.logit_scale.item())
except Exception as error:
    out.update(refused=str(error), kind=type(error).__name__)
"""


@pytest.fixture(scope="module")
def files(clip_folder):
    """Everything but weights; and a function that makes weights with some logit scale, as safetensors or a pickle."""
    others = {p.name: p.read_bytes() for p in clip_folder.iterdir() if p.suffix != ".safetensors"}
    state = mmft_hf.load_model(clip_folder)[0].state_dict()

    def weights(scale: float, pickle: bool = False) -> bytes:
        tensors = {**state, "logit_scale": torch.tensor(scale)}
        if not pickle:
            return save({name: value.contiguous() for name, value in tensors.items()}, {"format": "pt"})
        torch.save(tensors, target := io.BytesIO())
        return target.getvalue()

    return others, weights


@pytest.fixture(scope="module")
def hub(files):
    others, weights = files
    pickle = {"pytorch_model.bin": weights(PICKLED, pickle=True)}
    with local_hub() as hub:
        hub.put("alice/plain", {**others, **pickle, "model.safetensors": weights(PLAIN)})
        for name in ("converted", "moved", "sharded", "pickle", "stranger", "titled", "closed", "stale"):
            hub.put(f"alice/{name}", {**others, **pickle})
        hub.put("alice/private", {**others, **pickle}, private=True)
        safetensors = {"model.safetensors": weights(CONVERTED)}
        for name in ("converted", "moved", "stale"):
            hub.convert(f"alice/{name}", safetensors)
        hub.convert("alice/private", safetensors, "alice")
        hub.convert("alice/stranger", safetensors, "mallory")
        hub.convert("alice/titled", safetensors, title="Better weights")
        hub.convert("alice/closed", safetensors)
        hub.repo("alice/closed").discussions[0]["status"] = "closed"
        hub.put("alice/moved", {"README.md": b"# Moved\n"})  # main goes on, its weights stay
        hub.put("alice/stale", {"pytorch_model.bin": weights(9.0, pickle=True)})  # main has other weights now
        half = {"model-1-of-1.safetensors": weights(CONVERTED)}
        index = {
            "metadata": {},
            "weight_map": dict.fromkeys(mmft_hf.load_model()[0].state_dict(), "model-1-of-1.safetensors"),
        }
        hub.convert("alice/sharded", {**half, "model.safetensors.index.json": json.dumps(index).encode()})
        hub.put("alice/index", {**others, "part.bin": pickle["pytorch_model.bin"]})
        index = {"metadata": {}, "weight_map": {"logit_scale": "part.bin"}}
        hub.put("alice/index", {"model.safetensors.index.json": json.dumps(index).encode()})
        yield hub


@pytest.fixture(scope="module")
def alice(hub):
    with client(hub, "hf_alice", "alice") as alice:
        yield alice


def load(alice, name, revision="", allow=False) -> dict:
    return alice.run(SCALE, f"alice/{name}", revision, allow)


@pytest.mark.slow
def test_safetensors_on_the_main_branch(hub, alice):
    out = load(alice, "plain", allow=True)
    assert out["scale"] == PLAIN and out["said"] == "" and out["name"] == "alice/plain"
    commit = hub.commits("alice/plain")[0].sha
    assert out["weights"] == {"commit": commit, "converted": None, "reference": None, "pickled": False}
    assert not hub.requests("/api/models/alice/plain/discussions|/alice/plain/resolve/.*bin")


@pytest.mark.parametrize("name", ["converted", "moved", "sharded", "private"])
@pytest.mark.parametrize("allow", [False, True])
def test_the_conversion_of_the_hub_comes_before_a_pickle(hub, alice, name, allow):
    out = load(alice, name, allow=allow)
    assert out.get("scale") == CONVERTED, out
    converted = hub.commits(f"alice/{name}", "refs/pr/1")[0].sha
    main = hub.commits(f"alice/{name}")[0].sha
    assert out["weights"] == {"commit": main, "converted": converted, "reference": "refs/pr/1", "pickled": False}
    if not allow:  # it is said once
        assert f"the Hub's own conversion, refs/pr/1, commit {converted}" in out["said"]
    assert not hub.requests(f"/alice/{name}/resolve/.*bin"), "no pickle is downloaded"
    assert not hub.outside(), "nobody is asked to convert anything"


@pytest.mark.parametrize("name", ["pickle", "stranger", "titled", "closed", "stale"])
def test_a_pickle_alone_is_refused_or_allowed(hub, alice, name):
    """Also where the pull request is of somebody else, of another title, closed, or of another pickle."""
    out = load(alice, name)
    assert (
        "found only a pickle" in out["refused"] and "the Hub has no conversion of it to safetensors" in out["refused"]
    )
    assert "type allow_pickle true" in out["refused"]
    assert not hub.requests(f"/alice/{name}/resolve/.*bin")
    out = load(alice, name, allow=True)
    assert out["scale"] == (9.0 if name == "stale" else PICKLED) and "weights_only=True" in out["said"]
    assert out["weights"]["pickled"] and out["weights"]["converted"] is None
    assert not hub.outside()


def test_an_index_that_names_a_pickle(hub, alice):
    out = load(alice, "index")
    assert "found only a pickle (model.safetensors.index.json)" in out["refused"], out
    assert not hub.requests("/alice/index/resolve/.*bin")


def test_another_revision_than_main(hub, alice):
    """The conversion of an older commit's pickle; and the pull request itself as the revision."""
    old = hub.commits("alice/stale")[1].sha
    out = load(alice, "stale", old)
    assert out.get("scale") == CONVERTED and out["weights"]["commit"] == old
    out = load(alice, "converted", "refs/pr/1")
    assert out.get("scale") == CONVERTED and out["weights"]["converted"] is None


@pytest.mark.slow
def test_the_conversion_is_pinned_and_found_without_a_network(hub, alice, files):
    others, weights = files
    hub.put("alice/pinned", {**others, "pytorch_model.bin": weights(PICKLED, pickle=True)})
    hub.convert("alice/pinned", {"model.safetensors": weights(CONVERTED)})
    first = load(alice, "pinned")
    hub.put("alice/pinned", {"model.safetensors": weights(7.0)}, revision="refs/pr/1")
    again = load(alice, "pinned")
    assert again["scale"] == first["scale"] == CONVERTED and again["weights"] == first["weights"]
    load(alice, "plain"), load(alice, "pickle", allow=True)  # now they are in the cache
    before = len(hub.log)
    with client(hub, None, "alice", HF_HUB_OFFLINE="1") as offline:
        assert load(offline, "pinned")["weights"] == first["weights"]
        assert load(offline, "plain")["scale"] == PLAIN
        assert "found only a pickle" in load(offline, "pickle")["refused"]
        assert load(offline, "pickle", allow=True)["scale"] == PICKLED
    assert len(hub.log) == before
    with client(hub, None, "nothing", HF_HUB_OFFLINE="1") as offline:
        assert "alice/converted" in load(offline, "converted")["refused"]


def test_the_hub_fails_when_it_is_asked_for_a_conversion(hub, alice, files):
    others, weights = files
    hub.put("alice/asked", {**others, "pytorch_model.bin": weights(PICKLED, pickle=True)})
    hub.rules = [{"match": "GET /api/models/alice/asked/discussions", "do": 500}]
    out = load(alice, "asked")
    hub.rules = []
    assert "the Hub could not be asked for a conversion" in out["refused"], out


@pytest.mark.slow
def test_a_run_its_adapter_and_the_pipeline(hub, alice, files, tmp_path):
    """LoRA on a converted base, whose name is all that the adapter has; a classifier that has only a pickle."""
    others, weights = files
    data, out = pictures(tmp_path / "data", 8), tmp_path / "out"
    words = ["finetune", "--dataset_name", data, "--model_name_or_path", "alice/converted", "--output_dir", out]
    lora = ["--vision_tower", "lora", "--text_tower", "lora", "--load_best_model_at_end", "false"]
    code, said = alice.mmft(*words, *lora, *training())
    assert code == 0, said
    converted = hub.commits("alice/converted", "refs/pr/1")[0].sha
    record = json.loads((out / "mmft.json").read_text())
    assert record["base_model_weights"]["converted"] == converted
    assert record["identity"]["base_model_revision"] is None
    assert (
        f"the Hub's own conversion to safetensors, `refs/pr/1`, commit `{converted}`" in (out / "README.md").read_text()
    )
    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("alice/converted", converted)

    picture = tmp_path / "one.png"
    colour_images(1, seed=5)[1][0].save(picture)
    expected = mmft_hf.ImageClassifier.from_pretrained(out).predict(picture)
    code, said = alice.mmft("push", out, "--repo_id", "alice/adapter", "--parts", "adapter")
    assert code == 0, said
    assert "model.safetensors" not in hub.files("alice/adapter")
    found = alice.run(CLASSIFY, "alice/adapter", picture, False)
    assert [row["label"] for row in found.get("answers", ())] == [row["label"] for row in expected], found
    assert [row["score"] for row in found["answers"]] == pytest.approx([row["score"] for row in expected], abs=1e-5)
    code, said = alice.mmft("evaluate", "--model_name_or_path", out, "--dataset_name", data)
    assert code == 0 and "alice/converted, untuned" in said, said

    head = {name: (out / name).read_bytes() for name in ("head.safetensors", "config.json")}
    pickle = {"pytorch_model.bin": weights(PICKLED, pickle=True)}
    hub.put("alice/classifier", {**others, **pickle, **head})
    found = alice.run(CLASSIFY, "alice/classifier", picture, False)
    assert found["kind"] == "NoWeights" and "model_kwargs={'allow_pickle': True}" in found["refused"], found
    found = alice.run(CLASSIFY, "alice/classifier", picture, True)
    assert found.get("scale") == PICKLED and {row["label"] for row in found["answers"]} == set(COLOURS), found
    hub.convert("alice/classifier", {"model.safetensors": weights(CONVERTED)})
    found = alice.run(CLASSIFY, "alice/classifier", picture, False)
    assert found.get("scale") == CONVERTED, found
    # The head is that of the commit that was asked for, not of the conversion's.
    assert math.isclose(sum(row["score"] for row in found["answers"]), 1, abs_tol=1e-5)
    assert not hub.outside()
