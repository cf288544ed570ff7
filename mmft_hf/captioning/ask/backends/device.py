"""The device of a model in this process: which one, its random numbers and its memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

# How CUDA, cuBLAS, MPS and the CPU report it; some do not raise torch.OutOfMemoryError.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def default_device() -> torch.device:
    """The accelerator of this process under any launcher, or the CPU."""
    if torch.cuda.is_available():
        # If a launcher shows each process only its own device, that device has number 0.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the random numbers inside the block; afterwards the global state is as if nothing had been drawn."""
    module = {"cuda": torch.cuda, "mps": torch.mps}.get(device.type)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        here = module.get_rng_state() if module else None
        state = torch.random.get_rng_state()
        try:
            # torch.manual_seed would also seed other devices, whose state is not saved here.
            torch.default_generator.manual_seed(seed)
            if module:
                module.manual_seed(seed)
            yield
        finally:
            torch.random.set_rng_state(state)
            if module:
                module.set_rng_state(here)


def empty_cache(device: torch.device) -> None:
    """Releases memory that failed calls and freed models still hold."""
    gc.collect()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch could have succeeded."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)
