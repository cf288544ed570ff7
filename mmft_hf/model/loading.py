"""Loads a dual encoder (CLIP or another one of `families`) and encodes with it.

Shapes: `B` images or texts, `T` tokens, `D` embedding size.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..core.builtin import builtin
from ..core.errors import UserError
from . import adapted_clip  # noqa: F401 - registers it with the Auto classes
from .adapted_processor import AdaptedProcessor, TextTrunk
from .collator import input_size, pixels_of
from .families import FAMILIES, POOLINGS, REFUSED, token_limit, unused_parameters
from .opening import EXAMPLES, first_line, open_config
from .pooling import pool_outputs, text_pooling
from .sanity import check_config, check_image_processor, check_tokenizer, check_weights
from .sentence_encoders import read_sentence_encoder
from .weights import find_weights, say_once

# A large step could take a temperature below zero, which would reverse all logits. It is clamped to this value, a scale of
# 1,000: ten times the highest scale that CLIP was trained with.
LOWEST_TEMPERATURE = 1e-3
OWN_PROCESSOR = (
    "Write another one into its folder, in place of preprocessor_config.json and processor_config.json: transformers."
    'CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}, image_mean=[…], '
    "image_std=[…]).save_pretrained(FOLDER)."
)


def load_model(
    name_or_path: str | Path = "builtin/tiny-clip",
    revision: str | None = None,
    allow_pickle: bool = False,
    flag: str = "--model_name_or_path",
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Loads a dual encoder and its processor, in float32 whatever precision it is stored in.

    Half-precision weights cannot be fine-tuned: AdamW's steps vanish in rounding. For speed, use autocast (`--bf16 true`).
    Pictures are always prepared by the Pillow backend, so that an installed torchvision changes no result. Parameters that
    do not affect the embeddings are frozen, since they would get no gradient.

    Args:
        name_or_path: Hub id, local folder, `builtin/tiny-clip` or `builtin/photo`.
        revision: branch, tag or commit on the Hub.
        allow_pickle: if there are no safetensors, neither there nor in the Hub's own conversion, read a pickle, with
            `weights_only=True`. `model.mmft_weights` (`weights.Weights`) tells where the weights are from.
        flag: the setting that names the model, for messages.

    Raises:
        UserError: it is not found, is none of `families.FAMILIES`, or has only a pickle, which is not allowed.
    """
    name_or_path = str(name_or_path)
    path = builtin(name_or_path)
    config = open_config(name_or_path, flag, revision)
    family = FAMILIES.get(config.model_type)
    if family is None:
        reason = f": {REFUSED[config.model_type]}" if config.model_type in REFUSED else ""
        raise UserError(
            f"model {name_or_path!r}: expected a CLIP-style dual encoder (model_type {', '.join(FAMILIES)}), found model_type "
            f"{config.model_type!r}{reason}. For example, type {flag} {EXAMPLES[flag]}."
        )
    check_config(config, name_or_path)
    _check_pooling(config, name_or_path)
    try:
        weights = find_weights(path, revision, allow_pickle, getattr(config, "transformers_weights", None))
        options = {"dtype": torch.float32, "output_loading_info": True}
        model, found = weights.from_pretrained(AutoModel, path, config, **options)
        hub = {"revision": revision, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(path, **hub) if family.texts == "tokens" else None
        image_processor = load_image_processor(path, revision)
    except UserError:
        raise
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model {name_or_path!r}: expected model.safetensors, a tokenizer and a preprocessor_config.json next to "
            f"config.json; {first_line(error)}"
        ) from error
    except Exception as error:  # a missing package, or content that one of many constructors cannot use
        raise UserError(
            f"model {name_or_path!r}: expected a model that transformers {transformers.__version__} opens here; "
            f"{' '.join(str(error).split())[:500] or type(error).__name__} If that is about a tokenizer: pip install "
            "sentencepiece protobuf."
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"model {name_or_path!r}: expected all weights of a {type(model).__name__}, found none of {missing[0]} and "
            f"{len(missing) - 1} others. A checkpoint of a lora run holds only what was trained; type the run's --output_dir."
        )
    if tokenizer is None:
        trunk = TextTrunk(known_as=config.text_trunk, model=name_or_path, revision=revision, allow_pickle=allow_pickle)
        processor = AdaptedProcessor(image_processor, trunk)
    else:
        # Without its vocabulary file a tokenizer still loads, with hardly any words, and everything would run.
        vocabulary = config.text_config.vocab_size
        if not 0.9 * vocabulary <= len(tokenizer) <= vocabulary:
            raise UserError(
                f"model {name_or_path!r}: expected a tokenizer of {vocabulary} tokens, as config.json says, found "
                f"{len(tokenizer)}. Is its tokenizer.json (or vocab.json and merges.txt) missing, or another model's?"
            )
        check_tokenizer(tokenizer, name_or_path)
        tokenizer.model_max_length = min(tokenizer.model_max_length, token_limit(config))
        processor = getattr(transformers, family.processor)(image_processor, tokenizer)
    check_weights(model, name_or_path)
    _check_towers(name_or_path, model, processor)
    freeze_unused(model)
    return model, processor


def _check_pooling(config: PreTrainedConfig, name: str) -> None:
    """Raises `UserError` for an unknown `text_pooling`. Says so if a sentence encoder is pooled in a way it was not trained for."""
    if text_pooling(config) or config.model_type != "vision-text-dual-encoder":
        return
    tower = str(config.text_config._name_or_path or "")  # what the two towers were put together from
    encoder = read_sentence_encoder(tower, offline=True) if tower else None
    if encoder or tower.startswith("sentence-transformers/"):
        pooling = encoder.pooling if encoder and encoder.pooling else "mean"
        say_once(
            f"Note: {name}: its text tower is the sentence encoder {tower}, but config.json has no text_pooling, so that the "
            f'tower\'s own pooled output is used, which it was perhaps not trained for. Add a line "text_pooling": "{pooling}".'
        )


@torch.no_grad()
def _check_towers(name: str, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Raises `UserError` if pictures have no fixed size, or a tower does not give one vector per picture or text."""
    size = input_size(processor)
    if size is None:
        raise UserError(
            f"model {name!r}: expected an image processor that gives all pictures one size, found size "
            f"{dict(processor.image_processor.size)} without a crop. Write size {{height, width}}, or do_center_crop with a "
            "crop_size, into its preprocessor_config.json."
        )
    given = {tuple(pixels_of(processor.image_processor, Image.new("RGB", shape)).shape) for shape in ((7, 5), (5, 7))}
    if given != {(3, size[1], size[0])}:
        found = " and ".join(" x ".join(map(str, one)) for one in sorted(given))
        raise UserError(
            f"model {name!r}: expected an image processor that gives pictures of 3 x {size[1]} x {size[0]}, as its size says, found "
            f"{found}. Copy the model's preprocessor_config.json or processor_config.json again."
        )
    if model.config.model_type != "vision-text-dual-encoder":
        side = getattr(model.config.vision_config, "image_size", None)
        if side not in (None, size[0], list(size), tuple(size)) or size[0] != size[1]:  # some towers take any size
            try:
                encode_images(model, torch.zeros(1, 3, size[1], size[0]))
            except (RuntimeError, ValueError) as error:
                raise UserError(
                    f"model {name!r}: expected an image processor that gives what the image tower takes, pictures of {side} pixels, "
                    f"found one that gives {size[0]} x {size[1]}. Copy the model's preprocessor_config.json or "
                    "processor_config.json again."
                ) from error
        return
    # Its towers can be any models at all.
    try:
        tokens = processor.tokenizer(["a"], return_tensors="pt")
        encode_images(model, torch.zeros(1, 3, size[1], size[0]))
        encode_texts(model, tokens["input_ids"], tokens["attention_mask"])
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        towers = f"{type(model.vision_model).__name__} and {type(model.text_model).__name__}"
        other = [pooling for pooling in POOLINGS if pooling != "mean"]
        raise UserError(
            f"model {name!r}: expected two towers with a pooled output each, such as ViTModel and BertModel, found {towers}, "
            f"which fail at a first picture and text ({first_line(error)}). If the text tower has none, add a line "
            f'"text_pooling": "mean" to config.json (or {", ".join(other)}).'
        ) from error


def freeze_unused(model: PreTrainedModel) -> None:
    """Freezes parameters without effect on embeddings and scale: they get no gradient, and DDP would wait for one forever."""
    for name, parameter in model.named_parameters():
        if name.startswith(unused_parameters(model.config)):
            parameter.requires_grad_(False)


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a dual encoder without the weights; `model_max_length` is the text tower's limit.

    Raises:
        UserError: not found.
    """
    path = builtin(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        limit = token_limit(AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False))
    except Exception as error:  # as in `load_model`
        raise UserError(
            f"model {name_or_path!r}: expected the tokenizer of a dual encoder; it could not be loaded "
            f"({first_line(error)}). Type --model_name_or_path NAME."
        ) from error
    check_tokenizer(tokenizer, name_or_path)
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return tokenizer


def load_image_processor(path: str, revision: str | None = None, **hub) -> BaseImageProcessor:
    """Loads the image processor (resize, crop, normalize) of a model, always with the Pillow backend.

    Args:
        hub: `token`, `cache_dir`, `local_files_only`, as in transformers.

    Raises:
        OSError: not found.
        UserError: it resizes to a size that no model sees, or holds numbers that are not finite.
    """
    pillow = {"backend": "pil"} if Version(transformers.__version__) >= Version("5.4") else {"use_fast": False}
    try:
        processor, found = AutoImageProcessor.from_pretrained(path, revision=revision, **pillow, **hub), ""
    except TypeError as error:  # settings that its class cannot use
        processor, found = None, f"settings that it does not take ({first_line(error)})"
    if not hasattr(processor, "size"):
        raise UserError(
            f"model {path!r}, image processor: expected one of transformers' own, with a size, found "
            f"{found or f'a {type(processor).__name__}'}. {OWN_PROCESSOR}"
        )
    check_image_processor(processor, path)
    return processor


def is_dual_encoder(model) -> bool:
    """Whether a model belongs to one of `families.FAMILIES`."""
    return getattr(getattr(model, "config", None), "model_type", None) in FAMILIES


def scale_parameter(model: PreTrainedModel) -> nn.Parameter:
    """The parameter behind `logit_scale`. It is always trained, in all modes of the towers."""
    return getattr(model, FAMILIES[model.config.model_type].scale)


def logit_scale(model: PreTrainedModel) -> Tensor:
    """The scalar that multiplies cosines, with its gradient: `exp(logit_scale)`, or `1 / temperature` for ALIGN."""
    parameter = scale_parameter(model)
    if FAMILIES[model.config.model_type].scale == "temperature":
        with torch.no_grad():
            parameter.clamp_(min=LOWEST_TEMPERATURE)  # in place: the saved model must compute the same
        return 1 / parameter.reshape(())
    return parameter.exp().reshape(())


def embedding_size(model: PreTrainedModel) -> int:
    """Size `D` of the embedding space that images and texts share."""
    config = model.config
    return config.text_config.projection_size if config.model_type == "siglip" else config.projection_dim


def encode_images(model: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """Unit-norm image embeddings `(B, D)` in float32 of pixels `(B, 3, height, width)`."""
    pool_outputs(model)
    return F.normalize(model.get_image_features(pixel_values=pixel_values).pooler_output.float(), dim=-1)


def encode_images_and_tokens(model: PreTrainedModel, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """What `encode_images` gives, and the unit-norm tokens `(B, P, H)` of the last layer in float32: patches and class token, or
    the places of a convolutional tower."""
    pool_outputs(model)
    found = model.get_image_features(pixel_values=pixel_values)
    tokens = found.last_hidden_state.float()
    tokens = tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens
    return F.normalize(found.pooler_output.float(), dim=-1), F.normalize(tokens, dim=-1)


def encode_texts(model: PreTrainedModel, *inputs: Tensor | None, **named: Tensor | None) -> Tensor:
    """Unit-norm text embeddings `(B, D)` in float32.

    Args:
        inputs, named: what the model reads (`Family.text_inputs`), in that order or by name: token ids and mask, both `(B, T)`,
            of which SigLIP has no mask; or vectors `(B, d)`.
    """
    family = FAMILIES[model.config.model_type]
    named |= dict(zip(family.text_inputs, inputs, strict=False))
    if family.causal:
        named["attention_mask"] = None
    pool_outputs(model)
    return F.normalize(model.get_text_features(**named).pooler_output.float(), dim=-1)


# -- a tower as trunk and head ---------------------------------------------------------------------------------------
def head_of(model: PreTrainedModel, tower: str) -> str | None:
    """The name of the projection that ends a tower (`vision` or `text`); None: its pooled output is the embedding."""
    return getattr(FAMILIES[model.config.model_type], f"{tower}_head")


def run_trunk(model: PreTrainedModel, tower: str, *inputs: Tensor | None) -> Tensor:
    """What the projection of a tower reads: pooled outputs `(B, H)` in float32.

    Args:
        inputs: of `encode_images`, or of `encode_texts`.
    """
    seen: list[Tensor] = []
    hook = model.get_submodule(head_of(model, tower)).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        (encode_images if tower == "vision" else encode_texts)(model, *inputs)
    finally:
        hook.remove()
    return seen[0].float()


def run_head(model: PreTrainedModel, tower: str, pooled: Tensor) -> Tensor:
    """Unit-norm embeddings `(B, D)` in float32 of what `run_trunk` gave."""
    return F.normalize(model.get_submodule(head_of(model, tower))(pooled).float(), dim=-1)
