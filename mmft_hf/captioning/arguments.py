"""The settings of `mmft-hf caption`, and the `Captioner` that they describe."""

from __future__ import annotations

import json
from dataclasses import dataclass, make_dataclass
from typing import ClassVar

from ..core.arguments import Range, check_settings, setting
from ..core.errors import UserError
from ..data.texts import DEFAULT_TEMPLATE, PROMPT, PromptSet
from .ask.captioner import BACKENDS, WITHOUT_MODEL, Captioner, named_as
from .ask.pictures import PicturePolicy
from .types import Decoding, Sampling

ROLE_SETTINGS = ("model", "base_url", "api_key_env", "tag", "temperature", "max_tokens", "request_options")
ABOVE_0 = Range(open=("low",))
COUNTER = "builtin/tiny-clip"  # whose tokenizer counts tokens if no model is named


def role_settings(role: str, what: str) -> type:
    """A dataclass of the settings of a role that steps ask beside the captioner: `--judge`, `--judge_model`, …"""
    rows = [
        (
            "",
            str | None,
            None,
            f"Who {what}: transformers, openai, gemini or anthropic, as --captioner.",
            {"choices": BACKENDS},
        ),
        ("_model", str | None, None, f"Model of the {role}: its name at the server, Hub id or folder.", {}),
        ("_base_url", str | None, None, f"Server address of the {role}. Default: the provider's.", {}),
        ("_api_key_env", str | None, None, "NAME of the environment variable with its key.", {}),
        ("_tag", str | None, None, "Distinguishes servers with different weights under the same name.", {}),
        (
            "_temperature",
            float | None,
            None,
            f"Sampling temperature of the {role}, as --temperature.",
            {"range": Range()},
        ),
        ("_max_tokens", int, 1000, "Maximum length of an answer in its tokens.", {"range": Range(1)}),
        ("_request_options", str | None, None, "Further request fields, as --request_options.", {}),
    ]
    found = [(role + name, kind, setting(default, text, **more)) for name, kind, default, text, more in rows]
    return make_dataclass(f"{role.title()}Arguments", found)


@dataclass
class CaptionArguments(
    role_settings("writer", "writes new texts from texts, for steps that need it"),
    role_settings("judge", "answers questions about captions with their pictures, for steps that need it"),
):
    """Who writes the captions, from which prompts, how fast, at what cost, and where they go."""

    GROUPS: ClassVar = {
        "captioner": "captioner captioner_model captioner_revision captioner_tag base_url api_key_env allow_http "
        "text_columns class_template",
        "prompts": "aspects domain words prompt_template own_prompts keep_class_names aspects_per_call samples",
        "requests": "temperature decoding max_tokens request_options omit max_side captioner_batch_size concurrency requests_per_minute "
        "tokens_per_minute timeout max_cost_usd prices",
        "checks": "model_name_or_path on_check max_reasks",
        "refining": "steps scorer scorer_is_student report_scorer group_column class_names_file allow_empty_classes compare metrics",
        **{role: " ".join([role, *(f"{role}_{name}" for name in ROLE_SETTINGS)]) for role in ("judge", "writer")},
        "output": "output_dir overwrite_output_dir dry_run split classes representatives key_rule *",
    }

    output_dir: str = setting(
        "outputs/captioned", "Folder of the captioned dataset and its journal. A run continues it."
    )
    captioner: str = setting(
        "columns",
        "transformers: a model in this process; openai: any server that speaks its protocol (vLLM, transformers serve, a "
        "router, OpenAI); gemini; anthropic; columns: texts that the dataset already has (--text_columns); template: class "
        "templates.",
        choices=(*BACKENDS, *WITHOUT_MODEL),
    )
    captioner_model: str | None = setting(None, "Captioning model: its name at the server, Hub id or folder.")
    captioner_revision: str | None = setting(None, "Revision of a Hub model.")
    captioner_tag: str | None = setting(None, "Distinguishes servers with different weights under the same name.")
    base_url: str | None = setting(None, "Server address, e.g. http://localhost:8000/v1. Default: the provider's.")
    api_key_env: str | None = setting(None, "NAME of the environment variable with the key, never the key itself.")
    allow_http: bool = setting(False, "Send the key to another machine even over plain http.")
    text_columns: list[str] | None = setting(None, "Text columns. Default: the only column with lists of texts.")
    class_template: str = setting(
        DEFAULT_TEMPLATE, "Template of --captioner template, also put before a caption when its tokens are counted."
    )
    aspects: list[str] = setting(
        ["visual", "shape", "texture"],
        "What to describe, one caption each: visual shape texture context spatial petals color symbols, or your own.",
    )
    domain: str = setting("general objects", "What the pictures show, e.g. pets, or the name of a benchmark.")
    words: int = setting(50, "Number of words that a caption should have.")
    prompt_template: str = setting(PROMPT, "Prompt with {class_name}, {domain}, {aspect} and {words} to be filled in.")
    own_prompts: str | None = setting(None, "Prompts for single aspects: a mapping in YAML, JSON on the command line.")
    keep_class_names: bool = setting(False, "Use class names as they are, neither cleaned nor in lower case.")
    aspects_per_call: str = setting(
        "one",
        "all: one call for all aspects, answered as JSON, which is cheaper if each call is billed for its picture; one: a "
        "call for each aspect.",
        choices=("one", "all"),
    )
    samples: int = setting(1, "Number of captions per aspect.", range=Range(1))
    temperature: float | None = setting(
        None,
        "Sampling temperature; 0 always takes the most likely token. Default: 0.2 for models that are known to take one; "
        "others are sent none and use their own.",
        range=Range(),
    )
    decoding: str | None = setting(
        None,
        'With --captioner transformers, as JSON: diverse beams, which write the --samples of a prompt together (\'{"beams": 6, '
        '"groups": 3, "diversity": 0.5}\'), or guidance against the model without the picture (\'{"guidance": 2}\').',
    )
    max_tokens: int = setting(
        200, "Maximum length of a caption in the captioner's tokens; thinking takes thousands.", range=Range(1)
    )
    request_options: str | None = setting(None, "Further request fields, as JSON or YAML; null removes a field.")
    omit: list[str] | None = setting(
        None, "Request fields that are never sent, because the server refuses them, e.g. temperature seed."
    )
    max_side: int = setting(512, "Longer side in pixels of the pictures that are sent.", range=Range(16))
    captioner_batch_size: int = setting(8, "Batch size in pictures of --captioner transformers.", range=Range(1))
    concurrency: int = setting(16, "Maximum number of calls in flight, to each model.", range=Range(1))
    requests_per_minute: float | None = setting(None, "Maximum number of calls per minute.", range=ABOVE_0)
    tokens_per_minute: float | None = setting(
        None, "Maximum number of tokens per minute, in prompts and answers.", range=ABOVE_0
    )
    timeout: float = setting(120.0, "Timeout of a call in seconds.", range=ABOVE_0)
    max_reasks: int = setting(1, "How often a caption is asked for again after a check turned it down.", range=Range())
    on_check: list[str] | None = setting(
        None,
        "What to do when a check fires: CHECK=keep, reask or reject, and for some checks trim or prefix, e.g. "
        "label_missing=reask.",
    )
    max_cost_usd: float | None = setting(
        None, "Maximum cost of all runs in this folder together, in US dollars.", range=Range()
    )
    prices: str | None = setting(None, "YAML file of prices per million tokens, which override the built-in table.")
    dry_run: bool = setting(False, "Show the plan, some prompts, calls and cost; send nothing and write nothing.")
    split: list[str] | None = setting(None, "Splits to caption. Default: the training split.")
    classes: list[str] | None = setting(None, "Caption only these classes.")
    representatives: float | None = setting(
        None,
        "Caption only this share of the images of each class (with several labels per picture, of all images): those that stand for the "
        "others, by the embeddings of --scorer.",
        range=Range(0, 1, open=("low",)),
    )
    key_rule: str | None = setting(
        None, "What the keys of imported JSON files are: file_name, class/file_name, class_file_name or index."
    )
    model_name_or_path: str | None = setting(
        None,
        "Model to be trained, whose tokenizer counts the tokens and whose limit captions should keep. Default: "
        "builtin/tiny-clip counts; the scorer of `refine` is compared with builtin/photo, which finetune trains by default.",
    )
    steps: list[str] | None = setting(
        None,
        "What `refine` does, in order: names of steps (clip_score, verify, select …) or presets (short, translate …), or a YAML file of "
        "steps with their options (recipes/captions/steps).",
    )
    scorer: str | None = setting(
        None,
        "Model that scores captions, and chooses --representatives: Hub id or folder of a dual encoder, or builtin/….",
    )
    scorer_is_student: bool = setting(
        False, "Let the model that will be trained score its own captions, although it may flatter them."
    )
    report_scorer: str | None = setting(
        None,
        "Another model, which chooses nothing, for the figures before and after: what one model selects, another should judge.",
    )
    group_column: str | None = setting(
        None,
        "Column that is equal for images of the same thing, which self_retrieval does not compare. Default: images with the same "
        "captions.",
    )
    class_names_file: str | None = setting(
        None,
        "YAML file with the name of each class in the language that a step writes in (dog: собака), so that label_missing and other_class "
        "are checked there, too.",
    )
    allow_empty_classes: bool = setting(False, "Let steps take the last caption of a class.")
    compare: str | None = setting(None, "Another captioned dataset of the same images, for `report`: before.")
    metrics: list[str] | None = setting(
        None,
        "Further figures for `report`: vendi, sce, conditional_retrieval, SCORE@max_K, reconstruction=package.module:function. All but "
        "SCORE@max_K need --scorer.",
    )
    overwrite_output_dir: bool = setting(False, "Replace another dataset in output_dir. A journal there is kept.")

    def to_roles(self) -> dict[str, Captioner]:
        """Who answers the questions of steps, by role, as far as the settings name them.

        Raises:
            UserError: a setting out of its range or not in its form.
        """
        roles = {"captioner": self.to_captioner()} if self.captioner in BACKENDS else {}
        for role in ("judge", "writer"):
            own = {name: getattr(self, f"{role}_{name}") for name in ROLE_SETTINGS}
            if getattr(self, role) is None:
                continue
            check_settings(self)
            options = _mapping(f"{role}_request_options", own["request_options"])
            with named_as(role):
                roles[role] = Captioner(
                    backend=getattr(self, role),
                    model=own["model"],
                    sampling=Sampling(own["temperature"], own["max_tokens"], 0, options),
                    base_url=own["base_url"],
                    api_key_env=own["api_key_env"],
                    pictures=PicturePolicy(self.max_side),
                    allow_http=self.allow_http,
                    tag=own["tag"],
                    batch_size=self.captioner_batch_size,
                    timeout_s=self.timeout,
                )
        return roles

    def to_prompts(self) -> PromptSet:
        """The prompts of these settings. Raises `UserError` for one that cannot be used."""
        own = _mapping("own_prompts", self.own_prompts)
        return PromptSet(
            tuple(self.aspects), self.domain, self.words, self.prompt_template, own, not self.keep_class_names
        )

    def to_captioner(self, text_columns: list[str] | None = None) -> Captioner:
        """The captioner of these settings.

        Args:
            text_columns: for `columns`, if the settings name none.

        Raises:
            UserError: a setting out of its range or not in its form.
        """
        options = _mapping("request_options", self.request_options)
        decoding = Decoding.of(_mapping("decoding", self.decoding))
        prompts = self.to_prompts()
        check_settings(self)
        return Captioner(
            backend=self.captioner,
            model=self.captioner_model,
            prompts=prompts,
            sampling=Sampling(self.temperature, self.max_tokens, 0, options, tuple(self.omit or ()), decoding),
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
    except (ValueError, RecursionError) as error:
        example = '\'{"key": "value"}\''
        raise UserError(f"--{name}: expected JSON, such as {example}, found {text[:80]!r} ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"--{name}: expected names with values, found {text[:80]!r}.")
    return value
