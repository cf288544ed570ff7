"""A kernel classifier: a linear one, corrected by how similar a picture is to each training picture.

Shapes: `C` classes, `D` embedding size, `B` images per batch, `n` training images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.arguments import Range
from ...core.errors import UserError
from .base import Head, Positive

LARGEST = 64_000_000  # bytes of keys and values: a head is stored, loaded and pushed with the model


@dataclass
class KernelHead(Head):
    """Logits `weight x + bias + Σ_i exp(-beta (1 - x·key_i)) value_i` of a unit-norm image embedding x.

    The file holds embeddings of the training pictures, the keys.

    Args:
        keys (`(n, D)`, float16): unit-norm embeddings of the training images.
        values (`(n, C)`, float16): what each of them adds to the logits.
        weight (`(C, D)`, float32): rows of any norm; the scale of the logits is part of them.
        class_names: `C` names, in the order of the rows.
        beta: how fast similarity falls off, as a rate per cosine.
        bias (`(C,)`, float32, *optional*).
        top_k: only this many nearest keys count; None: all of them.

    Raises:
        UserError: keys and values take more than 64 MB.
    """

    kind: ClassVar[str] = "kernel"
    formula: ClassVar[str] = (
        "x @ weight.T + (0 if bias is None else bias) + (lambda k: k if top_k is None else k * "
        "(k >= k.topk(min(top_k, len(keys))).values[:, -1:]))(torch.exp(-beta * (1 - x @ keys.float().T))) @ values.float()"
    )

    keys: Tensor
    values: Tensor
    weight: Tensor
    class_names: list[str]
    beta: Positive
    bias: Tensor | None = None
    top_k: Annotated[int, Range(1)] | None = None

    def __post_init__(self):
        size = self.keys.numel() * 2 + self.values.numel() * 2
        if size > LARGEST:
            raise UserError(
                f"--head kernel: expected at most {LARGEST / 1e6:.0f} MB of training embeddings, found {size / 1e6:,.0f} MB "
                f"for {len(self.keys):,} pictures and {len(self.class_names):,} classes. Type --head auto."
            )
        self.keys, self.values = self.keys.half(), self.values.half()

    @property
    def about(self) -> str:
        """What the head is, for a line that is printed."""
        return f"kernel head over {len(self.keys):,} training pictures"

    def raw_logits(self, image_embeds: Tensor) -> Tensor:
        """`(B, C)` logits of unit-norm image embeddings `(B, D)`, before the temperature."""
        x, device = image_embeds.float(), image_embeds.device
        keys, values, weight = (part.to(device).float() for part in (self.keys, self.values, self.weight))
        similar = torch.exp(-self.beta * (1 - x @ keys.T))
        if self.top_k is not None:
            similar = similar * (similar >= similar.topk(min(self.top_k, len(keys))).values[:, -1:])
        return F.linear(x, weight, None if self.bias is None else self.bias.to(device)) + similar @ values
