"""Experts: functions of the user's own that say what is in a picture, such as a detector or text recognition."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import Dataset
from PIL.Image import Image

from ..core.console import many
from ..core.errors import UserError
from ..core.functions import named_function, source_digest
from ..core.markdown import one_line
from ..data.cache import cache_folder, keep
from ..data.images import BadImage, read_image

logger = logging.getLogger(__name__)
KEPT_AFTER = 256  # pictures, after which the answers are kept on disk
Said = str | list[str] | None


def is_expert(name: str) -> bool:
    """Whether the name of a column is that of a function: `package.module:function`."""
    return bool(re.fullmatch(r"[\w.]+:\w+", name))


def asked_expert(name: str, images: Dataset, hashes: Sequence[str | None]) -> list[Said]:
    """What a function says of each picture; None where it says nothing, raises, or the picture cannot be read.

    Each picture is shown once. Answers stay in the cache under the content of the file that the function is written in.

    Args:
        images: column `image`, not decoded.
        hashes: sha256 of each picture; None if it cannot be read.

    Raises:
        UserError: no such function; it raises for every picture.
    """
    function = named_function(name, "hints")
    path = _file(name, function)
    known: dict[str, Said] = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    raised, unreadable, first, new = set(), set(), "", 0
    for row, digest in enumerate(hashes):
        if digest is None or digest in known or digest in raised or digest in unreadable:
            continue
        try:
            known[digest] = _text(function(read_image(images[row]["image"])))
            new += 1
        except BadImage:
            unreadable.add(digest)
        except Exception as error:
            raised.add(digest)
            first = first or f"{type(error).__name__}: {one_line(error, 200)}"
        if path and new and new % KEPT_AFTER == 0:
            _keep(path, known)
    if path and new:
        _keep(path, known)
    if first and not any(digest in known for digest in hashes):
        raise UserError(f"hints {name}: expected a text for each picture, but it raised for all of them ({first}).")
    if first:
        logger.warning(
            "Note: %s raised for %s (%s), which have no hint of it.", name, many(len(raised), "picture"), first
        )
    return [known.get(digest) for digest in hashes]


def _text(said: object) -> Said:
    """Raises `TypeError` for anything but a text, a list of texts, or None."""
    if said is None or isinstance(said, str) or (isinstance(said, list) and all(isinstance(one, str) for one in said)):
        return said
    raise TypeError(f"expected a text, a list of texts or None, found {type(said).__name__}")


def _file(name: str, function: Callable[[Image], Said]) -> Path | None:
    """Where the answers of a function are kept; None if it is not known what it is written in."""
    source = source_digest(function)
    digest = hashlib.sha256(f"{name} {source}".encode()).hexdigest()[:32]
    return cache_folder("experts") / f"{digest}.json" if source else None


def _keep(path: Path, known: dict[str, Said]) -> None:
    text = json.dumps(known, ensure_ascii=False)
    keep(path, lambda file: file.write_text(text, encoding="utf-8"))
