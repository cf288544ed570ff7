"""A real OpenAI-compatible server with a real model in it: `transformers serve`, started as people start it."""

import asyncio
import base64
import json
import urllib.error
import urllib.request

import pytest
from vlm_requests import GREEDY, MIXED, ask, seen

from mmft_hf.captioning.ask.backends.openai import OpenAIBackend
from mmft_hf.captioning.ask.backends.transformers import TransformersBackend
from mmft_hf.captioning.types import FieldRefused, Sampling


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
    url = "data:image/png;base64," + base64.b64encode(row.pictures[0].data).decode()
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
    with pytest.raises(FieldRefused, match="top_k"):
        through(server, vlm, MIXED[:1], Sampling(temperature=0, options={"top_k": 5}))
