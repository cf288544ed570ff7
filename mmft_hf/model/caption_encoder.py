"""`CaptionEncoder`: a language model or a sentence encoder as the trunk of a text tower, frozen or tuned by LoRA.

A decoder reads in both directions where its attention allows it (`config.is_causal`, transformers 5.2 or later), which is
checked when it is opened: the last token of a text is changed, and the first hidden state must change, too. LoRA adapters do not
record that flag, so `caption_encoder.json` does, with everything else that the vectors depend on.

After Huang et al., "LLM2CLIP" (arXiv 2411.04997), section 3.1, and BehnamGhader et al., "LLM2Vec" (arXiv 2404.05961).

Shapes: `n` texts, `B` texts of a batch, `T` tokens, `d` size of the vectors.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TypedDict

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_gguf_available

from ..core.builtin import builtin
from ..core.console import is_main
from ..core.errors import UserError
from ..core.files import ADAPTER_FILES, TRUNK_FILES, atomic_folder, write_json
from ..core.markdown import public_name
from ..core.reading import parse_json
from ..core.records import Count
from ..core.repositories import describe_source, read_text_file
from .families import LONGEST_TEXT, POOLINGS, POSITIONS_AFTER_PADDING
from .opening import default_device, first_line, open_config, tensors_digest, tokenizer_identity
from .pooling import pool
from .sanity import check_config, check_weights
from .sentence_encoders import read_sentence_encoder
from .weights import find_weights

logger = logging.getLogger(__name__)

RECORD = TRUNK_FILES[0]
FLAG = "--text_trunk"
BATCH_SIZE = 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# How far hidden states may move when a text is padded, relative to their norm. Half precision rounds.
PADDING_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


class EncoderRecord(TypedDict, total=False):
    """`caption_encoder.json`."""

    base: str
    revision: str | None
    gguf_file: str | None
    pooling: str
    is_causal: bool
    instruction: str | None
    normalize: bool
    max_length: Count
    dtype: str
    license: str | list[str] | None
    parameters: Count
    size: Count
    weights: str
    lora: str | None


class CaptionEncoder(nn.Module):
    """Vectors of texts. Open one with `from_pretrained`.

    Attributes:
        model: the transformer, or the `PeftModel` around it.
        size: `d`.
        parameters_count: number of parameters, LoRA included.
        bytes: that they take in memory.
        max_length: tokens of a text that are read, the instruction and special tokens included.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: EncoderRecord, whole: bool):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self._record = record
        self._whole = whole  # whether special tokens at the beginning are pooled, too
        self.size = record["size"]
        self.pooling, self.is_causal = record["pooling"], record["is_causal"]
        self.instruction, self.normalize = record["instruction"], record["normalize"]
        self.max_length = record["max_length"]

    # -- opening and saving ------------------------------------------------------------------------------------------
    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        pooling: str | None = None,
        bidirectional: bool | None = None,
        instruction: str | None = None,
        max_length: int | None = None,
        normalize: bool | None = None,
        revision: str | None = None,
        gguf_file: str | None = None,
        dtype: torch.dtype | str | None = None,
        allow_pickle: bool = False,
        device: torch.device | str | None = None,
    ) -> CaptionEncoder:
        """Opens a model of transformers or of sentence-transformers, or a folder of `save_pretrained`, which has its own settings.

        Args:
            path_or_id: folder or Hub id; or one followed by the name of a GGUF file in it, `FOLDER/model.gguf`.
            pooling: `mean`, `first` or `last`. Default: what sentence-transformers' files say, else `mean`.
            bidirectional: whether a decoder reads in both directions. Default: yes, unless it is a folder of
                sentence-transformers, which is opened as it was trained.
            instruction: put before every text. It is read, but not pooled.
            max_length: tokens; default 512, or less where the model reads less.
            normalize: whether vectors have unit length; default yes.
            gguf_file: the file of weights in a folder or repository of GGUF files; needs `pip install mmft_hf[llm]`. Weights are
                taken to `dtype`.
            dtype: of the weights: float32 (default), bfloat16 or float16.
            allow_pickle: as in `load_model`.
            device: default the accelerator if there is one.

        Raises:
            UserError: it is not found; is no text model; ignores `bidirectional`; has a tokenizer that cannot pad; has only a
                pickle that is not allowed; or a folder of ours was saved with another setting than the one given.
        """
        name = str(path_or_id)
        if name.endswith(".gguf") and not gguf_file:
            name, gguf_file = str(Path(name).parent), Path(name).name
        text = read_text_file(name, RECORD, revision, "model")
        given = {
            "pooling": pooling,
            "instruction": instruction,
            "max_length": max_length,
            "normalize": normalize,
            "gguf_file": gguf_file,
            "dtype": _dtype_name(dtype),
        }
        if text is None:
            is_causal = None if bidirectional is None else not bidirectional
            return _open(name, {**given, "is_causal": is_causal, "revision": revision}, allow_pickle, device)
        record = parse_json(text, f"{name}, {RECORD}", EncoderRecord)
        _check_record(record, name)
        saved = {**record, "bidirectional": not record["is_causal"]}
        for key, value in {**given, "bidirectional": bidirectional}.items():
            if value is not None and value != saved.get(key):
                raise UserError(
                    f"caption encoder {name!r}, --{key}: expected {saved.get(key)!r}, with which it was saved, found {value!r}. Leave the "
                    f"setting out, or open the base model, {record['base']}, with it."
                )
        encoder = _open(record["base"], record, allow_pickle, device, folder=name)
        if encoder.weights_digest != record["weights"]:
            raise UserError(
                f"caption encoder {name!r}: expected the base model {record['base']!r} that it was made with, found other weights there. "
                f"Restore that model, or write the place of the right one into {RECORD}, field base."
            )
        if record.get("lora"):
            encoder._open_lora(name, revision)
        return encoder

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes what the base model does not have: `caption_encoder.json`, and the LoRA adapter if there is one."""
        lora = self._lora_state()
        folder = Path(folder)
        with atomic_folder(folder) as temporary:
            if lora:
                config = self.model.peft_config["default"]
                config.base_model_name_or_path, config.revision = self._record["base"], self._record["revision"]
                config.inference_mode = True
                config.save_pretrained(temporary)
                save_file(lora, temporary / ADAPTER_FILES[1])
            write_json(temporary / RECORD, self.record())
        if not lora:  # those of an encoder that was saved here before
            for file in ADAPTER_FILES:
                (folder / file).unlink(missing_ok=True)

    def record(self) -> EncoderRecord:
        """What `save_pretrained` writes into `caption_encoder.json`."""
        return {**self._record, "weights": self.weights_digest, "lora": self.lora_digest}

    # -- what it is --------------------------------------------------------------------------------------------------
    @property
    def parameters_count(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def weights_digest(self) -> str:
        """sha256 of the base model's weights, which never change here: names, types, shapes, bytes."""
        state = self.model.state_dict()
        plain = {
            key.removeprefix("base_model.model.").replace(".base_layer.", "."): value
            for key, value in state.items()
            if ".lora_" not in key
        }
        return tensors_digest(plain)

    @property
    def lora_digest(self) -> str | None:
        """sha256 of the LoRA weights and of their scale; None without LoRA."""
        state = self._lora_state()
        if not state:
            return None
        config = self.model.peft_config["default"]
        return tensors_digest(state, f"{config.r} {config.lora_alpha} {config.use_rslora} ")

    def identity(self) -> dict:
        """Everything that the vectors depend on, in values that JSON can hold. `base` is the model's public name."""
        return {
            "base": public_name(self._record["base"]),
            "weights": self.weights_digest,
            "lora": self.lora_digest,
            "is_causal": self.is_causal,
            "pooling": self.pooling,
            "leading_special_tokens": self._whole,
            "instruction": self.instruction,
            "normalize": self.normalize,
            "max_length": self.max_length,
            "dtype": self._record["dtype"],
            "tokenizer": hashlib.sha256(json.dumps(tokenizer_identity(self.tokenizer)).encode()).hexdigest(),
            "versions": [torch.__version__, transformers.__version__],
        }

    # -- vectors -----------------------------------------------------------------------------------------------------
    def tokens(self, texts: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        """What `forward` reads of texts.

        Returns:
            `input_ids`, `attention_mask` and `pooled` (1 for the tokens that are pooled), `(B, T)` each, padded on the right, on the
            CPU; and which texts were truncated at `max_length`, bool `(B,)`.
        """
        prefix = self.instruction or ""
        found = self.tokenizer(
            [prefix + text for text in texts],
            truncation=True,
            max_length=self.max_length,
            return_special_tokens_mask=True,
            return_offsets_mapping=bool(prefix),
        )
        rows, truncated = [], []
        filler = self.tokenizer.pad_token_id
        for i, ids in enumerate(found["input_ids"]):
            special, start = found["special_tokens_mask"][i], 0
            if prefix:
                ends = (end for _, end in found["offset_mapping"][i])
                own = (t for t, (end, s) in enumerate(zip(ends, special, strict=True)) if not s and end > len(prefix))
                start = next(own, 0)
            elif not self._whole:
                start = next((t for t, s in enumerate(special) if not s), 0)
            # An empty text may have no token at all.
            rows.append((ids or [filler], [0] * start + [1] * (max(len(ids), 1) - start)))
            truncated.append(self._is_truncated(found, i, texts[i]))
        longest = max((len(ids) for ids, _ in rows), default=0)
        shape = (len(rows), longest)
        input_ids = torch.full(shape, filler)
        attention_mask, pooled = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for i, (ids, mask) in enumerate(rows):
            input_ids[i, : len(ids)] = torch.tensor(ids)
            attention_mask[i, : len(ids)] = 1
            pooled[i, : len(ids)] = torch.tensor(mask)
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "pooled": pooled}
        return batch, torch.tensor(truncated, dtype=torch.bool)

    def _is_truncated(self, found, i: int, text: str) -> bool:
        if found.encodings is not None:
            return bool(found.encodings[i].overflowing)
        whole = self.tokenizer((self.instruction or "") + text, verbose=False)["input_ids"]
        return len(whole) > self.max_length

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Vectors `(B, d)` in float32, with gradient, of what `tokens` gives."""
        batch = {key: value.to(self.device) for key, value in batch.items()}
        output = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        vectors = pool(output.last_hidden_state.float(), batch["pooled"], self.pooling)
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    @torch.no_grad()
    def encode_batch(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Vectors `(B, d)` in float32 on the CPU, and which texts were truncated, bool `(B,)`; computed in one batch."""
        training = self.training
        self.eval()
        batch, truncated = self.tokens(texts)
        vectors = self(batch).cpu()
        self.train(training)
        return vectors, truncated

    def encode(self, texts: Sequence[str], batch_size: int = BATCH_SIZE) -> Tensor:
        """Vectors `(n, d)` in float32 on the CPU, without gradient. Texts of like length share a batch."""
        vectors = torch.empty(len(texts), self.size)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            vectors[rows] = self.encode_batch([texts[i] for i in rows])[0]
        return vectors

    # -- LoRA --------------------------------------------------------------------------------------------------------
    def add_lora(self, rank: int = 16, alpha: int = 32, dropout: float = 0.05) -> None:
        """Adds LoRA to all linear layers of the transformer's blocks, and freezes everything else. B is 0, so vectors stay.

        Raises:
            UserError: it has LoRA already, or no such layers.
        """
        from peft import LoraConfig, TaskType, get_peft_model

        if self.lora_digest:
            raise UserError(
                f"caption encoder {self._record['base']!r}: expected one without LoRA, found LoRA layers. Open its base model."
            )
        blocks = tuple(f"{name}." for name, module in self.model.named_modules() if isinstance(module, nn.ModuleList))
        layers = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and name.startswith(blocks)
        ]
        if not layers:
            raise UserError(
                f"caption encoder {self._record['base']!r}: expected blocks with linear layers, which get LoRA; "
                f"{type(self.model).__name__} has none. Take another model."
            )
        config = LoraConfig(
            task_type=TaskType.FEATURE_EXTRACTION,
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=layers,
            fan_in_fan_out=isinstance(self.model.get_submodule(layers[0]), Conv1D),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for an attribute by its old name
            self.model = get_peft_model(self.model, config)

    def load_lora(self, folder: str | Path) -> None:
        """Replaces the LoRA weights by those that `save_pretrained` wrote into a folder."""
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self.model, load_file(Path(folder) / ADAPTER_FILES[1]))

    def _open_lora(self, name: str, revision: str | None) -> None:
        from peft import PeftModel

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # as in `add_lora`
                self.model = PeftModel.from_pretrained(self.model, name, revision=revision, use_safetensors=True)
        except Exception as error:  # missing, damaged, or for another model
            raise UserError(
                f"caption encoder {name!r}: expected its LoRA adapter ({' and '.join(ADAPTER_FILES)}), which {RECORD} names; it could "
                f"not be opened ({first_line(error)}). Copy the whole folder again."
            ) from error
        self.model.eval()
        if self.lora_digest != self._record["lora"]:
            raise UserError(
                f"caption encoder {name!r}: expected the LoRA adapter that {RECORD} was written with, found another one. Copy the whole "
                "folder again."
            )

    def checkpoint_gradients(self) -> None:
        """Recomputes activations in the backward pass, which takes less memory and more time."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its name from version 6 on is not in version 5.2
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def _lora_state(self) -> dict[str, Tensor]:
        if not hasattr(self.model, "peft_config"):
            return {}
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return {key: value.detach().cpu().contiguous() for key, value in sorted(state.items())}


# -- opening ---------------------------------------------------------------------------------------------------------
def _open(
    name: str,
    settings: dict,
    allow_pickle: bool,
    device: torch.device | str | None,
    folder: str | None = None,
) -> CaptionEncoder:
    """Opens a base model with settings, of which None means the default.

    Args:
        folder: the one of ours that names the base model.
    """
    path, revision, gguf_file = Path(builtin(name)), settings.get("revision"), settings.get("gguf_file")
    dtype = settings.get("dtype") or "float32"
    try:
        model, tokenizer = _load(name, path, revision, gguf_file, DTYPES[dtype], allow_pickle)
        sentences = None if gguf_file else read_sentence_encoder(name, revision)
    except UserError as error:
        if folder is None:
            raise
        raise UserError(
            f"caption encoder {folder!r}: expected its base model {name!r}, which {RECORD} names. {error} Restore that model, or write its "
            f"new place into {RECORD}, field base."
        ) from error
    if sentences and sentences.others and folder is None and is_main():
        logger.warning("Note: %s: its further layers, %s, are left out.", name, ", ".join(sentences.others))
    pooling = settings.get("pooling") or (sentences.pooling if sentences else "mean")
    if pooling not in POOLINGS:
        found = repr(pooling) if pooling else f"{sentences.theirs!r}, as the files of sentence-transformers say"
        raise _wrong(name, f"expected pooling {' or '.join(POOLINGS)}, found {found}. Type --pooling mean.")
    try:
        _check_tokenizer(model, tokenizer, name)
        is_causal, decoder = _set_direction(model, tokenizer, name, settings.get("is_causal"), sentences is not None)
        _check_padding(model, tokenizer, name)
        size = _first_states(model, tokenizer).shape[-1]
    except UserError:
        raise
    except Exception as error:  # a model of pictures, of sound, of two towers
        raise _wrong(
            name,
            f"expected a model that reads texts, such as a language model or a sentence encoder; {type(model).__name__} fails at a first "
            f"text ({first_line(error)}).",
        ) from error
    if is_causal and pooling == "first":
        raise _wrong(
            name, "the first token of a decoder sees nothing of the text. Type --pooling mean, or --bidirectional true."
        )
    limit = _token_limit(model, tokenizer, sentences.max_tokens if sentences else None)
    record: EncoderRecord = {
        "base": name if name.startswith("builtin/") or not path.exists() else str(path.resolve()),
        "revision": revision,
        "gguf_file": gguf_file,
        "pooling": pooling,
        "is_causal": is_causal,
        "instruction": settings.get("instruction") or None,
        "normalize": True if settings.get("normalize") is None else settings["normalize"],
        "max_length": min(settings.get("max_length") or LONGEST_TEXT, limit),
        "dtype": dtype,
        "license": settings.get("license") or describe_source(name, revision, "model").get("license"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "size": size,
        "lora": settings.get("lora"),
    }
    model.requires_grad_(False)
    encoder = CaptionEncoder(
        model.to(device or default_device()), tokenizer, record, not decoder or sentences is not None
    )
    if encoder.instruction and not tokenizer.is_fast:
        raise _wrong(
            name,
            f"an instruction needs a tokenizer of the tokenizers library, found {type(tokenizer).__name__}. Leave it out.",
        )
    if not encoder.tokens(["a"])[0]["pooled"].any() or encoder.tokens(["a"])[1].any():
        raise _wrong(
            name,
            f"--max_length: expected more than the instruction and the special tokens have, found {record['max_length']}.",
        )
    return encoder


def _load(
    name: str, path: Path, revision: str | None, gguf_file: str | None, dtype: torch.dtype, allow_pickle: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    _check_gguf(name, path, gguf_file)
    hub = {"revision": revision, "trust_remote_code": False, **({"gguf_file": gguf_file} if gguf_file else {})}
    missing: set[str] = set()
    if not gguf_file:
        config = open_config(name, FLAG, revision)
        check_config(config, name)
        if config.is_encoder_decoder:
            raise _wrong(
                name, f"expected a decoder or an encoder, found both, a {config.model_type}. Take another model."
            )
    try:
        if gguf_file:
            model = AutoModel.from_pretrained(path if path.exists() else name, dtype=dtype, **hub)
        else:
            weights = find_weights(str(path), revision, allow_pickle, getattr(config, "transformers_weights", None))
            options = {"dtype": dtype, "output_loading_info": True}
            model, found = weights.from_pretrained(AutoModel, str(path), config, **options)
            missing = {key for key in found["missing_keys"] if not key.startswith("pooler.")}  # which nobody reads here
        tokenizer = AutoTokenizer.from_pretrained(str(path), **hub)
    except UserError:
        raise
    except Exception as error:  # missing files, a missing package, or content that one of many constructors cannot use
        raise _wrong(
            name,
            f"expected weights and a tokenizer that transformers {transformers.__version__} opens ({first_line(error)}). For example, "
            f"type {FLAG} sentence-transformers/all-MiniLM-L6-v2.",
        ) from error
    if missing:
        raise _wrong(
            name,
            f"expected all weights of a {type(model).__name__}, found none of {min(missing)} and {len(missing) - 1} others.",
        )
    check_weights(model, name)
    return model.eval(), tokenizer


def _check_gguf(name: str, path: Path, gguf_file: str | None) -> None:
    there = sorted(file.name for file in path.glob("*.gguf")) if path.is_dir() else []
    if gguf_file is None:
        if there and not (path / "config.json").exists():
            raise _wrong(
                name, f"expected config.json, found GGUF files. To open one, type its name, too: {path / there[0]}."
            )
    elif not is_gguf_available():
        raise _wrong(
            name, "a GGUF file is opened by the package gguf, which is missing. Type pip install 'mmft_hf[llm]'."
        )
    elif path.is_dir() and gguf_file not in there:
        raise _wrong(
            name,
            f"--gguf_file: expected one of {', '.join(there) or 'its GGUF files, of which there are none'}, found {gguf_file}.",
        )


def _check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Makes the tokenizer pad and cut on the right: positions then count from the first token, in every kind of model."""
    known = model.get_input_embeddings().num_embeddings
    # Without its vocabulary file a tokenizer still loads, with hardly any words, and everything would run.
    if len(tokenizer) < 0.9 * known:
        raise _wrong(
            name, f"expected a tokenizer of about {known:,} tokens, as the model has, found {len(tokenizer):,}."
        )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= known:
        if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= known:
            raise _wrong(
                name,
                "expected a tokenizer with a pad token or an end token, found neither. Choose one of its tokens, which is masked: "
                'tokenizer.pad_token = "…"; tokenizer.save_pretrained(FOLDER).',
            )
        tokenizer.pad_token = tokenizer.eos_token
        if is_main():
            logger.warning(
                "Note: %s: its tokenizer has no pad token; texts are padded with its end token, masked.", name
            )


def _set_direction(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, is_causal: bool | None, as_trained: bool
) -> tuple[bool, bool]:
    """Whether a token sees only those before it, and whether the model is a decoder; sets `model.config.is_causal`.

    Args:
        is_causal: what is asked for; None: the default of the kind of model.
        as_trained: whether the default is what the model was trained with.
    """
    config, had = model.config, vars(model.config).get("is_causal")
    config.is_causal = True
    if _sees_last(model, tokenizer, padded=True):  # an encoder; without padding the flag would make some of them causal
        config.is_causal = False
        if is_causal:
            raise _wrong(name, "expected a decoder for --bidirectional false, found an encoder. Leave the setting out.")
        return False, False
    if is_causal is None:
        is_causal = as_trained and had is not False
    config.is_causal = is_causal
    if is_causal in (_sees_last(model, tokenizer, padded) for padded in (False, True)):
        raise _wrong(
            name,
            f"expected a decoder that reads in both directions, found one that transformers {transformers.__version__} runs in one "
            f"({type(model).__name__} ignores is_causal). Type --bidirectional false, or take another model.",
        )
    return is_causal, True


def _probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Nine tokens, none of which is padding."""
    known = model.get_input_embeddings().num_embeddings
    return [token for token in range(min(known, 64)) if token != tokenizer.pad_token_id][-9:]


@torch.no_grad()
def _first_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, last: int = 8, padding: int = 0
) -> Tensor:
    """Hidden states `(8, d)` of eight tokens; `last` says which of nine is the eighth."""
    tokens = _probe(model, tokenizer)
    ids = torch.tensor([tokens[:7] + [tokens[last]] + [tokenizer.pad_token_id] * padding], device=model.device)
    mask = torch.tensor([[1] * 8 + [0] * padding], device=model.device)
    return model(input_ids=ids, attention_mask=mask).last_hidden_state[0, :8].float()


def _sees_last(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, padded: bool) -> bool:
    """The last-token test: whether the first hidden state changes with the last token."""
    padding = 3 if padded else 0
    first, other = (_first_states(model, tokenizer, last, padding)[0] for last in (7, 8))
    return not torch.equal(first, other)


def _check_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises `UserError` if padding on the right changes hidden states: a vector would depend on the batch."""
    alone, padded = _first_states(model, tokenizer), _first_states(model, tokenizer, padding=3)
    if (alone - padded).norm() > PADDING_TOLERANCE[model.dtype] * alone.norm():
        raise _wrong(
            name,
            f"expected hidden states that do not depend on padding, found others in {type(model).__name__}. Take another model.",
        )


def _token_limit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trained: int | None) -> int:
    """How many tokens a text may have."""
    positions = getattr(model.config, "max_position_embeddings", None) or LONGEST_TEXT
    if model.config.model_type in POSITIONS_AFTER_PADDING:
        positions -= model.config.pad_token_id + 1
    return min(positions, tokenizer.model_max_length, trained or positions)


def _check_record(record: EncoderRecord, name: str) -> None:
    """Raises `UserError` for a `caption_encoder.json` that lacks a field, or names a kind that there is not."""
    needed = ("base", "pooling", "is_causal", "normalize", "max_length", "dtype", "weights")
    if missing := [key for key in needed if key not in record]:
        raise UserError(f"{name}, {RECORD}: expected the field {missing[0]}, found none. Copy the whole folder again.")
    if record["dtype"] not in DTYPES:
        raise UserError(f"{name}, {RECORD}, dtype: expected one of {', '.join(DTYPES)}, found {record['dtype']!r}.")


def _dtype_name(dtype: torch.dtype | str | None) -> str | None:
    if dtype is None:
        return None
    found = str(dtype).removeprefix("torch.")
    if found not in DTYPES:
        raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, found {found}.")
    return found


def _wrong(name: str, text: str) -> UserError:
    return UserError(f"caption encoder {name!r}: {text}")
