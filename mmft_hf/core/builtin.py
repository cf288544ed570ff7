"""The model and the data set that come with the package."""

from __future__ import annotations

from pathlib import Path

from .errors import UserError

ASSETS = Path(__file__).parents[1] / "assets"


def builtin(name: str) -> str:
    """The folder of `builtin/...` inside this package; any other name as it is.

    Raises:
        UserError: there is no such embedded model or data set.
    """
    if not name.startswith("builtin/"):
        return name
    folder = ASSETS / name.removeprefix("builtin/").replace("-", "_")
    if not folder.is_dir():
        known = ", ".join(f"builtin/{p.name.replace('_', '-')}" for p in sorted(ASSETS.iterdir()) if p.is_dir())
        raise UserError(f"{name}: expected one of {known}.")
    return str(folder)
