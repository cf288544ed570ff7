"""ProKeR: class texts, corrected by a kernel ridge regression on the training examples. Shapes and conventions as in `baselines`."""

from __future__ import annotations

import numpy as np
import torch

from ..predict.fitting.inputs import Choice, Inputs, best, check, positive
from ..predict.fitting.kernel import BETA, RIDGE
from ..predict.fitting.kernel import ridge as values_of

BETAS, RIDGES = (1.0, BETA, 20.0), (0.1, RIDGE, 10.0)


def proker(
    train_x, train_y, test_x, zero_shot, beta: float = BETA, ridge: float = RIDGE, scale: float = 100.0
) -> np.ndarray:
    """Scores `(N, C)`: `scale * (f·w_c + sum over examples i of exp(-beta (1 - f·x_i)) A_ic)`, with A as in
    `predict.fitting.kernel.ridge`.

    Args:
        train_x (`(n, D)`), train_y (`(n,)`), test_x (`(N, D)`), zero_shot (`(C, D)`): unit-norm rows.
        beta, ridge: see there.
        scale: `exp(logit_scale)` of the model.

    Computed in float64.

    Raises:
        UserError: see `inputs.check`.

    References: Bendou et al. 2025, "ProKeR: A Kernel Perspective on Few-Shot Adaptation of Large Vision-Language Models" (arXiv
    2501.11175).
    """
    inputs = check(train_x, train_y, test_x, zero_shot, unit_norm=True)
    positive(beta=beta, ridge=ridge, scale=scale)
    return _scores(inputs, beta, ridge, scale).cpu().numpy()


def choose(train_x, train_y, val_x, val_y, zero_shot, scale: float = 100.0) -> Choice:
    """`beta` and `ridge` of `proker` by accuracy on validation `(n_val, D)`, `(n_val,)`, from `BETAS` x `RIDGES`."""
    inputs = check(train_x, train_y, val_x, zero_shot, unit_norm=True, test_name="val_x")
    return best(
        {"beta": BETA, "ridge": RIDGE},
        [{"beta": beta, "ridge": ridge} for beta in BETAS for ridge in RIDGES],
        lambda candidate: _scores(inputs, **candidate, scale=scale).cpu(),
        val_y,
        inputs.classes,
    )


def _scores(inputs: Inputs, beta: float, ridge: float, scale: float) -> torch.Tensor:
    values = values_of(inputs, beta, ridge)
    parts = [
        part @ inputs.zero_shot.T + torch.exp(-beta * (1 - part @ inputs.train_x.T)) @ values
        for part in inputs.test_x.split(1024)
    ]
    return scale * torch.cat(parts)
