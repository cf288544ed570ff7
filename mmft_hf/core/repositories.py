"""Describes a base model or dataset by its card: name, place, revision, licence. Never a local path."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from .builtin import builtin
from .errors import UserError
from .files import CARD_FILE
from .markdown import one_line, read_front_matter
from .reading import read_text

LARGEST = 10 * 2**20  # bytes of a card or record that are read
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def describe_source(name: str, revision: str | None, repo_type: str, offline: bool = False) -> dict:
    """Describes a base model or dataset in values that JSON can hold.

    Args:
        name: Hub id, path or `builtin/…`. Of a path only the last part is kept.
        repo_type: `model` or `dataset`.
        offline: read the card from the cache only.

    Returns:
        `name`, `kind` (`hub`, `builtin` or `local`), `type`, `revision`, and the licence fields of the card.
    """
    kind = "builtin" if name.startswith("builtin/") else "local" if Path(name).exists() else "hub"
    if kind == "hub" and not _REPOSITORY.fullmatch(name):
        kind = "local"  # a path that no longer exists, or exists on another machine
    found = {"name": one_line(Path(name).name if kind == "local" else name), "kind": kind, "type": repo_type}
    found["revision"] = revision
    text = None
    with suppress(UserError):  # a card that cannot be read must never cost a finished training
        text = read_text_file(name, CARD_FILE, revision, repo_type, offline)
    front = read_front_matter(text)[0] if text else {}
    for key in ("license", "license_name", "license_link"):
        value = front.get(key)
        values = value if isinstance(value, list) else [value]
        if value and all(isinstance(one, str) for one in values):
            found[key] = [one_line(one) for one in values] if isinstance(value, list) else one_line(value)
    return found


def describe_recorded_dataset(name: str, offline: bool = False) -> dict:
    """`describe_source` for a name from `captions.json`, where a local folder is recorded by its last part alone."""
    return describe_source(name if "/" in name else f"./{name}", None, "dataset", offline)


def read_text_file(name: str, file: str, revision: str | None, repo_type: str, offline: bool = False) -> str | None:
    """Reads a small text file from a folder or repository. Returns None if it does not exist or cannot be reached.

    Raises:
        UserError: it is there, but is no text in UTF-8 of a size that we write.
    """
    try:
        folder = Path(builtin(name))
        if folder.is_dir():
            path = folder / file
        elif folder.exists() or not _REPOSITORY.fullmatch(name):
            return None
        else:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(name, file, revision=revision, repo_type=repo_type, local_files_only=offline))
    except Exception:  # no such file, no network, no access
        return None
    try:
        return read_text(path, LARGEST)
    except FileNotFoundError:
        return None
