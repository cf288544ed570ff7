"""Heads: what turns an image embedding into class logits. One file per kind, and one import here, which puts it
into `HEADS`.
"""

from __future__ import annotations

from pathlib import Path

from ...core.errors import UserError
from ...core.files import PROTOTYPES_FILE
from .base import UNKNOWN, Head, find_head, read
from .kernel import KernelHead
from .linear import LinearHead
from .prototypes import ClassPrototypes

HEADS: dict[str, type[Head]] = {head.kind: head for head in Head.__subclasses__()}


def load_head(folder_or_hub_id: str | Path, revision: str | None = None, **hub) -> Head:
    """Reads the head of a saved classifier, whatever its kind.

    Args:
        folder_or_hub_id, revision, hub: see `Head.from_pretrained`.

    Raises:
        UserError: there is no head, or its kind is unknown.
    """
    path = find_head(folder_or_hub_id, revision, **hub)
    kind = "prototypes" if path.name == PROTOTYPES_FILE else read(path)[0].get("kind")
    if kind not in HEADS:
        raise UserError(
            f"{path}: expected a head of kind {', '.join(HEADS)}, found {kind!r}. Did a newer mmft_hf write it? Type pip "
            "install --upgrade mmft_hf."
        )
    return HEADS[kind].from_file(path)
