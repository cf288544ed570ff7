"""Several processes at one grid, each alone with one accelerator: they share nothing but the folder of the results.

What they must not do at the same time is under a lock of `filelock`, which the system gives back when its process dies.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ...core.errors import UserError

# What torchrun, accelerate and MPI launchers tell a process of the others; more of it begins with PREFIXES.
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "LOCAL_WORLD_SIZE")
OTHERS = ("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "GROUP_WORLD_SIZE")
PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "ROLE_", "PARALLELISM_CONFIG_")
KEPT = ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE")  # where to compute is no matter of the others

_number, _count = 0, 1


def number_of_process() -> int:
    """The number that `work_alone` found; 0 without a launcher."""
    return _number


def count_of_processes() -> int:
    """How many a launcher started, as `work_alone` found; 1 without a launcher."""
    return _count


def work_alone(environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes the processes of a launcher forget each other: each is alone, with one GPU where there are any.

    To be called before torch or accelerate look at the environment. The GPU is the one at the process' number on its
    machine among those of `CUDA_VISIBLE_DEVICES`, or all; if there are more processes than GPUs, several share one.

    Raises:
        UserError: accelerate's launcher started one process where it was asked for several.
    """
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= environment.keys() and "LOCAL_RANK" not in environment:
        raise UserError(
            "accelerate launch was asked for several processes but started one, as it does with --cpu, or without --multi_gpu "
            "and a second GPU. Type torchrun --nproc_per_node N recipes/benchmark.py …, or unset MASTER_ADDR for one."
        )
    global _number, _count
    _number, local, count = (
        next((int(environment[name]) for name in names if name in environment), 0)
        for names in (RANKS, LOCAL_RANKS, SIZES)
    )
    _count = max(1, count)
    for name in list(environment):
        if name in (*RANKS, *LOCAL_RANKS, *SIZES, *OTHERS) or (name.startswith(PREFIXES) and name not in KEPT):
            del environment[name]
    devices = _devices(environment)
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[local % len(devices)]


def _devices(environment: MutableMapping[str, str]) -> list[str]:
    """GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


class Claims:
    """Locks of a folder, one file each.

    Args:
        folder: made if it is missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Waits until no other process is in a block of this name."""
        with FileLock(self._path(name)):
            yield

    @contextmanager
    def take(self, name: str) -> Iterator[bool]:
        """Whether the block is this process' own; it is not while another is in it."""
        lock = FileLock(self._path(name))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _path(self, name: str) -> str:
        return str(self.folder / f"{re.sub('[^A-Za-z0-9.+_-]', '_', name)}.lock")
