"""What opening a model of transformers needs, of any kind: its configuration, reasons for failures, a device, and what tells two
models or tokenizers apart."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..core.builtin import builtin
from ..core.errors import UserError, nearest
from ..core.files import model_files
from ..core.reading import parse_json, refuse_pointers
from ..core.repositories import read_text_file
from ..core.schema import shown

LONGEST_REASON = 300  # characters; some errors of transformers list all models that there are
EXAMPLES = {
    "--model_name_or_path": "openai/clip-vit-base-patch32",
    "--scorer": "google/siglip2-base-patch16-224",
    "--report_scorer": "google/siglip2-base-patch16-224",
    "--vision_model": "facebook/convnext-tiny-224",
    "--text_model": "sentence-transformers/all-MiniLM-L6-v2",
    "--text_trunk": "HuggingFaceTB/SmolLM2-135M",
}


def open_config(name: str, flag: str, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a model.

    Args:
        flag: the setting that names the model.

    Raises:
        UserError: it is not found, or is of a kind that transformers does not know.
    """
    refuse_pointers(*model_files(builtin(name)))
    try:
        return AutoConfig.from_pretrained(builtin(name), revision=revision, trust_remote_code=False)
    except Exception as error:  # missing, or content for which each config class has errors of its own
        if unknown := _unknown_types(name, revision):
            place, kind = unknown
            raise UserError(
                f"model {name!r}, config.json, {place}: expected a model_type that transformers {transformers.__version__} knows, "
                f"found {shown(kind)}.{nearest(kind, CONFIG_MAPPING)} A class of your own works from Python, where it is registered "
                "first: AutoConfig.register(…), AutoModel.register(…)."
            ) from error
        raise UserError(
            f"model {name!r}: expected a Hub id or a folder with a config.json of a model; it could not be loaded "
            f"({first_line(error)}). For example, type {flag} {EXAMPLES[flag]}."
        ) from error


def _unknown_types(name: str, revision: str | None) -> tuple[str, str] | None:
    """The place and the value of the first `model_type` in a `config.json` that transformers does not know."""
    with contextlib.suppress(UserError):
        text = read_text_file(name, "config.json", revision, "model")
        config = parse_json(text, "config.json") if text else {}
        for place, part in (
            ("model_type", config),
            *((f"{t}_config.model_type", config.get(f"{t}_config")) for t in ("vision", "text")),
        ):
            kind = part.get("model_type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind not in CONFIG_MAPPING:
                return place, kind
    return None


def first_line(error: Exception) -> str:
    """The first line of an error's text, or what fits into a message of it."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= LONGEST_REASON else line[: LONGEST_REASON - 1] + "…"


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def tokenizer_identity(tokenizer) -> list:
    """Everything that the tokens of a text depend on, in values that JSON can hold."""
    sides = [tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token_id]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), *sides]
    content = json.loads(backend.to_str())
    # These are left over from the last call and do not define the tokenizer.
    content.pop("padding", None), content.pop("truncation", None)
    return [content, *sides]


def tensors_digest(tensors: Mapping[str, Tensor], about: str = "") -> str:
    """sha256 of tensors: names, types, shapes, bytes; and of a text about them."""
    digest = hashlib.sha256(about.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if it is on the CPU."""
    return memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
