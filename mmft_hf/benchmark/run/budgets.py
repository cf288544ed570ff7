"""Budgets: how many steps a training takes, with which settings and how many learning rates.

| `--budget` | what each training gets |
|---|---|
| `equal` | the benchmark's own settings: every method sees the same images in the same steps |
| `authors` | what the authors of its method train with: steps, batches, rate, crops; nothing is searched |
| `long` | 300 steps for each image of a class, and two learning rates |

Methods without training are the same under each of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ...core.errors import UserError
from ...train.config import MMFTConfig
from .results import FULL

EQUAL, AUTHORS, LONG = BUDGETS = ("equal", "authors", "long")
LONG_STEPS = 300  # for each image of a class
LOOKS = 50  # of a long training at validation
TOLERANCE = 0.05  # by which budgets that count as equal may differ
RATES_APART = 10  # the second learning rate of a long training, as a multiple of the first

# What a recipe sets where it says nothing else.
COMMON = {
    "num_train_epochs": 1,
    "max_steps": -1,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
}
# Settings that a budget decides, so that they have no effect if they are typed.
DECIDED = {
    EQUAL: (),
    AUTHORS: (
        "num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps learning_rate weight_decay "
        "lr_scheduler_type warmup_steps max_grad_norm crop_min_area horizontal_flip"
    ).split(),
    LONG: ("num_train_epochs", "max_steps"),
}


@dataclass(frozen=True, eq=False)
class Recipe:
    """How the authors of a method train it.

    Args:
        few, full: settings of `MMFTConfig` with a number of shots, and with all images; None: they name none.
        steps_per_shot: with a number of shots k they take k times as many steps.
        validation: they choose the epoch on validation, where all images are trained on.
        source: where the numbers stand.
    """

    few: Mapping[str, object] | None
    full: Mapping[str, object] | None
    source: str
    steps_per_shot: int | None = None
    validation: bool = True

    def settings(self, shots: int | str) -> dict[str, object] | None:
        """The settings at this number of shots; None where the authors name none."""
        named = self.full if shots == FULL else self.few
        if named is None:
            return None
        steps = {"max_steps": self.steps_per_shot * shots} if shots != FULL and self.steps_per_shot else {}
        return {**COMMON, **steps, **named}

    def describe(self, few: bool) -> str:
        """The settings in words, with a few shots or with all images."""
        named = self.few if few else self.full
        if named is None:
            return "not known"
        steps = f"steps_per_shot {self.steps_per_shot}, " if few and self.steps_per_shot else ""
        last = "" if few or self.validation else "; the last step is kept"
        return steps + ", ".join(f"{key} {value}" for key, value in named.items()) + last

    def refusal(self, shots: int | str, images: int) -> str:
        """Why this many images cannot be trained on as the authors do; empty if they can."""
        settings = self.settings(shots)
        if settings is None:
            return f"its authors say nothing of training with {'all images' if shots == FULL else 'a few shots'}"
        batch, warmup = settings["per_device_train_batch_size"], settings["warmup_steps"]
        steps = settings["max_steps"]
        steps = steps if steps > 0 else math.ceil(images / batch) * settings["num_train_epochs"]
        if steps > warmup:
            return ""
        return f"its authors warm up for {warmup} steps, and {images:,} images would be trained on for {steps} steps in all"


# Facts of papers and of the authors' code, see `source`.
_MMFT = {
    "num_train_epochs": 50,
    "per_device_train_batch_size": 64,
    "learning_rate": 1e-5,
    "weight_decay": 1e-4,
    "crop_min_area": 0.9,
}
MMFT_RECIPE = Recipe(_MMFT, _MMFT, "the paper (arXiv 2601.21426)")
FLYP_RECIPE = Recipe(
    few={"num_train_epochs": 20, "per_device_train_batch_size": 256, "learning_rate": 1e-5, "weight_decay": 0.2,
         "crop_min_area": 0.9},
    full={"num_train_epochs": 100, "per_device_train_batch_size": 256, "learning_rate": 1e-5, "weight_decay": 0.0,
          "warmup_steps": 500, "crop_min_area": 0.9},
    source="the authors' logs: few-shot SST2, and Caltech101 and Cars for all images",
)  # fmt: skip
WISE_FT_RECIPE = Recipe(
    few=None,
    full={"num_train_epochs": 10, "per_device_train_batch_size": 512, "learning_rate": 3e-5, "weight_decay": 0.1,
          "warmup_steps": 500, "max_grad_norm": 1.0},
    source="the code of WiSE-FT; crops are the benchmark's",
)  # fmt: skip
FIXED_HEAD_RECIPE = Recipe(
    few=None,
    full={"max_steps": 4000, "per_device_train_batch_size": 32, "learning_rate": 1e-5, "weight_decay": 0.0,
          "lr_scheduler_type": "constant"},
    source="the logs of fusion_bench; crops are the benchmark's",
    validation=False,
)  # fmt: skip
CLIP_LORA_RECIPE = Recipe(
    few={"per_device_train_batch_size": 32, "learning_rate": 2e-4, "weight_decay": 1e-2,
         "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}, "crop_min_area": 0.08,
         "horizontal_flip": True},
    full=None,
    source="the authors' code",
    steps_per_shot=500,
    validation=False,
)  # fmt: skip
TWO_STAGE_RECIPE = Recipe(  # of 2SFS; in each of its two stages the rate falls anew
    few={"per_device_train_batch_size": 32, "learning_rate": 2e-4, "weight_decay": 1e-2,
         "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
    full=None,
    source="the authors' code; crops are the benchmark's",
    steps_per_shot=300,
    validation=False,
)  # fmt: skip


def settings_of(budget: str, recipe: Recipe | None, shots: int | str) -> dict[str, object]:
    """What the authors set, under `authors`; nothing under other budgets.

    Raises:
        UserError: they name nothing.
    """
    if budget != AUTHORS:
        return {}
    found = recipe and recipe.settings(shots)
    if found is None:
        raise UserError(
            f"--budget authors: expected a method whose authors say how they train with {shots} shots, found another one."
        )
    return found


def selects_epoch(budget: str, recipe: Recipe | None, shots: int | str) -> bool:
    """Whether validation chooses the epoch of a training: with all images, unless the authors take the last step."""
    return shots == FULL and not (budget == AUTHORS and recipe and not recipe.validation)


def long_settings(shots: int | str, images: int, classes: int, config: MMFTConfig) -> dict[str, object]:
    """Settings of a training under `long`: steps, and with all images how often validation looks at it.

    With all images, the shots are the mean number of images of a class, rounded up.
    """
    steps = LONG_STEPS * (math.ceil(images / classes) if shots == FULL else shots)
    epoch = math.ceil(images / config.per_device_train_batch_size)
    between = max(epoch, math.ceil(steps / LOOKS))
    looks = {"eval_strategy": "steps", "eval_steps": between, "save_strategy": "steps", "save_steps": between}
    return {"max_steps": steps} | (looks if shots == FULL else {})


def images_seen(config: MMFTConfig, images: int, steps: int) -> int:
    """How many images a training in one process saw in so many steps, each as often as it was seen.

    Args:
        images: of an epoch, whose last step may be short.
    """
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    epochs, rest = divmod(steps, math.ceil(images / step))
    return epochs * images + min(rest * step, images)


def equal_budgets(one: Mapping, other: Mapping) -> bool:
    """Whether two rows of results had the same budget: images seen (steps, in rows of older versions) and learning rates tried.

    Images may differ by a twentieth: a training in stages starts an epoch anew in each, and the last step of an epoch may be short.
    A method that trained no model needs none, and is compared with any.
    """
    if one.get("steps") is None or other.get("steps") is None:
        return True
    key = "images_seen" if None not in (one.get("images_seen"), other.get("images_seen")) else "steps"
    return math.isclose(one[key], other[key], rel_tol=TOLERANCE) and one.get("tried", 1) == other.get("tried", 1)
