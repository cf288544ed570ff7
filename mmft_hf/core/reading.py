"""Reads files that anybody may have written: regular files alone, of bounded size and depth, as plain values of JSON or YAML.

Whatever such a file contains, these functions return values that can be walked, printed and compared, or raise `UserError`.
What the values should be, a schema says: see `schema`.
"""

from __future__ import annotations

import json
import os
import stat
from typing import Any, BinaryIO

from .errors import UserError

LARGEST = 256 * 2**20  # bytes of a JSON file
LARGEST_YAML = 2**20  # bytes of a file that people type
DEEPEST = 50  # lists and objects in each other
MOST_VALUES = 100_000  # of a YAML file, aliases written out
POINTER = b"version https://git-lfs.github.com/spec/v1"  # how the stand-in for a large file begins in a Git repository
FETCH = "a pointer of Git LFS instead of the file: type git lfs pull in its repository, or download the file"
_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


class NotAFile(UserError, OSError):
    """A path leads to a pipe, a socket or a device: to open or read it could wait forever."""


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Opens a regular file to be read, as bytes, and nothing else.

    Raises:
        NotAFile: it is a pipe, a socket or a device.
        OSError: it is missing, a folder, or cannot be read.
    """
    try:  # a pipe does not wait for a writer with O_NONBLOCK, and reading a regular file is not affected
        handle = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        )
    except OSError as error:  # a socket cannot be opened at all
        check_regular(path)
        raise error
    try:
        _check_mode(os.fstat(handle).st_mode, path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def check_regular(path: str | os.PathLike) -> None:
    """Raises `NotAFile` or `IsADirectoryError` for what is there but no regular file. For libraries that open a path themselves."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # missing: whoever opens it says so
        return
    _check_mode(mode, path)


def refuse_pointers(*paths: str | os.PathLike) -> None:
    """Raises `UserError` for a file that Git LFS has not fetched. Files that cannot be opened are left to their readers."""
    for path in paths:
        try:
            with open_regular(path) as file:
                pointer = file.read(len(POINTER)) == POINTER
        except OSError:
            continue
        if pointer:
            raise UserError(f"{path}: found {FETCH}.")


def _check_mode(mode: int, path: str | os.PathLike) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(21, "Is a directory", os.fspath(path))
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise NotAFile(f"{path}: expected a file, found {kind}. Remove it, or type another path.")


def read_bytes(path: str | os.PathLike, most: int = LARGEST) -> bytes:
    """The content of a regular file of at most `most` bytes.

    Raises:
        UserError: it is no regular file, is larger, or cannot be read.
        FileNotFoundError: it is missing.
    """
    try:
        with open_regular(path) as file:
            content = file.read(most + 1)
    except (FileNotFoundError, NotAFile):
        raise
    except OSError as error:
        raise UserError(f"{path}: expected a file that can be read, found: {error.strerror or error}.") from error
    if len(content) > most:
        raise UserError(f"{path}: expected at most {most:,} bytes, found more.")
    if content.startswith(POINTER):
        raise UserError(f"{path}: found {FETCH}.")
    return content


def read_text(path: str | os.PathLike, most: int = LARGEST) -> str:
    """The content of a regular file in UTF-8. Errors as for `read_bytes`."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected text in UTF-8, found {_one_line(error)}.") from error


def read_json(path: str | os.PathLike, schema: Any = dict, remedy: str = "", most: int = LARGEST) -> Any:
    """The content of a JSON file.

    Args:
        schema: what it must conform to, see `schema.conform`.
        remedy: what to type if it does not, as a sentence.

    Raises:
        UserError: it cannot be read, is no JSON, or does not conform.
        FileNotFoundError: it is missing.
    """
    return parse_json(read_bytes(path, most), str(path), schema, remedy)


def parse_json(text: str | bytes, name: str, schema: Any = dict, remedy: str = "") -> Any:
    """`read_json` for text that was read already; `name` is that of its file."""
    from .schema import conform

    end = f" {remedy}" if remedy else ""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of thousands of digits, too deep
        raise UserError(f"{name}: expected JSON, found a damaged file ({_one_line(error)}).{end}") from error
    if unfit := _unfit(value):
        raise UserError(f"{name}: expected plain values, found {unfit}.{end}")
    conform(value, schema, name, remedy)
    return value


def read_yaml(path: str | os.PathLike) -> Any:
    """The content of a YAML file, without Python objects and in bounds, however often its aliases repeat.

    Raises:
        UserError: it cannot be read, is no YAML, or is larger or deeper than any file of settings.
        FileNotFoundError: it is missing.
    """
    return parse_yaml(read_text(path, LARGEST_YAML), str(path))


def parse_yaml(text: str, name: str) -> Any:
    """`read_yaml` for text that was read already; `name` is that of its file."""
    import yaml

    try:
        _check_events(yaml.parse(text, Loader=yaml.SafeLoader), name)
        value = yaml.safe_load(text)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # no YAML, or a tag that does not fit its text, for which each constructor has another error
        raise UserError(f"{name}: expected YAML, found {_one_line(error)}") from error
    if unfit := _unfit(value):
        raise UserError(f"{name}: expected plain values, found {unfit}.")
    return value


def _check_events(events, name: str) -> None:
    """Counts the values of a YAML document as if each alias were written out, before any of them is."""
    import yaml

    sizes: dict[str, int] = {}  # values below each anchor that is complete
    open_: list[list] = [[None, 0]]  # for each list or mapping around: its anchor, and the values in it
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise UserError(f"{name}: expected an alias of what stands before it, found *{event.anchor[:40]}.")
            open_[-1][1] += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            open_[-1][1] += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append([event.anchor, 1])
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_.pop()
            open_[-1][1] += size
            if anchor:
                sizes[anchor] = size
        if len(open_) > DEEPEST:
            raise UserError(f"{name}: expected at most {DEEPEST} levels, found more.")
        if open_[-1][1] > MOST_VALUES:
            raise UserError(f"{name}: expected at most {MOST_VALUES:,} values, aliases written out, found more.")


def _unfit(value: Any) -> str | None:
    """What in a value could not be walked, printed or stored; None if there is nothing."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            return f"more than {DEEPEST} levels"
        below = []
        for one in level:
            if isinstance(one, dict):
                below += one.keys()
                below += one.values()
            elif isinstance(one, (list, tuple, set)):
                below += one
            elif isinstance(one, int) and abs(one) >= 2**63:
                return "a number of more than 63 bits"
            elif isinstance(one, str) and not one.isascii() and any("\ud800" <= c <= "\udfff" for c in one):
                # Names of files that are no UTF-8 are recorded like this by Python itself.
                if any("\ud800" <= c < "\udc80" or "\udcff" < c <= "\udfff" for c in one):
                    return "half of a character"
        level = below
    return None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
