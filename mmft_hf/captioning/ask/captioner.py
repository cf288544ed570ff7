"""`Captioner`: which model is asked, with which prompts, and how."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...core.errors import UserError, nearest
from ...data.texts import DEFAULT_TEMPLATE, LONGEST_NAME, LONGEST_NAMES, PromptSet, check_template
from ..types import Backend, Sampling
from .pictures import PicturePolicy

# Backends that ask a model, each with a model for example.
EXAMPLES = {
    "transformers": "Qwen/Qwen3-VL-4B-Instruct",
    "openai": "gpt-6-luna",
    "gemini": "gemini-3.5-flash-lite",
    "anthropic": "claude-haiku-5-5",
}
BACKENDS = tuple(EXAMPLES)
WITHOUT_MODEL = ("columns", "template")
KEY_VERSION = 1
# Settings of a captioner, as its messages name them, whose names have the role before them if another role is meant.
_SETTING = re.compile(r"--(?:captioner_)?(model|base_url|api_key_env|max_tokens|request_options|omit)\b|--captioner\b")


@dataclass(frozen=True)
class Captioner:
    """Who writes captions, from which prompts, and how. It holds no key, no connection and no model.

    Args:
        backend: `transformers` (a model in this process), `openai` (any server that speaks its protocol), `gemini` or
            `anthropic`; `columns` (texts of the dataset) and `template` (class templates) need no model.
        model: its name at the server, Hub id or folder.
        prompts: one prompt per aspect.
        sampling: temperature, token limit and seed.
        revision: of a Hub model.
        base_url: of the server; default: the provider's own.
        api_key_env: NAME of the environment variable that holds the key.
        aspects_per_call: `one`, or `all` for one JSON answer with all aspects (and one call each if that fails).
        samples: captions per aspect.
        pictures: how pictures are reduced before they are sent.
        allow_http: allow a key to travel to another machine over plain http.
        tag: distinguishes servers that serve different weights under the same name.
        columns: text columns, for `columns`.
        templates: with `{}` for the class name, for `template`.
        batch_size: pictures at a time, for `transformers`.
        timeout_s: timeout of a call in seconds.

    Raises:
        UserError: an unknown backend, a missing model, or a value out of range.
    """

    backend: str = "transformers"
    model: str | None = None
    prompts: PromptSet = field(default_factory=PromptSet)
    sampling: Sampling = field(default_factory=Sampling)
    revision: str | None = None
    base_url: str | None = None
    api_key_env: str | None = None
    aspects_per_call: str = "one"
    samples: int = 1
    pictures: PicturePolicy = field(default_factory=PicturePolicy)
    allow_http: bool = False
    tag: str | None = None
    columns: tuple[str, ...] = ()
    templates: tuple[str, ...] = (DEFAULT_TEMPLATE,)
    batch_size: int = 8
    timeout_s: float = 120.0

    def __post_init__(self):
        known = (*BACKENDS, *WITHOUT_MODEL)
        if self.backend not in known:
            raise UserError(
                f"--captioner: expected one of {', '.join(known)}, found {self.backend!r}.{nearest(self.backend, known)}"
            )
        if self.asks and not self.model:
            raise UserError(
                f"--captioner {self.backend}: expected the name of a model. For example, type --captioner_model "
                f"{EXAMPLES[self.backend]}."
            )
        if self.aspects_per_call not in ("one", "all"):
            raise UserError(f"--aspects_per_call: expected one or all, found {self.aspects_per_call!r}.")
        for name, value in (("samples", self.samples), ("batch_size", self.batch_size), ("timeout_s", self.timeout_s)):
            if value <= 0:
                raise UserError(f"--{name}: expected more than 0, found {value}.")
        if self.backend == "columns" and not self.columns:
            raise UserError("--captioner columns: expected the names of columns of text. Type --text_columns NAME.")
        self._check_decoding()
        for template in self.templates:
            check_template(template)

    def _check_decoding(self) -> None:
        decoding = self.sampling.decoding
        if not decoding.spec():
            return
        if self.backend != "transformers":
            raise UserError(
                f"--decoding: expected --captioner transformers, found {self.backend}, which has neither beams nor guidance. For "
                "several texts of a server, type --samples 3 --temperature 1."
            )
        if decoding.beams is not None and self.samples != decoding.groups:
            raise UserError(
                f"--samples: expected one for each of the {decoding.groups} groups of beams, found {self.samples}. Type --samples "
                f"{decoding.groups}."
            )
        if decoding.beams is not None and self.sampling.temperature:
            raise UserError(
                f"--temperature: expected none with beams, which draw nothing, found {self.sampling.temperature:g}. Leave it out."
            )

    @property
    def asks(self) -> bool:
        """Whether a model is asked, so that answers cost something and are journaled."""
        return self.backend not in WITHOUT_MODEL

    @property
    def joint(self) -> bool:
        """Whether one call serves several aspects."""
        return self.aspects_per_call == "all" and len(self.prompts.aspects) > 1

    def open(self, concurrency: int = 1) -> Backend:
        """A new backend for at most this many calls at once.

        Raises:
            UserError: an address or variable name that cannot be right.
        """
        if self.backend == "transformers":
            from .backends.transformers import TransformersBackend

            return TransformersBackend(self.model, self.revision, self.sampling, self.batch_size)
        if self.backend == "openai":
            from .backends.openai import OpenAIBackend as Served
        elif self.backend == "gemini":
            from .backends.gemini import GeminiBackend as Served
        else:
            from .backends.anthropic import AnthropicBackend as Served
        connection = {"concurrency": concurrency, "timeout_s": self.timeout_s, "allow_http": self.allow_http}
        return Served(self.model, self.base_url, api_key_env=self.api_key_env, sampling=self.sampling, **connection)

    def asked_as(self, identity: Mapping[str, Any]) -> dict:
        """What determines its answers to a given question: for folders that hold such answers."""
        return {"identity": {**identity}, "pictures": self.pictures.spec(), "sampling": self.sampling.spec()}

    def for_several(self) -> Captioner:
        """The captioner for pictures with several labels: its prompts have room for the names of all of them."""
        return replace(self, prompts=replace(self.prompts, longest_name=LONGEST_NAMES))

    def _prompts_spec(self) -> dict:
        found = asdict(self.prompts) | {"own_prompts": dict(self.prompts.own_prompts)}
        if self.prompts.longest_name == LONGEST_NAME:  # folders tell of it only where it is another one
            del found["longest_name"]
        return found

    def spec(self, identity: Mapping[str, Any] | None = None) -> dict:
        """Everything that determines a caption. Address, key, concurrency and batch size do not.

        Args:
            identity: of the backend, if a model is asked.
        """
        if self.backend == "columns":
            return {"version": KEY_VERSION, "backend": "columns", "columns": list(self.columns)}
        if self.backend == "template":
            return {"version": KEY_VERSION, "backend": "template", "templates": list(self.templates)}
        return {
            "version": KEY_VERSION,
            "identity": {**(identity or {}), "tag": self.tag},
            "pictures": self.pictures.spec(),
            "sampling": self.sampling.spec(),
            "prompts": self._prompts_spec(),
            "aspects_per_call": self.aspects_per_call,
            "samples": self.samples,
        }


@contextmanager
def named_as(role: str) -> Iterator[None]:
    """Within it, messages about settings of the captioner name those of another role: `--judge_model`."""
    try:
        yield
    except UserError as error:
        raise UserError(in_words_of(role, error.args[0])) from error


def in_words_of(role: str, message: str) -> str:
    """A message about a captioner as one about another role."""
    if role == "captioner":
        return message
    message = _SETTING.sub(lambda found: f"--{role}_{found[1]}" if found[1] else f"--{role}", message)
    return re.sub(r"^captioner (?=')", f"{role} ", message)
