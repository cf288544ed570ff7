"""Turns results into a captioned dataset: a `datasets.map` that adds three columns and keeps every image byte."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from datasets.fingerprint import Hasher

from ...core.errors import UserError
from ...core.markdown import public_name
from ...data.images import BadImage, original_bytes
from ...data.splits import captions_of
from ...data.texts import class_prompt
from ..ask.captioner import Captioner
from ..ask.cost import Spending
from ..ask.journal_reader import JournalReader, by_slot
from ..ask.pictures import sha256
from ..ask.plan import Keys, Slot, digests
from ..judge.checks import CaptionChecker, Checked, SharedTexts, duplicate_key, duplicates
from ..types import ACCEPTED, OPEN

RECORD = {
    "aspect": Value("string"),
    "text": Value("string"),
    "status": Value("string"),
    "finish_reason": Value("string"),
    "model": Value("string"),
    "prompt_id": Value("string"),
    "sample": Value("int32"),
    "checks": List(Value("string")),
    "clip_tokens": Value("int32"),
    "mentions_label": Value("bool"),
    "score": Value("float32"),
    "scores": List({"name": Value("string"), "value": Value("float32")}),
    "step": Value("string"),
    "parents": List(Value("string")),
    "view": Value("string"),
    "refs": List(Value("string")),
    "removed_by": Value("string"),
    "tokens_in": Value("int32"),
    "tokens_out": Value("int32"),
    "attempts": Value("int32"),
    "run_id": Value("string"),
}
CAPTION_FEATURES = {"captions": List(Value("string")), "caption_records": [RECORD], "image_sha256": Value("string")}

# A row of `steps.parquet`: what a step found out about a caption (see `steps.base.DETAIL`).
_DETAIL_TEXTS = dict.fromkeys(("step", "image_sha256", "record", "kind", "text", "verdict"), Value("string"))
STEP_DETAILS = Features({**_DETAIL_TEXTS, "votes": List(Value("string"))})


class TextSource:
    """Caption records from texts that need no model: columns of the dataset, or class templates.

    Args:
        dataset: the split, with its images not decoded.

    Raises:
        UserError: a column that the captioner reads is missing.
    """

    def __init__(self, dataset: Dataset, captioner: Captioner, checker: CaptionChecker, run_id: str | None):
        for column in captioner.columns:
            if column not in dataset.column_names:
                raise UserError(
                    f"column {column!r} is missing: found {', '.join(dataset.column_names)}. Type --text_columns NAME."
                )
        self.captioner, self.checker, self.run_id = captioner, checker, run_id
        self.class_names = dataset.features["label"].names
        self.repeated: frozenset[str] = frozenset()
        if captioner.backend == "columns":
            rows = dataset.select_columns([*captioner.columns, "label"])
            pairs = ((str(digest), self.texts(row)) for (digest, _), row in zip(digests(dataset), rows, strict=True))
            texts = ((image, text) for image, found in pairs for _, text, _ in found if text)
            self.repeated = frozenset(duplicates(texts))

    def texts(self, row: Mapping) -> list[tuple[str, str, int]]:
        """`(aspect, text, sample)` of one row; blank texts are included, so that they are counted."""
        if self.captioner.backend == "template":
            name = self.class_names[row["label"]]
            return [("template", class_prompt(t, name), i) for i, t in enumerate(self.captioner.templates)]
        found = []
        for column in self.captioner.columns:
            value = row[column]
            values = [value] if isinstance(value, str) or value is None else value or [None]
            found += [(column, (captions_of(text) or [""])[0], i) for i, text in enumerate(values)]
        return found

    def __call__(self, row: Mapping, image_sha256: str) -> list[dict]:
        records = []
        for aspect, text, sample in self.texts(row):
            checked = self.checker.check(text, None, row["label"], last_try=True)
            record = {"aspect": aspect, "sample": sample, "model": self.captioner.backend, "prompt_id": aspect}
            if self.captioner.backend == "template":
                record["prompt_id"] = self.captioner.templates[sample]
            records.append(record | {"attempts": 1, "run_id": self.run_id} | verdict(checked, self.repeated))
        return records


@dataclass
class JournalSource:
    """Caption records from a journal: every try of every slot, in the order of the aspects.

    Args:
        asked: slots that were asked for. Those without a result get a record of status `not_run`.
        repeated: keys of texts that several images share, for the check `duplicate`.
    """

    keys: Keys
    reader: JournalReader
    checker: CaptionChecker
    class_names: Sequence[str]
    asked: Container[str]
    repeated: frozenset[str] = frozenset()

    def __call__(self, row: Mapping, image_sha256: str) -> list[dict]:
        label, records = row["label"], []
        for slot, tries in self._tries(row, image_sha256):
            same = {"aspect": slot.aspect, "sample": slot.sample, "prompt_id": slot.prompt_id}
            same["model"] = public_name(self.keys.captioner.model)
            if not tries:
                records.append(same | {"status": "not_run", "checks": [], "attempts": 0})
            prompt = slot.single
            for i, tried in enumerate(tries):
                record, reask = self._record(tried, label, prompt, last=i == len(tries) - 1)
                records.append(same | record)
                prompt = f"{slot.single}\n{reask}" if reask else prompt
        return records

    def raw_texts(self, row: Mapping, image_sha256: str) -> list[str | None]:
        """What the model wrote for each of the row's records, accepted or not."""
        tries = [tries for _, tries in self._tries(row, image_sha256)]
        return [tried["raw_text"] for found in tries for tried in found or [{"raw_text": None}]]

    def _tries(self, row: Mapping, image_sha256: str) -> list[tuple[Slot, list[Mapping]]]:
        """The slots of a row that have results or were asked for, each with its results in order."""
        slots = self.keys.slots(image_sha256, self.class_names[row["label"]])
        history = self.reader.history([slot.key for slot in slots])
        return [(s, history.get(s.key, [])) for s in slots if s.key in history or s.key in self.asked]

    def _record(self, tried: Mapping, label: int, prompt: str, last: bool) -> tuple[dict, str | None]:
        """The record of a try, and what was added to the prompt of the next one."""
        record = {name: tried[name] for name in ("finish_reason", "tokens_in", "tokens_out", "attempts", "run_id")}
        if tried["model"]:
            record["model"] = public_name(tried["model"])  # a server may call it by its folder
        if tried["raw_text"] is None or tried["error_class"] or tried["status"] in ("failed", "bad_image", "not_run"):
            return record | {"status": tried["status"], "checks": json.loads(tried["checks"] or "[]")}, None
        # The journal keeps the model's own words, so that changed checks apply without another call.
        final = last and not tried["pending"]
        checked = self.checker.check(
            tried["raw_text"], tried["finish_reason"], label, prompt, tried["thinking_tokens"] or 0, last_try=final
        )
        reask = checked.reask
        if not final or reask:
            status = checked.status if checked.status not in ACCEPTED else "rejected"
            checked = replace(checked, text=None, status=status)
        return record | verdict(checked, self.repeated), reask


def verdict(checked: Checked, repeated: Container[str] = ()) -> dict:
    """The fields of a caption record that the checks determine."""
    text = checked.text if checked.status in ACCEPTED else None
    checks = [*checked.checks, *(["duplicate"] if text and duplicate_key(text) in repeated else [])]
    return {
        "text": text,
        "status": checked.status,
        "checks": checks,
        "clip_tokens": checked.clip_tokens if text else None,
        "mentions_label": checked.mentions_label if text else None,
    }


def captions_from(records: Iterable[Mapping], others: Iterable[str] = ()) -> list[str]:
    """The `captions` of an image: accepted texts in the order of the records, then `others`, each once."""
    accepted = [record["text"] for record in records if record["status"] in ACCEPTED and record["text"]]
    return list(dict.fromkeys([*accepted, *others]))


def stored_image(image: Mapping | None) -> tuple[dict, str | None]:
    """An undecoded image with its original bytes and its base name, as a dataset stores it; and its sha256.

    The bytes and the sha256 of an image that cannot be read are None.
    """
    path = (image or {}).get("path")
    name = path.replace("\\", "/").rsplit("/", 1)[-1] if path else None
    try:
        data = original_bytes(image)
    except BadImage:
        return {"bytes": None, "path": name}, None
    return {"bytes": data, "path": name}, sha256(data)


def add_captions(
    dataset: Dataset,
    source: Callable[[Mapping, str], list[dict]],
    fingerprint: str,
    progress: bool = True,
    rows: Container[int] | None = None,
) -> Dataset:
    """Adds `captions`, `caption_records` and `image_sha256`, and changes nothing else.

    Args:
        dataset: `image` (not decoded), `label` and whatever the source reads.
        source: gives the records of a row, from the row and the sha256 of its picture.
        fingerprint: identifies the result in the cache of `datasets`; must change with everything that the source reads.
        rows: rows that get captions; None: all.

    Returns:
        The dataset, its images with their original bytes. A picture that cannot be read keeps its row, with one record
        of status `bad_image` and no caption.

    Raises:
        RuntimeError: the bytes of a picture changed on the way (a defect).
    """
    columns = {name for name in CAPTION_FEATURES if name in dataset.column_names}
    features = Features({k: v for k, v in dataset.features.items() if k not in columns} | CAPTION_FEATURES)

    def add(row: dict, index: int) -> dict:
        image, digest = stored_image(row["image"])
        if digest is None:
            found = [{"status": "bad_image", "checks": [], "attempts": 0}]
        else:
            found = source(row, digest) if rows is None or index in rows else []
        records = [dict.fromkeys(RECORD) | record for record in found]
        captions = captions_from(records)
        return {"image": image, "captions": captions, "caption_records": records, "image_sha256": digest}

    captioned = dataset.map(
        add,
        with_indices=True,
        features=features,
        remove_columns=sorted(columns),
        new_fingerprint=Hasher.hash((fingerprint, list(RECORD))),  # the cache may have records of an earlier version
        writer_batch_size=100,  # rows that are in memory at a time, with their pictures
        desc="Writing" if progress else None,
    )
    for row in captioned.select_columns(["image", "image_sha256"]):
        if row["image_sha256"] and sha256(row["image"]["bytes"]) != row["image_sha256"]:
            raise RuntimeError("the bytes of a picture changed on their way through datasets.map")
    return captioned.cast_column("image", Image())


def without_captions(dataset: Dataset, progress: bool = True) -> Dataset:
    """Adds the same columns without captions, so that splits that are not captioned have the columns of the others."""
    undecoded = dataset.cast_column("image", Image(decode=False))
    pictures = [str(digest) for digest, _ in digests(undecoded)]  # the content of files may have changed
    fingerprint = Hasher.hash((undecoded._fingerprint, pictures, "without captions", 1))
    return add_captions(undecoded, lambda row, digest: [], fingerprint, progress)


@dataclass(frozen=True)
class Results:
    """What a journal holds for a plan.

    Args:
        digest: of all results.
        repeated: keys of texts that several pictures share.
        open: number of slots that the next run asks for again.
        statuses: number of slots by status.
        spent: tokens, attempts and cost of all results.
    """

    digest: str
    repeated: frozenset[str]
    open: int
    statuses: Mapping[str, int]
    spent: Spending


def results_of(folder: str | Path, slots: set[str], others: set[str] = frozenset()) -> Results:
    """Reads the results of a plan, slot by slot. Those of `others` count only towards the digest and the spending."""
    columns = {"slot", "reask", "pending", "status", "text", "image_sha256", "error_class", *Spending.COLUMNS}
    spent, lines, shared, statuses = Spending(), [], SharedTexts(), Counter()
    for slot, rows in by_slot(folder, tuple(columns)):
        if slot not in slots and slot not in others:
            continue
        for row in rows:
            said = sha256(f"{row['raw_text']}\0{row['error_class']}".encode())
            lines.append(f"{row['key']} {row['status']} {row['pending']} {said}")
            spent.add(row)
        last = rows[-1]
        if slot in slots:
            statuses["not_run" if last["pending"] else last["status"]] += 1
        if last["text"] and last["status"] in ACCEPTED:
            shared.add(last["image_sha256"], last["text"])
    statuses["not_run"] += len(slots) - sum(statuses.values())
    open_ = sum(count for status, count in statuses.items() if status in OPEN)
    return Results(sha256("\n".join(lines).encode()), frozenset(shared.keys), open_, +statuses, spent)
