"""Estimates the memory of a training step before the first one, and frees memory after the last.

Shapes: `B` images of a process' batch.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, ProcessorMixin

from .collator import input_size, tokenize
from .loading import encode_images, encode_texts
from .towers import frozen_batch_norms

# Rows of the two trials: the part that both keep is needed once per batch, the difference once per row.
FEW, MORE = 1, 3


@dataclass
class MemoryEstimate:
    """Bytes of a training step in one process. Under autocast `weights` includes the copies in half precision; `average` is
    the average of the trained weights, if there is one."""

    weights: int
    gradients_and_optimizer: int
    activations_per_image: int
    pixels_per_image: int
    average: int = 0

    def total(self, batch: int, chunk: int | None = None) -> int:
        """Bytes for B images, `chunk` of them encoded at a time."""
        at_once = min(batch, chunk or batch)
        fixed = self.weights + self.gradients_and_optimizer + self.average
        return fixed + batch * self.pixels_per_image + at_once * self.activations_per_image

    def chunk_that_fits(self, batch: int, available: int) -> int | None:
        """The largest power of two as a chunk size with which B images fit; None if not even 1 fits."""
        chunk = 1 << (batch - 1).bit_length()
        while chunk and self.total(batch, chunk) > available:
            chunk //= 2
        return chunk or None


def estimate_memory(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    texts: Sequence[str],
    autocast: AbstractContextManager | None = None,
    averaging: bool = False,
) -> MemoryEstimate:
    """Measures what autograd keeps of a small forward, and adds weights, gradients and AdamW's two moments.

    Args:
        texts: some of the training texts; the longest stands for all, since it decides how a batch is padded.
        autocast: context of the training's precision.
        averaging: whether an average of the trained weights is kept.

    Workspace of kernels and fragmentation in PyTorch's allocator are not included.
    """
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    width, height = input_size(processor)
    text = max(texts, key=len)
    was_training = model.training
    model.train()
    frozen_batch_norms(model)  # otherwise their statistics would include the trial's pictures
    devices = (
        [model.device] if model.device.type == "cuda" else []
    )  # otherwise every GPU of the machine would be started
    with torch.random.fork_rng(devices):
        few, more = (_kept(model, processor, text, rows, autocast or nullcontext()) for rows in (FEW, MORE))
    model.train(was_training)
    per_image = max(0, more - few) // (MORE - FEW)
    return MemoryEstimate(
        weights=sum(p.numel() * p.element_size() for p in parameters) + max(0, few - FEW * per_image),
        gradients_and_optimizer=3 * 4 * trained,
        activations_per_image=per_image,
        pixels_per_image=4 * 3 * width * height,
        average=4 * trained * averaging,
    )


def _kept(model: PreTrainedModel, processor: ProcessorMixin, text: str, rows: int, autocast) -> int:
    """Bytes that autograd keeps of a forward of `rows` images and texts, without the weights themselves."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens, _ = tokenize(processor, [text] * rows)
    width, height = input_size(processor)
    held = []  # so that no storage is reused for another tensor
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x), autocast:
        held.append(encode_images(model, torch.zeros(rows, 3, height, width, device=model.device)))
        held.append(encode_texts(model, *(value.to(model.device) for value in tokens.values())))
    return sum(kept.values())


def available_memory(device: torch.device) -> int | None:
    """Bytes of an accelerator that are free or already ours; None if unknown."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def give_memory_back() -> None:
    """Frees reference cycles, such as a finished Trainer, and returns free memory to the system.

    After many trainings in one process, glibc would otherwise keep gigabytes of fragmented memory.
    """
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)
