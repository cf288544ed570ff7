"""Tip-Adapter: the training examples are a cache that is searched for similar images. Shapes and conventions as in `baselines`."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..predict.fitting.inputs import Choice, Inputs, best, check, positive, train

ALPHA, BETA = 1.0, 5.5
# 13 x 7 pairs, about as many as a linear probe tries strengths.
ALPHAS = tuple(10.0 ** (k / 4) for k in range(-4, 9))
BETAS = tuple(BETA * 2.0**k for k in range(-3, 4))
# Most similarities held at once: 128 MiB in float64, besides a few temporaries of that size.
MOST_SIMILARITIES = 2**24


def tip(
    train_x, train_y, test_x, zero_shot, alpha: float = ALPHA, beta: float = BETA, scale: float = 100.0
) -> np.ndarray:
    """Scores `(N, C)` without training: `scale * f·w_c + alpha * sum over examples i of c of exp(-beta (1 - f·key_i))`.

    Args:
        train_x (`(n, D)`), train_y (`(n,)`), test_x (`(N, D)`), zero_shot (`(C, D)`): unit-norm rows. The key of an example is
            its embedding (the paper: the mean of 10 random crops with flips). A class without example keeps its zero-shot
            score.
        alpha: weight of the cache. By default 1, the middle of the grid on validation that `choose` tries.
        beta: how fast similarity falls off, as a rate per cosine; by default 5.5, the middle of its grid.
        scale: `exp(logit_scale)` of the model; 100 is where CLIP's ends.

    Computed in float64.

    Raises:
        UserError: see `inputs.check`.

    References: Zhang et al. 2022, "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification" (arXiv 2207.09519),
    equations 3 to 5.
    """
    inputs = check(train_x, train_y, test_x, zero_shot, unit_norm=True)
    positive(alpha=alpha, beta=beta, scale=scale)
    return _scores(inputs, inputs.train_x, alpha, beta, scale)


def choose(train_x, train_y, val_x, val_y, zero_shot, scale: float = 100.0) -> Choice:
    """`alpha` and `beta` of `tip` by accuracy on validation `(n_val, D)`, `(n_val,)`, from `ALPHAS` x `BETAS`."""
    inputs = check(train_x, train_y, val_x, zero_shot, unit_norm=True, test_name="val_x")
    return _choose(inputs, inputs.train_x, val_y, scale)


def tip_f(
    train_x, train_y, test_x, zero_shot, alpha: float = ALPHA, beta: float = BETA, scale: float = 100.0, **training
) -> np.ndarray:
    """Scores `(N, C)` like those of `tip`, with keys trained by cross-entropy on the training examples.

    The optimizer is AdamW with eps 1e-4 and a cosine schedule. The keys of the last epoch are used; no other data select
    an epoch. Training uses the default `alpha` and `beta`: the given ones only enter the scores.

    Args:
        epochs (20), learning_rate (1e-3), batch_size (256): of the training.
        seed (0): of the order. The global generator is left alone.

    The other arguments are those of `tip`. Training is in float32, scoring in float64; on a CPU equal seeds give equal scores.

    References: Zhang et al. 2022 (arXiv 2207.09519), section 3.2, "Tip-Adapter-F".
    """
    inputs = check(train_x, train_y, test_x, zero_shot, unit_norm=True)
    positive(alpha=alpha, beta=beta, scale=scale)
    return _scores(inputs, _train_keys(inputs, scale, **training), alpha, beta, scale)


def choose_f(train_x, train_y, val_x, val_y, zero_shot, scale: float = 100.0, **training) -> Choice:
    """`choose` for `tip_f`: the keys are those that `tip_f` trains with the same arguments."""
    inputs = check(train_x, train_y, val_x, zero_shot, unit_norm=True, test_name="val_x")
    return _choose(inputs, _train_keys(inputs, scale, **training), val_y, scale)


def _cache(similarities: Tensor, values: Tensor, beta: float) -> Tensor:
    return torch.exp(-beta * (1 - similarities)) @ values


def _parts(features: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    """Splits the rows, so that memory does not grow with the number of rows times the number of keys."""
    return features.split(max(1, min(1024, MOST_SIMILARITIES // len(keys))))


def _values(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    return F.one_hot(inputs.train_y, inputs.classes).to(dtype)


def _scores(inputs: Inputs, keys: Tensor, alpha: float, beta: float, scale: float) -> np.ndarray:
    values = _values(inputs, keys.dtype)
    return np.concatenate(
        [
            (scale * part @ inputs.zero_shot.T + alpha * _cache(part @ keys.T, values, beta)).cpu().numpy()
            for part in _parts(inputs.test_x, keys)
        ]
    )


def _choose(inputs: Inputs, keys: Tensor, val_y, scale: float) -> Choice:
    texts, values = scale * inputs.test_x @ inputs.zero_shot.T, _values(inputs, keys.dtype)
    parts = {beta: [] for beta in BETAS}
    for part in _parts(inputs.test_x, keys):
        similarities = part @ keys.T
        for beta in BETAS:
            parts[beta].append(_cache(similarities, values, beta))
    caches = {beta: torch.cat(found) for beta, found in parts.items()}
    return best(
        {"alpha": ALPHA, "beta": BETA},
        [{"alpha": alpha, "beta": beta} for beta in BETAS for alpha in ALPHAS],
        lambda candidate: (texts + candidate["alpha"] * caches[candidate["beta"]]).cpu(),
        val_y,
        inputs.classes,
    )


def _train_keys(
    inputs: Inputs,
    scale: float,
    epochs: int = 20,
    learning_rate: float = 1e-3,
    batch_size: int = 256,
    seed: int = 0,
) -> Tensor:
    positive(scale=scale, epochs=epochs, learning_rate=learning_rate, batch_size=batch_size)
    texts, values = inputs.zero_shot.float(), _values(inputs, torch.float32)
    keys = inputs.train_x.float().requires_grad_()

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scale * features @ texts.T + ALPHA * _cache(features @ keys.T, values, BETA), labels)

    train(inputs, loss, torch.optim.AdamW([keys], learning_rate, eps=1e-4), epochs, batch_size, seed)
    return keys.detach().to(inputs.train_x.dtype)
