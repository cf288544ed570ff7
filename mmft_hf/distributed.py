"""Gathering rows over processes, exactly in value and in gradient; without several processes, nothing is done.

`W` processes hold `B_0 .. B_{W-1}` rows, which may differ (the last batch of an epoch); `N` is their sum.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes, 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all_gather_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """All processes' rows `(N, ...)` in rank order. Rows are padded to the longest: collectives need equal shapes."""
    longest = max(sizes)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _Gather(torch.autograd.Function):
    """Gather whose backward sums the gradients of all processes before it takes this process' rows.

    Every process computes the same loss from the gathered rows, so the sum is W times the gradient of that loss, and
    the mean over processes that DDP and FSDP take afterwards divides by W again: exact, whatever W is.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return _all_gather_rows(rows, sizes)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        rank = dist.get_rank()
        start = sum(ctx.sizes[:rank])
        return grad[start : start + ctx.sizes[rank]], None


def gather(rows: Tensor) -> Tensor:
    """Rows `(B, ...)` of every process as `(N, ...)`, in rank order and with gradient; the input for one process."""
    if world_size() == 1:
        return rows
    size = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.empty_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    sizes = torch.cat(sizes).tolist()
    return _Gather.apply(rows, sizes) if rows.requires_grad else _all_gather_rows(rows, sizes)
