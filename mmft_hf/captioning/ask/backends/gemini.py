"""Gemini's `generateContent` API."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from ...types import Answer, Request
from .base import MAX_SEED, HTTPBackend, count_of, merged, text_of
from .transport import PICTURE

_REASONS = {"STOP": "stop", "MAX_TOKENS": "length"}
_REFUSALS = frozenset(
    "BLOCKLIST IMAGE_PROHIBITED_CONTENT IMAGE_RECITATION IMAGE_SAFETY PROHIBITED_CONTENT RECITATION SAFETY SPII".split()
)


class GeminiBackend(HTTPBackend):
    """Posts to `{base_url}/models/{model}:generateContent`.

    Sampling options are merged into the body one level deep, as in `{"generationConfig": {"thinkingConfig": {…}}}`.
    """

    name = "gemini"
    default_url = "https://generativelanguage.googleapis.com/v1beta"
    default_key_env = "GEMINI_API_KEY"
    key_header = "x-goog-api-key"

    def _path(self) -> str:
        return f"/models/{quote(self.model.removeprefix('models/'), safe='')}:generateContent"

    def _body(self, request: Request) -> dict[str, Any]:
        generation: dict[str, Any] = {
            "temperature": self.sampling.temperature,
            "maxOutputTokens": request.max_tokens,
            "seed": request.seed & MAX_SEED,
        }
        if len(request.aspects) > 1:
            generation["responseMimeType"] = "application/json"
            aspects = {aspect: {"type": "STRING"} for aspect in request.aspects}
            order = {"required": [*aspects], "propertyOrdering": [*aspects]}
            generation["responseSchema"] = {"type": "OBJECT", "properties": aspects, **order}
        parts = [{"inlineData": {"mimeType": request.picture.mime, "data": PICTURE}}, {"text": request.prompt}]
        body = {"contents": [{"role": "user", "parts": parts}], "generationConfig": generation}
        return merged(body, self.sampling.options, nested=True)

    def _answer(self, data: dict[str, Any]) -> Answer:
        usage = data.get("usageMetadata") or {}
        thinking = count_of(usage.get("thoughtsTokenCount")) or 0
        if (data.get("promptFeedback") or {}).get("blockReason"):
            text, reason = "", "refusal"
        else:
            candidate = data["candidates"][0]
            # Filtered answers come without content, and so do answers that spent all their tokens on thinking.
            parts = (candidate.get("content") or {}).get("parts") or []
            text = "".join(text_of(p["text"]) for p in parts if "text" in p and not p.get("thought"))
            found = candidate["finishReason"]
            reason = "refusal" if found in _REFUSALS else _REASONS.get(found, found)
        return Answer(
            text=text,
            finish_reason=reason,
            model=data.get("modelVersion"),
            tokens_in=count_of(usage.get("promptTokenCount")),
            tokens_out=count_of(usage.get("candidatesTokenCount"), usage.get("thoughtsTokenCount")),
            thinking_tokens=thinking,
        )
