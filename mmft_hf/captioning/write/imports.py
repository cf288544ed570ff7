"""`import_captions`: reads JSON caption files, such as those that the authors of MMFT publish.

A key rule states how the keys of a file name the images, because a guess could pair a caption with another picture.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset

from ...core.console import some
from ...core.errors import UserError, nearest
from ...data.texts import clean_class_name, encodable
from ..judge.checks import CaptionChecker, duplicate_key, duplicates
from ..types import ACCEPTED
from .dataset import CAPTION_FEATURES, RECORD, captions_from, verdict
from .labelled import LabelledImages, nfc, note, record_key, with_columns

MAX_FILE_BYTES = 1 << 30  # the largest benchmark, 1.28 million captions of one aspect, takes a third of it
_QUOTES = str.maketrans("‘’‚‛“”„‟", "''''\"\"\"\"")


# -- key rules --------------------------------------------------------------------------------------------------------
def _with_class(images: LabelledImages, row: int, separator: str) -> set[str]:
    """The file name after the name of its class, and after the name of its folder."""
    folder, file = images.files[row]
    return {f"{name}{separator}{file}" for name in (nfc(images.class_name(row)), folder) if name and file}


KEY_RULES = {  # rule -> every key that means the image in a row
    "file_name": lambda images, row: {images.files[row][1]} - {""},
    "class/file_name": lambda images, row: _with_class(images, row, "/"),
    "class_file_name": lambda images, row: _with_class(images, row, "_"),
    "index": lambda images, row: {str(row), f"{_plain(images.class_name(row))}_{row}"},
}


def _plain(class_name: str) -> str:
    return nfc(clean_class_name(class_name).casefold())


def _index_key(key: str) -> str:
    """`7` for `007`, `grey cat_7` for `Grey_cat_7.jpg`, and an empty text for anything else."""
    match = re.fullmatch(r"(?:(.+)_)?([0-9]{1,12})(?:\.\w+)?", key, re.DOTALL)
    if not match or (match[1] is None and "." in key):
        return ""
    return f"{_plain(match[1])}_{int(match[2])}" if match[1] else str(int(match[2]))


def _find(images: LabelledImages, keys: Sequence[str], rule: str) -> dict[str, list[int]]:
    """The rows that each key fits, for the keys that fit any."""
    rows: dict[str, list[int]] = {}
    for row in range(len(images.files)):
        for key in KEY_RULES[rule](images, row):
            rows.setdefault(key, []).append(row)
    normal = _index_key if rule == "index" else nfc
    return {key: rows[name] for key in keys if (name := normal(key)) in rows}


def _match(images: LabelledImages, keys: Sequence[str], rule: str, path: Path) -> dict[str, int]:
    """The row of each key that fits one.

    Raises:
        UserError: a caption could be paired with another picture than its own, or no key fits.
    """
    found = _find(images, keys, rule)
    if rule == "index":
        _check_order(images, keys, found, path)
    if not found:
        examples = [key for row in range(len(images.files))[:3] for key in sorted(KEY_RULES[rule](images, row))]
        raise UserError(
            f"{path}: expected keys of rule {rule}, such as {some(examples, 3) or 'none'}; found {some(keys, 3)}, and none "
            f"fits. {_better_rule(images, keys, rule)}"
        )
    unclear = {key: rows for key, rows in found.items() if len(rows) > 1}
    if unclear:
        key, rows = next(iter(unclear.items()))
        names = some([f"{images.image_name(row)} (row {row})" for row in rows], 3)
        raise UserError(
            f"{path}: expected keys that fit one image each, found {len(unclear):,} that fit several under rule "
            f"{rule}: {key!r} fits {names}. {_unique_rule(images, keys, rule, unclear)}"
        )
    keys_of: dict[int, str] = {}
    for key, (row,) in found.items():
        if keys_of.setdefault(row, key) != key:
            raise UserError(
                f"{path}: expected one key per image, found {keys_of[row]!r} and {key!r}, which both fit "
                f"{images.image_name(row)}. Remove one."
            )
    return {key: row for key, (row,) in found.items()}


def _check_order(images: LabelledImages, keys: Sequence[str], found: dict, path: Path) -> None:
    """Refuses numbered keys with another class than their row: the rows must then be in another order."""
    for key in keys:
        name, _, number = _index_key(key).rpartition("_")
        if key not in found and name and int(number) < len(images.files):
            raise UserError(
                f"{path}: expected rows in the order of the keys, found key {key!r} at row {int(number)}, an image "
                f"of class {images.class_name(int(number))!r}. Use the dataset that the captions were written for, in "
                f"its order. {_better_rule(images, keys, 'index')}"
            )


def _better_rule(images: LabelledImages, keys: Sequence[str], rule: str) -> str:
    """The advice where no key fits: the rule that most keys fit."""
    fits = {other: len(_find(images, keys, other)) for other in KEY_RULES if other != rule}
    best = max(fits, key=fits.get)
    if fits[best]:
        return f"Type --key_rule {best}, which fits {fits[best]:,} of {len(keys):,} keys."
    return "No other rule fits any: is it a file for another dataset, or for another split?"


def _unique_rule(images: LabelledImages, keys: Sequence[str], rule: str, unclear: dict[str, list[int]]) -> str:
    """The advice where keys fit several images: a rule that gives these images different keys."""
    for other in KEY_RULES:
        names = [[KEY_RULES[other](images, row) for row in rows] for rows in unclear.values()]
        if other == rule or any(not all(n) or sum(map(len, n)) > len(set().union(*n)) for n in names):
            continue
        if _find(images, keys, other):
            return f"Type --key_rule {other}."
        return f"Rule {other} tells them apart: write keys such as {some(sorted(names[0][0] | names[0][1]), 3)}."
    return "Give the images different file names."


# -- the import -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ImportedFile:
    """What was found in one file.

    Args:
        path: of the file.
        aspect: recorded with its captions.
        keys: number of keys.
        unmatched_keys: keys that fit no image, in the order of the file.
        images_without: names of the images that none of its keys fits, in the order of the dataset.
    """

    path: str
    aspect: str
    keys: int
    unmatched_keys: list[str]
    images_without: list[str]


@dataclass
class ImportSummary:
    """What an import did.

    Args:
        key_rule, files: as given. images: number of rows of the dataset.
        statuses: number of captions in the files by status.
        repeated: number of captions that the dataset already had.
        images_without: names of the images that got no accepted caption from any of the files.
        unreadable: names of the images that cannot be read; they have no `image_sha256`.
    """

    key_rule: str
    images: int
    files: list[ImportedFile] = field(default_factory=list)
    statuses: Counter = field(default_factory=Counter)
    repeated: int = 0
    images_without: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The summary in sentences."""
        counts = ", ".join(f"{n:,} {status}" for status, n in self.statuses.most_common()) or "none"
        lines = [f"Captions read: {counts}."]
        if self.repeated:
            lines.append(f"{self.repeated:,} captions were there already and were left out.")
        for file in self.files:
            matched = f"{file.keys - len(file.unmatched_keys):,} of {file.keys:,} keys matched by {self.key_rule}"
            lines.append(f"{file.path}: aspect {file.aspect}, {matched}.")
            lines += note("  ", file.unmatched_keys, "keys fit no image")
            lines += note("  ", file.images_without, "images are not in it")
        lines += note("", self.images_without, f"of {self.images:,} images got no usable caption")
        lines += note("", self.unreadable, "images cannot be read")
        return lines


def import_captions(
    dataset: Dataset, files: Sequence[str | Path], key_rule: str, model: str | None = None, tokenizer=None, checker=None
) -> tuple[Dataset, ImportSummary]:
    """Adds the captions of JSON files to the images they belong to, after captions that the dataset already has.

    A file is an object of captions by key. If any of its values is a text, its aspect is the file's name
    (`VisualCaption.json`: `visual`). If all values are lists, they mix aspects in an unrecorded order: `unknown`.
    Null and blank captions are recorded with status `empty`.

    Args:
        dataset: columns `image` (`Image`) and `label` (`ClassLabel`), and perhaps captions.
        files: in the order in which their captions are recorded.
        key_rule: what a key is. `file_name`: base name of the image file. `class/file_name`, `class_file_name`: preceded
            by the name of its class, or of the folder it is in. `index`: row number from 0, alone or as
            `<class>_<index>.jpg`, where the class is checked. A number alone cannot be checked: the rows must be in the
            order for which the captions were written.
        model (*optional*): the model that wrote them. Default: recorded as `imported`.
        tokenizer (*optional*): of the model that will be trained; used by the checks if no `checker` is given.
        checker (*optional*): a `CaptionChecker`. Default: one that flags but changes nothing.

    Returns:
        The dataset with `captions`, `caption_records` and `image_sha256`, its pictures unchanged; and a summary. A
        caption that is there already (same aspect, model, prompt, sample and text) is left out.

    Raises:
        UserError: a file that is not such an object; a key that fits several images; several keys that fit one image; a
            file of which no key fits; columns that cannot be used.
    """
    if key_rule not in KEY_RULES:
        raise UserError(
            f"key_rule: expected one of {', '.join(KEY_RULES)}, found {key_rule!r}.{nearest(key_rule, KEY_RULES)}"
        )
    paths = [Path(file) for file in files]
    if not paths or len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"caption files: expected one or more different ones, found {some(paths, 3) or 'none'}.")
    images = LabelledImages("the dataset", dataset)
    checker = checker or CaptionChecker(images.class_names, tokenizer=tokenizer, clean=False)
    known = [set(map(record_key, records)) for records in images.records]
    samples, accepted, added = Counter(), set(), []
    summary = ImportSummary(key_rule, len(dataset), unreadable=images.unreadable())
    for path in paths:
        texts, aspect = _read_captions(path)
        rows = _match(images, list(texts), key_rule, path)
        for row, text in ((row, text) for key, row in rows.items() for text in texts[key]):
            plain = " ".join(text.translate(_QUOTES).split())
            record = dict.fromkeys(RECORD) | {
                "aspect": aspect,
                "model": model or "imported",
                "prompt_id": path.stem,
                "sample": samples[row, aspect],
                **verdict(checker.check(plain, None, images.labels[row], last_try=True)),
            }
            samples[row, aspect] += 1
            summary.statuses[record["status"]] += 1
            if record["status"] in ACCEPTED:
                accepted.add(row)
            if record_key(record) in known[row]:
                summary.repeated += 1
            else:
                known[row].add(record_key(record))
                images.records[row].append(record)
                added.append(record)
        unmatched, matched = [key for key in texts if key not in rows], set(rows.values())
        without = [images.image_name(row) for row in range(len(dataset)) if row not in matched]
        summary.files.append(ImportedFile(str(path), aspect, len(texts), unmatched, without))
    summary.images_without = [images.image_name(row) for row in range(len(dataset)) if row not in accepted]
    names = [sha or str(row) for row, sha in enumerate(images.hashes)]
    pairs = ((names[row], record["text"]) for row, records in enumerate(images.records) for record in records)
    shared = duplicates((name, text) for name, text in pairs if text)
    for record in added:
        record["checks"] += ["duplicate"] * bool(record["text"] and duplicate_key(record["text"]) in shared)
    columns = {
        "captions": list(map(captions_from, images.records, images.captions)),
        "caption_records": images.records,
        "image_sha256": images.hashes,
    }
    return with_columns(images.images, columns, CAPTION_FEATURES), summary


def _read_captions(path: Path) -> tuple[dict[str, list[str]], str]:
    """The captions by key, with an empty text for a missing one; and their aspect."""

    def unique(pairs: list) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
            raise UserError(
                f"{path}: expected each key once, found {some(twice, 3)} more than once. Remove the others."
            )
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
            if not isinstance(text, str) or not encodable(text):
                raise UserError(
                    f"{path}, key {key!r}: expected a text, a list of texts or null, found {json.dumps(value)[:80]}."
                )
    flat = any(not isinstance(value, list) for value in values.values())
    name = path.stem.lower()
    return texts, (name.removesuffix("caption").rstrip("_- ") or name) if flat else "unknown"
