"""Two towers that know nothing of each other as one dual encoder, a stock `VisionTextDualEncoderModel`."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoModel,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from ..core.builtin import builtin
from ..core.errors import UserError
from .collator import input_size
from .families import FAMILIES, POOLINGS, token_limit
from .loading import OWN_PROCESSOR, freeze_unused, load_image_processor, load_model
from .opening import first_line, open_config
from .pooling import pool_outputs
from .sanity import check_tokenizer, check_weights
from .sentence_encoders import SentenceEncoder, read_sentence_encoder
from .weights import find_weights

SCALE = math.log(100)  # the highest of CLIP
# What a tower takes, in the words of transformers and in ours, and the flag of the other tower.
INPUTS = {
    "--vision_model": ("pixel_values", "pictures", "--text_model"),
    "--text_model": ("input_ids", "texts", "--vision_model"),
}


def combine_towers(
    vision_model: str | Path,
    text_model: str | Path,
    text_pooling: str | None = None,
    projection_dim: int = 512,
    allow_pickle: bool = False,
) -> tuple[PreTrainedModel, ProcessorMixin, list[str]]:
    """Puts an image tower and a text tower together. The projections into their common space are random; see `align`.

    Args:
        vision_model: Hub id or folder of an image model whose pooled output is one vector per picture, or of a dual encoder.
        text_model: Hub id or folder of a text model, of a sentence encoder or of a dual encoder.
        text_pooling: one of `families.POOLINGS`. Default: what the files of sentence-transformers say, else the tower's own
            pooled output.
        projection_dim: size `D` of the common space.
        allow_pickle: as in `load_model`.

    Returns:
        The model in float32, its processor, and notes: what was decided and what is missing.

    Raises:
        UserError: a tower cannot be used, or its pooling is unknown.
    """
    vision_name, text_name, notes = str(vision_model), str(text_model), []
    vision, picture = _vision_tower(vision_name, allow_pickle, notes)
    text, tokenizer = _text_tower(text_name, allow_pickle, notes)
    pooling = _pooling(text_name, text, text_pooling, read_sentence_encoder(builtin(text_name)), tokenizer, notes)
    # VisionTextDualEncoderModel reads this from configurations that have other words for it, or none.
    vision.config.hidden_size = _width(vision_name, vision, picture)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=projection_dim, logit_scale_init_value=SCALE
    )
    if pooling:
        config.text_pooling = pooling
    model = VisionTextDualEncoderModel(config, vision, text).float().eval()
    pool_outputs(model)
    tokenizer.model_max_length = min(tokenizer.model_max_length, token_limit(config))
    check_tokenizer(tokenizer, text_name)
    model.requires_grad_(True)
    freeze_unused(model)
    return model, VisionTextDualEncoderProcessor(picture, tokenizer), notes


def _vision_tower(name: str, allow_pickle: bool, notes: list[str]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    config = open_config(name, "--vision_model")
    if config.model_type in FAMILIES:
        model, processor = load_model(name, allow_pickle=allow_pickle)
        return model.vision_model, processor.image_processor
    model = _open(name, config, "--vision_model", allow_pickle, notes)
    try:
        processor = (
            load_image_processor(builtin(name)) if config.model_type != "timm_wrapper" else _timm_processor(config)
        )
    except UserError:
        raise
    except Exception as error:  # no such file, or one that its class cannot use
        raise UserError(
            f"--vision_model {name}: expected a preprocessor_config.json next to config.json, which says how pictures are "
            f"prepared; {first_line(error)} {OWN_PROCESSOR}"
        ) from error
    if input_size(processor) is None:
        raise UserError(
            f"--vision_model {name}: expected an image processor that gives all pictures one size, found size "
            f"{dict(processor.size)} without a crop. Write size {{height, width}} into its preprocessor_config.json."
        )
    return model, processor


def _timm_processor(config: PreTrainedConfig) -> BaseImageProcessor:
    """The image processor of transformers that does what timm does in evaluation: resize, crop, normalize."""
    timm = getattr(config, "pretrained_cfg", None) or {}
    height, width = timm.get("input_size", (3, 224, 224))[1:]
    whole = math.floor(min(height, width) / timm.get("crop_pct", 0.875))
    filters = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": whole},
        "crop_size": {"height": height, "width": width},
        "resample": filters.get(timm.get("interpolation"), 3),
        "image_mean": list(timm.get("mean", (0.485, 0.456, 0.406))),
        "image_std": list(timm.get("std", (0.229, 0.224, 0.225))),
    }
    with tempfile.TemporaryDirectory() as folder:  # the class differs between versions of transformers
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings))
        return load_image_processor(folder)


def _text_tower(name: str, allow_pickle: bool, notes: list[str]):
    config = open_config(name, "--text_model")
    if config.model_type in FAMILIES:
        family = FAMILIES[config.model_type]
        if family.padded or family.texts != "tokens":
            expected = "does not read its padding" if family.padded else "reads tokens"
            raise UserError(
                f"--text_model {name}: expected a text tower that {expected}, found a {config.model_type}. Type another model."
            )
        model, processor = load_model(name, allow_pickle=allow_pickle)
        return model.text_model, processor.tokenizer
    model = _open(name, config, "--text_model", allow_pickle, notes)
    model.config.use_cache = False  # of language models, for the next token
    try:
        tokenizer = AutoTokenizer.from_pretrained(builtin(name), trust_remote_code=False)
    except Exception as error:  # no such file, or a missing package
        raise UserError(
            f"--text_model {name}: expected a tokenizer next to config.json; {first_line(error)}."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        notes.append(f"{name} has no token for padding; {tokenizer.pad_token} is used, which attention passes over.")
    vocabulary = model.config.vocab_size
    if not 0.9 * vocabulary <= len(tokenizer) <= vocabulary:
        raise UserError(
            f"--text_model {name}: expected a tokenizer of {vocabulary} tokens, as config.json says, found {len(tokenizer)}. Is "
            "its tokenizer.json missing, or another model's?"
        )
    return model, tokenizer


def _open(name: str, config, flag: str, allow_pickle: bool, notes: list[str]) -> PreTrainedModel:
    path = builtin(name)
    try:
        weights = find_weights(path, None, allow_pickle, getattr(config, "transformers_weights", None))
        model, found = weights.from_pretrained(AutoModel, path, config, dtype=torch.float32, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # a missing package, or content that one of many constructors cannot use
        raise UserError(
            f"{flag} {name}: expected a model that transformers {transformers.__version__} opens here; {first_line(error)}"
        ) from error
    takes, content, other = INPUTS[flag]
    if getattr(model, "main_input_name", None) != takes:
        raise UserError(
            f"{flag} {name}: expected a model of {content}, found a {type(model).__name__}. Is it the {other}?"
        )
    check_weights(model, name)
    model.name_or_path = model.config._name_or_path = name
    if missing := sorted(found["missing_keys"]):
        notes.append(
            f"{name} has no weights for {len(missing)} of the tower's parameters, which are random: {missing[0]}, …"
            if len(missing) > 1
            else f"{name} has no weights for {missing[0]}, which is random."
        )
    return model


def _pooling(
    name: str, tower: PreTrainedModel, wanted: str | None, encoder: SentenceEncoder | None, tokenizer, notes: list[str]
) -> str | None:
    """The pooling of a text tower; None: its own."""
    if wanted is not None and wanted not in POOLINGS:
        raise UserError(f"--text_pooling: expected one of {', '.join(POOLINGS)}, found {wanted!r}.")
    tokens = tokenizer(["a"], return_tensors="pt")
    try:
        with torch.no_grad():
            output = tower(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"--text_model {name}: expected a model that encodes a text alone, found a {type(tower).__name__}, which fails at a "
            f"first one ({first_line(error)})."
        ) from error
    if encoder and encoder.max_tokens:
        tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.max_tokens)
    if encoder and encoder.others:
        notes.append(
            f"{name}: its further layers ({', '.join(encoder.others)}) are no part of the tower and are left out."
        )
    if wanted:
        return wanted
    if encoder and encoder.pooling:
        notes.append(
            f"{name} is a sentence encoder that takes {POOLINGS[encoder.pooling]}: --text_pooling {encoder.pooling}."
        )
        return encoder.pooling
    if encoder:
        notes.append(
            f"{name} is a sentence encoder, but its pooling ({encoder.theirs or 'not in its files'}) is none of "
            f"{', '.join(POOLINGS)}. Its own pooled output is used; type --text_pooling for another one."
        )
    if getattr(output, "pooler_output", None) is None:
        raise UserError(
            f"--text_model {name}: expected a pooled output or --text_pooling, found neither: a {type(tower).__name__} gives one "
            "vector per token. Type --text_pooling mean (sentence encoders), first ([CLS]) or last (language models)."
        )
    return None


@torch.no_grad()
def _width(name: str, tower: PreTrainedModel, processor: BaseImageProcessor) -> int:
    """The size of the image tower's pooled output."""
    width, height = input_size(processor)
    try:
        pooled = tower.eval()(pixel_values=torch.zeros(1, 3, height, width)).pooler_output.flatten(1)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"--vision_model {name}: expected a tower with a pooled output, found a {type(tower).__name__}, which fails at a first "
            f"picture of {width} x {height} pixels ({first_line(error)}). Type another model."
        ) from error
    stated = getattr(tower.config, "hidden_size", pooled.shape[1])
    if stated != pooled.shape[1] and tower.config.model_type != "timm_wrapper":
        raise UserError(
            f"--vision_model {name}: expected a pooled output of hidden_size {stated}, found {pooled.shape[1]}, which a "
            "VisionTextDualEncoderModel cannot project. Type another model."
        )
    return pooled.shape[1]
