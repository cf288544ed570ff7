"""Frozen towers, and trunks of towers, during training: inputs are encoded once instead of in every epoch, see `model.features`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from transformers.trainer_callback import TrainerCallback

from ..core.console import is_main, say
from ..core.errors import UserError
from ..data.cache import Features
from ..data.views import ImageView, TrainingView, text_rows
from ..model.collator import MMFTDataCollator
from ..model.features import (
    Encoding,
    encode_pictures_once,
    encode_texts_once,
    prepare_texts,
    sorted_distinct,
    weights_digest,
)
from ..model.loading import head_of
from ..model.towers import TOWERS
from .config import MMFTConfig

NAMES = {"embeds": "{} tower", "trunk": "trunk of the {} tower"}  # of the parts of a tower


class FrozenTowers(TrainerCallback):
    """Finds the frozen towers of a model, encodes their inputs once, and gives the embeddings to the data views.

    A tower is frozen if none of its parameters is trained. If its projection alone is, its trunk is frozen: what is kept then is
    the pooled output that the projection reads. Frozen towers with dropout are encoded in every step, since they compute
    something else each time. (The Trainer keeps batch norms in evaluation mode.)

    Args:
        args: `cache_frozen_features=False` turns this off.
        collator: so does a collator that is not an `MMFTDataCollator`, which may not expect embeddings.
    """

    def __init__(self, model, processor, args: MMFTConfig, collator: Callable):
        self.model, self.processor, self.args, self.collator = model, processor, args, collator
        on = args.cache_frozen_features and isinstance(collator, MMFTDataCollator)
        self.used = [tower for tower in TOWERS if on and (tower == "vision" or collator.texts)]
        self.towers: dict[str, str] | None = None  # which part of a tower is kept: `embeds` or `trunk`
        self._made: dict[tuple, tuple] = {}
        # The weights that a tower or a trunk was encoded with: parameter versions, cheap to compare, and a digest, which is certain.
        self._states: dict[str, tuple] = {}
        self._say_once = cache(say)

    def attach(self, view: ImageView, dataset: Dataset) -> None:
        """Gives a view of `dataset` the features of the frozen towers. All processes must call; a repeated call is free."""
        training = isinstance(view, TrainingView)
        if training and getattr(self.collator, "texts", True):
            texts = {text for row in text_rows(dataset) for text in view.texts.possible_texts(row)}
            texts.update(getattr(self.collator, "class_texts", ()))
            prepare_texts(self.processor, texts, self._how())
        if training or self.towers is None:
            parts = {tower: self._frozen_part(tower) for tower in self.used}
            self.towers = {tower: part for tower, part in parts.items() if part}
        if part := self.towers.get("vision"):
            if training and (view.crop_min_area < 1 or view.horizontal_flip):
                flips = " --horizontal_flip false" if view.horizontal_flip else ""
                self._say_once(
                    f"The {NAMES[part].format('vision')} is frozen, but random crops differ in every epoch and must be encoded "
                    f"again. To encode each picture once, type --crop_min_area 1{flips}."
                )
            elif features := self._images(view, dataset):
                view.use_features(features, part)
        if (part := self.towers.get("text")) and training and (texts := self._texts(view, dataset)):
            view.use_text_features(*texts, part)

    def on_train_begin(self, args, state, control, **kwargs):
        """Refuses a checkpoint whose frozen tower differs from the one that was encoded."""
        for tower, part in (self.towers or {}).items():
            if not self._same_weights(tower):
                raise UserError(
                    f"resume_from_checkpoint: expected the {NAMES[part].format(tower)} of the model, which is frozen and was "
                    "encoded before, found another one in the checkpoint. Load the model that the run was started with, or type "
                    "--cache_frozen_features false."
                )

    def _frozen_part(self, tower: str) -> str | None:
        """The part of a tower that is frozen and can be kept: `embeds` (all of it), `trunk`, or None."""
        head = f"{head_of(self.model, tower)}."
        trained = [name for name, p in self._parameters(tower) if p.requires_grad]
        if any(not name.startswith(head) for name in trained):
            return None
        part = "trunk" if trained else "embeds"
        if has_dropout(self.model, tower):
            what = NAMES[part].format(tower)
            self._say_once(f"The {what} is frozen, but has dropout: it is encoded again in every step.")
            return None
        return part

    def _parameters(self, tower: str, part: str = "embeds"):
        """Names and parameters of a tower, without its projection if `part` is `trunk`."""
        without = f"{head_of(self.model, tower)}." if part == "trunk" else ()
        for name, parameter in self.model.named_parameters():
            if name.startswith(TOWERS[tower]) and not name.startswith(without):
                yield name, parameter

    def _same_weights(self, tower: str) -> bool:
        """Whether a tower, or its trunk, still has the weights that it was encoded with; True if it was not encoded."""
        part = self.towers[tower]
        if (tower, part) not in self._states or _sharded(self.model):
            return True
        versions, digest = self._states[tower, part]
        now = self._versions(tower, part)
        if now != versions:  # something was written to them, perhaps the same values from a checkpoint
            if weights_digest(self.model, tower, part == "trunk") != digest:
                return False
            self._states[tower, part] = now, digest
        return True

    def _versions(self, tower: str, part: str) -> list[tuple]:
        return [(id(p), p._version) for _, p in self._parameters(tower, part)]

    def _images(self, view: ImageView, dataset: Dataset) -> Features | None:
        # Not the training view, which draws captions and passes over bad pictures.
        plain = ImageView(dataset, view.on_bad_image, view.name, view.short_side)
        key = ("vision", self.towers["vision"], view.name, id(dataset))
        return self._once(key, dataset, encode_pictures_once, plain, f"{view.name} images")

    def _texts(self, view: TrainingView, dataset: Dataset) -> tuple[dict[str, int], Features] | None:
        texts = sorted_distinct(text for row in text_rows(dataset) for text in view.texts.possible_texts(row))
        key = ("text", self.towers["text"], view.texts, id(dataset))
        features = self._once(key, dataset, encode_texts_once, texts, "training texts")
        return features and ({text: i for i, text in enumerate(texts)}, features)

    def _how(self) -> Encoding:
        progress = is_main() and not self.args.disable_tqdm
        autocast = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        workers, batch_size = self.args.dataloader_num_workers, self.args.per_device_eval_batch_size
        return Encoding(batch_size, workers, autocast, shard=True, progress=progress)

    def _once(self, key: tuple, dataset: Dataset, encode: Callable, inputs, what: str) -> Features | None:
        """What `encode` makes of the inputs, computed once per key; prints how many were encoded and how long it took."""
        tower, part = key[:2]
        if not self._same_weights(tower):
            self._made = {other: made for other, made in self._made.items() if other[:2] != (tower, part)}
        if key in self._made:
            return self._made[key][1]
        if _sharded(self.model):
            return None
        start = time.monotonic()
        how = replace(self._how(), trunk=part == "trunk")
        features = encode(self.model, self.processor, inputs, how)
        done = "read from the cache" if features.hit else "encoded once"
        name = NAMES[part].format(tower)
        say(f"Frozen {name}: {len(features.embeds):,} {what} {done} in {time.monotonic() - start:.1f} s.")
        # Holds the dataset, so that its id is not reused.
        self._made[key] = (dataset, features)
        self._states[tower, part] = self._versions(tower, part), weights_digest(self.model, tower, how.trunk)
        return features


def has_dropout(model, tower: str) -> bool:
    """Whether a tower has dropout, so that even a frozen one computes something else in every training step."""
    for name, module in model.named_modules():
        if f"{name}.".startswith(TOWERS[tower]):
            rates = (getattr(module, key, 0) for key in ("p", "dropout", "attention_dropout", "drop_path"))
            if any(isinstance(rate, float) and rate > 0 for rate in rates):
                return True
    return False


def _sharded(model) -> bool:
    """Whether the weights are sharded over processes (FSDP, DeepSpeed stage 3), so that no tower can run alone.

    A model of FSDP counts also where its weights are gathered for a while.
    """
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return True
    return any(
        hasattr(p, "_local_tensor") or hasattr(p, "ds_id") or "_fsdp" in name for name, p in model.named_parameters()
    )
