"""An anchor to the untuned image tower: similarities between images, and within each image, should stay as they were."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...model.losses import Batch
from .base import LossTerm


class Gram(LossTerm):
    """Mean change of cosines between the images of a batch, and between the tokens of each image, compared with the untuned
    image tower on the same crops.

    `mean_{i≠j} |u_i · u_j - u⁰_i · u⁰_j|` with tuned unit-norm embeddings `u` and untuned ones `u⁰`, and the same for the tokens of
    the last layer of each image, as a mean over images. A rotation of all embeddings costs nothing. It costs one more forward of
    the image tower, without gradient, and a copy of that tower.

    Args:
        weight: factor in the sum.
        patches: whether tokens are compared, too. They are not where the image tower's outputs are kept.

    References: Chen et al. 2025, "Preserve and Sculpt: Manifold-Aligned Fine-tuning of Vision-Language Models for Few-Shot
    Learning" (arXiv 2508.12877).
    """

    name = "gram"

    def __init__(self, weight=0.5, patches: bool = True):
        self.weight = weight
        self.needs = ("untuned_images", "image_tokens") if patches else ("untuned_images",)

    def local(self, rows):
        if "image_tokens" not in self.needs or "untuned_image_tokens" not in rows:
            return {}
        change = _change(rows["image_tokens"], rows["untuned_image_tokens"])
        count = change.shape[1]
        return {"gram_patches": change.sum(dim=(1, 2)) / max(count * (count - 1), 1)}

    def __call__(self, batch: Batch):
        images = [F.normalize(x, dim=1) for x in (batch.image_embeds, batch.extras["untuned_image_embeds"])]
        valid = batch.valid
        pairs = valid[:, None] & valid[None, :] & ~torch.eye(len(valid), dtype=torch.bool, device=valid.device)
        value = torch.where(pairs, _change(*images), 0.0).sum() / pairs.sum().clamp(min=1)
        if "gram_patches" not in batch.extras:
            return {"loss": value}
        patches = batch.extras["gram_patches"].where(valid, 0.0).sum() / valid.sum().clamp(min=1)
        return {"loss": value + patches, "gram_patches": patches}


def _change(tuned: Tensor, untuned: Tensor) -> Tensor:
    """Absolute differences `(…, n, n)` of the cosines between n vectors of unit norm `(…, n, D)`; 0 on the diagonal."""
    change = (tuned @ tuned.mT - untuned @ untuned.mT).abs()
    return change.masked_fill(torch.eye(change.shape[-1], dtype=torch.bool, device=change.device), 0.0)
