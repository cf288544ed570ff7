"""What a model's files must hold before anything is built from them: sizes in bounds, finite numbers.

A `config.json` or a processor's file of a few bytes could otherwise ask for all memory or for days of work.
"""

from __future__ import annotations

import math
from numbers import Real

from PIL import Image
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..core.arguments import Range
from ..core.errors import UserError
from ..core.schema import shown

LARGEST_SIDE = 4096  # pixels of what a model sees; those of today see at most about 1,000
SIZES = {
    "num_hidden_layers": Range(1, 1000),
    "num_attention_heads": Range(1, 10_000),
    "hidden_size": Range(1, 100_000),
    "intermediate_size": Range(1, 1_000_000),
    "projection_dim": Range(1, 100_000),
    "vocab_size": Range(1, 10_000_000),
    "max_position_embeddings": Range(1, 1_000_000),
    "image_size": Range(1, LARGEST_SIDE),
    "patch_size": Range(1, LARGEST_SIDE),
    "num_channels": Range(1, 100),
}


def check_config(config: PreTrainedConfig, name: str) -> None:
    """Raises `UserError` if a size in a `config.json` is one that no model has."""
    towers = ((f"{name}.", getattr(config, name, None)) for name in ("text_config", "vision_config"))
    for place, part in (("", config), *towers):
        for key, allowed in SIZES.items():
            value = getattr(part, key, None)
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if one is not None and (type(one) is not int or one not in allowed):
                    raise UserError(
                        f"model {name!r}, config.json, {place}{key}: expected {allowed}, found {shown(one)}."
                    )


def check_weights(model: PreTrainedModel, name: str) -> None:
    """Raises `UserError` if a weight is not finite: every answer would be the same class."""
    for key, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"model {name!r}, {key}: expected finite weights, found others. Copy the model again.")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises `UserError` if the limit of a tokenizer leaves no room for a word between its begin and end tokens."""
    limit = tokenizer.model_max_length
    if not isinstance(limit, Real) or isinstance(limit, bool) or not limit >= 3:
        raise UserError(
            f"model {name!r}, tokenizer, model_max_length: expected a number from 3 on, found {shown(limit)}."
        )


def check_image_processor(processor: BaseImageProcessor, name: str) -> None:
    """Raises `UserError` if an image processor resizes to no size or to a huge one, or its numbers are no numbers."""

    def wrong(key: str, expected: str, found) -> UserError:
        return UserError(f"model {name!r}, image processor, {key}: expected {expected}, found {shown(found)}.")

    for key in ("size", "crop_size"):
        size = getattr(processor, key, None)
        for side, pixels in dict(size or {}).items():
            if pixels is not None and (type(pixels) is not int or not 1 <= pixels <= LARGEST_SIDE):
                raise wrong(f"{key}.{side}", f"1 to {LARGEST_SIDE:,} pixels", pixels)
    for key in ("image_mean", "image_std", "rescale_factor"):
        value = getattr(processor, key, None)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            finite = isinstance(number, Real) and not isinstance(number, bool) and math.isfinite(number)
            if number is not None and not (finite and (key == "image_mean" or number > 0)):
                raise wrong(key, "finite numbers" if key == "image_mean" else "finite numbers above 0", number)
    try:
        processor([Image.new("RGB", (5, 3))])
    except Exception as error:  # for example a filter or a number of channels that does not exist
        raise UserError(
            f"model {name!r}, image processor: expected one that prepares a picture, found one that fails at a first picture "
            f"({' '.join(str(error).split())[:200]})."
        ) from error
