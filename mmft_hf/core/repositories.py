"""Base models and data sets by what their own cards say of them: name, place, licence. Nothing of it is a local path."""

from __future__ import annotations

import re
from pathlib import Path

from .builtin import builtin
from .markdown import one_line, read_front_matter

LARGEST = 10 * 2**20  # bytes of a card or record that are read
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def origin(name: str, revision: str | None, repo_type: str, local: bool = False) -> dict:
    """`name`, `kind` (`hub`, `builtin` or `local`), `type`, `revision`, and the licence fields of its card, JSON-able.

    Args:
        name: Hub id, path or `builtin/…`; of a path only the last part is kept.
        repo_type: `model` or `dataset`.
        local: asks nobody on the network.
    """
    kind = "builtin" if name.startswith("builtin/") else "local" if Path(name).exists() else "hub"
    if kind == "hub" and not _REPOSITORY.fullmatch(name):
        kind = "local"  # a path of another time or place
    found = {"name": one_line(Path(name).name if kind == "local" else name), "kind": kind, "type": repo_type}
    found["revision"] = revision
    text = read_beside(name, "README.md", revision, repo_type, local)
    front = read_front_matter(text)[0] if text else {}
    for key in ("license", "license_name", "license_link"):
        value = front.get(key)
        values = value if isinstance(value, list) else [value]
        if value and all(isinstance(one, str) for one in values):
            found[key] = [one_line(one) for one in values] if isinstance(value, list) else one_line(value)
    return found


def captioned_origin(name: str, local: bool = False) -> dict:
    """The same of a data set as `captions.json` names it: of a local folder only the last part, which is no repository."""
    return origin(name if "/" in name else f"./{name}", None, "dataset", local)


def read_beside(name: str, file: str, revision: str | None, repo_type: str, local: bool = False) -> str | None:
    """A small text file of a folder or repository; None where there is none, or none within reach."""
    try:
        folder = Path(builtin(name))
        if folder.is_dir():
            path = folder / file
        elif folder.exists() or not _REPOSITORY.fullmatch(name):
            return None
        else:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(name, file, revision=revision, repo_type=repo_type, local_files_only=local))
        return path.read_text(encoding="utf-8") if path.stat().st_size <= LARGEST else None
    except Exception:  # no such file, no network, no access: a card never costs a finished training
        return None
