"""How a text tower's token vectors become one vector per text, where that is not the tower's own pooled output.

Sentence encoders are trained on the mean of their tokens, or on one of them, while `BertModel.pooler_output` is a layer on top
of the first token that nobody trained. `text_pooling` in a model's `config.json` says what to take. It is there, and not in a
file of ours, because the configuration goes wherever the weights go: checkpoints, the Hub, a copy of the folder. Stock
loaders ignore it, and compute other text embeddings; image embeddings are the same.

Shapes: `B` texts, `T` tokens, `H` width of the tower.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..core.errors import UserError
from .families import POOLINGS

KEY = "text_pooling"


def text_pooling(config: PreTrainedConfig) -> str | None:
    """One of `POOLINGS`, or None for the tower's own pooled output.

    Raises:
        UserError: `config.json` names another one, or the model is not made of two towers.
    """
    pooling = getattr(config, KEY, None)
    if pooling is None:
        return None
    if pooling not in list(POOLINGS) or config.model_type != "vision-text-dual-encoder":
        raise UserError(
            f"config.json, {KEY}: expected one of {', '.join(POOLINGS)} in a vision-text-dual-encoder, or no such line; found "
            f"{pooling!r} in a {config.model_type}."
        )
    return pooling


def pool(hidden: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """One vector `(B, H)` per text of its token vectors `(B, T, H)`; a text without tokens gets zeros.

    Args:
        mask (`(B, T)`): 1 for tokens, 0 for padding on either side. None: no padding.
        pooling: one of `POOLINGS`.
    """
    mask = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask
    if pooling == "mean":
        weights = mask
    else:
        place = mask.cumsum(dim=1) * mask  # 1, 2, …, n for the tokens
        weights = place == (1 if pooling == "first" else place.amax(dim=1, keepdim=True))
    weights = (weights * mask).to(hidden.dtype)
    return torch.einsum("bt,bth->bh", weights, hidden) / weights.sum(dim=1, keepdim=True).clamp(min=1)


def pool_outputs(model: PreTrainedModel) -> None:
    """Makes each tower's `pooler_output` one vector per input, for every way to call the model. Idempotent.

    That of the text tower is what `config.text_pooling` says. Some convolutional image towers (ResNet, RegNet) give a picture
    of one pixel, which is made a vector.
    """
    if model.config.model_type != "vision-text-dual-encoder":
        return
    if not getattr(model.vision_model, "_mmft_flat", False):
        model.vision_model._mmft_flat = True
        model.vision_model.register_forward_hook(_flat)
    pooling = text_pooling(model.config)
    if pooling and getattr(model.text_model, "_mmft_pooling", None) != pooling:
        if hasattr(model.text_model, "_mmft_pooling"):
            raise UserError(f"model: its {KEY} was changed after it was used. Save it, and load it again.")
        model.text_model._mmft_pooling = pooling
        model.text_model.register_forward_hook(partial(_pooled, pooling), with_kwargs=True)


def _flat(tower, args: tuple, output):
    pooled = getattr(output, "pooler_output", None)
    if pooled is not None and pooled.ndim > 2:
        output.pooler_output = pooled.flatten(1)
    return output


def _pooled(pooling: str, tower, args: tuple, kwargs: dict, output) -> BaseModelOutputWithPooling:
    hidden = output.last_hidden_state
    pooled = pool(hidden, kwargs.get("attention_mask"), pooling)
    return BaseModelOutputWithPooling(hidden, pooled, output.get("hidden_states"), output.get("attentions"))
