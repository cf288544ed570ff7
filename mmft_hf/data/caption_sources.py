"""Where the text of an image is drawn from: the class template, or captions that a step, aspect or prompt wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from datasets import Dataset, List, Value

from ..core.console import many
from ..core.errors import UserError, nearest
from ..core.reading import parse_json
from .caption_records import fields_of_records
from .sampling import IGNORED
from .splits import captions_of

SOURCES = "caption_sources"  # column: for each text of `captions_of`, a number whose bit k says whether it is of the k-th source
TEMPLATE, CAPTIONS = "template", "captions"
FIELDS = ("step", "aspect", "prompt_id")  # of a caption's record: their values are the names of its sources
MOST = 60  # sources: bits of a number


def parse_mix(setting: Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """The shares in `NAME=SHARE` words, or in a mapping: the template first, then the other sources by name.

    What is left to 1 goes to all captions alike; `captions` may state it.

    Raises:
        UserError: another form, a share outside 0 to 1, a repeated name, a sum above 1, or with `captions` another sum than 1.
    """
    if (
        len(setting) == 1 and not isinstance(setting, Mapping) and setting[0].startswith("{")
    ):  # a mapping in a YAML file
        setting = parse_json(setting[0], "--text_mix", dict[str, float])
    words = list(setting.items()) if isinstance(setting, Mapping) else [tuple(word.rsplit("=", 1)) for word in setting]
    shares: dict[str, float] = {}
    for word in words:
        try:
            name, share = word[0], float(word[1])
        except (IndexError, TypeError, ValueError):
            name, share = "", -1.0
        if not name or not 0 <= share <= 1 or name in shares:
            found = "=".join(map(str, word))
            raise UserError(
                f"--text_mix: expected different sources with shares from 0 to 1, found {found!r}. For example, type --text_mix "
                f"{TEMPLATE}=0.2."
            )
        shares[name] = share
    total, rest = sum(shares.values()), shares.pop(CAPTIONS, None)
    if total > 1 + 1e-6 or (rest is not None and total < 1 - 1e-6):
        expected = "a sum of at most 1" if rest is None else f"a sum of 1 with {CAPTIONS} among them"
        raise UserError(f"--text_mix: expected {expected}, found {total:g}. Type other shares.")
    if len(shares) > MOST:
        raise UserError(f"--text_mix: expected at most {MOST} sources, found {len(shares)}. Leave some out.")
    order = sorted(shares, key=lambda name: (name != TEMPLATE, name))
    return {name: shares[name] for name in order if shares[name] > 0}


def with_caption_sources(dataset: Dataset, mix: Mapping[str, float]) -> tuple[Dataset, list[str]]:
    """The dataset with a column that says which captions are of which source, and notes on images that lack one.

    Args:
        dataset: columns `captions` and `caption_records`. Records belong to captions by their text.
        mix: as `parse_mix` gives it.

    Raises:
        UserError: no caption is of a source.
    """
    dataset = dataset.remove_columns([SOURCES]) if SOURCES in dataset.column_names else dataset
    names = sources_of(mix)
    if not names:
        return dataset, []
    if "captions" not in dataset.column_names or "caption_records" not in dataset.column_names:
        raise UserError(
            f"--text_mix {names[0]}={mix[names[0]]:g}: expected columns captions and caption_records, which say where captions are from, "
            f"found {', '.join(dataset.column_names)}. Type --dataset_name with a folder of mmft-hf caption, or {TEMPLATE} alone."
        )
    bits, known, column = {name: 1 << k for k, name in enumerate(names)}, set(), []
    for captions, records in zip(dataset["captions"][:], fields_of_records(dataset, ("text", *FIELDS)), strict=True):
        texts = captions_of(captions)
        of: dict[str, set[str]] = {text: set() for text in texts}
        for text, *values in records:
            if text and text.strip() in of:
                of[text.strip()] |= {value for value in values if value}
        known |= set().union(*of.values())
        column.append([sum(bits.get(source, 0) for source in of[text]) for text in texts])
    if missing := [name for name in names if name not in known]:
        raise UserError(
            f"--text_mix: expected {TEMPLATE}, {CAPTIONS} or a step, aspect or prompt_id of the captions, found {missing[0]!r}."
            f"{nearest(missing[0], known)} Known: {', '.join(sorted(known)) or 'none'}."
        )
    rows = [own for own, label in zip(column, dataset["label"][:], strict=True) if label != IGNORED and own]
    notes = []
    for name in names:
        if lacking := sum(not any(bit & bits[name] for bit in own) for own in rows):
            notes.append(
                f"{many(lacking, 'training image')} of {len(rows):,} with captions {'has' if lacking == 1 else 'have'} none of {name}: "
                "the class template takes its place."
            )
    return dataset.add_column(SOURCES, column, feature=List(Value("int64"))), notes


def sources_of(mix: Mapping[str, float]) -> list[str]:
    """The sources that are captions, in the order of their bits."""
    return [name for name in mix if name != TEMPLATE]


def sources_digest(dataset: Dataset) -> str:
    """16 hex digits of which captions are of which source."""
    return hashlib.sha256(json.dumps(dataset[SOURCES][:]).encode()).hexdigest()[:16]
