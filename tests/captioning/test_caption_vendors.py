"""Requests and answers against the providers' own types, where their SDKs are installed."""

from typing import get_args

import pytest

from mmft_hf.captioning.ask.backends.anthropic import VERSION, AnthropicBackend
from mmft_hf.captioning.ask.backends.gemini import GeminiBackend
from mmft_hf.captioning.ask.backends.openai import OpenAIBackend
from mmft_hf.captioning.types import Fatal, Picture, Request, Sampling

PICTURE = Picture(b"\xff\xd8", "image/jpeg", 30, 20)
REQUESTS = [
    Request((PICTURE,), "Describe it.", 77, ("shape",), seed=5),
    Request((PICTURE,), "Describe it.", 77, ("shape", "colour"), seed=5),
]
REFUSALS = "SAFETY RECITATION BLOCKLIST PROHIBITED_CONTENT SPII IMAGE_SAFETY IMAGE_PROHIBITED_CONTENT IMAGE_RECITATION MODEL_ARMOR "
REFUSALS += "ESCALATION"


def valid(kind, body) -> None:
    """Validates a body against a typed dictionary, whose fields are all that there are."""
    from pydantic import TypeAdapter

    assert set(body) <= set(kind.__annotations__), set(body) - set(kind.__annotations__)
    adapter = TypeAdapter(kind)
    adapter.dump_json(adapter.validate_python(body))  # dumping validates iterables, too


@pytest.mark.parametrize("request_", REQUESTS, ids=["one", "all"])
@pytest.mark.parametrize("model", ["gpt-4.1-mini", "gpt-6-luna"])
def test_openai_takes_the_request(model, request_):
    types = pytest.importorskip("openai.types.chat.completion_create_params")
    sampling = Sampling(options={"detail": "low", "reasoning_effort": "low"})
    body = OpenAIBackend(model, sampling=sampling)._prepared(request_)
    valid(types.CompletionCreateParamsNonStreaming, body)
    # The typed dictionaries of a message are a union, so the picture is checked by itself.
    valid(
        pytest.importorskip("openai.types.chat").ChatCompletionContentPartImageParam, body["messages"][0]["content"][0]
    )


@pytest.mark.parametrize("reason, expected", [("stop", "stop"), ("length", "length"), ("content_filter", "refusal")])
def test_openai_answers(reason, expected):
    types, usage = pytest.importorskip("openai.types.chat"), pytest.importorskip("openai.types.completion_usage")
    assert {"stop", "length", "content_filter"} <= set(
        get_args(types.chat_completion.Choice.model_fields["finish_reason"].annotation)
    )
    answer = types.ChatCompletion(
        id="c",
        object="chat.completion",
        created=1,
        model="gpt-6-luna",
        choices=[{"index": 0, "finish_reason": reason, "logprobs": None, "message": {"role": "assistant", "content": "A cat."}}],
        usage=usage.CompletionUsage(
            prompt_tokens=300,
            completion_tokens=200,
            total_tokens=500,
            completion_tokens_details=usage.CompletionTokensDetails(reasoning_tokens=150),
        ),
    )  # fmt: skip
    found = OpenAIBackend("m")._answer(answer.model_dump(mode="json"))
    assert (found.text, found.finish_reason) == ("A cat.", expected)
    assert (found.tokens_in, found.tokens_out, found.thinking_tokens) == (300, 200, 150)


@pytest.mark.parametrize("request_", REQUESTS, ids=["one", "all"])
def test_anthropic_takes_the_request(request_):
    types = pytest.importorskip("anthropic.types.message_create_params")
    body = AnthropicBackend("claude-haiku-5-5")._prepared(request_)
    valid(types.MessageCreateParamsNonStreaming, body)  # which has no temperature any more
    valid(pytest.importorskip("anthropic.types").ImageBlockParam, body["messages"][0]["content"][0])


def test_anthropic_is_asked_in_the_version_of_its_sdk():
    constants = pytest.importorskip("anthropic._constants")
    assert getattr(constants, "ANTHROPIC_API_VERSION", VERSION) == VERSION


def test_anthropic_answers():
    types = pytest.importorskip("anthropic.types")
    expected = {
        "end_turn": "stop",
        "stop_sequence": "stop",
        "max_tokens": "length",
        "model_context_window_exceeded": "length",
        "refusal": "refusal",
        "tool_use": "tool_use",
        "pause_turn": "pause_turn",
    }
    assert set(get_args(types.StopReason)) <= set(expected)
    for reason in get_args(types.StopReason):
        usage = {"input_tokens": 300, "output_tokens": 200, "output_tokens_details": {"thinking_tokens": 150}}
        blocks = [{"type": "thinking", "thinking": "", "signature": "s"}, {"type": "text", "text": "A cat."}]
        answer = types.Message.model_validate(
            {
                "id": "m",
                "type": "message",
                "role": "assistant",
                "model": "claude-haiku-5-5",
                "content": blocks,
                "stop_reason": reason,
                "usage": usage,
            }
        )
        found = AnthropicBackend("m")._answer(answer.model_dump(mode="json"))
        assert (found.text, found.finish_reason) == ("A cat.", expected[reason])
        assert (found.tokens_in, found.tokens_out, found.thinking_tokens) == (300, 200, 150)


@pytest.mark.parametrize("request_", REQUESTS, ids=["one", "all"])
@pytest.mark.parametrize("model", ["gemini-2.5-flash-lite", "gemini-3.8-flash"])
def test_gemini_takes_the_request(model, request_):
    types = pytest.importorskip("google.genai.types")
    body = GeminiBackend(model)._prepared(request_)
    assert set(body) == {"contents", "generationConfig"}
    part, _ = body["contents"][0]["parts"]
    assert part["inlineData"].pop("data")  # stands for the base64 that is spliced in
    part["inlineData"]["data"] = "/9g="
    for kind, value in ((types.Content, body["contents"][0]), (types.GenerateContentConfig, body["generationConfig"])):
        assert kind.model_config["extra"] == "forbid"
        kind.model_validate(value)


def test_gemini_answers():
    types = pytest.importorskip("google.genai.types")
    expected = dict.fromkeys(REFUSALS.split(), "refusal")
    expected |= {"STOP": "stop", "MAX_TOKENS": "length", "CONTINUATION": "length"}
    for reason in types.FinishReason:
        parts = [types.Part(text="hm", thought=True), types.Part(text="A cat.")]
        usage = types.GenerateContentResponseUsageMetadata(
            prompt_token_count=300, candidates_token_count=50, thoughts_token_count=150
        )
        answer = types.GenerateContentResponse(
            candidates=[types.Candidate(finish_reason=reason, content=types.Content(role="model", parts=parts))],
            usage_metadata=usage,
            model_version="gemini-3.8-flash",
        ).model_dump(mode="json", by_alias=True)
        if reason.value == "PUP_LIMITED_DISABLED":
            with pytest.raises(Fatal, match="account"):
                GeminiBackend("m")._answer(answer)
            continue
        found = GeminiBackend("m")._answer(answer)
        assert (found.text, found.finish_reason) == ("A cat.", expected.get(reason.value, reason.value))
        assert (found.tokens_in, found.tokens_out, found.thinking_tokens) == (300, 200, 150)
    for reason in types.BlockedReason:
        feedback = types.GenerateContentResponsePromptFeedback(block_reason=reason)
        answer = types.GenerateContentResponse(prompt_feedback=feedback).model_dump(mode="json", by_alias=True)
        assert GeminiBackend("m")._answer(answer).finish_reason == "refusal"
