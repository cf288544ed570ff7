"""Fine-tuning by cross-entropy over the classes: `MMFTTrainer` with another loss, and nothing else.

Order of the images, crops, schedule, precision and the choice of the epoch are the Trainer's own, so that these baselines
see the same pictures in the same steps as MMFT does. Shapes: `B` images, `C` classes, `D` embedding size.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from ..core.distributed import gather
from ..core.errors import UserError
from ..data.sampling import IGNORED
from ..data.texts import class_prompt
from ..model.collator import MMFTDataCollator
from ..model.embedding import embedding_forward
from ..model.loading import embedding_size, scale_parameter
from ..model.towers import TOWERS
from ..predict.heads import LinearHead
from ..train.config import MMFTConfig
from ..train.progress import EpochLines
from ..train.trainer import MMFTTrainer


def train_head(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    config: MMFTConfig,
    train: Dataset,
    head: LinearHead,
    validation: Dataset | None = None,
    fixed: bool = False,
) -> tuple[LinearHead, int]:
    """Fine-tunes the image tower, and a linear head on its unit-norm embeddings, by cross-entropy.

    The rows `ce`, `ce-frozen` and `lp-ft` of a benchmark: with the head of zero-shot weights, the same with a fixed head,
    and with the head of a logistic regression on frozen features (`linear.head`). What the optimiser sees of the head are rows
    of about unit length; a fixed factor, the scale of the logits, is beside them. Where it is folded into the rows, as in
    WiSE-FT's code, they are 100 times as long for CLIP, and AdamW, whose steps do not depend on the size of a weight, leaves
    the head where it was, unless there are thousands of steps.

    Args:
        model: trained in place. What of the image tower is trained is left as it is; text tower and logit scale are frozen,
            and texts are never encoded.
        config: as for `MMFTTrainer`; its settings of the loss, of texts and of prototypes have no effect.
        train: columns `image`, `label`; captions, if there are any, are not used, but with them each image gets the crops
            that MMFT gives it.
        head: where the head starts.
        validation: columns `image`, `label`: selects the best epoch, tower and head together. Without it the last step
            is kept.
        fixed: the head is not trained.

    Returns:
        The trained head, and the number of optimiser steps taken.

    Raises:
        UserError: a head that does not fit; otherwise as `MMFTTrainer`.

    References: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), for `ce`; Kumar et al.
    2022, "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution" (arXiv 2202.10054), for `lp-ft`.
    """
    shape, names = (len(head.class_names), embedding_size(model)), train.features["label"].names
    if tuple(head.weight.shape) != shape or head.class_names != names:
        raise UserError(
            f"head: expected weights of shape {(len(names), shape[1])} for the classes of the training images, in their order, "
            f"found {tuple(head.weight.shape)} for {len(head.class_names)} classes."
        )
    trainer = HeadTrainer(model, processor, config, train, head, validation, fixed)
    trainer.train()
    found = trainer.current_prototypes()
    remove_head(model)
    return found, trainer.state.global_step


def train_class_texts(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    config: MMFTConfig,
    train: Dataset,
    validation: Dataset | None = None,
    train_scale: bool = True,
) -> int:
    """Fine-tunes by cross-entropy over the classes' texts (`config.class_template`), encoded anew in every step.

    The row `ce-text` of a benchmark; `clip_lora` is the same with LoRA.

    Args:
        model: trained in place, what `set_towers` made trainable of it.
        config: as for `MMFTTrainer`; its settings of the loss and of prototypes have no effect.
        train: columns `image`, `label`; for captions see `train_head`.
        validation: selects the best epoch, with the class texts of its weights. Without it the last step is kept.
        train_scale: the logit scale is trained, too.

    Returns:
        The number of optimiser steps taken. `ClassPrototypes.from_templates` gives the classifier.

    References: Goyal et al. 2023, "Finetune like you pretrain" (arXiv 2212.00638), whose ablation this is.
    """
    trainer = ClassTextsTrainer(model, processor, config, train, validation, train_scale)
    trainer.train()
    vars(model).pop("forward", None)
    return trainer.state.global_step


class CrossEntropyTrainer(MMFTTrainer):
    """`MMFTTrainer` with the mean cross-entropy of class logits as its loss. Subclasses say what the classes are."""

    def __init__(self, model, processor, config, train, validation, collator):
        config = copy.copy(config)
        config.cache_frozen_features = False  # a text tower without use would be encoded for nothing
        super().__init__(model, config, train, validation, processor, data_collator=collator)
        self.remove_callback(EpochLines)  # they tell of the terms of MMFT's loss

    def class_logits(self, image_embeds: Tensor, outputs: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
        """`(B, C)` logits of the images of all processes, from what the forward returned."""
        raise NotImplementedError

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Through exactly one forward of the wrapped model. Every process computes the whole loss, as `MMFTLoss` does."""
        for layer in self._batch_norms:  # the stock step has just called model.train()
            layer.eval()
        encoded = {name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask") if name in inputs}
        outputs = model(**encoded, chunk_size=self._chunk_size())
        embeds, labels = gather(outputs["image_embeds"], equal=True), gather(inputs["labels"], equal=True)
        with torch.autocast(embeds.device.type, enabled=False):
            loss = F.cross_entropy(self.class_logits(embeds, outputs, inputs), labels, ignore_index=IGNORED)
        return (loss, outputs) if return_outputs else loss


class HeadTrainer(CrossEntropyTrainer):
    """Of `train_head`. The head is a part of the model meanwhile: of its optimiser, its checkpoints and its forward."""

    def __init__(self, model, processor, config, train, head: LinearHead, validation=None, fixed=False):
        for name, parameter in model.named_parameters():
            if name.startswith(TOWERS["text"]):
                parameter.requires_grad_(False)
        scale_parameter(model).requires_grad_(False)
        # The length of the head's rows, as a power of two, so that nothing is rounded.
        length = head.weight.norm(dim=1).mean().item()
        self.head_scale = 2.0 ** round(math.log2(length)) if 0 < length < math.inf else 1.0
        for name, value in (("class_weight", head.weight), ("class_bias", head.bias)):
            if value is not None:
                value = nn.Parameter(value.detach().float() / self.head_scale, requires_grad=not fixed)
            model.register_parameter(name, value)
        super().__init__(model, processor, config, train, validation, _Images(processor))
        model.forward = MethodType(_forward_with_head, model)

    def class_logits(self, image_embeds, outputs, inputs):
        return self.head_scale * F.linear(image_embeds, outputs["class_weight"], outputs.get("class_bias"))

    def current_prototypes(self) -> LinearHead:
        """The head of now, which validation uses."""
        model = self.accelerator.unwrap_model(self.model)
        values = [None if v is None else self.head_scale * v.detach() for v in (model.class_weight, model.class_bias)]
        self.prototypes = LinearHead(values[0], self.class_names, values[1])
        return self.prototypes


class ClassTextsTrainer(CrossEntropyTrainer):
    """Of `train_class_texts`."""

    def __init__(self, model, processor, config, train, validation=None, train_scale=True):
        config = copy.copy(config)
        config.prototypes = "template"
        scale_parameter(model).requires_grad_(train_scale)
        texts = tuple(class_prompt(config.class_template, name) for name in train.features["label"].names)
        compiled = config.torch_compile
        collator = _ClassTexts(processor, distinct_texts=not compiled, pad_to_limit=compiled, class_texts=texts)
        super().__init__(model, processor, config, train, validation, collator)

    def class_logits(self, image_embeds, outputs, inputs):
        texts = outputs["text_embeds"]
        return outputs["scale"] * image_embeds @ (texts[inputs["text_rows"]] if "text_rows" in inputs else texts).T


def remove_head(model: PreTrainedModel) -> None:
    """Makes a model what it was before `HeadTrainer` gave it a head."""
    del model.class_weight, model.class_bias
    vars(model).pop("forward", None)


def _forward_with_head(self, *args, chunk_size: int | None = None, **inputs):
    # Read inside of the forward: what DDP or FSDP does not see would not be averaged.
    outputs = embedding_forward(self, *args, chunk_size=chunk_size, **inputs)
    if chunk_size is None:
        return outputs
    return outputs | {n: p for n in ("class_weight", "class_bias") if (p := getattr(self, n)) is not None}


@dataclass
class _Images(MMFTDataCollator):
    """Batches of images without texts."""

    def _texts(self, rows: list[dict]) -> dict[str, Tensor]:
        return {}


@dataclass
class _ClassTexts(MMFTDataCollator):
    """Batches of images, with the texts of all classes in place of their own."""

    class_texts: tuple[str, ...] = ()

    def _texts(self, rows: list[dict]) -> dict[str, Tensor]:
        return super()._texts([{"text": text} for text in self.class_texts])
