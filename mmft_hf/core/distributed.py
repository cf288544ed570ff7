"""Gathers rows and sums values over processes, exactly in value and gradient. With one process, nothing is done.

`W` processes hold `B_0 .. B_{W-1}` rows; `N` is their sum.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of processes; 1 if torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """The index of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def communication_device() -> torch.device:
    """The device that tensors are sent from: the CPU for gloo, the accelerator for every other backend."""
    if "gloo" in dist.get_backend() or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator()


def _row_counts(rows: Tensor) -> list[int]:
    """`[B_0 .. B_{W-1}]`. Waits for the other processes and for the accelerator."""
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    return torch.cat(counts).tolist()


def _all_gather(rows: Tensor, sizes: list[int]) -> list[Tensor]:
    """The rows of each process. For the transfer they are padded to the longest, because collectives need equal shapes."""
    longest = max(sizes)
    padded = rows.contiguous()
    if len(rows) < longest:
        padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


class _Gather(torch.autograd.Function):
    """A gather whose backward sums the gradients of all processes and then takes the rows of this process.

    Every process computes the same loss from the gathered rows, so the sum is W times the gradient of that loss. DDP and
    FSDP then take the mean over processes, which divides by W again. The result is exact for any W.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return torch.cat(_all_gather(rows, sizes))

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd owns the original
        dist.all_reduce(grad)
        start = sum(ctx.sizes[: dist.get_rank()])
        return grad[start : start + ctx.sizes[dist.get_rank()]], None


def gather(rows: Tensor, equal: bool = False) -> Tensor:
    """Gathers the rows `(B, ...)` of every process as `(N, ...)`, in rank order and with gradient.

    Args:
        equal: all processes have the same number of rows. Otherwise they exchange the numbers first, which waits for the
            accelerator.
    """
    if world_size() == 1:
        return rows
    sizes = [len(rows)] * world_size() if equal else _row_counts(rows)
    return _Gather.apply(rows, sizes) if rows.requires_grad else torch.cat(_all_gather(rows, sizes))


def share_of(n: int) -> range:
    """The part of `range(n)` that this process works on: every W-th number, so that sorted work is spread evenly."""
    return range(process_index(), n, world_size())


def gather_shares(rows: Tensor) -> Tensor:
    """Puts the rows that each process computed for its `share_of(n)` back in order: `(n, ...)` on the CPU."""
    if world_size() == 1:
        return rows.cpu()
    rows = rows.to(communication_device())
    sizes = _row_counts(rows)
    whole = rows.new_empty(sum(sizes), *rows.shape[1:])
    for process, part in enumerate(_all_gather(rows, sizes)):
        whole[process :: len(sizes)] = part
    return whole.cpu()


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, on the CPU."""
    if world_size() == 1:
        return values.cpu()
    total = values.to(communication_device(), copy=True)
    dist.all_reduce(total)
    return total.cpu()
