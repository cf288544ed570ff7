"""Logistic regression on image embeddings that starts at class texts. Shapes as in `inputs`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Inputs, positive
from .probe import log_priors

STRENGTH = 10.0  # inverse strength of the penalty, for unit-norm features


@torch.enable_grad()
def regression(
    inputs: Inputs, scale: float, strength: float = STRENGTH, iterations: int = 300, adjustment: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Weight `(C, D)` and bias `(C,)` that minimize

        C Σ_i CE(W x_i + b, y_i) + ½ ‖W - s B‖²

    with C the `strength`, s the `scale` and B = `zero_shot`: the class texts, moved as far as the images ask for. With B = 0
    this is scikit-learn's `LogisticRegression(C)`.

    Args:
        scale: `exp(logit_scale)` of the model.
        iterations: at most, of L-BFGS, which starts at the class texts.
        adjustment: of the logits in training, see `probe.probe`.

    There is no randomness.
    """
    positive(scale=scale, strength=strength)
    x, y, start = inputs.train_x, inputs.train_y, scale * inputs.zero_shot
    change, bias = torch.zeros_like(start, requires_grad=True), start.new_zeros(len(start), requires_grad=True)
    texts = x @ start.T + adjustment * log_priors(inputs.counts).to(x)
    optimizer = torch.optim.LBFGS([change, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        # Divided by the number of images, so that L-BFGS's tolerances do not depend on it.
        fit = F.cross_entropy(texts + x @ change.T + bias, y)
        total = fit + change.square().sum() / (2 * strength * len(x))
        total.backward()
        return total

    optimizer.step(loss)
    return start + change.detach(), bias.detach()
