"""Whether a training can learn anything, from its settings and labels alone: said, or refused, before its first step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel

from ..core.errors import UserError
from ..data.sampling import is_example
from ..model.towers import TOWERS
from .config import MMFTConfig
from .terms import Clip, LossTerm, SupCon

FEW = 0.1  # share of the images with a positive below which a note says so


def check_weights(terms: Sequence[LossTerm], step: int = 0, steps: int = 1) -> list[float]:
    """The weights of the terms in the step after `step` of `steps`.

    Raises:
        UserError: a weight is negative or not finite, or all of them are 0.
    """
    weights = [term.weight(step, steps) if callable(term.weight) else term.weight for term in terms]
    for term, weight in zip(terms, weights, strict=True):
        if not 0 <= weight < math.inf:
            raise UserError(
                f"loss: expected a weight of 0 or more for {term.name}, found {weight:g} (step {step + 1} of {steps}): the "
                "training would make that loss larger. Give it another weight, or leave the term out."
            )
    if not any(weights):
        # A schedule may pass through 0, but a loss that is 0 from the first step to the last one teaches nothing.
        if not any(callable(term.weight) for term in terms):
            raise UserError("loss: expected a term with a weight above 0, found none: nothing would be learnt.")
    return weights


def refuse_balance(config: MMFTConfig) -> None:
    """Raises `UserError` for a setting that balances classes, where an image may have several labels."""
    for name in ("samples_per_class", "class_balance", "logit_adjustment"):
        if getattr(config, name):
            raise UserError(
                f"--{name}: expected one class for each image, found lists of labels. It balances classes that exclude each other. "
                "Leave it out."
            )


def check_learnable(
    labels: np.ndarray, terms: Sequence[LossTerm], config: MMFTConfig, model: PreTrainedModel | None = None
) -> list[str]:
    """What keeps a training from learning as much as it could, one sentence each.

    Args:
        labels: of the training images, `(n,)`, or `(n, C)` where an image may have several.
        terms: of the loss.
        model: with its towers set; None: not known yet.

    Raises:
        UserError: nothing can be learnt at all.
    """
    check_weights([term for term in terms if not callable(term.weight)] or terms)
    labels = np.asarray(labels)
    known, batch = labels[is_example(labels)], config.per_device_train_batch_size * config.world_size
    if several := labels.ndim == 2:
        counts = known.sum(axis=0).astype(int)
        counts = counts[counts > 0]
        refuse_balance(config)
    else:
        counts = np.unique(known, return_counts=True)[1]
    images = len(known)
    _check_classes(images, len(counts))
    active = [term for term in terms if callable(term.weight) or term.weight]
    contrastive = all(isinstance(term, (SupCon, Clip)) for term in active)
    if contrastive and batch == 1:
        raise UserError(
            "--per_device_train_batch_size: expected 2 or more, found 1: the loss compares the images and texts of a batch, and "
            "with a single one it is always 0. Type 64, and --loss_chunk_size 1 if memory is short."
        )
    if contrastive and config.samples_per_class == batch and counts.min() >= batch:
        raise UserError(
            f"--samples_per_class: expected less than a batch of {batch} images, found {config.samples_per_class}: every batch "
            f"would be of a single class. Type --samples_per_class {max(2, batch // 4)}, or a larger "
            "--per_device_train_batch_size."
        )
    if model is not None:
        _check_parameters(active, config, model)
    notes = []
    if contrastive and images % batch == 1 and not (config.samples_per_class or config.class_balance):
        notes.append(
            f"The last batch of each epoch has a single image, from which the loss learns nothing, since {images} images are "
            f"dealt out in batches of {batch}. For example, type --per_device_train_batch_size {_other_size(images, config)}."
        )
    supcon = next((term for term in active if isinstance(term, SupCon)), None)
    if supcon and not supcon.include_self and not several:
        share = share_with_positives(counts, batch, config.samples_per_class or int(config.class_balance))
        remedy = "--samples_per_class 2 (batches with two images of each class)"
        if counts.max() < 2:
            share, remedy = 0.0, "--include_self true (an image's own text counts, too), or give more images per class"
        if share == 0:
            notes.append(
                "SupCon: no two training images are of one class, so no image has a positive in any batch, and the term is "
                f"CLIP's loss again. Type {remedy}."
            )
        elif share < FEW:
            notes.append(
                f"SupCon: only {share:.1%} of the images have a positive in their batch of {batch}, on average. Type {remedy}, "
                "or a larger --per_device_train_batch_size."
            )
    return notes


def check_fittable(labels: Sequence[int]) -> None:
    """Raises `UserError` if the training images are of one class, where each has one: no head could be fitted to them."""
    known = np.asarray(labels)[is_example(np.asarray(labels))]
    _check_classes(len(known), len(np.unique(known)))


def _check_classes(images: int, classes: int) -> None:
    if classes < 2:
        raise UserError(
            f"expected training images of two classes or more, found {images} of {classes}: there is nothing to tell "
            "apart. Add images of another class, or choose another --train_split."
        )


def share_with_positives(counts: Sequence[int], batch: int, samples_per_class: int | None = None) -> float:
    """Expected share of the images that meet another one of their class in a shuffled batch.

    Args:
        counts: images of each class.
        batch: images of a batch, in all processes.
        samples_per_class: of class-balanced batches; None or 0 if they are shuffled.

    For a class of c among n images: one minus the hypergeometric probability that none of the c - 1 others is among the
    batch - 1 others that are drawn.
    """
    counts = [int(count) for count in counts]
    images = sum(counts)
    if samples_per_class and (samples_per_class > 1 or batch >= 2 * len(counts)):
        return sum(count for count in counts if count > 1) / images
    if samples_per_class:  # one image of each class, and of some classes a second one
        return 2 * max(0, batch - len(counts)) / batch
    drawn = min(batch, images) - 1

    def none(count: int) -> float:
        others, draw = images - 1, drawn
        if draw > others - (count - 1):
            return 0.0
        ways = math.lgamma(others - count + 2) - math.lgamma(others - count + 2 - draw)
        return math.exp(ways - math.lgamma(others + 1) + math.lgamma(others + 1 - draw))

    return sum(count * (1 - none(count)) for count in counts) / images


def _other_size(images: int, config: MMFTConfig) -> int:
    """A batch size near the present one that leaves no single image over."""
    size = config.per_device_train_batch_size
    return next(s for s in (*range(size - 1, 1, -1), size + 1) if images % (s * config.world_size) != 1)


def _check_parameters(active: Sequence[LossTerm], config: MMFTConfig, model: PreTrainedModel) -> None:
    """Raises `UserError` if nothing that is trained can change an answer."""

    def trained(tower: str) -> bool:
        return any(p.requires_grad for name, p in model.named_parameters() if name.startswith(TOWERS[tower]))

    own = any(p.requires_grad for term in active for p in term.parameters.values())
    if own or trained("vision"):
        return
    texts = trained("text") and any(term.needs for term in active)
    if not texts:
        raise UserError(
            "expected a tower that is trained and that the loss reads, found none: nothing would be learnt. Type --vision_tower "
            "lora or full."
        )
    if config.prototypes == "images":
        raise UserError(
            "--prototypes: expected captions, template or templates with --vision_tower frozen, found images: pictures would be "
            "compared with pictures by a tower that does not change, so no answer could. Type --prototypes captions, or "
            "--vision_tower lora."
        )
