"""How much each caption counts in training, after a score that a refining step wrote.

Shapes: `n` captions with a score.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

import numpy as np
from datasets import Dataset, List, Value

from ..core.console import many
from ..core.errors import UserError, nearest
from .caption_records import fields_of_records
from .splits import captions_of

WEIGHTS = "caption_weights"  # column: for each text of `captions_of`, how much it counts
BUCKETS = 8
PREFIX = "score:"


def check_weighting(setting: str) -> str:
    """The name of the score in `score:NAME`. Raises `UserError` for another setting."""
    name = setting.removeprefix(PREFIX)
    if name == setting or not name:
        raise UserError(f"--sample_weight: expected score:NAME, for example score:clip_gain, found {setting!r}.")
    return name


def weights_of(scores: Sequence[float]) -> np.ndarray:
    """Weights `(n,)`, mean about 1: twice the middle of the eighth of all scores, in their order, that a score lies in.

    The lowest eighth counts 0.125, the highest 1.875. Only the order of the scores matters, so they may have any sign and unit.
    Equal scores have equal weights.
    """
    values = np.asarray(scores, dtype=np.float64)
    order = np.sort(values)
    middle = (np.searchsorted(order, values, "left") + np.searchsorted(order, values, "right")) / (2 * len(values))
    return (2 * np.minimum(np.floor(BUCKETS * middle), BUCKETS - 1) + 1) / BUCKETS


def with_caption_weights(dataset: Dataset, setting: str) -> tuple[Dataset, list[str]]:
    """The dataset with a column of weights, and notes on captions without a score, which count as an average one, 1.

    Args:
        dataset: columns `captions` and `caption_records`. Records belong to captions by their text.
        setting: `score:NAME`.

    Raises:
        UserError: another setting; no caption has such a score, or all have the same one.
    """
    name = check_weighting(setting)
    if "captions" not in dataset.column_names or "caption_records" not in dataset.column_names:
        raise UserError(
            f"--sample_weight {setting}: expected columns captions and caption_records, found {', '.join(dataset.column_names)}. Type "
            "--dataset_name with a folder of mmft-hf caption refine."
        )
    captions = [captions_of(own) for own in dataset["captions"][:]]
    known, found = set(), []
    for texts, records in zip(captions, _scores(dataset), strict=True):
        own = {}
        for text, scores in records:
            known |= scores.keys() if text in texts else set()
            if name in scores and math.isfinite(scores[name]):
                own[text] = scores[name]
        found.append([own.get(text) for text in texts])
    values = [score for own in found for score in own if score is not None]
    if not values:
        names = ", ".join(sorted(known)) or "none: type mmft-hf caption refine with --steps clip_score"
        raise UserError(
            f"--sample_weight {setting}: expected a score of the captions, found no {name!r}.{nearest(name, known)} Scores that they "
            f"have: {names}."
        )
    if min(values) == max(values):
        raise UserError(
            f"--sample_weight {setting}: expected scores that differ, found {values[0]:g} for each caption: weights would change "
            "nothing. Leave it out."
        )
    weights = iter(weights_of(values).tolist())
    column = [[1.0 if score is None else next(weights) for score in own] for own in found]
    total = sum(map(len, captions))
    notes = []
    if missing := total - len(values):
        notes.append(
            f"{many(missing, 'caption')} of {total:,} {'has' if missing == 1 else 'have'} no score {name} and count{'s' * (missing == 1)} "
            "as an average one."
        )
    without = dataset.remove_columns([column for column in (WEIGHTS,) if column in dataset.column_names])
    return without.add_column(WEIGHTS, column, feature=List(Value("float32"))), notes


def weights_digest(dataset: Dataset) -> str:
    """16 hex digits of the weights."""
    return hashlib.sha256(json.dumps(dataset[WEIGHTS][:]).encode()).hexdigest()[:16]


def _scores(dataset: Dataset) -> list[list[tuple[str, dict[str, float]]]]:
    """For each row, the texts of its records with their scores by name."""
    return [
        [
            (text.strip(), {s["name"]: s["value"] for s in scores if s["value"] is not None})
            for text, scores in records
            if text and scores
        ]
        for records in fields_of_records(dataset, ("text", "scores"))
    ]
