"""Lists the files below a folder: links are followed, junk is passed over, and what else is not entered is named."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from ..core.files import is_ours

# What operating systems and file servers leave behind, apart from names that begin with a dot.
JUNK = frozenset(
    "thumbs.db ehthumbs.db desktop.ini picasa.ini __macosx __pycache__ @eadir #recycle $recycle.bin lost+found".split()
) | {"system volume information", "icon\r"}

# Why something below a folder is not listed.
LOOP = "links back to a folder above them"
TWICE = "links to folders that are listed already"
BROKEN = "broken links"
SPECIAL = "devices, pipes and sockets"
CLOSED = "folders without permission to open"
OURS = "folders that mmft-hf wrote"
NO_TEXT = "names that are not UTF-8"
UNDERSCORE = "folders that begin with _"


@dataclass
class Tree:
    """What is below a folder. Paths are relative to it, with `/`, sorted.

    Args:
        root: the folder, as an absolute path.
        files: all files, also those that a link leads to.
        folders: all folders that were entered, without the root.
        left_out: what was passed over, by reason. Junk and hidden names are not in it.
    """

    root: str
    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    _real_folders: dict[str, str] = field(default_factory=dict)  # by folder
    _linked_files: set[str] = field(default_factory=set)

    def path(self, file: str) -> str:
        """The absolute path of a file, as it was reached."""
        return os.path.join(self.root, file)

    def real(self, file: str) -> str:
        """What identifies a file however many links lead to it."""
        if file in self._linked_files:
            return os.path.realpath(self.path(file))
        folder, _, name = file.rpartition("/")
        return os.path.join(self._real_folders[folder], name)


def is_junk(name: str) -> bool:
    """Whether a file or folder is hidden, or was left behind by an operating system or a file server."""
    return name.startswith(".") or name.lower() in JUNK


def walk(root: str | os.PathLike) -> Tree:
    """Lists what is below a folder. The order does not depend on the file system.

    Links to files and folders are followed, wherever they lead: whoever made the folder made them. A link that leads back to
    a folder above it is passed over; so is a link to a folder that is listed already in the same place (the first three
    levels below `root`), which also ends circles of links. Devices, pipes and sockets are never opened, folders that begin
    with `_` and those that `mmft-hf` wrote (a run, captions) are not entered. `root` itself may be any folder.

    Returns:
        The files, the folders, and by reason what was passed over.
    """
    tree = Tree(os.path.abspath(root))
    top = os.path.realpath(root)
    tree._real_folders[""] = top
    seen: set[tuple[str, str]] = set()

    def leave_out(reason: str, path: str) -> None:
        tree.left_out.setdefault(reason, []).append(path)

    todo: list[tuple[str, tuple[str, ...]]] = [("", (top,))]  # a folder, and the real paths of it and those above it
    while todo:
        folder, above = todo.pop()
        try:
            with os.scandir(os.path.join(tree.root, folder)) as found:
                entries = list(found)
        except OSError:
            leave_out(CLOSED, folder or ".")
            continue
        for entry in entries:
            name = entry.name
            if is_junk(name):
                continue
            path = f"{folder}/{name}" if folder else name
            if not name.isascii() and not _is_text(name):
                leave_out(NO_TEXT, os.fsencode(path).decode("utf-8", "replace"))
                continue
            try:
                link, is_folder = entry.is_symlink(), entry.is_dir()
                is_file = not is_folder and entry.is_file()
            except OSError:  # a link that leads to itself
                link, is_folder, is_file = True, False, False
            if is_file:
                tree.files.append(path)
                if link:
                    tree._linked_files.add(path)
            elif not is_folder:
                leave_out(BROKEN if link else SPECIAL, path)
            elif name.startswith("_"):
                leave_out(UNDERSCORE, path)
            else:
                real = os.path.realpath(entry.path) if link else os.path.join(above[-1], name)
                place = ("/".join(path.split("/")[:3]), real)
                if real in above:
                    leave_out(LOOP, path)
                elif place in seen:
                    leave_out(TWICE, path)
                elif is_ours(entry.path):
                    leave_out(OURS, path)
                else:
                    seen.add(place)
                    tree.folders.append(path)
                    tree._real_folders[path] = real
                    todo.append((path, (*above, real)))
    tree.files.sort()
    tree.folders.sort()
    for paths in tree.left_out.values():
        paths.sort()
    return tree


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
