"""`merge_captions`: several captioned datasets of the same images become one. Captions keep their aspect and model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from datasets import ClassLabel, Dataset, concatenate_datasets

from ...core.console import some
from ...core.errors import UserError
from ...data.label_sets import LabelSets
from ...data.labels import class_names_of
from .dataset import CAPTION_FEATURES, captions_from
from .labelled import LabelledImages, note, record_key, with_columns


@dataclass
class MergeSummary:
    """What a merge did.

    Args:
        rows: of each dataset, by its name.
        images, records, captions: of the result; `images` are its rows.
        repeated: records that occur more than once, of which one was kept.
        missing: by dataset, the names of the images in the result that it lacks.
        remapped: datasets that number their classes in another order than the first one.
        unreadable: by dataset, the names of the images that cannot be read, and therefore cannot be found in another
            dataset. Only those of the first dataset are in the result.
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
        """The summary in sentences."""
        lines = [
            f"{len(self.rows)} datasets became {self.images:,} images with {self.captions:,} captions "
            f"({self.records:,} records; {self.repeated:,} that repeat others were left out)."
        ]
        for name, images in self.missing.items():
            lines += note(f"{name}: ", images, "of the images are not in it")
        lines += [f"{name}: its classes are in another order; they were matched by name." for name in self.remapped]
        for name, images in self.unreadable.items():
            lines += note(f"{name}: ", images, "images cannot be read")
        return lines


def merge_captions(datasets: Mapping[str, Dataset]) -> tuple[Dataset, MergeSummary]:
    """Joins captioned datasets of the same images, from several runs, models or aspects.

    Images are the same if their bytes and their classes are equal. Rows keep the order of the first dataset that has them;
    the aspects, models and prompts of the records stay as they are. An image that a dataset contains twice stays there
    twice, and both rows get all captions.

    Args:
        datasets: by a name for messages; columns `image`, `label` (`ClassLabel`, or lists of it), and `captions` or
            `caption_records`.

    Returns:
        The dataset, with classes numbered as in the first one, and a summary.

    Raises:
        UserError: fewer than two datasets; one without captions; a class that the first one lacks; an image with different
            classes in two datasets; columns that cannot be used.
    """
    if len(datasets) < 2:
        raise UserError(f"datasets to merge: expected two or more, found {len(datasets)}.")
    if sets := LabelSets.of(datasets):
        classes = {name: sets.as_classes(dataset, name) for name, dataset in datasets.items()}
        merged, summary = merge_captions(classes)
        own = {name: class_names_of(dataset) for name, dataset in datasets.items()}
        summary.remapped = [name for name, names in own.items() if names != sets.class_names[: len(names)]]
        return sets.restored(merged), summary
    parts = [LabelledImages(name, dataset, captioned=True) for name, dataset in datasets.items()]
    first, names = parts[0], parts[0].class_names
    summary = MergeSummary({part.name: len(part.labels) for part in parts})
    merged: dict[tuple[str, int], tuple[dict, list[str]]] = {}  # by hash and label: records, and captions without one
    labels_of: dict[str, dict[int, str]] = {}  # by hash: its labels, and the dataset that has each
    images, order, keys_of = [], [], {}
    for part in parts:
        if unknown := [name for name in part.class_names if name not in names]:
            raise UserError(
                f"{part.name}: expected the classes of {first.name} ({some(names, 3)}), found {some(unknown, 3)}. Rename "
                "them, or name the dataset that has all classes first."
            )
        number = [names.index(name) for name in part.class_names]
        if number != list(range(len(number))):
            summary.remapped.append(part.name)
        summary.unreadable[part.name] = part.unreadable()
        hashes = [sha or f"row {row} of {part.name}" for row, sha in enumerate(part.hashes)]
        keys = [(sha, number[label]) for sha, label in zip(hashes, part.labels, strict=True)]
        _check_classes(part, keys, labels_of, names)
        new = [row for row, key in enumerate(keys) if key not in merged and (part.hashes[row] or part is first)]
        for row, key in enumerate(keys):
            records, captions = merged.setdefault(key, ({}, []))
            for record in part.records[row]:
                summary.repeated += record_key(record) in records
                records.setdefault(record_key(record), record)
            captions += part.captions[row]
        keys_of[part.name] = set(keys)
        if new:
            unlabelled = part.images.remove_columns("label")
            images.append(unlabelled if len(new) == len(unlabelled) else unlabelled.select(new))
            order += [(keys[row], part.hashes[row], part.image_name(row)) for row in new]
    columns = {
        "label": [label for (_, label), _, _ in order],
        "captions": [captions_from(merged[key][0].values(), merged[key][1]) for key, _, _ in order],
        "caption_records": [list(merged[key][0].values()) for key, _, _ in order],
        "image_sha256": [sha for _, sha, _ in order],
    }
    try:
        joined = concatenate_datasets(images)
    except ValueError as error:
        raise UserError(f"datasets to merge: expected columns of the same types, found {error}") from error
    result = with_columns(joined, columns, {"label": ClassLabel(names=names), **CAPTION_FEATURES})
    ordered = [name for name in first.columns if name in result.column_names]
    result = result.select_columns(ordered + [name for name in result.column_names if name not in ordered])
    summary.images = len(result)
    summary.captions = sum(map(len, columns["captions"]))
    summary.records = sum(map(len, columns["caption_records"]))
    summary.missing = {name: [image for key, _, image in order if key not in keys] for name, keys in keys_of.items()}
    return result, summary


def _check_classes(part: LabelledImages, keys: list, labels_of: dict[str, dict[int, str]], names: list[str]) -> None:
    """Refuses an image whose class differs between datasets: one is wrong, and captions name the class.

    `keys` are the hash and the label of each row. `labels_of` is brought up to date.
    """
    own: dict[str, dict[int, str]] = {}
    for sha, label in keys:
        own.setdefault(sha, {})[label] = part.name
    for row, (sha, _) in enumerate(keys):
        before = labels_of.get(sha)
        if before and not before.keys() & own[sha].keys():
            (label, name), (other, _) = next(iter(before.items())), next(iter(own[sha].items()))
            raise UserError(
                f"{part.name}, row {row} ({part.image_name(row)}, sha256 {sha[:12]}): expected class "
                f"{names[label]!r} as in {name}, found {names[other]!r}. Correct one of them."
            )
    for sha, labels in own.items():
        labels_of[sha] = {**labels, **labels_of.get(sha, {})}
