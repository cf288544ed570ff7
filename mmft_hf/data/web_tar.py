"""Reads a tar of WebDataset: the files of a sample have one name and differ in what follows its first dot."""

from __future__ import annotations

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from ..core.console import some
from ..core.errors import UserError
from .images import MAX_FILE_BYTES, PICTURE_SUFFIXES

BATCH = 100  # samples that are in memory at a time, with their pictures
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")
TEXT_BYTES = 2**20  # of the largest file beside a picture that is read


def read_tar(path: Path, label_column: str) -> tuple[pa.Table, Iterator[pa.StructArray], list[str]]:
    """Reads the samples of a tar.

    Returns:
        The columns beside the pictures: the keys of `.json` files, `.txt` and other texts under their suffix, and the label from
        `.cls` under the name `label_column`; the pictures in batches, as `datasets` stores an `Image`; sentences about what is
        left out.

    Raises:
        UserError: it holds no pictures, or two of a sample.
        tarfile.TarError: it is damaged.
    """
    samples: dict[str, dict] = {}
    pictures: dict[str, str] = {}  # of each sample, its member
    left: list[str] = []
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            name = member.name.removeprefix("./")
            folder, file = posixpath.split(name)
            stem, dot, kind = file.partition(".")
            if not member.isfile() or not stem or not dot:
                left += [name] * (not member.isdir())
                continue
            key, kind = posixpath.join(folder, stem), kind.lower()
            if f".{kind}" in PICTURE_SUFFIXES and member.size <= MAX_FILE_BYTES:
                if key in pictures:
                    raise UserError(
                        f"{path}: expected one picture of each sample, found {pictures[key]} and {name}. Write the others with a longer "
                        "suffix, such as .mask.png."
                    )
                pictures[key] = name
                samples.setdefault(key, {})
            elif kind in ("json", "txt", "text", "cls", "caption", "label") and member.size <= TEXT_BYTES:
                text = tar.extractfile(member).read().decode("utf-8", "replace")
                samples.setdefault(key, {}).update(_fields(kind, text, label_column, f"{path}, {name}"))
            else:
                left.append(name)
    if not pictures:
        raise UserError(
            f"{path}: expected the samples of WebDataset, a picture with files of the same name beside it (0001.jpg, 0001.cls), found "
            "no pictures. Unpack it, and type --dataset_name FOLDER."
        )
    left += [key for key in samples if key not in pictures]
    rows = [samples[key] for key in pictures]
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: _array([row.get(name) for row in rows]) for name in names})
    if not names:
        table = pa.table({"__key__": pa.array(pictures)})

    def images() -> Iterator[pa.StructArray]:
        batch: list[dict] = []
        with tarfile.open(path, "r:") as tar:
            wanted = dict.fromkeys(pictures.values())
            for member in tar:
                name = member.name.removeprefix("./")
                if name in wanted and member.isfile():
                    batch.append({"bytes": tar.extractfile(member).read(), "path": posixpath.basename(name)})
                    if len(batch) == BATCH:
                        yield pa.array(batch)
                        batch = []
        if batch:
            yield pa.array(batch)

    notes = [
        f"{path.name}: left out, because they are not part of a sample that is read: {some(left, 3)} ({len(left):,})."
    ]
    return table, images(), notes if left else []


def _fields(kind: str, text: str, label_column: str, where: str) -> dict:
    if kind == "json":
        try:
            found = json.loads(text)
        except ValueError as error:
            raise UserError(f"{where}: expected a JSON object, found {text[:60]!r}. Correct the file.") from error
        return found if isinstance(found, dict) else {"json": text}
    text = text.strip() or None
    if kind in ("cls", "label"):
        return {label_column: int(text) if text and _WHOLE.fullmatch(text) else text}
    return {kind: text}


def _array(values: list) -> pa.Array:
    """Values as they are, or as JSON where they have several types."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        return pa.array(
            [None if value is None else value if isinstance(value, str) else json.dumps(value) for value in values]
        )
