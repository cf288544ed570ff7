"""Linear probes that start at the zero-shot weights: ZS-LP, and CLAP, which stays near them. Conventions as in `baselines`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..predict.fitting.inputs import Inputs, check
from ..predict.fitting.probe import probe


def zs_lp(train_x, train_y, test_x, zero_shot, **training) -> np.ndarray:
    """Scores `(N, C)`: as `clap`, without its penalty. Takes the same arguments."""
    inputs = check(train_x, train_y, test_x, zero_shot, unit_norm=True)
    return _fit(inputs, torch.zeros_like(inputs.zero_shot[:, 0]), **training)


def clap(train_x, train_y, test_x, zero_shot, **training) -> np.ndarray:
    """Scores `(N, C)`: `scale` times the cosines to class weights, trained by

        cross-entropy + sum over classes of λ_c ‖w_c - w_c⁰‖²

    starting at the zero-shot weights w⁰. λ_c is the mean probability that the zero-shot classifier gives to class c for its
    training examples: classes that it knows well stay near w⁰. A class without example gets the mean of the others. The
    method is designed to choose nothing on validation.

    Args:
        train_x (`(n, D)`), train_y (`(n,)`), test_x (`(N, D)`), zero_shot (`(C, D)`): unit-norm rows.
        scale (100): `exp(logit_scale)` of the model; 100 is where CLIP's ends.
        epochs (300), learning_rate (1e-3), batch_size (256): of SGD with momentum 0.9 and a cosine schedule. The authors use
            0.1 on text embeddings that are not normalized; a step turns weights that are r times as long by 1/r² of the
            angle. On unit-norm weights a rate of 0.1 let one image per class undo the zero-shot start.
        seed (0): of the order. The global generator is left alone.

    Trained in float32; on a CPU equal seeds give equal scores.

    Raises:
        UserError: see `inputs.check`.

    References: Silva-Rodríguez et al. 2024, "A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models" (arXiv
    2312.12730): ZS-LP, and CLAP with multipliers from one step.
    """
    inputs = check(train_x, train_y, test_x, zero_shot, unit_norm=True)
    return _fit(inputs, multipliers(inputs, training.get("scale", 100.0)), **training)


def multipliers(inputs: Inputs, scale: float) -> Tensor:
    """λ `(C,)`."""
    own = (scale * inputs.train_x @ inputs.zero_shot.T).softmax(dim=1).gather(1, inputs.train_y[:, None])
    means = inputs.class_means(own)[:, 0]
    known = inputs.counts > 0
    return torch.where(known, means, means[known].mean())


def _fit(inputs: Inputs, penalty: Tensor, scale: float = 100.0, **training) -> np.ndarray:
    weights = probe(inputs, penalty, scale, **training)
    return (scale * inputs.test_x @ weights.T).cpu().numpy()
