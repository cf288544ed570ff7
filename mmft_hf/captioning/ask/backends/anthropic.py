"""Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...types import Answer, Request
from .base import HTTPBackend, count_of, merged, object_schema, text_of, thinking_of
from .transport import PICTURE

VERSION = "2026-10-21"
# The present version refuses every sampling field, even at its default. The one before it takes them for models up to
# Claude 4.6. Source: platform.claude.com/docs/en/api/versioning
VERSION_WITH_SAMPLING = "2023-06-01"
SAMPLING_FIELDS = {"temperature", "top_p", "top_k"}

_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
}
_THINKING = {"thinking", "redacted_thinking"}


class AnthropicBackend(HTTPBackend):
    """Posts to `{base_url}/v1/messages`, whether or not `base_url` ends in /v1. The provider takes no seed.

    Several aspects are asked for as JSON of a given schema.
    """

    name = "anthropic"
    default_url = "https://api.anthropic.com"
    default_key_env = "ANTHROPIC_API_KEY"
    key_header = "x-api-key"
    takes_seed = False

    def _path(self) -> str:
        return "/messages" if self.transport.base_url.endswith("/v1") else "/v1/messages"

    def _headers(self, body: Mapping[str, Any]) -> dict[str, str]:
        return {"anthropic-version": VERSION_WITH_SAMPLING if SAMPLING_FIELDS & set(body) else VERSION}

    def _body(self, request: Request) -> dict[str, Any]:
        sources = [{"type": "base64", "media_type": picture.mime, "data": PICTURE} for picture in request.pictures]
        content = [{"type": "image", "source": source} for source in sources]
        content.append({"type": "text", "text": request.prompt})
        body = {
            "model": self.model,
            "max_tokens": request.max_tokens,
            **self._sampling(request),
            "messages": [{"role": "user", "content": content}],
        }
        if len(request.aspects) > 1:
            schema = {"type": "json_schema", "schema": object_schema(request.aspects)}
            body["output_config"] = {"format": schema}
        return merged(body, self.sampling.options, nested=True)

    def _answer(self, data: dict[str, Any]) -> Answer:
        # Thinking comes in blocks of another type.
        blocks = data["content"]
        text = "".join(text_of(block["text"]) for block in blocks if block["type"] == "text")
        reason, usage = data["stop_reason"], data.get("usage") or {}
        # Tokens written to or read from the cache are billed too, and are not part of input_tokens.
        cached = (usage.get("cache_creation_input_tokens"), usage.get("cache_read_input_tokens"))
        counted = (usage.get("output_tokens_details") or {}).get("thinking_tokens")
        tokens_out, thought = count_of(usage.get("output_tokens")), any(b["type"] in _THINKING for b in blocks)
        return Answer(
            text=text,
            finish_reason=_REASONS.get(reason, reason),
            model=data.get("model"),
            tokens_in=count_of(usage.get("input_tokens"), *cached),
            tokens_out=tokens_out,
            thinking_tokens=thinking_of(counted, thought, tokens_out, text),
        )
