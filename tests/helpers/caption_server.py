"""A server on loopback that answers like OpenAI, Gemini and Anthropic, and fails as a script says.

In a process of its own: `python tests/helpers/caption_server.py --port 0 --script FILE.json --log FILE.jsonl` prints its port.
In a thread: `with serving(script, log) as server:`; in a process: with `process=True`.

A script is JSON, `{"rules": [...], "mode": "json", "aspects": [...]}`. The first rule that fits a request decides:
    {"do": NAME, "at": [1, 4], "from": 5, "to": 9, "every": 3, "after_ok": 10, "times": 2, "prompt": "cat",
     "picture": "12ab", "field": "seed", "delay_ms": 5, …}
Conditions are all optional and must all hold: numbers of the requests as they arrive (from 1), how many were answered
well before, how often the rule is used, words of the prompt, beginning of the picture's sha256, a field of the body. `do` is one of ACTIONS;
`delay_ms` waits before it, `text` is the answer. Further fields of a rule: `retry_after`, `headers`, `status`, `body`, `location`, `bytes`.

A good answer is `caption <12 digits of sha256(picture)> <8 digits of sha256(prompt)> <first words of the prompt>`, or a
JSON object of such texts, one per aspect, where the request has a response schema or the script says `mode: json`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from aiohttp import web

QUOTA = {
    "error": {"message": "You exceeded your current quota.", "type": "insufficient_quota", "code": "insufficient_quota"}
}
# The actions of a rule: status and body of an error, or None if the code below handles it.
ACTIONS = {
    "ok": None,
    "truncated": None,  # at the token limit
    "thinking": None,  # all tokens were spent on thinking: no text
    "refusal": None,
    "blocked": None,  # Gemini: no candidate at all
    "empty_choices": None,
    "malformed": None,  # status 200, no JSON
    "huge": None,  # an answer of `bytes`, by default 9 MiB
    "hang": None,
    "reset": None,  # RST before a byte of the answer
    "reset_middle": None,  # RST within the answer
    "cut": None,  # the connection closes within the answer
    "redirect": None,  # to `location`
    "error": (500, {"error": {"message": "expected failure", "type": "server_error"}}),  # or `status` and `body`
    "unavailable": (503, {"error": {"message": "overloaded", "type": "overloaded_error"}}),
    "rate_limit": (429, {"error": {"message": "slow down", "type": "requests", "code": "rate_limit_exceeded"}}),
    "quota": (429, QUOTA),
    "unauthorized": (401, {"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}),
    "html": (502, "<html><script>alert('x')</script><h1>Bad\x1b[31m Gateway</h1></html>"),
}
HEADERS = ("authorization", "x-api-key", "x-goog-api-key", "anthropic-version", "user-agent")


def caption_of(picture_sha: str, prompt: str) -> str:
    """The answer to a picture (its sha256 in hexadecimal) and a prompt."""
    words = " ".join(re.findall(r"[A-Za-z]+", prompt)[:6])
    return f"caption {picture_sha[:12]} {hashlib.sha256(prompt.encode()).hexdigest()[:8]} {words}"


def read_request(path: str, body: dict) -> tuple[bytes, str, list[str]]:
    """Pictures (one after the other), prompt and the keys of the requested JSON object, for all three kinds of request."""
    if path.endswith(":generateContent"):
        parts = body["contents"][0]["parts"]
        schema = body.get("generationConfig", {}).get("responseSchema", {})
        data = [part["inlineData"]["data"] for part in parts[:-1]]
    else:
        parts = body["messages"][0]["content"]
        schema = body.get("response_format", {}).get("json_schema", {}).get("schema", {})
        schema = schema or body.get("output_config", {}).get("format", {}).get("schema", {})
        assert all(part["type"] in ("image", "image_url") for part in parts[:-1]), "pictures come first"
        data = [
            part["source"]["data"] if "source" in part else part["image_url"]["url"].partition(",")[2]
            for part in parts[:-1]
        ]
    pictures = b"".join(base64.b64decode(one, validate=True) for one in data)
    return pictures, parts[-1]["text"], list(schema.get("properties", {}))


def answer(path: str, model: str, text: str, kind: str) -> dict:
    """A body with status 200 as the provider writes it; `kind` is an action that is no error."""
    tokens_out = len(text.split()) + (kind == "thinking") * 50
    if path.endswith(":generateContent"):
        if kind == "blocked":
            return {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 300}}
        reason = {"truncated": "MAX_TOKENS", "thinking": "MAX_TOKENS", "refusal": "SAFETY"}.get(kind, "STOP")
        candidate = {"finishReason": reason, "content": {"role": "model"}}
        if kind not in ("thinking", "refusal"):
            candidate["content"]["parts"] = [{"text": "hm", "thought": True}, {"text": text}]
        usage = {"promptTokenCount": 300, "candidatesTokenCount": len(text.split())}
        if kind == "thinking":
            usage = {"promptTokenCount": 300, "thoughtsTokenCount": 50}
        candidates = [] if kind == "empty_choices" else [candidate]
        return {"candidates": candidates, "usageMetadata": usage, "modelVersion": f"{model}-001"}
    if path.endswith("/messages"):
        reason = {"truncated": "max_tokens", "thinking": "max_tokens", "refusal": "refusal"}.get(kind, "end_turn")
        content = [{"type": "thinking", "thinking": "hm", "signature": "x"}]
        content += [] if kind in ("thinking", "refusal") else [{"type": "text", "text": text}]
        if kind == "empty_choices":
            return {"type": "message", "stop_reason": reason}
        usage = {"input_tokens": 300, "output_tokens": tokens_out}
        if kind == "thinking":
            usage["output_tokens_details"] = {"thinking_tokens": 50}
        return {"type": "message", "model": model, "content": content, "stop_reason": reason, "usage": usage}
    message = {"role": "assistant", "content": text, "reasoning_content": "hm"}
    if kind == "refusal":
        message = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
    elif kind == "thinking":
        message["content"] = ""
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": "length" if kind in ("truncated", "thinking") else "stop",
    }
    usage = {"prompt_tokens": 300, "completion_tokens": tokens_out, "total_tokens": 300 + tokens_out}
    if kind == "thinking":
        usage["completion_tokens_details"] = {"reasoning_tokens": 50}
    return {"model": model, "choices": [] if kind == "empty_choices" else [choice], "usage": usage}


class CaptionServer:
    """Plays a script and logs what it is asked.

    Args:
        script: as above. It may be exchanged between requests.
        log: JSONL file that each request is appended to: n, time, path, picture, prompt, headers, body without the
            messages, in_flight (requests under way, this one included) and what was done.
        fast: do not parse bodies: the answer is `caption <12 digits of sha256(body)>`; prompts and pictures are not
            logged, and rules on them never hold.
    """

    def __init__(self, script: dict | None = None, log: str | os.PathLike | None = None, fast: bool = False):
        self.script, self.fast = script or {}, fast
        self.log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644) if log else None
        self.count = self.good = self.in_flight = 0
        self.used: dict[int, int] = {}
        self.reply = None  # a function of prompt and sha256 of the pictures, for servers in a thread

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_route("*", "/{path:.*}", self.handle)
        return app

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.in_flight += 1
        try:
            return await self._handle(request)
        finally:
            self.in_flight -= 1

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        self.count += 1
        n, path, record = self.count, request.path, {}
        if self.fast:
            picture = hashlib.sha256(raw).hexdigest()
            prompt, aspects, model = "", [], "fast"
            text = f"caption {picture[:12]}"
        else:
            body = json.loads(raw)
            data, prompt, aspects = read_request(path, body)
            picture = hashlib.sha256(data).hexdigest()
            model = body.get("model") or path.rpartition("/")[2].partition(":")[0]
            text = caption_of(picture, prompt)
            record = {"picture": picture, "prompt": prompt, "model": model}
            record["body"] = {k: v for k, v in body.items() if k not in ("messages", "contents")}
        rule = self._rule(n, picture, prompt, record.get("body", {}))
        text = rule.get("text", text) if self.reply is None else self.reply(prompt, picture)
        do = rule["do"]
        if self.log is not None:
            headers = {h: request.headers[h] for h in HEADERS if h in request.headers}
            record |= {"n": n, "time": time.time(), "path": path, "in_flight": self.in_flight, "did": do}
            os.write(self.log, json.dumps({**record, "headers": headers}).encode() + b"\n")
        if rule.get("delay_ms"):
            await asyncio.sleep(rule["delay_ms"] / 1000)
        if self.script.get("mode") == "json":
            aspects = aspects or self.script.get("aspects", [])
        if aspects:
            text = json.dumps({aspect: f"{text} {aspect}" for aspect in aspects})
        self.good += do == "ok"
        return await self._do(do, rule, request, path, model, text)

    def _rule(self, n: int, picture: str, prompt: str, body: dict) -> dict:
        fields = {**body, **body.get("generationConfig", {})}
        for i, rule in enumerate(self.script.get("rules", [])):
            if (
                n in rule.get("at", [n])
                and rule.get("from", 1) <= n <= rule.get("to", n)
                and n % rule.get("every", 1) == 0
                and self.good >= rule.get("after_ok", 0)
                and self.used.get(i, 0) < rule.get("times", sys.maxsize)
                and rule.get("prompt", "") in prompt
                and picture.startswith(rule.get("picture", ""))
                and ("field" not in rule or rule["field"] in fields)
            ):
                self.used[i] = self.used.get(i, 0) + 1
                return {"do": "ok", **rule}
        return {"do": "ok"}

    async def _do(self, do, rule, request, path, model, text) -> web.StreamResponse:
        headers = {"Content-Type": "application/json", **rule.get("headers", {})}
        if ACTIONS[do]:
            status, body = ACTIONS[do]
            if "retry_after" in rule:
                headers["Retry-After"] = str(rule["retry_after"])
            body = rule.get("body", body)
            if isinstance(body, str):
                headers["Content-Type"] = "text/html"
            text = body if isinstance(body, str) else json.dumps(body)
            return web.Response(status=rule.get("status", status), text=text, headers=headers)
        if do == "redirect":
            return web.Response(status=rule.get("status", 307), headers={"Location": rule["location"]})
        if do == "hang":
            await asyncio.sleep(3600)
        if do == "malformed":
            return web.Response(text='{"choices": [{"mess', headers=headers)
        if do == "huge":
            return web.Response(body=b" " * rule.get("bytes", 9 * 2**20), headers=headers)
        data = rule.get("body") or answer(path, model, text[: len(text) // 2] if do == "truncated" else text, do)
        data = json.dumps(data).encode()
        if do in ("reset", "reset_middle", "cut"):
            response = web.StreamResponse(headers={**headers, "Content-Length": str(len(data))})
            if do != "reset":
                await response.prepare(request)
                await response.write(data[: len(data) // 2])
                await asyncio.sleep(0.02)
            if do != "cut":  # a socket that lingers for no time closes with RST
                sock = request.transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                request.transport.abort()
            else:
                request.transport.close()
            return response
        return web.Response(body=data, headers=headers)


async def _run(server: CaptionServer, port: int, ready, stop: asyncio.Event) -> None:
    # A handler that hangs ends with its client, or shortly after the server stops.
    options = {"handle_signals": False, "handler_cancellation": True, "shutdown_timeout": 0.1}
    runner = web.AppRunner(server.app(), access_log=None, **options)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=512)
    await site.start()
    ready(site._server.sockets[0].getsockname()[1])
    await stop.wait()
    await runner.cleanup()


class Running:
    """A running server: `url` without a path, `log`, and `server` if it runs in a thread."""

    def __init__(self, port: int, log: Path, server: CaptionServer | None = None):
        self.url, self.log, self.server = f"http://127.0.0.1:{port}", log, server

    def requests(self) -> list[dict]:
        """What was asked so far."""
        if not self.log.exists():
            return []
        lines = self.log.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may still be on its way


@contextlib.contextmanager
def serving(script: dict | None, log: str | os.PathLike, process: bool = False, fast: bool = False):
    """Runs a server, in a thread or in a process of its own, until the block ends."""
    log = Path(log)
    if process:
        file = log.with_suffix(".script.json")
        file.write_text(json.dumps(script or {}))
        command = [sys.executable, __file__, "--port", "0", "--script", str(file), "--log", str(log)]
        child = subprocess.Popen(command + ["--fast"] * fast, stdout=subprocess.PIPE, text=True)
        try:
            yield Running(int(child.stdout.readline()), log)
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        return
    server, port, started = CaptionServer(script, log, fast), [], threading.Event()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    def ready(number):
        port.append(number)
        started.set()

    thread = threading.Thread(target=lambda: loop.run_until_complete(_run(server, 0, ready, stop)), daemon=True)
    thread.start()
    assert started.wait(30), "the server did not start"
    try:
        yield Running(port[0], log, server)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()
        os.close(server.log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--script")
    parser.add_argument("--log")
    parser.add_argument("--fast", action="store_true")
    args = parser.parse_args()
    script = json.loads(Path(args.script).read_text()) if args.script else {}
    server = CaptionServer(script, args.log, args.fast)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(server, args.port, lambda port: print(port, flush=True), asyncio.Event()))


if __name__ == "__main__":
    main()
