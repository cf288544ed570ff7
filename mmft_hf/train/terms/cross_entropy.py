"""Cross-entropy over the classes, whose logits come from a linear head or from the classes' texts.

Shapes: `N` images of all processes, `C` classes, `D` embedding size.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from ...model.losses import Batch, class_cross_entropy
from ...predict.heads import LinearHead
from .base import LossTerm


class CrossEntropy(LossTerm):
    """Mean cross-entropy of a linear head on unit-norm image embeddings; validation uses the head.

    The optimizer sees rows of about unit length; a fixed factor, the scale of the logits, is kept apart. If it were part of
    the rows, they would be 100 times as long for CLIP, and AdamW, whose steps do not depend on the size of a weight, would
    leave the head where it was unless there were thousands of steps.

    Args:
        head: where training starts; `C` rows of `D` numbers.
        fixed: whether the head stays as it is.
        weight: factor in the sum.
        cosine: whether all rows keep the mean length that they start with: then logits are cosines times a fixed scale.
    """

    name = "cross_entropy"
    needs = ()
    over_classes = True

    def __init__(self, head: LinearHead, fixed: bool = False, weight=1.0, cosine: bool = False):
        self.weight, self.cosine = weight, cosine
        # The mean length of the rows, as a power of two, so that nothing is rounded.
        length = head.weight.norm(dim=1).mean().item()
        self.scale = 2.0 ** round(math.log2(length)) if 0 < length < math.inf else 1.0
        self.length = length / self.scale
        values = {"weight": head.weight, "bias": head.bias}
        self.parameters = {
            name: nn.Parameter(value.detach().float() / self.scale, requires_grad=not fixed)
            for name, value in values.items()
            if value is not None
        }

    def __call__(self, batch: Batch):
        own = batch.parameters[self.name]
        logits = self.scale * F.linear(batch.image_embeds, self._rows(own["weight"]), own.get("bias"))
        return {"loss": _cross_entropy(logits, batch)}

    def _rows(self, weight: Tensor) -> Tensor:
        return self.length * F.normalize(weight, dim=1) if self.cosine else weight

    def head(self, parameters, class_names):
        values = {name: value.detach() for name, value in parameters.items()}
        values["weight"] = self._rows(values["weight"])
        return LinearHead(class_names=list(class_names), **{name: self.scale * v for name, v in values.items()})


class ClassTextCrossEntropy(LossTerm):
    """Mean cross-entropy of the scaled cosines of images with the classes' texts, which are encoded again in every step.

    Args:
        weight: factor in the sum.

    References: Goyal et al. 2023, "Finetune like you pretrain" (arXiv 2212.00638), whose ablation this is.
    """

    name = "class_texts"
    needs = ("class_texts",)
    over_classes = True

    def __call__(self, batch: Batch):
        return {"loss": _cross_entropy(batch.scale * batch.image_embeds @ batch.extras["class_embeds"].T, batch)}


def _cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Mean over the images that are examples of the cross-entropy of class logits `(N, C)`, with the adjustment of the batch.

    References: Menon et al. 2021, "Long-tail learning via logit adjustment" (arXiv 2007.07314).
    """
    logits = logits + batch.extras["adjustment"] if "adjustment" in batch.extras else logits
    return class_cross_entropy(logits, batch.labels)
