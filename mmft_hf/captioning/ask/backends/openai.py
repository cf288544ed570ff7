"""OpenAI's chat completions, as spoken by OpenAI, `vllm serve`, `transformers serve`, TGI, Ollama and routers."""

from __future__ import annotations

import re
from typing import Any

from ...types import Answer, Request
from .base import HTTPBackend, count_of, merged, object_schema, text_of, thinking_of
from .transport import PICTURE, check_url

# OpenAI's own models that take a temperature and a seed; those after them refuse or ignore both.
_TAKES_SAMPLING = re.compile(r"(?:ft:)?(?:gpt-3\.5|gpt-4|chatgpt-4)")
# Servers of open models take them. Behind a router there may be one of the models that do not.
_REFUSES_SAMPLING = re.compile(r"(?:^|[/.:])(?:claude|gemini-(?:[3-9]|flash|pro)|gpt-(?:[5-9]|[1-3]\d)|o[1-9](?:-|$))")


class OpenAIBackend(HTTPBackend):
    """Posts to `{base_url}/chat/completions`. The sampling option `detail` (`low` or `high`) goes to the picture.

    OpenAI itself is asked for strict JSON if a request has several aspects. Other servers are not: with vLLM this mode
    leaves some answers blank up to the token limit, and the prompt asks for JSON in any case.
    """

    name = "openai"
    default_url = "https://api.openai.com/v1"
    default_key_env = "OPENAI_API_KEY"

    def __init__(self, model: str, base_url: str | None = None, **options):
        if base_url and not check_url(base_url).path.strip("/"):
            self.not_found = f"Perhaps --base_url needs /v1 at its end. {self.not_found}"
        super().__init__(model, base_url, **options)

    @property
    def takes_sampling(self) -> bool:
        name = self.model.lower()
        return bool(_TAKES_SAMPLING.match(name)) if self.official else not _REFUSES_SAMPLING.search(name)

    def _path(self) -> str:
        return "/chat/completions"

    def _body(self, request: Request) -> dict[str, Any]:
        options = dict(self.sampling.options)
        detail = {"detail": options.pop("detail", None)}
        urls = [f"data:{picture.mime};base64,{PICTURE}" for picture in request.pictures]
        content = [{"type": "image_url", "image_url": merged({"url": url}, detail)} for url in urls]
        content.append({"type": "text", "text": request.prompt})
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            **self._sampling(request),
            # OpenAI's newer models accept only the new name, many other servers only the old one.
            "max_completion_tokens" if self.official else "max_tokens": request.max_tokens,
        }
        if self.official and len(request.aspects) > 1:
            schema = {"name": "captions", "strict": True, "schema": object_schema(request.aspects)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return merged(body, options)

    def _places(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        parts = body["messages"][0]["content"]
        return [body, *(part["image_url"] for part in parts if part["type"] == "image_url")]

    def _answer(self, data: dict[str, Any]) -> Answer:
        choice = data["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        if reason == "error":  # from a router whose upstream server failed
            raise TypeError(reason)
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(text_of(part["text"]) for part in content if part.get("type") == "text")
        text = text_of(content if content is not None else "")
        if message.get("refusal"):
            text, reason = text or text_of(message["refusal"]), "refusal"
        usage = data.get("usage") or {}
        counted = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
        tokens_out = count_of(usage.get("completion_tokens"))
        thought = message.get("reasoning_content") or message.get("reasoning")
        return Answer(
            text=text,
            finish_reason="refusal" if reason == "content_filter" else reason,
            model=data.get("model"),
            tokens_in=count_of(usage.get("prompt_tokens")),
            tokens_out=tokens_out,
            thinking_tokens=thinking_of(counted, bool(thought), tokens_out, text),
        )
