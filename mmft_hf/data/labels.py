"""Labels are matched by the names of their classes: numbers mean something only beside the names that they came with."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, List, Value

from ..core.console import some
from ..core.errors import UserError, nearest
from .columns import LISTS, NULL, TEXT, column_of, entries_of
from .texts import clean_class_name

_UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))  # not the joiners, which change letters and emoji
MISSING = -1  # a row without a class: null, -1, NaN or blank text in the data
TOWER_WORDS = 70  # what a text tower with 77 tokens can read behind "a photo of a" if every word is one token


def one_form(name: str) -> str:
    """A class name in Unicode's composed form (NFC): macOS writes accents in another one."""
    return unicodedata.normalize("NFC", name)


def same_name(class_name: str) -> str:
    """Equal for names that no prompt can tell apart: they differ only in case, blanks, hyphens, underscores or Unicode form.

    Characters that nobody can see (a blank without width, a soft hyphen) do not count.
    """
    return one_form(clean_class_name(class_name.translate(_UNSEEN))).casefold()


def joined_names(lists: Iterable[Sequence[str]]) -> list[str]:
    """The names of all lists, each once, in the order in which they first appear."""
    return list(dict.fromkeys(one_form(name) for names in lists for name in names))


def class_label(kind) -> ClassLabel | None:
    """The classes of a column of classes, or of lists of classes; None for another type."""
    kind = kind.feature if isinstance(kind, LISTS) else kind
    return kind if isinstance(kind, ClassLabel) else None


def class_names_of(dataset: Dataset) -> list[str]:
    """The class names of a loaded dataset."""
    return class_label(dataset.features["label"]).names


def has_several(dataset: Dataset) -> bool:
    """Whether a picture of a loaded dataset may have several labels: its column `label` holds lists."""
    return isinstance(dataset.features["label"], LISTS)


def refuse_several(dataset: Dataset, what: str) -> None:
    """Raises `UserError` if a picture may have several labels, which `what` cannot use."""
    if has_several(dataset):
        raise UserError(
            f"{what}: expected one class for each picture, found a list of labels. Type --label_column NAME of a column with one "
            "class; for several labels there is mmft-hf finetune."
        )


def refuse_without_classes(dataset: Dataset, split: str) -> None:
    """Raises `UserError` if each picture has an empty list of labels: average precision is not defined then."""
    if has_several(dataset) and not labels_of(dataset).any():
        raise UserError(
            f"{split} split: expected pictures with a class, found {len(dataset):,} empty lists alone, by which nothing can be "
            "measured. Add pictures with classes."
        )


def labels_of(dataset: Dataset) -> np.ndarray:
    """The labels: int64 `(rows,)`; or where a picture may have several, float32 `(rows, C)` with 1 for each of its classes.

    No other column is read.
    """
    if not has_several(dataset):
        return np.asarray(dataset["label"][:], dtype=np.int64)
    codes, _, rows = entries_of(column_of(dataset, "label"))
    found = np.zeros((len(dataset), len(class_names_of(dataset))), dtype=np.float32)
    found[rows, codes.to_numpy()] = 1
    return found


def images_per_class(dataset: Dataset) -> np.ndarray:
    """How many pictures have each class, int64 `(C,)`."""
    labels = labels_of(dataset)
    if labels.ndim == 2:
        return labels.sum(axis=0).astype(np.int64)
    return np.bincount(labels, minlength=len(class_names_of(dataset)))


@dataclass
class Labels:
    """The labels of one split as numbers, and what the numbers mean.

    Args:
        codes: int64; of each row, `MISSING` where it has no class; or of each entry of all lists.
        names: the name of each code; None if the data have plain numbers.
        ordered: whether the order of the names is the data's own (`ClassLabel`), or only that of sorted texts.
        where: the column and split, for messages.
        row_of: int64, the row of each entry, where rows have lists of labels; else None.
        listed: bool `(rows,)`, which rows have a list, be it empty; else None.
    """

    codes: np.ndarray
    names: list[str] | None
    ordered: bool
    where: str
    row_of: np.ndarray | None = None
    listed: np.ndarray | None = None

    @classmethod
    def of(
        cls, dataset: Dataset, where: str, typed: Sequence[str] | None = None, separator: str | None = None
    ) -> Labels:
        """Reads the column `label`: `ClassLabel`, text, whole numbers, or lists of them.

        Args:
            typed (*optional*): `--class_names`, which may be numbers with fractions.
            separator (*optional*): what stands between the labels of a text; lists need none.

        Raises:
            UserError: other types, fractions, or a number outside the names; a list with an entry that is no class.
        """
        kind, values = dataset.features["label"], column_of(dataset, "label")
        if separator is not None and not isinstance(kind, LISTS):
            kind, values = List(Value("string")), separated(values, kind, separator, where)
        if not isinstance(kind, LISTS):
            return cls._read(kind, values, where, typed)
        entries, _, row_of = entries_of(values)
        fractions = isinstance(kind.feature, Value) and kind.feature.dtype.startswith(("float", "decimal"))
        if fractions or isinstance(kind.feature, LISTS):
            raise UserError(f"{where}: expected lists of class names or of whole numbers, found {kind}.")
        found = cls._read(kind.feature, pa.chunked_array([entries]), where, typed, row_of)
        if (wrong := np.flatnonzero(found.codes == MISSING)).size:
            raise UserError(
                f"{where}, row {row_of[wrong[0]]}: expected a class in each entry of the list, found one without (nothing, blank "
                "text or -1). Take it out of the list; an empty list says that no class holds."
            )
        found.row_of, found.listed = row_of, values.is_valid().to_numpy()
        return found

    @classmethod
    def _read(
        cls,
        kind,
        values: pa.ChunkedArray,
        where: str,
        typed: Sequence[str] | None,
        row_of: np.ndarray | None = None,
    ) -> Labels:
        if kind == NULL:
            return cls(np.full(len(values), MISSING), [], False, where)
        if kind in TEXT:
            values = pc.fill_null(values.cast(pa.string()), "")
            found = (
                values.dictionary_encode().combine_chunks()
                if values.num_chunks
                else pa.array([""]).dictionary_encode()[:0]
            )
            own = [one_form(name) for name in found.dictionary.to_pylist()]
            names = in_order({name for name in own if name.strip()})
            place = {name: i for i, name in enumerate(names)}
            codes = np.array([place.get(name, MISSING) for name in own], dtype=np.int64)[found.indices.to_numpy()]
            return cls(codes, names, False, where)
        if isinstance(kind, ClassLabel):
            codes = pc.fill_null(values.cast(pa.int64()), MISSING).to_numpy()
            refuse_outside(codes, len(kind.names), where, kind.names, row_of=row_of)
            names = joined_names([kind.names])
            return cls(renumbered(codes, kind.names, names), names, True, where)
        number = isinstance(kind, Value) and kind.dtype.startswith(("int", "uint", "float", "decimal"))
        if not number:
            known = "true and false: write the name of a class instead" if kind == Value("bool") else f"{kind}"
            raise UserError(f"{where}: expected class names or numbers, found {known}.")
        if not kind.dtype.startswith(("int", "uint")):
            numbers = pc.fill_null(values.cast(pa.float64()), MISSING).to_numpy()
            numbers = np.where(np.isnan(numbers), MISSING, numbers)
            wrong = np.flatnonzero(~(np.isfinite(numbers) & (numbers == np.floor(numbers)) & (np.abs(numbers) < 2**53)))
            if len(wrong):
                texts = [str(value) for value in np.unique(numbers[numbers != MISSING]).tolist()]
                if set(texts) <= set(typed or ()):
                    place = {name: number for number, name in enumerate(texts)}
                    return cls(np.array([place.get(str(n), MISSING) for n in numbers.tolist()]), texts, False, where)
                how = f" If these are names, type --class_names {' '.join(texts)}" if len(texts) <= 20 else ""
                raise UserError(
                    f"{where}, row {wrong[0]}: expected a class, found the number {numbers[wrong[0]]:g} with a fraction. "
                    f"Type --label_column NAME of the column with the class.{how}"
                )
            return cls(numbers.astype(np.int64), None, False, where)
        try:
            values = values.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise UserError(
                f"{where}: expected the numbers of classes, found {pc.max(values).as_py()}. Correct the row, or type --label_column NAME "
                "of the column with the class."
            ) from error
        return cls(pc.fill_null(values, MISSING).to_numpy(), None, False, where)

    @property
    def several(self) -> bool:
        """Whether a row may have several labels."""
        return self.row_of is not None

    @property
    def labelled(self) -> np.ndarray:
        """Which rows have a class, or a list of them, bool `(rows,)`. An empty list counts: it says that no class holds."""
        return self.listed if self.several else self.codes != MISSING

    def has_any(self) -> bool:
        """Whether any row has a class."""
        return bool(self.labelled.any())

    def column(self, codes: np.ndarray, names: list[str]) -> tuple[pa.Array, ClassLabel | List]:
        """The column `label` with these codes, as numbers of `names`, and its type. In a list, each class is once, in order."""
        kind = ClassLabel(names=names)
        if not self.several:
            return pa.array(codes, mask=codes == MISSING), kind
        pairs = np.unique(np.stack([self.row_of, codes]), axis=1)  # sorted by row, then by class
        offsets = np.searchsorted(pairs[0], np.arange(len(self.listed) + 1)).astype(np.int32)
        lists = pa.ListArray.from_arrays(offsets, pairs[1], mask=pa.array(~self.listed))
        return lists, List(kind)

    def used(self) -> list[str]:
        """The names that rows have."""
        return [self.names[code] for code in np.unique(self.codes).tolist() if code != MISSING]

    def without(self, names: Set[str]) -> Labels:
        """The labels, numbered without these names, which no row has."""
        kept = [name for name in self.names if name not in names]
        place = {name: number for number, name in enumerate(kept)}
        table = np.array([*(place.get(name, MISSING) for name in self.names), MISSING], dtype=np.int64)
        return replace(self, codes=table[self.codes], names=kept)

    def under(self, classes: ClassList) -> np.ndarray:
        """The labels as numbers of `classes`, int64 `(rows,)`; rows without a class stay `MISSING`.

        Raises:
            UserError: plain numbers where no names were typed; a class that is not among them.
        """
        if self.names is None:
            if not classes.typed:
                raise UserError(
                    f"{self.where}: expected class names, found plain numbers ({len(np.unique(self.codes))} different ones), which "
                    f"cannot be matched with classes or used in a prompt. Type --class_names NAME_OF_0 NAME_OF_1 …"
                )
            refuse_outside(self.codes, len(classes.names), self.where, classes.names, classes.first, self.row_of)
            return np.where(self.codes == MISSING, MISSING, self.codes - classes.first)
        table = np.array([*(classes.number_of.get(name, -2) for name in self.names), MISSING], dtype=np.int64)
        codes = table[self.codes]  # MISSING takes the last entry
        unknown = np.flatnonzero(codes == -2)
        if len(unknown):
            name = self.names[self.codes[unknown[0]]]
            raise UserError(
                f"{self.where}, row {_row(unknown[0], self.row_of)}: label {name!r} is outside the class list ({len(classes.names)} classes: "
                f"{some(classes.names)}).{nearest(name, classes.names)} Correct the row, or leave the split out; one with pictures of "
                "other classes may be the --unknown_split."
            )
        return codes


@dataclass
class ClassList:
    """The classes of a model or a dataset.

    Args:
        names: in the order of their numbers.
        number_of: the number of each name that data may have.
        typed: whether the user typed the names, so that plain numbers have a meaning.
        first: the plain number that the first name belongs to: 0, or 1.
        note: what a user may want to check; empty if there is nothing.
    """

    names: list[str]
    number_of: Mapping[str, int]
    typed: bool = False
    first: int = 0
    note: str = ""

    @classmethod
    def of_names(cls, names: Sequence[str]) -> ClassList:
        """Classes that are matched by name alone."""
        return cls(list(names), {one_form(name): number for number, name in enumerate(names)})

    @classmethod
    def of(cls, labels: Labels, typed: Sequence[str] | None = None, partial: bool = False) -> ClassList:
        """The classes of a training split, or of the split that a model is evaluated on.

        Typed names may be the data's own in any order. Names that are numbers, and plain numbers, take them by value: name k is
        that of number k, or of number k + 1 if that alone fits, since the data count from 1. The names of a `ClassLabel` column,
        which have numbers of their own, may be replaced as a whole.

        Args:
            labels: of the split.
            typed (*optional*): `--class_names`.
            partial: whether the split may lack classes.

        Raises:
            UserError: plain numbers without typed names; typed names that do not fit; names that no prompt can tell apart.
        """
        if not typed:
            if labels.names is None:
                labels.under(cls([], {}))
            refuse_equal(labels.names)
            return cls.of_names(labels.names)
        typed = [one_form(name) for name in typed]
        refuse_equal(typed)
        by_name = {name: number for number, name in enumerate(typed)}
        used = [] if labels.names is None else labels.used()
        if labels.names is None:
            values = np.unique(labels.codes[labels.codes != MISSING]).tolist()
            first = 1 if _first(values, len(typed), partial) == 1 else 0  # `under` refuses numbers that do not fit
            return cls(typed, by_name, True, first, _numbering(values, typed, first) if first else "")
        if set(used) <= set(typed):
            return cls(typed, by_name, typed=True)
        if all(map(_is_number, used)) and not set(used) & set(typed):
            values = sorted(map(int, used))
            first = _first(values, len(typed), partial) if len(set(values)) == len(values) else None
            if first is not None:
                numbers = {name: int(name) - first for name in labels.names if _is_number(name)}
                numbers = {name: number for name, number in numbers.items() if 0 <= number < len(typed)}
                return cls(typed, by_name | numbers, True, first, _numbering(values, typed, first))
        elif labels.ordered and len(typed) == len(labels.names):
            own = {same_name(name): number for number, name in enumerate(labels.names)}
            if all(own.get(same_name(name), number) == number for number, name in enumerate(typed)):
                pairs = zip(range(len(typed)), labels.names, typed, strict=True)
                renamed = [f"{number} {before} is now {now}" for number, before, now in pairs if before != now]
                note = f"--class_names renames the classes by their numbers: {some(renamed, 3)}."
                numbers = {name: number for number, name in enumerate(labels.names)}
                return cls(typed, by_name | numbers, typed=True, note=note)
        raise UserError(
            f"--class_names: expected the data's own {len(labels.names)} names in any order ({some(labels.names, 20)}), found "
            f"{len(typed)} names ({some(typed, 20)}). Names of other classes are taken where the data have the numbers 0, 1, … or "
            "1, 2, … instead. Correct the list, or rename the classes in the data."
        )


def named_labels(rows: Dataset, column: str) -> Labels | None:
    """The labels of rows that may have any: one for each row, with names; None if there are no such labels."""
    if column not in rows.column_names:
        return None
    try:
        labels = Labels.of(
            rows.select_columns(column).rename_columns({column: "label"} if column != "label" else {}), column
        )
    except UserError:  # of a kind that no classifier has
        return None
    return None if labels.several or not labels.names else labels


def renumbered(codes: np.ndarray, own: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Numbers of `own` names as numbers of `names`, which has all of them. `MISSING` stays."""
    place = {name: number for number, name in enumerate(names)}
    return np.array([*(place[one_form(name)] for name in own), MISSING], dtype=np.int64)[codes]


def _first(values: Sequence[int], count: int, partial: bool) -> int | None:
    """The number that the first of `count` names belongs to, if the data have these sorted numbers; None: they do not fit."""
    for first in (0, 1):
        if values and first <= values[0] and values[-1] < first + count and (partial or len(values) == count):
            return first
    return None


def _numbering(values: Sequence[int], names: Sequence[str], first: int) -> str:
    pairs = [f"{value} is {names[value - first]}" for value in values]
    return f"--class_names names the numbers in the data: {some(pairs, 3)}."


def separated(values: pa.ChunkedArray, kind, separator: str, where: str) -> pa.ChunkedArray:
    """Lists of labels from texts with a separator between them. Blanks around a label, and empty parts, do not count.

    An empty text is no list, but a missing label; the separator alone is an empty list.
    """
    if not separator:
        raise UserError(
            "--label_separator: expected what stands between the labels of a text, found nothing. Type, for example, "
            "--label_separator ';', or leave it out."
        )
    if kind not in TEXT and not (isinstance(kind, Value) and kind.dtype.startswith(("int", "uint"))) and kind != NULL:
        raise UserError(f"--label_separator: expected text, found {kind} in {where}. Leave it out.")
    texts = values.cast(pa.string()).to_pylist()
    lists = [
        None if text is None or not text.strip() else [part.strip() for part in text.split(separator) if part.strip()]
        for text in texts
    ]
    return pa.chunked_array([pa.array(lists, pa.list_(pa.string()))])


def _row(entry: int, row_of: np.ndarray | None) -> int:
    return entry if row_of is None else row_of[entry]


def refuse_outside(
    codes: np.ndarray,
    count: int,
    where: str,
    names: Sequence[str] = (),
    first: int = 0,
    row_of: np.ndarray | None = None,
) -> None:
    """Raises `UserError` with the first row whose number is neither a class nor `MISSING`. Classes count from `first`.

    Args:
        row_of: the row of each code, where rows have lists of them.
    """
    wrong = np.flatnonzero((codes != MISSING) & ((codes < first) | (codes >= first + count)))
    if len(wrong):
        raise UserError(
            f"{where}, row {_row(wrong[0], row_of)}: label {codes[wrong[0]]} is outside the class list ({count} classes: {some(names)}). Correct "
            "the row, or leave the split out."
        )


def refuse_equal(names: Sequence[str]) -> None:
    """Raises `UserError` for names that no prompt can tell apart, or that are blank."""
    seen: dict[str, str] = {}
    how = "Give one of them another name (rename its folder, or type --class_names with all names)."
    for name in names:
        key = same_name(name)
        if not key:
            raise UserError(f"expected a name for each class, found {name!r}, which no prompt can show. {how}")
        start = " ".join(key.split()[:TOWER_WORDS])
        if start in seen:
            why = (
                "no prompt can tell them apart"
                if start == key
                else f"a text tower reads their first {TOWER_WORDS} words at most"
            )
            raise UserError(f"two classes have the same name, {seen[start][:200]!r} and {name[:200]!r}: {why}. {how}")
        seen[start] = name


def in_order(names: Iterable[str]) -> list[str]:
    """Sorted names; numbers by their value."""
    names = sorted(names)
    return sorted(names, key=int) if all(map(_is_number, names)) else names


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) <= 18
