"""What a model in this process needs to know of its device: which one, its random numbers, its memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

# CUDA, cuBLAS, MPS and the CPU each have their own words; some come without the class torch has for it.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")


def default_device() -> torch.device:
    """The accelerator of this process under any launcher, else the CPU."""
    if torch.cuda.is_available():
        # Where a launcher shows each process its own device alone, that device has number 0.
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed` within; after it, those of everybody else go on as if nothing had been drawn."""
    module = {"cuda": torch.cuda, "mps": torch.mps}.get(device.type)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        here = module.get_rng_state() if module else None
        state = torch.random.get_rng_state()
        try:
            # torch.manual_seed would also seed the other devices, whose state is not kept here.
            torch.default_generator.manual_seed(seed)
            if module:
                module.manual_seed(seed)
            yield
        finally:
            torch.random.set_rng_state(state)
            if module:
                module.set_rng_state(here)


def empty_cache(device: torch.device) -> None:
    """Gives back what failed calls and freed models still hold."""
    gc.collect()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch could have gone well."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY)
