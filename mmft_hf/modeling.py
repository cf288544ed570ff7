"""Loading a CLIP-style dual encoder, and encoding with it.

Shapes: `B` images or texts, `T` tokens, `D` embedding size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerBase,
)

from .builtin import builtin
from .errors import UserError


def load_model(name_or_path: str = "builtin/tiny-clip", revision: str | None = None) -> tuple[CLIPModel, CLIPProcessor]:
    """Loads a dual encoder and its processor, in float32 whatever precision it was stored in.

    Half-precision weights cannot be fine-tuned: AdamW's steps vanish in rounding. Autocast (`--bf16 true`) is the way
    to speed. Pictures are always prepared by the Pillow backend, so that an installed torchvision changes no result.

    Args:
        name_or_path: Hub id, local folder, or `builtin/tiny-clip`.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: not found, or not a CLIP-style dual encoder.
    """
    path = builtin(name_or_path)
    try:
        config = AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model {name_or_path!r}: expected a Hub id or a folder with a config.json of a CLIPModel; it could not be "
            f"loaded ({str(error).strip().splitlines()[0]}). Type for example --model_name_or_path "
            "openai/clip-vit-base-patch32."
        ) from error
    if config.model_type != "clip":
        raise UserError(
            f"model {name_or_path!r}: expected a CLIP-style dual encoder (model_type 'clip'), found model_type "
            f"{config.model_type!r}. Type for example --model_name_or_path openai/clip-vit-base-patch32."
        )
    try:
        # Only safetensors: nothing is ever unpickled from a path that a user gives.
        model, found = CLIPModel.from_pretrained(
            path, revision=revision, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        image_processor = load_image_processor(path, revision)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model {name_or_path!r}: expected model.safetensors, a tokenizer and a preprocessor_config.json beside "
            f"config.json; {str(error).strip().splitlines()[0]}"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"model {name_or_path!r}: expected all weights of a CLIPModel, found none of {missing[0]} and {len(missing) - 1} "
            "others. A checkpoint of a lora run holds only what was trained; type the run's --output_dir."
        )
    # Without its vocabulary file a tokenizer still loads, with next to no words, and everything would run on.
    if not 0.9 * config.text_config.vocab_size <= len(tokenizer) <= config.text_config.vocab_size:
        raise UserError(
            f"model {name_or_path!r}: expected a tokenizer of {config.text_config.vocab_size} tokens, as config.json says, "
            f"found {len(tokenizer)}. Is its tokenizer.json (or vocab.json and merges.txt) missing, or another model's?"
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.text_config.max_position_embeddings)
    return model, CLIPProcessor(image_processor, tokenizer)


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a dual encoder, without its weights; its `model_max_length` is the text tower's limit.

    Raises:
        UserError: not found.
    """
    path = builtin(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        limit = AutoConfig.from_pretrained(path, revision=revision).text_config.max_position_embeddings
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"model {name_or_path!r}: expected the tokenizer of a CLIPModel; it could not be loaded "
            f"({str(error).strip().splitlines()[0]}). Type --model_name_or_path NAME."
        ) from error
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return tokenizer


def load_image_processor(path: str, revision: str | None = None, **hub) -> BaseImageProcessor:
    """What resizes, crops and normalises pictures, always through Pillow, whatever else is installed.

    Args:
        hub: `token`, `cache_dir`, `local_files_only`, as in transformers.

    Raises:
        OSError: not found.
    """
    pillow = {"backend": "pil"} if Version(transformers.__version__) >= Version("5.4") else {"use_fast": False}
    return AutoImageProcessor.from_pretrained(path, revision=revision, **pillow, **hub)


def default_device() -> torch.device:
    """The accelerator, where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def logit_scale(model: CLIPModel) -> Tensor:
    """Scalar that multiplies cosines, with its gradient."""
    return model.logit_scale.exp()


def encode_images(model: CLIPModel, pixel_values: Tensor) -> Tensor:
    """Unit-norm image embeddings `(B, D)` in float32 of pixels `(B, 3, height, width)`."""
    return F.normalize(model.get_image_features(pixel_values=pixel_values).pooler_output.float(), dim=-1)


def encode_texts(model: CLIPModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Unit-norm text embeddings `(B, D)` in float32 of token ids and mask, both `(B, T)`."""
    features = model.get_text_features(input_ids=input_ids, attention_mask=attention_mask)
    return F.normalize(features.pooler_output.float(), dim=-1)
