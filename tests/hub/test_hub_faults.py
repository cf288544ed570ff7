"""Whatever the Hub does: nothing local is lost, the message says what to do, and what it says finishes the job."""

import json
import shlex
import shutil
import socket

import pytest
from hub_tools import client, content, in_one, pictures, printed_command, training
from local_hub import local_hub
from processes import kill, start, until
from tiny_clip import colour_dataset

from mmft_hf.cli import main

CANARY = "hf_canaryXbirdXyellow"
TOKENS = {
    CANARY: {"user": "alice", "orgs": ["team"], "role": "write"},
    "hf_read": {"user": "alice", "orgs": ["team"], "role": "read"},
    "hf_bob": {"user": "bob", "orgs": [], "role": "write"},
}


@pytest.fixture(scope="module")
def hub(clip_folder):
    with local_hub(tokens=TOKENS) as hub:
        hub.put("alice/clip", {path.name: path.read_bytes() for path in clip_folder.iterdir()})
        yield hub


@pytest.fixture(scope="module")
def alice(hub):
    with client(hub, CANARY, "alice") as alice:
        yield alice
    assert CANARY not in alice.said
    kept = [path for path in hub.folder.rglob("*") if path.is_file()]  # objects, caches, what went to standard error
    assert kept and not [path for path in kept if CANARY.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
def run(clip_folder, data_folder, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("run") / "run"
    names = ["--dataset_name", data_folder, "--model_name_or_path", clip_folder, "--output_dir", out]
    in_one("finetune", *training(*names))
    return out


@pytest.fixture(autouse=True)
def no_rules(hub):
    yield
    hub.rules = []


def published(hub, folder, name: str) -> bool:
    files = hub.files(name)
    return all(files[f] == (folder / f).read_bytes() for f in ("model.safetensors", "head.safetensors"))


@pytest.mark.parametrize(
    ("token", "words", "message"),
    [
        (None, ["--repo_id", "alice/a"], "found none. Type hf auth login"),
        ("hf_wrong", ["--repo_id", "alice/a"], "found one that it does not. Type hf auth login"),
        ("hf_read", ["--repo_id", "alice/a"], "found tests of alice, which may only read. Create another"),
        ("hf_bob", ["--repo_id", "alice/a"], "begins with bob/"),
        (CANARY, ["--repo_id", "bob/a"], "begins with alice/ or team/"),
        (CANARY, ["--repo_id", "alice/a b"], "expected user/name, found 'alice/a b'"),
        (CANARY, ["--repo_id", "a/b/c"], "expected user/name, found 'a/b/c'"),
        (CANARY, ["--repo_id", "alice/taken"], "Type another name, or --create_pr true"),
        (CANARY, [], "Type --repo_id user/name"),
    ],
)
def test_what_can_be_known_is_said_before_anything_is_sent(hub, alice, run, token, words, message):
    if "alice/taken" in words:
        hub.put("alice/taken", {"model.bin": b"of somebody", "notes.txt": b"x"})
    before, repos, first = content(run), set(hub.repos), len(hub.log)
    code, said = alice.mmft("push", run, *words, token=token)
    assert code == 2 and message in said, said
    assert content(run) == before and set(hub.repos) == repos
    assert not hub.requests("PUT|POST")[len([r for r in hub.requests("PUT|POST") if r["n"] <= first]) :]
    code, said = alice.mmft("push", run, "--repo_id", "alice/known")
    assert code == 0 and published(hub, run, "alice/known"), said


COMMIT, CREATE, UPLOAD = "POST .*/commit/", "POST /api/repos/create", "PUT /cdn/"
ONCE = [
    *[{"match": COMMIT, "do": status} for status in (409, 412, 500, 503, "cut", "lost")],
    {"match": COMMIT, "do": 429, "retry_after": 1},
    {"match": CREATE, "do": 503},
    {"match": CREATE, "do": "lost"},
    {"match": "GET /api/whoami-v2", "do": 500},
    {"match": "GET /api/models/.*/tree", "do": 503},
    {"match": UPLOAD, "do": "cut"},
    {"match": UPLOAD, "do": 503},
]


@pytest.mark.parametrize("fault", ONCE, ids=lambda f: f"{f['match'].split('/')[-1] or 'commit'} {f['do']}")
def test_a_fault_that_passes_is_not_noticed(hub, alice, run, fault, request):
    name = f"alice/once-{ONCE.index(fault)}"
    hub.rules = [{**fault, "times": 1}]
    code, said = alice.mmft("push", run, "--repo_id", name)
    assert code == 0 and published(hub, run, name), said
    assert len([r for r in hub.requests() if r["fault"] == fault["do"]]) >= 1


ALWAYS = [
    *[({"match": COMMIT, "do": status}, 3, f"HTTP {status}") for status in (409, 412, 503)],
    ({"match": COMMIT, "do": "cut"}, 3, "Error"),
    ({"match": COMMIT, "do": 429, "retry_after": 3600}, 3, "asks to wait 3600 s"),
    ({"match": CREATE, "do": 403}, 2, "found one that may not"),
    ({"match": COMMIT, "do": 403}, 2, "found one that may not"),
    ({"match": "GET /api/whoami-v2", "do": 500}, 3, "HTTP 500"),
]


@pytest.mark.parametrize("case", ALWAYS, ids=lambda c: f"{c[0]['match'].split('/')[-1] or 'commit'} {c[0]['do']}")
def test_a_fault_that_stays(hub, alice, run, case):
    fault, expected, message = case
    name, before = f"alice/always-{ALWAYS.index(case)}", content(run)
    hub.rules = [fault]
    code, said = alice.mmft("push", run, "--repo_id", name)
    assert (code, content(run)) == (expected, before) and message in said, said
    sent, command = len(hub.requests(UPLOAD)), ["push", str(run), "--repo_id", name]
    assert expected == 2 or printed_command(said) == command
    hub.rules = []
    code, said = alice.mmft(*command)
    assert code == 0 and published(hub, run, name), said
    if fault["match"] == COMMIT:
        assert len(hub.requests(UPLOAD)) == sent, "what was uploaded is not uploaded again"


@pytest.mark.slow
def test_an_upload_that_is_killed_goes_on_where_it_was(hub, alice, run):
    """A process that dies while one file is on its way: the others are not sent again."""
    hub.rules = [{"match": "PUT /cdn/models/alice/killed/", "do": "hang", "from": 3}]
    code = "from mmft_hf.hub.publish import push_model; import sys; push_model(sys.argv[1], 'alice/killed')"
    process = start(["-c", code, run], cwd=hub.folder, inherit=False, **hub.environment(CANARY, "killed"))
    try:
        hub.wait_for("PUT /cdn/models/alice/killed/", 3)
        until(lambda: len([r for r in hub.requests("PUT /cdn/models/alice/killed/") if r["status"] == 200]) >= 2)
    finally:
        kill(process)
        process.wait()
    there = {r["path"] for r in hub.requests("PUT /cdn/models/alice/killed/") if r["status"] == 200}
    assert len(there) == 2 and set(hub.files("alice/killed")) == {".gitattributes"}
    hub.rules, before = [], len(hub.log)
    code, said = alice.mmft("push", run, "--repo_id", "alice/killed")
    assert code == 0 and published(hub, run, "alice/killed"), said
    assert not there & {r["path"] for r in hub.requests("PUT /cdn/") if r["n"] > before}


def test_slow(hub, alice, run):
    hub.rules = [{"match": "alice/slow", "do": "slow", "ms": 50}]
    code, said = alice.mmft("push", run, "--repo_id", "alice/slow")
    assert code == 0 and published(hub, run, "alice/slow"), said


def test_no_way_to_the_hub(hub, alice, run, capsys, monkeypatch):
    """Offline mode and a closed port: said at once, and afterwards the same command works."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    before = content(run)
    # This process is offline.
    monkeypatch.setenv("HF_TOKEN", CANARY)
    assert main(["push", str(run), "--repo_id", "alice/away"]) == 2 and content(run) == before
    printed = capsys.readouterr()
    assert "unset HF_HUB_OFFLINE" in printed.err and CANARY not in printed.err + printed.out
    elsewhere = """
at, huggingface_hub.constants.ENDPOINT = huggingface_hub.constants.ENDPOINT, args[0]
out["done"] = mmft(*args[1:])
huggingface_hub.constants.ENDPOINT = at
"""
    code, said = alice.run(elsewhere, closed, "push", run, "--repo_id", "alice/away")["done"]
    assert (code, content(run)) == (3, before) and "the connection failed" in said and CANARY not in said, said
    assert alice.mmft(*printed_command(said))[0] == 0 and published(hub, run, "alice/away")


# -- training that publishes -------------------------------------------------------------------------------------------
def training_to(name: str, folder, data_folder) -> list[str]:
    names = ["--dataset_name", data_folder, "--model_name_or_path", "alice/clip", "--output_dir", folder]
    return ["finetune", *training(*names, "--push_to_hub", "true", "--hub_model_id", name, "--hub_strategy", "end")]


@pytest.mark.parametrize(
    ("token", "name", "rule", "expected", "message"),
    [
        (None, "alice/t", None, 2, "hf auth login"),
        ("hf_read", "alice/t", None, 2, "may only read"),
        (CANARY, "bob/t", None, 2, "begins with alice/ or team/"),
        (CANARY, "alice/other", None, 2, "Type another name"),
        (CANARY, "alice/t", {"match": CREATE, "do": 403}, 2, "found one that may not"),
        (CANARY, "alice/t", {"match": "GET /api/whoami-v2", "do": 503}, 3, "--hub_token YOUR_TOKEN"),
    ],
)
def test_what_would_fail_at_the_end_fails_before_training(
    hub, alice, data_folder, tmp_path, token, name, rule, expected, message
):
    hub.put("alice/other", {"model.bin": b"of somebody"})
    hub.rules = [rule] if rule else []
    command = training_to(name, tmp_path / "out", data_folder)
    more = ["--hub_token", token] if token else []
    code, said = alice.mmft(*command, *more, token=None)
    assert code == expected and message in said and "validation" not in said.split("zero-shot")[-1].split("\n", 1)[-1]
    assert not (tmp_path / "out").exists() and CANARY not in said


def test_a_push_that_fails_after_training(hub, alice, data_folder, tmp_path):
    """The results stay, and the command that is printed does nothing but push."""
    out, command = tmp_path / "out", training_to("alice/late", tmp_path / "out", data_folder)
    hub.rules = [{"match": COMMIT, "do": 503}]
    code, said = alice.mmft(*command, "--hub_private_repo", "true", "--hub_revision", "dev", "--hub_token", CANARY)
    assert code == 3 and "Test accuracy on" in said and f"The results are in {out}" in said, said
    again, before = printed_command(said), content(out)
    assert again == ["push", str(out), "--repo_id", "alice/late", "--private", "true", "--revision", "dev"]
    hub.rules = []
    code, said = alice.mmft(*again)
    assert code == 0 and "epoch" not in said and content(out) == before, said
    assert hub.files("alice/late", "dev")["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert hub.repo("alice/late").private
    # The same training again finds itself complete, and pushes what is there: nothing is new.
    code, said = alice.mmft(*command, "--resume_from_checkpoint", "true", "--hub_revision", "dev")
    assert code == 0 and "complete" in said and "epoch" not in said and content(out) == before, said


# -- what comes from the Hub is untrusted, or unexpected -----------------------------------------------------------------
FULL = """
import resource, signal
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
out["done"] = mmft(*args)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
"""


@pytest.fixture(scope="module")
def on_the_hub(hub, alice, run, data_folder):
    """alice/colours, with its model alice/used."""
    assert alice.mmft("push", run, "--repo_id", "alice/used")[0] == 0
    hub.put(
        "datasets/alice/colours",
        {f"data/{p.stem}-00000-of-00001.parquet": p.read_bytes() for p in data_folder.iterdir()},
    )


def test_a_disk_that_is_full_while_caching(hub, alice, on_the_hub):
    """No file may grow beyond 20 kB, as on a disk without room; with room again, the same command works."""
    command = ["evaluate", "--model_name_or_path", "alice/used", "--dataset_name", "alice/colours"]
    code, said = alice.run(FULL, *command)["done"]
    assert code == 2 and "File too large" in said and "Traceback" not in said, said
    code, said = alice.mmft(*command)
    assert code == 0 and "accuracy" in said, said


def test_a_repository_without_prototypes(hub, alice, on_the_hub, tmp_path):
    """The message says how to make them, and what it says works."""
    (tmp_path / "one").mkdir()
    colour_dataset(1)[0]["image"].save(tmp_path / "one" / "one.png")
    predict = ["predict", tmp_path / "one", "--model_name_or_path"]
    code, said = alice.mmft(*predict, "alice/clip")
    assert (
        code == 2 and "expected a folder or Hub repository with head.safetensors or prototypes.safetensors" in said
    ), said
    download, python = (
        shlex.split(line.replace("FOLDER", str(tmp_path / "clip"))) for line in said.splitlines() if line[:2] == "  "
    )
    assert (download[:2], python[:2]) == (["hf", "download"], ["python", "-c"])
    alice.run("huggingface_hub.snapshot_download(args[0], local_dir=args[1])", download[2], download[4])
    alice.run(python[2])
    code, said = alice.mmft(*predict, tmp_path / "clip")
    assert code == 0 and "cat" in said and "dog" in said, said


def test_classes_that_do_not_fit(hub, alice, run, on_the_hub, tmp_path):
    config = json.loads((run / "config.json").read_text())
    config["id2label"] = {"0": "cat", "1": "dog", "2": "bird"}
    files = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    hub.put("alice/mixed", {**files, "config.json": json.dumps(config).encode()})
    data = colour_dataset(2).cast_column(
        "label", type(colour_dataset(1).features["label"])(names=["cat", "dog", "owl"])
    )
    data.to_parquet(tmp_path / "test.parquet")
    hub.put("datasets/alice/pets", {"data/test-00000-of-00001.parquet": (tmp_path / "test.parquet").read_bytes()})
    data.rename_columns({"image": "pixels", "label": "kind"}).to_parquet(tmp_path / "odd.parquet")
    hub.put("datasets/alice/odd", {"data/train-00000-of-00001.parquet": (tmp_path / "odd.parquet").read_bytes()})
    for words, message in (
        (("alice/mixed", "alice/colours"), "cat, dog, bird"),
        (("alice/used", "alice/pets"), "label 'cat' is outside the class list"),
        (("alice/used", "alice/odd"), "found pixels, kind, captions"),
    ):
        code, said = alice.mmft("evaluate", "--model_name_or_path", words[0], "--dataset_name", words[1])
        assert code == 2 and message in said, said
    code, said = alice.mmft("finetune", *training("--dataset_name", "alice/odd", "--output_dir", tmp_path / "out"))
    assert code == 2 and "column 'image' for the image is missing: found pixels, kind" in said, said
    code, said = alice.mmft("finetune", *training("--captions_dataset", "alice/odd", "--output_dir", tmp_path / "out"))
    assert code == 2 and "expected columns captions and image_sha256" in said and not (tmp_path / "out").exists()


def test_pickles_are_not_opened(hub, alice, clip_folder, run, tmp_path):
    """Not by a command, not by the pipeline: neither is what such a file holds run, nor are its weights taken."""
    files = {path.name: path.read_bytes() for path in clip_folder.iterdir() if path.name != "model.safetensors"}
    make = "import torch, mmft_hf; torch.save(mmft_hf.load_model(args[0])[0].state_dict(), args[1])"
    alice.run(make, clip_folder, tmp_path / "weights.bin")
    files["pytorch_model.bin"] = (tmp_path / "weights.bin").read_bytes()
    hub.put("alice/pickled", {**files, "head.safetensors": (run / "head.safetensors").read_bytes()})
    code, said = alice.mmft("evaluate", "--model_name_or_path", "alice/pickled", "--dataset_name", clip_folder)
    assert code == 2 and "expected weights as model.safetensors, found only a pickle" in said, said
    code = """
import transformers
try:
    transformers.pipeline("mmft-image-classification", model="alice/pickled")
except Exception as error:
    out["refused"] = str(error)
"""
    assert "safetensors" in alice.run(code)["refused"]
    assert not hub.requests("GET .*pytorch_model.bin|GET /cdn/models/alice/pickled/.*bin")


def test_names_that_climb(hub, alice, tmp_path):
    """Names of files in a record or a repository that lead out of their folder are not followed."""
    secret, captioned = tmp_path / "secret-00000-of-00001.parquet", tmp_path / "captioned"
    in_one(
        "caption", "--captioner", "template", "--dataset_name", pictures(tmp_path / "p", 2), "--output_dir", captioned
    )
    shutil.copy(captioned / "data" / "train-00000-of-00001.parquet", secret)
    record = json.loads((captioned / "captions.json").read_text())
    for name in (f"../{secret.name}", f"data/../../{secret.name}", str(secret)):
        (captioned / "captions.json").write_text(json.dumps({**record, "files": [*record["files"], name]}))
        code, said = alice.mmft("push", captioned, "--repo_id", "alice/climbing")
        assert code == 2 or not any("secret" in path for path in hub.files("datasets/alice/climbing")), said
    data = secret.read_bytes()
    hub.put("datasets/alice/evil", {"../../../evil.parquet": data, "data/train-00000-of-00001.parquet": data})
    alice.run("import mmft_hf; out['rows'] = len(mmft_hf.load_captioned_dataset('alice/evil')['train'])")
    hub.put("alice/evil", {"../../../evil.safetensors": b"x", **dict.fromkeys(("config.json", "mmft.json"), b"{}")})
    assert alice.mmft("evaluate", "--model_name_or_path", "alice/evil", "--dataset_name", "alice/evil")[0] == 2
    assert not [path for path in hub.folder.rglob("evil.*[st]") if ".no_exist" not in path.parts]
    assert not list(hub.folder.parent.glob("evil.*"))


def test_a_card_that_the_hub_refuses(hub, alice, run):
    hub.rules = [{"match": "POST /api/validate-yaml", "do": 400, "body": {"errors": [{"message": "no such licence"}]}}]
    command = ["push", run, "--repo_id", "alice/refused"]
    code, said = alice.mmft(*command)
    assert code == 2 and "the Hub refuses the card" in said and "no such licence" in said, said
    hub.rules = []
    assert alice.mmft(*command, "--license", "mit")[0] == 0 and published(hub, run, "alice/refused")
    assert b"license: mit" in hub.files("alice/refused")["README.md"]


def test_names_of_classes_are_text_in_a_card(hub, alice, tmp_path):
    evil = "<script>alert(1) | [x](javascript:x) *b*"
    for i, name in enumerate(("green thing", evil)):
        shutil.copytree(pictures(tmp_path / "p", 2) / ["green thing", "red thing"][i], tmp_path / "q" / name)
    in_one("caption", "--captioner", "template", "--dataset_name", tmp_path / "q", "--output_dir", tmp_path / "out")
    assert alice.mmft("push", tmp_path / "out", "--repo_id", "alice/names")[0] == 0
    card = hub.files("datasets/alice/names")["README.md"].decode()
    assert "<script" not in card and "](javascript" not in card


# -- an upload that is always interrupted ------------------------------------------------------------------------------
@pytest.mark.slow  # the client's own retries take minutes
def test_an_upload_that_is_always_cut(run):
    rules = [{"match": UPLOAD, "do": "cut", "from": 2}]
    with local_hub(tokens=TOKENS, rules=rules) as hub, client(hub, CANARY) as alice:
        alice.run("client.TRIES = 1")
        code, said = alice.mmft("push", run, "--repo_id", "alice/cut")
        assert code == 3 and "What was uploaded is kept there" in said and CANARY not in said, said
        there = {r["path"] for r in hub.requests(UPLOAD) if r["status"] == 200}
        assert there and set(hub.files("alice/cut")) == {".gitattributes"}
        hub.rules, before = [], len(hub.log)
        code, said = alice.mmft(*printed_command(said))
        assert code == 0 and published(hub, run, "alice/cut"), said
        assert not there & {r["path"] for r in hub.requests(UPLOAD) if r["n"] > before}
