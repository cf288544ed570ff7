"""Publishing and using: from pictures to a prediction through the local Hub, each step as somebody else would take it."""

import hashlib
import io
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import transformers
from hub_tools import client, in_one, pictures, training
from local_hub import local_hub
from processes import run_python
from tiny_clip import COLOURS, colour_images

from mmft_hf.predict.heads import load_head

ROOT = Path(__file__).parents[2]
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
def runs(hub, alice, published, tmp_path_factory):
    """Folders of a full and of a LoRA run on what the Hub has, pushed as alice/full and alice/lora."""
    folder = tmp_path_factory.mktemp("runs")
    out = alice.run(
        "import datasets\n"
        "data = datasets.load_dataset('alice/captions', split='train')\n"
        "out.update(rows=len(data), columns=data.column_names, names=data.features['label'].names, row=data[0]['captions'])"
    )
    assert (out["rows"], out["names"]) == (24, sorted(COLOURS)) and out["row"]
    assert {"image", "label", "captions", "caption_records", "image_sha256"} <= set(out["columns"])
    for name, towers in (("full", ()), ("lora", LORA)):
        code, said = alice.mmft("finetune", *from_hub(name, folder), *towers)
        assert code == 0 and f"{hub.url}/alice/{name}/commit/" in said, said
    return folder


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


def test_from_the_hub_to_a_prediction(hub, alice, runs, picture):
    """With an empty cache: our pipeline, stock transformers, the adapter with peft; the token is in none of it."""
    folder = runs
    for parts in ("adapter", "both"):
        code, said = alice.mmft("push", folder / "lora", "--repo_id", f"alice/lora-{parts}", "--parts", parts)
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


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("name", "towers"), [("full2", []), ("lora2", LORA)])
def test_two_processes(hub, published, picture, tmp_path, name, towers):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "recipes" / "finetune.py"]
    out, _ = run_python(
        [*command, *from_hub(name, tmp_path), *towers], inherit=False, **hub.environment("hf_alice", "training")
    )
    assert out.count("It is at") == 1, out
    (hub.folder / name).mkdir()
    for path, data in hub.files(f"alice/{name}").items():
        (hub.folder / name / path).write_bytes(data)
    assert predictions(hub.folder / name, picture) == predictions(tmp_path / name, picture)


def test_a_benchmark_tells_the_weights_of_a_repository_that_changes(hub, alice, clip_folder, tmp_path):
    hub.put("alice/changing", {path.name: path.read_bytes() for path in clip_folder.iterdir()})
    words = [
        "benchmark",
        "--model_name_or_path",
        "alice/changing",
        "--dataset_name",
        str(pictures(tmp_path / "data", 8)),
    ]
    words += ["--methods", "zs", "lp", "--shots", "1", "--seeds", "0", "--use_cpu", "true"]
    words += ["--output_dir", str(tmp_path / "out")]
    code, said = alice.mmft(*words)
    assert code == 0, said
    row = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[0])
    assert row["identity"]["base_model_revision"] == hub.commits("alice/changing")[0].sha
    code, said = alice.mmft(*words)
    assert code == 0 and "2 of 2 cells are done already" in said, said
    hub.put("alice/changing", {"README.md": b"# Changed\n"})
    code, said = alice.mmft(*words)
    assert code == 2 and "expected results of the same base_model_revision" in said, said


REVISIONS = """
import transformers, mmft_hf
from mmft_hf.predict.heads import load_head
for revision in json.loads(args[1]):
    classify = transformers.pipeline("mmft-image-classification", model="alice/two", revision=revision)
    out[str(revision)] = [classify(args[0]), load_head("alice/two", revision).weight.sum().item()]
"""
WITHOUT_LIBRARY = """
import json, sys
sys.modules["mmft_hf"] = None  # cannot be imported
from transformers import pipeline
out = {}
for revision in json.loads(sys.argv[2]):
    classify = pipeline("image-classification", model="alice/two", revision=revision, trust_remote_code=True)
    out[str(revision)] = classify(sys.argv[1])
try:
    pipeline("image-classification", model="alice/two")
except Exception as error:
    out["refused"] = str(error)
print(json.dumps(out))
"""


@pytest.mark.slow
def test_revisions_inference_code_and_offline(hub, runs, alice, picture):
    """Head and weights are of one commit, be it named by hash, tag or branch; with and without this library."""
    folder = runs
    for name, more in (("full", ()), ("lora", ()), ("full", ("--revision", "dev"))):
        command = ["push", folder / name, "--repo_id", "alice/two", "--with_inference_code", "true", *more]
        code, said = alice.mmft(*command)
        assert code == 0, said
    old = hub.commits("alice/two")[1].sha
    alice.run("huggingface_hub.HfApi().create_tag('alice/two', tag='v1', revision=args[0])", old)
    asked, runs_of = [None, "main", old, "v1", "dev"], ["lora", "lora", "full", "full", "full"]
    expected = {}
    for revision, name in zip(asked, runs_of, strict=True):
        sums = load_head(folder / name).weight.sum().item()
        expected[str(revision)] = [predictions(folder / name, picture), sums]
    assert expected[old] != expected["main"]
    with client(hub, None, "revisions") as anybody:  # needs no remote code, although some is there
        assert anybody.run(REVISIONS, picture, json.dumps(asked)) == expected
    assert not [r for r in hub.requests("/alice/two/resolve/.*py") if "revisions" in r["query"]]
    before = len(hub.log)
    with client(hub, None, "revisions", HF_HUB_OFFLINE="1") as offline:
        assert offline.run(REVISIONS, picture, json.dumps(asked)) == expected
    assert len(hub.log) == before

    done = hub.python(WITHOUT_LIBRARY, picture, json.dumps(asked), home="without")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "trust_remote_code=True" in found.pop("refused")
    for revision, rows in found.items():
        assert [row["label"] for row in rows] == [row["label"] for row in expected[revision][0]]
        scores = [row["score"] for row in expected[revision][0]]
        assert [row["score"] for row in rows] == pytest.approx(scores, abs=1e-6)


LOADED = """
import datasets, hashlib
data = datasets.load_dataset(args[0]).cast_column("image", datasets.Image(decode=False))
out.update({s: [[hashlib.sha256(r["image"]["bytes"]).hexdigest(), r["captions"]] for r in rows] for s, rows in data.items()})
"""
HALVES = """
import datasets
from mmft_hf import push_captioned_dataset
whole = datasets.load_dataset(args[0], split="train").cast_column("image", datasets.Image(decode=False))
whole = whole.sort("image_sha256")
halves = datasets.DatasetDict(train=whole.select(range(12)), test=whole.select(range(12, 24)))
if args[1] == "more":
    halves["test"] = halves["test"].map(lambda row: {"captions": [*row["captions"], "one more"]})
out["url"] = push_captioned_dataset(halves, "alice/halves")
"""


def uploads(hub, since: int) -> list[dict]:
    return [r for r in hub.requests("PUT /cdn/|POST .*/commit/") if r["n"] > since]


def test_only_what_changed_is_uploaded(hub, published, alice, captioned):
    files = {hashlib.sha256(p.read_bytes()).hexdigest() for p in captioned.parent.glob("pictures/*/*.png")}
    rows = alice.run(LOADED, "alice/captions")["train"]
    assert {digest for digest, _ in rows} == files and len(rows) == 24, "the very bytes of the pictures"

    before, commits = len(hub.log), len(hub.commits("datasets/alice/captions"))
    code, said = alice.mmft("push", captioned, "--repo_id", "alice/captions")
    assert code == 0 and not uploads(hub, before), said
    assert len(hub.commits("datasets/alice/captions")) == commits

    alice.run(HALVES, captioned, "")
    first, before = hub.files("datasets/alice/halves"), len(hub.log)
    alice.run(HALVES, captioned, "more")
    second = hub.files("datasets/alice/halves")
    changed = {path for path in second if second[path] != first.get(path)}
    test = "data/test-00000-of-00001.parquet"
    assert test in changed and "data/train-00000-of-00001.parquet" not in changed
    sent = sum(r["received"] for r in hub.requests("PUT /cdn/") if r["n"] > before)
    assert sent == sum(len(second[path]) for path in changed if path.endswith((".parquet", ".png")))

    # Shards of an earlier push that had more of them, and a file that somebody added.
    shards = {f"data/train-0000{i}-of-00002.parquet": first["data/train-00000-of-00001.parquet"] for i in range(2)}
    hub.put("datasets/alice/halves", {**shards, "notes.txt": b"mine"})
    alice.run(HALVES, captioned, "more")
    assert set(hub.files("datasets/alice/halves")) == {*second, "notes.txt"}
    rows = alice.run(LOADED, "alice/halves")
    assert [len(rows["train"]), len(rows["test"])] == [12, 12] and rows["test"][0][1][-1] == "one more"


@pytest.mark.slow
def test_captions_without_their_pictures(hub, captioned, alice, tmp_path):
    code, said = alice.mmft("push", captioned, "--repo_id", "alice/texts", "--captions_only", "true")
    assert code == 0 and "--captions_dataset alice/texts" in said, said
    originals = [path.read_bytes() for path in captioned.parent.glob("pictures/*/*.png")]
    files = hub.files("datasets/alice/texts")
    assert set(files) == {".gitattributes", "README.md", "captions.json", "captions/train-00000-of-00001.parquet"}
    for path, data in files.items():
        assert b"PNG" not in data and b"data:image" not in data, path
        if path.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(data))
            assert set(table.column_names) == {"label", "captions", "caption_records", "image_sha256"}
            assert not any(original[:64].hex() in str(table.to_pydict()) for original in originals)

    mine = shutil.copytree(captioned.parent / "pictures", tmp_path / "mine")
    red, green, blue = (mine / name for name in COLOURS)
    names = [sorted(folder.iterdir()) for folder in (red, green, blue)]
    names[0][0].rename(red / "called otherwise.png")
    names[0][1].unlink()
    names[1][0].rename(blue / "a green one.png")
    colour_images(1, seed=9)[2][0].save(blue / "new.png")
    settings = training("--dataset_name", mine, "--captions_dataset", "alice/texts", "--output_dir", tmp_path / "run")
    code, said = alice.mmft("finetune", *settings, "--model_name_or_path", "alice/clip")
    assert code == 0, said
    assert "22 of 24 images have some" in said and "1 images are not in alice/texts" in said
    assert "1 captioned images of alice/texts are not among these images" in said
    assert "1 images have another class there" in said
    code = """
import mmft_hf
data = mmft_hf.load_captioned_dataset(args[0], captions_dataset="alice/texts")["train"]
names = data.features["label"].names
out["rows"] = [[names[row["label"]], row["captions"]] for row in data.select_columns(["label", "captions"])]
"""
    rows = alice.run(code, mine)["rows"]
    assert [name for name, texts in rows if not texts] == ["blue thing"] * 2
    assert all(name in text for name, texts in rows for text in texts)


def test_private_organization_branch_and_pull_request(hub, captioned, alice):
    for more in (
        ["--repo_id", "alice/secret", "--private", "true"],
        ["--repo_id", "team/captions", "--license", "cc-by-4.0"],
        ["--repo_id", "alice/branch", "--revision", "dev"],
        ["--repo_id", "alice/captions2"],
    ):
        code, said = alice.mmft("push", captioned, *more)
        assert code == 0, said
    see = """
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
for token in ("hf_alice", "hf_bob", False):
    try:
        out[str(token)] = len(HfApi(token=token).list_repo_files("alice/secret", repo_type="dataset"))
    except RepositoryNotFoundError:
        out[str(token)] = None
"""
    out = alice.run(see)
    assert out["hf_alice"] and (out["hf_bob"], out["False"]) == (None, None)
    assert b"license: cc-by-4.0" in hub.files("datasets/team/captions")["README.md"]
    assert set(hub.files("datasets/alice/branch")) == {".gitattributes"}
    assert "captions.json" in hub.files("datasets/alice/branch", "dev")

    # Anybody may propose; what is proposed is no part of the repository yet.
    main = hub.files("datasets/alice/captions2")
    command = ["push", captioned, "--repo_id", "alice/captions2", "--license", "mit", "--create_pr", "true"]
    for number, token in ((1, "hf_alice"), (2, "hf_bob")):
        code, said = alice.mmft(*command, token=token)
        assert code == 0 and f"/discussions/{number}" in said, said
        assert b"license: mit" in hub.files("datasets/alice/captions2", f"refs/pr/{number}")["README.md"]
    assert hub.files("datasets/alice/captions2") == main


@pytest.mark.parametrize(
    "strategy",
    ["end", *(pytest.param(name, marks=pytest.mark.slow) for name in ("every_save", "checkpoint", "all_checkpoints"))],
)
def test_what_training_publishes(hub, alice, runs, strategy):
    """A plain model at any time, checkpoints in folders of their own, and the token nowhere."""
    folder = runs
    name, said = strategy.replace("_", "-"), ""
    more = ["--hub_strategy", strategy, "--hub_always_push", "true", "--hub_token", "hf_alice"]
    more += ["--num_train_epochs", "2"]
    hub.rules = [{"match": f"PUT /cdn/models/alice/{name}/", "do": "slow", "ms": 200}]
    code, said = alice.mmft("finetune", *from_hub(name, folder), *more, token=None)
    assert code == 0, said
    titles = [commit.title for commit in hub.commits(f"alice/{name}")]
    assert titles[0] == "Model, head, results and card"
    assert any("in progress" in title for title in titles) == (strategy != "end")
    files = hub.files(f"alice/{name}")
    folders = {path.split("/")[0] for path in files if "/" in path}
    steps = {path.name for path in (folder / name).glob("checkpoint-*")}
    assert len(steps) == 1, "one of them is gone, but not before it was uploaded"
    last = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-4", "checkpoint-8"}}
    assert folders == last.get(strategy, set())
    top = {path for path in files if "/" not in path}
    assert {
        "model.safetensors",
        "config.json",
        "head.safetensors",
        "README.md",
        "mmft.json",
    } <= top
    assert "prototypes.safetensors" not in top, "those of an epoch are gone: what was kept has another head"
    assert not [path for path in top if path.endswith((".bin", ".pt", ".pth", ".pkl"))]
    for path in top & {"model.safetensors", "head.safetensors"}:
        assert files[path] == (folder / name / path).read_bytes()
    kept = [p for root in (folder / name, hub.folder / "alice") for p in root.rglob("*") if p.is_file()]
    for data in (*files.values(), said.encode(), *(p.read_bytes() for p in kept)):
        assert b"hf_alice" not in data
    public = [path for path in files if path.endswith((".json", ".md"))]
    assert not [path for path in public if str(folder).encode() in files[path]], "paths of this machine"
