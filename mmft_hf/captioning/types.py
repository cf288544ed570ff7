"""The vocabulary of the captioning package: statuses, requests, answers, failures, sampling and the backend protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from ..core.errors import UserError, nearest

# -- the status of a request ------------------------------------------------------------------------------------------
# The next run of the same command asks again for OPEN ones, never for TERMINAL ones.
ACCEPTED = ("ok", "trimmed")
TERMINAL = (*ACCEPTED, "refused", "rejected", "bad_image")
OPEN = ("failed", "empty", "truncated", "not_run")
STATUSES = (*TERMINAL, *OPEN)
DROPPED = "dropped"  # the status of a caption that a refining step turned down; its text stays in the record
REPLACED = "replaced"  # the status of a caption whose place a text of a refining step took


@dataclass(frozen=True)
class Picture:
    """A picture as it is sent: encoded bytes, media type, width and height in pixels."""

    data: bytes
    mime: str
    width: int
    height: int


@dataclass(frozen=True)
class Request:
    """One question.

    Args:
        pictures: sent before the text, so that a server can reuse what it computed for them. None for a question about text alone.
        prompt: the whole text.
        max_tokens: token limit of the answer, in the captioner's tokens.
        aspects: one name, or several if the answer must be a JSON object with these keys.
        seed: seed of the sampling, for backends that take one.
        forced: a text whose log-probabilities are asked for, instead of an answer. The answer is JSON: for each token its begin and end
            in the text, its log-probability and its logit.
        sample: number of the text among those of the same question, which diverse beams write together.
    """

    pictures: tuple[Picture, ...]
    prompt: str
    max_tokens: int
    aspects: tuple[str, ...]
    seed: int = 0
    sample: int = 0
    forced: str | None = None


@dataclass(frozen=True)
class Answer:
    """What came back.

    Args:
        text: as the model wrote it, thinking blocks included; empty if there is none.
        finish_reason: `stop`, `length` (the token limit was reached) or `refusal` (of the provider or its filter);
            anything else as the provider names it.
        model: the model that answered, as the provider names it.
        tokens_in, tokens_out: as billed, thinking included; None if the provider does not say.
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
    """A call without an answer. `kind` is a short word for statistics (`http_503`, `timeout`, `connect`, …).

    The message must not contain keys: see `failures.redact`.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


class Transient(CallError):
    """Worth trying again. `wait`: seconds that the server asks to wait. `limited`: a rate limit, which slows all calls."""

    def __init__(self, kind: str, message: str, wait: float | None = None, limited: bool = False):
        super().__init__(kind, message)
        self.wait, self.limited = wait, limited


class Unanswerable(CallError):
    """This request will always fail (the server calls it invalid), but others may not.

    `general`: the message does not speak of the picture, so the fault may be in every request.
    """

    def __init__(self, kind: str, message: str, general: bool = False):
        super().__init__(kind, message)
        self.general = general


class Fatal(CallError):
    """No further call can succeed: `kind` is `credentials`, `quota`, `model`, `country`, `budget` or `server`."""


class FieldRefused(Fatal):
    """The server refuses a field of the request, as it would in every request.

    `field`: its name in the body. `instead`: the name under which the server wants its value, or None.
    """

    def __init__(self, message: str, field: str, instead: str | None = None):
        super().__init__("field_refused", message)
        self.field, self.instead = field, instead


# What a question may need of a backend beyond one picture and a text, in the words of messages.
FEATURES = {
    "text": "questions without a picture",
    "pictures": "several pictures in a question",
    "logprobs": "the log-probabilities of a given text",
    "beams": "diverse beam search",
    "guidance": "guidance against the prompt without the picture",
}


class Backend(Protocol):
    """Answers requests, through an HTTP server or with a model in this process."""

    features: frozenset[str]
    """Which of `FEATURES` it has."""

    batch_size: int
    """Best number of requests for one `generate`: 1 for a server, which forms its own batches."""

    def identity(self) -> dict[str, Any]:
        """What distinguishes its answers: provider, model, revision, … Never a key, an address or a path."""

    def sampling_fields(self) -> dict[str, Any]:
        """What a request says about the sampling: the fields that are sent, by name, and their values."""

    def check_key(self) -> None:
        """Raises `UserError` if a key is needed and its environment variable is not set."""

    def leave_out(self, error: FieldRefused) -> bool:
        """Asks without the refused field from now on. False if the backend cannot do without it.

        Only backends that raise `FieldRefused` need it.
        """

    async def generate(self, requests: Sequence[Request]) -> list[Answer | CallError]:
        """The answers in the order of the requests; an error instead of an answer concerns that request alone.

        Raises `Transient`, `Unanswerable` or `Fatal` if all requests are concerned.
        """

    async def aclose(self, again: bool = False) -> None:
        """Closes connections, which belong to one event loop. Frees a model in this process, unless it will be asked `again`."""


# What providers call the token limit of an answer.
BUDGETS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "maxOutputTokens")


DEFAULT_TEMPERATURE = 0.2  # at which the captions of the method were written


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen, where a model in this process writes.

    Args:
        beams: beam search with so many beams, instead of sampling; None: none.
        groups: diverse beam search (Vijayakumar et al. 2016, arXiv 1610.02424): the beams form groups, and each group writes one
            text. `beams` is a multiple of it.
        diversity: what is taken from the log-probability of a token for each beam of an earlier group that has chosen it at the
            same position.
        guidance: γ of log p∅ + γ · (log p − log p∅), with p∅ the model without the picture (after Kornblith et al. 2023, arXiv
            2307.16686, whose captioner was tuned for the empty condition); 1 is none.

    Raises:
        UserError: a value out of range.
    """

    beams: int | None = None
    groups: int = 1
    diversity: float = 0.5
    guidance: float = 1.0

    def __post_init__(self):
        for name, kind in (("beams", int), ("groups", int), ("diversity", float), ("guidance", float)):
            value = getattr(self, name)
            number = type(value) is int or (kind is float and type(value) is float and math.isfinite(value))
            if not number and not (name == "beams" and value is None):
                words = "a whole number" if kind is int else "a number"
                raise UserError(f"decoding, {name}: expected {words}, found {value!r}.")
        if self.groups < 1 or (self.beams is not None and (self.beams < 1 or self.beams % self.groups)):
            raise UserError(
                f"decoding: expected beams to be a multiple of groups, found beams {self.beams} and groups {self.groups}."
            )
        if self.groups > 1 and self.beams is None:
            raise UserError(f"decoding: expected beams where there are groups, found none. Write beams: {self.groups}.")
        if self.diversity < 0 or self.guidance <= 0:
            raise UserError(
                "decoding: expected diversity from 0 on and guidance above 0, found "
                f"{self.diversity:g} and {self.guidance:g}."
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Decoding:
        """From names and values. Raises `UserError` for an unknown name."""
        known = [field.name for field in fields(cls)]
        if unknown := next((name for name in options if name not in known), None):
            raise UserError(f"decoding: expected {', '.join(known)}, found {unknown!r}.{nearest(str(unknown), known)}")
        return cls(**options)

    def spec(self) -> dict:
        """What changes the text; empty if nothing does."""
        found: dict[str, Any] = {}
        if self.beams is not None:
            found |= {"beams": self.beams, "groups": self.groups}
        if self.groups > 1:
            found["diversity"] = float(self.diversity)
        return found | ({"guidance": float(self.guidance)} if self.guidance != 1 else {})


@dataclass(frozen=True)
class Sampling:
    """How a captioner writes.

    Args:
        temperature: 0 always takes the most likely token. None: `DEFAULT_TEMPERATURE` where the kind of model is known to
            take a temperature, otherwise none is sent and the model uses its own.
        max_tokens: token limit of one caption, in the captioner's tokens (models that think first need more).
        seed: seed of the sampling.
        options: sent as they are in the body of a request (or given to `generate`); null removes a field.
        omit: fields that are never sent, for servers that refuse them.
        decoding: beams or guidance, for a model in this process.
    """

    temperature: float | None = None
    max_tokens: int = 200
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    omit: tuple[str, ...] = ()
    decoding: Decoding = Decoding()

    def spec(self) -> dict:
        """What the user asked of the sampling, for the keys of requests.

        The token limit only truncates, so it is not part of it. Nor is `omit`: a run whose server refuses a field goes on
        without it under the same keys, and so does the next run that is told to omit it. A temperature that is not set is
        written as the default one, whether it is sent or not: journals are continued that were begun when it always was.
        """
        options = {
            name: {n: v for n, v in value.items() if n not in BUDGETS} if isinstance(value, Mapping) else value
            for name, value in self.options.items()
            if name not in BUDGETS
        }
        temperature = DEFAULT_TEMPERATURE if self.temperature is None else self.temperature
        found = {"temperature": float(temperature), "seed": self.seed, "options": options}  # 0 is 0.0
        decoding = self.decoding.spec()
        return found | ({"decoding": decoding} if decoding else {})
