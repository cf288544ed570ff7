"""The losses of MMFT: pure functions of embeddings and labels, without parameters, models or I/O.

Shapes: `B` images of this process, `N` images and `M` texts of all processes, `D` embedding size. Embeddings are
L2-normalized inside, so any scale of input is fine. Everything is computed in float32 at least, also inside autocast, and
through log-sum-exp: the plain exponential overflows at logits above 88, which is a cosine of 0.89 at CLIP's scale of 100.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.distributed import gather
from ..data.sampling import IGNORED, is_example


@dataclass
class Batch:
    """The input of a loss: the embeddings of all processes, with their labels.

    Args:
        image_embeds (`(N, D)`, float32): with gradient.
        labels (`(N,)`, int64): class of each image; or `(N, C)`, float32, with 1 for each of its classes and 0 for the others.
            -100 (in all columns) marks a row that is not an example: neither anchor nor candidate.
        scale (scalar): `exp(logit_scale)`, multiplies cosines.
        text_embeds (`(M, D)`, float32, *optional*): None where no term needs texts.
        owner (`(M,)`, int64, *optional*): which image each text belongs to, -1 for a text without one. Default: text i
            belongs to image i.
        weights (`(N,)`), text_weights (`(M,)`, *optional*): how much a row counts as an anchor. Default: all alike.
        extras: further tensors, by name. `class_embeds` `(C, D)` are the embeddings of the class texts; `adjustment` `(C,)`, if
            there is one, is added to class logits; `untuned_image_embeds` `(N, D)` are of the untuned image tower.
        parameters: the parameters of the loss terms themselves, by the name of the term.
    """

    image_embeds: Tensor
    labels: Tensor
    scale: Tensor | float
    text_embeds: Tensor | None = None
    owner: Tensor | None = None
    weights: Tensor | None = None
    text_weights: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    parameters: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self):
        self.one_to_one = self.owner is None
        if self.owner is None:
            self.owner = torch.arange(len(self.labels), device=self.labels.device)

    @classmethod
    def gathered(
        cls,
        image_embeds: Tensor,
        labels: Tensor,
        scale: Tensor | float,
        text_embeds: Tensor | None = None,
        equal_sizes: bool = False,
        image_extras: Mapping[str, Tensor] | None = None,
        weights: Tensor | None = None,
        **more,
    ) -> Batch:
        """The batch of all processes, in rank order and with gradient, from the rows of this one.

        Args:
            image_embeds (`(B, D)`), labels (`(B,)` or `(B, C)`), text_embeds (`(B, D)`): text i belongs to image i.
            equal_sizes: whether every process is known to have the same B. Otherwise they exchange the sizes first, which waits for the
                GPU.
            weights (`(B,)`, *optional*): how much each pair of an image and its text counts, as an anchor in both directions.
            image_extras (`(B, …)`): extras of the images of this process, by name.
            more: fields that are the same in every process.

        Every process then computes the same loss, so the mean of the gradients over processes (DDP, FSDP) is exactly
        the gradient of one process.
        """
        parts = [image_embeds] if text_embeds is None else [image_embeds, text_embeds]
        # Concatenated, so that one gather is enough.
        both = gather(torch.cat(parts, dim=1) if len(parts) > 1 else image_embeds, equal_sizes)
        embeds = both.split([part.shape[1] for part in parts], dim=1)
        own = {name: gather(rows, equal_sizes) for name, rows in (image_extras or {}).items()}
        extras = {**more.pop("extras", {}), **own}
        if weights is not None:
            more["weights"] = more["text_weights"] = gather(weights, equal_sizes)
        return cls(embeds[0], gather(labels, equal_sizes), scale, *embeds[1:], extras=extras, **more)

    @cached_property
    def valid(self) -> Tensor:
        """`(N,)` bool: which images are examples."""
        return is_example(self.labels)

    @cached_property
    def text_labels(self) -> Tensor:
        """`(M,)` or `(M, C)`: labels of the image that each text belongs to, -100 for a text without one."""
        if self.one_to_one:
            return self.labels
        owned = self.owner >= 0
        return self.labels[self.owner].where(owned if self.labels.ndim == 1 else owned[:, None], IGNORED)

    @cached_property
    def text_valid(self) -> Tensor:
        """`(M,)` bool: which texts belong to an image that is an example."""
        return is_example(self.text_labels)

    @cached_property
    def own(self) -> Tensor:
        """`(N, M)` bool: which texts belong to which image."""
        return torch.arange(len(self.labels), device=self.labels.device)[:, None] == self.owner[None, :]

    @cached_property
    def overlap(self) -> Tensor:
        """`(N, M)`: how far the classes of images and of texts (those of their images) are the same.

        With one class per image, bool. With several, the shared classes among all classes of the two, from 0 to 1: the soft
        Jaccard index `Σ min / Σ max`; without any class, 0.
        """
        if self.labels.ndim == 1:
            return (self.labels[:, None] == self.text_labels[None, :]) & self.text_valid
        own = self.labels.where(self.valid[:, None], 0.0)
        texts = self.text_labels.where(self.text_valid[:, None], 0.0)
        # Σ max - Σ min is the distance, Σ max + Σ min the sum of both.
        distance, total = torch.cdist(own, texts, p=1), own.sum(dim=1)[:, None] + texts.sum(dim=1)
        either = (total + distance) / 2
        return (total - distance) / 2 / either.where(either > 0, 1.0)

    @cached_property
    def _logits(self) -> Tensor:
        return _logits(self.image_embeds, self.text_embeds, self.scale)

    @cached_property
    def image_logits(self) -> Tensor:
        """`(N, M)` scaled cosines of images with texts. Texts that are not examples get the least finite number, not -inf:
        a batch without any example would be NaN."""
        return self._logits.masked_fill(~self.text_valid, torch.finfo(self._logits.dtype).min)

    @cached_property
    def text_logits(self) -> Tensor:
        """`(M, N)`: as `image_logits`, of texts with images."""
        return self._logits.T.masked_fill(~self.valid, torch.finfo(self._logits.dtype).min)

    @cached_property
    def clip_loss(self) -> Tensor:
        """Symmetric contrastive loss of the pairs, a scalar. It is computed once: `batch_supcon` falls back on it.

        References: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3.
        """
        if self.one_to_one and self.weights is None and self.text_weights is None:
            return (_cross_entropy(self.image_logits, self.valid) + _cross_entropy(self.text_logits, self.valid)) / 2
        own = self.own & self.text_valid
        return (
            contrast(self.image_logits, own, self.weights) + contrast(self.text_logits, own.T, self.text_weights)
        ) / 2


def batch_supcon(batch: Batch, include_self: bool = False) -> tuple[Tensor, Tensor]:
    """Supervised contrastive loss between images and texts of a class, in both directions.

    Of images with several classes, texts are positives as far as their classes overlap. This is not MulSupCon, which sums over
    the classes of an anchor.

    Args:
        include_self: whether an image's own text is a positive, too.

    Returns:
        The loss, a scalar, which is CLIP's where no image has a positive; and the share of the images that have one.
    """
    positives = batch.overlap if include_self else batch.overlap.masked_fill(batch.own, 0)
    of_texts = positives.T.contiguous()
    loss = (
        contrast(batch.image_logits, positives, batch.weights)
        + contrast(batch.text_logits, of_texts, batch.text_weights)
    ) / 2
    share = positives.any(dim=1).sum() / batch.valid.sum().clamp(min=1)
    return torch.where(positives.any(), loss, batch.clip_loss), share


def _logits(anchors: Tensor, candidates: Tensor, scale: Tensor | float) -> Tensor:
    """Scaled cosines `(N, M)` in float32 or float64, never in half precision."""
    dtype = torch.promote_types(torch.promote_types(anchors.dtype, candidates.dtype), torch.float32)
    with torch.autocast(anchors.device.type, enabled=False):
        anchors = F.normalize(anchors.to(dtype), dim=-1)
        candidates = F.normalize(candidates.to(dtype), dim=-1)
        return scale * anchors @ candidates.T


def contrast(logits: Tensor, positives: Tensor, weights: Tensor | None = None) -> Tensor:
    """The contrastive formula: mean over anchors of the mean negative log-probability of their positives; a scalar.

    The mean over positives is weighted by their shares.

    Args:
        logits (`(A, K)`): of anchors against candidates. The softmax of a row runs over all of it.
        positives (`(A, K)`): bool, or shares of 0 or more. A row without any contributes nothing; if none has one, the
            value is 0 with zero gradient.
        weights (`(A,)`, *optional*): of the anchors.
    """
    log_prob = logits.log_softmax(dim=1)
    count = positives.sum(dim=1)
    # where(), not a product: 0 * -inf would be NaN.
    per_anchor = -torch.where(positives > 0, positives * log_prob, 0.0).sum(dim=1) / count.where(count > 0, 1)
    if weights is None:
        return per_anchor.sum() / (count > 0).sum().clamp(min=1)
    total = weights.where(count > 0, 0.0).sum()
    return (weights * per_anchor).sum() / total.where(total > 0, 1.0)


def class_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of class logits `(N, C)`, a scalar. Rows that are not examples are left out.

    Args:
        labels: `(N,)`, or `(N, C)`, whose rows count as equal shares of their classes; a row without classes contributes nothing.

    References: Mahajan et al. 2018, "Exploring the Limits of Weakly Supervised Pretraining" (arXiv 1805.00932), for shares.
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED)
    return contrast(logits, labels.where(is_example(labels)[:, None], 0.0))


def _cross_entropy(logits: Tensor, valid: Tensor) -> Tensor:
    """Mean cross-entropy of the `valid` rows of `(N, N)` logits against their diagonal; a scalar."""
    targets = torch.arange(len(logits), device=logits.device).where(valid, IGNORED)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / valid.sum().clamp(min=1)


def _check(name: str, embeds: Tensor, labels: Tensor | None = None) -> None:
    if embeds.ndim != 2:
        raise ValueError(f"{name}: expected embeddings of shape (rows, D), found {tuple(embeds.shape)}.")
    if labels is not None and labels.shape[:1] != embeds.shape[:1]:
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
        exclude (`(B, N)`, bool, *optional*): True where a pair is not a positive. It stays in the denominator.

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
    return contrast(_logits(anchors, candidates, scale), positives)


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
    labels = torch.zeros(len(image_embeds), dtype=torch.long, device=image_embeds.device)
    return Batch(image_embeds, labels, scale, text_embeds).clip_loss


class MMFTLoss(nn.Module):
    """`w * SupCon + (1 - w) * CLIP` over the pairs of all processes.

    Args:
        supcon_weight (`float`, defaults to 0.1): w, between 0 and 1. At 0 or 1 the other term is left out of the sum.
        include_self (`bool`, defaults to `False`): False is the paper's form: the pair itself is not a positive of the
            SupCon term but stays in its denominator. True is the UniCL form: the pair is a positive, too.

    Inputs of the call:
        image_embeds (`(B, D)`), text_embeds (`(B, D)`): Embeddings of this process; row i of both is one example.
        labels (`(B,)`, integer, or `(B, C)`, float): Class or classes of each example, as in `Batch`. A row labelled -100 is
            left out, as anchor and as candidate.
        scale (scalar): `exp(logit_scale)`.
        equal_sizes (`bool`, defaults to `False`): every process is known to have the same B, so that they need not
            exchange it, which would wait for the GPU.

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
        batch = Batch.gathered(image_embeds, labels, scale, text_embeds, equal_sizes)
        supcon, share = batch_supcon(batch, self.include_self)
        w, clip = self.supcon_weight, batch.clip_loss
        # A term of weight zero is left out, so that its overflow or NaN could not leak into the sum.
        total = supcon if w == 1 else clip if w == 0 else w * supcon + (1 - w) * clip
        return {"loss": total, "supcon": supcon, "clip": clip, "anchors_with_positives": share}

    def extra_repr(self) -> str:
        return f"supcon_weight={self.supcon_weight}, include_self={self.include_self}"
