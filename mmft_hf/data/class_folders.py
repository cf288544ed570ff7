"""Decides what the folders of a collection of pictures mean: which are splits, which are classes, which pictures have neither.

A split is a folder at the top whose name says so, or that a setting names. A class is a folder in a split, or at the top
where there are no splits; levels below belong to the class. A collection that can be read in two ways is refused.
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field

from ..core.arguments import DataArguments
from ..core.console import many, some
from ..core.errors import UserError
from .raw import role_within, split_role

# Folders of these names hold the pictures of all classes, or what belongs to pictures.
_PICTURES = frozenset(
    "images image imgs img pictures pics photos jpegimages rgb frames unknown unlabeled unlabelled".split()
)
_BESIDE = frozenset(
    "masks mask labels label annotations annotation segmentation segmentations segmentationclass segmentationobject "
    "trimaps depth gt groundtruth ground_truth".split()
)
_ROLES = ("train", "validation", "test")
_PLAIN = frozenset("train training validation valid val test".split())  # words whose meaning needs no note


@dataclass
class Layout:
    """The pictures of each split with their class, None where it has none; and notes on what was decided."""

    splits: dict[str, list[tuple[str, str | None]]]
    notes: list[str]


@dataclass
class _Node:
    """A folder with pictures: `pictures` are those in the folder itself, `children` the folders in it that have some."""

    path: str = ""
    pictures: list[str] = field(default_factory=list)
    children: dict[str, _Node] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def all_pictures(self) -> Iterator[str]:
        todo = [self]
        while todo:
            node = todo.pop()
            yield from node.pictures
            todo += node.children.values()

    def only_child(self) -> _Node | None:
        return next(iter(self.children.values())) if len(self.children) == 1 else None


def read_layout(args: DataArguments, pictures: Iterable[str], folders: Iterable[str], labelled: bool = False) -> Layout:
    """Finds the splits and classes of a collection of pictures.

    Args:
        args: `dataset_name` for messages; the three `*_split` and `class_names`, which settle what is ambiguous.
        pictures: paths relative to the collection.
        folders: all its folders, also those without pictures.
        labelled: whether a metadata file gives the classes, so that folders need not.

    Raises:
        UserError: there are no classes, or two ways to read the folders.
    """
    return _Reader(args, labelled).read(_tree(pictures), folders)


def has_class_folders(pictures: Iterable[str]) -> bool:
    """Whether pictures lie in several folders beside each other, or in folders of splits, so that folders may be classes."""
    return len(_inside(_tree(pictures)).children) > 1


def _tree(pictures: Iterable[str]) -> _Node:
    root, known = _Node(), {}
    for picture in pictures:
        folder = picture.rpartition("/")[0]
        if folder not in known:
            node = root
            for part in filter(None, folder.split("/")):
                path = f"{node.path}/{part}" if node.path else part
                node = node.children.setdefault(part, _Node(path))
            known[folder] = node
        known[folder].pictures.append(picture)
    return root


def _same(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


class _Reader:
    def __init__(self, args: DataArguments, labelled: bool):
        self.args, self.labelled = args, labelled
        self.typed = {_same(n): n for n in (args.train_split, args.validation_split, args.test_split) if n}
        self.class_names = {_same(name) for name in args.class_names or ()}
        self.top = _Node()
        self.without_class: list[str] = []
        self.notes: list[str] = []

    def read(self, root: _Node, folders: Iterable[str]) -> Layout:
        top = self.top = self._read_through(root)
        splits = dict(sorted(self._splits(top).items(), key=lambda item: self._order(item[0])))
        splits = self._read_through_in(splits)
        rows = self._rows(splits)
        if self.without_class:
            count = len(self.without_class)
            lie = f"{many(count, 'picture')} {'lie' if count > 1 else 'lies'} in no class folder"
            self.notes.append(f"{lie}, left out: {some(sorted(self.without_class), 3)}.")
        parents = {top.path: top, **{node.path: node for node in splits.values()}}
        empty = []
        for folder in folders:
            above, _, name = folder.rpartition("/")
            if above in parents and name not in parents[above].children and name not in top.children:
                empty.append(folder)
        if empty:
            self.notes.append(f"Folders without a picture that can be read: {some(empty, 3)}.")
        return Layout(rows, self.notes)

    # -- splits --------------------------------------------------------------------------------------------------------
    def _read_through(self, node: _Node) -> _Node:
        """The folder whose subfolders are splits or classes: the first on the way down that holds more than one folder."""
        root = node
        while (child := node.only_child()) and child.children and not self._split_name(child.name):
            self.without_class += node.pictures
            node = child
        if node is not root:
            self.notes.append(f"Read from {node.path}, the only folder with pictures.")
        return node

    def _split_name(self, folder: str) -> str | None:
        """The split that a folder at the top is: the name that the user typed, or its role."""
        return self.typed.get(_same(folder)) or split_role(folder)

    def _is_train(self, split: str) -> bool:
        return split == (self.args.train_split or "train")

    def _order(self, split: str) -> tuple[int, str]:
        names = [getattr(self.args, f"{role}_split") or role for role in _ROLES]
        return (names.index(split) if split in names else len(names), split)

    def _splits(self, top: _Node) -> dict[str, _Node]:
        """The splits among the folders at the top. Without any, all of them are classes of the training split."""
        named = {name: split for name in top.children if (split := self._split_name(name))}
        typed = any(_same(name) in self.typed for name in named)
        if not typed and self.class_names.issuperset(map(_same, top.children)):
            named = {}
        others = {name: child for name, child in top.children.items() if name not in named}
        if named and not typed and not self.labelled and self._is_class(top, named, others):
            (name,) = named
            self.notes.append(f"{name!r} is read as a class like the folders beside it, because it has no subfolders.")
            named = {}
        if not named:
            return {"train": top}
        splits = self._one_folder_each(top, named)
        train = next((node for split, node in splits.items() if self._is_train(split)), None)
        inside = {name for node in splits.values() for name in node.children}
        if train is None and others and inside <= others.keys():
            self.notes.append(f"The folders beside {some(list(named))} are read as the classes of the training split.")
            return {self.args.train_split or "train": _Node(top.path, top.pictures, others), **splits}
        self.without_class += top.pictures
        return splits | self._further_splits(others, train.children.keys() if train else inside)

    def _is_class(self, top: _Node, named: dict[str, str], others: dict[str, _Node]) -> bool:
        """Whether a folder with the name of a split can only be a class.

        Raises:
            UserError: it may be either.
        """
        if not others:
            return False
        train = [name for name, split in named.items() if split == "train"]
        if not train:
            inside = {c for name in named for c in top.children[name].children}
            if (inside and inside <= others.keys()) or self.class_names.issuperset(map(_same, others)):
                return False  # cat/, dog/ and test/cat/, test/dog/
        elif not any(top.children[name].children for name in train):
            if len(named) == 1:
                return True
        elif len(named) > 1 or not any(
            c.children.keys() - top.children[train[0]].children.keys() for c in others.values()
        ):
            return False
        words = sorted(named)
        inside = {c for name in named for c in top.children[name].children}
        if not train and any(inside & child.children.keys() for child in others.values()):
            alike = [name for name, child in others.items() if inside & child.children.keys()]
            raise self._refused(
                f"found {some(words, 3)} beside {some(sorted(others), 3)}, which can be splits or classes. If they are splits, type "
                f"{self._as_splits(top, [*alike, *words])}. If they are classes, type {self._class_names(sorted(top.children))}."
            )
        role = {"train": "--train_split"}.get(named[words[0]], f"--{named[words[0]]}_split")
        raise self._refused(
            f"found {some(words, 3)} beside {some(sorted(others), 3)}, which can be a split or a class. If it is a split, type "
            f"{role} {shlex.quote(words[0])}. If it is a class, type {self._class_names(sorted(top.children))}."
        )

    def _one_folder_each(self, top: _Node, named: dict[str, str]) -> dict[str, _Node]:
        """The folder of each split. If several say the same, the first in the order of names is it, or the plainest."""
        splits: dict[str, _Node] = {}
        for name in sorted(named, key=lambda name: (_same(name) not in self.typed, name.lower() not in _PLAIN, name)):
            split = named[name]
            if split in splits:
                split = name.lower()
                if split in splits or not is_split_name(split):
                    raise self._refused(
                        f"expected one folder for each split, found {splits[named[name]].name} and {name}. Rename one, or type "
                        f"--{split_role(name) or 'test'}_split {shlex.quote(name)}."
                    )
                self.notes.append(f"{name!r} is a further split, which is used only where it is named.")
            elif _same(name) not in self.typed and name.lower() not in _PLAIN:
                self.notes.append(f"{name!r} is read as the {split} split.")
            splits[split] = top.children[name]
        return splits

    def _further_splits(self, others: dict[str, _Node], classes: Set[str]) -> dict[str, _Node]:
        """The folders beside the splits that hold classes of the training split."""
        further = {n: c for n, c in others.items() if c.children and c.children.keys() <= classes and is_split_name(n)}
        for name in sorted(further):
            self.notes.append(f"{name!r} is a further split, which is used only where it is named.")
        left = {name: sum(1 for _ in node.all_pictures()) for name, node in others.items() if name not in further}
        if left:
            shown = some([f"{name} ({many(left[name], 'picture')})" for name in sorted(left)], 5)
            one = shlex.quote(sorted(left)[0])
            self.notes.append(
                f"Left out, because they are beside the splits: {shown}. To use one, type --test_split {one}."
            )
        return further

    def _read_through_in(self, splits: dict[str, _Node]) -> dict[str, _Node]:
        """The same splits, without a folder that is alone in each of them and holds the classes (`train/images/cat`)."""
        train = next((node for split, node in splits.items() if self._is_train(split)), None)
        inner = train.only_child() if train else None
        if self.labelled or inner is None or not inner.children:
            return splits
        self.notes.append(f"Classes are read from {inner.path}, the only folder there.")
        result = {}
        for split, node in splits.items():
            child = node.only_child()
            through = child is not None and child.name not in inner.children
            self.without_class += node.pictures if through else []
            result[split] = child if through else node
        return result

    # -- classes -------------------------------------------------------------------------------------------------------
    def _rows(self, splits: dict[str, _Node]) -> dict[str, list[tuple[str, str | None]]]:
        rows, train_classes = {}, set()
        for split, node in splits.items():
            child = node.only_child()
            train = self._is_train(split)
            named = child is not None and _same(child.name) in _PICTURES | {_same(node.name)}
            if not train and named and not child.children and child.name not in train_classes:
                node = child  # test/images/1.jpg, as unlabelled test splits come
            if not node.children:
                if train and not self.labelled:
                    raise self._no_classes(node)
                rows[split] = [(picture, None) for picture in sorted(node.pictures)]
                continue
            depth = self._depth(node, train_classes)
            rows[split] = self._labelled(node, depth)
            if train:
                train_classes = {label for _, label in rows[split] if label is not None}
                if len(train_classes) < 2 and not self.labelled:
                    raise self._refused(
                        f"expected one subfolder of images per class, and two classes or more; found one: {some(list(train_classes))}."
                    )
            elif missing := sorted(train_classes - {label for _, label in rows[split]}):
                self.notes.append(
                    f"Split {split!r} lacks pictures of {len(missing)} of {len(train_classes)} classes: {some(missing, 5)}."
                )
        if splits and not any(rows.values()):
            raise self._no_classes(next(iter(splits.values())))
        return rows

    def _depth(self, node: _Node, train_classes: set[str]) -> int:
        """How far below a split the classes are: 1 as a rule; `class_names` can say that it is a lower level.

        0 if they are at several levels, each in the first folder on its way down that `class_names` has.

        Raises:
            UserError: two levels can be the classes.
        """
        if self.class_names:
            start = len(node.path) + 1 if node.path else 0
            ends = [end.path[start:].split("/") for end in _ends(node)]
            level, depth = [node], 0
            while level := [child for parent in level for child in parent.children.values()]:
                depth += 1
                if all(_same(child.name) in self.class_names for child in level):
                    if any(_same(name) in self.class_names for path in ends if len(path) < depth for name in path):
                        break
                    return depth
            if all(any(_same(name) in self.class_names for name in path) for path in ends):
                return 0
        if not self.labelled and not node.children.keys() <= train_classes:
            self._refuse_two_levels(node)
            self._refuse_hints(node)
        return 1

    def _labelled(self, node: _Node, depth: int) -> list[tuple[str, str | None]]:
        """The pictures below a split with the name of their folder at this depth, see `_depth`."""
        start = len(node.path) + 1 if node.path else 0
        rows = []
        for child in node.children.values():
            for picture in child.all_pictures():
                parts = picture[start:].split("/")
                if not depth:
                    rows.append((picture, next(name for name in parts if _same(name) in self.class_names)))
                elif len(parts) > depth:
                    rows.append((picture, parts[depth - 1]))
                else:
                    self.without_class.append(picture)
        if self.labelled:
            rows += [(picture, None) for picture in node.pictures]
        else:
            self.without_class += node.pictures
        return sorted(rows)

    def _refuse_two_levels(self, node: _Node) -> None:
        """Raises `UserError` if the folders below the classes look like classes or splits themselves."""
        names = {_same(name) for name in node.children}
        if names & _PICTURES and names & _BESIDE:
            holding = [c for c in node.children.values() if _same(c.name) in _PICTURES and len(_inside(c).children) > 1]
            how = self._alone(holding[0]) if holding else "--dataset_name with the folder of class folders"
            raise self._refused(
                f"found {some(sorted(node.children))}, which are no classes but pictures and what belongs to them. Type {how}, or "
                "--dataset_name FILE.csv with columns image and label."
            )
        # A few pictures beside the lower level do not make the upper one the level of the classes.
        upper = [
            c for c in node.children.values() if c.children and len(c.pictures) * 4 <= sum(1 for _ in c.all_pictures())
        ]
        for child in upper:
            inside = [name for name in child.children if split_role(name)]
            if len({split_role(name) for name in inside}) > 1:
                first, second = sorted(inside)[:2]
                apart = any(child.children[name].children for name in inside)
                raise self._refused(
                    f"found splits inside classes ({child.path}/{first}, {child.path}/{second}). Move them to the top "
                    f"({first}/{child.name}, {second}/{child.name}), or, to take all as one split, type "
                    f"{self._class_names(sorted(node.children))}{f'; or, for one folder alone, {self._alone(child)}' * apart}."
                )
        below = [{_same(name): name for name in child.children} for child in upper]
        ends = [{_same(end.name): end.name for end in _ends(child)} for child in upper]
        for level in (below, ends):
            counts = Counter(name for found in level for name in found)
            shared = sorted(name for found in level for same, name in found.items() if counts[same] > 1)
            shared = list(dict.fromkeys(shared))
            if len({_same(name) for name in shared}) < 2:
                continue
            alone = next(c for c, found in zip(upper, level, strict=True) if any(counts[same] > 1 for same in found))
            first, second = sorted(node.children), sorted({name for found in level for name in found.values()})
            raise self._refused(
                f"found two levels that can be the classes: {some(first, 3)}, or {some(shared, 3)} below them. For the first, type "
                f"{self._class_names(first)}. For the second, type {self._class_names(second)}; or, for one folder alone, "
                f"{self._alone(alone)}; or, if the first are splits, "
                f"{self._as_splits(node)}."
            )

    def _refuse_hints(self, node: _Node) -> None:
        """Raises `UserError` for folders like `pets_train/cat` and `pets_test/1.jpg`, which would become classes."""
        hints = {name: role for name in node.children if (role := role_within(name))}
        train = [name for name, role in hints.items() if role == "train"]
        if len(hints) * 2 < len(node.children) or len(train) in (0, len(hints)):
            return
        if any(len(_inside(node.children[name]).children) > 1 for name in train):
            raise self._refused(
                f"found {some(sorted(hints), 3)}, which can be splits or classes. If they are splits, type "
                f"{self._as_splits(node)}. If they are classes, type {self._class_names(sorted(node.children))}."
            )

    # -- messages ------------------------------------------------------------------------------------------------------
    def _class_names(self, names: list[str]) -> str:
        """What to type for these classes."""
        if len(names) <= 12:
            return f"--class_names {' '.join(map(shlex.quote, names))}"
        return f"--class_names with all {len(names):,} names ({some(names, 2)})"

    def _alone(self, node: _Node) -> str:
        """What to type to read one folder alone."""
        return f"--dataset_name {shlex.quote(f'{self.args.dataset_name}/{node.path}')}"

    def _as_splits(self, node: _Node, names: Iterable[str] | None = None) -> str:
        """What to type if folders of `node` are splits: words within their names say which; otherwise the first is for training."""
        names = sorted(node.children if names is None else names)
        with_classes = [name for name in names if len(_inside(node.children[name]).children) > 1]
        names = with_classes or names
        roles: dict[str, str] = {}
        for name in names:
            if role := role_within(name):
                roles.setdefault(role, name)
        roles.setdefault("train", next((name for name in names if not role_within(name)), names[0]))
        if len(roles) == 1 and len(names) > 1:
            roles["test"] = next(name for name in reversed(names) if name != roles["train"])
        inside = [] if node.path == self.top.path else [self._alone(node)]
        return " ".join(inside + [f"--{r}_split {shlex.quote(roles[r])}" for r in sorted(roles, key=_ROLES.index)])

    def _no_classes(self, node: _Node) -> UserError:
        where = f" in {node.path}" if node.path else ""
        count = many(sum(1 for _ in node.all_pictures()), "picture")
        windows = ""
        if any("\\" in picture for picture in node.pictures):
            windows = " The \\ in their names were folders in an archive of Windows: unpack it with unzip or 7z, which makes them."
        return self._refused(
            f"expected one subfolder of images per class{where}, and two classes or more; found {count} without a class "
            f"({some(sorted(node.pictures), 2)}).{windows} Move them, or type --dataset_name FILE.csv with columns image and label."
        )

    def _refused(self, reason: str) -> UserError:
        expected = "" if reason.startswith("expected") else "expected one subfolder of images per class, "
        return UserError(f"dataset {self.args.dataset_name!r}: {expected}{reason}")


def _inside(node: _Node) -> _Node:
    """The first folder on the way down that holds more than one folder, or none."""
    while (child := node.only_child()) and child.children:
        node = child
    return node


def _ends(node: _Node) -> Iterator[_Node]:
    """The folders below that hold pictures themselves."""
    for child in node.children.values():
        if child.pictures:
            yield child
        yield from _ends(child)


def is_split_name(name: str) -> bool:
    """Whether `datasets` takes this as the name of a split."""
    return re.fullmatch(r"\w+", name) is not None
