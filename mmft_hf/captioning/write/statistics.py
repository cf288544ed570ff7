"""Counts a captioned data set in one pass over its records. No picture is read, and memory does not grow with them."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from itertools import combinations

import numpy as np
from datasets import Dataset

from ..judge.checks import CHECKS, DEFAULT_ACTIONS, duplicate_key
from ..judge.cleaning import CLEANINGS
from ..judge.wording import words_of
from ..types import ACCEPTED, STATUSES

UNANSWERED = ("failed", "bad_image", "not_run")  # there is no text whose checks could be counted
CURIOUS = ("label_contradicted", "duplicate", "over_token_limit", "other_class", "url")  # shown although accepted
FEWEST = 12


class _Aspect:
    """Counts of one aspect, or of all together."""

    def __init__(self):
        self.answers, self.captions, self.trimmed, self.mentions = 0, 0, 0, 0
        self.words, self.tokens, self.checks = Counter(), Counter(), Counter()

    def add(self, record: dict, words: int) -> None:
        self.answers += record["status"] not in UNANSWERED
        self.checks.update(record["checks"] or ())
        if words:
            self.captions += 1
            self.trimmed += record["status"] == "trimmed"
            self.mentions += bool(record["mentions_label"])
            self.words[words] += 1
            if record["clip_tokens"] is not None:
                self.tokens[record["clip_tokens"]] += 1

    def as_dict(self) -> dict:
        return {
            "answers": self.answers,
            "captions": self.captions,
            "trimmed": self.trimmed,
            "mentions_label": self.mentions,
            "words": _spread(self.words),
            "clip_tokens": _spread(self.tokens),
            "checks": {name: self.checks[name] for name in (*CHECKS, *sorted(set(self.checks) - set(CHECKS)))},
        }


def _spread(counts: Counter) -> dict | None:
    if not counts:
        return None
    values = np.repeat(list(counts), list(counts.values()))
    return {
        "mean": round(float(values.mean()), 2),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "max": int(values.max()),
    }


class CaptionTally:
    """All counts of a captioned data set, and which rows to show.

    Args:
        dataset: with the columns `label`, `caption_records` and `image_sha256`.
        seed: of the draw of rows to show.
    """

    def __init__(self, dataset: Dataset, seed: int = 0):
        self.class_names = dataset.features["label"].names
        self.aspects: dict[str, _Aspect] = defaultdict(_Aspect)
        self.all = _Aspect()
        self.statuses, self.failures, self.models = Counter(), Counter(), Counter()
        self.prompt_ids: dict[str, Counter] = defaultdict(Counter)
        self.tokens_in = self.tokens_out = self.attempts = self.asked_again = self.without = self.kept = 0
        self.unreadable, self.unreadable_row = 0, None  # how many images, and the first row with one
        self.images_of, self.captions_of = Counter(), Counter()
        self.odd: dict[str, list[tuple[int, int]]] = defaultdict(list)  # kind -> (row, place of the record)
        self._rows: dict[int, list[int]] = defaultdict(list)  # label -> rows with captions
        self._seen = Counter()
        self._rng = random.Random(seed)
        self._images: set[str] = set()
        self._asked: set[tuple] = set()
        self._texts: Counter = Counter()
        self._first: dict[str, str] = {}
        self._repeated: set[str] = set()
        self._overlap: dict[tuple[str, str], list] = {}
        lean = dataset.select_columns(["label", "caption_records", "image_sha256"])
        row = 0
        for batch in lean.iter(1000):
            for label, records, image in zip(*batch.values(), strict=True):
                self._add(row, label, records or [], image)
                row += 1
        self.images = row

    def _add(self, row: int, label: int | None, records: list[dict], image: str) -> None:
        self._images.add(image)
        paid = (image, label) in self._asked  # a repeated picture of this class shares the answers, and their cost
        self._asked.add((image, label))
        self.images_of[label] += 1
        last = {_slot(record): place for place, record in enumerate(records)}
        first_text: dict[str, str] = {}
        texts: set[str] = set()  # a text that two aspects or models gave is one caption
        for place, record in enumerate(records):
            status, aspect = record["status"], record["aspect"] or ""
            accepted = status in ACCEPTED and bool(record["text"])
            for counts in (self.all, self.aspects[aspect]):
                counts.add(record, len(record["text"].split()) if accepted else 0)
            self.models[record["model"] or ""] += accepted
            self.prompt_ids[aspect][record["prompt_id"] or ""] += accepted
            self.tokens_in += 0 if paid else record["tokens_in"] or 0
            self.tokens_out += 0 if paid else record["tokens_out"] or 0
            self.attempts += 0 if paid else record["attempts"] or 0
            if accepted:
                self.statuses[status] += 1
                texts.add(record["text"])
                first_text.setdefault(aspect, record["text"])
                key = duplicate_key(record["text"])
                self._texts[key] += 1
                if self._first.setdefault(key, image) != image:
                    self._repeated.add(key)
                kinds = [check for check in CURIOUS if check in (record["checks"] or ())]
            else:
                kinds = [_kind(record)]
                if last[_slot(record)] != place:
                    self.asked_again += 1  # a later try of the same caption follows, which is what counts
                else:
                    self.statuses[status] += 1
                    self.failures[kinds[0]] += 1
            for kind in kinds if status != "not_run" else ():
                self._keep(self.odd[kind], ("odd", kind), (row, place), 3)
        self.kept += len(texts)
        self.captions_of[label] += len(texts)
        if any(record["status"] == "bad_image" for record in records):
            self.unreadable += 1
            self.unreadable_row = row if self.unreadable_row is None else self.unreadable_row
        if first_text:
            self._keep(self._rows[label], ("row", label), row, 2)
        else:
            self.without += 1
        if len(first_text) > 1:
            sets = {aspect: set(words_of(text)) for aspect, text in first_text.items()}
            for pair in combinations(sorted(sets), 2):
                one, two = (sets[aspect] for aspect in pair)
                if one | two:
                    entry = self._overlap.setdefault(pair, [0.0, 0])
                    entry[0] += len(one & two) / len(one | two)
                    entry[1] += 1

    def _keep(self, kept: list, stream: tuple, item, size: int) -> None:
        """Reservoir sampling: each item of a stream is kept with equal chance, however many follow."""
        self._seen[stream] += 1
        if len(kept) < size:
            kept.append(item)
        elif (place := self._rng.randrange(self._seen[stream])) < size:
            kept[place] = item

    def rows_to_show(self, number: int) -> list[int]:
        """Rows with captions, of as many classes as there are, in a seeded order."""
        labels = sorted(self._rows, key=str)
        random.Random(len(labels)).shuffle(labels)
        turns = [[rows[turn] for label in labels if turn < len(rows := self._rows[label])] for turn in range(2)]
        return [*turns[0], *turns[1]][:number]

    def statistics(self) -> dict:
        """The figures, JSON-able. Counts are absolute; shares are for the reader to make."""
        classes = [
            {"label": name, "images": self.images_of[label], "captions": self.captions_of[label]}
            for label, name in enumerate(self.class_names)
            if self.images_of[label]
        ]
        classes.sort(key=lambda entry: (entry["captions"] / entry["images"], entry["captions"], entry["label"]))
        overlap = {pair: round(total / count, 4) for pair, (total, count) in self._overlap.items()}
        return {
            "images": self.images,
            "distinct_images": len(self._images),
            "images_without_caption": self.without,
            "captions": self.kept,
            "unreadable_images": self.unreadable,
            "statuses": {status: self.statuses[status] for status in STATUSES if self.statuses[status]},
            "asked_again": self.asked_again,
            "failures": dict(self.failures.most_common()),
            "all": self.all.as_dict(),
            "aspects": {name: counts.as_dict() for name, counts in self.aspects.items()},
            "overlap": [{"aspects": list(pair), "jaccard": value} for pair, value in sorted(overlap.items())],
            "duplicates": {
                "texts": len(self._repeated),
                "captions": sum(self._texts[key] for key in self._repeated),
            },
            "classes": {
                "with_images": len(classes),
                "without_caption": sum(not entry["captions"] for entry in classes),
                "fewest": classes[:FEWEST],
            },
            "models": {name: count for name, count in self.models.most_common() if count},
            "prompt_ids": {a: {i: n for i, n in ids.items() if n} for a, ids in self.prompt_ids.items()},
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "attempts": self.attempts,
        }


def _slot(record: dict) -> tuple:
    return record["aspect"], record["sample"], record["prompt_id"]


def _kind(record: dict) -> str:
    """Why there is no caption, in a few words: `rejected: repetition`, `failed`."""
    checks, status = record["checks"] or (), record["status"]
    why = [check for check in checks if DEFAULT_ACTIONS.get(check) == "reask" and check != "empty"]
    if not why and status == "rejected":
        why = [check for check in checks if check not in CLEANINGS]
    if not why and status not in ("refused", "truncated") and record["finish_reason"] not in (None, "", "stop"):
        why = [record["finish_reason"]]
    return f"{status}: {', '.join(why)}" if why else status


def caption_statistics(dataset: Dataset) -> dict:
    """Figures of a captioned data set, JSON-able.

    Args:
        dataset: with the columns `label` (`ClassLabel`), `caption_records` and `image_sha256`; images are not read.

    Returns:
        Counts of images, captions, statuses (of the last try of each caption), failures by kind and tries that were asked
        again; for `all` and each of `aspects`: answers, captions, how many were trimmed and name their label, words and
        `clip_tokens` (mean, median, 95th percentile, maximum; None without any) and how often each check fired in an
        answer; mean Jaccard `overlap` of the word sets of two aspects of one image; `duplicates` across images; classes
        with the fewest captions per image; models, prompt ids, and the tokens and attempts spent.
    """
    return CaptionTally(dataset).statistics()
