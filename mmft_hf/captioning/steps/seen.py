"""What a preset takes from other images than the one that is asked about."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from ...data.images import BadImage
from ...data.sentences import sentences_of
from ..ask.pictures import part
from .base import Embeddings, Row, readable, score_of

OTHERS = 5  # captions of other images that a question shows
LEAST = 2  # sentences of an image that are shown, however well they fit
BLOCK = 512  # images that are compared with all others at a time


@dataclass(frozen=True)
class Sentence:
    """A sentence of a caption: what it describes, in words, and its cosine with that."""

    text: str
    place: str
    score: float


@dataclass
class Seen:
    """Keys are the sha256 of an image, or sha256 and label.

    Args:
        neighbours: sha256 and class name of the most similar images of other classes, one of each, nearest first.
        others: captions of other images of the class.
        partners: sha256 and first caption of another image.
        rivals: for each failed text, by its position, the other region with a text that it fits best.
        sentences: of all captions, those that fit at least as well as the median of the class, and the best two; best first.
    """

    neighbours: dict[tuple, list[tuple[str, str]]] = field(default_factory=dict)
    others: dict[tuple, list[str]] = field(default_factory=dict)
    partners: dict[str | None, tuple[str, str]] = field(default_factory=dict)
    sentences: dict[tuple, list[Sentence]] = field(default_factory=dict)
    rivals: dict[tuple, dict[int, str]] = field(default_factory=dict)


def look(
    rows: Sequence[Row],
    scorer: Embeddings | None,
    neighbours: int = 0,
    others: bool = False,
    partners: bool = False,
    sentences: bool = False,
    rivals: bool = False,
) -> Seen:
    """What was asked for of all rows. The order of the rows changes nothing."""
    return Seen(
        nearest_of_other_classes(rows, scorer, neighbours) if neighbours else {},
        other_captions(rows) if others else {},
        next_images(rows) if partners else {},
        fitting_sentences(rows, scorer) if sentences else {},
        rivals_of(rows, scorer) if rivals else {},
    )


def nearest_of_other_classes(rows: Sequence[Row], scorer: Embeddings, count: int) -> dict[tuple, list[tuple[str, str]]]:
    """See `Seen.neighbours`. Never an image of the same group, or one that also has the class; ties by sha256."""
    images = scorer.images()
    can = sorted(readable(rows, images), key=lambda i: (rows[i].image_sha256, rows[i].label))
    labels = np.array([rows[i].label for i in can])
    groups = np.unique([rows[i].group for i in can], return_inverse=True)[1] if can else labels
    classes_of: dict[str | None, set[int]] = {}
    for i in can:
        classes_of.setdefault(rows[i].image_sha256, set()).add(rows[i].label)
    embeds, found = images[can], {}
    for start in range(0, len(can), BLOCK):
        near = embeds[start : start + BLOCK] @ embeds.T
        near[
            (groups[start : start + BLOCK, None] == groups) | (labels[start : start + BLOCK, None] == labels)
        ] = -np.inf
        for row, values in zip(can[start : start + BLOCK], near, strict=True):
            own, chosen = rows[row], []
            while len(chosen) < count and np.isfinite(values[k := int(values.argmax())]):
                other = rows[can[k]]
                if own.label in classes_of[other.image_sha256]:
                    values[k] = -np.inf
                else:
                    chosen.append((other.image_sha256, other.class_name))
                    values[labels == other.label] = -np.inf
            found[own.image_sha256, own.label] = chosen
    return found


def other_captions(rows: Sequence[Row]) -> dict[tuple, list[str]]:
    """See `Seen.others`: different ones for each image, so that equal captions become different ones."""
    texts: dict[int, dict[str, set[str]]] = {}
    for row in rows:
        for k in row.captions():
            texts.setdefault(row.label, {}).setdefault(row.records[k]["text"], set()).add(row.group)
    order = {label: sorted(own) for label, own in texts.items()}
    found = {}
    for row in rows:
        own, all_ = {row.records[k]["text"] for k in row.captions()}, order.get(row.label, [])
        drawn = random.Random(row.image_sha256).sample(all_, min(len(all_), len(own) + 2 * OTHERS))
        others = [text for text in drawn if text not in own and texts[row.label][text] != {row.group}]
        found[row.image_sha256, row.label] = others[:OTHERS]
    return found


def next_images(rows: Sequence[Row]) -> dict[str | None, tuple[str, str]]:
    """See `Seen.partners`: the images form a circle in an order that their sha256 draws."""
    can = {row.image_sha256: row for row in rows if row.image_sha256 and row.captions()}
    order = sorted(can, key=lambda image: hashlib.sha256(f"mix {image}".encode()).digest())
    found = {}
    for image, other in zip(order, order[1:] + order[:1], strict=True):
        if image != other:
            found[image] = (other, min(can[other].records[k]["text"] for k in can[other].captions()))
    return found


def fitting_sentences(rows: Sequence[Row], scorer: Embeddings) -> dict[tuple, list[Sentence]]:
    """See `Seen.sentences`. A caption of a part of the image is compared with that part."""
    found: dict[tuple, list[Sentence]] = {}
    by_class: dict[int, list[float]] = {}
    can = readable(rows, scorer.images())
    views = {(i, k): rows[i].records[k].get("view") or "whole" for i in can for k in rows[i].captions()}
    parts = part_embeddings(scorer, {(i, view) for (i, _), view in views.items()})
    for i in can:
        row, own = rows[i], []
        for k in row.captions():
            view = views[i, k]
            if (i, view) not in parts:
                continue
            texts = sentences_of(row.records[k]["text"])
            scores = scorer.texts(texts) @ parts[i, view]
            own += [Sentence(text, view, score) for text, score in zip(texts, scores.tolist(), strict=True)]
        found[row.image_sha256, row.label] = sorted(own, key=lambda s: (-s.score, s.place, s.text))
        by_class.setdefault(row.label, []).extend(sentence.score for sentence in own)
    medians = {label: float(np.median(scores)) for label, scores in by_class.items() if scores}
    return {
        key: [s for place, s in enumerate(own) if place < LEAST or s.score >= medians[key[1]]]
        for key, own in found.items()
    }


def views_of(row: Row) -> list[str]:
    """The regions of an image that have a text, accepted or not."""
    return list(dict.fromkeys(record["view"] for record in row.records if record.get("view") and record["text"]))


def failed_texts(row: Row) -> list[int]:
    """Positions of the texts that fit another region as well, one for each region that has no caption: its last one."""
    captioned = {row.records[k].get("view") for k in row.captions()}
    found = {}
    for k, record in enumerate(row.records):
        margin = score_of(record, "region_margin")
        if record.get("view") not in (None, *captioned) and margin is not None and margin <= 0:
            found[record["view"]] = k
    return sorted(found.values())


def rivals_of(rows: Sequence[Row], scorer: Embeddings) -> dict[tuple, dict[int, str]]:
    """See `Seen.rivals`."""
    failed = {i: own for i in readable(rows, scorer.images()) if (own := failed_texts(rows[i]))}
    parts = part_embeddings(scorer, {(i, view) for i in failed for view in views_of(rows[i])})
    found: dict[tuple, dict[int, str]] = {}
    for i, own in failed.items():
        for k in own:
            record = rows[i].records[k]
            others = [v for v in views_of(rows[i]) if v != record["view"] and (i, v) in parts]
            if others and (i, record["view"]) in parts:
                (text,) = scorer.texts([record["text"]])
                fits = [float(text @ parts[i, view]) for view in others]
                key = rows[i].image_sha256, rows[i].label
                found.setdefault(key, {})[k] = others[int(np.argmax(fits))]
    return found


def part_embeddings(scorer: Embeddings, places: Collection[tuple[int, str]]) -> dict[tuple[int, str], np.ndarray]:
    """Unit-norm embeddings `(D,)` of parts of images, by number of the row and view. Boxes outside of their picture have none."""
    boxes = sorted(place for place in places if place[1].startswith("box:"))
    found = {(i, what): scorer.images(what)[i] for i, what in places if not what.startswith("box:")}
    for start in range(0, len(boxes), BLOCK):
        shown = {}
        for i, what in boxes[start : start + BLOCK]:
            with suppress(BadImage):
                shown[i, what] = part(scorer.picture(i), what)
        if shown:
            found |= dict(zip(shown, scorer.encode(list(shown.values())), strict=True))
    return found
