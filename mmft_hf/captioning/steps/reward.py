"""`reward`: scores captions as a person would, by a head learnt from preferences, or by a function of the user."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...core.errors import UserError
from ...core.functions import named_function, source_digest
from .asking import Asking
from .base import Embeddings, Row, Step, Told, places, readable, score_of, scored

FIELDS = ("image_sha256", "better", "worse")
FOLDS, L2 = 5, 1e-2
SURE = 2.33  # one-sided 1 % of a normal distribution


@dataclass(frozen=True)
class Head:
    """A linear head and how it did on groups that it had not seen.

    Args:
        weights: of the features of a caption.
        scale: by which features are divided.
        held_out, cosine: share of the preferences that the head, and the plain cosine, order rightly there.
        pairs: number of preferences.
        unused: preferences of other images, or without the scores.
    """

    weights: np.ndarray
    scale: np.ndarray
    held_out: float
    cosine: float
    pairs: int
    unused: int


@dataclass(frozen=True)
class Reward(Step):
    """Writes `reward`. Exactly one of `preferences` and `function` is given.

    Args:
        preferences: a file `.jsonl` or `.csv` with the fields `image_sha256`, `better` and `worse`, two texts about the image. A
            linear head is fitted to them, and refused unless it orders more of them rightly than the cosine does, on groups of
            images that it has not seen.
        features: names of scores that the head reads. Default: the product of the embeddings of image and text, and their cosine.
        function: `package.module:function`, called with the picture (Pillow, RGB), the text and the class name of each caption. It
            returns a number, or None.
    """

    preferences: str | None = None
    features: tuple[str, ...] = ()
    function: str | None = None

    name: ClassVar[str] = "reward"
    about: ClassVar[str] = "scores captions by a head learnt from preferences, or by a function"
    after: ClassVar[str] = "the reward model of image-text pairs of arXiv 2312.06726"
    differs: ClassVar[str] = (
        "A linear head on the scorer's embeddings, or on scores, takes the place of a tuned model. It is refused unless it beats the "
        "cosine on images that it has not seen."
    )

    def __post_init__(self):
        given = [name for name in ("preferences", "function") if getattr(self, name)]
        if len(given) != 1:
            raise UserError(
                f"step reward: expected preferences or function, found {' and '.join(given) or 'neither'}. Give one of them."
            )
        if self.function and self.features:
            raise UserError("step reward, features: expected them with preferences, found function.")
        if self.function:
            named_function(self.function, "step reward, function")
        else:
            read_preferences(self.preferences)

    def writes(self) -> tuple[str, ...]:
        return ("reward",)

    def reads(self) -> tuple[str, ...]:
        return self.features

    def spec(self) -> dict:
        """The options, and what is in the file that they name."""
        if self.function:
            return super().spec() | {"code": source_digest(named_function(self.function, "step reward, function"))}
        return super().spec() | {"content": hashlib.sha256(Path(self.preferences).read_bytes()).hexdigest()}

    def fit(self, rows: Sequence[Row], scorer: Embeddings | None) -> Head | None:
        """The head; None for a function. Raises `UserError` if it does not beat the cosine."""
        if self.function:
            return None
        return self._fitted(rows, scorer)

    def ask(self, row: Row, fitted: Any) -> Asking:
        return fitted
        yield []  # a generator

    def apply(self, rows: Sequence[Row], scorer: Embeddings | None, found: Sequence = ()) -> list[list[dict]]:
        if self.function:
            return scored(rows, self._called(rows, scorer))
        if not rows:
            return []
        head, images = found[0], scorer.images()
        own = places(rows, images)
        scorer.texts([rows[i].records[k]["text"] for i, k in own] or [""])  # encoded together
        values = {}
        for i, k in own:
            column = self._features(images[i], rows[i], rows[i].records[k]["text"], scorer)
            if column is not None:
                values[i, k] = {"reward": float(column / head.scale @ head.weights)}
        return scored(rows, values)

    def told(self, rows: Sequence[Row], found: Sequence[Any]) -> Told:
        head = found[0] if found else None
        if head is None:
            return Told()
        figures = {
            "preferences": head.pairs,
            "ordered rightly on unseen groups": head.held_out,
            "by the cosine": head.cosine,
        }
        left = f"{head.unused:,} preferences were not used: no such image in this split, or a text without the scores."
        return Told(figures, notes=(left,) if head.unused else ())

    def _called(self, rows: Sequence[Row], scorer: Embeddings | None) -> dict:
        function, values = named_function(self.function, "step reward, function"), {}
        for i, row in enumerate(rows):
            picture = None
            for k in row.captions() if row.image_sha256 else ():
                picture = picture or scorer.picture(i)
                try:
                    value = function(picture, row.records[k]["text"], row.class_name)
                    values[i, k] = {"reward": None if value is None else float(value)}
                except Exception as error:
                    raise UserError(
                        f"step reward, function {self.function}: expected a number for {row.records[k]['text']!r}, but it raised "
                        f"{type(error).__name__}: {error}"
                    ) from error
        return values

    def _features(self, image: np.ndarray, row: Row, text: str, scorer: Embeddings) -> np.ndarray | None:
        """What the head reads of an image and a text; None if a score is missing."""
        if not self.features:
            said = scorer.texts([text])[0]
            return np.append(image * said, image @ said).astype(np.float64)
        record = next((row.records[k] for k in row.captions() if row.records[k]["text"] == text), None)
        values = [record and score_of(record, name) for name in self.features]
        return None if None in values else np.array(values)

    def _fitted(self, rows: Sequence[Row], scorer: Embeddings) -> Head:
        images = scorer.images()
        place = {rows[i].image_sha256: i for i in reversed(readable(rows, images))}
        preferences = read_preferences(self.preferences)
        used = [one for one in preferences if one["image_sha256"] in place]
        scorer.texts([one[side] for one in used for side in ("better", "worse")] or [""])  # encoded together
        pairs, groups, cosines = [], [], []
        for one in used:
            i = place[one["image_sha256"]]
            sides = [self._features(images[i], rows[i], one[side], scorer) for side in ("better", "worse")]
            if sides[0] is not None and sides[1] is not None:
                pairs.append(sides)
                groups.append(rows[i].group)
                said = scorer.texts([one["better"], one["worse"]])
                cosines.append(float((said[0] - said[1]) @ images[i]))
        names = sorted(set(groups))
        if len(names) < FOLDS:
            raise UserError(
                f"step reward, preferences {self.preferences}: expected them for images of {FOLDS} groups or more of this split, "
                f"found {len(names)} among {len(preferences):,} preferences."
            )
        both = np.array(pairs)  # (pairs, 2, features)
        scale = both.reshape(-1, both.shape[2]).std(axis=0) if self.features else np.ones(both.shape[2])
        scale[scale == 0] = 1
        differences = (both[:, 0] - both[:, 1]) / scale
        order = np.random.default_rng(0).permutation(len(names))
        fold = {names[k]: n % FOLDS for n, k in enumerate(order)}
        folds = np.array([fold[group] for group in groups])
        right = np.zeros(len(differences), bool)
        for k in range(FOLDS):
            right[folds == k] = differences[folds == k] @ preference_weights(differences[folds != k]) > 0
        plain = np.array(cosines) > 0
        better, worse = np.count_nonzero(right & ~plain), np.count_nonzero(plain & ~right)
        if better - worse <= SURE * math.sqrt(better + worse):
            raise UserError(
                f"step reward, preferences {self.preferences}: expected a head that orders more of them rightly than the cosine, on "
                f"groups that it has not seen; found {right.mean():.1%} of {len(right):,} and {plain.mean():.1%}, which may be chance. "
                "Use clip_score, or collect more preferences."
            )
        rates = float(right.mean()), float(plain.mean())
        return Head(preference_weights(differences), scale, *rates, len(right), len(preferences) - len(right))


def preference_weights(differences: np.ndarray, l2: float = L2) -> np.ndarray:
    """Weights `w` of the least mean of -log σ(d·w) + l2/2·|w|² over `differences` `(p, f)` (Bradley & Terry 1952), by Newton's method."""
    weights = np.zeros(differences.shape[1])
    for _ in range(50):
        doubt = 1 / (1 + np.exp(np.clip(differences @ weights, -500, 500)))
        slope = l2 * weights - differences.T @ doubt / len(differences)
        curve = (differences.T * (doubt * (1 - doubt))) @ differences / len(differences)
        step = np.linalg.solve(curve + l2 * np.eye(len(weights)), slope)
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    return weights


def read_preferences(name: str) -> list[Mapping[str, str]]:
    """The preferences of a file. Raises `UserError` for a file that is missing, or has other fields."""
    where, path = f"step reward, preferences {name}", Path(name)
    if path.suffix not in (".jsonl", ".csv"):
        raise UserError(f"{where}: expected a file .jsonl or .csv.")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, filter(str.strip, file))
            found = list(lines)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: expected lines with {', '.join(FIELDS)}, but {error}.") from error
    for number, one in enumerate(found, 1):
        if not isinstance(one, Mapping) or not all(isinstance(one.get(key), str) and one[key] for key in FIELDS):
            raise UserError(f"{where}, entry {number}: expected texts for {', '.join(FIELDS)}, found {one}.")
    return found
