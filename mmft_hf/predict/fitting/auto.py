"""`--head auto`: which weights, and which head on them. Shapes: `n` validation images, `C` classes, `D` embedding size.

The default is the head `kernel` on weights halfway between untuned and tuned ones (`mean` where there are too many images for
it). Validation moves it, by cross-entropy, or by the errors that a named metric counts:

1. Weights: the untuned ones if their loss is not higher (tuning did not help), the tuned ones if their loss is lower by more
   than one standard error.
2. Head: another head on these weights, or the untuned model with the class template, if its loss is lower by more than one
   standard error than that of the default and it is right no less often; of several such heads, the most accurate one.

With several labels per picture the default head is `linear`, the other one `prototypes`, and the loss is binary cross-entropy.

With less than 50 validation images nothing moves it. Each candidate's cross-entropy is that after calibration, with the
temperature of one half of the validation images for the other half; images that are nearly alike are in one half, and count as
one in the standard error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core.errors import UserError
from ...data.sampling import is_example
from ..calibration import fit_decisions, fit_temperature, image_losses
from ..heads import Head
from ..metrics import several_report
from . import SEVERAL_LABELS
from .data import HeadData
from .heads import fit_head, possible

DEFAULT_HEADS, DEFAULT_ALPHA = ("kernel", "mean"), 0.5  # the first one that the data allow
ZERO_SHOT = "zero-shot"  # the untuned model with the class template
CANDIDATES = ("kernel", "mean", "prototypes", "linear", "logistic")
ADJUSTED = ("linear", "logistic")  # heads that are trained, and so learn the shares of the classes
FEWEST = 50  # validation images that may move the default
ALIKE, IDENTICAL = 0.95, 0.9999  # cosines above which two pictures count as one, or are one
EQUAL = 1 - 1e-6  # of embeddings that differ by rounding alone
LEAST_GROUPS = 10


@dataclass
class Candidate:
    """A head on one set of weights, and its loss on validation.

    Args:
        alpha: the weights are `(1 - alpha) * untuned + alpha * tuned`.
        name: of the head, as in `FITTERS`.
        head: fitted, not calibrated.
        losses (`(n,)`): cross-entropy of each validation image, with the other half's temperature.
        accuracy: on validation, from 0 to 1; with several labels, mean average precision.
        errors (`(n,)`, *optional*): what is compared instead of the losses, see `errors_of`.
    """

    alpha: float
    name: str
    head: Head
    losses: Tensor
    accuracy: float
    errors: Tensor | None = None

    @property
    def loss(self) -> float:
        """Mean of the losses."""
        return self.losses.mean().item()

    @property
    def cost(self) -> float:
        """Mean of what is compared: the loss, or one minus the named metric."""
        return self.loss if self.errors is None else self.errors.mean().item()


@dataclass
class Choice:
    """The chosen candidate, and why.

    Args:
        reason: in a few words.
        candidates: all of them, in the order in which they were given.
        images: validation images that were used.
        groups: number of groups of images that are nearly alike.
        usable (bool, one for each row of validation): which images these are; None: not known.
        metric: by which they were compared.
    """

    chosen: Candidate
    reason: str
    candidates: list[Candidate]
    images: int
    groups: int
    usable: Tensor | None = None
    metric: str = "loss"

    @property
    def by_validation(self) -> bool:
        """Whether validation could have chosen another candidate."""
        return self.images >= FEWEST and len(self.candidates) > 1


@dataclass
class State:
    """One set of weights, between untuned and tuned.

    Args:
        alpha: see `Candidate`.
        data: what heads are fitted to.
        embeds (`(n, D)`), labels (`(n,)` or `(n, C)`): of the validation images, -100 for one that cannot be read.
    """

    alpha: float
    data: HeadData
    embeds: Tensor
    labels: Tensor


def select(
    states: Iterable[State],
    head: str = "auto",
    zero_shot: Head | None = None,
    metric: str | None = None,
    adjustment: float = 0.0,
) -> Choice:
    """Fits the heads on each set of weights, and chooses one of them.

    Pictures of validation that are in the training split, too, choose nothing.

    Args:
        states: the untuned weights first.
        head: a name in `FITTERS`, for the weights alone to be chosen; `auto` for both.
        zero_shot: of the untuned weights; a further candidate of `auto`.
        metric: `accuracy`, `mean_per_class_accuracy`, `top5_accuracy` or `loss`, the default.
        adjustment: of the logits in the training of `ADJUSTED` heads, see `probe.probe`.

    Raises:
        UserError: the named head does not fit the data; embeddings that are not finite.
    """
    candidates, usable, groups = [], None, None
    for state in states:
        data, embeds = state.data, state.embeds
        if not (embeds.isfinite().all() and data.images.isfinite().all()):
            raise UserError(
                f"--head {head}: expected finite image embeddings, found others with the weights at {state.alpha:g} of the way "
                "to the tuned ones. Type a lower --learning_rate."
            )
        if usable is None:
            usable = is_example(state.labels) & ~are_among(embeds, data.images)
            groups = groups_of(embeds[usable])
        known = SEVERAL_LABELS if data.several_labels else CANDIDATES
        names = [name for name in known if possible(name, data)] if head == "auto" else [head]
        options = {name: {"adjustment": adjustment} for name in ADJUSTED} if adjustment else {}
        heads = {name: fit_head(name, data, **options.get(name, {})) for name in names}
        if head == "auto" and zero_shot and not state.alpha:
            heads[ZERO_SHOT] = zero_shot
        candidates += [
            candidate(state.alpha, name, found, embeds[usable], state.labels[usable], groups, metric)
            for name, found in heads.items()
        ]
    if head == "auto":
        head = next(name for name in (SEVERAL_LABELS if data.several_labels else DEFAULT_HEADS) if name in names)
    choice = choose(candidates, groups, head, metric)
    left_out = int(is_example(state.labels).sum()) - choice.images
    seen = f" ({left_out} of validation are among the training images and choose nothing)" if left_out else ""
    return replace(choice, reason=choice.reason + seen, usable=usable)


def candidate(
    alpha: float, name: str, head: Head, embeds: Tensor, labels: Tensor, groups: Tensor, metric: str | None = None
) -> Candidate:
    """Judges a head on validation embeddings `(n, D)` with labels `(n,)` or `(n, C)` and group numbers `(n,)`."""
    logits = head.raw_logits(embeds).double()
    halves = halves_of(groups)
    losses = torch.empty(len(labels), dtype=torch.float64)
    for mine, other in ((halves, ~halves), (~halves, halves)):
        if mine.any():
            temperature, offsets = 1.0, torch.zeros(logits.shape[1])
            if labels.ndim == 2:
                temperature, offsets = fit_decisions(logits[other], labels[other])
            elif other.any():
                temperature = fit_temperature(logits[other], labels[other])
            losses[mine] = image_losses(logits[mine] / temperature + offsets, labels[mine])
    if labels.ndim == 2:
        names = head.class_names
        found = several_report(logits.numpy(), labels.numpy(), names) if len(labels) else {}
        return Candidate(alpha, name, head, losses, found.get("mean_average_precision", 0.0))
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    return Candidate(alpha, name, head, losses, accuracy, errors_of(metric, logits, labels))


def errors_of(metric: str | None, logits: Tensor, labels: Tensor) -> Tensor | None:
    """What a wrong answer costs, `(n,)`, so that the mean is one minus the metric; None for `loss`, which counts no errors.

    Args:
        logits (`(n, C)`), labels (`(n,)`).
    """
    if metric in (None, "loss"):
        return None
    best = logits.topk(min(5, logits.shape[1]) if metric == "top5_accuracy" else 1, dim=1).indices
    wrong = (best != labels[:, None]).all(dim=1).double()
    if metric == "mean_per_class_accuracy":  # an image of a class of k counts 1/k, and so does each class alike
        counts = torch.bincount(labels)
        wrong *= len(labels) / ((counts > 0).sum() * counts[labels])
    return wrong


def choose(
    candidates: Sequence[Candidate], groups: Tensor, head: str = DEFAULT_HEADS[0], metric: str | None = None
) -> Choice:
    """Chooses a candidate as the module says.

    Args:
        groups (`(n,)`): numbers of the groups of the validation images.
        head: the default; it must be among the heads on each set of weights.
        metric: by which the candidates were judged, if one was named.
    """
    by, name = f" by {metric}" if metric else "", metric or "loss"
    by_key: Mapping[tuple[float, str], Candidate] = {(c.alpha, c.name): c for c in candidates}
    alphas = sorted({c.alpha for c in candidates})
    alpha = DEFAULT_ALPHA if DEFAULT_ALPHA in alphas else alphas[-1]
    n, count = len(groups), len(groups.unique())
    if n < FEWEST:
        return Choice(
            by_key[alpha, head],
            f"the default, since {n} validation images are too few to choose by",
            list(candidates),
            n,
            count,
            metric=name,
        )
    reasons = []
    default = by_key[alpha, head]
    if 0.0 in alphas and alpha and by_key[0.0, head].cost <= default.cost:
        alpha = 0.0
        reasons.append(f"tuning did not help on validation{by}")
    elif alphas[-1] > alpha and lower(by_key[alphas[-1], head], default, groups):
        alpha = alphas[-1]
        reasons.append(f"the tuned weights are better on validation{by} by more than one standard error")
    chosen = by_key[alpha, head]
    others = [c for c in candidates if (c.alpha == alpha or c.name == ZERO_SHOT) and c is not chosen]
    better = [c for c in others if lower(c, chosen, groups) and (metric or c.accuracy >= chosen.accuracy)]
    if better:
        # A low loss shows that a head is better, but the one that is right most often is wanted.
        chosen = min(better, key=lambda c: c.cost if metric else (-c.accuracy, c.cost))
        reasons.append(f"this head is better on validation{by} by more than one standard error")
    return Choice(
        chosen,
        "; ".join(reasons) or f"the default, from which validation shows no reason to depart{by}",
        list(candidates),
        n,
        count,
        metric=name,
    )


def lower(one: Candidate, other: Candidate, groups: Tensor) -> bool:
    """Whether one candidate costs less than another by more than one standard error of their paired difference.

    Of errors it is the standard error if there were no difference, as in McNemar's test: images on which both are right or both
    are wrong say nothing, and a rare class is no safer for having a single image.
    """
    if one.errors is None or other.errors is None:
        difference = other.losses - one.losses
        return difference.mean().item() > standard_error(difference, groups)
    difference = other.errors - one.errors
    return difference.mean().item() > standard_error(difference, groups, around=0.0)


def standard_error(values: Tensor, groups: Tensor, around: float | None = None) -> float:
    """Standard error of the mean of values `(n,)`, whose groups `(n,)` are independent, but not the values within one.

    Args:
        around: the mean that the values are supposed to have. Default: their own.
    """
    _, place = groups.unique(return_inverse=True)
    centred = values - (values.mean() if around is None else around)
    sums = torch.zeros(int(place.max()) + 1, dtype=torch.float64).index_add_(0, place, centred)
    count = len(sums)
    return math.inf if count < 2 else math.sqrt(sums.square().sum().item() * count / (count - 1)) / len(values)


def halves_of(groups: Tensor) -> Tensor:
    """Which images are in the first half, bool `(n,)`; a group is in one of them whole."""
    found, place = groups.unique(return_inverse=True)
    return (torch.randperm(len(found), generator=torch.Generator().manual_seed(0)) % 2 == 0)[place]


def are_among(embeds: Tensor, others: Tensor) -> Tensor:
    """Which images `(n, D)` are among others `(m, D)`, bool `(n,)`: pictures with one embedding are taken for one picture.

    Where most of the others have such a copy among themselves, the model sees too little difference between any pictures
    (tuning may draw a class together), and embeddings must be equal up to rounding.
    """
    others = others.float()
    some = others[:: 1 + len(others) // 1000]
    copied = (some @ others.T > IDENTICAL).sum(dim=1) > 1  # itself, and another one
    least = EQUAL if copied.double().mean() > 0.5 else IDENTICAL
    parts = [(part @ others.T).amax(dim=1) > least for part in embeds.float().split(1024)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)


def groups_of(embeds: Tensor) -> Tensor:
    """Numbers `(n,)` of groups of images: those with a cosine above 0.95 are in one, also through others.

    Where fewer than ten groups would be left, or one with more than half of the images, the model sees too little
    difference between any pictures, and each image is a group.
    """
    n = len(embeds)
    rows, columns = [], []
    for start, part in zip(range(0, n, 1024), embeds.float().split(1024), strict=False):
        row, column = (part @ embeds.float().T > ALIKE).nonzero(as_tuple=True)
        rows.append(row + start)
        columns.append(column)
    found = torch.arange(n)
    if n:
        row, column = torch.cat(rows), torch.cat(columns)
        while True:  # each image takes the smallest number among those that are like it, until nothing changes
            smaller = found.clone().scatter_reduce_(0, row, found[column], "amin")
            if torch.equal(smaller, found):
                break
            found = smaller
        sizes = torch.bincount(found)
        if int((sizes > 0).sum()) < LEAST_GROUPS or int(sizes.max()) > n / 2:
            return torch.arange(n)
    return found
