"""The local Hub against the real, unpatched clients, each in a process of its own; and each of its faults."""

import contextlib
import hashlib
import http.client
import json
from urllib.parse import urlsplit

import pytest
from local_hub import local_hub
from tiny_clip import colour_dataset

pytestmark = pytest.mark.slow  # it tests the fake, not the library

START = """
import json, os, sys
from pathlib import Path
from huggingface_hub import *
api, out = HfApi(), {}

def fails(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]

def paths(*args, **kwargs):
    return sorted(entry.path for entry in api.list_repo_tree(*args, **kwargs))
"""


def run(hub, code: str, *args, **kwargs) -> dict:
    """Runs code in a child process: what it left in the dictionary `out`."""
    done = hub.python(START + code + "\nprint(json.dumps(out))", *args, **kwargs)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ask(hub, path: str, method: str = "GET", data=None, token="hf_alice", timeout=10, **headers):
    """A plain request: status, headers, body."""
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    url = urlsplit(path if path.startswith("http") else hub.url + path)
    with contextlib.closing(http.client.HTTPConnection(url.netloc, timeout=timeout)) as client:
        client.request(method, f"{url.path}?{url.query}", data, headers)
        answer = client.getresponse()
        return answer.status, answer.headers, answer.read()


@pytest.fixture
def hub():
    with local_hub() as hub:
        yield hub


def test_uploads():
    """Regular and LFS files, parts, copies, deletions and parent commits, read back from the store."""
    weights = bytes(range(256)) * 1000
    with local_hub(part_size=100_000) as hub:
        code = """
weights = bytes(range(256)) * 1000
out["url"] = str(api.create_repo("alice/m"))
out["again"] = [fails(api.create_repo, "alice/m"), str(api.create_repo("alice/m", exist_ok=True))]
first = api.upload_file(repo_id="alice/m", path_in_repo="model.safetensors", path_or_fileobj=weights)
os.makedirs("folder/sub")
readme = b"---\\nlicense: mit\\n---\\n# Model"
for name, data in {"sub/text.txt": b"text", "small.bin": b"small", "empty.bin": b"", "README.md": readme}.items():
    Path("folder", name).write_bytes(data)
api.upload_folder(repo_id="alice/m", folder_path="folder")
second = api.create_commit("alice/m", commit_message="third", commit_description="why", parent_commit=None, operations=[
    CommitOperationCopy("model.safetensors", "copies/model.safetensors"),
    CommitOperationCopy("sub/text.txt", "copies/text.txt"),
    CommitOperationCopy("model.safetensors", "copies/old.safetensors", src_revision=first.oid),
    CommitOperationDelete("sub/"), CommitOperationDelete("small.bin"),
    CommitOperationAdd(".gitignore", b"*.log"), CommitOperationAdd("a.log", b"ignored"),
])
out["nothing new"] = api.upload_file(repo_id="alice/m", path_in_repo=".gitignore", path_or_fileobj=b"*.log").oid
add = [CommitOperationAdd("late.txt", b"late")]
out["parent"] = fails(api.create_commit, "alice/m", add, commit_message="x", parent_commit=first.oid)
out["missing"] = fails(api.delete_file, "nowhere.txt", "alice/m")
bad = [CommitOperationAdd("README.md", b"---\\nlicense: nonsense\\n---\\n")]
out["card"] = fails(api.create_commit, "alice/m", bad, commit_message="x")
out["no repository"] = fails(api.upload_file, repo_id="alice/none", path_in_repo="a", path_or_fileobj=b"a")
out["no branch"] = fails(api.upload_file, repo_id="alice/m", path_in_repo="a", path_or_fileobj=b"a", revision="none")
out["titles"] = [commit.title for commit in api.list_repo_commits("alice/m")]
out["oids"] = [first.oid, second.oid]
api.create_repo("team/gone", repo_type="dataset")
api.delete_repo("team/gone", repo_type="dataset")
out["gone"] = fails(api.dataset_info, "team/gone")
"""
        out = run(hub, code, token="hf_alice")
        assert out["url"] == out["again"][1] == f"{hub.url}/alice/m"
        assert (out["again"][0], out["parent"]) == (["HfHubHTTPError", 409], ["HfHubHTTPError", 412])
        assert (out["missing"], out["card"]) == (["RemoteEntryNotFoundError", 404], ["ValueError", None])
        assert out["no repository"] == out["gone"] == ["RepositoryNotFoundError", 404]
        assert out["no branch"] == ["RevisionNotFoundError", 404] and out["nothing new"] == out["oids"][1]
        titles = ["third", "Upload folder using huggingface_hub", "Upload model.safetensors with huggingface_hub"]
        assert out["titles"] == [*titles, "initial commit"]

        files = hub.files("alice/m")
        copies = {"copies/model.safetensors": weights, "copies/old.safetensors": weights, "copies/text.txt": b"text"}
        assert set(files) == {".gitattributes", ".gitignore", "README.md", "empty.bin", "model.safetensors", *copies}
        assert {path: files[path] for path in copies} == copies and files["README.md"].endswith(b"# Model")
        assert set(hub.files("alice/m", out["oids"][0])) == {".gitattributes", "model.safetensors"}
        assert hub.commits("alice/m")[0].message == "why"

        sizes = [r["received"] for r in hub.requests("PUT /cdn/models/alice/m/")]
        assert sizes == [100_000, 100_000, 56_000, 5]  # three parts and small.bin; a copy uploads nothing
        assert not any(r["auth"] for r in hub.requests("/cdn/"))
        assert all(r["auth"] and r["user"] == "alice" for r in hub.requests("POST .*/commit/"))
        assert "hf_alice" not in json.dumps(hub.log)


def test_downloads(hub):
    """Cache, revisions, conditional and partial requests, and the cache without a network."""
    weights = bytes(range(256)) * 4000
    old = hub.put("alice/m", {"w.safetensors": b"old", "config.json": b"{}"})
    hub.put("alice/m", {"w.safetensors": weights, "sub/a.txt": b"a"})
    code = """
out["size"] = os.path.getsize(hf_hub_download("alice/m", "w.safetensors"))
out["old"] = Path(hf_hub_download("alice/m", "w.safetensors", revision=sys.argv[1])).read_text()
out["snapshot"] = sorted(p.relative_to(s).as_posix() for s in [snapshot_download("alice/m")] for p in Path(s).rglob("*.*"))
out["missing"] = fails(hf_hub_download, "alice/m", "none.txt")
out["no revision"] = fails(hf_hub_download, "alice/m", "config.json", revision="none")
"""
    out = run(hub, code, old)
    assert (out["size"], out["old"]) == (len(weights), "old")
    assert out["snapshot"] == [".gitattributes", "config.json", "sub/a.txt", "w.safetensors"]
    assert (out["missing"], out["no revision"]) == (["RemoteEntryNotFoundError", 404], ["RevisionNotFoundError", 404])
    assert len(hub.requests("GET .*safetensors")) == 2 and not any(r["auth"] for r in hub.requests())

    before = len(hub.log)
    assert run(hub, code, old)["size"] == len(weights)
    assert not [r for r in hub.requests("GET .*safetensors") if r["n"] > before], "the second time it is in the cache"
    before = len(hub.log)
    again = run(hub, code.split('out["missing"]')[0], old, HF_HUB_OFFLINE="1")
    assert again == {k: out[k] for k in again} and len(again) == 3 and len(hub.log) == before

    status, headers, body = ask(hub, "/alice/m/resolve/main/sub/a.txt", token=None)
    assert (status, body, headers["ETag"]) == (200, b"a", '"2e65efe2a145dda7ee51d1741299f848e5bf752e"')
    assert headers["X-Repo-Commit"] == hub.commits("alice/m")[0].sha
    assert ask(hub, "/alice/m/resolve/main/sub/a.txt", **{"If-None-Match": headers["ETag"]})[::2] == (304, b"")
    status, headers, _ = ask(hub, "/alice/m/resolve/main/w.safetensors", "HEAD")
    assert status == 302 and headers["X-Linked-Size"] == str(len(weights))
    assert headers["X-Linked-Etag"].strip('"') == hashlib.sha256(weights).hexdigest()
    where = headers["Location"]
    for range_, first, end in (("bytes=10-19", 10, 20), ("bytes=1023990-", 1023990, None), ("bytes=-5", -5, None)):
        status, _, body = ask(hub, where, token=None, Range=range_)
        assert (status, body) == (206, weights[first:end])
    assert ask(hub, where, Range="bytes=2000000-")[0] == 416
    assert ask(hub, where.replace("sig=", "sig=0"))[0] == 403, "the address is signed"


def test_listing_and_references():
    """Trees page by page, information, lists with filters, branches and tags, the file system."""
    card = b"---\nlicense: mit\npipeline_tag: zero-shot-image-classification\ntags: [pets]\ndatasets: [alice/d]\n---\n"
    with local_hub(page_size=2) as hub:
        hub.put("alice/m", {"README.md": card, "config.json": b'{"model_type": "clip"}', "a/b/c.txt": b"c"})
        hub.put("alice/m", {f"files/{i}.txt": b"%d" % i for i in range(5)})
        hub.put("alice/secret", {}, private=True)
        hub.put("bob/other", {"README.md": b"---\ntags: [pets]\n---\n"})
        hub.put("datasets/alice/d", {"README.md": b"---\ntask_categories: [x]\n---\n", "data/train.csv": b"a\n1\n2\n"})
        code = """
out["all"] = paths("alice/m", recursive=True)
out["top"] = paths("alice/m", expand=True)
out["files"] = paths("alice/m", "files")
info = api.model_info("alice/m", files_metadata=True)
out["info"] = [info.author, info.pipeline_tag, info.library_name, info.card_data.license, info.tags, info.private]
out["sizes"] = {s.rfilename: s.size for s in info.siblings}
out["expand"] = api.model_info("alice/m", expand=["tags"]).siblings
out["models"] = [m.id for m in api.list_models()]
out["pets"] = [m.id for m in api.list_models(filter="pets", author="alice")]
out["search"] = [m.id for m in api.list_models(search="OTHER", full=True)]
out["public"] = [m.id for m in api.list_models(token=False)]
out["datasets"] = [d.id for d in api.list_datasets(task_categories="x")]
found = api.get_paths_info("alice/m", ["a", "files/1.txt", "none"], expand=True)
out["paths"] = [[f.path, f.last_commit.title, getattr(f, "size", None)] for f in found]
api.create_branch("alice/m", branch="dev/x")
out["branch again"] = fails(api.create_branch, "alice/m", branch="dev/x")
api.create_branch("alice/m", branch="dev/x", exist_ok=True)
api.upload_file(repo_id="alice/m", path_in_repo="dev.txt", path_or_fileobj=b"dev", revision="dev/x")
api.create_tag("alice/m", tag="v1", revision="dev/x")
refs = api.list_repo_refs("alice/m", include_pull_requests=True)
out["refs"] = [[r.ref for r in group] for group in (refs.branches, refs.tags, refs.pull_requests)]
out["tagged"] = Path(hf_hub_download("alice/m", "dev.txt", revision="v1")).read_text()
api.delete_branch("alice/m", branch="dev/x")
api.delete_tag("alice/m", tag="v1")
out["deleted"] = fails(api.model_info, "alice/m", revision="v1")
fs = HfFileSystem()
out["fs"] = [sorted(fs.glob("alice/m/files/*.txt")), fs.read_text("datasets/alice/d/data/train.csv"), fs.isdir("alice/m/a/b")]
with fs.open("datasets/alice/d/data/train.csv", block_size=2) as file:
    file.seek(2)
    out["part"] = file.read(2).decode()
with fs.open("datasets/alice/d/data/new.txt", "w") as file:
    file.write("new")
out["written"] = fs.exists("datasets/alice/d/data/new.txt")
api.update_repo_settings("alice/m", private=True)
out["auth"] = [fails(api.auth_check, "alice/m"), fails(api.auth_check, "alice/m", token=False)]
"""
        out = run(hub, code, token="hf_alice")
    files = [f"files/{i}.txt" for i in range(5)]
    top = [".gitattributes", "README.md", "config.json"]
    assert out["all"] == sorted([*top, "a", "a/b", "a/b/c.txt", "files", *files])
    assert (out["top"], out["files"]) == (sorted([*top, "a", "files"]), files)
    tags = ["transformers", "zero-shot-image-classification", "pets", "dataset:alice/d", "license:mit", "region:us"]
    assert out["info"] == ["alice", "zero-shot-image-classification", "transformers", "mit", tags, False]
    assert out["sizes"]["a/b/c.txt"] == 1 and out["expand"] is None
    assert set(out["models"]) == {"alice/m", "alice/secret", "bob/other"}
    assert set(out["public"]) == {"alice/m", "bob/other"}
    assert (out["pets"], out["search"], out["datasets"]) == (["alice/m"], ["bob/other"], ["alice/d"])
    assert out["paths"] == [["a", "put", None], ["files/1.txt", "put", 1]]
    assert out["branch again"] == ["HfHubHTTPError", 409] and out["deleted"] == ["RevisionNotFoundError", 404]
    assert out["refs"] == [["refs/heads/main", "refs/heads/dev/x"], ["refs/tags/v1"], []] and out["tagged"] == "dev"
    assert out["fs"] == [[f"alice/m/{path}" for path in files], "a\n1\n2\n", True]
    assert (out["part"], out["written"]) == ("1\n", True)
    assert out["auth"] == [None, ["RepositoryNotFoundError", 404]]


def test_who_may(hub):
    """Tokens, private and gated repositories, organizations."""
    hub.put("alice/open", {"a.txt": b"a"})
    hub.put("alice/private", {"a.txt": b"a"}, private=True)
    hub.put("team/gated", {"a.txt": b"a", "README.md": b"# Ask"})
    hub.repo("team/gated").gated = "manual"
    code = """
def upload(repo, token):
    return fails(api.upload_file, repo_id=repo, path_in_repo="b.txt", path_or_fileobj=b"b", token=token)
for token in (False, "hf_wrong", "hf_alice_read", "hf_bob", "hf_alice"):
    own = {"token": token, "cache_dir": f"cache-{token}"}  # after a 401 the client takes what is cached
    download = [fails(hf_hub_download, f"alice/{name}", "a.txt", **own) for name in ("open", "private")]
    create = fails(api.create_repo, f"team/new", token=token)
    out[str(token)] = [*download, upload("alice/open", token), upload("alice/private", token), create]
user = api.whoami(token="hf_alice_read")
out["who"] = [user["name"], [org["name"] for org in user["orgs"]], user["auth"]["accessToken"]["role"]]
out["whoami"] = fails(api.whoami, token="hf_wrong")
out["gated"] = [fails(hf_hub_download, "team/gated", "a.txt", token=t) for t in ("hf_bob", "hf_alice_read")]
out["gated card"] = fails(hf_hub_download, "team/gated", "README.md", token="hf_bob")
"""
    out = run(hub, code)
    no, unknown, forbidden = ["HfHubHTTPError", 401], ["RepositoryNotFoundError", 404], ["HfHubHTTPError", 403]
    assert out["False"] == [None, unknown, no, unknown, no]
    assert (out["hf_wrong"], out["hf_alice"]) == ([no] * 5, [None] * 5)
    assert out["hf_alice_read"] == [None, None, forbidden, forbidden, forbidden]
    assert out["hf_bob"] == [None, unknown, forbidden, unknown, forbidden]
    assert out["who"] == ["alice", ["team"], "read"] and out["whoami"] == no
    assert out["gated"] == [["GatedRepoError", 403], None] and out["gated card"] is None
    assert set(hub.files("alice/private")) == {".gitattributes", "a.txt", "b.txt"}


def test_pull_requests(hub):
    """A stranger proposes, the owner merges; a conflict is none of the Hub's business to solve."""
    hub.put("alice/m", {"a.txt": b"a", "b.txt": b"b"})
    code = """
bob = {"repo_id": "alice/m", "token": "hf_bob"}
made = api.upload_file(path_in_repo="w.bin", path_or_fileobj=b"w" * 1000, create_pr=True, **bob)
out["made"] = [made.pr_num, made.pr_revision]
api.upload_file(path_in_repo="b.txt", path_or_fileobj=b"b2", revision="refs/pr/1", **bob)
out["not yet"] = paths("alice/m")
out["there"] = paths("alice/m", revision="refs/pr/1")
out["read"] = Path(hf_hub_download("alice/m", "b.txt", revision="refs/pr/1")).read_text()
out["draft"] = api.create_pull_request("alice/m", title="second", token="hf_bob").status
api.upload_file(path_in_repo="a.txt", path_or_fileobj=b"other", revision="refs/pr/2", **bob)
talk = api.create_discussion("alice/m", title="talk", description="hello", token="hf_bob")
api.comment_discussion("alice/m", talk.num, "again", token="hf_alice")
out["refused"] = fails(api.merge_pull_request, "alice/m", 1, token="hf_bob")
api.upload_file(repo_id="alice/m", path_in_repo="a.txt", path_or_fileobj=b"a2", token="hf_alice")
api.merge_pull_request("alice/m", 1, token="hf_alice")
out["conflict"] = fails(api.merge_pull_request, "alice/m", 2, token="hf_alice")
api.change_discussion_status("alice/m", 3, "closed", token="hf_alice")
out["all"] = [[d.num, d.title, d.status, d.is_pull_request, d.author] for d in api.get_repo_discussions("alice/m")]
out["events"] = [e.type for e in api.get_discussion_details("alice/m", 3).events]
out["merged"] = api.get_discussion_details("alice/m", 1).merge_commit_oid
"""
    out = run(hub, code)
    assert out["made"] == [1, "refs/pr/1"] and out["draft"] == "draft" and out["read"] == "b2"
    assert "w.bin" not in out["not yet"] and "w.bin" in out["there"]
    assert out["refused"] == ["HfHubHTTPError", 403] and out["conflict"] == ["HfHubHTTPError", 409]
    assert out["all"] == [
        [1, "Upload w.bin with huggingface_hub", "merged", True, "bob"],
        [2, "second", "draft", True, "bob"],
        [3, "talk", "closed", False, "bob"],
    ]
    assert out["events"] == ["comment", "comment", "status-change"]
    assert out["merged"] == hub.commits("alice/m")[0].sha
    files = hub.files("alice/m")
    assert (files["a.txt"], files["b.txt"], files["w.bin"]) == (b"a2", b"b2", b"w" * 1000)


def test_datasets_and_transformers(hub, clip_folder):
    """A dataset with pictures and a model: pushed, and opened by name in a process with an empty cache."""
    colour_dataset(2).save_to_disk(hub.folder / "colours")
    push = """
import datasets
from transformers import AutoModel, AutoProcessor
data = datasets.load_from_disk("colours")
datasets.DatasetDict({"train": data, "test": data.select([0])}).push_to_hub("alice/colours", private=True)
data.push_to_hub("alice/colours", "second", commit_message="more", max_shard_size="20KB")
model = AutoModel.from_pretrained(sys.argv[1])
out["first"] = model.push_to_hub("team/clip").oid
model.logit_scale.data.fill_(1.0)
model.push_to_hub("team/clip", revision="v2")
AutoProcessor.from_pretrained(sys.argv[1]).push_to_hub("team/clip")
"""
    first = run(hub, push, clip_folder, token="hf_alice")["first"]
    assert "second/train-00000-of-00001.parquet" in hub.files("datasets/alice/colours")
    load = """
import datasets
from transformers import AutoModel, pipeline
data = datasets.load_dataset("alice/colours")
out["data"] = {name: [len(split), split[0]["image"].size, split[0]["captions"]] for name, split in data.items()}
out["second"] = len(datasets.load_dataset("alice/colours", "second", split="train"))
out["stream"] = [row["label"] for row in datasets.load_dataset("alice/colours", split="test", streaming=True)]
out["scales"] = [float(AutoModel.from_pretrained("team/clip", revision=r).logit_scale) for r in ("main", "v2", sys.argv[1])]
classify = pipeline("zero-shot-image-classification", model="team/clip")
out["labels"] = sorted(row["label"] for row in classify(data["train"][0]["image"], candidate_labels=["a", "b"]))
"""
    out = run(hub, load, first, token="hf_alice_read", home="empty")
    picture = [[24, 20], ["red no 0", "very red "]]
    assert out["data"] == {"train": [6, *picture], "test": [1, *picture]}
    assert (out["second"], out["stream"], out["labels"]) == (6, [0], ["a", "b"])
    assert out["scales"][1] == 1.0 and out["scales"][0] == out["scales"][2] > 1.0
    assert set(hub.outside()) <= {"datasets-server.127.0.0.1"}, "nothing else of the world is asked"


def test_faults_over_plain_http(hub):
    """Every kind of fault, each condition of a rule, and what the log says of them."""
    hub.put("alice/m", {"a.txt": b"x" * 1000})
    path, info = "/alice/m/resolve/main/a.txt", "/api/models/alice/m"
    for status in (401, 403, 404, 409, 412, 500, 503):
        hub.rules = [{"match": "GET .*/resolve/", "do": status, "times": 1}]
        assert [ask(hub, path)[0], ask(hub, path)[0]] == [status, 200]
    hub.rules = [{"match": info, "do": 429, "retry_after": 7, "message": "slowly", "code": "X", "body": {"url": "u"}}]
    status, headers, body = ask(hub, info)
    assert (status, headers["Retry-After"], headers["X-Error-Code"]) == (429, "7", "X")
    assert json.loads(body) == {"error": "slowly", "url": "u"} and hub.requests(info)[-1]["fault"] == 429

    hub.rules = [{"match": info, "do": 500, "at": [2]}, {"match": info, "do": 503, "from": 3, "to": 6, "every": 2}]
    assert [ask(hub, info)[0] for _ in range(8)] == [200, 500, 200, 200, 503, 200, 503, 200]

    hub.rules = [{"match": path, "do": "cut", "after_bytes": 300}]
    for method in ("HEAD", "GET"):
        with pytest.raises(ConnectionError):
            ask(hub, path, method)
    hub.rules = [{"match": path, "do": "close"}]
    with pytest.raises(Exception, match="IncompleteRead"):
        ask(hub, path)
    cut, closed = hub.requests(path)[-2:]
    assert (cut["sent"], cut["status"], closed["sent"], closed["fault"]) == (300, None, 500, "close")

    hub.rules = [{"match": "PUT", "do": "cut", "after_bytes": 100_000}]
    with pytest.raises(ConnectionError):
        ask(hub, "/cdn/x", "PUT", b"x" * 10_000_000)
    assert 100_000 <= hub.requests("PUT")[-1]["received"] < 10_000_000

    create = json.dumps({"name": "lost", "type": "model"}).encode()
    hub.rules = [{"match": "POST /api/repos/create", "do": "lost"}]
    with pytest.raises(ConnectionError):
        ask(hub, "/api/repos/create", "POST", create)
    assert hub.repo("alice/lost"), "carried out all the same"

    hub.rules = [{"match": path, "do": "slow", "ms": 150}]
    with pytest.raises(TimeoutError):
        ask(hub, path, timeout=0.1)
    assert ask(hub, path)[0] == 200
    hub.rules = [{"match": path, "do": "hang"}]
    with pytest.raises(TimeoutError):
        ask(hub, path, timeout=0.3)
    assert (hub.wait_for(path)[-1]["fault"], hub.requests(path)[-1]["status"]) == ("hang", None)


def test_faults_and_the_clients(hub):
    """What the clients make of faults: which they retry, which they resume, which come straight out."""
    data = bytes(range(256)) * 50_000
    for name in ("a", "b", "c", "d"):
        hub.put(f"alice/{name}", {"w.bin": data})
    hub.rules = [
        {"match": "GET /cdn/models/alice/a/", "do": "close", "after_bytes": 11_000_000, "times": 1},
        {"match": "GET /cdn/models/alice/b/", "do": "cut", "after_bytes": 11_000_000, "times": 1},
        {"match": "HEAD /alice/c/resolve", "do": 503, "times": 1},
        {"match": "POST .*/c/commit/", "do": 503, "at": [1]},
        {"match": "POST .*/c/commit/", "do": "lost", "at": [1]},
        {"match": "POST .*/c/commit/", "do": 409, "at": [1]},
        {"match": "POST .*/d/preupload/", "do": 429, "retry_after": 0, "times": 1},
        {"match": "PUT /cdn/models/alice/d/", "do": "cut", "times": 1},
    ]
    code = """
out["close"] = os.path.getsize(hf_hub_download("alice/a", "w.bin"))
out["cut"] = [fails(hf_hub_download, "alice/b", "w.bin"), os.path.getsize(hf_hub_download("alice/b", "w.bin"))]
out["head 503"] = os.path.getsize(hf_hub_download("alice/c", "w.bin"))
def upload(repo, content):
    return fails(api.upload_file, repo_id=repo, path_in_repo="v.bin", path_or_fileobj=content * 1_000_000)
out["commits"] = [upload("alice/c", content) for content in (b"v", b"v", b"v", b"w", b"w")]
out["upload cut"] = upload("alice/d", b"v")
"""
    out = run(hub, code, token="hf_alice")
    assert out["close"] == out["head 503"] == out["cut"][1] == len(data)
    assert [r["range"] for r in hub.requests("GET /cdn/.*/a/")] == [None, "bytes=10485760-"], "in steps of 10 MiB"
    assert out["cut"][0] == ["ReadError", None], "a reset in the middle of a download is not retried"
    errors = ["HfHubHTTPError", 503], ["ReadError", None], None, ["HfHubHTTPError", 409], None
    assert out["commits"] == [*errors], "no commit is retried"
    assert len(hub.commits("alice/c")) == 4, "after a lost answer the third upload found its file there"
    assert out["upload cut"] is None and len(hub.requests("PUT /cdn/models/alice/d/")) == 2
    assert hub.files("alice/d")["v.bin"] == b"v" * 1_000_000
