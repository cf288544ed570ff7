"""The forward of a training step: embeddings of both towers and the logits' scale, from one call of the wrapped model.

Shapes: `B` images, `U` distinct texts, `T` tokens, `D` embedding size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .families import TEXT_INPUTS
from .loading import encode_images, encode_images_and_tokens, encode_texts, logit_scale, run_head


def add_embedding_forward(
    model: PreTrainedModel, parameters: Mapping[str, Mapping[str, nn.Parameter]] | None = None
) -> None:
    """Makes `model(..., chunk_size=n)` return all that a loss needs. Without `chunk_size` the forward is the stock one.

    All that a step needs of the model must come from one call of it: DDP, FSDP and DeepSpeed follow what goes through the
    wrapped model, and nothing else.

    Args:
        parameters: the parameters of the loss terms themselves, by the name of the term. They become a part of the model
            (`model.loss_terms`), and so of its optimizer, checkpoints and forward.

    Inputs of the call:
        pixel_values (`(B, 3, height, width)`, *optional*), input_ids, attention_mask (`(U, T)`, *optional*), or text_vectors
            (`(U, d)`): what the towers encode. A tower without inputs has no output.
        image_trunk, text_trunk (`(B, H)`, *optional*): pooled outputs of a frozen trunk, see `loading.run_trunk`.
        tokens (`bool`): whether tokens of the images are returned, too.
        chunk_size (`int`): rows encoded at a time; 0: all at once. Chunks leave only their embeddings behind. They are
            encoded once more, with the same random numbers, when their gradient is computed: the gradient is that of the
            whole batch, and the memory that of one chunk, for one more forward.

    Returns:
        `{"image_embeds": (B, D), "text_embeds": (U, D), "scale": (), "parameters": {}}`, embeddings unit-norm in float32,
        with gradient; with `tokens` also `image_tokens` `(B, P, H)`. Where there are pooled outputs of a trunk, their embeddings are in `projected`, by these names.

    References: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (arXiv
    2101.06983), whose gradient cache this is; here the recomputation is activation checkpointing of whole chunks.
    """
    remove_embedding_forward(model)
    own = {term: nn.ParameterDict(values) for term, values in (parameters or {}).items() if values}
    if own:
        model.loss_terms = nn.ModuleDict(own)
    # A bound method, so that a deep copy of the model calls its own forward.
    model.forward = MethodType(embedding_forward, model)


def remove_embedding_forward(model: PreTrainedModel) -> None:
    """Undoes `add_embedding_forward`: the model has its stock forward, and nothing that a loss term trained."""
    vars(model).pop("forward", None)
    if hasattr(model, "loss_terms"):
        del model.loss_terms


def term_parameters(model: PreTrainedModel) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters of the loss terms themselves, by the name of the term."""
    return {term: dict(values.items()) for term, values in getattr(model, "loss_terms", {}).items()}


def untuned_images(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with `add_embedding_forward` that encodes images, and no texts."""
    copied = copy.deepcopy(model, {id(model.text_model): nn.Module()})  # instead of a copy of its text tower
    return copied.requires_grad_(False).eval()


def embedding_forward(self, *args, chunk_size: int | None = None, tokens: bool = False, **inputs):
    """The forward that `add_embedding_forward` describes; `self` is the model."""
    if chunk_size is None:
        return type(self).forward(self, *args, **inputs)
    found: dict = {"scale": logit_scale(self), "parameters": term_parameters(self)}
    if "pixel_values" in inputs:
        encode = encode_images_and_tokens if tokens else encode_images
        images = _in_chunks(lambda x: encode(self, x), [inputs["pixel_values"]], chunk_size)
        if tokens:
            found["image_embeds"], found["image_tokens"] = images
        else:
            found["image_embeds"] = images
    texts = [inputs[name] for name in TEXT_INPUTS if name in inputs]
    if texts:
        found["text_embeds"] = _in_chunks(lambda *x: encode_texts(self, *x), texts, chunk_size)
    trunks = {"image": "vision", "text": "text"}
    projected = {
        f"{name}_embeds": run_head(self, tower, inputs[f"{name}_trunk"])
        for name, tower in trunks.items()
        if f"{name}_trunk" in inputs
    }
    return found | ({"projected": projected} if projected else {})


def _in_chunks(encode: Callable, inputs: list[Tensor], size: int) -> Tensor | tuple[Tensor, ...]:
    """What `encode` returns, a tensor or several, computed for `size` rows at a time."""
    rows = len(inputs[0])
    if not 0 < size < rows:
        return encode(*inputs)
    chunks = zip(*(x.split(size) for x in inputs), strict=True)
    if torch.is_grad_enabled():
        parts = [checkpoint(encode, *chunk, use_reentrant=False) for chunk in chunks]
    else:
        parts = [encode(*chunk) for chunk in chunks]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


@contextmanager
def quick_attention(model: PreTrainedModel, bf16: bool) -> Iterator[None]:
    """Uses eager attention where it trains faster: on a CPU in bfloat16.

    There the backward of fused attention takes five times as long as in float32, and most of a step.
    """
    usual = model.config._attn_implementation
    quick = "eager" if bf16 and model.device.type == "cpu" and usual == "sdpa" else usual
    if quick != usual:
        model.set_attn_implementation(quick)
    try:
        yield
    finally:
        if quick != usual:
            model.set_attn_implementation(usual)
