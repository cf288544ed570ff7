"""HTML pages from jinja2 templates. Every value is escaped, so that nothing in data, models or answers becomes markup."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .console import percent, printable_text
from .markdown import one_line


def render_page(template: Path, **values: object) -> str:
    """Renders a template; `{% include %}` and `{% import %}` find their files in its folder.

    A value that is None prints nothing, and control characters are removed. Filters of ours: `one_line(limit=120)`,
    `thousands` (`1,234`), `percent` (a share as `31.5 %`) and `base64` (of bytes).

    Raises:
        jinja2.UndefinedError: the template uses a name that `values` lacks.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "one_line": one_line,
        "thousands": "{:,}".format,
        "percent": percent,
        "base64": lambda data: base64.b64encode(data).decode(),
    }
    return environment.get_template(template.name).render(values)


def _printable(value: object) -> object:
    if value is None:
        return ""
    if isinstance(value, str) and not isinstance(value, Markup):
        return "\n".join(map(printable_text, value.split("\n")))
    return value
