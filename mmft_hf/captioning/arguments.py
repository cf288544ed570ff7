"""The settings of `mmft-hf caption`, and the `Captioner` that they describe."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar

from ..core.errors import UserError
from ..data.texts import DEFAULT_TEMPLATE, PROMPT, PromptSet
from .ask.captioner import Captioner
from .ask.pictures import PicturePolicy
from .types import Sampling


@dataclass
class CaptionArguments:
    """Who writes the captions, from which prompts, how fast, for how much, and where they go."""

    GROUPS: ClassVar = {
        "captioner": "captioner captioner_model captioner_revision captioner_tag base_url api_key_env allow_http "
        "text_columns class_template",
        "prompts": "aspects domain words prompt_template own_prompts keep_class_names aspects_per_call samples",
        "requests": "temperature max_tokens request_options max_side captioner_batch_size concurrency requests_per_minute "
        "tokens_per_minute timeout max_cost_usd prices",
        "checks": "model_name_or_path on_check max_reasks",
        "output": "output_dir overwrite_output_dir dry_run split classes key_rule *",
    }

    output_dir: str = field(
        default="outputs/captioned",
        metadata={"help": "Folder of the captioned data set and its journal. The same command continues."},
    )
    captioner: str = field(
        default="columns",
        metadata={
            "help": "transformers: a model in this process; openai: any server that speaks its protocol (vLLM, transformers "
            "serve, a router, OpenAI); gemini; anthropic; columns: texts that the data set already has (--text_columns); "
            "template: class templates.",
            "choices": ("transformers", "openai", "gemini", "anthropic", "columns", "template"),
        },
    )
    captioner_model: str | None = field(
        default=None, metadata={"help": "Model of the captioner: its name at the server, Hub id or folder."}
    )
    captioner_revision: str | None = field(default=None, metadata={"help": "Revision of a Hub model."})
    captioner_tag: str | None = field(
        default=None, metadata={"help": "Tells servers apart that serve different weights under one name."}
    )
    base_url: str | None = field(
        default=None,
        metadata={"help": "Address of the server, e.g. http://localhost:8000/v1. Default: the provider's."},
    )
    api_key_env: str | None = field(
        default=None, metadata={"help": "NAME of the environment variable that holds the key, never the key itself."}
    )
    allow_http: bool = field(
        default=False, metadata={"help": "Send the key over plain http to another machine all the same."}
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns that hold the texts. Default: the only column of lists of texts."}
    )
    class_template: str = field(
        default=DEFAULT_TEMPLATE,
        metadata={"help": "Template of --captioner template, and before every caption when tokens are counted."},
    )
    aspects: list[str] = field(
        default_factory=lambda: ["visual", "shape", "texture"],
        metadata={
            "help": "What to describe, a caption each: visual shape texture context spatial petals color symbols, or others."
        },
    )
    domain: str = field(
        default="general objects",
        metadata={
            "help": "What the pictures are of, e.g. pets, satellite; the name of a benchmark stands for its word."
        },
    )
    words: int = field(default=50, metadata={"help": "Words that a caption should have."})
    prompt_template: str = field(
        default=PROMPT, metadata={"help": "The prompt; {class_name}, {domain}, {aspect} and {words} are filled in."}
    )
    own_prompts: str | None = field(
        default=None, metadata={"help": "Prompts of single aspects: in YAML a mapping, else JSON."}
    )
    keep_class_names: bool = field(
        default=False, metadata={"help": "Class names as they are: not cleaned, not in lower case."}
    )
    aspects_per_call: str = field(
        default="one",
        metadata={
            "help": "all: one call for all aspects, answered as JSON, which is cheaper where each call is billed for its "
            "picture; one: a call for each.",
            "choices": ("one", "all"),
        },
    )
    samples: int = field(default=1, metadata={"help": "Captions per aspect."})
    temperature: float = field(default=0.2, metadata={"help": "Of the sampling; 0: the likeliest text."})
    max_tokens: int = field(
        default=200, metadata={"help": "Budget of a caption in the captioner's tokens. Thinking models need thousands."}
    )
    request_options: str | None = field(
        default=None,
        metadata={"help": "More fields of a request, as JSON (in YAML a mapping); null takes a field away."},
    )
    max_side: int = field(default=512, metadata={"help": "Longer side in pixels of the pictures that are sent."})
    captioner_batch_size: int = field(default=8, metadata={"help": "Pictures at a time, for --captioner transformers."})
    concurrency: int = field(default=16, metadata={"help": "Calls in flight at most."})
    requests_per_minute: float | None = field(default=None, metadata={"help": "Calls per minute at most."})
    tokens_per_minute: float | None = field(
        default=None, metadata={"help": "Tokens per minute at most, of prompts and answers together."}
    )
    timeout: float = field(default=120.0, metadata={"help": "Seconds that a call may take."})
    max_reasks: int = field(default=1, metadata={"help": "Further tries of a caption that a check turned down."})
    on_check: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to do where a check fires: CHECK=keep, reask or reject, and trim or prefix for some, e.g. "
            "label_missing=reask."
        },
    )
    max_cost_usd: float | None = field(
        default=None, metadata={"help": "Dollars that all runs in this folder may cost together."}
    )
    prices: str | None = field(
        default=None, metadata={"help": "YAML file of prices per million tokens, which win over the built-in table."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Show the plan, some prompts, calls and cost; ask nobody, write nothing."}
    )
    split: list[str] | None = field(default=None, metadata={"help": "Splits to caption. Default: the training split."})
    classes: list[str] | None = field(default=None, metadata={"help": "Caption these classes alone."})
    key_rule: str | None = field(
        default=None,
        metadata={
            "help": "How the keys of imported JSON files name images: file_name, class/file_name, class_file_name, index."
        },
    )
    model_name_or_path: str = field(
        default="builtin/tiny-clip",
        metadata={"help": "Model that will be trained: its tokenizer counts tokens, its limit is checked."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace another data set in output_dir. A journal there stays."}
    )

    def to_captioner(self, text_columns: list[str] | None = None) -> Captioner:
        """The captioner of these settings.

        Args:
            text_columns: for `columns`, where the settings name none.

        Raises:
            UserError: a setting that is not what it should be.
        """
        own = _mapping("own_prompts", self.own_prompts)
        prompts = PromptSet(
            tuple(self.aspects), self.domain, self.words, self.prompt_template, own, not self.keep_class_names
        )
        options = _mapping("request_options", self.request_options)
        if self.max_side < 16:
            raise UserError(f"--max_side: expected 16 pixels or more, found {self.max_side}.")
        for name in ("concurrency", "max_tokens", "requests_per_minute", "tokens_per_minute", "captioner_batch_size"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name}: expected more than 0, found {value:g}.")
        for name in ("temperature", "max_reasks", "max_cost_usd"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"--{name}: expected 0 or more, found {value:g}.")
        return Captioner(
            backend=self.captioner,
            model=self.captioner_model,
            prompts=prompts,
            sampling=Sampling(self.temperature, self.max_tokens, 0, options),
            revision=self.captioner_revision,
            base_url=self.base_url,
            api_key_env=self.api_key_env,
            aspects_per_call=self.aspects_per_call,
            samples=self.samples,
            pictures=PicturePolicy(self.max_side),
            allow_http=self.allow_http,
            tag=self.captioner_tag,
            columns=tuple(self.text_columns or text_columns or ()),
            templates=(self.class_template,),
            batch_size=self.captioner_batch_size,
            timeout_s=self.timeout,
        )


def _mapping(name: str, text: str | None) -> dict:
    try:
        value = json.loads(text) if text else {}
    except ValueError as error:
        raise UserError(
            f'--{name}: expected JSON, such as \'{{"key": "value"}}\', found {text!r} ({error}).'
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"--{name}: expected names with values, found {text!r}.")
    return value
