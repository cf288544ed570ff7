"""Paths of pictures in a table: they may name pictures beside the table, or below `--image_root`, and nothing else."""

from __future__ import annotations

import functools
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..core.errors import UserError

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def resolve_paths(
    paths: Sequence[str | None], folders: Sequence[Path], image_root: str | None, where: str
) -> list[str | None]:
    """Absolute paths of the pictures that a table names.

    A data set that somebody else wrote could otherwise have any picture of this machine read, sent to a captioner or
    published. Links are followed: they are part of the folder that the user typed.

    Args:
        paths: as the table has them: relative, absolute, `file://` addresses, with slashes or backslashes. None or empty
            for a row without a picture.
        folders: folders that the paths may be relative to; the first that holds the first picture counts.
        image_root (*optional*): typed by the user, used instead of `folders`.
        where: the file and column, for messages.

    Raises:
        UserError: a picture elsewhere; a network address, which is never fetched.
    """
    first = next((path for path in paths if path), None)
    if first is None:
        return [None] * len(paths)
    bases = [os.path.abspath(folder) for folder in ([image_root] if image_root else folders)]
    base = next((b for b in bases if os.path.exists(os.path.join(b, _local(first, b)))), bases[0])
    found, outside = [], []
    for row, path in enumerate(paths):
        if not path:
            found.append(None)
            continue
        if _ADDRESS.match(path) and not path.startswith("file://"):
            raise UserError(
                f"{where}, row {row}: expected a picture's path, found the address {path[:80]}. Nothing is fetched: download the "
                "pictures, and write their paths."
            )
        local = _local(path, base)
        if "\0" in local or (os.name != "nt" and _DRIVE.match(local)):
            raise UserError(
                f"{where}, row {row}: expected a picture's path on this machine, found {path[:80]!r}. Write paths relative to the "
                "table, or to the folder that --image_root names."
            )
        # Without `..`, which behind a link leads elsewhere.
        full = os.path.normpath(os.path.join(base, local))
        if not is_inside(full, base):
            outside.append((row, path, full))
        found.append(full)
    if outside:
        row, path, _ = outside[0]
        common = os.path.commonpath([os.path.dirname(full) for _, _, full in outside])
        raise UserError(
            f"{where}, row {row}: expected pictures in {base}, found {path} elsewhere ({len(outside):,} such rows). A table may name "
            f"pictures beside it alone. If you want these to be read, type --image_root {shlex.quote(common)}"
            + ("." if os.path.isabs(path) else " and write paths that are relative to it.")
        )
    return found


def _local(path: str, base: str) -> str:
    """A path without `file://`, and with slashes if backslashes separate folders."""
    if path.startswith("file://"):
        path = unquote(urlsplit(path).path)
    if os.sep == "/" and "\\" in path and "\0" not in path and not os.path.lexists(os.path.join(base, path)):
        path = path.replace("\\", "/")
    return path


def is_inside(path: str, base: str) -> bool:
    """Whether a path lies in a folder, as it is written or under another name of the folder."""
    return _below(path, base) or _leads_into(os.path.dirname(path), base)


@functools.cache
def _leads_into(folder: str, base: str) -> bool:
    real = os.path.realpath(base)
    above = [folder, *map(str, Path(folder).parents)]
    return _below(os.path.realpath(folder), real) or any(os.path.realpath(place) == real for place in above)


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
