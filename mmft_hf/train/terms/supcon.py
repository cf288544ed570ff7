"""SupCon between images and texts: those of a class attract each other."""

from __future__ import annotations

from ...model.losses import Batch, batch_supcon
from .base import LossTerm


class SupCon(LossTerm):
    """Supervised contrastive loss between images and texts.

    Args:
        weight: factor in the sum.
        include_self: False is the paper's form: an image's own text is not a positive, but stays in the denominator. True is
            the UniCL form: it is a positive, too.

    References: Enomoto & Yamaguchi 2026, "MultiModal Fine-tuning with Synthetic Captions" (arXiv 2601.21426); Yang et al.
    2022, "Unified Contrastive Learning in Image-Text-Label Space" (arXiv 2204.03610), for `include_self`.
    """

    name = "supcon"

    def __init__(self, weight=1.0, include_self: bool = False):
        self.weight, self.include_self = weight, include_self

    def __call__(self, batch: Batch):
        loss, share = batch_supcon(batch, self.include_self)
        return {"loss": loss, "anchors_with_positives": share}
