"""The identity of results: what they depend on apart from method, shots and seed. Results of two identities are not averaged."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from datasets import Dataset

from ...core.arguments import ModelArguments
from ...core.files import ADAPTER_FILES, MODEL_FILES
from ...core.repositories import describe_source
from ...data.images import content_hash
from ...data.splits import Splits, labels_of
from ...version import __version__
from .arguments import BenchmarkArguments, BenchmarkData
from .budgets import DECIDED, EQUAL
from .refined import fingerprint_of_captions, sources_of_methods, weights_of_methods

LIBRARIES = ("torch", "transformers", "peft", "scikit-learn")


def identity_of(
    args: BenchmarkArguments,
    model_args: ModelArguments,
    data_args: BenchmarkData,
    config,
    splits: Splits,
    shifts: Mapping[str, Dataset],
) -> dict:
    """The identity of results, kept with every row of them.

    Settings that have their default are not in it, so that results stay valid when a setting is added.
    """
    plain = json.loads(json.dumps(config.to_dict(), default=str))  # enums become text
    default = {f.name: f.default for f in fields(config)}
    # Each cell has its own seed, and only some methods weigh captions.
    without = ("seed", "sample_weight", *DECIDED[args.budget])
    chosen = {k: v for k, v in plain.items() if v != default.get(k) and config.decides(k) and k not in without}
    budget = {} if args.budget == EQUAL else {"budget": args.budget}
    captions = {source: fingerprint_of_captions(splits, source) for source in args.sources}
    weights = weights_of_methods(splits, args.methods, config.sample_weight)
    sources = sources_of_methods(splits, args.methods, config.text_mix)
    model, revision = model_args.model_name_or_path, model_args.model_revision
    return {
        "base_model": describe_source(model, revision, "model", offline=True)["name"],
        "base_model_revision": revision_of(model, revision),
        "dataset": describe_source(data_args.dataset_name, data_args.dataset_revision, "dataset", offline=True)["name"],
        "dataset_fingerprint": splits.fingerprint(),
        "shift_splits": {name: fingerprint_of(dataset) for name, dataset in shifts.items()},
        "settings": {**chosen, "learning_rates": args.learning_rates, "min_steps": args.min_steps, **budget},
        "versions": {"mmft_hf": __version__} | {name: importlib.metadata.version(name) for name in LIBRARIES},
        **({"captions": captions} if captions else {}),
        **({"weights": weights} if weights else {}),
        **({"sources": sources} if sources else {}),
    }


def revision_of(model: str, revision: str | None) -> str | None:
    """Distinguishes models with the same name: the commit on the Hub, 16 hex digits of the hash of a folder's files."""
    folder = Path(model)
    if folder.is_dir():
        weights = [*folder.glob("*.safetensors")] or [*folder.glob("pytorch_model*.bin")]
        files = sorted([*weights, *(folder / name for name in (*MODEL_FILES, ADAPTER_FILES[0]))])
        contents = {path.name: content_hash({"path": str(path)}).hex() for path in files if path.is_file()}
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]
    if model.startswith("builtin/"):
        return None  # it belongs to the version of this package
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json", revision=revision)).parent.name
    except Exception:  # loading the model will say what is wrong with it
        return revision


def fingerprint_of(dataset: Dataset) -> str:
    """16 hex digits of labels and picture files, as in `Splits.fingerprint`; no picture is opened."""
    digest = hashlib.sha256(labels_of(dataset).astype("<i8").tobytes())
    digest.update(json.dumps(dataset["image_id"][:]).encode())
    return digest.hexdigest()[:16]
