"""`merge_captions`: several captioned data sets of the same images become one; captions keep aspect and model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from datasets import ClassLabel, Dataset, Image, concatenate_datasets

from ...core.errors import UserError
from .dataset import CAPTION_FEATURES
from .tables import CaptionTable, few, put_beside, record_key, texts_of


@dataclass
class MergeReport:
    """What a merge did.

    Args:
        rows: of each data set, by its name.
        images, records, captions: of the result; `images` are its rows.
        repeated: records that are there more than once, and that were taken once.
        missing: by data set, the names of the images in the result that it does not have.
        remapped: data sets whose classes are numbered in another order than the first one's.
        unreadable: by data set, the names of the images that cannot be read, and so not be found in another data set.
            Only those of the first are in the result.
    """

    rows: dict[str, int]
    images: int = 0
    records: int = 0
    captions: int = 0
    repeated: int = 0
    missing: dict[str, list[str]] = field(default_factory=dict)
    remapped: list[str] = field(default_factory=list)
    unreadable: dict[str, list[str]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The same in sentences."""
        lines = [
            f"{len(self.rows)} data sets became {self.images:,} images with {self.captions:,} captions "
            f"({self.records:,} records; {self.repeated:,} that repeat others were left out)."
        ]
        for name, absent in self.missing.items():
            if absent:
                lines.append(f"{name}: {len(absent):,} of the images are not in it: {few(absent)}.")
        for name in self.remapped:
            lines.append(f"{name}: its classes are in another order; they were matched by name.")
        for name, pictures in self.unreadable.items():
            if pictures:
                lines.append(f"{name}: {len(pictures):,} images cannot be read: {few(pictures)}.")
        return lines


def merge_captions(datasets: Mapping[str, Dataset]) -> tuple[Dataset, MergeReport]:
    """Joins captioned data sets of the same images, from several runs, models or aspects, into one.

    Images are the same if their bytes and classes are. Their rows come from the first data set that has them, in its
    order; the aspects, models and prompts of the records stay as they are. Pictures that a data set has twice stay
    there twice, and both get all captions.

    Args:
        datasets: by a name for messages; columns `image`, `label` (`ClassLabel`) and `captions` or `caption_records`.

    Returns:
        The data set, with classes numbered as in the first, and a report.

    Raises:
        UserError: fewer than two data sets, one without captions, a class that the first does not know, an image whose
            class differs, or columns that cannot be used.
    """
    if len(datasets) < 2:
        raise UserError(f"data sets to merge: expected two or more, found {len(datasets)}.")
    report = MergeReport({name: len(dataset) for name, dataset in datasets.items()})
    tables = [CaptionTable(name, dataset, captioned=True) for name, dataset in datasets.items()]
    names = tables[0].class_names
    merged: dict[tuple[str, int], tuple[dict, list[str]]] = {}  # by hash and label: records, and captions without one
    labels_of: dict[str, dict[int, str]] = {}  # by hash: its labels, and the data set that has each
    parts, order, have = [], [], []
    for table in tables:
        if unknown := [name for name in table.class_names if name not in names]:
            raise UserError(
                f"{table.name}: expected the classes of {tables[0].name} ({few(names)}), found {few(unknown)}. Rename "
                "them, or name the data set that has all classes first."
            )
        number = [names.index(name) for name in table.class_names]
        if number != list(range(len(number))):
            report.remapped.append(table.name)
        report.unreadable[table.name] = table.unreadable()
        hashes = [sha or f"row {row} of {table.name}" for row, sha in enumerate(table.hashes)]
        keys = [(sha, number[label]) for sha, label in zip(hashes, table.labels, strict=True)]
        _check_classes(table, keys, labels_of, names)
        known = set(merged)
        new = [row for row, key in enumerate(keys) if key not in known and (table.hashes[row] or not parts)]
        for row, key in enumerate(keys):
            records, captions = merged.setdefault(key, ({}, []))
            for record in table.records[row]:
                report.repeated += record_key(record) in records
                records.setdefault(record_key(record), record)
            captions += table.captions[row]
        have.append(set(keys))
        if new:
            part = table.rest.remove_columns("label")
            parts.append(part if len(new) == len(part) else part.select(new))
            order += [(keys[row], table.hashes[row], table.image_name(row)) for row in new]
    columns = {
        "label": [label for (_, label), _, _ in order],
        "captions": [texts_of(merged[key][0].values(), merged[key][1]) for key, _, _ in order],
        "caption_records": [list(merged[key][0].values()) for key, _, _ in order],
        "image_sha256": [sha for _, sha, _ in order],
    }
    try:
        images = concatenate_datasets(parts)
    except ValueError as error:
        raise UserError(f"data sets to merge: expected columns of the same types, found {error}") from error
    result = put_beside(images, columns, {"label": ClassLabel(names=names), **CAPTION_FEATURES})
    first = [name for name in tables[0].columns if name in result.column_names]
    result = result.select_columns(first + [name for name in result.column_names if name not in first])
    report.images = len(result)
    report.captions = sum(map(len, columns["captions"]))
    report.records = sum(map(len, columns["caption_records"]))
    for name, keys in zip(datasets, have, strict=True):
        report.missing[name] = [image for key, _, image in order if key not in keys]
    return result.cast_column("image", Image()), report


def _check_classes(table: CaptionTable, keys: list, labels_of: dict[str, dict[int, str]], names: list[str]) -> None:
    """Refuses an image that has one class here and another there: one of them is wrong, and captions name the class.

    `keys` are the hash and the label of each row, `labels_of` is brought up to date.
    """
    own: dict[str, dict[int, str]] = {}
    for sha, label in keys:
        own.setdefault(sha, {})[label] = table.name
    for row, (sha, _) in enumerate(keys):
        before = labels_of.get(sha)
        if before and not before.keys() & own[sha].keys():
            (label, name), (other, _) = next(iter(before.items())), next(iter(own[sha].items()))
            raise UserError(
                f"{table.name}, row {row} ({table.image_name(row)}, sha256 {sha[:12]}): expected class "
                f"{names[label]!r} as in {name}, found {names[other]!r}. Correct one of them."
            )
    for sha, labels in own.items():
        labels_of[sha] = {**labels, **labels_of.get(sha, {})}
