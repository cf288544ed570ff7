"""Tells whether records and files are those that we wrote: edited or damaged ones are used, but never without a word.

A record is sealed when it is written: its field `sha256` is the digest of its other fields. Whoever edits one on purpose may remove
the field. `mmft.json` also has the digests of the run's files, under `files`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from .errors import UserError
from .files import (
    ADAPTER_FILES,
    CARD_FILE,
    HEAD_FILE,
    MODEL_FILES,
    PROTOTYPES_FILE,
    RUN_FILE,
    SUBFOLDERS,
    belongs_to_run,
    is_weights,
)
from .reading import open_regular, read_json
from .records import RunRecord

logger = logging.getLogger(__name__)
BLOCK = 2**20  # bytes that are hashed at a time


def seal_of(record: Mapping) -> str:
    """64 hex digits of the values of a record, its own seal left out."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sealed(record: Mapping) -> dict:
    """The record, as JSON will give it back, with its seal as the last field."""
    plain = json.loads(json.dumps(record))
    plain.pop("sha256", None)
    return {**plain, "sha256": seal_of(plain)}


def is_as_written(record: Mapping) -> bool:
    """Whether the seal of a record fits, or there is none: version 0.1 wrote none."""
    return record.get("sha256") in (None, seal_of(record))


def note_if_changed(record: Mapping, name: str | Path) -> None:
    """Logs a line if a record is not as it was written."""
    if not is_as_written(record):
        logger.warning("Note: %s was changed after it was written. What follows is from its present content.", name)


def digest_of(source: str | Path | bytes) -> str:
    """64 hex digits: the SHA-256 of a file or of bytes."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    digest = hashlib.sha256()
    with open_regular(source) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def is_loaded(name: str) -> bool:
    """Whether a classifier is loaded from the file of this name."""
    return name in MODEL_FILES or is_weights(name) or name in (HEAD_FILE, PROTOTYPES_FILE, *ADAPTER_FILES)


def is_of_run(name: str) -> bool:
    """Whether a file belongs to a run, apart from the card, which is meant to be edited, and the record itself."""
    folder, _, file = name.rpartition("/")
    if folder:
        return file in SUBFOLDERS.get(folder, ())
    own = belongs_to_run(name) and name not in (RUN_FILE, CARD_FILE)
    return own or name in ADAPTER_FILES  # published without their folder


def digests_of(folder: str | Path, which: Callable[[str], bool] = is_of_run) -> dict[str, str]:
    """The digests of the run's files in a folder, by name."""
    places = [*Path(folder).iterdir(), *(path for name in SUBFOLDERS for path in (Path(folder) / name).glob("*"))]
    names = {path.relative_to(folder).as_posix(): path for path in places if path.is_file()}
    return {name: digest_of(names[name]) for name in sorted(names) if which(name)}


def note_changed_files(folder: str | Path, which: Callable[[str], bool] = is_of_run) -> None:
    """Logs a line if files of a finished run are not those that it saved: edited, replaced, or damaged on the disk."""
    path = Path(folder) / RUN_FILE
    try:
        record = read_json(path, RunRecord)
    except FileNotFoundError:  # a model that no run saved
        return
    except UserError as error:
        logger.warning("Note: it is unknown whether the files of this run are those that it saved. %s", error)
        return
    note_if_changed(record, path)
    if not record.get("files"):  # version 0.1 recorded none
        return
    saved = {name: digest for name, digest in record["files"].items() if which(name)}
    found = digests_of(folder, which)
    differ = [name for name in sorted(saved | found) if saved.get(name) != found.get(name)]
    if differ:
        logger.warning(
            "Note: %s: not as the run saved it: %s. Changed since, or damaged? What follows is from what is there now.",
            folder,
            ", ".join(differ),
        )
