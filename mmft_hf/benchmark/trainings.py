"""How the fine-tuning methods of a benchmark make their weights: a task in, a tuned model out.

Methods that differ at inference alone share a training: `mmft`, `mmft+wise` and `mmft-train-captions`, for example.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, set_seed

from ..baselines import linear
from ..baselines.clip_lora import ALPHA, DROPOUT, RANK, attention_inputs, clip_lora
from ..baselines.cross_entropy import LinearHead, train_head
from ..configuration import MMFTConfig
from ..data import labels_of
from ..prompts import TEMPLATES
from ..sampling import generator
from ..towers import merge, set_towers
from .protocol import FULL, Task

if TYPE_CHECKING:
    from .methods import Workshop

LORA_FACTOR = 10  # LoRA takes steps a decade larger than whole towers do


@dataclass
class Trained:
    """What a training left: the model (LoRA merged), the images with the texts it saw, steps and seconds.

    A head, if that classifies, and the head it started from; what validation chose for that one.
    """

    model: PreTrainedModel
    texts: Dataset
    steps: int
    seconds: float
    head: LinearHead | None = None
    first_head: LinearHead | None = None
    chosen: dict = field(default_factory=dict)


# -- texts -----------------------------------------------------------------------------------------------------------------
def own_captions(task: Task) -> Dataset:
    """The images with their captions, if they have any."""
    return task.train


def without_captions(task: Task) -> Dataset:
    """The same images, with class templates alone."""
    return task.train.remove_columns("captions") if "captions" in task.train.column_names else task.train


def shuffled(within: bool) -> Callable[[Task], Dataset]:
    """The same images with each other's captions, of the same class or of any."""
    return lambda task: shuffled_captions(task.train, task.seed, within)


def shuffled_captions(dataset: Dataset, seed: int, within: bool) -> Dataset:
    """The same rows with each other's captions, of the same class or of any."""
    labels, order = labels_of(dataset), np.arange(len(dataset))
    groups = [np.flatnonzero(labels == c) for c in np.unique(labels)] if within else [order.copy()]
    for i, rows in enumerate(groups):
        order[rows] = generator(seed, i, 3).permutation(rows)
    captions = dataset["captions"][:]
    kind = dataset.features["captions"]
    return dataset.remove_columns("captions").add_column("captions", [captions[i] for i in order], feature=kind)


def permuted_labels(task: Task) -> Dataset:
    """The images with their captions and each other's labels."""
    kind = task.train.features["label"]
    labels = generator(task.seed, 4).permutation(labels_of(task.train))
    return task.train.remove_columns("label").add_column("label", labels.tolist(), feature=kind)


# -- trainings -------------------------------------------------------------------------------------------------------------
def settings_for(shop: Workshop, task: Task, learning_rate: float, folder: str, **settings) -> MMFTConfig:
    """The benchmark's settings for one training: equal budgets for all methods.

    Few images are trained for `shop.min_steps` steps at least, and their last step is kept; with all images the best
    epoch on validation is.
    """
    config = copy.deepcopy(shop.config)
    settings = {
        "output_dir": folder,
        "seed": task.seed,
        "disable_tqdm": True,
        "learning_rate": learning_rate,
        "save_only_model": True,  # no training here is resumed, and the moments of Adam are twice the weights
    } | settings
    if task.shots != FULL:  # few images of validation select epochs badly
        settings |= {
            "eval_strategy": "no",
            "eval_on_start": False,
            "save_strategy": "no",
            "load_best_model_at_end": False,
        }
        steps = math.ceil(len(task.train) / config.per_device_train_batch_size) * config.num_train_epochs
        if config.max_steps < 0 and steps < shop.min_steps:
            settings["max_steps"] = shop.min_steps
    for name, value in settings.items():
        setattr(config, name, value)
    return config


@contextmanager
def set_up(
    shop: Workshop, task: Task, learning_rate: float, **settings
) -> Iterator[tuple[PreTrainedModel, MMFTConfig, Dataset | None]]:
    """A copy of the untuned model, the settings of `settings_for`, and what selects the epoch, if anything does."""
    set_seed(task.seed)
    model = copy.deepcopy(shop.model)
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        config = settings_for(shop, task, learning_rate, folder, **settings)
        yield model, config, task.validation if task.shots == FULL else None


def contrastive(
    texts: Callable[[Task], Dataset] = own_captions,
    vision_tower: str = "full",
    text_tower: str = "full",
    small_lora: bool = False,
    templates: bool = False,
    **settings,
) -> Callable[[Workshop, Task, float], Trained]:
    """A training by `MMFTTrainer`.

    Args:
        texts: what the images of a task are trained with.
        vision_tower, text_tower: `full`, `lora` or `frozen`.
        small_lora: the LoRA of a tower is that of `clip_lora`.
        templates: each image is read with one of 80 class templates, drawn at random.
        settings: of `MMFTConfig`, in place of the benchmark's.
    """
    if "supcon_weight" in settings:  # it stays there, wherever the benchmark's own is on its way to
        settings = {"supcon_weight_end": None} | settings

    def train(shop: Workshop, task: Task, learning_rate: float) -> Trained:
        from ..trainer import MMFTTrainer

        images = texts(task)
        start = time.monotonic()
        lora = "lora" in (vision_tower, text_tower)
        rate = LORA_FACTOR * learning_rate if lora else learning_rate
        with set_up(shop, task, rate, **settings) as (model, config, validation):
            if (vision_tower, text_tower) != ("full", "full"):
                where = (RANK, ALPHA, DROPOUT, attention_inputs(model)) if small_lora else ()
                set_towers(model, vision_tower, text_tower, *where)
            trainer = MMFTTrainer(model, config, images, validation, shop.processor)
            if templates:
                trainer.training_templates = TEMPLATES
            trainer.train()
        tuned = trainer.accelerator.unwrap_model(trainer.model)
        if lora:
            merge(tuned)
        return Trained(tuned, images, trainer.state.global_step, time.monotonic() - start)

    return train


def cross_entropy(start: str = "templates", fixed: bool = False) -> Callable[[Workshop, Task, float], Trained]:
    """A training of the image tower and a linear head, see `baselines.cross_entropy`.

    Args:
        start: of the head: the averages of 80 `templates`, or `regression` on frozen features, its C chosen on validation.
        fixed: the head stays.
    """

    def train(shop: Workshop, task: Task, learning_rate: float) -> Trained:
        began, chosen = time.monotonic(), {}
        if start == "regression":
            features = shop.examples(task.train)
            choice = linear.choose(*features, *shop.examples(task.validation))
            chosen = choice.parameters
            weights = [torch.from_numpy(part).float() for part in linear.head(*features, **chosen)]
            first = LinearHead(weights[0], task.class_names, weights[1])
        else:
            first = LinearHead.from_prototypes(shop.template_prototypes(task.class_names, several=True))
        with set_up(shop, task, learning_rate) as (model, config, validation):
            head, steps = train_head(model, shop.processor, config, task.train, first, validation, fixed)
        return Trained(model, task.train, steps, time.monotonic() - began, head, first, chosen)

    return train


def low_rank(shop: Workshop, task: Task, learning_rate: float) -> Trained:
    """CLIP-LoRA, see `baselines.clip_lora`."""
    start = time.monotonic()
    with set_up(shop, task, LORA_FACTOR * learning_rate) as (model, config, validation):
        steps = clip_lora(model, shop.processor, config, task.train, validation)
    return Trained(model, task.train, steps, time.monotonic() - start)


TRAININGS: dict[str, Callable[..., Trained]] = {
    "ce": cross_entropy(),
    "ce-frozen": cross_entropy(fixed=True),
    "lp-ft": cross_entropy("regression"),
    "clip-lora": low_rank,
    "flyp": contrastive(without_captions, supcon_weight=0.0),
    "flyp-ens": contrastive(without_captions, templates=True, supcon_weight=0.0, prototypes="templates"),
    "mmft": contrastive(),
    "mmft-lora": contrastive(vision_tower="lora", text_tower="lora", small_lora=True),
    "mmft-lora-all": contrastive(vision_tower="lora", text_tower="lora"),
    "mmft-frozen-text": contrastive(text_tower="frozen"),
    "mmft-frozen-vision": contrastive(vision_tower="frozen"),
    "mmft-balanced": contrastive(samples_per_class=4),
    "mmft-dropout": contrastive(caption_dropout=0.5),
    "mmft-schedule": contrastive(supcon_weight=0.5, supcon_weight_end=0.0),
    "mmft-averaged": contrastive(weight_averaging=0.95),
    "mmft-w0": contrastive(supcon_weight=0.0),
    "mmft-w1": contrastive(supcon_weight=1.0),
    "mmft-no-captions": contrastive(without_captions),
    "mmft-shuffle-within": contrastive(shuffled(True)),
    "mmft-shuffle-across": contrastive(shuffled(False)),
    "mmft-permuted-labels": contrastive(permuted_labels),
}


def interpolated(trained: Trained, untuned: PreTrainedModel, alpha: float) -> PreTrainedModel:
    """A model with the weights `(1 - alpha) * untuned + alpha * trained`, the logit scale included.

    References: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), equation 1.
    """
    model = copy.deepcopy(trained.model)
    with torch.no_grad():
        weights = untuned.state_dict()
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.lerp_(weights[name], 1 - alpha)
    return model
