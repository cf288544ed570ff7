"""Gaussian discriminant analysis: class means, one covariance, equal priors. Shapes as in `inputs`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .inputs import Inputs


def gaussians(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Weight `(C, D)` and bias `(C,)` of the log posteriors, up to a constant, of Gaussians with one covariance:

        μ_cᵀ Σ⁻¹ x + log(1/C) - ½ μ_cᵀ Σ⁻¹ μ_c

    Σ⁻¹ is estimated as in `precision`.

    References: Wang et al. 2024, "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation" (arXiv 2402.04087).
    """
    means = inputs.class_means(inputs.train_x)
    inverse = precision(inputs.train_x - means[inputs.train_y])
    weight = means @ inverse
    return weight, -math.log(inputs.classes) - (weight * means).sum(dim=1) / 2


def precision(centred: Tensor) -> Tensor:
    """Inverse covariance `(D, D)` of examples `(n, D)` minus the means of their classes.

    With S their scatter matrix, the sum of x xᵀ: `D (S + tr(S)/(n-1) I)⁻¹`, the ridge-like estimate of Kubokawa & Srivastava
    2008 that the method uses.

    If no class has two different examples, S is 0; the identity is returned, and the nearest mean wins.
    """
    n, size = centred.shape
    scatter = centred.T @ centred
    total = torch.trace(scatter)
    identity = torch.eye(size, dtype=centred.dtype, device=centred.device)
    if total <= 1e-20 * n:
        return identity
    return size * torch.linalg.pinv(scatter + total / (n - 1) * identity, hermitian=True)
