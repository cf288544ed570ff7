"""What a run was made from, for its record and its card: base model, data, captions, licences. Nothing of it is a local path."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import MISSING, fields

import numpy as np
import torch

from ..arguments import DataArguments, ModelArguments
from ..captioning.types import ACCEPTED
from ..configuration import MMFTConfig
from ..data import Splits, captions_of, labels_of
from ..markdown import public_name
from ..origins import captioned_origin, origin, read_beside

LONGEST_PROMPT = 4000
# What other lines of the card say, or what follows from other settings.
TOLD = set(
    "dataset_name dataset_config_name dataset_revision model_name_or_path model_revision output_dir seed".split()
)
TOLD |= set("image_root shots shots_seed accelerator_config greater_is_better".split())


def sources(identity: dict, data_settings: dict, splits: Splits) -> dict:
    """Where model and data come from.

    Returns:
        `base_model` and `dataset`: `name`, `kind` (`hub`, `builtin` or `local`), `revision` and `license` as their own cards
        state it; `splits`: images of each; `train_images_per_class`; `captions`: what is known of them, or None;
        `settings`: `{name: [value, default]}` where they differ; `device`: the
        graphics card, where there is one. JSON-able.
    """
    data = origin(data_settings["dataset_name"], data_settings["dataset_revision"], "dataset")
    data |= {"config": data_settings["dataset_config_name"], "test_split": data_settings["test_split"]}
    record = _record(data_settings)
    made_from = record.get("made_from") if isinstance(record.get("made_from"), dict) else {}
    original = made_from.get("dataset_name")
    if isinstance(original, str) and original:
        data["captions_of"] = captioned_origin(original)
    counts = np.bincount(labels_of(splits.train), minlength=len(splits.class_names))
    return {
        "base_model": origin(identity["base_model"], identity["base_model_revision"], "model"),
        "dataset": data,
        "splits": {name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
        "train_images_per_class": counts.tolist(),
        "captions": _captions(splits, data_settings, record, made_from) if splits.has_captions else None,
        "settings": _settings(identity, data_settings),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _record(data_settings: dict) -> dict:
    """`captions.json` beside a captioned data set; empty where there is none."""
    text = read_beside(data_settings["dataset_name"], "captions.json", data_settings["dataset_revision"], "dataset")
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _captions(splits: Splits, data_settings: dict, record: dict, made_from: dict) -> dict:
    """How many training images have captions, and who wrote them with which prompts, as far as the data say it."""
    per_image = splits.captions_per_image()
    column = data_settings["captions_column"] or "captions"
    found = {
        "images": int((per_image > 0).sum()),
        "captions": int(per_image.sum()),
        "column": column,
        "models": {},
        "aspects": [],
        "prompts": {},
        "columns": [],
    }
    if column != "captions" or "caption_records" not in splits.train.column_names:
        return found
    used, aspects = Counter(), Counter()
    for captions, records in zip(splits.train["captions"], splits.train["caption_records"], strict=True):
        texts = set(captions_of(captions))
        for one in records or ():
            if one["status"] in ACCEPTED and (one["text"] or "").strip() in texts:
                used[public_name(one["model"] or "unknown")] += 1
                aspects[one["aspect"] or ""] += one["model"] not in ("columns", "template")
    found["models"], found["aspects"] = (
        dict(used.most_common()),
        [a for a, count in aspects.most_common() if a and count],
    )
    prompts = record.get("prompt_texts")
    if isinstance(prompts, dict):
        found["prompts"] = {str(aspect): str(text)[:LONGEST_PROMPT] for aspect, text in list(prompts.items())[:20]}
    captioner = made_from.get("captioner")
    columns = captioner.get("columns") if isinstance(captioner, dict) else None
    if isinstance(columns, list):
        found["columns"] = [str(name) for name in columns]
    return found


def _settings(identity: dict, data_settings: dict) -> dict:
    """`{name: [value, default]}` of what differs, in the order of the record."""
    defaults = {}
    for kind in (ModelArguments, DataArguments, MMFTConfig):
        for field in fields(kind):
            default = field.default if field.default is not MISSING else None
            defaults[field.name] = json.loads(json.dumps(default, default=str))
    other = {k: v for k, v in identity.get("other_settings", {}).items() if v}
    found = {**identity, **other, **data_settings}
    # A default of nothing means that the machine decides; that it decided against something is not worth a line.
    differ = {k: v for k, v in found.items() if k in defaults and v != defaults[k] and (v or defaults[k] is not None)}
    return {k: [v, defaults[k]] for k, v in differ.items() if k not in TOLD}
