"""2SFS: the norms of both towers by cross-entropy over the classes' texts, then a head on fixed towers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from ..model.embedding import remove_embedding_forward
from ..model.towers import set_towers
from ..predict.heads import ClassPrototypes, LinearHead
from ..train.config import MMFTConfig
from .clip_lora import class_texts_trainer
from .cross_entropy import train_head

FIRST = 0.6  # share of the steps in which the towers are trained


def two_stages(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    config: MMFTConfig,
    train: Dataset,
    prototypes: Callable[[], ClassPrototypes],
    validation: Dataset | None = None,
) -> tuple[LinearHead, tuple[int, int]]:
    """Trains the norms of both towers for 60 % of the steps, then a head with cosine logits for 40 %.

    Each stage has its own schedule of the learning rate, and the logit scale is fixed in both. Batches, steps, rate and crops are
    those of `config`; what the authors' code trains with is `mmft-hf benchmark --budget authors`.

    Args:
        model: trained in place.
        config: as for `MMFTTrainer`; its settings of the loss and of prototypes have no effect.
        train: columns `image`, `label`; for captions see `cross_entropy.train_head`.
        prototypes: gives the head's start, by the weights of the first stage. The authors take the classes' texts.
        validation: selects the best epoch of each stage. Without it the last step is kept.

    Returns:
        The head, and the number of optimizer steps taken in each stage.

    References: Farina et al. 2025, "Rethinking Few-Shot Adaptation of Vision-Language Models in Two Stages" (arXiv 2503.11609).
    """
    steps = steps_of(config, len(train))
    first = min(max(1, round(FIRST * steps)), max(1, steps - 1))
    set_towers(model, "norms", "norms")
    trainer = class_texts_trainer(model, processor, _stage(config, "towers", first), train, validation)
    trainer.train()
    remove_embedding_forward(model)
    model.requires_grad_(False)
    start = LinearHead.from_prototypes(prototypes())
    second = _stage(config, "head", max(1, steps - first))
    head, taken = train_head(model, processor, second, train, start, validation, cosine=True)
    return head, (trainer.state.global_step, taken)


def steps_of(config: MMFTConfig, images: int) -> int:
    """Optimizer steps of a training in one process on so many images."""
    if config.max_steps > 0:
        return config.max_steps
    batches = math.ceil(images / config.per_device_train_batch_size)
    return math.ceil(math.ceil(batches / config.gradient_accumulation_steps) * config.num_train_epochs)


def _stage(config: MMFTConfig, name: str, steps: int) -> MMFTConfig:
    """The settings of one stage, which keeps its checkpoints in a folder of its own."""
    config = copy.copy(config)
    config.max_steps, config.output_dir = steps, str(Path(config.output_dir) / name)
    return config
