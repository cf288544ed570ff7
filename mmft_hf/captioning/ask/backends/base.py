"""The base of the HTTP backends: one request becomes one POST. Each backend builds the body and reads the answer."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ....core.console import printable_text
from ....core.errors import UserError
from ...types import BUDGETS, DEFAULT_TEMPERATURE, Answer, FieldRefused, Picture, Request, Sampling, Transient
from .transport import Transport, check_url

# Options that cannot be overridden: they decide what is asked and how the answer is read.
RESERVED = ("contents", "messages", "model", "n", "stream")
MAX_COUNT = 10**8  # tokens: more than any model reads or writes
MAX_NAME = 200
MAX_SEED = 0x7FFFFFFF  # the 31 bits that every server accepts
# Fields without which there is no question. Of the others, a server may refuse any.
ESSENTIAL = {"contents", "generationConfig", "messages", "model", "url"}
_EXAMPLE = Request((Picture(b"", "image/jpeg", 1, 1),), "", 1, ("aspect",))


class HTTPBackend(ABC):
    """A `types.Backend` for one server.

    Args:
        model: as the server names it.
        base_url: of another server with the same protocol. It gets no key unless `api_key_env` is given.
        api_key_env: name of the environment variable that holds the key. Default: the provider's usual one.
        sampling: temperature, `options` that override fields of the body (null removes a field), and fields to `omit`.
            Token limit and seed come from each request.
        connection: `concurrency`, `timeout_s` and `allow_http` of `Transport`.

    Attributes:
        takes_sampling: whether the model is of a kind that is known to take a temperature and a seed. They are sent to others
            only if the user sets them.
        takes_seed: whether the provider has a field `seed`.

    Raises:
        UserError: an argument that cannot be right, at construction.
        Transient, Unanswerable, Fatal: from `generate`.
    """

    batch_size = 1
    features = frozenset({"text", "pictures"})
    name: str
    default_url: str
    default_key_env: str
    key_header = "Authorization"
    takes_sampling = False
    takes_seed = True
    not_found = "Check --captioner_model and --base_url."

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_env: str | None = None,
        sampling: Sampling | None = None,
        **connection,
    ):
        if not model or not model.isprintable():
            raise UserError(f"--captioner_model: expected the name of a model, found {model!r}.")
        self.model, self.sampling = model, sampling or Sampling()
        _check_options(self.sampling)
        url = base_url or self.default_url
        self.official = check_url(url).hostname == check_url(self.default_url).hostname
        if api_key_env is None and self.official:
            api_key_env = self.default_key_env
        self.transport = Transport(url, api_key_env, self.key_header, self.not_found, **connection)
        # Fields that are not sent, each with the name under which its value is sent instead, or None.
        self._left_out: dict[str, str | None] = dict.fromkeys(self.sampling.omit)

    def identity(self) -> dict[str, Any]:
        """Kind of backend and name of the model."""
        return {"backend": self.name, "model": self.model}

    def check_key(self) -> None:
        """Raises `UserError` if a key is needed and its environment variable is not set."""
        self.transport.check_key()

    def sampling_fields(self) -> dict[str, Any]:
        """The optional fields of a request for one caption, options of the user included; see `types.Backend`."""
        places = self._places(self._prepared(_EXAMPLE))
        found = {name: value for place in places for name, value in place.items() if name not in {*ESSENTIAL, *BUDGETS}}
        return found | ({"seed": "one per request"} if "seed" in found and "seed" not in self.sampling.options else {})

    def leave_out(self, error: FieldRefused) -> bool:
        """Sends a refused field no more, or under another name; see `types.Backend`."""
        if error.field not in self._left_out:
            needed = error.field in BUDGETS and (error.instead is None or error.instead in self._left_out)
            if needed:
                return False
            self._left_out[error.field] = error.instead
        return True

    async def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers in the order of the requests, asked for one after the other."""
        return [await self._ask(request) for request in requests]

    async def aclose(self, again: bool = False) -> None:
        """Closes the connections."""
        await self.transport.aclose()

    async def _ask(self, request: Request) -> Answer:
        body = self._prepared(request)
        optional = [name for place in self._places(body) for name in place if name not in ESSENTIAL]
        pictures = [picture.data for picture in request.pictures]
        data = await self.transport.post(self._path(), body, pictures, self._headers(body), optional)
        try:
            return _storable(self._answer(data))
        except (AttributeError, IndexError, KeyError, TypeError):
            error: Transient = self.transport.bad_answer(json.dumps(data)[:1000])
        raise error

    def _prepared(self, request: Request) -> dict[str, Any]:
        """The body as it is sent: with the token limit of the request, without the fields that are left out."""
        body = self._body(request)
        for place, name in _budgets(body):
            place[name] = request.max_tokens
        for name, instead in self._left_out.items():
            self._without(body, name, instead)
        return body

    def _without(self, body: dict[str, Any], field: str, instead: str | None) -> None:
        """Removes a field from a body, or gives it another name."""
        for place in self._places(body):
            if field in place:
                value = place.pop(field)
                if instead:
                    place[instead] = value

    def _sampling(self, request: Request) -> dict[str, Any]:
        """Temperature and seed: as set by the user, or by default where the model takes them."""
        set_ = self.sampling.temperature
        found: dict[str, Any] = {}
        if set_ is not None or self.takes_sampling:
            found["temperature"] = DEFAULT_TEMPERATURE if set_ is None else set_
        if self.takes_seed and self.takes_sampling:
            found["seed"] = request.seed & MAX_SEED
        return found

    def _places(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The dictionaries of a body that hold fields which a server may refuse."""
        return [body]

    def _headers(self, body: Mapping[str, Any]) -> dict[str, str]:
        """Headers of a request, besides those of every request."""
        return {}

    @abstractmethod
    def _path(self) -> str:
        """Path of a request after the base URL."""

    @abstractmethod
    def _body(self, request: Request) -> dict[str, Any]:
        """Content of a request, to be sent as JSON."""

    @abstractmethod
    def _answer(self, data: dict[str, Any]) -> Answer:
        """Reads an answer. A lookup error or type error means that it has another shape."""


def merged(body: dict[str, Any], options: Mapping[str, Any], nested: bool = False) -> dict[str, Any]:
    """Returns `body` with `options` merged over it; None removes a field.

    Args:
        nested: merge dictionaries one level deep instead of replacing them.
    """
    result = dict(body)
    for name, value in options.items():
        old = result.pop(name, None)
        if nested and isinstance(old, dict) and isinstance(value, Mapping):
            result[name] = merged(old, value)
        elif value is not None:
            result[name] = value
    return result


def object_schema(aspects: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of an object with one text per aspect."""
    properties = {aspect: {"type": "string"} for aspect in aspects}
    return {"type": "object", "properties": properties, "required": [*aspects], "additionalProperties": False}


def text_of(value: object) -> str:
    """Returns `value`, which must be a string."""
    if not isinstance(value, str):
        raise TypeError("not a string")
    return value


def count_of(*values: object) -> int | None:
    """The sum of the token counts that are there, or None where none is."""
    counts = [v for v in values if isinstance(v, int) and 0 <= v <= MAX_COUNT]
    return sum(counts) if counts else None


def thinking_of(counted: object, thought: bool, tokens_out: int | None, text: str) -> int:
    """The tokens that were spent on thinking.

    Args:
        counted: the count of the server, if it gives one.
        thought: whether the answer holds thinking beside its text.
        tokens_out: of thinking and text together.
        text: of the answer. Where nothing is counted, a token is assumed to have at least two characters of it, so that the
            rest must be thinking.
    """
    if (count := count_of(counted)) is not None:
        return count
    return max(0, (tokens_out or 0) - len(text) // 2) if thought else 0


def _storable(answer: Answer) -> Answer:
    """Returns `answer` with a short model name; raises `TypeError` for a finish reason that is not a string."""
    reason, model = answer.finish_reason, answer.model
    if reason is not None:
        text_of(reason)
    return replace(answer, model=printable_text(model)[:MAX_NAME] if isinstance(model, str) else None)


def _budgets(body: Mapping[str, Any]) -> list[tuple[Any, str]]:
    """Fields of a body that hold its token limit. Options may choose the name of the field, but not another number."""
    inner = body.get("generationConfig")
    places = [body, inner] if isinstance(inner, Mapping) else [body]
    return [(place, name) for place in places for name in BUDGETS if isinstance(place.get(name), (int, float))]


def _check_options(sampling: Sampling) -> None:
    options = sampling.options
    for place, name in _budgets(options):
        if place[name] != sampling.max_tokens:
            # The cost limit and the second try rely on --max_tokens.
            raise UserError(
                f"sampling options: expected {name} to be the {sampling.max_tokens} of --max_tokens, found {place[name]}. "
                f"Type --max_tokens {place[name]}."
            )
    if needed := sorted(set(sampling.omit) & {*ESSENTIAL, *BUDGETS}):
        raise UserError(f"--omit: expected fields that a request can do without, found {', '.join(needed)}.")
    if reserved := sorted(set(options) & set(RESERVED)):
        found = f"expected none of {', '.join(RESERVED)}, found {', '.join(reserved)}"
        raise UserError(f"sampling options: {found}. Leave it out.")
    try:
        json.dumps(dict(options), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"sampling options: expected what JSON can hold, found {error}.") from None
