"""The losses of MMFT: pure functions of embeddings and labels, without parameters, models or I/O.

Shapes: `B` anchors, `N` candidates (of all processes), `D` embedding size. Embeddings are L2-normalised inside, so any
scale of input is fine. All of it is computed in float32 at least, also inside autocast, and through log-sum-exp: the
plain exponential overflows at logits above 88, a cosine of 0.89 at CLIP's scale of 100.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.distributed import gather
from ..data.sampling import IGNORED


def _logits(anchors: Tensor, candidates: Tensor, scale: Tensor | float) -> Tensor:
    """Scaled cosines `(B, N)` in float32 or float64, never in half precision."""
    dtype = torch.promote_types(torch.promote_types(anchors.dtype, candidates.dtype), torch.float32)
    with torch.autocast(anchors.device.type, enabled=False):
        anchors = F.normalize(anchors.to(dtype), dim=-1)
        candidates = F.normalize(candidates.to(dtype), dim=-1)
        return scale * anchors @ candidates.T


def _supcon(logits: Tensor, positives: Tensor) -> Tensor:
    """Mean over the rows with a positive of the mean negative log-probability of their positives; `()`."""
    log_prob = logits.log_softmax(dim=1)
    count = positives.sum(dim=1)
    # where(), not a product: 0 * -inf would be NaN.
    per_anchor = -torch.where(positives, log_prob, 0.0).sum(dim=1) / count.clamp(min=1)
    return per_anchor.sum() / (count > 0).sum().clamp(min=1)


def _cross_entropy(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of the `valid` rows of `(N, N)` logits against their diagonal; `()`."""
    targets = torch.arange(len(logits), device=logits.device)
    if valid is None:
        return F.cross_entropy(logits, targets)
    targets = targets.where(valid, IGNORED)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / valid.sum().clamp(min=1)


def _check(name: str, embeds: Tensor, labels: Tensor | None = None) -> None:
    if embeds.ndim != 2:
        raise ValueError(f"{name}: expected embeddings of shape (rows, D), found {tuple(embeds.shape)}.")
    if labels is not None and labels.shape != embeds.shape[:1]:
        raise ValueError(f"{name}: expected {len(embeds)} labels, one per row, found shape {tuple(labels.shape)}.")


def supcon_loss(
    anchors: Tensor,
    anchor_labels: Tensor,
    candidates: Tensor,
    candidate_labels: Tensor,
    scale: Tensor | float,
    exclude: Tensor | None = None,
) -> Tensor:
    """Supervised contrastive loss of anchors against labelled candidates, in one direction.

    Args:
        anchors (`(B, D)`): Embeddings, of any norm.
        anchor_labels (`(B,)`, integer): Class of each anchor.
        candidates (`(N, D)`): Embeddings compared with; the softmax of each anchor runs over all of them.
        candidate_labels (`(N,)`, integer): Class of each candidate, gathered together with them.
        scale (scalar): `exp(logit_scale)`; multiplies the cosines.
        exclude (`(B, N)`, bool, *optional*): True where a pair is no positive. It stays in the denominator.

    Returns:
        Scalar: the mean over the anchors that have a positive. When an anchor has no positive it contributes nothing;
        if none has, the loss is 0 with finite (zero) gradients.

    Raises:
        ValueError: shapes do not fit.

    References: Khosla et al. 2020, "Supervised Contrastive Learning", equation 2 (sum outside the logarithm); MMFT
    (Enomoto & Yamaguchi 2026) uses it across modalities, with the pair itself excluded.
    """
    _check("anchors", anchors, anchor_labels)
    _check("candidates", candidates, candidate_labels)
    positives = anchor_labels[:, None] == candidate_labels[None, :]
    if exclude is not None:
        if exclude.shape != positives.shape:
            raise ValueError(f"exclude: expected shape {tuple(positives.shape)}, found {tuple(exclude.shape)}.")
        positives = positives & ~exclude
    return _supcon(_logits(anchors, candidates, scale), positives)


def clip_loss(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric contrastive loss of CLIP: row i of the images belongs to row i of the texts.

    Args:
        image_embeds (`(N, D)`), text_embeds (`(N, D)`): Embeddings, of any norm.
        scale (scalar): `exp(logit_scale)`.

    Returns:
        Scalar. For one pair it is 0.

    Raises:
        ValueError: shapes do not fit.

    References: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3.
    """
    _check("image_embeds", image_embeds)
    if text_embeds.shape != image_embeds.shape:
        raise ValueError(f"text_embeds: expected {tuple(image_embeds.shape)}, found {tuple(text_embeds.shape)}.")
    logits = _logits(image_embeds, text_embeds, scale)
    return (_cross_entropy(logits) + _cross_entropy(logits.T)) / 2


class MMFTLoss(nn.Module):
    """`w * SupCon + (1 - w) * CLIP` over the pairs of all processes.

    Args:
        supcon_weight (`float`, defaults to 0.1): w, between 0 and 1. At 0 or 1 the other term is left out of the sum.
        include_self (`bool`, defaults to `False`): False is the paper's form: the pair itself is no positive of the
            SupCon term but stays in its denominator. True is the UniCL form: the pair is a positive, too.

    Inputs of the call:
        image_embeds (`(B, D)`), text_embeds (`(B, D)`): Embeddings of this process; row i of both is one example.
        labels (`(B,)`, integer): Class of each example. A row labelled -100 is left out, as anchor and as candidate.
        scale (scalar): `exp(logit_scale)`.
        equal_sizes (`bool`, defaults to `False`): every process is known to have the same B, so that they need not
            tell each other, which makes a GPU wait.

    Returns:
        `{"loss", "supcon", "clip"}`, scalars that are equal in every process, and `"anchors_with_positives"`, the share
        of the examples that have a positive. When none has, the SupCon term is replaced by the CLIP loss, so that the
        total is the CLIP loss.

    With several processes the embeddings are gathered with their gradient and every process computes the same global
    loss; averaging the gradients over processes (DDP, FSDP) then gives exactly the gradient of one process.

    References: Enomoto & Yamaguchi 2026, "MultiModal Fine-tuning with Synthetic Captions" (arXiv 2601.21426); Yang et
    al. 2022, "Unified Contrastive Learning in Image-Text-Label Space" (arXiv 2204.03610), for `include_self`.
    """

    def __init__(self, supcon_weight: float = 0.1, include_self: bool = False):
        super().__init__()
        if not 0.0 <= supcon_weight <= 1.0:
            raise ValueError(f"supcon_weight: expected a number from 0 to 1, found {supcon_weight}.")
        self.supcon_weight = supcon_weight
        self.include_self = include_self

    def forward(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        labels: Tensor,
        scale: Tensor | float,
        equal_sizes: bool = False,
    ) -> dict:
        _check("image_embeds", image_embeds, labels)
        _check("text_embeds", text_embeds, labels)
        # Side by side, so that they travel at once.
        sizes = [image_embeds.shape[1], text_embeds.shape[1]]
        both = gather(torch.cat([image_embeds, text_embeds], dim=1), equal_sizes)
        (image_embeds, text_embeds), labels = both.split(sizes, dim=1), gather(labels, equal_sizes)
        valid = labels != IGNORED
        logits = _logits(image_embeds, text_embeds, scale)
        # Not -inf: a batch without any example would be NaN.
        least = torch.finfo(logits.dtype).min
        of_images, of_texts = logits.masked_fill(~valid, least), logits.T.masked_fill(~valid, least)
        clip = (_cross_entropy(of_images, valid) + _cross_entropy(of_texts, valid)) / 2

        positives = (labels[:, None] == labels[None, :]) & valid
        if not self.include_self:
            positives.fill_diagonal_(False)
        # Images and texts share their labels, so both directions have the same valid anchors.
        supcon = (_supcon(of_images, positives) + _supcon(of_texts, positives)) / 2
        supcon = torch.where(positives.any(), supcon, clip)

        w = self.supcon_weight
        # A term of weight zero is left out, so that its overflow or NaN could not leak into the sum.
        total = supcon if w == 1 else clip if w == 0 else w * supcon + (1 - w) * clip
        share = positives.any(dim=1).sum() / valid.sum().clamp(min=1)
        return {"loss": total, "supcon": supcon, "clip": clip, "anchors_with_positives": share}

    def extra_repr(self) -> str:
        return f"supcon_weight={self.supcon_weight}, include_self={self.include_self}"
