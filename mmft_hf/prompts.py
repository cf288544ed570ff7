"""Words around a class name: clean-up, and the class template that stands before every caption."""

from __future__ import annotations

from .errors import UserError

DEFAULT_TEMPLATE = "a photo of a {}."

# Used by `--prototypes templates`: a few wordings whose embeddings are averaged. Ours, written for photos and drawings.
TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "a close-up photo of a {}.",
    "a drawing of a {}.",
    "an image showing a {}.",
    "a small picture of a {}.",
    "a clear picture of the {}.",
)


def clean_class_name(name: str) -> str:
    """Underscores and hyphens become spaces, runs of spaces one space: `saint_bernard` -> `saint bernard`."""
    return " ".join(name.replace("_", " ").replace("-", " ").split())


def check_template(template: str) -> str:
    """Returns the template, or raises `UserError` unless it holds `{}` exactly once."""
    if template.count("{}") != 1:
        raise UserError(
            f"class_template: expected a text with {{}} once, where the class name goes, found {template!r}. "
            f"Type for example --class_template {DEFAULT_TEMPLATE!r}."
        )
    return template


def class_prompt(template: str, class_name: str) -> str:
    """The template with the cleaned class name in place of `{}`; braces inside a class name stay text."""
    return template.replace("{}", clean_class_name(class_name), 1)


def training_text(template: str, class_name: str, caption: str | None) -> str:
    """`a photo of a {class}. {caption}`, or the class prompt alone where there is no caption."""
    prompt = class_prompt(template, class_name)
    return f"{prompt} {caption}" if caption else prompt
