"""CLIP-LoRA: LoRA in the attention of both towers, trained by cross-entropy over the classes' texts."""

from __future__ import annotations

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from ..model.towers import merge, set_towers
from ..train.config import MMFTConfig
from .cross_entropy import train_class_texts

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
) -> int:
    """Trains LoRA of rank 2 in the queries, keys and values of all layers of both towers, and merges it into `model`.

    The logit scale is fixed. Call `transformers.set_seed(…)` first to reproduce the random A matrices.

    The factor of `B A` is `alpha / rank` (0.5), as in the LoRA paper. The authors' code uses `alpha / sqrt(rank)` (0.71),
    which is similar to a higher learning rate. Batches, steps and crops are those of `config`, as for every other method
    here; their code trains on batches of 32 for 500 steps per shot at 2e-4, with weight decay 1e-2, and crops of 8 % to
    100 % with flips.

    Args:
        model, processor, config, train, validation: see `cross_entropy.train_class_texts`.
        dropout: on the input of the LoRA matrices.

    Returns:
        The number of optimizer steps taken. `ClassPrototypes.from_templates` gives the classifier.

    Raises:
        UserError: a tower has no attention; otherwise as `MMFTTrainer`.

    References: Zanella & Ben Ayed 2024, "Low-Rank Few-Shot Adaptation of Vision-Language Models" (arXiv 2405.18541).
    """
    set_towers(model, "lora", "lora", RANK, ALPHA, dropout, attention_inputs(model))
    steps = train_class_texts(model, processor, config, train, validation, train_scale=False)
    merge(model)
    return steps


def attention_inputs(model: PreTrainedModel) -> list[str]:
    """The names of `QUERY_KEY_VALUE` that occur among a model's linear layers."""
    found = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [name for name in QUERY_KEY_VALUE if name in found]
