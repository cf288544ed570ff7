"""Gemini's `generateContent` API."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

from ...types import Answer, Fatal, Request
from .base import HTTPBackend, count_of, merged, text_of
from .transport import PICTURE

# CONTINUATION: the limit of one request was reached, and another request could go on.
_REASONS = {"STOP": "stop", "MAX_TOKENS": "length", "CONTINUATION": "length"}
# SAFETY, IMAGE_SAFETY, PROHIBITED_CONTENT, RECITATION, BLOCKLIST, SPII, MODEL_ARMOR, ESCALATION, and their like.
_REFUSAL = re.compile(r"SAFETY|PROHIBITED|RECITATION|BLOCK|SPII|MODEL_ARMOR|ESCALATION|JAILBREAK")
# Google advises against these fields from Gemini 3 on, and later generations ignore them.
_TAKES_SAMPLING = re.compile(r"gemini-(?:[12][.-]|pro)|gemma|learnlm")


class GeminiBackend(HTTPBackend):
    """Posts to `{base_url}/models/{model}:generateContent`.

    Sampling options are merged into the body one level deep, as in `{"generationConfig": {"thinkingConfig": {…}}}`.
    """

    name = "gemini"
    default_url = "https://generativelanguage.googleapis.com/v1beta"
    default_key_env = "GEMINI_API_KEY"
    key_header = "x-goog-api-key"

    @property
    def _name(self) -> str:
        return self.model.removeprefix("models/")

    @property
    def takes_sampling(self) -> bool:
        return bool(_TAKES_SAMPLING.match(self._name.lower()))

    def _path(self) -> str:
        return f"/models/{quote(self._name, safe='')}:generateContent"

    def _body(self, request: Request) -> dict[str, Any]:
        generation: dict[str, Any] = {**self._sampling(request), "maxOutputTokens": request.max_tokens}
        if len(request.aspects) > 1:
            generation["responseMimeType"] = "application/json"
            aspects = {aspect: {"type": "STRING"} for aspect in request.aspects}
            order = {"required": [*aspects], "propertyOrdering": [*aspects]}
            generation["responseSchema"] = {"type": "OBJECT", "properties": aspects, **order}
        parts = [{"inlineData": {"mimeType": picture.mime, "data": PICTURE}} for picture in request.pictures]
        parts.append({"text": request.prompt})
        body = {"contents": [{"role": "user", "parts": parts}], "generationConfig": generation}
        return merged(body, self.sampling.options, nested=True)

    def _places(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        generation = body.get("generationConfig")
        thinking = generation.get("thinkingConfig") if isinstance(generation, dict) else None
        return [place for place in (body, generation, thinking) if isinstance(place, dict)]

    def _without(self, body: dict[str, Any], field: str, instead: str | None) -> None:
        super()._without(body, field, instead)
        if field == "responseMimeType":  # a schema alone is refused
            super()._without(body, "responseSchema", None)

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
            found = text_of(candidate["finishReason"])
            if found == "PUP_LIMITED_DISABLED":
                raise Fatal("credentials", f"{self.transport.host}: the account of this key is limited or disabled.")
            reason = "refusal" if _REFUSAL.search(found) else _REASONS.get(found, found)
        return Answer(
            text=text,
            finish_reason=reason,
            model=data.get("modelVersion"),
            tokens_in=count_of(usage.get("promptTokenCount")),
            tokens_out=count_of(usage.get("candidatesTokenCount"), usage.get("thoughtsTokenCount")),
            thinking_tokens=thinking,
        )
