"""The scorer: a dual encoder that embeds the images and captions of a split for the steps that write scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset, Image
from PIL.Image import Image as PILImage

from ...core.markdown import public_name
from ...data.images import read_image
from ...data.sentences import sentences_of
from ...data.views import ImageView
from ...model.features import (
    BATCH_SIZE,
    Encoding,
    encode_pictures_once,
    encode_texts_once,
    image_embeddings,
    sorted_distinct,
    weights_digest,
)
from ...model.loading import load_model, logit_scale
from ...model.opening import default_device
from ..ask.pictures import part

BLOCK = 32 * BATCH_SIZE  # pictures or texts that are encoded between two files of the cache


class _Parts(ImageView):
    """Pictures of which a part is shown."""

    def __init__(self, rows: Dataset, region: str):
        super().__init__(rows, "skip", "scored")
        self.region = region

    def _picture(self, source):
        return part(super()._picture(source), self.region)


class Scorer:
    """Embeds with a model (`base.Embeddings`). What is encoded is kept on disk in blocks, so that a run continues after a kill.

    Args:
        name: Hub id, folder or embedded model.
        images: columns `image` and `label`, in an order that depends on the pictures alone: batches, and with them the last
            bits of embeddings, follow it.
        progress: whether bars are shown.
        flag: the setting that names the model, for messages.

    Raises:
        UserError: no such model.
    """

    def __init__(self, name: str, images: Dataset, progress: bool = False, flag: str = "--scorer"):
        self.name, self._rows = name, images
        self.model, self.processor = load_model(name, flag=flag)
        self.model.to(default_device())
        self.scale = logit_scale(self.model).item()
        self._how = Encoding(progress=progress)
        self._images: dict[str, np.ndarray] = {}
        self._texts: dict[str, np.ndarray] = {}

    def identity(self) -> dict:
        """The model's name and the sha256 of the weights of both towers."""
        return {"model": public_name(self.name), **{t: weights_digest(self.model, t) for t in ("vision", "text")}}

    def images(self, region: str = "whole") -> np.ndarray:
        """See `base.Embeddings`."""
        if region not in self._images:
            parts = []
            for start in range(0, len(self._rows), BLOCK):
                rows = self._rows.select(range(start, min(start + BLOCK, len(self._rows))))
                view = _Parts(rows, region)
                found = encode_pictures_once(self.model, self.processor, view, self._how)
                parts.append(np.where(found.flags.numpy()[:, None], found.embeds.numpy(), np.float32(0)))
            self._images[region] = np.concatenate(parts)
        return self._images[region]

    def picture(self, row: int) -> PILImage:
        """See `base.Embeddings`."""
        return read_image(self._rows[row]["image"])

    def encode(self, pictures: Sequence[PILImage]) -> np.ndarray:
        """See `base.Embeddings`. Nothing is cached."""
        columns = {"image": list(pictures), "label": [0] * len(pictures)}
        rows = Dataset.from_dict(columns).cast_column("image", Image())
        return np.concatenate(
            [embeds.cpu().numpy() for embeds, _ in image_embeddings(self.model, self.processor, rows)]
        )

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
        sentences = {text: parts for text in long if whole and len(parts := sentences_of(text)) > 1}
        if sentences:
            self._encode([s for parts in sentences.values() for s in parts if s not in self._texts], whole=False)
            for text, parts in sentences.items():
                self._texts[text] = np.mean([self._texts[part] for part in parts], axis=0)
