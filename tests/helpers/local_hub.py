"""A Hub on loopback that the real huggingface_hub, datasets and transformers talk to, and that fails as rules tell it.

    with local_hub(rules=[{"match": "POST .*/commit/", "do": 503, "at": [1]}]) as hub:
        done = hub.python("import huggingface_hub; print(huggingface_hub.whoami()['name'])", token="hf_alice")
        hub.files("datasets/alice/captions"), hub.requests("POST .*/commit/")

huggingface_hub reads HF_ENDPOINT and HF_HUB_OFFLINE when it is imported, and the test process is offline: code that
needs the Hub runs in a child process, by `hub.python` or with the environment `hub.environment(...)`. There, requests to
any other machine go to this server as to a proxy: they are written down (`hub.outside()`) and refused.

A rule is {"match": regex of "METHOD path", "do": …} with conditions that must all hold, on the number of the request
among those that match and that no rule before took (from 1): at, from, to, every; and times, how often the rule is used
at most. The first that fits decides; `hub.rules` may be exchanged at any time. `do` is one of
    401, 503, …   this status, once the request was read. Further fields: code (X-Error-Code), message, retry_after, body
    "cut"         RST in the middle of the body of an upload, or of the answer, after `after_bytes`
    "close"       the same with an orderly end (FIN)
    "lost"        the request is carried out, but its answer never sent (RST)
    "slow"        `ms` before every 64 KiB received and sent, and once at least
    "hang"        no answer, until the client goes away

As on the real Hub, LFS files are uploaded to and downloaded from another host (here: another port, paths /cdn/…), with
signed addresses and without a token. Not as there: who may not see a repository gets 404 without a token too, not 401.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from urllib.parse import unquote, urlencode

from aiohttp import web
from local_hub_api import Api, Call
from local_hub_store import Commit, Objects, Problem, Repo
from processes import HANGS

TOKENS = {
    "hf_alice": {"user": "alice", "orgs": ["team"], "role": "write"},
    "hf_alice_read": {"user": "alice", "orgs": ["team"], "role": "read"},
    "hf_bob": {"user": "bob", "orgs": [], "role": "write"},
}
CHUNK = 2**16
CONVERSION = "Adding `safetensors` variant of this model"
CDN = re.compile(r"/cdn/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})(/(?P<rest>.+))?")


class Hub(Api):
    """The server and, for the tests, what it knows. Made by `local_hub`."""

    def __init__(self, folder: Path, tokens: dict, rules: list, part_size: int, page_size: int, lfs_above: int):
        self.folder, self.tokens, self.rules = folder, tokens, rules
        self.part_size, self.page_size, self.lfs_above = part_size, page_size, lfs_above
        self.objects = Objects(folder / "objects")
        self.repos: dict[tuple[str, str], Repo] = {}
        self.log: list[dict] = []
        self.errors: list[str] = []  # tracebacks of what this server cannot answer
        self.parts: dict[tuple[str, int], bytes] = {}
        self.secret = secrets.token_bytes(16)
        self.url = self.cdn = ""

    # --- for the tests -----------------------------------------------------------------------------------------------

    @property
    def rules(self) -> list[dict]:
        return [rule for rule, _ in self._rules]

    @rules.setter
    def rules(self, rules: list[dict]) -> None:
        self._rules = [(rule, [0, 0]) for rule in rules]  # requests that matched; uses

    def requests(self, match: str = "") -> list[dict]:
        """What was asked, in order: n, time, method, path, query, status (None: no whole answer), fault, received, sent,
        auth (an Authorization header came), user, range. `match` is a regex of "METHOD path"."""
        return [dict(r) for r in self.log if re.search(match, f"{r['method']} {r['path']}") and not r["outside"]]

    def wait_for(self, match: str, count: int = 1, timeout: float = 30) -> list[dict]:
        """Waits until so many requests that match have begun."""
        end = time.monotonic() + timeout
        while len(found := self.requests(match)) < count:
            assert time.monotonic() < end, f"{len(found)} requests {match!r} instead of {count}"
            time.sleep(0.01)
        return found

    def outside(self) -> list[str]:
        """The other hosts that child processes asked for."""
        return [r["outside"] for r in self.log if r["outside"]]

    def repo(self, name: str) -> Repo:
        """`user/name` of a model, `datasets/user/name`."""
        kind, repo_id = name.split("/", 1) if name.count("/") == 2 else ("models", name)
        return self.repos[kind, repo_id]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repo(name)
        return {path: self.objects.get(entry) for path, entry in repo.resolve(revision).files.items()}

    def commits(self, name: str, revision: str = "main") -> list[Commit]:
        """Newest first."""
        repo = self.repo(name)
        return repo.history(repo.resolve(revision))

    def put(self, name: str, files: dict[str, bytes], private: bool = False, revision: str = "main") -> str:
        """Commits files without a client, unchecked (evil names too), to a repository that is made if need be."""
        try:
            repo = self.repo(name)
        except KeyError:
            kind, repo_id = name.split("/", 1) if name.count("/") == 2 else ("models", name)
            repo = self.new_repo(kind, repo_id, private, repo_id.partition("/")[0])
        head, entries = repo.resolve(revision), {}
        for path, data in files.items():
            entries[path] = self.objects.add(data, repo.upload_mode(head, path, len(data), data[:512]) == "lfs")
        repo.lfs |= {entry.sha256 for entry in entries.values() if entry.sha256}
        ref = revision if revision in repo.refs else f"refs/heads/{revision}"
        return repo.write(ref, {**head.files, **entries}, "put", repo.owner, parents=(head.sha,)).sha

    def convert(self, name: str, files: dict[str, bytes], user: str = "SFconvertbot", title: str = CONVERSION) -> int:
        """Opens a pull request, by default that of the Hub's bot, which adds safetensors to a model. Returns its number."""
        number = self._open(self.repo(name), title, "", user, True, "open")["num"]
        self.put(name, files, revision=f"refs/pr/{number}")
        return number

    def environment(self, token: str | None = None, home: str = "home", **more: str | None) -> dict[str, str]:
        """For child processes. `home` names the folder of HF_HOME: another one is an empty cache. None takes away."""
        drop = re.compile(r"(HF|HUGGING_?FACE(_HUB)?|TRANSFORMERS|DATASETS)_|.*_proxy$", re.IGNORECASE)
        env = {key: value for key, value in os.environ.items() if not drop.match(key)}
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(self.folder / home), "HF_HUB_DISABLE_XET": "1"}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        env |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
        env |= {"http_proxy": self.url, "https_proxy": self.url, "no_proxy": "127.0.0.1,localhost"}
        env |= {"HF_TOKEN": token, **more}
        return {key: value for key, value in env.items() if value is not None}

    @property
    def env(self) -> dict[str, str]:
        return self.environment()

    def python(self, code: str, *args, token=None, home="home", **env) -> subprocess.CompletedProcess:
        """Runs Python code in a child process: its output as text; it may have failed."""
        command, env = [sys.executable, "-c", code, *map(str, args)], self.environment(token, home, **env)
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANGS, cwd=self.folder)

    # --- requests and faults -----------------------------------------------------------------------------------------

    async def handle(self, request: web.Request) -> web.StreamResponse:
        line = {"n": len(self.log) + 1, "time": time.time(), "method": request.method, "path": request.rel_url.path}
        line |= {"query": request.query_string if "sig=" not in request.query_string else "", "status": None}
        line |= {"fault": None, "received": 0, "sent": 0, "auth": "Authorization" in request.headers, "user": None}
        line |= {"range": request.headers.get("Range"), "outside": None}
        port = request.transport.get_extra_info("sockname")[1]
        if request.method == "CONNECT" or request.url.host not in ("127.0.0.1", "localhost"):
            line["outside"] = str(request.url.host or request.path)
        self.log.append(line)
        rule = {} if line["outside"] else self._rule(f"{request.method} {line['path']}")
        do = line["fault"] = rule.get("do")
        sending = request.method in ("POST", "PUT")
        try:
            if do == "hang":
                await asyncio.sleep(3600)
            if do == "slow":
                await asyncio.sleep(rule.get("ms", 100) / 1000)
            body = await self._receive(request, line, rule if sending else {})
            if body is None:
                return self._break(request, do)
            if line["outside"]:
                raise Problem(501, "No way out of this machine")
            if isinstance(do, int):
                headers = {"Retry-After": str(rule["retry_after"])} if "retry_after" in rule else {}
                raise Problem(
                    do, rule.get("message", "expected failure"), rule.get("code"), headers, **rule.get("body", {})
                )
            who = self._who(request)
            line["user"] = who and who["user"]
            answer = self._answer(Call(request, body, who), port)
        except Problem as problem:
            words = " ".join(problem.message.encode("ascii", "replace").decode().split())
            headers = {"X-Error-Message": words, **problem.headers}
            headers |= {"X-Error-Code": problem.code} if problem.code else {}
            answer = problem.status, headers, {"error": problem.message, **problem.body}
        except Exception:
            if request.transport is None:  # the client is gone
                raise
            self.errors.append(traceback.format_exc())
            answer = 500, {}, {"error": "a fault of the local Hub"}
        if do == "lost":
            return self._break(request, do)
        status, headers, data = answer if isinstance(answer, tuple) else (200, {}, answer)
        if not isinstance(data, bytes):
            headers, data = {"Content-Type": "application/json", **headers}, json.dumps(data).encode()
        return await self._send(request, line, {} if sending and do != "slow" else rule, status, headers, data)

    def _rule(self, what: str) -> dict:
        for rule, count in self._rules:
            if re.search(rule["match"], what):
                count[0] += 1
                n = count[0]
                fits = n in rule.get("at", [n]) and rule.get("from", 1) <= n <= rule.get("to", n)
                if fits and n % rule.get("every", 1) == 0 and count[1] < rule.get("times", n):
                    count[1] += 1
                    return rule
        return {}

    async def _receive(self, request: web.Request, line: dict, rule: dict) -> bytes | None:
        """The body; None where a rule cuts it."""
        body, stop = bytearray(), rule.get("do") in ("cut", "close")
        after = rule.get("after_bytes", (request.content_length or 2) // 2)
        async for chunk in request.content.iter_chunked(CHUNK):
            body += chunk
            line["received"] = len(body)
            if stop and len(body) >= after:
                return None
            if rule.get("do") == "slow":
                await asyncio.sleep(rule.get("ms", 100) / 1000)
        return None if stop else bytes(body)

    async def _send(self, request, line, rule, status, headers, data) -> web.StreamResponse:
        stop = rule.get("do") in ("cut", "close")
        if stop and (request.method == "HEAD" or not data):
            return self._break(request, rule["do"])
        response = web.StreamResponse(status=status, headers=headers)
        response.content_length = len(data)
        await response.prepare(request)
        line["status"] = status
        if request.method == "HEAD":
            return response
        end = min(len(data), rule.get("after_bytes", len(data) // 2)) if stop else len(data)
        for start in range(0, end, CHUNK):
            if rule.get("do") == "slow":
                await asyncio.sleep(rule.get("ms", 100) / 1000)
            await response.write(data[start : min(end, start + CHUNK)])
            line["sent"] = min(end, start + CHUNK)
        if stop:
            line["status"] = None
            await asyncio.sleep(0.02)
            self._break(request, rule["do"])
        return response

    def _break(self, request: web.Request, how: str) -> web.Response:
        if request.transport and how == "close":
            request.transport.close()
        elif request.transport:  # a socket that lingers for no time closes with RST
            sock = request.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.transport.abort()
        return web.Response()

    # --- the other host: LFS files ------------------------------------------------------------------------------

    def _sign(self, method: str, path: str) -> str:
        return hmac.new(self.secret, f"{method} {unquote(path)}".encode(), hashlib.sha256).hexdigest()

    def _signed(self, method: str, path: str, **query) -> str:
        part = str(query.get("part", ""))
        return f"{self.cdn}{path}?{urlencode({**query, 'sig': self._sign(method, path + part)})}"

    def _cdn(self, call: Call, method: str):
        found = CDN.fullmatch(call.path)
        part = call.query.get("part", [""])[0]
        signature = self._sign(call.method.replace("HEAD", "GET"), call.path + part)
        if not found or not hmac.compare_digest(call.query.get("sig", [""])[0], signature):
            raise Problem(403, "SignatureDoesNotMatch")
        oid, repo = found["oid"], self.repos[found["kind"], found["id"]]
        if method == "get":
            return self._content(call, (self.objects.folder / oid).read_bytes(), {"ETag": f'"{oid}"'})
        if part:
            self.parts[oid, int(part)] = call.body
            return 200, {"ETag": hashlib.md5(call.body).hexdigest()}, b""
        data = call.body
        if method == "post":  # the parts are complete
            data = b"".join(self.parts.get((oid, p["partNumber"]), b"") for p in call.json["parts"])
        if hashlib.sha256(data).hexdigest() != oid:
            raise Problem(400, "The content does not have this hash")
        self.objects.put(data, oid)
        repo.lfs.add(oid)
        return 200, {"ETag": f'"{oid}"'}, b"{}"

    def _content(self, call: Call, data: bytes, headers: dict):
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        if call.headers.get("If-None-Match") == headers["ETag"]:
            return 304, headers, b""
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", "")):
            first, last = asked.groups()
            start = int(first) if first else max(0, len(data) - int(last))
            end = min(len(data), int(last) + 1) if first and last else len(data)
            if start >= len(data):
                raise Problem(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
            return 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}, data[start:end]
        return 200, headers, data


async def _run(hub: Hub, ready, stop: asyncio.Event) -> None:
    # A handler that hangs ends with its client, or shortly after the server is told to stop.
    server = web.Server(hub.handle, access_log=None, handler_cancellation=True)
    runner = web.ServerRunner(server, handle_signals=False, shutdown_timeout=0.1)
    await runner.setup()
    addresses = []
    for _ in range(2):
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=512)
        await site.start()
        addresses.append(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}")
    hub.url, hub.cdn = addresses
    ready()
    await stop.wait()
    await runner.cleanup()


@contextlib.contextmanager
def local_hub(tokens: dict = TOKENS, rules=(), part_size=16 * 2**20, page_size=1000, lfs_above=10 * 2**20):
    """Runs a Hub in a thread until the block ends.

    Args:
        tokens: {token: {"user": …, "orgs": […], "role": "read" or "write"}}.
        rules: faults, as above.
        part_size: bytes; larger LFS files are uploaded in parts of this size.
        page_size: entries of a page of any list.
        lfs_above: bytes; larger files are LFS files, whatever their name.
    """
    with tempfile.TemporaryDirectory() as folder:
        hub, started = Hub(Path(folder), tokens, list(rules), part_size, page_size, lfs_above), threading.Event()
        loop, stop = asyncio.new_event_loop(), asyncio.Event()
        thread = threading.Thread(target=lambda: loop.run_until_complete(_run(hub, started.set, stop)), daemon=True)
        thread.start()
        assert started.wait(30), "the server did not start"
        try:
            yield hub
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(30)
            loop.close()
        assert not hub.errors, "\n".join(hub.errors)
