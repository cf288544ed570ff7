"""A real OpenAI-compatible server with a real model in it: `transformers serve`, started as people start it."""

import asyncio
import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from test_caption_transformers import GREEDY, MIXED, ask, seen
from tiny_vlm import build_tiny_vlm

from mmft_hf.captioning.ask.backends.openai import OpenAIBackend
from mmft_hf.captioning.ask.backends.transformers import TransformersBackend
from mmft_hf.captioning.types import Sampling, Unanswerable


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return build_tiny_vlm(tmp_path_factory.mktemp("models") / "tiny-vlm")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server, which loads a model when it is first asked for it."""
    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
        else:
            pytest.fail(log.read_text())
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait(timeout=30)


def send(server: str, body: dict) -> tuple[int, dict]:
    post = urllib.request.Request(
        f"{server}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(post, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def through(server: str, model, requests, sampling: Sampling = GREEDY) -> list:
    """The answers of our own client to requests sent all at once, in order."""

    async def run():
        backend = OpenAIBackend(str(model), base_url=server, sampling=sampling)
        try:
            calls = [backend.generate([row]) for row in requests]
            return [answer for (answer,) in await asyncio.gather(*calls)]
        finally:
            await backend.aclose()

    return asyncio.run(run())


def test_plain_http_gets_the_text_of_the_same_model_in_this_process(server, vlm):
    row = MIXED[2]
    url = "data:image/png;base64," + base64.b64encode(row.picture.data).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": row.prompt}]
    body = {"model": str(vlm), "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 40}
    status, answer = send(server, body)
    assert status == 200
    (own,) = ask(TransformersBackend(str(vlm), sampling=GREEDY), [row])
    assert answer["choices"][0]["message"]["content"] == own.text
    if "usage" in answer:  # transformers 5.2 does not count
        usage = answer["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (own.tokens_in, own.tokens_out)


def test_our_client_gets_what_the_model_in_this_process_writes(server, vlm):
    own = ask(TransformersBackend(str(vlm), sampling=GREEDY), MIXED)
    answers = through(server, vlm, MIXED)
    assert [(a.text, a.finish_reason) for a in answers] == [(a.text, a.finish_reason) for a in own]
    if answers[0].tokens_in is not None:  # transformers 5.2 does not count
        assert [seen(answer) for answer in answers] == [seen(answer) for answer in own]


def test_a_field_that_the_server_does_not_know(server, vlm):
    with pytest.raises(Unanswerable, match="top_k"):
        through(server, vlm, MIXED[:1], Sampling(temperature=0, options={"top_k": 5}))
