"""Pictures with several labels, where each needs one class: every set of labels that occurs becomes a class of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
from datasets import ClassLabel, Dataset, List

from ..core.console import some
from ..core.errors import UserError
from .columns import LISTS, with_values
from .labels import class_label, class_names_of, has_several, one_form
from .texts import joined_class_names


@dataclass(frozen=True)
class LabelSets:
    """The sets of labels that pictures have.

    Args:
        class_names: of the labels.
        sets: the numbers of the labels of each set, sorted; empty for pictures of no class.
    """

    class_names: list[str]
    sets: list[tuple[int, ...]]

    @classmethod
    def of(cls, data: Mapping[str, Dataset]) -> LabelSets | None:
        """The sets of all pictures; None if each has one label.

        Args:
            data: splits or datasets, by a name for messages. Labels are matched by name, and numbered as in the first one.

        Raises:
            UserError: one has lists of labels, another has not; a class that the first one lacks; no list in a row; two sets
                whose names read alike.
        """
        if not any(isinstance(dataset.features.get("label"), LISTS) for dataset in data.values()):
            return None
        first, names = next((name, class_label(dataset.features["label"])) for name, dataset in data.items())
        for name, dataset in data.items():
            kind = dataset.features.get("label")
            if class_label(kind) is None or not has_several(dataset):
                raise UserError(f"{name}: expected lists of classes, as other datasets or splits have, found {kind}.")
            unknown = set(map(one_form, class_names_of(dataset))) - set(map(one_form, names.names))
            if unknown:
                raise UserError(
                    f"{name}: expected the classes of {first} ({some(names.names, 3)}), found {some(sorted(unknown), 3)}. Rename "
                    "them, or name the dataset that has all classes first."
                )
        found = cls(list(names.names), [])
        rows = (own for name, dataset in data.items() for own in found._rows(dataset, name))
        found.sets.extend(sorted(set(rows), key=lambda own: (len(own), own)))
        seen: dict[str, tuple[int, ...]] = {}
        for name, own in zip(found.names, found.sets, strict=True):
            if name in seen:
                alike = [[found.class_names[c] for c in labels] for labels in (seen[name], own)]
                raise UserError(
                    f"label: the classes {alike[0]} and {alike[1]} of two pictures read alike in a prompt: {name!r}. Rename a class."
                )
            seen[name] = own
        return found

    @property
    def names(self) -> list[str]:
        """The name of each set, as training texts have it: `red, round`."""
        return [joined_class_names(self.class_names, own) for own in self.sets]

    def _rows(self, dataset: Dataset, name: str) -> list[tuple[int, ...]]:
        """The set of each row."""
        place = {one_form(name): number for number, name in enumerate(self.class_names)}
        number = [place[one_form(own)] for own in class_names_of(dataset)]
        rows = []
        for row, labels in enumerate(dataset["label"][:]):
            if labels is None or not all(label is not None and 0 <= label < len(number) for label in labels):
                raise UserError(
                    f"{name}, row {row}: expected a list of classes from 0 to {len(number) - 1}, found {labels}. Correct the row or "
                    "remove it; an empty list says that no class holds."
                )
            rows.append(tuple(sorted({number[label] for label in labels})))
        return rows

    def as_classes(self, dataset: Dataset, name: str = "dataset") -> Dataset:
        """The dataset with the set of each row as its class."""
        place = {own: number for number, own in enumerate(self.sets)}
        values = pa.array([place[own] for own in self._rows(dataset, name)], pa.int64())
        return with_values(dataset, "label", values, ClassLabel(names=self.names))

    def restored(self, dataset: Dataset) -> Dataset:
        """The dataset with lists of labels in place of the classes of `as_classes`."""
        values = pa.array([list(self.sets[number]) for number in dataset["label"][:]], pa.list_(pa.int64()))
        return with_values(dataset, "label", values, List(ClassLabel(names=self.class_names)))

    def having(self, labels: set[int]) -> set[int]:
        """The sets in which any of these labels is."""
        return {number for number, own in enumerate(self.sets) if not labels.isdisjoint(own)}
