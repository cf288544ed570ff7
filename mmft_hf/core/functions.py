"""Functions of the user that settings name: `package.module:function`."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from .errors import UserError


def named_function(name: str, setting: str) -> Callable:
    """The function `package.module:function`. Modules of the working folder are found, too.

    Args:
        setting: the name of the setting, for messages.

    Raises:
        UserError: another form, no such module or function.
    """
    module, _, function = name.partition(":")
    if not (module and function):
        raise UserError(f"{setting}: expected package.module:function, found {name!r}.")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise UserError(f"{setting} {name}: expected a module {module} that can be imported, but {error}.") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise UserError(f"{setting} {name}: expected a function {function} in {module}, found none.")
    return found


def source_digest(function: Callable) -> str | None:
    """sha256 of the file that a function is written in; None if there is no such file."""
    try:
        return hashlib.sha256(Path(inspect.getfile(function)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None
