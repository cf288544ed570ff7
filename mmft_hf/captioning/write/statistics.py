"""The statistics of a captioned dataset, which the console, the HTML page and the card all show.

They are counted in one pass over the records. No picture is read, and memory does not grow with the size of the pictures.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from itertools import combinations

import numpy as np
from datasets import Dataset

from ...core.console import percent
from ...data.labels import class_names_of
from ..judge.checks import CHECKS, DEFAULT_ACTIONS, SharedTexts
from ..judge.cleaning import CLEANINGS
from ..judge.wording import words_of
from ..types import ACCEPTED, DROPPED, REPLACED, STATUSES

UNANSWERED = ("failed", "bad_image", "not_run")  # there is no text whose checks could be counted
NOTABLE = ("label_contradicted", "duplicate", "over_token_limit", "other_class", "url")  # shown although accepted
FEWEST = 12


class _Counts:
    """Counts of one aspect, or of all together."""

    def __init__(self):
        self.answers = self.captions = self.trimmed = self.mentions_label = 0
        self.words, self.clip_tokens, self.checks = Counter(), Counter(), Counter()

    def add(self, record: dict, words: int) -> None:
        self.answers += record["status"] not in UNANSWERED
        self.checks.update(record["checks"] or ())
        if words:
            self.captions += 1
            self.trimmed += record["status"] == "trimmed"
            self.mentions_label += bool(record["mentions_label"])
            self.words[words] += 1
            if record["clip_tokens"] is not None:
                self.clip_tokens[record["clip_tokens"]] += 1

    def as_dict(self) -> dict:
        others = sorted(set(self.checks) - set(CHECKS))
        return {
            **{name: getattr(self, name) for name in ("answers", "captions", "trimmed", "mentions_label")},
            "words": _distribution(self.words),
            "clip_tokens": _distribution(self.clip_tokens),
            "checks": {name: self.checks[name] for name in (*CHECKS, *others)},
        }


def _distribution(counts: Counter) -> dict | None:
    if not counts:
        return None
    values = np.repeat(list(counts), list(counts.values()))
    return {
        "mean": round(float(values.mean()), 2),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "max": int(values.max()),
    }


class CaptionStatistics:
    """All figures of a captioned dataset, and which of its rows to show.

    Args:
        dataset: with the columns `label` (`ClassLabel`, or lists of it), `caption_records` and `image_sha256`.

    Attributes:
        figures: JSON-able; `statistics` in `captions.json`. Counts of images, captions, statuses (of the last try of each
            caption), failures by kind, and tries that were followed by another one; for `all` and for each of `aspects`:
            answers, captions, how many were trimmed and how many name their label, the distribution of `words` and
            `clip_tokens` (mean, median, 95th percentile, maximum; None without any), and how often each check fired in an
            answer; `overlap`: mean Jaccard index of the word sets of two aspects of one image; `duplicates`: texts shared by
            several images; the classes with the fewest captions per image; models, prompt ids, and the tokens and attempts
            spent.
        notable: places of records worth a look, up to three for each kind: `(row, position in caption_records)`.
        unreadable_row: the first row whose image cannot be read, or None.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.class_names = class_names_of(dataset)
        self._aspects: dict[str | None, _Counts] = defaultdict(_Counts, {None: _Counts()})  # None: all together
        self.notable: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.unreadable_row: int | None = None
        self._total = Counter()  # the figures that are plain sums
        self._statuses, self._failures, self._models = Counter(), Counter(), Counter()
        self._prompt_ids: dict[str, Counter] = defaultdict(Counter)
        self._images_of, self._captions_of = Counter(), Counter()  # by class
        self._rows: dict[int | tuple, list[int]] = defaultdict(list)  # class, or classes -> rows with captions
        self._seen = Counter()
        self._random = random.Random(0)
        self._images: set[str] = set()
        self._asked: set[tuple] = set()
        self._texts: Counter = Counter()
        self._shared = SharedTexts()
        self._overlap: dict[tuple[str, str], list] = defaultdict(lambda: [0.0, 0])  # sum and number of Jaccard indices
        row = 0
        for batch in dataset.select_columns(["label", "caption_records", "image_sha256"]).iter(1000):
            for label, records, image in zip(*batch.values(), strict=True):
                self._add(row, label, records or [], image)
                row += 1
        self.figures = self._figures(row)

    def _add(self, row: int, label: int | list[int] | None, records: list[dict], image: str) -> None:
        label = tuple(label) if isinstance(label, list) else label
        classes = label if isinstance(label, tuple) else (label,)
        # Copies of a picture within a class share its answers, and their cost.
        spent = Counter() if (image, label) in self._asked else self._total
        self._images.add(image)
        self._asked.add((image, label))
        self._images_of.update(classes)
        last = {_slot(record): position for position, record in enumerate(records)}
        first_text: dict[str, str] = {}
        texts: set[str] = set()  # a text that two aspects or models gave is one caption
        for position, record in enumerate(records):
            status, aspect, checks = record["status"], record["aspect"] or "", record["checks"] or ()
            accepted = status in ACCEPTED and bool(record["text"])
            for counts in (self._aspects[None], self._aspects[aspect]):
                counts.add(record, len(record["text"].split()) if accepted else 0)
            self._models[record["model"] or ""] += accepted
            self._prompt_ids[aspect][record["prompt_id"] or ""] += accepted
            for name in ("tokens_in", "tokens_out", "attempts"):
                spent[name] += record[name] or 0
            if accepted:
                self._statuses[status] += 1
                texts.add(record["text"])
                first_text.setdefault(aspect, record["text"])
                self._texts[self._shared.add(image, record["text"])] += 1
                kinds = [check for check in NOTABLE if check in checks]
            else:
                kinds = [_kind_of_failure(record)]
                if last[_slot(record)] != position:
                    self._total["asked_again"] += 1  # a later try of the same caption counts instead
                else:
                    self._statuses[status] += 1
                    self._failures[kinds[0]] += 1
            for kind in kinds if status != "not_run" else ():
                self._sample(self.notable[kind], ("notable", kind), (row, position), 3)
        self._total["captions"] += len(texts)
        self._captions_of.update(dict.fromkeys(classes, len(texts)))
        if any(record["status"] == "bad_image" for record in records):
            self._total["unreadable_images"] += 1
            self.unreadable_row = row if self.unreadable_row is None else self.unreadable_row
        if first_text:
            self._sample(self._rows[label], ("row", label), row, 2)
        else:
            self._total["images_without_caption"] += 1
        if len(first_text) > 1:
            words = {aspect: set(words_of(text)) for aspect, text in first_text.items()}
            for one, two in combinations(sorted(words), 2):
                if union := words[one] | words[two]:
                    sums = self._overlap[one, two]
                    sums[0] += len(words[one] & words[two]) / len(union)
                    sums[1] += 1

    def _sample(self, kept: list, stream: tuple, item, size: int) -> None:
        """Reservoir sampling: each item of a stream is kept with the same probability."""
        self._seen[stream] += 1
        if len(kept) < size:
            kept.append(item)
        elif (place := self._random.randrange(self._seen[stream])) < size:
            kept[place] = item

    def sample_rows(self, number: int) -> list[int]:
        """Rows with captions, from as many classes as possible, in a seeded order."""
        labels = sorted(self._rows, key=str)
        random.Random(len(labels)).shuffle(labels)
        turns = [[rows[turn] for label in labels if turn < len(rows := self._rows[label])] for turn in range(2)]
        return [*turns[0], *turns[1]][:number]

    def _figures(self, images: int) -> dict:
        classes = [
            {"label": name, "images": self._images_of[label], "captions": self._captions_of[label]}
            for label, name in enumerate(self.class_names)
            if self._images_of[label]
        ]
        classes.sort(key=lambda entry: (entry["captions"] / entry["images"], entry["captions"], entry["label"]))
        sums, shared = self._total, self._shared.keys
        return {
            "images": images,
            "distinct_images": len(self._images),
            **{name: sums[name] for name in ("images_without_caption", "captions", "unreadable_images")},
            "statuses": {
                status: self._statuses[status] for status in (*STATUSES, DROPPED, REPLACED) if self._statuses[status]
            },
            "asked_again": sums["asked_again"],
            "failures": dict(self._failures.most_common()),
            "all": self._aspects[None].as_dict(),
            "aspects": {name: counts.as_dict() for name, counts in self._aspects.items() if name is not None},
            "overlap": [
                {"aspects": list(pair), "jaccard": round(total / number, 4)}
                for pair, (total, number) in sorted(self._overlap.items())
            ],
            "duplicates": {"texts": len(shared), "captions": sum(self._texts[key] for key in shared)},
            "classes": {
                "with_images": len(classes),
                "without_caption": sum(not entry["captions"] for entry in classes),
                "fewest": classes[:FEWEST],
            },
            "models": {name: count for name, count in self._models.most_common() if count},
            "prompt_ids": {a: {i: n for i, n in ids.items() if n} for a, ids in self._prompt_ids.items()},
            **{name: sums[name] for name in ("tokens_in", "tokens_out", "attempts")},
        }

    def headline(self) -> dict[str, str]:
        """The figures that console, page and card begin with: text by label."""
        found, every = self.figures, self.figures["all"]
        images, captions, tokens = found["images"], found["captions"], every["clip_tokens"]
        rows = {"images": f"{images:,}"}
        if found["unreadable_images"]:
            rows["unreadable images"] = f"{found['unreadable_images']:,}"
        rows |= {
            "images without a caption": f"{found['images_without_caption']:,}",
            "captions": f"{captions:,}",
            "captions per image": f"{captions / images:.2f}" if images else "–",
            "captions that name their class": percentage(every["mentions_label"], every["captions"]),
            "trimmed captions": percentage(every["trimmed"], every["captions"]),
        }
        if tokens:
            rows["longest caption in tokens"] = f"{tokens['max']:,}"
            rows["answers over the token limit"] = percentage(every["checks"]["over_token_limit"], every["answers"])
        rows["answers that deny their label"] = f"{every['checks']['label_contradicted']:,}"
        rows["texts shared by several images"] = f"{found['duplicates']['texts']:,}"
        return rows

    def by_aspect(self) -> list[tuple[str, dict]]:
        """Name and figures of each aspect, and of all together if there are several."""
        aspects = list(self.figures["aspects"].items())
        return aspects + [("all", self.figures["all"])] * (len(aspects) > 1)


def percentage(count: int, total: int) -> str:
    """`12.5 %`, or a dash where `total` is 0."""
    return percent(count / total) if total else "–"


def spread(distribution: dict | None) -> str:
    """Median, 95th percentile and maximum."""
    return "{median:g} · {p95:g} · {max}".format(**distribution) if distribution else "–"


def _slot(record: dict) -> tuple:
    return record["aspect"], record["sample"], record["prompt_id"]


def _kind_of_failure(record: dict) -> str:
    """Why there is no caption, in a few words: `rejected: repetition`, `failed`."""
    checks, status = record["checks"] or (), record["status"]
    why = [check for check in checks if DEFAULT_ACTIONS.get(check) == "reask" and check != "empty"]
    if not why and status == "rejected":
        why = [check for check in checks if check not in CLEANINGS]
    if not why and status not in ("refused", "truncated") and record["finish_reason"] not in (None, "", "stop"):
        why = [record["finish_reason"]]
    return f"{status}: {', '.join(why)}" if why else status
