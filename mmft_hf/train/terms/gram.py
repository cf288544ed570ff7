"""An anchor to the untuned image tower: similarities between images should stay as they were."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...model.losses import Batch
from .base import LossTerm


class Gram(LossTerm):
    """Mean change of the cosines between the images of a batch, compared with the untuned image tower on the same crops.

    `mean_{i≠j} |u_i · u_j - u⁰_i · u⁰_j|`, with tuned unit-norm embeddings `u` and untuned ones `u⁰`. A rotation of all
    embeddings costs nothing. It costs one more forward of the image tower, without gradient, and a copy of that tower.

    Args:
        weight: factor in the sum.

    References: Chen et al. 2025, "Preserve and Sculpt: Manifold-Aligned Fine-tuning of Vision-Language Models for Few-Shot
    Learning" (arXiv 2508.12877), which also compares the patches of each image.
    """

    name = "gram"
    needs = ("untuned_images",)

    def __init__(self, weight=0.5):
        self.weight = weight

    def __call__(self, batch: Batch):
        tuned, untuned = (F.normalize(x, dim=1) for x in (batch.image_embeds, batch.extras["untuned_image_embeds"]))
        change = (tuned @ tuned.T - untuned @ untuned.T).abs()
        others = ~torch.eye(len(change), dtype=torch.bool, device=change.device)
        pairs = batch.valid[:, None] & batch.valid[None, :] & others
        return {"loss": torch.where(pairs, change, 0.0).sum() / pairs.sum().clamp(min=1)}
