"""CLIP-LoRA: LoRA in the attention of both towers, trained by cross-entropy over the classes' texts."""

from __future__ import annotations

import copy

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from ..model.embedding import remove_embedding_forward
from ..model.loading import scale_parameter
from ..model.towers import merge, set_towers
from ..train.config import MMFTConfig
from ..train.terms import ClassTextCrossEntropy
from ..train.trainer import MMFTTrainer

RANK, ALPHA, DROPOUT = 2, 1, 0.25
# Names of the layers of queries, keys and values, in CLIP and similar models and in BERT and ViT.
QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj", "query", "key", "value")


def clip_lora(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    config: MMFTConfig,
    train: Dataset,
    validation: Dataset | None = None,
    dropout: float = DROPOUT,
    alpha: float = ALPHA,
) -> int:
    """Trains LoRA of rank 2 in the queries, keys and values of all layers of both towers, and merges it into `model`.

    The texts of the classes (`config.class_template`) are encoded again in every step. The logit scale is fixed. Call
    `transformers.set_seed(…)` first to reproduce the random A matrices.

    The factor of `B A` is `alpha / rank` (0.5), as in the LoRA paper. The authors' code uses `alpha / sqrt(rank)` (0.71),
    which is similar to a higher learning rate. Batches, steps and crops are those of `config`; what the authors' code
    trains with is `mmft-hf benchmark --budget authors`.

    Args:
        model: trained in place.
        config: as for `MMFTTrainer`; its settings of the loss and of prototypes have no effect.
        train: columns `image`, `label`; for captions see `cross_entropy.train_head`.
        validation: selects the best epoch, by comparison with the class texts. Without it the last step is kept.
        dropout: on the input of the LoRA matrices.
        alpha: of the LoRA layers.

    Returns:
        The number of optimizer steps taken. `ClassPrototypes.from_templates` gives the classifier.

    Raises:
        UserError: a tower has no attention; otherwise as `MMFTTrainer`.

    References: Zanella & Ben Ayed 2024, "Low-Rank Few-Shot Adaptation of Vision-Language Models" (arXiv 2405.18541).
    """
    set_towers(model, "lora", "lora", RANK, alpha, dropout, attention_inputs(model))
    trainer = class_texts_trainer(model, processor, config, train, validation)
    trainer.train()
    remove_embedding_forward(model)
    merge(model)
    return trainer.state.global_step


def class_texts_trainer(model, processor, config, train, validation=None) -> MMFTTrainer:
    """The Trainer of `clip_lora`: cross-entropy over the texts of the classes, with a fixed logit scale."""
    scale_parameter(model).requires_grad_(False)
    config = copy.copy(config)
    config.prototypes = "template"  # validation compares with the same texts
    return MMFTTrainer(model, config, train, validation, processor, loss=ClassTextCrossEntropy())


def attention_inputs(model: PreTrainedModel) -> list[str]:
    """The names of `QUERY_KEY_VALUE` that occur among a model's linear layers."""
    found = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [name for name in QUERY_KEY_VALUE if name in found]
