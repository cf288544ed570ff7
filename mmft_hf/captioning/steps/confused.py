"""Questions about classes that a classifier confuses on validation: what tells one from the other."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

import numpy as np

from ...core.errors import UserError
from ...core.reading import read_json
from ...data.raw import role_within

EVALUATE = (
    "mmft-hf evaluate --model_name_or_path RUN --dataset_name DATA --test_split validation --output_dir EVALUATED"
)


class _Class(TypedDict):
    label: str


class _Report(TypedDict):
    per_class: list[_Class]
    confusion_matrix: list[list[int]]


def questions_of_confusions(name: str, where: str, most: int = 2) -> dict[str, list[str]]:
    """For each class that is confused with others, what tells it from each of the `most` frequent ones.

    Args:
        name: the `report.json` of `mmft-hf evaluate`; both directions of a confusion count.
        where: the setting, for messages.

    Raises:
        UserError: no such file; it is not of a validation split, whose images nothing is judged on; nothing is confused.
    """
    try:
        report = read_json(Path(name), _Report)
    except FileNotFoundError:
        raise UserError(
            f"{where} {name}: expected a report of a classifier, found no such file. Type {EVALUATE}"
        ) from None
    split = str(report.get("split") or "")
    if role_within(split) != "validation":
        raise UserError(
            f"{where} {name}: expected confusions on a validation split, found {split or 'an unknown split'}. Captions that are written "
            f"for mistakes on test images make their accuracy too good. Type {EVALUATE}"
        )
    names = [one["label"] for one in report["per_class"]]
    counts = np.array(report["confusion_matrix"])
    if counts.shape != (len(names), len(names)):
        raise UserError(
            f"{where} {name}: expected counts of {len(names)} x {len(names)} classes, found {counts.shape}. Type {EVALUATE}"
        )
    counts = counts + counts.T
    np.fill_diagonal(counts, 0)
    found = {}
    for own, row in zip(names, counts, strict=True):
        others = [k for k in np.argsort(-row, kind="stable")[:most] if row[k]]
        if others:
            found[own] = [f"What tells a {own} from a {names[k]}?" for k in others]
    if not found:
        raise UserError(f"{where} {name}: expected classes that are confused, found none. Leave it out.")
    return found
