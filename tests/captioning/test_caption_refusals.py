"""What servers refuse: fields of a request, every request alike, or one picture. And requests to today's models.

The messages are those of the providers and proxies, as their users reported them.
"""

import json
import shlex

import pyarrow.parquet as pq
import pytest
from caption_server import serving
from caption_tools import dataset, image_folder, picture, undecoded, wrong

from mmft_hf.captioning import Captioner, caption_dataset
from mmft_hf.captioning.ask.backends.anthropic import AnthropicBackend
from mmft_hf.captioning.ask.backends.failures import failure
from mmft_hf.captioning.ask.backends.gemini import GeminiBackend
from mmft_hf.captioning.ask.backends.openai import OpenAIBackend
from mmft_hf.captioning.ask.backends.transport import Transport
from mmft_hf.captioning.ask.journal_reader import left_out
from mmft_hf.captioning.ask.limits import Limits, RetryPolicy
from mmft_hf.captioning.ask.pictures import sha256
from mmft_hf.captioning.types import Fatal, FieldRefused, Picture, Request, Sampling, Transient, Unanswerable
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError

QUICK = Limits(8, retry=RetryPolicy(base_s=0.01, cap_s=0.05))
REQUEST = Request((Picture(b"\xff\xd8", "image/jpeg", 30, 20),), "Describe it.", 77, ("shape",), seed=5)
TWO = Request((Picture(b"\xff\xd8", "image/jpeg", 30, 20),), "Describe it.", 77, ("shape", "colour"), seed=5)


def error(message="", **fields):
    return {"error": {"message": message, **fields}}


def anthropic(message, type="invalid_request_error"):
    return {"type": "error", "error": {"type": type, "message": message}, "request_id": "req_1"}


def google(message, status="INVALID_ARGUMENT", details=()):
    return {"error": {"code": 400, "message": message, "status": status, "details": list(details)}}


def meaning(status, body, optional=(), **headers):
    server = Transport("http://localhost:1/v1")
    text = body if isinstance(body, str) else json.dumps(body)
    return failure(server, status, headers, text, optional)


# -- a field ----------------------------------------------------------------------------------------------------------
OPENAI = ("temperature", "seed", "max_tokens", "response_format", "detail", "top_p", "reasoning_effort")
ANTHROPIC = ("max_tokens", "temperature", "top_p", "thinking", "output_config")
GEMINI = ("temperature", "maxOutputTokens", "seed", "topK", "responseMimeType", "responseSchema", "thinkingLevel")
ONLY_DEFAULT = (
    "Unsupported value: 'temperature' does not support 0.2 with this model. Only the default (1) value is supported."
)
USE_OTHER = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
UNKNOWN_NAME = "Invalid JSON payload received. Unknown name \"seed\" at 'generation_config': Cannot find field."
LITELLM_GPT = (
    "litellm.UnsupportedParamsError: gpt-5 models (including gpt-5-codex) don't support temperature=0.2. Only temperature=1 "
    "is supported. To drop unsupported params set `litellm.drop_params = True`"
)
FIELDS = [
    (error(ONLY_DEFAULT, param="temperature", code="unsupported_value"), OPENAI, "temperature", None),
    (error(USE_OTHER, param="max_tokens", code="unsupported_parameter"), OPENAI, "max_tokens", "max_completion_tokens"),
    (error(USE_OTHER), OPENAI, "max_tokens", "max_completion_tokens"),
    (error("Unrecognized request argument supplied: seed"), OPENAI, "seed", None),
    (error("property 'detail' is unsupported"), OPENAI, "detail", None),
    (error("no", param="messages[0].content[0].image_url.detail"), OPENAI, "detail", None),
    (error("Invalid schema for response_format 'captions'", param="response_format"), OPENAI, "response_format", None),
    (error("json mode is not supported for this model"), OPENAI, "response_format", None),
    (error(LITELLM_GPT), OPENAI, "temperature", None),
    (error("litellm.UnsupportedParamsError: anthropic does not support parameters: ['seed'], for model=c"), OPENAI, "seed", None),
    ({"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}, OPENAI, "seed", None),
    (
        {"object": "error", "message": {"detail": [{"type": "extra_forbidden", "loc": ["body", "top_p"], "msg": "Extra"}]}},
        OPENAI,
        "top_p",
        None,
    ),
    (anthropic("`temperature` is deprecated for this model."), ANTHROPIC, "temperature", None),
    (anthropic("temperature: Extra inputs are not permitted"), ANTHROPIC, "temperature", None),
    (anthropic("`temperature` and `top_p` cannot both be specified for this model."), ANTHROPIC, "temperature", None),
    (anthropic("output_config.format: Extra inputs are not permitted"), ANTHROPIC, "output_config", None),
    (anthropic("thinking: Extra inputs are not permitted"), ANTHROPIC, "thinking", None),
    (error('litellm.BadRequestError: AnthropicException - {"type":"error","error":{"type":"invalid_request_error","message":"`temperature` is deprecated for this model."}}'), OPENAI, "temperature", None),
    (google(UNKNOWN_NAME), GEMINI, "seed", None),
    (google("JSON mode is not enabled for models/gemma-3-27b-it"), GEMINI, "responseMimeType", None),
    (google("Thinking level is not supported for this model."), GEMINI, "thinkingLevel", None),
    (google("top_k is not supported by this model"), GEMINI, "topK", None),
    (error("Provider returned error", metadata={"raw": json.dumps(error(ONLY_DEFAULT, param="temperature"))}), OPENAI, "temperature", None),
]  # fmt: skip


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("body, optional, name, instead", FIELDS, ids=range(len(FIELDS)))
def test_a_refusal_that_names_a_field(body, optional, name, instead, status):
    found = meaning(status, body, optional)
    assert isinstance(found, FieldRefused), found
    assert (found.field, found.instead) == (name, instead)
    assert type(meaning(status, body)) is not FieldRefused  # of a request that did not send it


# -- every request, or one picture ------------------------------------------------------------------------------------
SERVICE = google("Gemini API has not been used in project 1", "PERMISSION_DENIED", [{"reason": "SERVICE_DISABLED"}])
EVERY = [
    (400, google("Budget 0 is invalid. This model only works in thinking mode."), "budget"),
    (400, google("The thinking budget 99999 is invalid. Please choose a value between 512 and 24576."), "budget"),
    (400, anthropic("max_tokens: 999999 > 64000, which is the maximum allowed number of output tokens for m"), "budget"),
    (400, anthropic("`max_tokens` must be greater than `thinking.budget_tokens`."), "budget"),
    (400, error("max_tokens is too large: 99. This model supports at most 9 completion tokens.", param="max_tokens"), "budget"),
    (400, error("'max_tokens' or 'max_completion_tokens' is too large: 9999. This model's maximum context length is 8192 tokens and your request has 300 input tokens"), "budget"),
    (400, error("/chat/completions: Invalid model name passed in model=m. Call `/v1/models`"), "model"),
    (400, error("LLM Provider NOT provided. Pass in the LLM provider you are trying to call. You passed model=m"), "model"),
    (400, error("The requested model 'm' is not supported"), "model"),
    (404, error("No endpoints found that support image input"), "model"),
    (404, google("models/m is not found for API version v1beta", "NOT_FOUND"), "model"),
    (404, anthropic("model: claude-9", "not_found_error"), "model"),
    (403, error("Project `p` does not have access to model `m`", code="model_not_found"), "model"),
    (403, error("You are not allowed to sample from this model"), "model"),
    (403, error("Your team is not allowed to access model. Tried to access m", type="team_model_access_denied"), "model"),
    (401, error("key not allowed to access model. This key can only access models=['n'].", type="auth_error"), "model"),
    (403, error("Country, region, or territory not supported", code="unsupported_country_region_territory"), "country"),
    (403, error("This service is not available in your country."), "country"),
    (404, error("The model is not available in your region."), "country"),
    (451, "", "country"),
    (400, google("User location is not supported for the API use.", "FAILED_PRECONDITION"), "country"),
    (400, error("No connected db.", type="no_db_connection", code="400"), "credentials"),
    (403, error("Your API key does not have permission to use the specified resource."), "credentials"),
    (401, error("Authentication Error, Invalid proxy server token passed."), "credentials"),
    (403, SERVICE, "server"),
    (400, error("Budget has been exceeded! Current cost: 2.0, Max budget: 1.0", type="budget_exceeded"), "quota"),
    (400, error("Unsupported parameter: 'logit_bias'", code="unsupported_parameter"), "server"),
    (400, error("litellm.UnsupportedParamsError: x does not support parameters: ['n']"), "server"),
    (400, error("At most 0 image(s) may be provided in one prompt."), "model"),
    (400, error("this model is missing data required for image input"), "model"),
    (400, google("Image input modality is not enabled for models/gemma-3-1b-it"), "model"),
    (400, error("messages[0].content must be a string"), "model"),
    (400, error("Failed to deserialize the JSON body: messages[0]: unknown variant `image_url`, expected `text`"), "model"),
    (400, error("The model `m` has been decommissioned and is no longer supported.", code="model_decommissioned"), "model"),
    (400, error("Invocation of model ID m with on-demand throughput isn't supported."), "model"),
    (410, error("This model has been retired."), "model"),
    (400, google("Gemini API free tier is not available in your country.", "FAILED_PRECONDITION"), "country"),
    (403, {"error": {"message": "Provider returned error", "metadata": {"raw": json.dumps(error("Country, region, or territory not supported"))}}}, "country"),
    (400, {"code": "Client specified an invalid argument", "error": "Incorrect API key provided: x."}, "credentials"),
    (403, {"error": "Your newly created team doesn't have any credits or licenses yet."}, "quota"),
    (403, error("Key limit exceeded (daily limit)."), "quota"),
    (429, error("Your prepayment credits are depleted."), "quota"),
    (400, error("Access denied, please make sure your account is in good standing.", code="Arrearage"), "quota"),
    (400, error("Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 5 instead.", param="temperature", code="decimal_above_max_value"), "field"),
]  # fmt: skip


@pytest.mark.parametrize("status, body, kind", EVERY, ids=range(len(EVERY)))
def test_a_refusal_of_every_request(status, body, kind):
    found = meaning(status, body, OPENAI)
    assert type(found) is Fatal and found.kind == kind, found
    assert ("key" in str(found).split("It said")[0]) == (kind == "credentials") or kind == "model"


ONE_PICTURE = [
    (400, anthropic("messages.0.content.0.image.source.base64: image exceeds 5 MB maximum: 7 bytes > 5 bytes")),
    (400, anthropic("Could not process image")),
    (400, error("Invalid image: model m: marker not found")),
    (400, error("You uploaded an unsupported image. Please make sure your image is valid.", code="invalid_image_format")),
    (400, error("Failed to load image: cannot identify image file", param="messages[0].content[0].image_url.url")),
    (400, google("Unable to process input image. Please retry or report in https://ai.google.dev")),
    (400, error("The response was filtered due to the prompt triggering content management policy.", code="content_filter")),
    (400, error("max_tokens must be at least 1, got -120.")),
    (400, error("This model's maximum context length is 2048 tokens. However, your messages resulted in 9000 tokens.", code="context_length_exceeded")),
    (413, "Request Entity Too Large"),
    (413, anthropic("Request exceeds the maximum size", "request_too_large")),
    (400, error("Provider returned error", metadata={"raw": json.dumps(anthropic("Could not process image"))})),
    (422, {"detail": "unsupported media type"}),
]  # fmt: skip


@pytest.mark.parametrize("status, body", ONE_PICTURE, ids=range(len(ONE_PICTURE)))
def test_a_refusal_of_one_picture(status, body):
    found = meaning(status, body, OPENAI)
    assert type(found) is Unanswerable, found
    assert found.general == ("got -120" in str(found))


# -- waits, as proxies send them --------------------------------------------------------------------------------------
NOW = "Mon, 30 Nov 2026 10:00:00 GMT"
EPOCH = 1796032800  # the same moment
WAITS = [
    ({"Retry-After": "12.5"}, {}, 12.5),
    ({"Retry-After": "20s"}, {}, 20),
    ({"Retry-After": "1m30s"}, {}, 90),
    ({"Retry-After": "5, 7"}, {}, 7),
    ({"Retry-After": "Mon, 30 Nov 2026 10:00:09 GMT", "Date": NOW}, {}, 9),
    ({"Retry-After": "2026-11-30T10:00:11Z", "Date": NOW}, {}, 11),
    ({"llm_provider-retry-after": "21"}, {}, 21),
    ({"llm_provider-retry-after": "21", "retry-after": "3"}, {}, 3),
    ({"llm_provider-anthropic-ratelimit-tokens-reset": "2026-11-30T10:00:31Z", "Date": NOW}, {}, 31),
    ({"X-RateLimit-Reset": str(EPOCH + 14), "Date": NOW}, {}, 14),
    ({"X-RateLimit-Reset": str(1000 * (EPOCH + 15)), "Date": NOW}, {}, 15),
    ({"X-RateLimit-Reset": "16"}, {}, 16),
    ({"RateLimit-Reset": "17"}, {}, 17),
    ({"Date": NOW}, {"metadata": {"headers": {"X-RateLimit-Reset": str(1000 * (EPOCH + 18))}}}, 18),
    ({}, {"message": "Rate limit reached for m. Please try again in 6m0s."}, 360),
    ({}, {"message": "Please try again in 20ms. Visit …"}, 0.02),
    ({}, {"message": "Please retry after 26 seconds."}, 26),
    ({}, {"message": "No deployments available for selected model, Try again in 60 seconds."}, 60),
    ({}, {"message": "Please try again in 2 minutes."}, 120),
    ({}, {"message": "Please retry in 37.5s."}, 37.5),
    ({}, {"message": "Please try again later."}, None),
]


@pytest.mark.parametrize("headers, body, wait", WAITS, ids=range(len(WAITS)))
def test_waits(headers, body, wait):
    found = meaning(429, {"error": {"message": "slow down", **body}}, **headers)
    assert type(found) is Transient and found.limited
    assert found.wait == (None if wait is None else pytest.approx(wait, abs=1e-3))


# -- what is sent -----------------------------------------------------------------------------------------------------
def sent(backend, request=REQUEST):
    body = backend._prepared(request)
    flat = {**body, **body.get("generationConfig", {})}
    return {name: value for name, value in flat.items() if name in ("temperature", "seed", "top_p")}


BOTH, NONE = {"temperature": 0.2, "seed": 5}, {}
DEFAULTS = [
    (OpenAIBackend, "gpt-4.1-mini", None, BOTH),
    (OpenAIBackend, "gpt-4o-mini-2024-07-18", None, BOTH),
    (OpenAIBackend, "gpt-6-luna", None, NONE),
    (OpenAIBackend, "gpt-5-nano", None, NONE),
    (OpenAIBackend, "o4-mini", None, NONE),
    (OpenAIBackend, "next-year", None, NONE),
    (OpenAIBackend, "Qwen/Qwen3-VL-4B-Instruct", "http://localhost:8000/v1", BOTH),
    (OpenAIBackend, "openai/gpt-oss-20b", "http://localhost:8000/v1", BOTH),
    (OpenAIBackend, "openai/gpt-6-luna", "http://localhost:8000/v1", NONE),
    (OpenAIBackend, "anthropic/claude-haiku-5.5", "http://localhost:8000/v1", NONE),
    (OpenAIBackend, "us.anthropic.claude-opus-4-8", "http://localhost:8000/v1", NONE),
    (OpenAIBackend, "google/gemini-3.8-flash", "http://localhost:8000/v1", NONE),
    (OpenAIBackend, "google/gemini-2.5-flash", "http://localhost:8000/v1", BOTH),
    (GeminiBackend, "gemini-2.5-flash-lite", None, BOTH),
    (GeminiBackend, "models/gemma-3-27b-it", None, BOTH),
    (GeminiBackend, "gemini-3.8-flash", None, NONE),
    (GeminiBackend, "gemini-flash-latest", None, NONE),
    (AnthropicBackend, "claude-haiku-4-5", None, NONE),
    (AnthropicBackend, "claude-haiku-5-5", None, NONE),
]


@pytest.mark.parametrize("kind, model, url, expected", DEFAULTS, ids=[row[1] for row in DEFAULTS])
def test_sampling_is_sent_only_to_models_that_take_it(kind, model, url, expected):
    assert sent(kind(model, url)) == expected
    assert sent(kind(model, url, sampling=Sampling(temperature=0.7)))["temperature"] == 0.7
    assert sent(kind(model, url, sampling=Sampling(temperature=0.7, omit=("temperature", "seed")))) == NONE


def test_keys_of_requests_are_those_that_they_were():
    assert Sampling().spec() == Sampling(temperature=0.2).spec() == {"temperature": 0.2, "seed": 0, "options": {}}
    assert Sampling(omit=("temperature",)).spec() == Sampling().spec()
    assert Sampling(temperature=0.7).spec() != Sampling().spec()


def test_anthropic_is_asked_in_its_present_version_unless_the_user_sets_the_sampling():
    def version(**sampling):
        backend = AnthropicBackend("claude-haiku-4-5", sampling=Sampling(**sampling))
        return backend._headers(backend._prepared(REQUEST))["anthropic-version"]

    assert version() == version(temperature=0.7, omit=("temperature",)) == "2026-10-21"
    assert version(temperature=0.7) == version(options={"top_p": 0.9}) == "2023-06-01"


def test_anthropic_is_asked_for_json_of_a_schema():
    options = {"output_config": {"effort": "low"}}
    body = AnthropicBackend("m", sampling=Sampling(options=options))._prepared(TWO)
    assert body["output_config"]["effort"] == "low"
    schema = body["output_config"]["format"]["schema"]
    assert schema["required"] == ["shape", "colour"] and schema["additionalProperties"] is False
    assert "output_config" not in AnthropicBackend("m")._prepared(REQUEST)


@pytest.mark.parametrize("name", ["model", "messages", "max_tokens", "contents"])
def test_a_request_cannot_do_without_some_fields(name):
    with pytest.raises(UserError, match="omit: expected"):
        OpenAIBackend("m", sampling=Sampling(omit=(name,)))


# -- what is answered -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "given, expected",
    [
        ("STOP", "stop"),
        ("MAX_TOKENS", "length"),
        ("CONTINUATION", "length"),
        ("MODEL_ARMOR", "refusal"),
        ("ESCALATION", "refusal"),
        ("IMAGE_PROHIBITED_CONTENT", "refusal"),
        ("SPII", "refusal"),
        ("NEW_SAFETY_RULE", "refusal"),
        ("MALFORMED_RESPONSE", "MALFORMED_RESPONSE"),
        ("LANGUAGE", "LANGUAGE"),
    ],
)
def test_why_gemini_ended(given, expected):
    data = {"candidates": [{"finishReason": given, "content": {"parts": [{"text": "x"}]}}]}
    assert GeminiBackend("m")._answer(data).finish_reason == expected


def test_an_account_that_gemini_has_limited_ends_the_run():
    with pytest.raises(Fatal, match="account"):
        GeminiBackend("m")._answer({"candidates": [{"finishReason": "PUP_LIMITED_DISABLED"}]})


THOUGHT = {"type": "thinking", "thinking": "", "signature": "s"}


@pytest.mark.parametrize(
    "content, usage, reason, thinking",
    [
        ([THOUGHT, {"type": "text", "text": "a"}], {"output_tokens": 200, "output_tokens_details": {"thinking_tokens": 150}}, "max_tokens", 150),
        ([THOUGHT], {"output_tokens": 200}, "max_tokens", 200),
        ([{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "ten chars."}], {"output_tokens": 105}, "max_tokens", 100),
        ([{"type": "text", "text": "a"}], {"output_tokens": 200}, "max_tokens", 0),
        ([{"type": "text", "text": "a"}], {"output_tokens": 200}, "model_context_window_exceeded", 0),
        ([{"type": "text", "text": "a"}], None, "max_tokens", 0),
    ],
)  # fmt: skip
def test_thinking_of_anthropic(content, usage, reason, thinking):
    found = AnthropicBackend("m")._answer({"content": content, "stop_reason": reason, "usage": usage})
    assert (found.thinking_tokens, found.finish_reason) == (thinking, "length")


def test_thinking_that_openai_servers_do_not_count():
    message = {"content": "ten chars.", "reasoning_content": "hm" * 50}
    data = {"choices": [{"message": message, "finish_reason": "length"}], "usage": {"completion_tokens": 105}}
    assert OpenAIBackend("m")._answer(data).thinking_tokens == 100


# -- runs -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def server(tmp_path):
    with serving({}, tmp_path / "requests.jsonl") as running:
        yield running


PATHS = {"openai": "/v1", "gemini": "/v1beta", "anthropic": ""}


def captions(server, tmp_path, kind="openai", count=6, **options):
    captioner = Captioner(kind, "m", base_url=server.url + PATHS[kind], **options)
    data = dataset(map(picture, range(count)))
    return caption_dataset(data, captioner, run_dir=tmp_path / "run", limits=QUICK, progress=False)


def refusing(field, body, **more):
    """A rule of a server that refuses a field of the request."""
    return {"do": "error", "status": 400, "body": body, "field": field, **more}


TEMPERATURE = refusing("temperature", error(ONLY_DEFAULT, param="temperature", code="unsupported_value"))


def test_a_refused_field_is_left_out_after_the_first_call(server, tmp_path, capsys):
    server.server.script = {"rules": [TEMPERATURE, {"do": "ok", "delay_ms": 20}]}
    assert not wrong(undecoded(captions(server, tmp_path)))
    requests = server.requests()
    assert [("temperature" in r["body"], r["did"]) for r in requests] == [(True, "error")] + [(False, "ok")] * 18
    assert [r["in_flight"] for r in requests[:2]] == [1, 1]  # the others wait until it is known what the server takes
    assert max(r["in_flight"] for r in requests) > 1
    said = capsys.readouterr()
    (line,) = [line for line in (said.out + said.err).replace("\r", "\n").splitlines() if "left out" in line]
    assert "--omit temperature" in line and "Only the default (1) value" in line
    (row,) = left_out(tmp_path / "run" / "journal")
    assert (row["field"], row["instead"], row["model"]) == ("temperature", None, "m")
    # Typed, the flag keeps every answer: the keys of requests do not change.
    captions(server, tmp_path, sampling=Sampling(omit=("temperature",)))
    assert len(server.requests()) == 19
    captions(server, tmp_path, count=7, sampling=Sampling(omit=("temperature",)))
    assert [r["did"] for r in server.requests()[19:]] == ["ok"] * 3


def test_a_field_that_the_user_set_is_left_out_too(server, tmp_path, capsys):
    server.server.script = {
        "rules": [refusing("temperature", anthropic("`temperature` is deprecated for this model."))]
    }
    assert not wrong(undecoded(captions(server, tmp_path, "anthropic", sampling=Sampling(temperature=0.7))))
    versions = [r["headers"]["anthropic-version"] for r in server.requests()]
    assert versions == ["2023-06-01"] + ["2026-10-21"] * 18
    assert "--omit temperature" in "".join(capsys.readouterr())


def test_the_token_limit_under_its_new_name(server, tmp_path, capsys):
    rule = refusing("max_tokens", error(USE_OTHER, param="max_tokens", code="unsupported_parameter"))
    server.server.script = {"rules": [rule]}
    assert not wrong(undecoded(captions(server, tmp_path)))
    requests = server.requests()
    assert [r["did"] for r in requests].count("error") == 1 and len(requests) == 19
    assert {r["body"].get("max_completion_tokens") for r in requests[1:]} == {200}
    assert not any("max_tokens" in r["body"] for r in requests[1:])
    said = "".join(capsys.readouterr())
    flag = said[said.index("--request_options") :].splitlines()[0]
    typed = json.loads(shlex.split(flag)[1])
    assert typed == {"max_tokens": None, "max_completion_tokens": 200}
    captions(server, tmp_path, count=7, sampling=Sampling(options=typed))
    assert [r["did"] for r in server.requests()[19:]] == ["ok"] * 3  # neither refused nor asked again


def test_two_fields_one_after_the_other_and_json_of_a_schema(server, tmp_path):
    schema = refusing("output_config", anthropic("output_config.format: Extra inputs are not permitted"))
    server.server.script = {"rules": [schema, refusing("top_p", anthropic("top_p: Extra inputs are not permitted"))]}
    server.server.script |= {"mode": "json", "aspects": ["visual", "shape", "texture"]}
    options = {"aspects_per_call": "all", "sampling": Sampling(options={"top_p": 0.5})}
    found = undecoded(captions(server, tmp_path, "anthropic", **options))
    assert all(len(row["captions"]) == 3 for row in found)
    assert [r["did"] for r in server.requests()] == ["error"] * 2 + ["ok"] * 6


def test_a_server_that_refuses_both_names_of_the_token_limit_ends_the_run(server, tmp_path):
    other = "Unsupported parameter: 'max_completion_tokens'. Use 'max_tokens' instead."
    rules = [refusing("max_tokens", error(USE_OTHER)), refusing("max_completion_tokens", error(other))]
    server.server.script = {"rules": rules}
    with pytest.raises(UserError, match="max_completion_tokens"):
        captions(server, tmp_path)
    assert len(server.requests()) == 2


def test_a_field_that_is_refused_while_others_are_on_their_way(server, tmp_path):
    server.server.script = {"rules": [{**TEMPERATURE, "after_ok": 4}, {"do": "ok", "delay_ms": 20}]}
    assert not wrong(undecoded(captions(server, tmp_path, count=8)))
    assert 1 <= [r["did"] for r in server.requests()].count("error") <= 8


@pytest.mark.parametrize("status, body, kind", EVERY, ids=range(len(EVERY)))
def test_a_refusal_of_every_request_costs_one_call_and_no_picture(server, tmp_path, status, body, kind):
    server.server.script = {"rules": [{"do": "error", "status": status, "body": body}]}
    if kind == "quota":  # what was answered is a result, and the same command continues
        captions(server, tmp_path, count=2)
    else:
        with pytest.raises(UserError, match=r"It said|found 451"):
            captions(server, tmp_path, count=2)
    assert len(server.requests()) == 1
    server.server.script = {}
    found = undecoded(captions(server, tmp_path, count=2))
    assert not wrong(found) and all(r["attempts"] == 1 for row in found for r in row["caption_records"])


@pytest.mark.parametrize("count", [2, 24])
def test_words_that_nobody_knows_end_the_run_if_several_pictures_meet_them(server, tmp_path, count):
    server.server.script = {
        "rules": [{"do": "error", "status": 400, "body": error("the flux capacitor 12 is offline")}]
    }
    with pytest.raises(UserError, match="flux capacitor"):
        captions(server, tmp_path, count=count)
    assert len(server.requests()) <= 9  # three aspects of three pictures
    server.server.script = {}
    assert not wrong(undecoded(captions(server, tmp_path, count=count)))


def test_pictures_that_a_server_cannot_take_stay_one_by_one(server, tmp_path):
    bad = [
        {"do": "error", "status": 400, "picture": sha256(picture(i)), "body": anthropic("Could not process image")}
        for i in range(5)
    ]
    server.server.script = {"rules": bad}
    found = undecoded(captions(server, tmp_path, "anthropic", count=8))
    assert [len(row["captions"]) for row in found] == [0] * 5 + [3] * 3


# -- the command line -------------------------------------------------------------------------------------------------
def test_the_folder_says_what_was_left_out(server, tmp_path, capsys):
    server.server.script = {
        "rules": [TEMPERATURE, refusing("seed", error("Unrecognized request argument supplied: seed"))]
    }
    data, output = image_folder(tmp_path / "data", 6), tmp_path / "out put"
    command = ["caption", "--captioner", "openai", "--captioner_model", "m", "--base_url", f"{server.url}/v1"]
    command += ["--dataset_name", str(data), "--output_dir", str(output)]
    assert main(command) == 0
    said = "".join(capsys.readouterr())
    assert "--omit temperature" in said and "--omit seed" in said and f"--dataset_name '{output}'" in said
    record = json.loads((output / "captions.json").read_text())
    assert record["requests"] == {} and [row["field"] for row in record["left_out"]] == ["seed", "temperature"]
    assert record["made_from"]["sampling"]["temperature"] == 0.2  # as in folders of version 0.1
    card = (output / "README.md").read_text()
    assert "temperature: the model's own" in card and "without `seed`" in card and "without `temperature`" in card
    for words in (["caption", "status", "--output_dir", str(output)], [*command, "--dry_run"]):
        assert main(words) == 0
        assert "seed, temperature: refused by the server" in capsys.readouterr().out
    rows = pq.read_table(next((output / "data").glob("train-*"))).to_pylist()
    assert {r["status"] for row in rows for r in row["caption_records"]} == {"ok"}


def test_a_run_without_a_single_caption_is_no_success(server, tmp_path, capsys):
    """Neither the first time, nor again, when nothing is left to ask for."""
    server.server.script = {"rules": [{"do": "refusal"}]}
    data, output = image_folder(tmp_path / "data", 2), tmp_path / "out"
    command = ["caption", "--captioner", "openai", "--captioner_model", "m", "--base_url", f"{server.url}/v1"]
    command += ["--dataset_name", str(data), "--output_dir", str(output)]
    for _ in range(2):
        assert main(command) == 2
        printed = capsys.readouterr()
        assert 'expected captions, found none: 6 refused (e.g. "I cannot help with that.")' in printed.err
        assert "`retry refused`" in printed.err and "mmft-hf finetune" not in printed.out
    server.server.script = {}
    assert main([command[0], "retry", "refused", *command[1:]]) == 0
    assert "Next: mmft-hf finetune" in capsys.readouterr().out


def test_the_plan_says_what_would_be_sent(tmp_path, capsys):
    command = [
        "caption",
        "--dataset_name",
        str(image_folder(tmp_path / "data", 4)),
        "--output_dir",
        str(tmp_path / "out"),
        "--dry_run",
    ]
    expected = {
        ("openai", "gpt-6-luna"): "the model's own (nothing is sent)",
        ("gemini", "gemini-2.5-flash-lite"): "temperature 0.2, a seed per request",
    }
    for (kind, model), words in expected.items():
        assert main([*command, "--captioner", kind, "--captioner_model", model]) == 0
        assert words in capsys.readouterr().out
