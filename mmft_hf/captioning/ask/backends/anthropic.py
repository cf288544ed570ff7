"""Anthropic's Messages API."""

from __future__ import annotations

from typing import Any

from ...types import Answer, Request
from .base import HTTPBackend, count_of, merged, text_of
from .transport import PICTURE

_REASONS = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length"}


class AnthropicBackend(HTTPBackend):
    """Posts to `{base_url}/v1/messages`, whether or not `base_url` ends in /v1. The provider takes no seed."""

    name = "anthropic"
    default_url = "https://api.anthropic.com"
    default_key_env = "ANTHROPIC_API_KEY"
    key_header = "x-api-key"
    headers = {"anthropic-version": "2023-06-01"}

    def _path(self) -> str:
        return "/messages" if self.transport.base_url.endswith("/v1") else "/v1/messages"

    def _body(self, request: Request) -> dict[str, Any]:
        source = {"type": "base64", "media_type": request.picture.mime, "data": PICTURE}
        content = [{"type": "image", "source": source}, {"type": "text", "text": request.prompt}]
        body = {
            "model": self.model,
            "max_tokens": request.max_tokens,
            "temperature": self.sampling.temperature,
            "messages": [{"role": "user", "content": content}],
        }
        return merged(body, self.sampling.options)

    def _answer(self, data: dict[str, Any]) -> Answer:
        # Thinking comes in blocks of another type.
        text = "".join(text_of(block["text"]) for block in data["content"] if block["type"] == "text")
        reason, usage = data["stop_reason"], data.get("usage") or {}
        # Tokens written to or read from the cache are billed too, and are not part of input_tokens.
        cached = (usage.get("cache_creation_input_tokens"), usage.get("cache_read_input_tokens"))
        return Answer(
            text=text,
            finish_reason=_REASONS.get(reason, reason),
            model=data.get("model"),
            tokens_in=count_of(usage.get("input_tokens"), *cached),
            tokens_out=count_of(usage.get("output_tokens")),
        )
