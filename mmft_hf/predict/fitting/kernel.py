"""Classifiers that look up the training pictures: proximal kernel ridge, a cache, retrieval. Shapes as in `inputs`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Inputs, positive

BETA, RIDGE = 5.5, 1.0


def ridge(inputs: Inputs, beta: float = BETA, ridge: float = RIDGE) -> Tensor:
    """Values A `(n, C)` of a kernel ridge regression on what the class texts leave unexplained:

        A = (K + λ I)⁻¹ (Y - X Bᵀ),  K_ij = exp(-β (1 - x_i·x_j))

    with Y the labels as one-hot rows and B = `zero_shot`. The classifier is `scale * (B x + Σ_i exp(-β (1 - x·x_i)) A_i)`.

    Args:
        beta: how fast similarity falls off, as a rate per cosine.
        ridge: λ; the larger it is, the nearer the classifier stays to the texts.

    References: Bendou et al. 2025, "ProKeR: A Kernel Perspective on Few-Shot Adaptation of Large Vision-Language Models" (arXiv
    2501.11175). Their code solves with `K/λ + I` without the factor 1/λ, which is the same at λ = 1 only.
    """
    positive(beta=beta, ridge=ridge)
    x = inputs.train_x
    system = torch.exp(-beta * (1 - x @ x.T))
    system.diagonal().add_(ridge)
    left = one_hot(inputs) - x @ inputs.zero_shot.T
    return torch.cholesky_solve(left, torch.linalg.cholesky(system))


def one_hot(inputs: Inputs) -> Tensor:
    """The labels as rows `(n, C)` of 0 and 1, in the type of the features."""
    return F.one_hot(inputs.train_y, inputs.classes).to(inputs.train_x.dtype)
