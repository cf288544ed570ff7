"""What a benchmark was run on, and the command that repeats it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from ..run.refined import DEFAULT
from .statistics import Findings

DIGEST = re.compile("[0-9a-f]{16}")


def without_folder(name: str) -> str:
    """The last part of an absolute path, as paths are private; any other name unchanged."""
    return Path(name).name if Path(name).is_absolute() else name


def split_facts(results: Findings) -> list[tuple[str, int, str]]:
    """Name, number of images and a remark for each split."""
    data, found = results.data, []
    if counts := data.get("train_images_per_class"):
        found.append(("train", sum(counts), f"{min(counts):,} to {max(counts):,} per class"))
    if data.get("validation_images") is not None:
        found.append(("validation", data["validation_images"], ""))
    for split, truth in (data.get("labels") or {}).items():
        groups = len(set(map(str, results.groups(split) or ())))
        remark = "groups, too few for an interval over images" if results.few_groups(split) else "groups of images"
        found.append((split, len(truth), f"{groups:,} {remark}" if groups else ""))
    return found


def command(results: Findings) -> str:
    """The command that runs the same grid, as far as the results record it."""
    identity, arguments = results.identity, results.data.get("arguments")
    revision = identity.get("base_model_revision")
    named = {
        "methods": results.methods,
        "shots": [n for n in results.shots if n != 0] or [0],
        "seeds": sorted(results.seeds()),
        "model_name_or_path": identity.get("base_model"),
        # For a model in a folder this is the hash of its weights.
        "model_revision": None if DIGEST.fullmatch(str(revision)) else revision,
        "dataset_name": identity.get("dataset"),
        "refined": [
            folder if name == DEFAULT else f"{name}={folder}"
            for name, found in (results.data.get("refined") or {}).items()
            if (folder := without_folder(found["folder"]))
        ],
        "sample_weight": next((said.split()[0] for said in (identity.get("weights") or {}).values()), None),
        "shift_splits": list(identity.get("shift_splits") or {}),
        "group_column": (results.data.get("made_from") or {}).get("group_column"),
        **(arguments if isinstance(arguments, dict) else {}),
        **(identity.get("settings") or {}),
        "output_dir": results.folder,
    }
    named.pop("greater_is_better", None)  # follows from the other settings, as does bf16=False
    words = ["mmft-hf benchmark"]
    for name, value in named.items():
        values = value if isinstance(value, list) else [value]
        if any(v not in (None, "None", "") for v in values) and (name, value) != ("bf16", False):
            words.append(" ".join([f"--{name}", *(shlex.quote(_typed(v)) for v in values)]))
    return " \\\n  ".join(words)


def _typed(value: object) -> str:
    """A setting as it is typed: `true`, `adamw_torch`, the last part of a path."""
    text = str(value).lower() if isinstance(value, bool) else without_folder(str(value))
    return re.sub(r"^[A-Za-z]+\.([A-Z0-9_]+)$", lambda found: found[1].lower(), text)
