"""Captions of refined folders beside those of the dataset: the method `NAME@SOURCE` reads them instead, on the same pictures.

Only the captions of the training images differ. Which images a task has, and validation and test, are those of the dataset.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from datasets import List, Value

from ...core.arguments import DataArguments
from ...core.errors import UserError
from ...core.repositories import describe_source
from ...data.caption_sources import parse_mix, sources_digest, sources_of, with_caption_sources
from ...data.caption_weights import weights_digest, with_caption_weights
from ...data.join import captions_of_all, records_of_all
from ...data.raw import split_for
from ...data.sources import open_source
from ...data.splits import Splits, captions_of
from ...hub.cards.sources import captioning_cost
from .methods import AT, METHODS, mixes, weighs
from .protocol import refined_column, undecoded, with_captions_of

RECORDS = List(
    {
        **dict.fromkeys(("text", "step", "aspect", "prompt_id"), Value("string")),
        "scores": List({"name": Value("string"), "value": Value("float32")}),
    }
)
DEFAULT = "refined"  # the name of a folder that is typed without one
# The methods of a benchmark of refined captions: untuned and trained, each on both captions, and the two controls.
BOTH, CONTROLS = ("zs-cap", "mmft"), ("mmft-shuffle-within", "mmft-no-captions")


def parse_refined(words: Sequence[str]) -> dict[str, str]:
    """Folders by name, of `FOLDER` (named refined) or `NAME=FOLDER`.

    Raises:
        UserError: a name that is empty, has other characters or comes twice.
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, folder = word.partition("=")
        if not equals or Path(word).exists():
            name, folder = DEFAULT, word
        if not folder or not re.fullmatch(r"[\w.-]+", name):
            raise UserError(
                f"--refined: expected FOLDER, or NAME=FOLDER with a name of letters, digits, '.', '_' and '-', found {word!r}."
            )
        if name in found:
            raise UserError(
                f"--refined: expected one folder for each name, found {found[name]} and {folder} for {name!r}. Type a name for each: "
                f"{name}={found[name]} other={folder}."
            )
        found[name] = folder
    return found


def default_methods(sources: Iterable[str]) -> list[str]:
    """What shows whether refining paid: methods on the captions of the dataset and on the refined ones, and the controls."""
    return [name for own in BOTH for name in (own, *(f"{own}{AT}{source}" for source in sources))] + list(CONTROLS)


def check_sources(methods: Sequence[str], sources: Iterable[str]) -> None:
    """Raises `UserError` unless methods and refined folders fit to each other."""
    sources = list(sources)
    for name in methods:
        own, at, source = name.partition(AT)
        if at and own in METHODS and source not in sources:
            known = f"Expected one of {', '.join(sources)}." if sources else "Type --refined FOLDER, too."
            named = source if source == DEFAULT else f"{source}=FOLDER"
            raise UserError(
                f"--methods {name}: found no --refined {named}. {known}"
                if source
                else f"--methods {name}: expected a name behind {AT}. {known}"
            )
        if at and own in METHODS and not METHODS[own].reads_captions:
            raise UserError(
                f"--methods {name}: expected a method that reads captions, found {own}. Leave {at}{source} out."
            )
    read = {name.partition(AT)[2] for name in methods}
    if unread := [source for source in sources if source not in read]:
        raise UserError(
            f"--refined: expected methods that read {unread[0]!r}, found none. Type --methods mmft mmft{AT}{unread[0]} …, or leave --methods "
            f"out for {' '.join(default_methods(unread[:1]))}."
        )


def with_refined(splits: Splits, folders: Mapping[str, str], records: bool = False) -> Splits:
    """The splits, whose training images have the captions of each folder in a column of their own.

    Args:
        folders: by name.
        records: whether the scores and sources of these captions are wanted, too.

    Raises:
        UserError: no such folder, or it lacks a training image.
    """
    train = splits.train
    for name, folder in folders.items():
        place = f"--refined {folder}"
        opened = open_source(DataArguments(dataset_name=folder)).splits
        captions = opened[split_for("train", opened) or next(iter(opened))]
        if missing := [column for column in ("captions", "image_sha256") if column not in captions.column_names]:
            raise UserError(
                f"{place}: expected columns captions and image_sha256, found {', '.join(captions.column_names)} without "
                f"{' and '.join(missing)}. Type a folder of mmft-hf caption refine."
            )
        images = undecoded(splits.train, ("image", "label"))
        texts = captions_of_all(images, captions, place)
        if not any(map(captions_of, texts)):
            raise UserError(f"{place}: expected captions, found none.")
        train = train.add_column(refined_column(name), texts, feature=List(Value("string")))
        if records and "caption_records" in captions.column_names:
            found = records_of_all(images, captions)
            train = train.add_column(refined_column(name, "caption_records"), found, feature=RECORDS)
    return replace(splits, train=train)


def fingerprint_of_captions(splits: Splits, source: str) -> str:
    """16 hex digits of the refined captions of the training images."""
    texts = [captions_of(own) for own in splits.train[refined_column(source)][:]]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def sources_of_methods(splits: Splits, methods: Iterable[str], mix: Sequence[str] | None) -> dict[str, str]:
    """What the methods that mix texts draw from, by the name of the captions: 16 hex digits of the sources of all captions.

    Raises:
        UserError: the captions of one of them lack a source.
    """
    shares, found = parse_mix(mix or ()), {}
    if not sources_of(shares):
        return found
    for source in dict.fromkeys(name.partition(AT)[2] for name in methods if mixes(name)):
        found[source] = sources_digest(with_caption_sources(with_captions_of(splits.train, source), shares)[0])
    return found


def weights_of_methods(splits: Splits, methods: Iterable[str], setting: str | None) -> dict[str, str]:
    """What the methods that weigh captions read, by the name of the captions: the score, and 16 hex digits of all weights.

    Raises:
        UserError: the captions of one of them have no such score.
    """
    found = {}
    for source in dict.fromkeys(name.partition(AT)[2] for name in methods if weighs(name)):
        train = with_captions_of(splits.train, source)
        found[source] = f"{setting} {weights_digest(with_caption_weights(train, setting)[0])}"
    return found


def summary_of(splits: Splits, source: str, folder: str) -> dict:
    """Entry of `data.json`: name of the folder, number of images with refined captions, number of these captions, their cost."""
    counts = [len(captions_of(own)) for own in splits.train[refined_column(source)][:]]
    found = {"folder": describe_source(folder, None, "dataset", offline=True)["name"]}
    found |= {"images": sum(map(bool, counts)), "captions": sum(counts)}
    return found | (captioning_cost(folder) or {})
