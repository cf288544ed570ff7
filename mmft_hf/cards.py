"""The model card: what was measured, on what, and how to use it. No sentence of it is a placeholder."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from .console import percent
from .version import __version__

if TYPE_CHECKING:  # which imports torch
    from .prototypes import ClassPrototypes

TEMPLATES = Path(__file__).parent / "templates"


def versions() -> dict[str, str]:
    """Versions of what made the model."""
    packages = ("torch", "transformers", "datasets", "accelerate", "tokenizers")
    return {
        "python": platform.python_version(),
        "mmft_hf": __version__,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def public_name(name: str) -> str:
    """A Hub id or `builtin/…` as it is; of a local path only the last part, since paths are nobody's business."""
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def model_card(identity: dict, results: dict, test: dict, prototypes: ClassPrototypes) -> str:
    """Markdown of the model card.

    Args:
        identity: of the run, as in `mmft.json`.
        results: content of `all_results.json`.
        test: `ClassificationReport` of the tuned model on the test split.
        prototypes: as saved.
    """
    accuracy = percent(results["test_accuracy"], (results["test_accuracy_ci_low"], results["test_accuracy_ci_high"]))
    interval = (results["zero_shot_test_accuracy_ci_low"], results["zero_shot_test_accuracy_ci_high"])
    settings = {
        "w (weight of SupCon)": identity["supcon_weight"],
        "learning rate": identity["learning_rate"],
        "epochs": identity["num_train_epochs"],
        "batch": f"{identity['per_device_train_batch_size']} images on each of {identity['world_size']} processes",
        "image tower, text tower": f"{identity['vision_tower']}, {identity['text_tower']}",
        "shots per class": identity["shots"] or "all",
        "seed": identity["seed"],
    }
    base = identity["base_model"]
    per_class = sorted((row for row in test["per_class"] if row["images"]), key=lambda row: row["accuracy"])
    return Template((TEMPLATES / "model_card.md").read_text(encoding="utf-8")).substitute(
        base_model=public_name(base),
        base_model_line="" if base.startswith("builtin/") or Path(base).exists() else f"base_model: {base}\n",
        dataset=public_name(identity["dataset"]),
        classes=len(prototypes.class_names),
        captions="captions" if identity["captions"] else "class templates (there were no captions)",
        source=prototypes.source,
        template=prototypes.template,
        images=results["test_images"],
        accuracy=accuracy,
        zero_shot=percent(results["zero_shot_test_accuracy"], interval),
        mean_per_class=percent(results["test_mean_per_class_accuracy"]),
        selection=results["selection"],
        per_class="\n".join(f"| {r['label']} | {r['images']} | {percent(r['accuracy'])} |" for r in per_class),
        settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
        class_prompts=", ".join(repr(name) for name in prototypes.class_names[:3]),
    )
