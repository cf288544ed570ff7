"""`import_captions`: reads the JSON caption files that the method's authors publish, through an explicit key rule."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, Image

from ...core.errors import UserError, nearest
from ...data.texts import clean_class_name
from ..judge.checks import CaptionChecker, duplicate_key, duplicates
from ..types import ACCEPTED
from .dataset import CAPTION_FEATURES, RECORD
from .tables import CaptionTable, few, nfc, put_beside, record_key, texts_of

KEY_RULES = ("file_name", "class/file_name", "class_file_name", "index")
MAX_FILE_BYTES = 1 << 30  # the largest benchmark, 1.28 million captions of one aspect, takes a third of it
_SEPARATORS = {"class/file_name": "/", "class_file_name": "_"}
_QUOTES = str.maketrans("‘’‚‛“”„‟", "''''\"\"\"\"")


@dataclass(frozen=True)
class FileReport:
    """What one file gave.

    Args:
        path: of the file.
        aspect: recorded with its captions.
        keys: how many it has.
        unmatched_keys: those that fit no image, in the file's order.
        images_without: names of the images that none of its keys fits, in the data set's order.
    """

    path: str
    aspect: str
    keys: int
    unmatched_keys: list[str]
    images_without: list[str]


@dataclass
class ImportReport:
    """What an import did.

    Args:
        key_rule, files: as given; `images`: rows of the data set.
        statuses: how many of the captions in the files have each.
        repeated: captions that the data set had already.
        images_without: names of the images that got no accepted caption from any of the files.
        unreadable: names of those that cannot be read; they have no `image_sha256`.
    """

    key_rule: str
    images: int
    files: list[FileReport] = field(default_factory=list)
    statuses: Counter = field(default_factory=Counter)
    repeated: int = 0
    images_without: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The same in sentences."""
        counts = ", ".join(f"{n:,} {status}" for status, n in self.statuses.most_common()) or "none"
        lines = [f"Captions read: {counts}."]
        if self.repeated:
            lines.append(f"{self.repeated:,} captions were there already and were left out.")
        for file in self.files:
            lines.append(
                f"{file.path}: aspect {file.aspect}, {file.keys - len(file.unmatched_keys):,} of {file.keys:,} keys "
                f"matched by {self.key_rule}."
            )
            if file.unmatched_keys:
                lines.append(f"  {len(file.unmatched_keys):,} keys fit no image: {few(file.unmatched_keys)}.")
            if file.images_without:
                lines.append(f"  {len(file.images_without):,} images are not in it: {few(file.images_without)}.")
        if self.images_without:
            count = f"{len(self.images_without):,} of {self.images:,}"
            lines.append(f"{count} images got no caption that can be used: {few(self.images_without)}.")
        if self.unreadable:
            lines.append(f"{len(self.unreadable):,} images cannot be read: {few(self.unreadable)}.")
        return lines


def import_captions(
    dataset: Dataset, files: Sequence[str | Path], key_rule: str, model: str | None = None, tokenizer=None, checker=None
) -> tuple[Dataset, ImportReport]:
    """Adds the captions of JSON files to the images they belong to, after those that the data set already has.

    A file is an object of captions by key. If any of its values is text, its aspect is the file's name
    (`VisualCaption.json`: `visual`); if all are lists, they mix aspects in an order that nobody recorded: `unknown`.
    Null and blank captions are recorded with status `empty`.

    Args:
        dataset: columns `image` (`Image`) and `label` (`ClassLabel`), and perhaps captions.
        files: in the order in which their captions are recorded.
        key_rule: what a key is. `file_name`: base name of the image's file; `class/file_name`, `class_file_name`: with
            the name of its class, or of the folder it lies in, before it; `index`: row number from 0, alone or as
            `<class>_<index>.jpg`, where the class is checked. A number alone cannot be: the rows must be in the order
            that the captions were written in.
        model (*optional*): who wrote them; recorded as `imported` otherwise.
        tokenizer (*optional*): of the model that will be trained; for the checks, where no `checker` is given.
        checker (*optional*): a `CaptionChecker`; by default one that judges but cleans nothing.

    Returns:
        The data set with `captions`, `caption_records` and `image_sha256`, its pictures untouched; and a report. A
        caption that is there already (same aspect, model, prompt, sample and text) is left out.

    Raises:
        UserError: a file that is no such object, a key that fits several images, several keys that fit one, a file of
            which no key fits, or columns that cannot be used.
    """
    if key_rule not in KEY_RULES:
        raise UserError(
            f"key_rule: expected one of {', '.join(KEY_RULES)}, found {key_rule!r}.{nearest(key_rule, KEY_RULES)}"
        )
    paths = [Path(file) for file in files]
    if not paths or len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"caption files: expected one or more different ones, found {few(paths) or 'none'}.")
    table = CaptionTable("the data set", dataset)
    images = _Images(table)
    checker = checker or CaptionChecker(table.class_names, tokenizer=tokenizer, clean=False)
    known = [set(map(record_key, records)) for records in table.records]
    samples, accepted, added = Counter(), set(), []
    report = ImportReport(key_rule, len(dataset), unreadable=table.unreadable())
    for path in paths:
        texts, aspect = _read_captions(path)
        rows = images.rows(list(texts), key_rule, path)
        for key, row in rows.items():
            for text in texts[key]:
                checked = checker.check(
                    " ".join(text.translate(_QUOTES).split()), None, table.labels[row], last_try=True
                )
                good = checked.status in ACCEPTED
                record = dict.fromkeys(RECORD) | {
                    "aspect": aspect,
                    "text": checked.text if good else None,
                    "status": checked.status,
                    "model": model or "imported",
                    "prompt_id": path.stem,
                    "sample": samples[row, aspect],
                    "checks": list(checked.checks),
                    "clip_tokens": checked.clip_tokens if good else None,
                    "mentions_label": checked.mentions_label if good else None,
                }
                samples[row, aspect] += 1
                report.statuses[checked.status] += 1
                if good:
                    accepted.add(row)
                if record_key(record) in known[row]:
                    report.repeated += 1
                else:
                    known[row].add(record_key(record))
                    table.records[row].append(record)
                    added.append(record)
        matched = set(rows.values())
        unmatched = [key for key in texts if key not in rows]
        without = [table.image_name(row) for row in range(len(dataset)) if row not in matched]
        report.files.append(FileReport(str(path), aspect, len(texts), unmatched, without))
    report.images_without = [table.image_name(row) for row in range(len(dataset)) if row not in accepted]
    names = [sha or str(row) for row, sha in enumerate(table.hashes)]
    texts = ((names[row], record["text"]) for row, records in enumerate(table.records) for record in records)
    shared = duplicates((name, text) for name, text in texts if text)
    for record in added:
        record["checks"] += ["duplicate"] * bool(record["text"] and duplicate_key(record["text"]) in shared)
    columns = {
        "captions": list(map(texts_of, table.records, table.captions)),
        "caption_records": table.records,
        "image_sha256": table.hashes,
    }
    return put_beside(table.rest, columns, CAPTION_FEATURES).cast_column("image", Image()), report


def _read_captions(path: Path) -> tuple[dict[str, list[str]], str]:
    """The captions by key, a missing one as an empty text; and their aspect."""

    def unique(pairs: list) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
            raise UserError(f"{path}: expected each key once, found {few(twice)} more than once. Remove the others.")
        return found

    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            size = f"{path.stat().st_size:,} bytes"
            raise UserError(f"{path}: expected at most {MAX_FILE_BYTES:,} bytes, found {size}. Split it in several.")
        values = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=unique)
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise UserError(f"{path}: expected a JSON file in UTF-8, found {error}.") from error
    if not isinstance(values, dict) or not values:
        found = "an empty one" if values == {} else f"a JSON {type(values).__name__}"
        raise UserError(f"{path}: expected a JSON object of captions by image, found {found}.")
    texts = {}
    for key, value in values.items():
        listed = (value or [None]) if isinstance(value, list) else [value]
        texts[key] = ["" if text is None else text for text in listed]
        for text in (key, *texts[key]):
            if not isinstance(text, str) or not _encodable(text):
                raise UserError(
                    f"{path}, key {key!r}: expected a text, a list of texts or null, found {json.dumps(value)[:80]}."
                )
    flat = any(not isinstance(value, list) for value in values.values())
    name = path.stem.lower()
    return texts, (name.removesuffix("caption").rstrip("_- ") or name) if flat else "unknown"


def _encodable(text: str) -> bool:
    """Whether it can be written: JSON can spell half a surrogate pair, UTF-8 cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


class _Images:
    """What the images of a data set are called under each rule."""

    def __init__(self, table: CaptionTable):
        self._table = table

    def __len__(self) -> int:
        return len(self._table.files)

    def _class(self, row: int) -> str:
        return self._table.class_names[self._table.labels[row]]

    def keys(self, row: int, rule: str) -> set[str]:
        """Every key that means this image: two where the folder is called other than the class."""
        folder, file = self._table.files[row]
        if rule == "index":
            return {str(row), f"{_plain(self._class(row))}_{row}"}
        if not file:
            return set()
        if rule == "file_name":
            return {file}
        return {f"{name}{_SEPARATORS[rule]}{file}" for name in (nfc(self._class(row)), folder) if name}

    def find(self, keys: Sequence[str], rule: str) -> dict[str, list[int]]:
        """The rows that each key fits, for the keys that fit any."""
        rows: dict[str, list[int]] = {}
        for row in range(len(self)):
            for key in self.keys(row, rule):
                rows.setdefault(key, []).append(row)
        spelt = _index_key if rule == "index" else nfc
        return {key: rows[name] for key in keys if (name := spelt(key)) in rows}

    def rows(self, keys: Sequence[str], rule: str, path: Path) -> dict[str, int]:
        """The row of each key that fits one.

        Raises:
            UserError: wherever a caption could land on another picture than its own, or if no key fits.
        """
        found = self.find(keys, rule)
        if rule == "index":
            self._check_order(keys, found, path)
        if not found:
            raise UserError(
                f"{path}: expected keys of rule {rule}, such as {few(self._examples(rule)) or 'none'}; found "
                f"{few(keys)}, and none fits. {self._advice(keys, rule)}"
            )
        unclear = {key: rows for key, rows in found.items() if len(rows) > 1}
        if unclear:
            key, rows = next(iter(unclear.items()))
            names = few([f"{self._table.image_name(row)} (row {row})" for row in rows])
            raise UserError(
                f"{path}: expected keys that fit one image each, found {len(unclear):,} that fit several under rule "
                f"{rule}: {key!r} fits {names}. {self._telling_apart(keys, rule, unclear)}"
            )
        keys_of: dict[int, str] = {}
        for key, (row,) in found.items():
            if keys_of.setdefault(row, key) != key:
                raise UserError(
                    f"{path}: expected one key per image, found {keys_of[row]!r} and {key!r}, which both fit "
                    f"{self._table.image_name(row)}. Remove one."
                )
        return {key: row for key, (row,) in found.items()}

    def _check_order(self, keys: Sequence[str], found: dict, path: Path) -> None:
        """Refuses numbered keys whose class is not that of the row: then the rows are in another order."""
        for key in keys:
            name, _, number = _index_key(key).rpartition("_")
            if key not in found and name and int(number) < len(self):
                raise UserError(
                    f"{path}: expected rows in the order of the keys, found key {key!r} at row {int(number)}, an image "
                    f"of class {self._class(int(number))!r}. Use the data set that the captions were written for, in "
                    f"its order. {self._advice(keys, 'index')}"
                )

    def _examples(self, rule: str) -> list[str]:
        return [key for row in range(min(len(self), 3)) for key in sorted(self.keys(row, rule))]

    def _advice(self, keys: Sequence[str], rule: str) -> str:
        fits = {other: len(self.find(keys, other)) for other in KEY_RULES if other != rule}
        best = max(fits, key=fits.get)
        if fits[best]:
            return f"Type --key_rule {best}, which fits {fits[best]:,} of {len(keys):,} keys."
        return "No other rule fits any: is it a file of another data set, or of another split?"

    def _telling_apart(self, keys: Sequence[str], rule: str, unclear: dict[str, list[int]]) -> str:
        for other in KEY_RULES:
            names = [[self.keys(row, other) for row in rows] for rows in unclear.values()]
            if other == rule or any(not all(n) or sum(map(len, n)) > len(set().union(*n)) for n in names):
                continue
            if self.find(keys, other):
                return f"Type --key_rule {other}."
            return f"Rule {other} tells them apart: write keys such as {few(sorted(names[0][0] | names[0][1]))}."
        return "Give the images different file names."


def _index_key(key: str) -> str:
    """`7` for `007`, `grey cat_7` for `Grey_cat_7.jpg`, and an empty text for what is no numbered key."""
    match = re.fullmatch(r"(?:(.+)_)?([0-9]{1,12})(?:\.\w+)?", key, re.DOTALL)
    if not match or (match[1] is None and "." in key):
        return ""
    return f"{_plain(match[1])}_{int(match[2])}" if match[1] else str(int(match[2]))


def _plain(class_name: str) -> str:
    return nfc(clean_class_name(class_name).casefold())
