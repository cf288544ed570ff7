"""Encodes pictures and texts in batches, and caches the embeddings of towers that do not change.

A cache file's name is a hash of everything that its content depends on. All methods on frozen features share it. Shapes: `n` pictures or texts, `D` embedding size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL
import torch
import torch.distributed as dist
import transformers
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..core.console import is_main
from ..core.distributed import communication_device, process_index, world_size
from ..core.errors import UserError
from ..data.cache import Features, cache_folder, keep
from ..data.images import content_hash
from ..data.labels import labels_of
from ..data.sampling import IGNORED, is_example
from ..data.vectors import KeptVectors
from ..data.views import ImageView
from ..version import __version__
from .adapted_processor import AdaptedProcessor
from .collator import MMFTDataCollator, PreparedRows, tokenize
from .loading import encode_images, encode_texts, head_of, run_head, run_trunk
from .opening import tensor_bytes, tensors_digest, tokenizer_identity
from .towers import TOWERS

if TYPE_CHECKING:
    from .caption_encoder import CaptionEncoder

logger = logging.getLogger(__name__)

BATCH_SIZE = 256
# Version of the files and their keys; to be raised with every change of either.
FORMAT = 1


@dataclass(frozen=True)
class Encoding:
    """How pictures or texts are encoded.

    Args:
        batch_size: pictures or texts per batch.
        workers: processes that read pictures.
        autocast: type to compute in; default float32.
        shard: every process encodes its share of the batches, and all of them must call; otherwise each encodes its own.
        folder: of the files; default `features` of the cache (`cache.cache_folder`).
        progress: whether a bar is shown.
        trunk: whether pooled outputs of the towers are kept, which their projections read (`loading.run_trunk`), instead of
            embeddings.
    """

    batch_size: int = BATCH_SIZE
    workers: int = 0
    autocast: torch.dtype | None = None
    shard: bool = False
    folder: Path | None = None
    progress: bool = False
    trunk: bool = False


def image_features(
    model,
    processor,
    dataset: Dataset,
    batch_size: int = BATCH_SIZE,
    on_bad_image: str = "fail",
    name: str = "evaluation",
    **options,
) -> tuple[Tensor, Tensor]:
    """Unit-norm embeddings `(n, D)` of all pictures and their labels `(n,)` or `(n, C)` (-100: unreadable), in row order, on the CPU.

    They are read from the cache where it has them, and are then bit for bit what was encoded: the key covers the image
    tower's weights, the model's configuration, the image processor, precision, batch size, every picture's bytes, and the
    versions and the device that compute.

    Args:
        dataset: with columns `image` and `label`.
        options: of `Encoding`. With `trunk` the cache has what the projection reads, whatever its weights, and it is run anew.

    Raises:
        UserError: a bad picture, with `on_bad_image="fail"`.
    """
    how = Encoding(batch_size, **options)
    features = encode_pictures_once(model, processor, ImageView(dataset, on_bad_image, name), how)
    labels = torch.from_numpy(labels_of(dataset))
    labels[~features.flags] = IGNORED
    if not how.trunk:
        return features.embeds, labels
    with torch.no_grad():
        parts = [run_head(model, "vision", part.to(model.device)).cpu() for part in features.embeds.split(batch_size)]
    return torch.cat(parts), labels


def text_features(model, processor, texts: Sequence[str], batch_size: int = BATCH_SIZE, **options) -> Tensor:
    """Unit-norm embeddings `(len(texts), D)` of texts, cached as in `image_features`; equal texts are encoded once."""
    distinct = sorted_distinct(texts)
    features = encode_texts_once(model, processor, distinct, Encoding(batch_size, **options))
    position = {text: i for i, text in enumerate(distinct)}
    return features.embeds[[position[text] for text in texts]]


def sorted_distinct(texts: Iterable[str]) -> list[str]:
    """Each text once, by length: batches of them are hardly padded."""
    return sorted(set(texts), key=lambda text: (len(text), text))


def encode_pictures_once(model, processor, view: ImageView, how: Encoding) -> Features:
    """`Features` of the pictures of a view, in row order; `flags` says which are readable."""
    batches = _batches(len(view), how.batch_size)
    mine = _share(batches, how.shard)
    rows = view.rows.select_columns("image")

    def digest(batch: range) -> bytes:
        pictures = rows[batch.start : batch.stop]["image"]
        return hashlib.sha256(b"".join(content_hash(picture) for picture in pictures)).digest()

    with ThreadPoolExecutor(8) as threads:  # reading and hashing leave the interpreter free
        digests = list(threads.map(digest, mine))
    settings = {
        **_computation(model, "vision", how),
        "processor": _plain(processor.image_processor.to_dict()),
        "on_bad_image": view.on_bad_image,
        "decode_cache": view.short_side,
        **({"region": view.region} if view.region != "whole" else {}),  # keys of whole pictures stay what they were
    }

    def encode() -> Iterator[tuple[Tensor, Tensor]]:
        # A separate generator: a pass must not change the random numbers of the training around it.
        random = torch.Generator()
        options = (how.workers, how.progress, random, how.trunk)
        for embeds, labels in encode_image_batches(model, processor, view, mine, *options):
            yield embeds, is_example(labels)

    return _once(model, "images", settings, digests, batches, encode, how)


def encode_texts_once(model, processor, texts: list[str], how: Encoding) -> Features:
    """`Features` of `sorted_distinct` texts, in their order; `flags` says which were truncated at the tower's limit."""
    batches = _batches(len(texts), how.batch_size)
    mine = _share(batches, how.shard)
    settings = {**_computation(model, "text", how), "tokenizer": _text_inputs(processor)}
    digests = [hashlib.sha256(json.dumps(texts[b.start : b.stop]).encode()).digest() for b in mine]

    def encode() -> Iterator[tuple[Tensor, Tensor]]:
        own = [text for batch in mine for text in texts[batch.start : batch.stop]]
        return encode_text_batches(model, processor, own, how.batch_size, how.progress, trunk=how.trunk)

    return _once(model, "texts", settings, digests, batches, encode, how)


def prepare_texts(processor, texts: Iterable[str], how: Encoding) -> None:
    """Encodes the texts whose vectors the processor of an AdaptedCLIP does not know yet. For other processors it does nothing.

    Afterwards the caption encoder is closed. With `how.shard` all processes must call this.
    """
    if not isinstance(processor, AdaptedProcessor):
        return
    trunk = processor.trunk
    unknown = trunk.unknown(texts)
    if how.shard and world_size() > 1:  # each may know some that it has met alone
        everyone: list = [None] * world_size()
        dist.all_gather_object(everyone, unknown)
        unknown = sorted_distinct(text for own in everyone for text in own)
    if not unknown:
        return
    found = encode_captions_once(trunk.open(len(unknown)), unknown, how)
    trunk.keep(unknown, found.embeds, found.flags)
    trunk.close()


def encode_captions_once(encoder: CaptionEncoder, texts: list[str], how: Encoding) -> Features:
    """`Features` of `sorted_distinct` texts by a caption encoder, in their order; `flags` says which were truncated.

    An encoder may be large, and its texts many. Each vector is therefore kept by its text, for every data set that has it, as
    soon as its batch is computed; a run that was killed goes on from there. Vectors are rounded to half precision. They are
    computed in the precision of the encoder's weights, whatever `how.autocast` is.

    Raises:
        UserError: a vector is not finite in half precision.
    """
    identity = encoder.identity()
    key = _key({"format": (FORMAT, __version__), **identity, "base": None}, [], 0, how.shard)
    store = KeptVectors((how.folder or cache_folder("features")) / f"captions-{key}", encoder.size)
    start = time.monotonic()
    vectors, cut, there = store.read(texts)
    if how.shard and world_size() > 1:  # another machine's disk may lack some; all must encode the same ones
        everyone: list = [None] * world_size()
        dist.all_gather_object(everyone, there)
        there = np.logical_and.reduce(everyone)
    # The batches of the whole list, without what is there: the rest of a run that was killed is encoded as it would have been.
    batches = [[i for i in batch if not there[i]] for batch in _batches(len(texts), how.batch_size)]
    batches = [batch for batch in batches if batch]
    parts = []
    for batch in tqdm(
        _share(batches, how.shard), desc="Caption encoder", disable=not how.progress, leave=False, delay=1
    ):
        own = [texts[i] for i in batch]
        embeds, flags = encoder.encode_batch(own)
        if not (embeds := embeds.half()).isfinite().all():
            raise UserError(
                f"caption encoder {identity['base']}: expected vectors that are finite in half precision, found others. Let it normalize "
                "them (normalize=True), or take another model."
            )
        store.append(own, embeds.numpy(), flags.numpy())
        parts.append((embeds, flags))
    if batches:
        sizes, rows = [len(batch) for batch in batches], [i for batch in batches for i in batch]
        columns = (gather_rows_in_order([part[i] for part in parts], sizes, how.shard) for i in (0, 1))
        vectors[rows], cut[rows] = (column.numpy() for column in columns)
    new = sum(map(len, batches))
    read = f", {len(texts) - new:,} of them read from the cache" if new < len(texts) else ""
    note = f"; {cut.sum():,} truncated at {encoder.max_length} tokens" if cut.any() else ""
    if is_main():
        logger.warning(
            "Caption encoder: %s texts%s in %.1f s%s.", f"{len(texts):,}", read, time.monotonic() - start, note
        )
    return Features(torch.from_numpy(vectors).float(), torch.from_numpy(cut), not new)


# -- one loop for pictures, one for texts ----------------------------------------------------------------------------
@torch.no_grad()
def encode_image_batches(
    model,
    processor,
    view: ImageView,
    batches: Sequence[Sequence[int]],
    workers: int = 0,
    progress: bool = False,
    generator: torch.Generator | None = None,
    trunk: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields unit-norm embeddings `(B, D)` on the model's device, and labels `(B,)` or `(B, C)` (-100: unreadable), of batches.

    Args:
        trunk: yields what the tower's projection reads, `(B, H)`, instead of embeddings.
    """
    encode = partial(run_trunk, model, "vision") if trunk else partial(encode_images, model)
    collator = MMFTDataCollator(processor)
    rows = PreparedRows(view, collator)
    loader = DataLoader(rows, batch_sampler=batches, collate_fn=collator, num_workers=workers, generator=generator)
    model.eval()
    for batch in tqdm(loader, desc=f"{view.name.capitalize()} images", disable=not progress, leave=False, delay=1):
        yield encode(batch["pixel_values"].to(model.device)), batch["labels"]


@torch.no_grad()
def encode_text_batches(
    model,
    processor,
    texts: Sequence[str],
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
    name: str = "Texts",
    trunk: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields unit-norm embeddings `(B, D)` on the model's device, and which texts were truncated, bool `(B,)`.

    Args:
        trunk: as in `encode_image_batches`.
    """
    prepare_texts(processor, texts, Encoding(batch_size))
    encode = partial(run_trunk, model, "text") if trunk else partial(encode_texts, model)
    model.eval()
    for batch in tqdm(_batches(len(texts), batch_size), desc=name, disable=not progress, leave=False, delay=1):
        tokens, truncated = tokenize(processor, texts[batch.start : batch.stop])
        yield encode(*(v.to(model.device) for v in tokens.values())), truncated


def image_embeddings(
    model,
    processor,
    dataset: Dataset,
    batch_size: int = BATCH_SIZE,
    on_bad_image: str = "fail",
    workers: int = 0,
    progress: bool = False,
    name: str = "evaluation",
    rows: Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What `encode_image_batches` yields for `rows` of a dataset, or for all of them; nothing is cached."""
    rows = range(len(dataset)) if rows is None else rows
    batches = [rows[batch.start : batch.stop] for batch in _batches(len(rows), batch_size)]
    return encode_image_batches(model, processor, ImageView(dataset, on_bad_image, name), batches, workers, progress)


# -- one pass --------------------------------------------------------------------------------------------------------
def _once(
    model,
    kind: str,
    settings: dict,
    digests: list[bytes],
    batches: list[range],
    encode: Callable[[], Iterator[tuple[Tensor, Tensor]]],
    how: Encoding,
) -> Features:
    """Reads the file for `settings` and `digests`; if there is none, collects what `encode` yields and writes it."""
    shard, autocast = how.shard, how.autocast
    key = _key(settings, digests, len(batches), shard)
    path = (how.folder or cache_folder("features")) / f"{kind}-{key}.safetensors"
    found = _read(path, key)
    # Another machine's disk may lack the file; then all processes encode, since all must gather.
    if _everywhere(found is not None, shard):
        return Features(found["embeds"], found["flags"], True)
    parts = []
    training = model.training
    precision = torch.autocast(model.device.type, autocast) if autocast else contextlib.nullcontext()
    with precision:
        for embeds, flags in encode():
            parts.append((embeds.float().cpu(), flags.cpu()))
    model.train(training)

    sizes = [len(batch) for batch in batches]
    first = not shard or int(os.environ.get("LOCAL_RANK", "0")) == 0

    def gathered(keep: bool) -> dict[str, Tensor]:
        columns = ([part[i] for part in parts] for i in (0, 1))
        embeds, flags = (gather_rows_in_order(column, sizes, shard, keep) for column in columns)
        return {"embeds": embeds, "flags": flags}

    whole = gathered(first)
    if first:
        metadata = {"key": key, "sha256": _checksum(whole)}
        keep(path, lambda file: save_file(whole, file, metadata))
    _everywhere(True, shard)  # a barrier: from here on the file exists, if it could be written
    found = _read(path, key)
    if not _everywhere(found is not None, shard):
        found = whole if first else None
        if not _everywhere(found is not None, shard):
            found = gathered(True)
    return Features(found["embeds"], found["flags"], False)


def gather_rows_in_order(parts: list[Tensor], sizes: list[int], shard: bool, keep: bool = True) -> Tensor | None:
    """Gathers all rows on the CPU; batch `i` of `sizes[i]` rows is in `parts` of process `i mod W`.

    One batch is sent at a time, so only the processes with `keep` hold more than their own share.

    Returns:
        `(sum(sizes), ...)`; None without `keep`.
    """
    if not shard or world_size() == 1:
        return torch.cat(parts) if parts else torch.zeros(0, 0)
    rank, world, device = process_index(), world_size(), communication_device()
    shapes: list = [None] * world
    dist.all_gather_object(shapes, (parts[0].shape[1:], parts[0].dtype) if parts else None)
    shape, dtype = next((s for s in shapes if s is not None), ((0,), torch.float32))
    whole = torch.empty(sum(sizes), *shape, dtype=dtype) if keep else None
    start = 0
    for i, size in enumerate(sizes):
        mine = i % world == rank
        rows = parts[i // world].to(device) if mine else torch.empty(size, *shape, dtype=dtype, device=device)
        dist.broadcast(rows, src=i % world)
        if keep:
            whole[start : start + size] = rows.cpu()
        start += size
    return whole


def _batches(n: int, size: int) -> list[range]:
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


def _share(batches: list[range], shard: bool) -> list[range]:
    """The batches of this process: whole ones, so that the result is bit-equal to that of one process; every W-th, since
    long texts come last."""
    return batches[process_index() :: world_size()] if shard else batches


def _everywhere(value: bool, shard: bool) -> bool:
    """Whether `value` is true in every process; also a barrier."""
    if not shard or world_size() == 1:
        return value
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return all(values)


# -- files -----------------------------------------------------------------------------------------------------------
def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors of a file, mapped into memory; None if it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in ("embeds", "flags")}
        if metadata["key"] != key or metadata["sha256"] != _checksum(tensors):
            raise ValueError("its content is not what was written")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s) and is computed again.", path, error)
        return None
    return tensors


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


# -- the key ---------------------------------------------------------------------------------------------------------
def _key(settings: dict, digests: list[bytes], batches: int, shard: bool) -> str:
    mine = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).digest()
    if shard and world_size() > 1:
        everyone: list = [None] * world_size()
        dist.all_gather_object(everyone, (mine, digests))
        if any(other != mine for other, _ in everyone):
            raise UserError(
                "frozen features: expected the same model and settings in every process, found different ones. Load the "
                "same weights in all of them, or type --cache_frozen_features false."
            )
        digests = [everyone[i % world_size()][1][i // world_size()] for i in range(batches)]
    return hashlib.sha256(mine + b"".join(digests)).hexdigest()


def _computation(model, tower: str, how: Encoding) -> dict:
    """Everything that the embeddings of a tower depend on besides its inputs.

    This includes versions, device, attention and batch size: other kernels sum in another order, and what is read from
    disk must equal a fresh pass to the last bit. An update therefore costs one pass.
    """
    device = model.device.type
    towers = (model.config, *(getattr(model.config, f"{t}_config", None) for t in TOWERS))
    return {
        "format": (FORMAT, __version__),
        "weights": weights_digest(model, tower, how.trunk),
        **({"part": "trunk"} if how.trunk else {}),
        "config": _plain(model.config.to_dict()),
        "attention": [getattr(config, "_attn_implementation", None) for config in towers],
        "precision": str(how.autocast or torch.float32),
        "matmul": [getattr(torch.backends, "fp32_precision", None), _matmul_precision()],
        "batch_size": how.batch_size,
        "device": torch.cuda.get_device_name(model.device) if device == "cuda" else device,
        "versions": [torch.__version__, transformers.__version__, PIL.__version__],
    }


def _matmul_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set through torch.backends.*.fp32_precision, which is also in the key
        return None


def weights_digest(model, tower: str, trunk: bool = False) -> str:
    """sha256 of a tower's weights, with its projection unless `trunk`: names, types, shapes, bytes."""
    without = f"{head_of(model, tower)}." if trunk else ()
    state = model.state_dict().items()
    return tensors_digest({n: v for n, v in state if n.startswith(TOWERS[tower]) and not n.startswith(without)})


def _plain(settings: dict) -> dict:
    """Settings on which no embedding depends are left out: names of files, classes and versions, and what the Trainer sets."""
    names = "id2label label2id transformers_version architectures dtype problem_type processor_class use_cache".split()
    return {
        key: _plain(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if not (key in names or str(key).startswith("_"))
    }


def _text_inputs(processor) -> list | dict:
    """What the inputs of a text tower depend on besides the texts."""
    if isinstance(processor, AdaptedProcessor):
        return processor.trunk.known_as
    return tokenizer_identity(processor.tokenizer)
