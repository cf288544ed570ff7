"""`caption_dataset`: a `datasets.map` that adds the contract's three columns and leaves every image byte as it is."""

from __future__ import annotations

import hashlib
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value

from ..errors import UserError
from ..prompts import clean_class_name
from .backends.texts import Captioner

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
    "tokens_in": Value("int32"),
    "tokens_out": Value("int32"),
    "attempts": Value("int32"),
    "run_id": Value("string"),
}
CAPTION_FEATURES = {"captions": List(Value("string")), "caption_records": [RECORD], "image_sha256": Value("string")}


def caption_dataset(
    dataset: Dataset, captioner: Captioner, tokenizer=None, run_id: str | None = None, progress: bool = True
) -> Dataset:
    """Adds `captions`, `caption_records` and `image_sha256` to a labelled image data set.

    Args:
        dataset: columns `image` (`Image`) and `label` (`ClassLabel`), and those that the captioner reads.
        captioner: see `Captioner`.
        tokenizer (*optional*): of the model that will be trained; counts `clip_tokens` and marks captions over its limit.
        run_id (*optional*): recorded with every caption.

    Returns:
        The data set with `captions` (accepted texts, each once per image) and `caption_records` (every attempt: a text
        that is blank has status `empty` and null text). Images keep their original bytes.

    Raises:
        UserError: a column that the captioner reads is missing.
    """
    for column in captioner.columns:
        if column not in dataset.column_names:
            raise UserError(
                f"column {column!r} is missing: found {', '.join(dataset.column_names)}. Type --text_columns NAME."
            )
    names = dataset.features["label"].names

    def add(row: dict) -> dict:
        records, captions = [], []
        class_name = names[row["label"]]
        for caption in captioner(row, class_name):
            text = " ".join(caption.text.split())
            checks = [] if text else ["empty"]
            tokens = len(tokenizer(text, verbose=False)["input_ids"]) if tokenizer and text else None
            if tokens is not None and tokens > tokenizer.model_max_length:
                checks.append("over_token_limit")
            records.append(
                dict.fromkeys(RECORD)
                | {
                    "aspect": caption.aspect,
                    "text": text or None,
                    "status": "ok" if text else "empty",
                    "model": caption.model,
                    "prompt_id": caption.prompt_id,
                    "sample": 0,
                    "checks": checks,
                    "clip_tokens": tokens,
                    "mentions_label": clean_class_name(class_name).casefold() in text.casefold(),
                    "attempts": 1,
                    "run_id": run_id,
                }
            )
            if text and text not in captions:
                captions.append(text)
        data, path = image_bytes(row["image"])
        return {
            "image": {"bytes": data, "path": path},
            "captions": captions,
            "caption_records": records,
            "image_sha256": hashlib.sha256(data).hexdigest(),
        }

    # Undecoded: datasets would otherwise decode and re-encode every image on its way through map, lossily for JPEG.
    undecoded = dataset.cast_column("image", Image(decode=False))
    features = Features({**undecoded.features, **CAPTION_FEATURES})
    captioned = undecoded.map(add, features=features, desc="Captions" if progress else None)
    return captioned.cast_column("image", Image())


def image_bytes(image: dict) -> tuple[bytes, str | None]:
    """The original bytes of an undecoded image and its file name.

    Raises:
        UserError: its file cannot be read.
    """
    path = image.get("path")
    if image.get("bytes") is not None:
        return image["bytes"], Path(path).name if path else None
    try:
        return Path(path).read_bytes(), Path(path).name
    except (OSError, TypeError) as error:
        raise UserError(f"image {path!r}: expected a file that can be read, found {error}.") from error
