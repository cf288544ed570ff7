"""Gaussian discriminant analysis: class means, one covariance, no training. Shapes and conventions as in `baselines`."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..predict.fitting.gda import gaussians
from ..predict.fitting.inputs import Choice, Inputs, best, check, positive

ALPHAS = tuple(10.0**k for k in range(-4, 3))
ALPHA = 1.0


def gda(train_x, train_y, test_x, zero_shot, alpha: float = ALPHA, scale: float = 100.0) -> np.ndarray:
    """Scores `(N, C)` of Gaussians with one covariance and equal priors, added to the zero-shot scores:

        scale * f·w_c + alpha * (μ_cᵀ Σ⁻¹ f + log(1/C) - ½ μ_cᵀ Σ⁻¹ μ_c)

    Args:
        train_x (`(n, D)`), train_y (`(n,)`), test_x (`(N, D)`), zero_shot (`(C, D)`): unit-norm rows; zero_shot are the class
            weights w_c. Each class needs an example; one is enough.
        alpha: weight of the Gaussians. The default is 1: both summands are log posteriors up to a constant, and a product of
            two posteriors weighs them equally. `choose` finds a better value on validation.
        scale: `exp(logit_scale)` of the model; 100 is where CLIP's ends.

    Computed in float64.

    Raises:
        UserError: see `inputs.check`; a class without example.

    References: Wang et al. 2024, "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation" (arXiv 2402.04087).
    """
    inputs = check(train_x, train_y, test_x, zero_shot, every_class=True, unit_norm=True)
    positive(alpha=alpha, scale=scale)
    return (scale * inputs.test_x @ inputs.zero_shot.T + alpha * _gaussians(inputs)).cpu().numpy()


def choose(train_x, train_y, val_x, val_y, zero_shot, scale: float = 100.0) -> Choice:
    """`alpha` of `gda` by accuracy on validation `(n_val, D)`, `(n_val,)`, from the paper's seven values `ALPHAS`."""
    inputs = check(train_x, train_y, val_x, zero_shot, every_class=True, unit_norm=True, test_name="val_x")
    texts, gaussians = scale * inputs.test_x @ inputs.zero_shot.T, _gaussians(inputs)
    return best(
        {"alpha": ALPHA},
        [{"alpha": alpha} for alpha in ALPHAS],
        lambda candidate: (texts + candidate["alpha"] * gaussians).cpu(),
        val_y,
        inputs.classes,
    )


def _gaussians(inputs: Inputs) -> Tensor:
    weight, bias = gaussians(inputs)
    return inputs.test_x @ weight.T + bias
