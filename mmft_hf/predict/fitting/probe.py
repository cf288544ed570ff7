"""A linear probe that starts at class texts. Shapes as in `inputs`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import Inputs, positive, train


def log_priors(counts: Tensor) -> Tensor:
    """Logarithm `(C,)` of the share of each class among examples, from their numbers `(C,)`; a class without any counts as one."""
    return (counts.clamp(min=1) / counts.sum()).log()


def probe(
    inputs: Inputs,
    penalty: Tensor | float = 0.0,
    scale: float = 100.0,
    epochs: int = 300,
    learning_rate: float = 1e-3,
    batch_size: int = 256,
    seed: int = 0,
    adjustment: float = 0.0,
) -> Tensor:
    """Unit-norm class weights w `(C, D)`, trained by the cross-entropy of `scale` times cosines.

    Args:
        inputs: `zero_shot` are the weights where training starts.
        penalty (`(C,)`): λ_c; `λ_c ‖w_c - w_c⁰‖²` is added to the loss.
        scale (100): `exp(logit_scale)` of the model.
        epochs (300), learning_rate (1e-3), batch_size (256): of SGD with momentum 0.9 and a cosine schedule.
        seed (0): of the order. The global generator is left alone.
        adjustment (0): τ; `τ log π_c` is added to the logits in training, with π_c the share of class c among the examples.
            A class without examples counts as one. 0: none.

    Trained in float32; on a CPU equal seeds give equal weights.

    References: Silva-Rodríguez et al. 2024 (arXiv 2312.12730), ZS-LP; Menon et al. 2021, "Long-tail learning via logit
    adjustment" (arXiv 2007.07314), for `adjustment`.
    """
    positive(scale=scale, epochs=epochs, learning_rate=learning_rate, batch_size=batch_size)
    start = inputs.zero_shot.float()
    penalty = torch.as_tensor(penalty, dtype=torch.float32, device=start.device)
    weights = start.clone().requires_grad_()
    priors = adjustment * log_priors(inputs.counts).float()

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        near = (penalty * (weights - start).square().sum(dim=1)).sum()
        return F.cross_entropy(scale * features @ F.normalize(weights, dim=1).T + priors, labels) + near

    train(inputs, loss, torch.optim.SGD([weights], learning_rate, momentum=0.9), epochs, batch_size, seed)
    return F.normalize(weights.detach().double(), dim=1)
