"""Texts about a class: clean class names, the class template, and the prompts for a captioner."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..core.builtin import ASSETS
from ..core.errors import UserError, nearest

DEFAULT_TEMPLATE = "a photo of a {}."

# CLIP's 80 ImageNet templates (OpenAI, MIT licence). `--prototypes templates` and `zs-ens` average their embeddings.
TEMPLATES = tuple((ASSETS / "clip_templates" / "templates.txt").read_text(encoding="utf-8").splitlines())


def clean_class_name(name: str) -> str:
    """Underscores and hyphens become spaces, runs of spaces one space: `saint_bernard` -> `saint bernard`."""
    return " ".join(name.replace("_", " ").replace("-", " ").split())


NO_CLASS = "something else"  # stands for the class name of a picture with none of several labels


def joined_class_names(class_names: Sequence[str], label: int | Sequence[int]) -> str:
    """The name of a class, or the names of several, as a text has them: `red, round`."""
    if isinstance(label, (list, tuple)):
        return ", ".join(class_names[c] for c in label) or NO_CLASS
    return class_names[label]


def check_template(template: str) -> str:
    """Returns the template. Raises `UserError` unless it contains `{}` exactly once."""
    if template.count("{}") != 1:
        raise UserError(
            f"class_template: expected a text with {{}} once, where the class name goes, found {template!r}. "
            f"For example, type --class_template {DEFAULT_TEMPLATE!r}."
        )
    return template


def class_prompt(template: str, class_name: str) -> str:
    """The template with the cleaned class name in place of `{}`; braces inside a class name stay text."""
    return template.replace("{}", clean_class_name(class_name), 1)


def training_text(template: str, class_name: str, caption: str | None) -> str:
    """`a photo of a {class}. {caption}`, or the class prompt alone if there is no caption."""
    prompt = class_prompt(template, class_name)
    return f"{prompt} {caption}" if caption else prompt


LONG = 4096  # characters of a text whose beginning is tokenized first


def beginning(text: str, limit: int, count: Callable[[str], int]) -> str:
    """The beginning of a long text if it has all that a text tower reads, otherwise the whole text.

    The end of a word decides on the tokens of that word alone, so the first `limit` tokens of the text are those of a
    beginning with many more tokens than that. Tokenizing tens of thousands of characters takes long.

    Args:
        limit: tokens that the tower reads.
        count: counts the tokens of a text.
    """
    if len(text) <= LONG or count(text[:LONG]) <= 2 * limit + 64:  # a text of blanks has few
        return text
    return text[:LONG]


# -- prompts for a captioner --------------------------------------------------------------------------------------------
# The prompt of the method (Enomoto & Yamaguchi 2026, arXiv 2601.21426), with its eight aspects and the domain words for its
# benchmark datasets. "aircrafts" and "satellite" read oddly, but are the words that the authors used.
PROMPT = (
    "To differentiate this {class_name} photo from other {domain} photos, describe its primary {aspect} characteristics "
    "based on the photo in {words} words."
)
ASPECTS = ("visual", "shape", "texture", "context", "spatial", "petals", "color", "symbols")
DOMAINS = {
    "pets": "pets",
    "flowers": "flowers",
    "dtd": "textures",
    "gtsrb": "traffic signs",
    "cars": "cars",
    "aircraft": "aircrafts",
    "eurosat": "satellite",
    "food101": "food",
    "cub": "birds",
    "imagenet": "general objects",
    "caltech101": "general objects",
    "cifar10": "general objects",
    "cifar100": "general objects",
}
PLACEHOLDERS = ("class_name", "domain", "aspect", "words")
LONGEST_NAME, LONGEST_NAMES = 80, 1000  # characters of the name of a class, and of those of all labels of a picture


def printable(name: str, most: int = LONGEST_NAME) -> str:
    """A class name as at most `most` visible characters on one line, without control or bidirectional characters."""
    name = unicodedata.normalize("NFKC", name)
    kept = "".join(
        " " if c.isspace() else c for c in name if c.isspace() or not unicodedata.category(c).startswith("C")
    )
    return " ".join(kept.split())[:most]


def encodable(text: str) -> bool:
    """Whether UTF-8 can hold the text: JSON can spell half of a surrogate pair, UTF-8 cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a captioning run, one per aspect.

    Args:
        aspects: names from `ASPECTS`, or other names that `own_prompts` or `template` covers.
        domain: what the pictures show, e.g. `pets`. A name from `DOMAINS` stands for its word.
        words: requested length in words.
        template: text with the placeholders `{class_name}`, `{domain}`, `{aspect}`, `{words}`, each optional.
        own_prompts: templates for single aspects.
        clean_names: whether class names are cleaned (`saint_bernard` -> `saint bernard`) and put in lower case.
        longest_name: characters of a class name; what is longer is cut.

    Raises:
        UserError: no aspect, a repeated aspect, an unknown placeholder, a prompt that is no text, fewer than one word.
    """

    aspects: tuple[str, ...] = ("visual", "shape", "texture")
    domain: str = "general objects"
    words: int = 50
    template: str = PROMPT
    own_prompts: Mapping[str, str] = field(default_factory=dict)
    clean_names: bool = True
    longest_name: int = LONGEST_NAME

    def __post_init__(self):
        if not self.aspects or len(set(self.aspects)) != len(self.aspects):
            found = ", ".join(self.aspects) or "none"
            raise UserError(
                f"aspects: expected one or more different ones, found {found}. Known: {', '.join(ASPECTS)}."
            )
        if self.words < 1:
            raise UserError(f"words: expected 1 or more, found {self.words}.")
        for aspect, template in self.own_prompts.items():
            if not isinstance(template, str):
                raise UserError(f"own_prompts: expected a text for {aspect!r}, found {template!r}.")
        for text in (*self.aspects, self.domain, self.template, *self.own_prompts.values()):
            if not encodable(text):
                raise UserError(f"prompt: expected text in UTF-8, found {text!r}.")
        for template in (self.template, *self.own_prompts.values()):
            for name in re.findall(r"\{(\w*)\}", template):
                if name not in PLACEHOLDERS:
                    known = ", ".join(f"{{{p}}}" for p in PLACEHOLDERS)
                    raise UserError(f"prompt: expected {known}, found {{{name}}}.{nearest(name, PLACEHOLDERS)}")
        for aspect in self.own_prompts:
            if aspect not in self.aspects:
                raise UserError(
                    f"own_prompts: expected prompts of the aspects {', '.join(self.aspects)}, found one of {aspect!r}."
                    f"{nearest(aspect, self.aspects)} Add {aspect!r} to the aspects, or leave its prompt out."
                )
        same = [aspect for aspect in self.aspects if aspect not in self.own_prompts]
        if len(same) > 1 and "{aspect}" not in self.template:
            raise UserError(
                f"prompt: expected {{aspect}} in it, as it is asked once for each of {', '.join(same)}, found none. Ask for "
                "one aspect (and several --samples of it), or write {aspect} where its name goes."
            )

    def prompt(self, aspect: str, class_name: str) -> str:
        """The prompt for one picture. Substitution is one pass, so braces inside a class name stay text."""
        name = printable(clean_class_name(class_name).lower() if self.clean_names else class_name, self.longest_name)
        values = {
            "class_name": name,
            "domain": DOMAINS.get(self.domain, self.domain),
            "aspect": aspect,
            "words": str(self.words),
        }
        template = self.own_prompts.get(aspect, self.template)
        return re.sub(r"\{(\w*)\}", lambda match: values[match[1]], template)

    def joint_prompt(self, class_name: str) -> str:
        """One prompt that asks for all aspects at once, as a JSON object with their names as keys."""
        tasks = "\n".join(f"{json.dumps(a)}: {self.prompt(a, class_name)}" for a in self.aspects)
        return (
            "Do each of these tasks for the picture. Answer with one JSON object and nothing else; its keys are "
            f"{', '.join(json.dumps(a) for a in self.aspects)}, and each value is the text that answers that task.\n{tasks}"
        )

    def prompt_id(self, aspect: str) -> str:
        """8 hex digits that identify the wording of a prompt, independently of the class name."""
        return hashlib.sha256(self.prompt(aspect, "\0").encode()).hexdigest()[:8]
