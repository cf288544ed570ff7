"""Captions that are longer than what a text tower reads: cut, read in parts (`windows`), or read by a stretched tower (`stretch`)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from ..core.errors import UserError
from ..data.sentences import parts_that_fit
from ..data.texts import beginning
from .adapted_processor import AdaptedProcessor
from .collator import tokenize
from .families import FAMILIES, is_padded

KEPT_POSITIONS = 20  # well trained ones, which short texts fill
FACTOR = 4
STRETCHED = 154  # positions, from which on a text tower counts as stretched: twice those of CLIP
BLOCK = 256


class Windows:
    """Splits a caption into parts that a text tower reads whole, each after the class prompt.

    Args:
        processor: that of the model.

    Raises:
        UserError: the model reads vectors of a caption encoder, which has whole captions.
    """

    def __init__(self, processor: ProcessorMixin):
        if isinstance(processor, AdaptedProcessor):
            raise UserError(
                "--long_captions: expected cut with a caption encoder, which reads whole captions, found windows. Leave it out."
            )
        self.tokenizer, self.lower = processor.tokenizer, is_padded(processor)

    def __call__(self, prompt: str, caption: str) -> tuple[str, ...]:
        """Parts of the caption; the caption itself if the text tower reads all of it after the prompt."""
        return _parts(self, prompt, caption)

    def fits(self, text: str) -> bool:
        """Whether the text tower reads all of a text."""
        limit = self.tokenizer.model_max_length
        return self._count(beginning(text, limit, self._count)) <= limit

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text.lower() if self.lower else text, verbose=False)["input_ids"])


@lru_cache(2**16)  # a row is read in every epoch
def _parts(windows: Windows, prompt: str, caption: str) -> tuple[str, ...]:
    return tuple(parts_that_fit(caption, lambda part: windows.fits(f"{prompt} {part}")))


def windows_for(processor: ProcessorMixin, long_captions: str) -> Windows | None:
    """What splits the captions with `--long_captions`; None with `cut`, and with `stretch`, which is a matter of the model."""
    return Windows(processor) if long_captions == "windows" else None


def share_cut(processor: ProcessorMixin, texts: Sequence[str]) -> float:
    """Share of texts, from 0 to 1, whose end the text tower does not read; 0 for a caption encoder, which reads whole ones."""
    if isinstance(processor, AdaptedProcessor):
        return 0.0
    cut = sum(int(tokenize(processor, texts[i : i + BLOCK])[1].sum()) for i in range(0, len(texts), BLOCK))
    return cut / max(len(texts), 1)


@torch.no_grad()
def stretched(model: PreTrainedModel, processor: ProcessorMixin) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A copy of a model whose text tower reads longer texts, and its processor: 248 tokens instead of 77.

    Texts of up to 20 tokens have the embedding that they had. The copy is a stock model of the same class and shares all other
    weights with `model`, which is not changed.

    Raises:
        UserError: the positions are not learned ones of a causal text tower, or the model is stretched already.

    References: Zhang et al. 2024, "Long-CLIP" (arXiv 2403.15378), section 3.2, without its training.
    """
    family, found = FAMILIES[model.config.model_type], model.config.text_config
    if not family.causal:
        known = ", ".join(f.title for f in FAMILIES.values() if f.causal)
        raise UserError(
            f"--long_captions: expected stretch with learned positions of {known}, found {type(model).__name__}, whose text tower "
            f"cannot be stretched. {'Leave it out' if family.texts == 'vectors' else 'Type --long_captions windows'}."
        )
    limit = found.max_position_embeddings
    if not KEPT_POSITIONS + 1 < limit < STRETCHED:
        raise UserError(
            f"--long_captions: expected stretch with a text tower of about 77 tokens, found one of {limit}. Leave it out, or type "
            "--long_captions windows."
        )
    copied = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    processor = copy.deepcopy(processor)
    embeddings = copied.text_model.embeddings
    before = embeddings.position_embedding.weight
    longer = stretched_positions(before)
    table = nn.Embedding.from_pretrained(longer, freeze=not before.requires_grad)
    embeddings.position_embedding = table
    embeddings.position_ids = torch.arange(len(longer), device=longer.device).expand((1, -1))
    copied.config.text_config.max_position_embeddings = len(longer)
    processor.tokenizer.model_max_length = len(longer)
    return copied, processor


def check_stretched(model: PreTrainedModel) -> None:
    """Raises `UserError` for a model that is to read long texts and was not stretched."""
    limit = getattr(model.config.text_config, "max_position_embeddings", 0)
    if limit < STRETCHED:
        raise UserError(
            f"long_captions: expected a model that was stretched, found one of {limit} tokens. Stretch it first: from "
            "mmft_hf.model.long_captions import stretched; model, processor = stretched(model, processor)."
        )


def stretched_positions(positions: Tensor) -> Tensor:
    """The `(4 L - 60, H)` positions of a stretched text tower, from its `(L, H)` ones.

    The first 20 stay. Between each later one and the next there are three more, by linear interpolation; behind the last one the
    last difference goes on.
    """
    later = positions[KEPT_POSITIONS:]
    steps = torch.cat([later[1:], 2 * later[-1:] - later[-2:-1]]) - later
    shares = torch.arange(FACTOR, device=positions.device, dtype=positions.dtype) / FACTOR
    between = later[:, None] + shares[None, :, None] * steps[:, None]
    return torch.cat([positions[:KEPT_POSITIONS], between.flatten(0, 1)])
