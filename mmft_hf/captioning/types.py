"""What the parts of the captioning step say to each other: a request, an answer, three kinds of failure, a backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

# -- the status of a request ------------------------------------------------------------------------------------------
# TERMINAL ones are never asked again by themselves; the others are by the next run of the same command.
ACCEPTED = ("ok", "trimmed")
TERMINAL = (*ACCEPTED, "refused", "rejected", "bad_image")
OPEN = ("failed", "empty", "truncated", "not_run")
STATUSES = (*TERMINAL, *OPEN)


@dataclass(frozen=True)
class Picture:
    """A picture as it is sent: encoded bytes, their media type, width and height in pixels."""

    data: bytes
    mime: str
    width: int
    height: int


@dataclass(frozen=True)
class Request:
    """One question about one picture.

    Args:
        picture: sent before the text, so that a server can reuse what it computed for it.
        prompt: the whole text.
        max_tokens: budget of the answer, in the captioner's tokens.
        aspects: one name, or several where the answer must be a JSON object with these keys.
        seed: of the sampling, for backends that take one.
    """

    picture: Picture
    prompt: str
    max_tokens: int
    aspects: tuple[str, ...]
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What came back.

    Args:
        text: as the model wrote it, thinking blocks included; empty where there is none.
        finish_reason: `stop`, `length` (the token budget was used up) or `refusal` (the provider says that it or its
            filter refused); anything else as the provider names it.
        model: as the provider names the model that answered.
        tokens_in, tokens_out: as billed, thinking included; None where the provider does not say.
        thinking_tokens: how many of `tokens_out` were spent before the answer.
    """

    text: str
    finish_reason: str | None = None
    model: str | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    thinking_tokens: int = 0


# -- failures ---------------------------------------------------------------------------------------------------------
class CallError(Exception):
    """A call without an answer. `kind` is a short word to count by (`http_503`, `timeout`, `connect`, …).

    The message must be free of keys: `transport.redact` sees to it.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Transient(CallError):
    """Worth trying again. `wait`: seconds that the server asks for. `limited`: a rate limit, which slows all calls."""

    def __init__(self, kind: str, message: str, wait: float | None = None, limited: bool = False):
        super().__init__(kind, message)
        self.wait, self.limited = wait, limited


class Unanswerable(CallError):
    """This request will fail each time (the server calls it invalid), others may not."""


class Fatal(CallError):
    """No further call can succeed: `kind` is `credentials`, `quota`, `model` or `server`."""


class Backend(Protocol):
    """Who answers requests. Written for HTTP servers and for a model in this process alike."""

    batch_size: int
    """How many requests one `generate` takes at best: 1 for a server, which batches by itself."""

    def identity(self) -> dict[str, Any]:
        """What tells its answers from another's: provider, model, revision, … Never a key, an address or a path."""
        ...

    def check_key(self) -> None:
        """Raises `UserError` where a key is needed and its variable holds none."""
        ...

    async def generate(self, requests: Sequence[Request]) -> list[Answer | CallError]:
        """The answers in the order of the requests; an error in the place of an answer concerns that request alone.

        Raises `Transient`, `Unanswerable` or `Fatal` where it concerns them all.
        """
        ...

    async def aclose(self) -> None:
        """Closes connections."""
        ...


# What providers call the budget of an answer.
BUDGETS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "maxOutputTokens")


@dataclass(frozen=True)
class Sampling:
    """How a captioner writes.

    Args:
        temperature: 0 for the likeliest text; the method's own captions were written at 0.2.
        max_tokens: budget of one caption in the captioner's tokens (thinking models need more).
        seed: of the sampling.
        options: sent as they are in the body of a request (or given to `generate`); null takes a field away.
    """

    temperature: float = 0.2
    max_tokens: int = 200
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def spec(self) -> dict:
        """What decides on a text that came to its end by itself: all but the budget, which only cuts."""
        options = {
            name: {n: v for n, v in value.items() if n not in BUDGETS} if isinstance(value, Mapping) else value
            for name, value in self.options.items()
            if name not in BUDGETS
        }
        return {"temperature": float(self.temperature), "seed": self.seed, "options": options}  # 0 is 0.0
