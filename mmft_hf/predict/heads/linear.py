"""A linear classifier of image embeddings.

Shapes: `C` classes, `D` embedding size, `B` images per batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Head
from .prototypes import ClassPrototypes


@dataclass
class LinearHead(Head):
    """Logits `weight x + bias` of an image embedding x.

    Args:
        weight (`(C, D)`, float32): rows of any norm; the scale of the logits is part of them.
        class_names: `C` names, in the order of the rows.
        bias (`(C,)`, float32, *optional*).
    """

    kind: ClassVar[str] = "linear"
    formula: ClassVar[str] = "x @ weight.T + (0 if bias is None else bias)"

    weight: Tensor
    class_names: list[str]
    bias: Tensor | None = None

    @classmethod
    def from_prototypes(cls, prototypes: ClassPrototypes) -> LinearHead:
        """The head that gives the logits of class prototypes."""
        weight, several = prototypes.logit_scale * prototypes.embeddings.float(), prototypes.several_labels
        return cls(weight, list(prototypes.class_names), several_labels=several)

    def raw_logits(self, image_embeds: Tensor) -> Tensor:
        """`(B, C)` logits of unit-norm image embeddings `(B, D)`, before the temperature."""
        bias = None if self.bias is None else self.bias.to(image_embeds.device)
        return F.linear(image_embeds.float(), self.weight.to(image_embeds.device), bias)

    def interpolated(self, start: LinearHead, alpha: float) -> LinearHead:
        """`(1 - alpha) * start + alpha * self`; a missing bias counts as 0.

        References: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), equation 1.
        """
        device = self.weight.device  # a trained head is on its model's device, and its start may be on the CPU
        bias = None
        if start.bias is not None or self.bias is not None:
            biases = [torch.zeros(len(self.weight)) if head.bias is None else head.bias for head in (start, self)]
            bias = torch.lerp(*(value.to(device) for value in biases), alpha)
        return replace(self, weight=torch.lerp(start.weight.to(device), self.weight, alpha), bias=bias)
