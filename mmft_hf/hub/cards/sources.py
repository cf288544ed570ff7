"""The sources of a run, for its record and its card: base model, data, captions, licences. Local paths are left out."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, fields

import torch

from ...captioning.types import ACCEPTED
from ...core.arguments import DataArguments, ModelArguments
from ...core.errors import UserError
from ...core.files import DETAILS_FILE
from ...core.markdown import one_line, public_name
from ...core.reading import parse_json
from ...core.records import CaptionsRecord
from ...core.repositories import describe_recorded_dataset, describe_source, read_text_file
from ...core.seals import note_if_changed
from ...data.labels import images_per_class
from ...data.splits import Splits, captions_of

logger = logging.getLogger(__name__)

LONGEST_PROMPT = 4000
# Settings that other lines of the card state, or that follow from other settings.
TOLD = set(
    "dataset_name dataset_config_name dataset_revision model_name_or_path model_revision output_dir seed".split()
)
TOLD |= set("image_root shots shots_seed accelerator_config greater_is_better text_trunk".split())


def run_sources(identity: dict, data_settings: dict, splits: Splits, training: type) -> dict:
    """Describes the base model, the data and the settings of a run in values that JSON can hold.

    Args:
        training: the dataclass of the training settings, for their defaults.

    Returns:
        `base_model` and `dataset` (see `describe_source`), `splits` (images of each), `train_images_per_class`, `captions`
        (None without any), `settings` (`{name: [value, default]}` of those that differ) and `device` (the GPU, if any).
    """
    data = describe_source(data_settings["dataset_name"], data_settings["dataset_revision"], "dataset")
    data |= {"config": data_settings["dataset_config_name"], "test_split": data_settings["test_split"]}
    record = _record(data_settings["dataset_name"], data_settings["dataset_revision"])
    made_from = _part(record, "made_from")
    original = made_from.get("dataset_name")
    if isinstance(original, str) and original:
        data["captions_of"] = describe_recorded_dataset(original)
    counts = images_per_class(splits.train)
    settings = _settings(identity, data_settings, training)
    if splits.several_labels:
        settings.pop("metric_for_best_model", None)  # there is only one
    return {
        "base_model": describe_source(identity["base_model"], identity["base_model_revision"], "model"),
        "dataset": data,
        "splits": {name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
        "train_images_per_class": counts.tolist(),
        "captions": _captions(splits, data_settings, record, made_from) if splits.has_captions else None,
        "settings": settings,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def trunk_source(record: Mapping) -> dict:
    """The base model of a caption encoder as `describe_source` describes one, with its `parameters` and whether it has `lora`.

    Args:
        record: its `caption_encoder.json`.
    """
    source = describe_source(str(record.get("base")), record.get("revision"), "model")
    if record.get("license"):  # known when the encoder was made, perhaps on another machine
        source["license"] = record["license"]
    return source | {"parameters": record.get("parameters"), "lora": bool(record.get("lora"))}


def captioning_cost(dataset_name: str, revision: str | None = None) -> dict | None:
    """The calls, tokens, time and cost of captioning a dataset, according to its `captions.json`.

    Args:
        dataset_name: the value of `--dataset_name`, or of `--captions_dataset` if the captions come from there.

    Returns:
        `captioner` (the models, or the backend), `calls`, `cost_usd`, `tokens_in`, `tokens_out` and `seconds` (from the first
        request of each run to its last answer). Unknown values are None, for example for texts that the dataset already
        had; class templates took no calls. None if `mmft-hf caption` did not write this dataset.
    """
    record = _record(dataset_name, revision)
    made_from, statistics = _part(record, "made_from"), _part(record, "statistics")
    if not made_from:
        return None
    backend = _part(made_from, "captioner").get("backend")
    names = list(_part(statistics, "models")) or [record.get("model") or backend]
    found = {"captioner": ", ".join(one_line(public_name(str(name))) for name in names if name) or None}
    found |= dict.fromkeys(("calls", "cost_usd", "tokens_in", "tokens_out", "seconds"))
    if backend == "template":
        found |= {"calls": 0, "cost_usd": 0.0, "tokens_in": 0, "tokens_out": 0}
    spent = _part(record, "spent")
    found |= {name: spent[name] for name in found if isinstance(spent.get(name), (int, float))}
    return found


def _part(record: dict, name: str) -> dict:
    part = record.get(name)
    return part if isinstance(part, dict) else {}


def _record(name: str, revision: str | None) -> dict:
    """The `captions.json` of a captioned dataset; empty if there is none."""
    try:
        text = read_text_file(name, DETAILS_FILE, revision, "dataset")
        found = parse_json(text, f"{name}, {DETAILS_FILE}", CaptionsRecord) if text else {}
    except UserError as error:  # it must never cost a finished training
        logger.warning("Note: the card does not say how the captions were made. %s", error)
        return {}
    note_if_changed(found, f"{name}, {DETAILS_FILE}")
    return found


def _captions(splits: Splits, data_settings: dict, record: dict, made_from: dict) -> dict:
    """How many training images have captions, and who wrote them with which prompts, as far as the dataset records it."""
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
            status, text, model, aspect = (one.get(name) for name in ("status", "text", "model", "aspect"))
            if status in ACCEPTED and (text or "").strip() in texts:
                used[public_name(model or "unknown")] += 1
                aspects[aspect or ""] += model not in ("columns", "template")
    found["models"] = dict(used.most_common())
    found["aspects"] = [aspect for aspect, count in aspects.most_common() if aspect and count]
    prompts = record.get("prompt_texts")
    if isinstance(prompts, dict):
        found["prompts"] = {str(aspect): str(text)[:LONGEST_PROMPT] for aspect, text in list(prompts.items())[:20]}
    columns = _part(made_from, "captioner").get("columns")
    if isinstance(columns, list):
        found["columns"] = [str(name) for name in columns]
    return found


def _settings(identity: dict, data_settings: dict, training: type) -> dict:
    """`{name: [value, default]}` of the settings that differ from their default, in the order of the record."""
    defaults, chosen = {}, {}
    for kind in (ModelArguments, DataArguments, training):
        for field in fields(kind):
            default = field.default if field.default is not MISSING else None
            defaults[field.name] = json.loads(json.dumps(default, default=str))
            chosen[field.name] = field.metadata.get("chosen", defaults[field.name])
    other = {k: v for k, v in identity.get("other_settings", {}).items() if v}
    found = {**identity, **other, **data_settings}
    # If the default is None, the machine decides, and a decision against something is not listed. A number is, even 0.
    decided = {k: v or defaults[k] is not None or type(v) is float for k, v in found.items() if k in defaults}
    differ = {k: v for k, v in found.items() if k in defaults and v != defaults[k] and decided[k]}
    return {k: [v, chosen[k]] for k, v in differ.items() if k not in TOLD}


# -- reading the record ------------------------------------------------------------------------------------------------
def short(source: Mapping) -> str:
    """The name of a model or dataset without its owner."""
    return source["name"].split("/")[-1]


def images_of(data: Mapping) -> Mapping:
    """The dataset whose images were captioned if it is known, else the dataset itself."""
    return data.get("captions_of") or data


def has_lora(record: Mapping) -> bool:
    """Whether a tower was trained with LoRA."""
    return "lora" in (record["identity"]["vision_tower"], record["identity"]["text_tower"])


def model_authors(captions: Mapping) -> list[str]:
    """The models that wrote captions."""
    return [name for name in captions["models"] if name not in ("columns", "template", "unknown")]
