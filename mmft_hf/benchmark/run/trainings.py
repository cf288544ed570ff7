"""The trainings of fine-tuning methods: each takes a task and a learning rate, and returns a tuned model. Methods may share one."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel, set_seed

from ...baselines import linear
from ...baselines.clip_lora import ALPHA, DROPOUT, RANK, attention_inputs, clip_lora
from ...baselines.cross_entropy import train_head
from ...baselines.two_stages import two_stages
from ...data.sampling import generator
from ...data.splits import labels_of
from ...data.texts import TEMPLATES
from ...model.interpolation import interpolated
from ...model.towers import block_count, merge, set_towers
from ...predict.heads import ClassPrototypes, LinearHead
from ...train.config import MMFTConfig
from ...train.terms import Gram
from .budgets import (
    AUTHORS,
    CLIP_LORA_RECIPE,
    EQUAL,
    LONG,
    MMFT_RECIPE,
    TWO_STAGE_RECIPE,
    Recipe,
    images_seen,
    long_settings,
    selects_epoch,
    settings_of,
)
from .context import Context, Trained
from .protocol import FULL, Task

LORA_FACTOR = 10  # LoRA needs a learning rate ten times that of full fine-tuning, and so do norms alone
LAST = 4  # blocks of the image tower that are trained in part


@dataclass(frozen=True, eq=False)
class Training:
    """One training, which methods may share.

    Args:
        run: takes a task and a learning rate.
        recipe: how its authors train; None: they say nothing, or it is our own.
        captions: whether the images that it leaves have their captions, for a head that is fitted to them.
    """

    run: Callable[[Context, Task, float], Trained]
    recipe: Recipe | None = None
    captions: bool = True

    def __call__(self, context: Context, task: Task, learning_rate: float) -> Trained:
        return self.run(context, task, learning_rate)


# -- the training images and their texts -----------------------------------------------------------------------------------
def without_captions(task: Task) -> Dataset:
    """The images without captions: they are trained with class templates."""
    return task.train.remove_columns("captions") if "captions" in task.train.column_names else task.train


def shuffled_captions(task: Task, within: bool) -> Dataset:
    """The images with the captions of others: of their class (`within`), or of any class."""
    dataset, labels, order = task.train, labels_of(task.train), np.arange(len(task.train))
    groups = [np.flatnonzero(labels == c) for c in np.unique(labels)] if within else [order.copy()]
    for i, rows in enumerate(groups):
        order[rows] = generator(task.seed, i, 3).permutation(rows)
    captions = dataset["captions"][:]
    kind = dataset.features["captions"]
    return dataset.remove_columns("captions").add_column("captions", [captions[i] for i in order], feature=kind)


def permuted_labels(task: Task) -> Dataset:
    """The images and their captions, with the labels permuted over all images."""
    kind = task.train.features["label"]
    labels = generator(task.seed, 4).permutation(labels_of(task.train))
    return task.train.remove_columns("label").add_column("label", labels.tolist(), feature=kind)


# -- trainings -------------------------------------------------------------------------------------------------------------
def settings_for(
    context: Context, task: Task, learning_rate: float, folder: str, recipe: Recipe | None = None, **settings
) -> MMFTConfig:
    """The settings of one training: the benchmark's own, as far as `context.budget` does not decide them.

    With few images a training takes at least `context.min_steps` steps and its last step is kept. With all images the
    epoch with the best validation accuracy is kept.

    Args:
        recipe: how the authors train.
        settings: of `MMFTConfig`, instead of the benchmark's.
    """
    config = copy.deepcopy(context.config)
    settings = {
        "output_dir": folder,
        "seed": task.seed,
        "disable_tqdm": True,
        "learning_rate": learning_rate,
        "patience": None,  # equal budgets
        "text_mix": None,  # only `mmft-text-mix` mixes sources
        "sample_weight": None,  # only `mmft-weighted` weighs captions
        "save_only_model": True,  # nothing is resumed here, and Adam's moments are twice the size of the weights
        **settings_of(context.budget, recipe, task.shots),
        **(long_settings(task.shots, len(task.train), len(task.class_names), config) if context.budget == LONG else {}),
    } | settings
    if not selects_epoch(context.budget, recipe, task.shots):  # a few validation images select epochs badly
        settings |= {
            "eval_strategy": "no",
            "eval_on_start": False,
            "save_strategy": "no",
            "load_best_model_at_end": False,
        }
    if task.shots != FULL and context.budget == EQUAL:
        steps = math.ceil(len(task.train) / config.per_device_train_batch_size) * config.num_train_epochs
        if config.max_steps < 0 and steps < context.min_steps:
            settings["max_steps"] = context.min_steps
    for name, value in settings.items():
        setattr(config, name, value)
    return config


@contextmanager
def set_up(
    context: Context, task: Task, learning_rate: float, recipe: Recipe | None = None, **settings
) -> Iterator[tuple[PreTrainedModel, MMFTConfig, Dataset | None]]:
    """A copy of the untuned model, the settings of `settings_for`, and the images that select the epoch (None: no selection)."""
    set_seed(task.seed)
    model = copy.deepcopy(context.model)
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        config = settings_for(context, task, learning_rate, folder, recipe, **settings)
        yield model, config, task.validation if selects_epoch(context.budget, recipe, task.shots) else None


def contrastive(
    texts: Callable[[Task], Dataset] = lambda task: task.train,
    vision_tower: str = "full",
    text_tower: str = "full",
    small_lora: bool = False,
    templates: bool = False,
    weighted: bool = False,
    mixed: bool = False,
    recipe: Recipe | None = MMFT_RECIPE,
    **settings,
) -> Training:
    """A training with `MMFTTrainer`.

    Args:
        texts: gives the training images with their texts.
        vision_tower, text_tower: modes of `set_towers`.
        small_lora: uses the LoRA of `clip_lora` instead of the default one.
        templates: each image is paired with one of 80 class templates, drawn at random in each epoch.
        weighted: captions count by `sample_weight` of the benchmark.
        mixed: texts come from the sources of `text_mix` of the benchmark.
        recipe: see `Training`. Variants of MMFT train as MMFT does.
        settings: of `MMFTConfig`, instead of the benchmark's.
    """
    if "supcon_weight" in settings:  # a method with a weight of its own ignores the benchmark's schedule of weights
        settings = {"supcon_weight_end": None} | settings

    def train(context: Context, task: Task, learning_rate: float) -> Trained:
        from ...train.trainer import MMFTTrainer

        images = texts(task)
        lora = "lora" in (vision_tower, text_tower)
        rate = LORA_FACTOR * learning_rate if lora else learning_rate
        more = {"sample_weight": context.config.sample_weight} if weighted else {}
        more |= {"text_mix": context.config.text_mix} if mixed else {}
        with set_up(context, task, rate, recipe, **settings, **more) as (model, config, validation):
            where = (RANK, ALPHA, DROPOUT, attention_inputs(model)) if small_lora else ()
            set_towers(model, vision_tower, text_tower, *where)
            trainer = MMFTTrainer(model, config, images, validation, context.processor)
            if templates:
                trainer.texts = replace(trainer.texts, templates=TEMPLATES)
            trainer.train()
        tuned = trainer.accelerator.unwrap_model(trainer.model)
        if lora:
            merge(tuned)
        steps = trainer.state.global_step
        return Trained(tuned, images, steps, images=images_seen(config, len(images), steps))

    return Training(train, recipe, captions=texts is not without_captions)


def cross_entropy(
    start: str = "templates",
    fixed: bool = False,
    in_part: bool = False,
    anchor: bool = False,
    recipe: Recipe | None = None,
) -> Training:
    """A training of the image tower and a linear head, see `baselines.cross_entropy`.

    Args:
        start: of the head: the averages over 80 `templates`, their normalized sum with those of the `captions`, or a logistic
            `regression` on frozen features, with C chosen on validation.
        fixed: the head is not trained.
        in_part: of the image tower the last four blocks, and what follows them, are trained; all of them if there are fewer.
        anchor: the term `Gram` is added.
        recipe: see `Training`.
    """

    def train(context: Context, task: Task, learning_rate: float) -> Trained:
        chosen = {}
        if start == "regression":
            features = context.examples(task.train)
            chosen = linear.choose(*features, *context.examples(task.validation)).parameters
            weight, bias = (torch.from_numpy(part).float() for part in linear.head(*features, **chosen))
            first = LinearHead(weight, task.class_names, bias)
        else:
            texts = context.zero_shot_prototypes(task.class_names)
            if start == "captions":
                sums = texts.embeddings + context.caption_prototypes(context.model, task.train).embeddings
                texts = replace(texts, embeddings=F.normalize(sums, dim=1))
            first = LinearHead.from_prototypes(texts)
        with set_up(context, task, learning_rate, recipe) as (model, config, validation):
            if in_part:
                set_towers(model, f"last:{min(LAST, block_count(model, 'vision'))}", "frozen")
            more = [Gram()] if anchor else []
            head, steps = train_head(model, context.processor, config, task.train, first, validation, fixed, more=more)
        return Trained(
            model, task.train, steps, head, first, chosen, images=images_seen(config, len(task.train), steps)
        )

    return Training(train, recipe)


def _untrained(context: Context, task: Task, learning_rate: float) -> Trained:
    return Trained(context.model, without_captions(task))


none_without_captions = Training(_untrained, captions=False)
"""No training: the untuned model, and the images without their captions."""


def _clip_lora(context: Context, task: Task, learning_rate: float) -> Trained:
    # The authors' factor of B A is alpha / sqrt(rank).
    alpha = ALPHA * math.sqrt(RANK) if context.budget == AUTHORS else ALPHA
    with set_up(context, task, LORA_FACTOR * learning_rate, CLIP_LORA_RECIPE) as (model, config, validation):
        steps = clip_lora(model, context.processor, config, task.train, validation, alpha=alpha)
    return Trained(model, task.train, steps, images=images_seen(config, len(task.train), steps))


low_rank = Training(_clip_lora, CLIP_LORA_RECIPE)
"""CLIP-LoRA, see `baselines.clip_lora`."""


def two_stage(start_at_captions: bool = False) -> Training:
    """2SFS, see `baselines.two_stages`.

    Args:
        start_at_captions: the head starts at class averages of the captions instead of the classes' texts.
    """

    def train(context: Context, task: Task, learning_rate: float) -> Trained:
        def prototypes(model: PreTrainedModel) -> ClassPrototypes:
            if start_at_captions:
                return context.caption_prototypes(model, task.train)
            return context.template_prototypes(model, task.class_names)

        with set_up(context, task, LORA_FACTOR * learning_rate, TWO_STAGE_RECIPE) as (model, config, validation):
            start = partial(prototypes, model)
            head, steps = two_stages(model, context.processor, config, task.train, start, validation)
        first = LinearHead.from_prototypes(prototypes(context.model))
        seen = sum(images_seen(config, len(task.train), stage) for stage in steps)
        return Trained(model, task.train, sum(steps), head, first, images=seen)

    return Training(train, TWO_STAGE_RECIPE)


def halfway(trained: Trained, untuned: PreTrainedModel, alpha: float) -> Trained:
    """The training's result with the weights `(1 - alpha) * untuned + alpha * trained`, logit scale and head included."""
    head = trained.head and trained.head.interpolated(trained.first_head, alpha)
    return replace(trained, model=interpolated(trained.model, untuned, alpha), head=head)
