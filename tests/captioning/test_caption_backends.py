"""Captioning backends against a scripted server on loopback: pairing, every class of failure, waits, and keys."""

import asyncio
import hashlib
import json
import pickle
import re
import shutil
import socket
import ssl
import subprocess
import threading
import traceback
from pathlib import Path

import pytest
from caption_server import caption_of, serving

from mmft_hf.captioning.ask.backends import transport
from mmft_hf.captioning.ask.backends.anthropic import AnthropicBackend
from mmft_hf.captioning.ask.backends.gemini import GeminiBackend
from mmft_hf.captioning.ask.backends.openai import OpenAIBackend
from mmft_hf.captioning.ask.backends.transport import Transport, redact
from mmft_hf.captioning.ask.cost import Price, estimate_tokens, price_of
from mmft_hf.captioning.types import CallError, Fatal, Picture, Request, Sampling, Transient, Unanswerable
from mmft_hf.core.errors import UserError

BACKENDS = {"openai": OpenAIBackend, "gemini": GeminiBackend, "anthropic": AnthropicBackend}
PATHS = {"openai": "/v1", "gemini": "/v1beta", "anthropic": ""}
CANARY = "canary-7Hq2ZxT5vLw9"


@pytest.fixture
def server(tmp_path):
    with serving({}, tmp_path / "requests.jsonl") as running:
        yield running


def request(i=0, aspects=("shape",), prompt=None):
    picture = Picture(bytes([i]) * 100 + b"\xff\xd8", "image/jpeg", 30, 20)
    return Request((picture,), prompt or f'Describe "picture" {i}: größe\n{{x}}', 77, aspects, seed=2**40 + i)


def backend(server, kind="openai", **options):
    options.setdefault("base_url", server.url + PATHS[kind])
    return BACKENDS[kind]("a-model", **options)


def ask(made, *requests):
    """The answer to one request, or the answers to several that are sent at once."""

    async def go():
        try:
            answers = await asyncio.gather(*(made.generate([r]) for r in requests or [request()]))
        finally:
            await made.aclose()
        return [a for (a,) in answers]

    answers = asyncio.run(go())
    return answers if len(requests) > 1 else answers[0]


def failing(server, rule, kind="openai", **options):
    """What one request raises while the server plays `rule`."""
    server.server.script = {"rules": [rule]}
    with pytest.raises(CallError) as caught:
        ask(backend(server, kind, **options))
    message = str(caught.value)
    assert message.isprintable() and len(message) <= 300 and message
    return caught.value


# -- what is asked and answered ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", BACKENDS)
def test_each_picture_gets_the_answer_to_its_own_prompt(server, kind, monkeypatch):
    monkeypatch.setenv("A_KEY", f" {CANARY}\n")
    requests = [request(i) for i in range(20)]
    made = backend(server, kind, api_key_env="A_KEY", sampling=Sampling(temperature=0.7), concurrency=8)
    made.check_key()
    answers = ask(made, *requests)
    for asked, found in zip(requests, answers, strict=True):
        assert found.text == caption_of(hashlib.sha256(asked.pictures[0].data).hexdigest(), asked.prompt)
        assert (found.finish_reason, found.tokens_in, found.thinking_tokens) == ("stop", 300, 0)
        assert found.tokens_out == len(found.text.split())
        assert found.model == ("a-model-001" if kind == "gemini" else "a-model")
    log = server.requests()
    assert len(log) == 20 and max(r["in_flight"] for r in log) <= 8
    header = {"openai": "authorization", "gemini": "x-goog-api-key", "anthropic": "x-api-key"}[kind]
    for row in log:
        assert row["headers"].pop(header) == ("Bearer " if kind == "openai" else "") + CANARY
        assert CANARY not in json.dumps(row)
    body, seed = log[0]["body"], (2**40 + int(log[0]["prompt"].split()[2][:-1])) & 0x7FFFFFFF
    if kind == "gemini":  # of an unknown kind: what the user set, and nothing else
        assert body == {"generationConfig": {"temperature": 0.7, "maxOutputTokens": 77}}
    elif kind == "anthropic":
        assert body == {"model": "a-model", "temperature": 0.7, "max_tokens": 77}
        assert log[0]["headers"]["anthropic-version"]
    else:
        assert body == {"model": "a-model", "temperature": 0.7, "max_tokens": 77, "seed": seed}
    assert made.identity() == {"backend": kind, "model": "a-model"} and made.batch_size == 1


def test_calls_run_at_once_up_to_the_limit_and_connections_are_kept(server):
    server.server.script = {"rules": [{"do": "ok", "delay_ms": 100}]}
    ask(backend(server, concurrency=16), *[request(i) for i in range(48)])
    assert max(r["in_flight"] for r in server.requests()) == 16
    made = backend(server)
    ask(made), ask(made)  # a new event loop, and a session of its own
    assert len(server.requests()) == 50


def test_a_list_of_requests_is_answered_in_order(server):
    made, requests = backend(server), [request(i) for i in range(3)]

    async def go():
        answers = await made.generate(requests)
        await made.aclose()
        return answers

    for asked, found in zip(requests, asyncio.run(go()), strict=True):
        assert found.text == caption_of(hashlib.sha256(asked.pictures[0].data).hexdigest(), asked.prompt)


@pytest.mark.parametrize("kind", BACKENDS)
def test_a_question_may_have_several_pictures_or_none(server, kind):
    pictures = tuple(Picture(bytes([i]) * 50 + b"\xff\xd8", "image/jpeg", 30, 20) for i in range(3))
    requests = [Request(shown, "Which?", 77, ("shape",)) for shown in (pictures, pictures[::-1], ())]
    made = backend(server, kind)
    assert {"pictures", "text"} <= made.features
    for asked, found in zip(requests, ask(made, *requests), strict=True):
        in_order = b"".join(picture.data for picture in asked.pictures)
        assert found.text == caption_of(hashlib.sha256(in_order).hexdigest(), "Which?")


@pytest.mark.parametrize("kind", BACKENDS)
def test_several_aspects_are_asked_for_as_json(server, kind):
    server.server.script = {"mode": "json", "aspects": ["shape", "colour"]}
    made = backend(server, kind)
    made.official = True  # of other servers than OpenAI's, strict JSON is not asked
    found = ask(made, request(aspects=("shape", "colour")))
    assert list(json.loads(found.text)) == ["shape", "colour"]
    body = server.requests()[0]["body"]
    if kind == "openai":
        schema = body["response_format"]["json_schema"]
        assert schema["strict"] and schema["schema"]["required"] == ["shape", "colour"]
    elif kind == "gemini":
        assert body["generationConfig"]["responseSchema"]["required"] == ["shape", "colour"]
        assert body["generationConfig"]["responseMimeType"] == "application/json"


def test_openai_itself_gets_its_own_fields(monkeypatch):
    official = OpenAIBackend("m")
    body = official._body(request(aspects=("a", "b")))
    assert body["max_completion_tokens"] == 77 and "max_tokens" not in body and "response_format" in body
    assert official.transport.api_key_env == "OPENAI_API_KEY"
    other = OpenAIBackend("m", "http://localhost:8000/v1/")
    assert other.transport.api_key_env is None and "response_format" not in other._body(request(aspects=("a", "b")))
    assert GeminiBackend("models/m/x")._path() == "/models/m%2Fx:generateContent"
    assert AnthropicBackend("m", "http://localhost:1/v1")._path() == "/messages"
    assert GeminiBackend("m").transport.api_key_env == "GEMINI_API_KEY"
    assert AnthropicBackend("m").transport.api_key_env == "ANTHROPIC_API_KEY"


def test_options_override_fields_and_null_takes_them_away(server):
    options = {"temperature": None, "top_p": 0.5, "seed": 3, "detail": "low"}
    made = backend(server, sampling=Sampling(options=options))
    assert made._body(request())["messages"][0]["content"][0]["image_url"]["detail"] == "low"
    ask(made)
    assert server.requests()[0]["body"] == {"model": "a-model", "max_tokens": 77, "seed": 3, "top_p": 0.5}
    options = {"generationConfig": {"seed": None, "thinkingConfig": {"thinkingBudget": 0}}, "safetySettings": []}
    ask(backend(server, "gemini", sampling=Sampling(options=options)))
    generation = {"maxOutputTokens": 77, "thinkingConfig": {"thinkingBudget": 0}}
    assert server.requests()[1]["body"] == {"generationConfig": generation, "safetySettings": []}


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("do, reason", [("truncated", "length"), ("thinking", "length"), ("refusal", "refusal")])
def test_why_an_answer_ended(server, kind, do, reason):
    server.server.script = {"rules": [{"do": do}]}
    found = ask(backend(server, kind))
    assert found.finish_reason == reason
    assert bool(found.text) == (do == "truncated" or (do == "refusal" and kind == "openai"))
    if do == "thinking":
        assert found.tokens_out >= 50 and found.thinking_tokens == 50


def test_gemini_blocks_a_prompt(server):
    server.server.script = {"rules": [{"do": "blocked"}]}
    found = ask(backend(server, "gemini"))
    assert (found.text, found.finish_reason, found.tokens_in) == ("", "refusal", 300)


@pytest.mark.parametrize(
    "choice, text, reason",
    [
        ({"message": {"content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}}, "a b", None),
        ({"message": {"content": None}, "finish_reason": "length"}, "", "length"),
        ({"message": {"content": "x"}, "finish_reason": "content_filter"}, "x", "refusal"),
        ({"message": {"content": "x"}, "finish_reason": "tool_calls"}, "x", "tool_calls"),
    ],
)
def test_shapes_of_a_chat_completion(server, choice, text, reason):
    server.server.script = {"rules": [{"do": "ok", "body": {"choices": [choice]}}]}
    found = ask(backend(server))
    assert (found.text, found.finish_reason, found.tokens_in, found.tokens_out) == (text, reason, None, None)


# -- failures ---------------------------------------------------------------------------------------------------------
def error(message="", **fields):
    return {"error": {"message": message, **fields}}


PER_DAY, PER_MINUTE = (
    error(
        "You exceeded your current quota, please check your plan and billing details.",
        status="RESOURCE_EXHAUSTED",
        details=[{"@type": "…QuotaFailure", "violations": [{"quotaId": f"GenerateRequests{per}PerProject"}]}],
    )
    for per in ("PerDay", "PerMinute")
)
KEY_INVALID = error("API key not valid.", status="INVALID_ARGUMENT", details=[{"reason": "API_KEY_INVALID"}])
LOW = error("Your credit balance is too low to access the Anthropic API.", type="invalid_request_error")
FAILURES = [
    (401, error("no"), Fatal, "credentials"),
    (403, error("no"), Fatal, "credentials"),
    (400, KEY_INVALID, Fatal, "credentials"),
    (404, error("The model `m` does not exist."), Fatal, "model"),
    (404, "<html>404 page not found</html>", Fatal, "model"),
    (400, error("The requested model 'm' does not exist", code="model_not_found"), Fatal, "model"),
    (400, {"object": "error", "message": "m is not a multimodal model"}, Fatal, "model"),
    (400, error("no", code="unsupported_parameter"), Fatal, "server"),
    (429, error("Rate limit reached", code="rate_limit_exceeded"), Transient, "http_429"),
    (429, PER_MINUTE, Transient, "http_429"),
    (429, [PER_DAY], Fatal, "quota"),
    (429, error("no", type="insufficient_quota"), Fatal, "quota"),
    (429, error("no", code="billing_hard_limit_reached"), Fatal, "quota"),
    (400, LOW, Fatal, "quota"),
    (402, error("Insufficient credits"), Fatal, "quota"),
    (400, error("Invalid image: model m: marker not found"), Unanswerable, "http_400"),
    (413, "too large", Unanswerable, "http_413"),
    (415, error(None), Unanswerable, "http_415"),
    (422, {"detail": [{"loc": ["body"]}]}, Unanswerable, "http_422"),
    *[(s, error("x"), Transient, f"http_{s}") for s in (408, 409, 425, 500, 502, 503, 504, 529)],
    (200, error("upstream", code=429), Transient, "http_429"),
    (200, error("upstream"), Transient, "http_502"),
]


@pytest.mark.parametrize("status, body, expected, kind", FAILURES)
def test_what_a_status_means(server, status, body, expected, kind):
    found = failing(server, {"do": "error", "status": status, "body": body})
    assert type(found) is expected and found.kind == kind
    if expected is Transient:
        assert found.limited == (kind == "http_429") and found.wait is None
    assert server.url.removeprefix("http://") in str(found)


@pytest.mark.parametrize(
    "do, kind",
    [
        ("reset", "reset"),
        ("reset_middle", "reset"),
        ("cut", "reset"),
        ("malformed", "bad_answer"),
        ("empty_choices", "bad_answer"),
        ("huge", "bad_answer"),
        ("hang", "timeout"),
        ("html", "http_502"),
    ],
)
@pytest.mark.parametrize("language", BACKENDS)
def test_broken_answers_are_worth_another_try(server, language, do, kind):
    found = failing(server, {"do": do}, language, timeout_s=0.3 if do == "hang" else 20)
    assert type(found) is Transient and found.kind == kind and not found.limited
    assert "<" not in str(found)


@pytest.mark.parametrize(
    "body", [[], {}, {"choices": [{"message": {"content": 3}}]}, {"choices": 1}, "null", "[" * 10**5]
)
def test_an_answer_of_another_shape(server, body):
    found = failing(server, {"do": "error", "status": 200, "body": body})
    assert type(found) is Transient and found.kind == "bad_answer"


def test_an_answer_that_is_too_large_is_not_read_to_its_end(server):
    with_limit = {"do": "huge", "bytes": 2**26}
    assert "8 MiB" in str(failing(server, with_limit))


def test_nobody_listens(server):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        found = failing(server, {}, base_url=f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
    assert type(found) is Transient and found.kind == "connect"


def test_nobody_takes_the_connection(server):
    # A full queue of connections drops further ones without a word, like a firewall.
    with socket.socket() as deaf, socket.socket() as first:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        first.connect(deaf.getsockname())
        made = backend(server, base_url=f"http://127.0.0.1:{deaf.getsockname()[1]}/v1", timeout_s=20)
        made.transport._connect_s = 0.3
        with pytest.raises(Transient, match="no connection within") as caught:
            ask(made)
    assert caught.value.kind == "connect"


def test_failures_after_some_good_answers(server):
    server.server.script = {"rules": [{"do": "unauthorized", "after_ok": 3}]}
    made = backend(server)
    assert len(ask(made, *[request(i) for i in range(3)])) == 3
    assert failing(server, {"do": "quota", "after_ok": 3}).kind == "quota"


def test_messages_say_what_to_type(server, monkeypatch):
    monkeypatch.setenv("A_KEY", CANARY)
    found = failing(server, {"do": "unauthorized"}, api_key_env="A_KEY")
    assert "A_KEY" in str(found) and "export A_KEY=…" in str(found) and "found 401" in str(found)
    assert "--api_key_env" in str(failing(server, {"do": "unauthorized"}))
    not_found = {"do": "error", "status": 404, "body": "page not found"}
    assert "/v1" in str(failing(server, not_found, base_url=server.url))
    assert "/v1 " not in str(failing(server, not_found))


@pytest.mark.parametrize(
    "headers, body, wait",
    [
        ({"Retry-After": "7"}, None, 7),
        ({"Retry-After": "0.25"}, None, 0.25),
        ({"Retry-After": "Sat, 21 Nov 2026 10:00:30 GMT", "Date": "Sat, 21 Nov 2026 10:00:00 GMT"}, None, 30),
        ({"Retry-After": "Sat, 21 Nov 2026 09:00:00 GMT", "Date": "Sat, 21 Nov 2026 10:00:00 GMT"}, None, 0),
        ({"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}, None, "years"),
        ({"Retry-After": "soon"}, None, None),
        ({"Retry-After": "-3"}, None, None),
        ({"Retry-After": "nan"}, None, None),
        ({"Retry-After": "2", "retry-after-ms": "1500"}, None, 1.5),
        ({"x-ratelimit-reset-requests": "1s", "x-ratelimit-reset-tokens": "6m0s"}, None, 360),
        (
            {
                "x-ratelimit-reset-requests": "20ms",
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-tokens": "1h2m3.5s",
                "x-ratelimit-remaining-tokens": "12",
            },
            None,
            0.02,
        ),
        ({"x-ratelimit-reset-requests": "1s", "Retry-After": "9"}, None, 9),
        (
            {
                "anthropic-ratelimit-requests-reset": "2026-11-21T10:00:12Z",
                "anthropic-ratelimit-requests-remaining": "0",
                "anthropic-ratelimit-tokens-reset": "2026-11-21T10:09:00Z",
                "anthropic-ratelimit-tokens-remaining": "9",
                "Date": "Sat, 21 Nov 2026 10:00:00 GMT",
            },
            None,
            12,
        ),
        ({}, error("x", details=[{"@type": "…RetryInfo", "retryDelay": "37s"}]), 37),
        ({}, error("x", details=[{"retryDelay": "0.5s"}]), 0.5),
        ({}, error("x", details=[{"retryDelay": 3}, 5, None]), 3),
        ({}, error("x", details="none"), None),
    ],
)
def test_how_long_a_server_asks_to_wait(server, headers, body, wait):
    found = failing(server, {"do": "rate_limit", "headers": headers, **({"body": body} if body else {})})
    assert found.limited
    if wait == "years":
        assert found.wait > 1e9
    else:
        assert found.wait == (None if wait is None else pytest.approx(wait))


# -- keys and addresses -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "rule",
    [
        {"do": "error", "status": 401, "body": error(f"Incorrect key {CANARY} in Bearer {CANARY}")},
        {"do": "error", "status": 400, "body": f"{'x' * 290} {CANARY}"},
        {"do": "error", "status": 503, "body": {"key": CANARY}},
        {"do": "error", "status": 200, "body": f"no JSON but {CANARY}"},
        {"do": "redirect", "location": f"https://user:{CANARY}@elsewhere.test/?key={CANARY}"},
        {"do": "cut"},
        {"do": "reset"},
        {"do": "hang"},
    ],
)
@pytest.mark.parametrize("language", BACKENDS)
def test_the_key_is_nowhere_but_in_its_header(server, language, rule, monkeypatch):
    monkeypatch.setenv("A_KEY", CANARY)
    made = backend(server, language, api_key_env="A_KEY", timeout_s=0.5)
    server.server.script = {"rules": [rule]}
    with pytest.raises(CallError) as caught:
        ask(made)
    found = caught.value
    # Local variables of our own functions, too: some tools print them with a traceback.
    frames = [f for f, _ in traceback.walk_tb(found.__traceback__) if "mmft_hf" in f.f_code.co_filename]
    lines = [repr(value) for frame in frames for value in frame.f_locals.values()]
    seen = [str(found), repr(found), repr(vars(found)), pickle.dumps(found), pickle.dumps(made), repr(made), *lines]
    assert frames and found.__context__ is None and found.__cause__ is None
    assert not [text for text in seen if CANARY in (text.decode("latin1") if isinstance(text, bytes) else text)]
    assert len(server.requests()) == 1 and CANARY in json.dumps(server.requests()[0]["headers"])


def test_a_redirect_is_not_followed(server, tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", CANARY)
    with serving({}, tmp_path / "second.jsonl") as second:
        for status in (301, 302, 303, 307, 308):
            rule = {"do": "redirect", "status": status, "location": second.url + "/v1/chat/completions"}
            found = failing(server, rule, api_key_env="A_KEY")
            assert type(found) is Fatal and found.kind == "server"
            assert second.url.removeprefix("http://") in str(found) and "chat" not in str(found)
        assert second.requests() == []


def test_proxies_of_the_environment_are_used_but_not_for_loopback(server, tmp_path, monkeypatch):
    with serving({}, tmp_path / "proxy.jsonl") as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        ask(backend(server))
        assert len(server.requests()) == 1 and proxy.requests() == []
        ask(backend(server, base_url="http://captions.test/v1"))
        assert len(proxy.requests()) == 1
    monkeypatch.setenv("http_proxy", f"socks5://user:{CANARY}@localhost:1")
    with pytest.raises(UserError, match="socks5") as caught:
        ask(backend(server, base_url="http://captions.test/v1"))
    assert CANARY not in str(caught.value)


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificate with openssl")
def test_a_certificate_of_nobody_is_refused(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -days 2 -keyout".split()
    subprocess.run([*command, key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listener.accept()
        with pytest.raises(OSError):
            context.wrap_socket(connection, server_side=True)
        connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(Fatal, match="TLS certificate") as caught:
        ask(OpenAIBackend("m", f"https://127.0.0.1:{listener.getsockname()[1]}/v1"))
    thread.join()
    listener.close()
    assert caught.value.kind == "server" and len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "ftp://localhost"},
        {"base_url": "http://"},
        {"base_url": "http://[::1"},
        {"base_url": "http://localhost:99999"},
        {"base_url": f"http://user:{CANARY}@localhost/v1"},
        {"base_url": f"http://localhost/v1?key={CANARY}"},
        {"base_url": f"http://localhost/v1#{CANARY}"},
        {"base_url": "http://captions.test/v1", "api_key_env": "A_KEY"},
        {"api_key_env": CANARY},
        {"api_key_env": "sk-" + "a" * 20},
        {"api_key_env": "hf_" + "aBcDeFgHiJ" * 3},
        {"api_key_env": "AIza" + "aBcDeFgHiJ" * 3},
        {"api_key_env": "f00dcafe" * 4},
        {"api_key_env": "A KEY"},
        {"api_key_env": ""},
        {"concurrency": 0},
        {"timeout_s": 0},
        {"sampling": Sampling(options={"stream": True})},
        {"sampling": Sampling(options={"top_p": {1}})},
        {"sampling": Sampling(options={"top_p": float("nan")})},
        {"model": ""},
    ],
)
@pytest.mark.parametrize("language", BACKENDS)
def test_arguments_that_cannot_be_right(language, options):
    with pytest.raises(UserError, match="expected") as caught:
        BACKENDS[language](**{"model": "m", **options})
    assert CANARY not in str(caught.value)
    assert "base_url" not in options or caught.value.__context__ is None
    if len(options.get("api_key_env", "")) > 6:
        assert options["api_key_env"] not in str(caught.value)


def test_http_is_allowed_to_loopback_or_on_demand():
    for url in ("http://localhost:8000/v1", "http://127.0.0.1:1", "http://[::1]:1/v1"):
        assert Transport(url, api_key_env="A_KEY").loopback
    assert not Transport("http://captions.test", api_key_env="A_KEY", allow_http=True).loopback
    assert not Transport("http://captions.test").loopback


def test_a_key_is_looked_for_only_when_it_is_needed(server, monkeypatch):
    monkeypatch.delenv("A_KEY", raising=False)
    made = backend(server, api_key_env="A_KEY")
    backend(server).check_key()
    for value in (None, "  ", "a b", "ключ"):
        if value is not None:
            monkeypatch.setenv("A_KEY", value)
        with pytest.raises(UserError, match="export A_KEY=…"):
            made.check_key()
        with pytest.raises(UserError, match="A_KEY"):
            ask(made)
    assert server.requests() == []


def test_redaction():
    secrets = {
        "sk-abcdefgh12345": "x sk-abcdefgh12345 y",
        "AIzaSyAbCdEfGhIj": "key=AIzaSyAbCdEfGhIj",
        "hf_abcdefghij": "(hf_abcdefghij)",
        "t0ken": "Authorization: bearer t0ken",
        "me:pass": "see https://me:pass@host/x",
        "v4lue": "https://host/x?a=1&key=v4lue",
        "my own": "what my own says",
    }
    for secret, text in secrets.items():
        assert "[key]" in redact(text, "my own") and secret not in redact(text, "my own")
    assert redact("a task-oriented\nline\x1b[0m\u202e <b>bold</b>") == "a task-oriented line [0m bold"
    assert len(redact("x" * 10**6)) == 300
    for text in ("<" * 20_000, "http://" * 3_000, "?" * 20_000, "sk-" * 7_000, "bearer " * 3_000):
        redact(text)  # none of the patterns is slow on text made against it


def test_only_one_module_imports_an_http_library():
    modules = Path(transport.__file__).parent.parent.rglob("*.py")
    users = {
        p.name for p in modules if re.search(r"^\s*(?:import|from) (?:aiohttp|httpx|requests)", p.read_text(), re.M)
    }
    assert users == {"transport.py"}


# -- prices -----------------------------------------------------------------------------------------------------------
def test_prices_find_versions_and_no_other_model(tmp_path):
    assert price_of("gemini-2.5-flash-lite-001").model == "gemini-2.5-flash-lite"
    assert price_of("gemini-2.5-flash-preview-09-2025").model == "gemini-2.5-flash"
    assert price_of("gpt-4o-mini-2024-07-18").input == 0.15 and price_of("gpt-4o-mini").date == "2026-11-30"
    assert price_of("models/gpt-4o").input == 2.5
    assert price_of("claude-haiku-4-5-20251001").input == price_of("claude-haiku-4-5@20251001").input == 1
    for unknown in (
        "gpt-4o-audio-preview",
        "gemini-2.5-flash-image",
        "Qwen/Qwen3-VL-4B",
        "gpt-4",
        "claude-haiku-5-6",
        "gpt-6-luna-5",
    ):
        assert price_of(unknown) is None
    own = tmp_path / "prices.yaml"
    own.write_text("models: {gpt-4o: {input: 1, output: 2}, mine: {input: 0, output: 0}}")
    assert price_of("gpt-4o-2024-08-06", own) == Price("gpt-4o", 1, 2)
    assert price_of("mine", own).output == 0 and price_of("gpt-4o-mini", own).input == 0.15


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        "[]",
        "models: []",
        "models: {m: {input: 1}}",
        "models: {m: {input: 1, output: -1}}",
        "models: {m: {input: one, output: 1}}",
        "models: {m: {input: .nan, output: 1}}",
        "models: {m: {input: 1, output: 1, per_call: 1}}",
        "models: {m: {input: 1, output: 1, image: {patch: 32}}}",
        "models: {m: {input: 1, output: 1, image: {pixels: 0}}}",
        "prices: {}",
    ],
)
def test_a_price_file_that_cannot_be_right(tmp_path, text):
    path = tmp_path / "prices.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="expected"):
        price_of("m", path)


def test_tokens_of_a_picture():
    sizes = {"gpt-5-nano": 355, "gpt-4.1-mini": 234, "gpt-4o-mini": 8500, "gpt-4o": 255, "gemini-2.5-flash": 258}
    for model, tokens in sizes.items():
        assert estimate_tokens(384, 384, price_of(model)) == tokens
    assert estimate_tokens(384, 384, price_of("claude-haiku-4-5")) == 197
    assert estimate_tokens(2048, 2048, price_of("gpt-4o")) == 85 + 4 * 170
    assert estimate_tokens(280, 280, None) == 100
    assert estimate_tokens(1, 1, Price("m", 1, 1)) == 1


# -- the server of these tests ----------------------------------------------------------------------------------------
@pytest.mark.slow  # it tests the fake, not the library
@pytest.mark.parametrize("fast", [False, True])
def test_the_server_runs_as_a_process(tmp_path, fast):
    script = {"rules": [{"do": "rate_limit", "at": [2], "retry_after": 3}]}
    with serving(script, tmp_path / "log.jsonl", process=True, fast=fast) as server:
        made = backend(server)

        async def go():
            (first,) = await made.generate([request()])
            with pytest.raises(Transient) as caught:
                await made.generate([request()])
            (third,) = await made.generate([request()])
            await made.aclose()
            return first, caught.value, third

        first, second, third = asyncio.run(go())
        assert first == third and first.text.startswith("caption ") and second.wait == 3
        assert [r["did"] for r in server.requests()] == ["ok", "rate_limit", "ok"]
