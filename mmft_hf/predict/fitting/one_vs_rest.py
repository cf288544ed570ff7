"""A logistic regression for each class, for several labels per picture. Shapes: `n` images, `C` classes, `D` embedding size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration import fit_decisions
from .inputs import positive

RIDGE = 0.1


@torch.enable_grad()
def one_vs_rest(
    images: Tensor, labels: Tensor, texts: Tensor, scale: float, ridge: float = RIDGE
) -> tuple[Tensor, Tensor]:
    """Weights `(C, D)` and biases `(C,)`, float64, of logistic regressions that stay near the class texts.

    They start at the text logits `scale * texts @ x`, calibrated on the images (`fit_decisions`), and have the least sum of the
    binary cross-entropies + `ridge / 2` times the squared distance from there, which is one point.

    Args:
        images (`(n, D)`), texts (`(C, D)`): unit-norm embeddings.
        labels (`(n, C)`): 1 where a class holds, else 0.
        scale: `exp(logit_scale)` of the model.
        ridge (0.1): the larger it is, the nearer the weights stay to the texts.

    References: Le Cessie & van Houwelingen 1992, "Ridge estimators in logistic regression"; the start at texts is after ZS-LP
    (Silva-Rodríguez et al. 2024, arXiv 2312.12730).
    """
    positive(scale=scale, ridge=ridge)
    x, y, texts = images.double(), labels.double(), texts.double()
    temperature, offsets = fit_decisions(scale * x @ texts.T, y)
    start = torch.cat([scale / temperature * texts, offsets[:, None]], dim=1)
    x = F.pad(x, (0, 1), value=1.0)  # for the bias
    moved = torch.zeros_like(start).requires_grad_()
    optimizer = torch.optim.LBFGS([moved], max_iter=300, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.binary_cross_entropy_with_logits(x @ (start + moved).T, y, reduction="sum")
        value = value + ridge / 2 * moved.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight = (start + moved).detach()
    return weight[:, :-1], weight[:, -1]
