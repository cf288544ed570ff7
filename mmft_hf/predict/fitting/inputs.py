"""Shared by the baselines on frozen features: checked arrays, the choice of a parameter on validation, a training loop.

Shapes as in `baselines`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...core.console import some
from ...core.errors import UserError

UNIT_NORM_TOLERANCE = 0.02  # larger than the rounding error of a norm of 1 in half precision


class Inputs(NamedTuple):
    """Checked arrays: features of one float type on the device of `train_x`, labels int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    zero_shot: Tensor | None
    classes: int

    @property
    def counts(self) -> Tensor:
        """Training examples of each class, `(C,)`."""
        return torch.bincount(self.train_y, minlength=self.classes)

    def class_means(self, values: Tensor) -> Tensor:
        """Mean of `values` `(n, D)` over the examples of each class, `(C, D)`; 0 for a class without any."""
        sums = values.new_zeros(self.classes, values.shape[1]).index_add_(0, self.train_y, values)
        return sums / self.counts.clamp(min=1)[:, None]


class Choice(NamedTuple):
    """What validation chose: keyword arguments of the method, their accuracy, and the number of candidates."""

    parameters: dict[str, float]
    accuracy: float
    tried: int


def check(
    train_x,
    train_y,
    test_x,
    zero_shot=None,
    dtype: torch.dtype | None = torch.float64,
    every_class: bool = False,
    unit_norm: bool = False,
    test_name: str = "test_x",
) -> Inputs:
    """Checks the arguments of a method and converts them to one type and device.

    Args:
        train_x (`(n, D)`), train_y (`(n,)`), test_x (`(N, D)`), zero_shot (`(C, D)`).
        dtype: of the computation; None keeps float32 if `train_x` is float32, and takes float64 otherwise.
        every_class: the method needs an example of every class.
        unit_norm: the method needs features of norm 1. Class weights of `zero_shot` always do.
        test_name: the name of `test_x` in messages.

    Raises:
        UserError: shapes or sizes do not fit, values are not finite, labels are out of range, a class has no example.
    """
    x = _features("train_x", train_x, "(n, D)")
    x = x.to(dtype or (torch.float32 if x.dtype == torch.float32 else torch.float64))
    test, weights = (
        None if values is None else _like(x, name, _features(name, values, shape))
        for name, values, shape in ((test_name, test_x, "(N, D)"), ("zero_shot", zero_shot, "(C, D)"))
    )
    y = labels("train_y", train_y, len(x)).to(x.device)
    classes = len(weights) if weights is not None else int(y.max()) + 1
    if classes < 2:
        raise UserError(f"train_y: expected examples of at least 2 classes, found {classes}.")
    check_range("train_y", y, classes)
    inputs = Inputs(x, y, test, weights, classes)
    if every_class and (inputs.counts == 0).any():
        empty = torch.nonzero(inputs.counts == 0).flatten().tolist()
        raise UserError(
            f"train_y: expected at least one example of each of the {classes} classes, found none of class "
            f"{some(empty)}. Give one, or number the remaining classes from 0."
        )
    for name, rows in {"train_x": x, test_name: test, "zero_shot": weights}.items():
        if rows is not None and (unit_norm or name == "zero_shot"):
            norms = rows.norm(dim=-1)
            if ((norms - 1).abs() > UNIT_NORM_TOLERANCE).any():
                raise UserError(
                    f"{name}: expected rows of norm 1, found norms from {norms.min():.3g} to {norms.max():.3g}. Divide each row "
                    "by its norm."
                )
    return inputs


def _features(name: str, values, shape: str) -> Tensor:
    x = values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    if not x.dtype.is_floating_point or x.ndim != 2 or 0 in x.shape:
        raise UserError(f"{name}: expected floats of shape {shape}, not empty, found {x.dtype} {tuple(x.shape)}.")
    bad = (~torch.isfinite(x)).any(dim=1)
    if bad.any():
        raise UserError(
            f"{name}: expected finite numbers, found NaN or infinity in {int(bad.sum())} of {len(x)} rows, the first of "
            f"them row {int(bad.nonzero()[0])}. Encode those images again, or leave them out."
        )
    return x


def _like(x: Tensor, name: str, values: Tensor) -> Tensor:
    if values.shape[-1] != x.shape[-1]:
        raise UserError(
            f"{name}: expected the embedding size of train_x, {x.shape[-1]}, found {values.shape[-1]}. All features must "
            "come from one model."
        )
    return values.to(device=x.device, dtype=x.dtype)


def labels(name: str, values, rows: int) -> Tensor:
    """Integer labels `(rows,)` as int64 on the CPU."""
    y = values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    if y.ndim != 1 or len(y) != rows:
        raise UserError(f"{name}: expected one label for each of {rows} examples, found shape {tuple(y.shape)}.")
    if y.dtype.is_floating_point or y.dtype.is_complex or y.dtype == torch.bool:
        raise UserError(f"{name}: expected integers from 0 to C-1, found {y.dtype}.")
    return y.long()


def check_range(name: str, y: Tensor, classes: int) -> None:
    """Raises `UserError` for labels `(n,)` outside 0 to C-1."""
    wrong = y[(y < 0) | (y >= classes)]
    if len(wrong):
        raise UserError(
            f"{name}: expected labels from 0 to {classes - 1}, found {some(sorted(set(wrong.tolist())))}. Leave out rows "
            "without a label, such as -100."
        )


def positive(**numbers: float) -> None:
    """Raises `UserError` for a parameter that is not a positive number."""
    for name, number in numbers.items():
        if not (isinstance(number, Real) and math.isfinite(number) and number > 0):
            raise UserError(f"{name}: expected a number above 0, found {number!r}.")


def best(
    default: dict[str, float],
    candidates: Sequence[dict[str, float]],
    score: Callable[[dict[str, float]], Any],
    val_y,
    classes: int,
) -> Choice:
    """The candidate with the best accuracy on validation; of equals, the one nearest to the default.

    Few-shot validation sets are small, so many candidates tie. If validation cannot tell them apart, the
    default stays. The distance is the sum over the parameters of the distances of their logarithms.

    Args:
        score: candidate -> scores `(n_val, C)` of the validation examples.
        val_y: their labels, `(n_val,)`.
    """
    results = []
    for candidate in candidates:
        scores = np.asarray(score(candidate))
        y = labels("val_y", val_y, len(scores))
        check_range("val_y", y, classes)
        hits = int((scores.argmax(axis=1) == y.numpy()).sum())
        distance = sum(abs(math.log(candidate[name] / default[name])) for name in candidate)
        results.append((hits, -distance, candidate))
    hits, _, chosen = max(results, key=lambda result: result[:2])
    return Choice(chosen, hits / len(y), len(results))


@torch.enable_grad()
def train(
    inputs: Inputs,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int,
    seed: int,
) -> None:
    """Minimizes `loss(features (B, D), labels (B,))` over shuffled batches of the training examples, with a cosine schedule."""
    generator = torch.Generator().manual_seed(seed)
    x, y = inputs.train_x.float(), inputs.train_y
    n, device = len(x), x.device
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(n / batch_size))
    for _ in range(epochs):
        for rows in torch.randperm(n, generator=generator).split(batch_size):
            rows = rows.to(device)
            optimizer.zero_grad()
            loss(x[rows], y[rows]).backward()
            optimizer.step()
            schedule.step()
