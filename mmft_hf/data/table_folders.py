"""Finds the tables of a folder and their splits: from its card, or from the names of folders and files."""

from __future__ import annotations

import posixpath
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Features

from ..core.arguments import DataArguments
from ..core.console import some
from ..core.errors import UserError, nearest
from ..core.files import CARD_FILE, is_ours
from ..core.markdown import read_front_matter
from .formats import READERS
from .images import PICTURE_SUFFIXES
from .metadata import METADATA_FILES
from .raw import RawData, split_role
from .tables import open_files
from .walk import Tree

PACKED = (".parquet", ".arrow")  # tables that can hold the pictures themselves
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}(-[0-9a-f]{16})?")  # as `datasets` names shards
_NUMBER = re.compile(r"[-_.]?\d+")
# What differs between the names of the parts that Spark writes.
_VARYING = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d+")
_ROLES = ("train", "validation", "test")
_MAX_CARD = 2**20  # bytes


@dataclass
class Tables:
    """The tables of a folder.

    Args:
        splits: the files of each split, relative to the folder.
        types: of columns, as the folder's card declares them.
        notes: on tables that are not read.
    """

    splits: dict[str, list[str]]
    types: Features | None = None
    notes: list[str] = field(default_factory=list)


def card_tables(args: DataArguments, tree: Tree) -> Tables | None:
    """The tables that the folder's card names; None if there is no card or it names none.

    Raises:
        UserError: the card names files outside the folder, or files that are not there; several configurations, none typed.
    """
    card = _card(tree)
    config = _config(args, card)
    splits = _card_splits(args, tree, config) if config else {}
    return Tables(splits, _types(card, config)) if splits else None


def named_tables(args: DataArguments, tree: Tree) -> Tables | None:
    """The tables of the splits that the names of folders and files say. One table, or shards of one, are all `train`.

    Returns:
        None if there are no tables, or if their names say nothing.

    Raises:
        UserError: two tables for one split; several configurations, none typed.
    """
    files = [file for file in tree.files if _is_table(file)]
    if is_ours(tree.root):
        files = [file for file in files if not file.startswith("journal/")]
    if not files:
        return None
    card = _card(tree)
    config = _config(args, card) or {}
    top = _read_through(args, files, str(config.get("data_dir") or args.dataset_config_name or ""))
    splits, others = _splits(args, top)
    notes = []
    if not splits and len({_VARYING.sub("#", posixpath.basename(file)) for file in others}) == 1:
        splits, others = {"train": others}, []
        if any(_suffix(file) in PICTURE_SUFFIXES for file in tree.files):
            notes.append(f"Images and labels were read from {some(splits['train'], 3)}.")
    if not splits:
        return None
    for split, found in splits.items():
        if len({_suffix(file) for file in found}) > 1:
            raise UserError(
                f"dataset {args.dataset_name!r}: expected one table for split {split!r}, found {some(found, 3)}. Type --dataset_name "
                f"{_typed(args, found[0])}."
            )
    if others:
        notes.append(
            f"Read from {some([file for found in splits.values() for file in found], 3)}; not read: {some(others, 3)}. To read such a "
            f"table, type --dataset_name {_typed(args, others[0])}."
        )
    return Tables(splits, _types(card, config), notes)


def packed_tables(tree: Tree) -> list[str]:
    """The tables that can hold pictures themselves and have the name of a split."""
    return [file for file in tree.files if _suffix(file) in PACKED and _is_table(file) and _split_of(file, {})]


def open_tables(args: DataArguments, tree: Tree, tables: Tables) -> RawData:
    """Opens the tables of a folder; raises `UserError` if one cannot be read."""
    files = {split: [Path(tree.path(file)) for file in found] for split, found in tables.splits.items()}
    raw = open_files(args.dataset_name, files, args, tables.types)
    return RawData(raw.splits, tables.notes + raw.notes)


def _is_table(file: str) -> bool:
    name, suffix = posixpath.basename(file), _suffix(file)
    if suffix == ".json":  # a JSON file may be anything
        return split_role(name[: -len(suffix)]) is not None
    # What `Dataset.map` leaves in a folder of `save_to_disk` holds other rows.
    return suffix in READERS and name not in METADATA_FILES and not (suffix == ".arrow" and name.startswith("cache-"))


def _suffix(file: str) -> str:
    return posixpath.splitext(file)[1].lower()


def _typed(args: DataArguments, file: str) -> str:
    return shlex.quote(str(Path(args.dataset_name) / file))


# -- what the card says ------------------------------------------------------------------------------------------------------
def _card(tree: Tree) -> dict:
    """The metadata of the folder's card. It is somebody else's word: it may only name files of this folder."""
    if CARD_FILE not in tree.files:
        return {}
    with open(tree.path(CARD_FILE), encoding="utf-8", errors="replace") as file:
        return read_front_matter(file.read(_MAX_CARD))[0]


def _config(args: DataArguments, card: dict) -> dict | None:
    """The configuration that the user typed, or the card's default; None if the card has none."""
    configs = card.get("configs")
    configs = [c for c in configs if isinstance(c, dict)] if isinstance(configs, list) else []
    if not configs:
        return None
    by_name = {str(config.get("config_name", "default")): config for config in configs}
    wanted = args.dataset_config_name
    if wanted is None:
        standard = [config for config in configs if config.get("default") is True]
        if not standard and len(by_name) > 1 and "default" not in by_name:
            raise UserError(
                f"dataset {args.dataset_name!r}: expected the name of a configuration, found several in its {CARD_FILE}: "
                f"{some(list(by_name))}. Type --dataset_config_name {shlex.quote(next(iter(by_name)))}."
            )
        return standard[0] if standard else by_name.get("default", configs[0])
    if wanted not in by_name:
        raise UserError(
            f"--dataset_config_name: expected one of {some(list(by_name))}, found {wanted!r}.{nearest(wanted, by_name)}"
        )
    return by_name[wanted]


def _card_splits(args: DataArguments, tree: Tree, config: dict) -> dict[str, list[str]]:
    """The tables that a configuration names for each split. Empty if it names none, or pictures."""
    entries = config.get("data_files")
    if isinstance(entries, str) or (isinstance(entries, list) and all(isinstance(e, str) for e in entries)):
        entries = [{"split": "train", "path": entries}]
    elif isinstance(entries, dict):
        entries = [{"split": split, "path": path} for split, path in entries.items()]
    splits: dict[str, list[str]] = {}
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict):
            continue
        paths = entry.get("path")
        for pattern in [paths] if isinstance(paths, str) else paths if isinstance(paths, list) else ():
            pattern = _inside(args, str(pattern), str(config.get("data_dir") or ""))
            found = [file for file in tree.files if pattern.fullmatch(file)]
            if not found:
                raise UserError(
                    f"dataset {args.dataset_name!r}: expected the files that its {CARD_FILE} names, found none for {paths!r}. Complete "
                    "the folder, or correct `configs` there."
                )
            tables = [file for file in found if _suffix(file) in READERS]
            splits.setdefault(str(entry.get("split", "train")), []).extend(tables)
    return splits if all(splits.values()) else {}


def _inside(args: DataArguments, pattern: str, folder: str) -> re.Pattern:
    """A pattern of file names of a card, as a regular expression.

    Raises:
        UserError: it leads out of the folder.
    """
    path = posixpath.join(folder, pattern)
    if "://" in path or "::" in path or "\\" in path or path.startswith(("/", "~")) or ".." in path.split("/"):
        raise UserError(
            f"dataset {args.dataset_name!r}: expected files of this folder in its {CARD_FILE}, found {path[:100]!r}. Nothing outside of "
            "the folder is read or fetched: correct `configs` there, or remove it."
        )
    path = posixpath.normpath(path)
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]/]+\])", path)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(known.get(part) or _literal(part) for part in parts), re.DOTALL)


def _literal(part: str) -> str:
    if part.startswith("[") and part.endswith("]") and len(part) > 2:
        inside = part[1:-1]
        return f"[{'^' * inside.startswith('!')}{re.escape(inside.removeprefix('!')).replace(chr(92) + '-', '-')}]"
    return re.escape(part)


def _types(card: dict, config: dict | None) -> Features | None:
    """The column types that the card declares."""
    info = card.get("dataset_info")
    infos = info if isinstance(info, list) else [info]
    name = (config or {}).get("config_name", "default")
    for entry in infos:
        if isinstance(entry, dict) and isinstance(entry.get("features"), list):
            if len(infos) == 1 or entry.get("config_name", "default") == name:
                try:
                    return Features._from_yaml_list(entry["features"])
                except Exception:  # a card may hold anything
                    return None
    return None


# -- what names say ----------------------------------------------------------------------------------------------------------
def _read_through(args: DataArguments, files: Iterable[str], wanted: str) -> dict[str, str]:
    """The tables of the folder that holds the splits, by their path in it. A folder that is alone is read through.

    Args:
        wanted: a folder of tables that the user or the card names; empty if they name none.

    Raises:
        UserError: no such folder, or several and none is named.
    """
    level = {file: file for file in files}
    while True:
        folders = sorted({path.partition("/")[0] for path in level if "/" in path})
        if wanted in folders:
            (chosen, wanted) = (wanted, "")
        elif any("/" not in path for path in level) or any(_split_of(folder, _named(args)) for folder in folders):
            break
        elif len(folders) == 1:
            chosen = folders[0]
        else:
            found = f"found {wanted!r} and {some(folders)}" if wanted else f"found {some(folders)}"
            raise UserError(
                f"dataset {args.dataset_name!r}: expected one folder of tables, or folders called train, validation or test, {found}. "
                f"If these are configurations, type --dataset_config_name {shlex.quote(folders[0])}."
            )
        level = {path[len(chosen) + 1 :]: file for path, file in level.items() if path.startswith(f"{chosen}/")}
    if wanted:
        raise UserError(
            f"--dataset_config_name: expected a configuration of {args.dataset_name}, found {wanted!r}, which neither its {CARD_FILE} "
            "nor a folder there names. Leave it out."
        )
    return level


def _named(args: DataArguments) -> dict[str, str]:
    """The splits that the user typed, by their name in small letters."""
    return {n.lower(): n for n in (args.train_split, args.validation_split, args.test_split) if n}


def _split_of(path: str, typed: dict[str, str]) -> str | None:
    """The split that a folder, file or shard is by its name: one that the user typed, or one of the usual names."""
    stem = posixpath.basename(path)
    stem = stem[: -len(suffix)] if (suffix := _suffix(stem)) in READERS else stem
    shard = _SHARD.fullmatch(stem)
    for word in (stem, shard[1] if shard else "", _NUMBER.sub("", stem)):
        if split := typed.get(word.lower()) or split_role(word):
            return split
    return shard[1] if shard and shard[1] != "data" else None  # `save_to_disk` calls every shard data-…


def _splits(args: DataArguments, level: dict[str, str]) -> tuple[dict[str, list[str]], list[str]]:
    """The tables of each split, and those that have the name of no split."""
    typed = _named(args)
    splits: dict[str, dict[str, list[str]]] = {}  # by split and by the name that said so
    others = []
    for path, file in level.items():
        place = path.partition("/")[0]
        split = _split_of(place, typed)
        if split is None:
            others.append(file)
        else:
            name = place if "/" in path else _NUMBER.sub("", _SHARD.sub(r"\1", place[: -len(_suffix(place))]))
            splits.setdefault(split, {}).setdefault(name, []).append(file)
    for split, names in splits.items():
        if len(names) > 1:
            one, two = sorted(names)[:2]
            raise UserError(
                f"dataset {args.dataset_name!r}: expected one table or folder for split {split!r}, found {one} and {two}. Rename one, or "
                f"type --{split_role(two) or 'test'}_split {shlex.quote(two)}."
            )
    order = sorted(splits, key=lambda split: (_ROLES.index(split) if split in _ROLES else len(_ROLES), split))
    return {split: [file for files in splits[split].values() for file in files] for split in order}, others
