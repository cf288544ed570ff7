"""A vision-language model in this process: any image-text-to-text model of transformers that has a chat template."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL.Image import Image
from safetensors import SafetensorError
from transformers.utils import cached_file

from ....core.errors import UserError, nearest
from ....core.files import WEIGHTS_INDEX, model_files
from ....core.markdown import one_line
from ....core.reading import refuse_pointers
from ....data.images import BadImage, read_image
from ....model.weights import shards_of
from ...types import DEFAULT_TEMPERATURE, Answer, CallError, Fatal, Request, Sampling, Unanswerable
from ..pictures import sha256
from .beams import diverse_beams
from .device import default_device, empty_cache, out_of_memory, seeded

logger = logging.getLogger(__name__)

# Files of a folder that, in addition to the weights, decide what a model writes. Others (cards, logs) may change.
SETTINGS = (
    *("config.json", "generation_config.json", "adapter_config.json", WEIGHTS_INDEX),
    *("processor_config.json", "preprocessor_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
)
WINDOWS, WINDOW = 64, 1 << 17  # read of a weights file: 8 MiB, spread from its first byte to its last
# Options of `generate` that we set ourselves, or that would not give one text per request.
OWN_OPTIONS = ("max_length", "max_new_tokens", "num_return_sequences", "return_dict_in_generate", "pad_token_id")
THINK, THOUGHT = "<think>", "</think>"


GUIDED = ("llava",)
"""Kinds of models that are tested to write without their picture, too. Others keep positions of pictures from call to call."""
KEPT_BEAMS = 64  # questions whose diverse beams are kept for the other samples


class _Row(NamedTuple):
    """A request, as the processor takes it. `bare`: its text without pictures, for guidance."""

    request: Request
    images: list[Image]
    text: str
    bare: str


class TransformersBackend:
    """Answers requests with a model in this process, one batch at a time. Several processes share nothing.

    A request with its seed gives the same text again in the same batch; in another batch a sampled text may differ. The
    model runs on the accelerator (the one of `LOCAL_RANK`), else on the CPU, in the precision that its config names.

    Args:
        model: Hub id or local folder. Only safetensors are loaded, and no code that comes with a model is run.
        revision: branch, tag or commit on the Hub; ignored for a folder.
        sampling: `options` go to `generate`; `chat_template_kwargs` among them go to the chat template, as at servers
            (`{"chat_template_kwargs": {"enable_thinking": false}}`).
        batch_size: maximum number of pictures at a time. It is halved permanently when memory runs out.

    Raises:
        UserError: an argument that cannot be used.
    """

    features = frozenset({"text", "pictures", "logprobs", "beams", "guidance"})

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        batch_size: int = 8,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size: expected 1 or more, found {batch_size}.")
        if sampling.omit:
            raise UserError(f"--omit: expected a captioner that is a server, found transformers ({sampling.omit[0]}).")
        self.name, self.revision, self.sampling, self.batch_size = str(model), revision, sampling, batch_size
        self.device = default_device()
        self._options = {**sampling.options}
        self._chat_options = self._options.pop("chat_template_kwargs", None) or {}
        known = vars(transformers.GenerationConfig())
        for option in self._options:
            if option in OWN_OPTIONS or option.startswith("_") or option not in known:
                hint = " Use max_tokens." if option.startswith("max_") else nearest(option, set(known) - {*OWN_OPTIONS})
                raise UserError(f"sampling options: expected one of transformers' generate, found {option!r}.{hint}")
        self._temperature = DEFAULT_TEMPERATURE if sampling.temperature is None else sampling.temperature
        self._most = batch_size
        self._decoding = sampling.decoding
        self._beams: OrderedDict[tuple, tuple[list[list[int]], int]] = OrderedDict()
        self._model: Any = None
        self._lock = threading.Lock()

    # -- the backend protocol -----------------------------------------------------------------------------------------
    def sampling_fields(self) -> dict[str, Any]:
        """The temperature or the decoding, and the further options of `generate`."""
        drawn = {} if self._decoding.beams is not None else {"temperature": self._temperature}
        return {**drawn, **self._decoding.spec(), **self._options}

    def check_key(self) -> None:
        """A model in this process needs no key."""

    def identity(self) -> dict[str, Any]:
        """Model, revision and precision. Loads no weights.

        The revision is the commit of a Hub model. For a folder, which counts under its own name, it is a digest of the
        settings and of a sample of the weights, and so the same on any machine.

        Raises:
            UserError: not found, not an image-text-to-text model, or without a chat template.
        """
        config, source = self._config, self._source
        dtype = config.dtype or config.get_text_config().dtype
        if self._decoding.guidance != 1 and config.model_type not in GUIDED:
            raise UserError(
                f"decoding, guidance: expected a model of a kind that is tested to write without its picture ({', '.join(GUIDED)}), "
                f"found {self.name!r} of the kind {config.model_type}. Leave guidance out."
            )
        _ = self._processor  # reports a missing chat template before the first picture is read
        return {
            "backend": "transformers",
            "model": source.name if isinstance(source, Path) else source,
            "revision": self._revision,
            "dtype": str(dtype or "auto").removeprefix("torch."),
        }

    async def generate(self, requests: Sequence[Request]) -> list[Answer | CallError]:
        """The answers in the order of the requests; a request that failed alone has its error instead of an answer.

        Raises:
            UserError: the model cannot be loaded.
            Unanswerable: the only request failed.
            Fatal: the accelerator has failed.
        """
        results = await asyncio.to_thread(self._generate, list(requests))
        if len(results) == 1 and isinstance(results[0], CallError):
            raise results[0]
        return results

    async def aclose(self, again: bool = False) -> None:
        """Frees the model, unless it will be asked `again`. A later `generate` loads it again."""
        if not again:
            await asyncio.to_thread(self._free)

    # -- loading ------------------------------------------------------------------------------------------------------
    @cached_property
    def _source(self) -> Path | str:
        """A folder, or a Hub id."""
        folder = Path(self.name).expanduser()
        if folder.is_dir():
            return folder.resolve()
        if self.name.startswith((".", "/", "~")) or self.name.count("/") > 1:
            raise UserError(f"captioner {self.name!r}: expected a Hub id or an existing folder, found no such folder.")
        return self.name

    @cached_property
    def _config(self) -> Any:
        refuse_pointers(*model_files(self._source))
        with self._explained("a config.json that transformers knows"):
            config = transformers.AutoConfig.from_pretrained(self._source, **self._pinned)
        if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise UserError(
                f"captioner {self.name!r}: expected an image-text-to-text model (one that writes about a picture), "
                f"found model_type {config.model_type!r}. For example, type llava-hf/llava-1.5-7b-hf."
            )
        if isinstance(self._source, Path) and not any(self._source.glob("*.safetensors")):
            raise UserError(f"captioner {self.name!r}: expected *.safetensors next to config.json, found none.")
        self._check_index()
        return config

    def _check_index(self) -> None:
        """Raises `UserError` for an index of the weights that names a pickle, which transformers would open."""
        missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        path = cached_file(self._source, WEIGHTS_INDEX, revision=self._pinned.get("revision"), **missing)
        if path and (pickles := [name for name in shards_of(Path(path)) if not name.endswith(".safetensors")]):
            raise UserError(
                f"captioner {self.name!r}: expected weights as safetensors, found that {WEIGHTS_INDEX} names {pickles[0]}, which "
                "can run any code when it is opened. Take another model."
            )

    @cached_property
    def _pinned(self) -> dict[str, Any]:
        """How every part is loaded: from one commit, even if the branch moves on meanwhile, and never running its code."""
        if isinstance(self._source, Path):
            return {"trust_remote_code": False}
        file = cached_file(self._source, "config.json", revision=self.revision)
        return {"revision": Path(file).parent.name, "trust_remote_code": False}

    @cached_property
    def _processor(self) -> Any:
        with self._explained("a processor (image processor and tokenizer)"):
            processor = transformers.AutoProcessor.from_pretrained(self._source, **self._pinned)
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None or getattr(processor, "image_processor", None) is None:
            raise UserError(
                f"captioner {self.name!r}: expected a processor for pictures and text, found a "
                f"{type(processor).__name__}. Are preprocessor_config.json or processor_config.json missing?"
            )
        if not processor.chat_template:
            raise UserError(
                f"captioner {self.name!r}: expected a chat template (chat_template.jinja), found none. A base model cannot "
                "answer questions: use the variant that was tuned for chat, usually named -Instruct or -it."
            )
        # A decoder continues from the last position, which must therefore not be padding.
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return processor

    @cached_property
    def _revision(self) -> str:
        """The commit of a Hub model, or a digest of a folder."""
        if isinstance(self._source, str):
            return self._pinned["revision"]
        files = [self._source / name for name in SETTINGS if (self._source / name).is_file()]
        files += sorted(self._source.glob("additional_chat_templates/*.jinja"))
        files += sorted(self._source.glob("*.safetensors"))
        lines = "".join(f"{path.name} {path.stat().st_size} {_sample(path)}\n" for path in files)
        return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()[:24]}"

    @cached_property
    def _controls(self) -> set[str]:
        """Strings that the tokenizer reads as control tokens."""
        added = self._processor.tokenizer.added_tokens_decoder.values()
        tokens = {str(token) for token in added if token.special} | {str(getattr(self._processor, "image_token", ""))}
        return {token for token in tokens if len(token) > 2}

    def _load(self) -> None:
        if self._model is not None:
            return
        _ = self._config, self._processor
        with self._explained("weights as safetensors"):
            model, found = transformers.AutoModelForImageTextToText.from_pretrained(
                self._source,
                **self._pinned,
                dtype="auto",
                device_map={"": self.device},  # loads the weights straight onto the device
                use_safetensors=True,
                output_loading_info=True,
            )
        if missing := sorted(found["missing_keys"]):
            # They would be initialized at random, and the captions would be noise.
            raise UserError(
                f"captioner {self.name!r}: expected the weights of a {type(model).__name__}; {len(missing)} are missing, "
                f"for example {missing[0]}."
            )
        self._model = model.eval()

    def _free(self) -> None:
        with self._lock:
            self._model = None
            empty_cache(self.device)

    @contextmanager
    def _explained(self, expected: str) -> Iterator[None]:
        """Turns an error while loading into one that says what to do."""
        try:
            yield
        except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
            advice = (
                "Is it a Hub id, or a folder that exists?"
                if isinstance(self._source, str)
                else "Is the folder complete?"
            )
            if isinstance(error, ImportError):
                advice = "Install what it names, for example: pip install torchvision"
            elif "trust_remote_code" in str(error):
                advice = "Code that comes with a model is never run: name a model that transformers itself knows."
            elif out_of_memory(error):
                advice = "Name a smaller model."
            raise UserError(
                f"captioner {self.name!r}: expected {expected}; it could not be loaded ({one_line(error, 300)}). {advice}"
            ) from error

    # -- generating ---------------------------------------------------------------------------------------------------
    def _generate(self, requests: list[Request]) -> list[Answer | CallError]:
        """Runs in its own thread, so that the event loop keeps running. The lock keeps the model to one thread at a time."""
        with self._lock:
            self._load()
            results: list[Any] = [self._prepare(request) for request in requests]
            rows = [i for i, row in enumerate(results) if isinstance(row, _Row)]
            todo = self._batches(results, rows)
            while todo:
                batch = todo.pop(0)
                answers, failure = self._try([results[i] for i in batch])
                if failure is None:
                    for i, answer in zip(batch, answers, strict=True):
                        results[i] = answer
                elif len(batch) == 1:
                    results[batch[0]] = failure
                elif failure.kind == "out_of_memory":
                    self._most = min(self._most, (len(batch) + 1) // 2)
                    logger.warning("Out of memory with %d pictures: continuing with %d.", len(batch), self._most)
                    todo = self._batches(results, [i for rest in (batch, *todo) for i in rest])
                else:
                    # A single row may be to blame: try each one alone.
                    todo[:0] = [[i] for i in batch]
            return results

    def _batches(self, prepared: Sequence, rows: list[int]) -> list[list[int]]:
        """Numbers of prepared rows that are answered together: those with pictures, of text alone, and with a given answer."""
        kinds: tuple[list[int], ...] = ([], [], [])
        for i in rows:
            kinds[2 if prepared[i].request.forced is not None else not prepared[i].images].append(i)
        return [kind[start : start + self._most] for kind in kinds for start in range(0, len(kind), self._most)]

    def _try(self, rows: list[_Row]) -> tuple[list[Answer], Unanswerable | None]:
        """The answers, or a new error: the caught one would keep the tensors of its frames in memory."""
        try:
            return self._answers(rows), None
        except Exception as error:
            kind, message = "model_error", f"{type(error).__name__}: {one_line(error, 300)}"
            if out_of_memory(error):
                kind = "out_of_memory"
            elif isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in message:
                # After a failed kernel the process cannot use its accelerator: every later call would fail too.
                raise Fatal("model", f"the accelerator failed ({message}). Start the same command again.") from None
        if kind == "out_of_memory":
            empty_cache(self.device)
        return [], Unanswerable(kind, message)

    def _prepare(self, request: Request) -> _Row | Unanswerable:
        if found := [token for token in self._controls if token in request.prompt + (request.forced or "")]:
            # It would end the question or stand for a second picture.
            return Unanswerable("control_token", f"expected plain text as the prompt, found the token {found[0]!r}")
        try:
            images = [read_image(picture.data) for picture in request.pictures]
            return _Row(request, images, self._question(request, len(images)), self._question(request, 0))
        except BadImage as error:
            return Unanswerable("bad_image", str(error))
        except Exception as error:  # templates are programs and may raise anything
            return Unanswerable("chat_template", f"{type(error).__name__}: {one_line(error, 300)}")

    def _question(self, request: Request, pictures: int) -> str:
        content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": request.prompt}]
        return self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False, **self._chat_options
        )

    def _inputs(self, rows: list[_Row]) -> Any:
        """What the model reads of some rows, on its device."""
        tokenizer = self._processor.tokenizer
        # Most templates write the begin token themselves, and models are not trained on two of them.
        bos = tokenizer.bos_token
        special = {"add_special_tokens": False} if bos and all(row.text.startswith(bos) for row in rows) else {}
        how = {"padding": True, "padding_side": "left", "return_tensors": "pt", **special}
        pictures = [row.images for row in rows] if rows[0].images else None
        inputs = self._processor(images=pictures, text=[row.text for row in rows], **how)
        if self._decoding.guidance != 1 and pictures:
            bare = tokenizer([row.bare for row in rows], **how)
            inputs["negative_prompt_ids"], inputs["negative_prompt_attention_mask"] = (
                bare.input_ids,
                bare.attention_mask,
            )
        return inputs.to(self.device, dtype=self._model.dtype)

    def _ends(self) -> list[int]:
        """The tokens that end an answer."""
        ends = self._options.get("eos_token_id")
        ends = self._model.generation_config.eos_token_id if ends is None else ends
        ends = self._processor.tokenizer.eos_token_id if ends is None else ends
        return [ends] if isinstance(ends, int) else ends

    def _answers(self, rows: list[_Row]) -> list[Answer]:
        if rows[0].request.forced is not None:
            return [self._rated(row) for row in rows]
        model, tokenizer = self._model, self._processor.tokenizer
        ends = self._ends()
        options: dict[str, Any] = {
            "do_sample": self._temperature > 0,
            "temperature": self._temperature or None,
            **self._options,
            "max_new_tokens": max(row.request.max_tokens for row in rows),
            "eos_token_id": ends,
            "pad_token_id": tokenizer.pad_token_id,
        }
        options = {name: value for name, value in options.items() if value is not None}
        if "stop_strings" in options:
            options["tokenizer"] = tokenizer
        if self._decoding.beams is not None:
            return [self._of_group(row, ends, options) for row in rows]
        inputs = self._inputs(rows)
        if "negative_prompt_ids" in inputs:
            options["guidance_scale"] = self._decoding.guidance
        seeds = [row.request.seed for row in rows]
        with seeded(int.from_bytes(hashlib.sha256(repr(seeds).encode()).digest()[:7], "big"), self.device):
            with torch.inference_mode():
                tokens = model.generate(**inputs, **options)
        tokens = tokens[:, inputs["input_ids"].shape[1] :].tolist()
        prompts = inputs["attention_mask"].sum(dim=1).tolist()
        return [self._read(*row, ends, options) for row in zip(rows, tokens, prompts, strict=True)]

    def _rated(self, row: _Row) -> Answer:
        """How likely the model is to give a given answer: see `Request.forced`."""
        found = self._processor.tokenizer(row.request.forced, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = found["input_ids"], found["offset_mapping"]
        inputs = {name: v for name, v in self._inputs([row]).items() if not name.startswith("negative")}
        with torch.inference_mode():
            # The logits at each token are those of the next one.
            logits = self._model(**_continued(inputs, [tuple(ids)])).logits[0, -len(ids) - 1 : -1].double()
            chosen = torch.tensor(ids, dtype=torch.long, device=logits.device)[:, None]
            values = (logits.log_softmax(dim=-1).gather(1, chosen)[:, 0], logits.gather(1, chosen)[:, 0])
        told = [
            [*place, log_prob, logit]
            for place, log_prob, logit in zip(places, *(v.tolist() for v in values), strict=True)
        ]
        return Answer(json.dumps(told), "stop", self.identity()["model"], inputs["input_ids"].shape[1] + len(ids), 0)

    def _of_group(self, row: _Row, ends: list[int], options: Mapping) -> Answer:
        """The text of the group that has the number of the sample. All groups are searched at once, and kept for the others."""
        request = row.request
        place = (*(sha256(picture.data) for picture in request.pictures), request.prompt, request.max_tokens)
        if place not in self._beams:
            self._beams[place] = self._searched(row, ends, options)
            while len(self._beams) > KEPT_BEAMS:
                self._beams.popitem(last=False)
        groups, tokens_in = self._beams[place]
        return self._read(row, groups[request.sample % len(groups)], tokens_in, ends, options)

    def _searched(self, row: _Row, ends: list[int], options: Mapping) -> tuple[list[list[int]], int]:
        """The likeliest text of each group of beams, and the number of tokens of the question.

        The model reads the question again for each token: so it needs nothing that differs between kinds of models, and any option
        of `generate` that changes log-probabilities takes part.
        """
        inputs, decoding = self._inputs([row]), self._decoding
        one = {**options, "do_sample": False, "temperature": None, "max_new_tokens": 1}
        if "negative_prompt_ids" in inputs:
            one["guidance_scale"] = decoding.guidance

        def log_probs(prefixes: Sequence[tuple[int, ...]]):
            with torch.inference_mode():
                found = self._model.generate(
                    **_continued(inputs, prefixes), **one, output_scores=True, return_dict_in_generate=True
                )
                return found.scores[0].double().log_softmax(dim=-1).cpu().numpy()

        size, most = (decoding.beams, decoding.groups, decoding.diversity), row.request.max_tokens
        found = diverse_beams(log_probs, *size, ends=ends, most=most)
        return [list(group[0].tokens) for group in found], inputs["input_ids"].shape[1]

    def _read(self, row: _Row, ids: list[int], tokens_in: int, ends: Sequence[int], options: Mapping) -> Answer:
        """The answer of one row. The batch ran up to its largest token limit, or until its last row ended."""
        tokenizer = self._processor.tokenizer
        ids = ids[: row.request.max_tokens]
        end = next((i for i, token in enumerate(ids) if token in ends), None)
        if end is not None:
            ids = ids[: end + 1]
        elif "stop_strings" in options:
            while ids and ids[-1] == tokenizer.pad_token_id:
                ids = ids[:-1]
        # Decoding leaves out special tokens. If the end of a thought is one, the thought would read as the answer.
        closes = tokenizer.get_added_vocab().get(THOUGHT)
        split = ids.index(closes) if closes in ids else None
        parts = [ids] if split is None else [ids[:split], ids[split + 1 :]]
        text = THOUGHT.join(tokenizer.decode(part, skip_special_tokens=True) for part in parts)
        if row.text.rstrip().endswith(THINK):
            text = THINK + text  # the template opened the block
        if split is not None:
            thought = split + 1
        elif THOUGHT in text:  # written in several tokens
            thought = len(ids) * (text.index(THOUGHT) + len(THOUGHT)) // len(text)
        else:
            thought = len(ids) if THINK in text else 0
        strings = options.get("stop_strings", ())
        stopped = end is not None or any(s in text for s in ([strings] if isinstance(strings, str) else strings))
        return Answer(
            text=text,
            finish_reason="stop" if stopped else "length",
            model=self.identity()["model"],
            tokens_in=tokens_in,
            tokens_out=len(ids),
            thinking_tokens=thought,
        )


def _continued(inputs: Mapping[str, torch.Tensor], prefixes: Sequence[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """What the model reads of one row (`inputs`), once for each beginning of an answer. All of them have the same length."""
    count, result = len(prefixes), {}
    ids = torch.tensor(prefixes, dtype=torch.long).reshape(count, -1)
    for name, value in inputs.items():
        value = value.repeat(count, *[1] * (value.dim() - 1))
        if name in ("input_ids", "negative_prompt_ids"):
            value = torch.cat([value, ids.to(value)], dim=1)
        elif name in ("attention_mask", "negative_prompt_attention_mask"):
            value = torch.cat([value, torch.ones_like(ids).to(value)], dim=1)
        elif value.shape[1:] == inputs["input_ids"].shape[1:]:  # kinds of tokens: an answer has none of a picture
            value = torch.cat([value, torch.zeros_like(ids).to(value)], dim=1)
        result[name] = value
    return result


def _sample(path: Path) -> str:
    """A digest of a small file, or of evenly spread windows of a large one, since fine-tuning may keep some tensors."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        if size <= WINDOWS * WINDOW:
            digest.update(file.read())
        else:
            for i in range(WINDOWS):
                file.seek((size - WINDOW) * i // (WINDOWS - 1))
                digest.update(file.read(WINDOW))
    return digest.hexdigest()
