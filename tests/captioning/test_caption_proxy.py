"""Captions through LiteLLM's proxy, a real one in a process of its own, where it is installed.

It answers its three fronts itself (mock answers), or translates for servers that are ours.
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec

import pytest
from caption_server import serving
from caption_tools import dataset, picture, undecoded, wrong
from launch_tools import free_port

from mmft_hf.captioning import Captioner, caption_dataset
from mmft_hf.captioning.ask.journal_reader import left_out, read_rows
from mmft_hf.captioning.ask.limits import Limits, RetryPolicy
from mmft_hf.captioning.ask.pictures import sha256
from mmft_hf.captioning.types import Sampling
from mmft_hf.core.errors import UserError

pytestmark = pytest.mark.slow
KEY = "sk-3f9a7c1e5b2d8f6a4c0e9b7d5a3f1c8e"  # of a proxy on loopback, for these tests alone
PATHS = {"openai": "/v1", "gemini": "/v1beta", "anthropic": ""}
CAPTION = "A blue thing, or a red thing, with bold outlines."


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    with serving({}, tmp_path_factory.mktemp("upstream") / "requests.jsonl") as running:
        yield running


@pytest.fixture(scope="module")
def proxy(tmp_path_factory, upstream):
    for name in ("litellm", "fastapi", "uvicorn", "apscheduler", "orjson"):  # not imported here, which takes seconds
        if find_spec(name) is None:
            pytest.skip(f"needs litellm[proxy]: {name} is not installed")
    folder, port = tmp_path_factory.mktemp("proxy"), free_port()

    def model(name, **params):
        return {"model_name": name, "litellm_params": {"api_key": "none", "num_retries": 0, **params}}

    config = {
        "model_list": [
            model("mock", model="openai/gpt-6-luna", mock_response=CAPTION),
            model("painter", model="openai/gpt-5-nano", api_base=f"{upstream.url}/v1"),
            model("writer", model="anthropic/claude-haiku-4-5", api_base=upstream.url),
        ],
        "general_settings": {"master_key": KEY},
        "router_settings": {"num_retries": 0, "disable_cooldowns": True},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    options = ["--config", str(folder / "config.yaml"), "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-c", "from litellm import run_server; run_server()", *options]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        for _ in range(1800):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveliness", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                time.sleep(0.1)
        else:
            pytest.fail((folder / "log").read_text()[-3000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(timeout=30)


@pytest.fixture
def ask(proxy, tmp_path, monkeypatch, upstream):
    """Captions some pictures through the proxy, with the right key unless another one is given."""

    def run(kind, model, key=KEY, count=4, **options):
        monkeypatch.setenv("PROXY_KEY", key)
        captioner = Captioner(kind, model, base_url=proxy + PATHS[kind], api_key_env="PROXY_KEY", **options)
        limits = Limits(4, retry=RetryPolicy(base_s=0.05, cap_s=0.5))
        data = dataset(map(picture, range(count)))
        return undecoded(caption_dataset(data, captioner, run_dir=tmp_path, limits=limits, progress=False))

    upstream.server.script = {}
    return run


@pytest.mark.parametrize("kind", PATHS)
def test_three_fronts(ask, kind):
    for row in ask(kind, "mock", count=2):
        assert row["captions"] == [CAPTION] and {r["status"] for r in row["caption_records"]} == {"ok"}
        assert {r["finish_reason"] for r in row["caption_records"]} == {"stop"}
        assert all(r["tokens_in"] > 0 and r["tokens_out"] > 0 for r in row["caption_records"])


@pytest.mark.parametrize("kind", PATHS)
def test_a_wrong_key_and_a_wrong_model(ask, kind, tmp_path):
    with pytest.raises(UserError, match="database of keys"):
        ask(kind, "mock", key="sk-wrong-0123456789")
    with pytest.raises(UserError, match=r"expected a model .* Invalid model name"):
        ask(kind, "nomodel")
    assert not list(read_rows(tmp_path / "journal"))  # nothing is counted against a picture


def test_fields_that_the_proxy_knows_its_model_to_refuse(ask, tmp_path, upstream):
    before = len(upstream.requests())
    assert not wrong(ask("openai", "painter"))
    assert "temperature" in [row["field"] for row in left_out(tmp_path / "journal")]
    bodies = [row["body"] for row in upstream.requests()[before:]]
    assert len(bodies) == 12 and not any("temperature" in body for body in bodies)


def test_fields_that_the_server_behind_the_proxy_refuses(ask, tmp_path, upstream):
    said = {"type": "invalid_request_error", "message": "`temperature` is deprecated for this model."}
    rule = {"do": "error", "status": 400, "body": {"type": "error", "error": said}, "field": "temperature"}
    upstream.server.script = {"rules": [rule]}
    for kind, sampling in (("openai", Sampling()), ("anthropic", Sampling(temperature=0.7))):
        assert not wrong(ask(kind, "writer", sampling=sampling))
    assert {row["field"] for row in left_out(tmp_path / "journal")} >= {"temperature"}


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
def test_one_picture_that_the_server_behind_the_proxy_refuses(ask, upstream, kind):
    said = {"type": "invalid_request_error", "message": "Could not process image"}
    body = {"type": "error", "error": said}
    rule = {"do": "error", "status": 400, "body": body, "picture": sha256(picture(0))}
    upstream.server.script = {"rules": [rule]}
    rows = ask(kind, "writer")
    assert [len(row["captions"]) for row in rows] == [0, 3, 3, 3]
    assert {r["status"] for r in rows[0]["caption_records"]} == {"failed"}


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
def test_a_budget_that_is_too_large(ask, upstream, tmp_path, kind):
    said = "max_tokens: 999999 > 64000, which is the maximum allowed number of output tokens for claude-haiku-4-5"
    body = {"type": "error", "error": {"type": "invalid_request_error", "message": said}}
    upstream.server.script = {"rules": [{"do": "error", "status": 400, "body": body}]}
    before = len(upstream.requests())
    with pytest.raises(UserError, match="token limit"):
        ask(kind, "writer", sampling=Sampling(max_tokens=999999))
    assert len(upstream.requests()) - before == 1 and not list(read_rows(tmp_path / "journal"))


@pytest.mark.parametrize("kind", ["openai", "anthropic"])
def test_a_rate_limit_behind_the_proxy(ask, upstream, kind):
    upstream.server.script = {"rules": [{"do": "rate_limit", "retry_after": 1, "at": [upstream.server.count + 2]}]}
    assert not wrong(ask(kind, "writer"))


def test_thinking_that_cuts_a_caption_behind_the_proxy(ask, upstream, tmp_path):
    upstream.server.script = {"rules": [{"do": "thinking", "prompt": "To differentiate", "times": 1}]}
    for kind in ("openai", "anthropic"):
        before = len(upstream.requests())
        upstream.server.used.clear()
        ask(kind, "writer", count=1, sampling=Sampling(seed=3))
        budgets = [row["body"]["max_tokens"] for row in upstream.requests()[before:]]
        assert sorted(budgets) == [200, 200, 200, 800]
