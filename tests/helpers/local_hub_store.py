"""What the local Hub keeps: repositories with immutable commits, references, discussions, and objects by their hash."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import re
import time
from base64 import b64decode
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType

import yaml

LFS_SUFFIXES = "7z arrow bin bz2 ckpt gz h5 joblib model msgpack npy npz onnx parquet pickle pkl pt pth safetensors tar"
LFS_SUFFIXES += " tflite tgz wasm xz zip zst"
PICTURES = "bmp gif png tiff jpg jpeg webp"  # tracked by dataset repositories only
LICENCES = """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigcode-openrail-m afl-3.0 artistic-2.0
bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0
cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0
epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl
mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr llama2 gemma unknown
other""".split()
REPO_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]{0,95}(?<![.-])", re.ASCII)
REPO_ID = re.compile(r"([\w.-]+/)?[\w.-]+", re.ASCII)


class Problem(Exception):
    """An answer that is no success: status, the Hub's error code, words, further headers and fields of the body."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **body):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers, self.body = headers or {}, body


def now() -> str:
    return datetime.fromtimestamp(time.time(), timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def git_oid(data: bytes, kind: str = "blob") -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A file: `oid` is git's name of the blob, which for an LFS file is the pointer."""

    oid: str
    size: int
    sha256: str | None = None

    @classmethod
    def lfs(cls, sha256: str, size: int) -> Entry:
        return cls(git_oid(cls(sha256, size, sha256).pointer()), size, sha256)

    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


@dataclass(frozen=True)
class Commit:
    sha: str
    parents: tuple[str, ...]
    files: MappingProxyType  # path to Entry
    title: str
    message: str
    author: str
    date: str


class Objects:
    """Contents by hash, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes, name: str) -> None:
        if not (self.folder / name).exists():
            (self.folder / name).write_bytes(data)

    def get(self, entry: Entry) -> bytes:
        return (self.folder / (entry.sha256 or entry.oid)).read_bytes()

    def add(self, data: bytes, lfs: bool) -> Entry:
        entry = Entry.lfs(hashlib.sha256(data).hexdigest(), len(data)) if lfs else Entry(git_oid(data), len(data))
        self.put(data, entry.sha256 or entry.oid)
        return entry


class Repo:
    """A repository. `kind` is models, datasets or spaces."""

    def __init__(self, kind: str, repo_id: str, private: bool, author: str, objects: Objects, lfs_above: int):
        self.kind, self.id, self.private, self.objects, self.lfs_above = kind, repo_id, private, objects, lfs_above
        self.gated: bool | str = False
        self.granted: set[str] = set()  # users who may read it although it is gated
        self.created = now()
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.lfs: set[str] = set()  # sha256 of the LFS objects that were uploaded to this repository
        self.discussions: list[dict] = []
        suffixes = LFS_SUFFIXES.split() + (PICTURES.split() if kind == "datasets" else [])
        lines = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in suffixes)
        self.write("refs/heads/main", {".gitattributes": objects.add(lines.encode(), False)}, "initial commit", author)

    @property
    def owner(self) -> str:
        return self.id.partition("/")[0]

    @property
    def path(self) -> str:
        """As in an address: `user/name` or `datasets/user/name`."""
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    def resolve(self, revision: str) -> Commit:
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if revision not in self.commits:
            raise Problem(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[revision]

    def history(self, commit: Commit) -> list[Commit]:
        """The commit and its first parents, newest first."""
        chain = [commit]
        while chain[-1].parents:
            chain.append(self.commits[chain[-1].parents[0]])
        return chain

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The commit that gave a file, or anything in a folder, its present content."""

        def content(of: Commit):
            return {p: e for p, e in of.files.items() if p == path or p.startswith(path + "/")}

        chain, present = self.history(commit), content(commit)
        return next((new for new, old in itertools.pairwise(chain) if content(old) != present), chain[-1])

    def write(self, ref: str, files: dict, title: str, author: str, message: str = "", parents=()) -> Commit:
        """Adds a commit and lets a reference point to it."""
        listing = sorted((path, entry.oid) for path, entry in files.items())
        record = [parents, listing, title, message, author, now(), len(self.commits), self.path]
        sha = hashlib.sha1(json.dumps(record).encode()).hexdigest()
        commit = Commit(sha, tuple(parents), MappingProxyType(dict(files)), title, message, author, record[5])
        self.commits[sha], self.refs[ref] = commit, sha
        return commit

    def upload_mode(self, commit: Commit, path: str, size: int, sample: bytes) -> str:
        """`lfs` for what .gitattributes tracks, large files and binary ones."""
        attributes = commit.files.get(".gitattributes")
        lines = self.objects.get(attributes).decode().splitlines() if attributes else []
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        tracked = any(fnmatch.fnmatch(path, p) or fnmatch.fnmatch(path.rpartition("/")[2], p) for p in patterns)
        return "lfs" if tracked or size > self.lfs_above or b"\0" in sample else "regular"

    def apply(self, base: Commit, operations: list[tuple[str, dict]]) -> dict[str, Entry]:
        """The files of a commit after the lines of a commit request."""
        files = dict(base.files)
        for key, value in operations:
            path = value["path"]
            parts = path.rstrip("/").split("/")
            if not path or path.startswith("/") or any(part in ("", ".", "..", ".git") for part in parts):
                raise Problem(400, f"Invalid path: {path}")
            if key == "file":
                content = value["content"]
                data = b64decode(content) if value.get("encoding") == "base64" else content.encode()
                if path == "README.md":
                    errors, _ = check_card(data.decode(), self.kind)
                    if errors:
                        raise Problem(400, "Invalid metadata in README.md: " + "; ".join(errors))
                files[path] = self.objects.add(data, False)
            elif key == "lfsFile":
                if value["oid"] not in self.lfs:
                    raise Problem(400, f"LFS pointer pointed to a file that does not exist: {path}")
                size = (self.objects.folder / value["oid"]).stat().st_size
                files[path] = Entry.lfs(value["oid"], size)
            elif key == "copyFile":
                source = self.resolve(value["srcRevision"]) if value.get("srcRevision") else base
                if value["srcPath"] not in source.files:
                    raise Problem(404, f"Source file does not exist: {value['srcPath']}", "EntryNotFound")
                files[path] = source.files[value["srcPath"]]
            elif key in ("deletedFile", "deletedFolder"):
                folder = path.rstrip("/") + "/"
                gone = [p for p in files if (p == path if key == "deletedFile" else p.startswith(folder))]
                if not gone:
                    raise Problem(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for name in gone:
                    del files[name]
            else:
                raise Problem(400, f"Unknown operation: {key}")
        for path in files:
            parents = [path[:i] for i, letter in enumerate(path) if letter == "/"]
            if any(parent in files for parent in parents):
                raise Problem(400, f"A file and a folder of the same name: {path}")
        return files

    def merge(self, number: int, author: str) -> Commit:
        """Applies what a pull request changed to main; a file that both changed is a conflict."""
        head, main = self.resolve(f"refs/pr/{number}"), self.resolve("main")
        ours = {commit.sha for commit in self.history(main)}
        base = next(commit for commit in self.history(head) if commit.sha in ours)
        files = dict(main.files)
        for path in {*base.files, *head.files}:
            old, new = base.files.get(path), head.files.get(path)
            if old == new or main.files.get(path) == new:
                continue
            if main.files.get(path) != old:
                raise Problem(409, f"This pull request has conflicts: {path}")
            files.pop(path, None)
            files |= {path: new} if new else {}
        title = f"{self.discussions[number - 1]['title']} (#{number})"
        return self.write("refs/heads/main", files, title, author, parents=(main.sha, head.sha))

    def tree(self, commit: Commit, folder: str = "", recursive: bool = True, expand: bool = False) -> list[dict]:
        """Files and folders below a folder, folders before what they contain."""
        prefix = folder.strip("/") + "/" if folder.strip("/") else ""
        inside = sorted(path for path in commit.files if path.startswith(prefix))
        if prefix and not inside:
            raise Problem(404, f"{folder} does not exist on this revision", "EntryNotFound")
        names: dict[str, None] = {}
        for path in inside:
            parts = path[len(prefix) :].split("/")
            depths = range(1, len(parts) + 1) if recursive else (1,)
            names |= dict.fromkeys(prefix + "/".join(parts[:depth]) for depth in depths)
        return [self.describe(commit, name, expand) for name in names]

    def describe(self, commit: Commit, path: str, expand: bool = False) -> dict | None:
        """A file or folder as tree and paths-info say it; None where there is none."""
        entry, below = commit.files.get(path), [p for p in commit.files if p.startswith(path + "/")]
        if entry:
            answer = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
            if entry.sha256:
                answer["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": len(entry.pointer())}
        elif below:
            listing = "".join(f"{p} {commit.files[p].oid}\n" for p in sorted(below))
            answer = {"type": "directory", "oid": git_oid(listing.encode(), "tree"), "size": 0, "path": path}
        else:
            return None
        if expand:
            last = self.last_change(commit, path)
            answer["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
            if entry:
                scans = {"avScan": {"status": "safe"}, "pickleImportScan": None}
                answer["securityFileStatus"] = {"status": "safe", **scans}
        return answer

    def info(self, commit: Commit, blobs: bool = False) -> dict:
        """What the Hub says of a repository; card data and tags from the README of the commit."""

        def text(name):
            return self.objects.get(commit.files[name]).decode() if name in commit.files else ""

        card, siblings = front_matter(text("README.md"))[0] or {}, []
        for path, entry in sorted(commit.files.items()):
            sibling: dict = {"rfilename": path}
            if blobs:
                sibling |= {"blobId": entry.oid, "size": entry.size}
                if entry.sha256:
                    lfs = {"sha256": entry.sha256, "size": entry.size, "pointerSize": len(entry.pointer())}
                    sibling["lfs"] = lfs
            siblings.append(sibling)
        sizes = {entry.oid: entry.size for c in self.commits.values() for entry in c.files.values()}
        answer = {"_id": git_oid(self.path.encode())[:24], "id": self.id, "author": self.owner, "sha": commit.sha}
        answer |= {"lastModified": commit.date, "createdAt": self.created, "private": self.private, "gated": self.gated}
        answer |= {
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
            "usedStorage": sum(sizes.values()),
        }
        answer["tags"] = card_tags(card, self.kind)
        if card:
            answer["cardData"] = card
        if self.kind == "models":
            config = json.loads(text("config.json") or "{}")
            kind = config.get("model_type")
            task = card.get("pipeline_tag") or {"clip": "zero-shot-image-classification"}.get(kind)
            library = card.get("library_name") or ("transformers" if kind else None)
            answer |= {"modelId": self.id, "pipeline_tag": task, "library_name": library}
            answer["tags"] = list(dict.fromkeys([t for t in (library, task) if t] + answer["tags"]))
            answer["config"] = {k: config[k] for k in ("architectures", "model_type", "auto_map") if k in config}
            answer["model-index"] = card.get("model-index")
        return answer


def front_matter(text: str) -> tuple[dict | None, str | None]:
    """The metadata at the head of a card, or None, and what is wrong with it."""
    found = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
    if not found:
        return None, None
    try:
        data = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        return None, f"YAML: {error}"
    return (data, None) if isinstance(data, dict) else (None, "the metadata is no mapping" if data else None)


def _list(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def card_tags(card: dict, kind: str) -> list[str]:
    tags = list(card.get("tags") or [])
    keys = ("datasets", "license", "language", "base_model", "task_categories", "size_categories", "task_ids")
    for key in keys:
        plain = key == "language" and kind == "models"
        name = {"datasets": "dataset"}.get(key, key)
        tags += [value if plain else f"{name}:{value}" for value in _list(card.get(key))]
    return list(dict.fromkeys([*tags, "region:us"]))


def check_card(text: str, kind: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of a card's metadata, of the kinds that the Hub refuses or warns about."""
    card, error = front_matter(text)
    if error:
        return [error], []
    if card is None:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = [
        f'"license" must be one of the known licenses, not {v!r}'
        for v in _list(card.get("license"))
        if v not in LICENCES
    ]
    keys = ("datasets", "base_model") if kind == "models" else ()
    errors += [
        f'"{key}" with value "{value}" is not valid. Use an id from the Hub.'
        for key in keys
        for value in _list(card.get(key))
        if not (isinstance(value, str) and REPO_ID.fullmatch(value)) or value.startswith(".")
    ]
    errors += [
        f'"{k}" must be a string' for k in ("pipeline_tag", "library_name") if not isinstance(card.get(k, ""), str)
    ]
    errors += [f'"tags[{i}]" must be a string' for i, v in enumerate(_list(card.get("tags"))) if not isinstance(v, str)]
    errors += [
        f'"language": {v!r} is no ISO code' for v in _list(card.get("language")) if v != str(v).lower() or len(v) > 8
    ]
    for model in _list(card.get("model-index")):
        for result in _list(model.get("results")):
            wanted = [(result.get("task"), ("type",)), (result.get("dataset"), ("type", "name"))]
            wanted += [(metric, ("type", "value")) for metric in _list(result.get("metrics"))]
            missing = [key for part, keys in wanted for key in keys if (part or {}).get(key) is None]
            errors += [f'"model-index[0].results": "{key}" is required' for key in missing]
    for config in _list(card.get("configs")):
        if not isinstance(config, dict) or "config_name" not in config:
            errors.append('"configs": "config_name" is required')
    names = Counter(c.get("config_name") for c in _list(card.get("configs")) if isinstance(c, dict))
    errors += [f'"configs": {name!r} is there twice' for name, count in names.items() if count > 1]
    return errors, []
