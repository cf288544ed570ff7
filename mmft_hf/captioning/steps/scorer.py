"""The scorer: a dual encoder that embeds the images and captions of a split for the steps that write scores."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from datasets import Dataset

from ...core.markdown import public_name
from ...data.views import ImageView
from ...model.features import (
    BATCH_SIZE,
    Encoding,
    encode_pictures_once,
    encode_texts_once,
    sorted_distinct,
    weights_digest,
)
from ...model.loading import default_device, load_model, logit_scale
from ..judge.cleaning import sentence_ends

BLOCK = 32 * BATCH_SIZE  # pictures or texts that are encoded between two files of the cache


class Scorer:
    """Embeds with a model (`base.Embeddings`). What is encoded is kept on disk in blocks, so that a run continues after a kill.

    Args:
        name: Hub id, folder or embedded model.
        images: columns `image` and `label`, in an order that depends on the pictures alone: batches, and with them the last
            bits of embeddings, follow it.
        progress: whether bars are shown.

    Raises:
        UserError: no such model.
    """

    def __init__(self, name: str, images: Dataset, progress: bool = False):
        self.name, self._rows = name, images
        self.model, self.processor = load_model(name)
        self.model.to(default_device())
        self.scale = logit_scale(self.model).item()
        self._how = Encoding(progress=progress)
        self._images: np.ndarray | None = None
        self._texts: dict[str, np.ndarray] = {}

    def identity(self) -> dict:
        """The model's name and the sha256 of the weights of both towers."""
        return {"model": public_name(self.name), **{t: weights_digest(self.model, t) for t in ("vision", "text")}}

    def images(self) -> np.ndarray:
        """See `base.Embeddings`."""
        if self._images is None:
            parts = []
            for start in range(0, len(self._rows), BLOCK):
                rows = self._rows.select(range(start, min(start + BLOCK, len(self._rows))))
                view = ImageView(rows, "skip", "scored")
                found = encode_pictures_once(self.model, self.processor, view, self._how)
                parts.append(np.where(found.flags.numpy()[:, None], found.embeds.numpy(), np.float32(0)))
            self._images = np.concatenate(parts)
        return self._images

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """See `base.Embeddings`."""
        self._encode([text for text in texts if text not in self._texts])
        return np.stack([self._texts[text] for text in texts])

    def _encode(self, texts: Sequence[str], whole: bool = True) -> None:
        """Encodes texts; with `whole`, those that the text tower would cut are encoded by sentence."""
        distinct, long = sorted_distinct(texts), []
        for start in range(0, len(distinct), BLOCK):
            block = distinct[start : start + BLOCK]
            found = encode_texts_once(self.model, self.processor, block, self._how)
            self._texts |= dict(zip(block, found.embeds.numpy(), strict=True))
            long += [text for text, cut in zip(block, found.flags.tolist(), strict=True) if cut]
        sentences = {text: parts for text in long if whole and len(parts := _sentences(text)) > 1}
        if sentences:
            self._encode([s for parts in sentences.values() for s in parts if s not in self._texts], whole=False)
            for text, parts in sentences.items():
                self._texts[text] = np.mean([self._texts[part] for part in parts], axis=0)


def _sentences(text: str) -> list[str]:
    ends = [0, *sentence_ends(text), len(text)]
    return [part for a, b in pairwise(ends) if (part := text[a:b].strip())]
