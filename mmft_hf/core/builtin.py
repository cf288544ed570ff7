"""The model and the dataset that come with the package."""

from __future__ import annotations

from pathlib import Path

from .errors import UserError

ASSETS = Path(__file__).parents[1] / "assets"


def builtin(name: str) -> str:
    """Resolves `builtin/...` to a folder of this package. Any other name is returned as it is.

    Raises:
        UserError: there is no such embedded model or dataset.
    """
    if not name.startswith("builtin/"):
        return name
    folder = ASSETS / name.removeprefix("builtin/").replace("-", "_")
    if not folder.is_dir():
        known = ", ".join(f"builtin/{p.name.replace('_', '-')}" for p in sorted(ASSETS.iterdir()) if p.is_dir())
        raise UserError(f"{name}: expected one of {known}.")
    return str(folder)
