"""Calibration and abstention: are probabilities right, and from which one on is an answer given?

Shapes: `n` examples, `C` classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.sampling import IGNORED, is_example

BOUNDS = math.log(0.05), math.log(20.0)  # of the logarithm of a temperature
BINS = 15
DRAWS = 200  # of labels, for the null level
FEW = 10  # positives of a class, below which it has no threshold of its own


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T = exp τ in 0.05 to 20 with the least `mean cross-entropy of logits / T + τ² / (2n)`.

    The second term keeps T near 1 where few examples speak, and finite where they are separable.

    Args:
        logits (`(n, C)`), labels (`(n,)`): of examples that the classifier was not fitted to.

    References: Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv 1706.04599), section 4.2; the second term is
    our own.
    """
    logits, labels = logits.double(), labels.long()

    def loss(tau: float) -> float:
        return F.cross_entropy(logits / math.exp(tau), labels).item() + tau**2 / (2 * len(labels))

    low, high = BOUNDS
    golden = (math.sqrt(5) - 1) / 2
    one, two = high - golden * (high - low), low + golden * (high - low)
    at_one, at_two = loss(one), loss(two)
    while high - low > 1e-4:  # the loss has one minimum: cross-entropy is convex in 1/T
        if at_one <= at_two:
            high, two, at_two = two, one, at_one
            one = high - golden * (high - low)
            at_one = loss(one)
        else:
            low, one, at_one = one, two, at_two
            two = low + golden * (high - low)
            at_two = loss(two)
    return math.exp((low + high) / 2)


def fit_decisions(logits: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """What turns raw logits into decisions about several labels: `sigmoid(logits / T + offsets)`, a class holds from .5 on.

    Least sum of the binary cross-entropies + τ²/2 + Σ_c (offset_c - their mean)²/2, with T = exp τ in 0.05 to 20. The second
    term keeps T near 1, the third the offsets of classes with few positives, or with none, near the others.

    Args:
        logits (`(n, C)`): of examples that the classifier was not fitted to.
        labels (`(n, C)`): 1 where a class holds, else 0.

    Returns:
        T and the offsets, float64 `(C,)`.

    References: Platt 1999, "Probabilistic outputs for support vector machines"; the two further terms are our own.
    """
    logits, labels = logits.double(), labels.double()
    centre = (
        logits.mean() if len(logits) else logits.new_zeros(())
    )  # so that the two parts are fitted independently, more or less
    tau, offsets = torch.zeros(1, dtype=torch.float64), torch.zeros(logits.shape[1], dtype=torch.float64)
    parameters = [tau.requires_grad_(), offsets.requires_grad_()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=500, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        answers = (logits - centre) * torch.exp(-tau.clamp(*BOUNDS)) + offsets
        value = F.binary_cross_entropy_with_logits(answers, labels, reduction="sum")
        value = value + (tau.square().sum() + (offsets - offsets.mean()).square().sum()) / 2
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    temperature = math.exp(min(max(tau.item(), BOUNDS[0]), BOUNDS[1]))
    return temperature, offsets.detach() - centre / temperature


def f1_thresholds(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """For each class the score from which on it holds, float64 `(C,)`, so that F1 is as high as possible.

    A class with fewer than 10 positives takes the threshold with which all classes together have the best micro F1: its own
    would be that of a few pictures. Thresholds lie midway between two scores; among equally good ones the nearest to 0.5 is taken.

    Args:
        scores (`(n, C)`): of examples that the classifier was not fitted to.
        labels (`(n, C)`): 1 where a class holds, else 0.

    References: Lipton et al. 2014, "Optimal Thresholding of Classifiers to Maximize F1 Measure" (arXiv 1402.1892).
    """
    scores, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels) > 0
    shared = _best_threshold(scores.ravel(), truth.ravel())
    own = (_best_threshold(scores[:, c], truth[:, c]) for c in range(scores.shape[1]))
    return np.array([one if n >= FEW else shared for one, n in zip(own, truth.sum(axis=0), strict=True)])


def _best_threshold(scores: np.ndarray, truth: np.ndarray) -> float:
    """The threshold with the best F1; 0.5 where nothing holds."""
    if not truth.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], np.cumsum(truth[order])
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + hits[-1])
    below = np.append(scores[1:], 0.0)  # the score that is not accepted any more
    middle, possible = (scores + below) / 2, scores > below
    possible[-1] = True  # all are accepted
    best = possible & np.isclose(f1, f1[possible].max(), rtol=0, atol=1e-12)
    return float(middle[best][np.abs(middle[best] - 0.5).argmin()])


def image_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of each image, `(n,)`: cross-entropy, or with several labels the mean binary cross-entropy; 0 for no example.

    Args:
        logits (`(n, C)`), labels (`(n,)` or `(n, C)`).
    """
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    losses = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(dim=1)
    return losses.where(is_example(labels), 0.0)


class Calibration(NamedTuple):
    """How right probabilities are.

    Args:
        loss: mean cross-entropy, in nats.
        brier: mean squared distance of the probabilities from the one-hot label, from 0 to 2.
        error: expected calibration error of the best class over 15 bins of equal mass.
        null_error: the mean of that error if the labels were drawn from the probabilities: what a perfectly calibrated
            classifier shows on so few examples.
    """

    loss: float
    brier: float
    error: float
    null_error: float


def calibration(scores: np.ndarray, labels: np.ndarray, seed: int = 0) -> Calibration:
    """`Calibration` of probabilities `(n, C)` with labels `(n,)`; n is at least 1.

    Args:
        seed: of the draws for the null level.

    References: Guo et al. 2017 (arXiv 1706.04599); Brier 1950.
    """
    scores = np.asarray(scores, dtype=np.float64)
    n = len(labels)
    own = scores[np.arange(n), labels]
    confidence, right = scores.max(axis=1), scores.argmax(axis=1) == labels
    rng = np.random.default_rng(seed)
    null = [calibration_error(confidence, rng.random(n) < confidence) for _ in range(DRAWS)]
    return Calibration(
        loss=float(-np.log(np.maximum(own, 1e-12)).mean()),
        brier=float((np.square(scores).sum(axis=1) - 2 * own + 1).mean()),
        error=calibration_error(confidence, right),
        null_error=float(np.mean(null)),
    )


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Mean, over at most 15 bins of equal mass, of |share of right answers - mean confidence|, weighted by their sizes."""
    order = np.argsort(confidence, kind="stable")
    bins = np.array_split(order, min(BINS, len(order)))
    gaps = [abs(right[rows].mean() - confidence[rows].mean()) * len(rows) for rows in bins]
    return float(sum(gaps) / len(order))


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[tuple[float, float, int]]:
    """For each bin of `calibration_error` its mean confidence, share of right answers and size."""
    order = np.argsort(confidence, kind="stable")
    bins = np.array_split(order, min(BINS, len(order)))
    return [(float(confidence[rows].mean()), float(right[rows].mean()), len(rows)) for rows in bins]


# -- abstention -------------------------------------------------------------------------------------------------------
def risk_coverage(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`(n,)`: the share of errors among the k most confident answers, for k = 1 to n."""
    order = np.argsort(-confidence, kind="stable")
    return np.cumsum(~np.asarray(right, dtype=bool)[order]) / np.arange(1, len(order) + 1)


def area_under_risk(confidence: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """AURC, the mean of `risk_coverage`, and by how much it exceeds that of the perfect order, in which errors come last.

    References: Geifman et al. 2019, "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers" (arXiv 1805.08206).
    """
    right = np.asarray(right, dtype=bool)
    area = risk_coverage(confidence, right).mean()
    perfect = risk_coverage(right.astype(float), right).mean()
    return float(area), float(area - perfect)


def threshold_for(confidence: np.ndarray, right: np.ndarray, accuracy: float, level: float = 0.95) -> float | None:
    """The lowest threshold at which accepted answers have this accuracy, at this confidence level; None: no threshold has.

    Coverage grows in steps of 1 %, from the most confident answers on, and ends before the exact one-sided binomial bound
    of the accuracy first falls below `accuracy`. Such a fixed sequence of tests needs no correction for their number.

    Args:
        confidence, right (`(n,)`): of examples that the classifier was not fitted to.
        accuracy: above 0 and below 1.

    References: Clopper & Pearson 1934 for the bound; Angelopoulos et al. 2021, "Learn then Test" (arXiv 2110.01052), for
    fixed sequences.
    """
    order = np.argsort(-confidence, kind="stable")
    hits = np.cumsum(np.asarray(right, dtype=bool)[order])
    found, n = None, len(order)
    for percent in range(1, 101) if n else ():
        accepted = max(1, round(n * percent / 100))
        if binomial_tail(accepted, int(hits[accepted - 1]), accuracy) > 1 - level:
            # Before any test passes, too few answers are accepted for the bound: these steps decide nothing.
            if found is None and accuracy**accepted > 1 - level:
                continue
            return found
        found = float(confidence[order[accepted - 1]])
    return found


def binomial_tail(trials: int, hits: int, share: float) -> float:
    """P(X ≥ hits) of a binomial X with this share. Below 1 - level, the exact lower bound of the share lies above it."""
    logs = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        + k * math.log(share) + (trials - k) * math.log1p(-share)
        for k in range(hits, trials + 1)
    ]  # fmt: skip
    return min(1.0, math.fsum(math.exp(value) for value in logs))
