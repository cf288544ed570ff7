"""The learning rate, searched on validation by successive halving (`--tune`).

References: Jamieson & Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization" (arXiv 1502.07943).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from ..core.console import say
from ..core.errors import UserError
from ..core.records import Tuning
from ..model.memory import give_memory_back
from .checkpoints import NotFinite
from .config import MMFTConfig
from .selection import METRICS, metric_name, shown
from .trainer import MMFTTrainer

DECADES = 2.0  # between the lowest and the highest rate, if there are enough of them
BELOW = 0.25  # share of them below the given rate: short trainings, and towers trained in part, need higher ones
CLOSEST = 0.5  # decades between neighbours of a few rates
LEAST = 10  # steps of a candidate: after fewer, the highest rate is ahead whatever the data are
# A candidate is trained and measured once at the end; nothing of it is kept.
CANDIDATE = {
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "logging_strategy": "no",
    "disable_tqdm": True,
    "report_to": [],
    "push_to_hub": False,
    "resume_from_checkpoint": None,
}


def rates(center: float, count: int) -> list[float]:
    """`count` learning rates in equal steps of their logarithm, lowest first: two decades, a quarter of them below `center`.

    `center` is one of them. Up to four rates are half a decade apart instead.
    """
    step = min(CLOSEST, DECADES / (count - 1))
    below = round(BELOW * (count - 1))
    return [center if i == below else float(f"{center * 10 ** (step * (i - below)):.2g}") for i in range(count)]


def training_steps(config: MMFTConfig, images: int) -> int:
    """Steps of the whole training.

    Args:
        images: of the training split.
    """
    if config.max_steps > 0:
        return config.max_steps
    batches = math.ceil(images / (config.per_device_train_batch_size * config.world_size))
    return math.ceil(config.num_train_epochs * math.ceil(batches / config.gradient_accumulation_steps))


def rounds(count: int, steps: int) -> list[tuple[int, int]]:
    """The rounds of a search: how many candidates each has, and for how many steps it trains each of them, from the start.

    Half of the candidates, rounded down, goes on to the next round with twice the steps. All rounds together take about as many
    steps as the training, but each candidate takes ten or more, as long as the last round is no longer than the training.

    Args:
        count: of candidates in the first round.
        steps: of the whole training.
    """
    counts = [count]
    while counts[-1] > 3:
        counts.append(counts[-1] // 2)
    share = steps / sum(n * 2**i for i, n in enumerate(counts))
    first = max(1, round(share), min(LEAST, steps // 2 ** (len(counts) - 1)))
    return [(n, first * 2**i) for i, n in enumerate(counts)]


def search(
    build: Callable[[MMFTConfig], MMFTTrainer],
    config: MMFTConfig,
    images: int,
    found: Tuning | None = None,
    keep: Callable[[Tuning], None] = lambda tuning: None,
) -> Tuning:
    """Trains with several learning rates for a few steps, the better ones for longer, until one is left.

    Each candidate starts from the untuned weights, with the same pictures in the same order and a whole schedule of its own. What
    is compared is the validation cross-entropy of the class prototypes, or the metric that `metric_for_best_model` names. Of
    equally good rates the lower one is taken; one whose loss is not finite loses. Every process must call this, and all get the
    same.

    Args:
        build: a Trainer of the untuned weights with these settings.
        config: settings of the training; `tune` rates around its `learning_rate` are tried.
        images: of the training split.
        found: what an interrupted search has found.
        keep: receives the state of the search after each candidate.

    Raises:
        UserError: no rate has a finite loss; the training would be refused.
    """
    metric = metric_name(config.metric_for_best_model or "loss")
    tuning: Tuning = found or {"metric": metric, "learning_rate": None, "candidates": []}
    known = {(row["learning_rate"], row["steps"]): row["value"] for row in tuning["candidates"]}
    whole, left = training_steps(config, images), rates(config.learning_rate, config.tune)
    tried = list(left)
    if tuning["learning_rate"] is None:
        with _quiet():  # what the training would refuse, it refuses before the search
            build(config)
    for count, steps in rounds(config.tune, whole):
        for rate in left:
            if (rate, steps) in known:
                continue
            value = known[rate, steps] = _measured(build, config, rate, steps, whole, metric)
            tuning["candidates"].append({"learning_rate": rate, "steps": steps, "value": value})
            keep(tuning)
            what = "the loss is not finite" if value is None else f"validation {_words(metric)} {shown(metric, value)}"
            say(f"learning rate {rate:g}, {steps} steps: {what}")
        finite = [rate for rate in left if known[rate, steps] is not None]
        if not finite:
            raise UserError(
                f"--tune: expected a learning rate at which the loss stays finite, found none of {len(tried)}, from {tried[0]:g} to "
                f"{tried[-1]:g}. Type a smaller --learning_rate, or --max_grad_norm 1.0."
            )
        best_first = sorted(finite, key=lambda rate: known[rate, steps], reverse=METRICS[metric])
        left = sorted(best_first[: count // 2 if count > 3 else 1])
        if len(left) == 1:
            break
    if tuning["learning_rate"] is None:
        tuning["learning_rate"] = left[0]
        keep(tuning)
    edge = {tried[0]: "lowest", tried[-1]: "highest"}.get(left[0])
    more = f", the {edge} of those tried: type --learning_rate {left[0]:g} to search around it" if edge else ""
    say(f"Training with learning rate {left[0]:g}{more}.\n")
    return tuning


def tuning_line(config: MMFTConfig, images: int) -> str:
    """What a search will do and take, in a line."""
    tried, whole = rates(config.learning_rate, config.tune), training_steps(config, images)
    planned = rounds(config.tune, whole)
    steps = sum(count * each for count, each in planned)
    how = ", then ".join(f"{count} of {each} steps" for count, each in planned)
    return (
        f"learning rates from {tried[0]:g} to {tried[-1]:g} are tried first: trainings {how}; {steps:,} steps in all, "
        f"{steps / whole:.0%} of the training's {whole:,}"
    )


def replaced(config: MMFTConfig, **settings) -> MMFTConfig:
    """A copy with other settings, which are not checked again."""
    config = copy.copy(config)
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def _measured(build, config: MMFTConfig, rate: float, steps: int, whole: int, metric: str) -> float | None:
    """The metric on validation after a training of `steps` instead of `whole` steps; None if the loss is not finite."""
    with TemporaryDirectory() as folder, _quiet():
        warmup = config.warmup_steps if config.warmup_steps < 1 else int(config.warmup_steps * steps / whole)
        own = {"output_dir": folder, "learning_rate": rate, "max_steps": steps, "warmup_steps": warmup}
        try:
            trainer = build(replaced(config, **CANDIDATE, **own))
            trainer.train()
            return float(trainer.evaluate()[f"eval_{metric}"])
        except NotFinite:
            return None
        finally:
            trainer = None
            give_memory_back()


@contextmanager
def _quiet() -> Iterator[None]:
    """Within this context our warnings are not logged: the training repeats them."""
    logger = logging.getLogger(__package__.partition(".")[0])
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _words(metric: str) -> str:
    return metric.replace("_", " ")
