"""Several processes on one grid, each with an accelerator of its own. They share only the folder of results.

Work that two of them must not do at once is under a lock of `filelock`, which the system releases when its process dies.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ...core.errors import UserError

# The variables by which torchrun, accelerate and MPI launchers tell a process about the others.
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
LOCAL_RANKS = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "LOCAL_WORLD_SIZE")
OTHERS = ("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "GROUP_WORLD_SIZE")
PREFIXES = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "ROLE_", "PARALLELISM_CONFIG_")
KEPT = ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE")  # the device is the process' own matter

_number, _count = 0, 1


def number_of_process() -> int:
    """The rank of this process, as `work_alone` found it; 0 without a launcher."""
    return _number


def count_of_processes() -> int:
    """The number of processes that a launcher started, as `work_alone` found it; 1 without a launcher."""
    return _count


def work_alone(environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes the processes of a launcher independent of each other, each with one GPU if there are any.

    Call it before torch or accelerate read the environment. The process takes the GPU at its local rank among those of
    `CUDA_VISIBLE_DEVICES`, or among all; if there are more processes than GPUs, several share one.

    Raises:
        UserError: accelerate's launcher was asked for several processes and started one.
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
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


class Claims:
    """Locks of a folder, one file each.

    Args:
        folder: created if it is missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def alone(self, name: str) -> AbstractContextManager:
        """A block that waits until no other process is in a block with this name."""
        return FileLock(self._path(name))

    @contextmanager
    def take(self, name: str) -> Iterator[bool]:
        """Yields whether this process may do the work of this name: False while another one does."""
        try:
            lock = FileLock(self._path(name)).acquire(blocking=False)
        except Timeout:
            yield False
            return
        with lock:
            yield True

    def _path(self, name: str) -> str:
        return str(self.folder / f"{re.sub('[^A-Za-z0-9.+_-]', '_', name)}.lock")
