"""LP++: a linear probe whose weights blend visual prototypes with class texts. Shapes and conventions as in `baselines`."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..predict.fitting.inputs import Inputs, check, positive


def lp_plus_plus(train_x, train_y, test_x, zero_shot, scale: float = 100.0, iterations: int = 300) -> np.ndarray:
    """Scores `(N, C)`: `f·v_c + a_c (f·w_c)`, with v and a trained by cross-entropy, step sizes taken from the data.

    Full-batch descent with the gradients in closed form; no randomness, no validation, no augmentation, the last iterate.
    With `Z = F Wᵀ` `(n, C)` of the training features F:

    - v starts at the class means; every iteration steps by `4n / λ_max(FᵀF)`, with momentum 0.9;
    - a starts, for all classes alike, at 2.5 `scale` times the mean over classes of the mean of f·w_c over the examples of c
      (250 times it in the paper, whose models have the scale 100); every tenth iteration steps by
      `n / (4 max_c Σ_i Z_ic²)`, without momentum.

    Where the authors' paper and code differ or say nothing:

    - the gradient of a is that of the iteration in which it is used, as the paper alternates between the two blocks; the
      code sums the gradients of all iterations before it;
    - classes may have unequal sizes: means are over the examples of a class, where the code divides by the number of shots.
      A class without example starts at v_c = 0;
    - the last iterate is used, not the best one on validation.

    Args:
        train_x (`(n, D)`), train_y (`(n,)`), test_x (`(N, D)`), zero_shot (`(C, D)`): unit-norm rows. The start of `a` assumes
            cosines like CLIP's, 0.2 to 0.4 between an image and its text.
        scale: of the model's logits.

    Computed in float64.

    Raises:
        UserError: see `inputs.check`.

    References: Huang et al. 2024, "LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP" (arXiv 2404.02285).
    """
    inputs = check(train_x, train_y, test_x, zero_shot, unit_norm=True)
    positive(scale=scale, iterations=iterations)
    prototypes, blend, _ = fit(inputs, scale, iterations)
    return (inputs.test_x @ prototypes.T + blend * (inputs.test_x @ inputs.zero_shot.T)).cpu().numpy()


def fit(
    inputs: Inputs, scale: float = 100.0, iterations: int = 300, momentum: float = 0.9
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Visual prototypes v `(C, D)`, blending a `(C,)`, and the losses before each iteration."""
    x, n = inputs.train_x, len(inputs.train_x)
    texts = x @ inputs.zero_shot.T
    step_v = 4 * n / torch.linalg.eigvalsh(x.T @ x).max()  # cheaper than the singular values of the n × D matrix
    step_a = n / (4 * texts.square().sum(dim=0).max())
    v = inputs.class_means(x)
    own = inputs.class_means(texts.gather(1, inputs.train_y[:, None]))[:, 0]
    a = (2.5 * scale * own[inputs.counts > 0].mean()).expand(inputs.classes).clone()
    speed = torch.zeros_like(v)
    losses = []
    for iteration in range(iterations):
        loss, grad_v, _ = loss_and_gradients(x, texts, inputs.train_y, v, a)
        losses.append(loss)
        speed = momentum * speed + grad_v
        v = v - step_v * speed
        if iteration % 10 == 9:
            _, _, grad_a = loss_and_gradients(x, texts, inputs.train_y, v, a)
            a = a - step_a * grad_a
    return v, a, losses


def loss_and_gradients(x: Tensor, texts: Tensor, y: Tensor, v: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy of the logits `x vᵀ + a texts`, and its gradients by v `(C, D)` and a `(C,)`."""
    logits = x @ v.T + a * texts
    excess = (logits.softmax(dim=1) - F.one_hot(y, len(v))) / len(x)
    return F.cross_entropy(logits, y), excess.T @ x, (excess * texts).sum(dim=0)
