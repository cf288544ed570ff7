"""CLIP's loss: an image and its own text attract each other."""

from __future__ import annotations

from ...model.losses import Batch
from .base import LossTerm


class Clip(LossTerm):
    """Symmetric contrastive loss of image-text pairs.

    References: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3.
    """

    name = "clip"

    def __call__(self, batch: Batch):
        return {"loss": batch.clip_loss}
