"""HTML pages and Markdown cards from jinja2 templates.

Every value is escaped, so that nothing in data, models or answers becomes markup.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .console import many, percent, printable_text
from .markdown import code, fenced, md, one_line


def render_page(template: Path, filters: Mapping[str, Callable] | None = None, **values: object) -> str:
    """Renders an HTML template; `{% include %}` and `{% import %}` find their files in its folder, and the
    styles that pages share in `page.css`.

    A value that is None prints nothing, and control characters are removed. Filters of ours: `one_line(limit=120)`,
    `thousands` (`1,234`), `many(noun)` (`1 caption`), `percent` (a share as `31.5 %`) and `base64` (of bytes), and those that the caller adds.

    Raises:
        jinja2.UndefinedError: the template uses a name that `values` lacks.
    """
    more = {"base64": lambda data: base64.b64encode(data).decode(), **(filters or {})}
    return _render(template, _printable, more, values)


def render_card(template: Path, **values: object) -> str:
    """Renders a Markdown template. Values become text on one line (`markdown.md`) unless they are `Markup`.

    A value that is None prints nothing. Filters of ours: `one_line`, `thousands`, `many` and `percent` as in `render_page`, and
    `md(limit=120)`, `code` and `fenced` of `core.markdown`.

    Raises:
        jinja2.UndefinedError: the template uses a name that `values` lacks.
    """
    filters = {
        "md": lambda text, limit=120: Markup(md(text, limit)),
        "code": lambda text: Markup(code(text)),
        "fenced": lambda text, language="text": Markup(fenced(text, language)),
    }
    return _render(template, _markdown, filters, values)


def _render(template: Path, finalize: Callable, filters: dict, values: dict) -> str:
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "one_line": one_line,
        "thousands": "{:,}".format,
        "many": many,
        "percent": percent,
        **filters,
    }
    return environment.get_template(template.name).render(values)


def _printable(value: object) -> object:
    if value is None:
        return ""
    if isinstance(value, str) and not isinstance(value, Markup):
        return "\n".join(map(printable_text, value.split("\n")))
    return value


def _markdown(value: object) -> Markup:
    if isinstance(value, Markup):
        return value
    return Markup("" if value is None else md(value))
