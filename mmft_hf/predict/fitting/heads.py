"""Fits each head of `--head` to the embeddings of the training pictures and of their texts.

A fitter is a function of `HeadData` that returns a `Head`, and one row of `FITTERS`. None of them sees validation. Shapes as in
`data`. P are the prototypes (class averages of captions, or the class template without captions), E averages over several
templates, B the normalized sums of both, s the scale of the model's logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ...core.errors import UserError
from ..calibration import fit_decisions
from ..heads import Head, KernelHead, LinearHead
from . import SEVERAL_LABELS
from .data import HeadData
from .gda import gaussians
from .inputs import Inputs, check
from .kernel import BETA, RIDGE, one_hot, ridge
from .logistic import STRENGTH, regression
from .one_vs_rest import one_vs_rest
from .probe import probe

MOST_KEYS = 20_000  # of a kernel ridge: its system of equations then takes 1.6 GB
NEIGHBOURS, SHARPNESS = 5, 20.0  # of retrieval
NOISE = 0.04  # of `text`, per number of a unit-norm embedding


def prototypes(data: HeadData) -> Head:
    """The prototypes themselves; with several labels per image, with decisions that fit the training images."""
    if data.several_labels:
        temperature, offsets = fit_decisions(data.prototypes.raw_logits(data.images), data.labels)
        return replace(data.prototypes, temperature=temperature, offsets=offsets.float())
    return data.prototypes


def linear(data: HeadData, **training) -> Head:
    """A linear probe of the images that starts at B, with cosine logits; see `probe.probe`.

    It takes 300 epochs, or 3,000 steps where that is less. With several labels per image, logistic regressions near B; see
    `one_vs_rest`.
    """
    if data.several_labels:
        weight, bias = one_vs_rest(data.images, data.labels, data.texts, data.scale)
        return LinearHead(weight.float(), data.class_names, bias.float())
    inputs = data.inputs(data.texts)
    weight = probe(inputs, scale=data.scale, **{"epochs": _epochs(inputs), **training})
    return LinearHead((data.scale * weight).float(), data.class_names)


def logistic(data: HeadData, strength: float = STRENGTH, adjustment: float = 0.0) -> Head:
    """Logistic regression on the images that starts at B and may leave it; see `logistic.regression`.

    For few classes with many images each, whose names say little.
    """
    weight, bias = regression(data.inputs(data.texts), data.scale, strength, adjustment=adjustment)
    return LinearHead(weight.float(), data.class_names, bias.float())


def gda(data: HeadData, alpha: float = 1.0) -> Head:
    """Logits of P plus `alpha` times the log posteriors of Gaussians; see `gda.gaussians`.

    Raises:
        UserError: a class without image.
    """
    texts = data.prototypes.embeddings
    inputs = check(data.images, data.labels, data.images[:1], texts, every_class=True, unit_norm=True)
    weight, bias = gaussians(inputs)
    return LinearHead(
        (data.scale * inputs.zero_shot + alpha * weight).float(), data.class_names, (alpha * bias).float()
    )


def kernel(data: HeadData, beta: float = BETA, ridge_weight: float = RIDGE) -> Head:
    """Proximal kernel ridge regression on B; see `kernel.ridge`.

    Raises:
        UserError: more than 20,000 images.
    """
    if len(data.images) > MOST_KEYS:
        raise UserError(
            f"--head kernel: expected at most {MOST_KEYS:,} training images, found {len(data.images):,}. Type --head auto."
        )
    inputs = data.inputs(data.texts)
    values = ridge(inputs, beta, ridge_weight)
    return KernelHead(data.images, data.scale * values, (data.scale * inputs.zero_shot).float(), data.class_names, beta)


def tip(data: HeadData, alpha: float = 1.0, beta: float = BETA) -> Head:
    """Logits of P plus a cache of the training images, as Tip-Adapter without training.

    References: Zhang et al. 2022, "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification" (arXiv 2207.09519).
    """
    inputs = data.inputs(data.prototypes.embeddings)
    weight = (data.scale * inputs.zero_shot).float()
    return KernelHead(data.images, alpha * one_hot(inputs), weight, data.class_names, beta)


def timo(data: HeadData, alpha: float = 1.0, sharpness: float = 50.0) -> Head:
    """Captions weighted by how well they fit the images of their class, and as further examples of a `gda`.

    With m_c the mean image of class c, q_j = t_j·N(m_c) for each caption t_j of c, and q_c their vector: class texts are
    `N(Σ_j softmax_j(sharpness q_j / ‖q_c‖) t_j)`, and the captions `q_j t_j` join the images of the Gaussians. After TIMO;
    the search of the authors' code for α on validation is missing, since on validation it put α where only texts count.

    References: Li et al. 2025, "Text and Image Are Mutually Beneficial: Enhancing Training-Free Few-Shot Classification with
    CLIP" (arXiv 2412.11375).

    Raises:
        UserError: no captions; a class without image.
    """
    _need_captions("timo", data)
    texts = data.prototypes.embeddings.double()
    means = F.normalize(data.inputs(texts).class_means(data.images.double()), dim=1)
    own = data.captions.double()
    fit = (own * means[data.caption_labels]).sum(dim=1)
    weighted = texts.clone()
    for c in data.caption_labels.unique().tolist():
        of_class = data.caption_labels == c
        share = (sharpness * fit[of_class] / fit[of_class].norm().clamp(min=1e-12)).softmax(dim=0)
        weighted[c] = share @ own[of_class]
    weighted = F.normalize(weighted, dim=1)
    x = torch.cat([data.images.double(), fit[:, None] * own])
    inputs = check(x, torch.cat([data.labels, data.caption_labels]), x[:1], weighted, every_class=True)
    weight, bias = gaussians(inputs)
    return LinearHead((alpha * data.scale * weighted + weight).float(), data.class_names, bias.float())


def retrieval(data: HeadData, image_share: float = 0.5) -> Head:
    """The five training images that are most alike vote, each with `exp(20 · similarity)`.

    The similarity to an image is `image_share` times that of the pictures, and for the rest that to its class's mean caption
    (which stands for its own caption). After UniFGVC; its captions of the query, written by a multimodal model, are missing.

    References: Guo et al. 2025, "UniFGVC: Universal Training-Free Few-Shot Fine-Grained Vision Classification via
    Attribute-Aware Multimodal Retrieval" (arXiv 2508.04136).
    """
    inputs = data.inputs(data.prototypes.embeddings)
    keys = image_share * inputs.train_x + (1 - image_share) * inputs.zero_shot[inputs.train_y]
    weight = torch.zeros_like(inputs.zero_shot).float()
    return KernelHead(
        keys, data.scale * one_hot(inputs), weight, data.class_names, SHARPNESS, top_k=min(NEIGHBOURS, len(keys))
    )


def text(data: HeadData, seed: int = 0, **training) -> Head:
    """A linear probe of the captions with a little noise that starts at B: no image is read.

    After CLOSE; its shift by the difference between the modalities lost accuracy in our tests and is missing.

    References: Gu et al. 2023, "I Can't Believe There's No Images!" (arXiv 2211.09778).

    Raises:
        UserError: no captions.
    """
    _need_captions("text", data)
    noise = torch.randn(data.captions.shape, generator=torch.Generator().manual_seed(seed))
    x = F.normalize(data.captions + NOISE * noise, dim=1)
    inputs = check(x, data.caption_labels, x[:1], data.texts, unit_norm=True)
    weight = probe(inputs, scale=data.scale, seed=seed, **{"epochs": _epochs(inputs), **training})
    return LinearHead((data.scale * weight).float(), data.class_names)


def mean(data: HeadData, members: Sequence[Head] | None = None) -> Head:
    """The mean of the logits of several heads, each scaled to spread as those of the prototypes do; one head by itself.

    The spread of a head is the mean, over the captions (without captions: over the images), of the standard deviation of
    its C logits. Neither labels nor validation have a part in it. Default members: prototypes, `gda`, `kernel`, as far as
    the data allow.
    """
    members = members or [fit_head(name, data) for name in ("prototypes", "gda", "kernel") if possible(name, data)]
    probes = data.captions if len(data.captions) else data.images.float()
    spreads = [member.raw_logits(probes).std(dim=1).mean().item() for member in members]
    reference = data.prototypes.raw_logits(probes).std(dim=1).mean().item()
    shares = [reference / spread / len(members) if spread > 0 else 0.0 for spread in spreads]
    return combined(members, shares)


def combined(members: Sequence[Head], shares: Sequence[float]) -> Head:
    """One head that gives the weighted sum of the logits of prototypes, linear heads and at most one kernel head."""
    weight, bias, kernels = 0.0, 0.0, []
    for member, share in zip(members, shares, strict=True):
        if isinstance(member, KernelHead):
            kernels.append((member, share))
        part = member if isinstance(member, (KernelHead, LinearHead)) else LinearHead.from_prototypes(member)
        weight = weight + share * part.weight.double()
        bias = bias + (share * part.bias.double() if part.bias is not None else torch.zeros(len(part.weight)).double())
    names = members[0].class_names
    if not kernels:
        return LinearHead(weight.float(), names, bias.float())
    (found, share), *_ = kernels
    return replace(found, values=share * found.values.float(), weight=weight.float(), bias=bias.float())


@dataclass(frozen=True)
class Fitter:
    """One row of the table.

    Args:
        fit: `HeadData` -> `Head`.
        about: what an image is compared with, for a line that is printed.
        needs: what the data must have: `captions`, `every_class`, `few_images`.
    """

    fit: Callable[..., Head]
    about: str
    needs: tuple[str, ...] = ()


FITTERS: dict[str, Fitter] = {
    "prototypes": Fitter(prototypes, "the class prototypes"),
    "linear": Fitter(linear, "a linear probe that starts at the class texts"),
    "logistic": Fitter(logistic, "a logistic regression that starts at the class texts"),
    "gda": Fitter(gda, "class texts and Gaussians of the training images", ("every_class",)),
    "timo": Fitter(timo, "weighted captions and Gaussians of images and captions", ("every_class", "captions")),
    "kernel": Fitter(kernel, "class texts and a kernel regression on the training images", ("few_images",)),
    "tip": Fitter(tip, "class texts and a cache of the training images"),
    "retrieval": Fitter(retrieval, "the votes of the most similar training images"),
    "text": Fitter(text, "a linear probe of the captions alone", ("captions",)),
    "mean": Fitter(mean, "the mean of prototypes, Gaussians and kernel regression"),
}


def possible(name: str, data: HeadData) -> bool:
    """Whether the data have what a head needs."""
    has = {
        "captions": len(data.captions) > 0,
        "every_class": data.every_class,
        "few_images": len(data.images) <= MOST_KEYS,
    }
    return all(has[need] for need in FITTERS[name].needs)


def fit_head(name: str, data: HeadData, **options: Any) -> Head:
    """Fits the head of a name in `FITTERS`, and records how.

    Raises:
        UserError: an unknown name; the data lack what it needs, or have several labels per picture, which it does not know.
    """
    if name not in FITTERS:
        raise UserError(f"--head: expected auto or one of {', '.join(FITTERS)}, found {name!r}.")
    if data.several_labels:
        check_several(name)
    if not options and name in data.fitted:  # `mean` has fitted its members already
        return data.fitted[name]
    fitted = {"head": name, "images": len(data.images), "captions": len(data.captions), **options}
    head = replace(FITTERS[name].fit(data, **options), fitted=fitted, several_labels=data.several_labels)
    if not options:
        data.fitted[name] = head
    return head


def check_several(name: str) -> None:
    """Raises `UserError` for the name of a head that knows one label per picture alone."""
    if name not in SEVERAL_LABELS:
        raise UserError(
            f"--head {name}: expected one class for each picture, found lists of labels. Type --head auto, or one of "
            f"{', '.join(SEVERAL_LABELS)}."
        )


def _epochs(inputs: Inputs, steps: int = 3000, most: int = 300, batch_size: int = 256) -> int:
    """Epochs of a probe: at most `steps` steps, so that its time hardly grows with the number of images."""
    return max(1, min(most, steps // -(-len(inputs.train_x) // batch_size)))


def _need_captions(name: str, data: HeadData) -> None:
    if not len(data.captions):
        raise UserError(
            f"--head {name}: expected captions of the training images, found none. Run mmft-hf caption first, or type --head "
            "auto."
        )
