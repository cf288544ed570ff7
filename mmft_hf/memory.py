"""How much memory a training step takes, before the first one.

Shapes: `B` images of a process' batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, ProcessorMixin

from .collator import input_size, tokenize
from .modeling import encode_images, encode_texts

# Rows of the trial. With two, what a batch has once is told from what each row has.
ROWS = 2


@dataclass
class MemoryEstimate:
    """Bytes of a training step in one process."""

    weights: int
    gradients_and_optimizer: int
    activations_per_image: int
    pixels_per_image: int

    def total(self, batch: int, chunk: int | None = None) -> int:
        """Bytes at B images, `chunk` of them encoded at a time."""
        at_once = min(batch, chunk or batch)
        fixed = self.weights + self.gradients_and_optimizer
        return fixed + batch * self.pixels_per_image + at_once * self.activations_per_image

    def chunk_that_fits(self, batch: int, available: int) -> int | None:
        """The largest power of two of images at a time with which B images fit; None if not even one does."""
        chunk = 1 << (batch - 1).bit_length()
        while chunk and self.total(batch, chunk) > available:
            chunk //= 2
        return chunk or None


def estimate_memory(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    texts: Sequence[str],
    autocast: AbstractContextManager | None = None,
) -> MemoryEstimate:
    """Measures what autograd keeps of one small forward, and adds weights, gradients and AdamW's two moments.

    Args:
        texts: some of the training texts; the longest of them stands for all, since it decides how a batch is padded.
        autocast: context of the training's precision.

    What kernels need for themselves, and what PyTorch's allocator wastes, is not in it.
    """
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    width, height = input_size(processor)
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # A row's share is what grows with the rows: its first dimension is theirs.
        if storage.data_ptr() not in own and tensor.ndim and tensor.shape[0] % ROWS == 0:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens, _ = tokenize(processor, [max(texts, key=len)] * ROWS)
    was_training = model.training
    model.train()
    held = []  # so that no storage takes the place of another meanwhile
    with (
        torch.random.fork_rng(),
        torch.autograd.graph.saved_tensors_hooks(count, lambda x: x),
        autocast or nullcontext(),
    ):
        held.append(encode_images(model, torch.zeros(ROWS, 3, height, width, device=model.device)))
        held.append(encode_texts(model, **{k: v.to(model.device) for k, v in tokens.items()}))
    model.train(was_training)
    return MemoryEstimate(
        weights=sum(p.numel() * p.element_size() for p in parameters),
        gradients_and_optimizer=3 * 4 * trained,
        activations_per_image=sum(kept.values()) // ROWS,
        pixels_per_image=4 * 3 * width * height,
    )


def available_memory(device: torch.device) -> int | None:
    """Bytes of an accelerator that are free or ours; None where nobody can tell."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)
