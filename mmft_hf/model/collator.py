"""From rows to tensors: pictures and texts, just in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from ..data.sampling import IGNORED
from .families import is_padded


def tokenize(
    processor: ProcessorMixin, texts: Sequence[str], padding: bool | str = True
) -> tuple[dict[str, Tensor], Tensor]:
    """Tokenises texts, cut at the text tower's limit with the end token kept.

    SigLIP was trained on lower-case texts padded to the limit, whose pads its text tower reads, so it gets just that.

    Args:
        padding: True to the longest of them, `max_length` to the limit.

    Returns:
        `{"input_ids", "attention_mask"}`, both `(B, T)`, of SigLIP without the mask; and `cut`, bool `(B,)`: which texts
        lost tokens.
    """
    padded = is_padded(processor)
    texts = [text.lower() for text in texts] if padded else list(texts)
    tokenizer = processor.tokenizer
    padding = "max_length" if padded else padding
    tokens = tokenizer(texts, padding=padding, truncation=True, return_tensors="pt")
    if tokens.encodings is not None:
        cut = [bool(encoding.overflowing) for encoding in tokens.encodings]
    else:  # a tokenizer in Python does not say
        whole = tokenizer(texts, verbose=False)["input_ids"]
        cut = [len(ids) > tokenizer.model_max_length for ids in whole]
    names = ("input_ids",) if padded else ("input_ids", "attention_mask")
    return {name: tokens[name] for name in names}, torch.tensor(cut)


def input_size(processor: ProcessorMixin) -> tuple[int, int] | None:
    """Width and height in pixels of what the image tower sees; None where pictures keep their proportions."""
    image_processor = processor.image_processor
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", False) else image_processor.size
    return (size["width"], size["height"]) if "width" in size else None


@dataclass
class MMFTDataCollator:
    """Batches of images, with one text each in training.

    Args:
        processor: of the model; resizes, crops and normalises, and tokenises.
        distinct_texts: each text is tokenised (and so encoded) once, however many images of the batch have it.
        pad_to_limit: texts are padded to the tower's limit, so that every batch has the same shapes, for `torch.compile`.

    Each row has `image` (a PIL image; None for one that could not be read) and `label`. A row of training also has
    `text`, and `box` (left, top, right, bottom in pixels): the crop that is resized to the model's input. Without a box
    the processor's own resize and centre crop apply. `skipped` counts unreadable images that the row stands for.

    Returns:
        `pixel_values` `(B, 3, height, width)`, `labels` `(B,)` (-100 where the image is None), `skipped` `(B,)`, and in
        training `input_ids`, `attention_mask` `(B, T)` and `captions_cut` `(B,)`. With `distinct_texts` these are `(U, T)`,
        of the U distinct texts, and `text_rows` `(B,)` says which of them each image has. Rows whose `image` or `text` is
        an embedding `(D,)` (of a frozen tower, see `frozen`) give `image_embeds`, `text_embeds` `(B, D)` in place of pixels
        or tokens; such a row says with `cut` whether its text lost tokens.
    """

    processor: ProcessorMixin
    distinct_texts: bool = False
    pad_to_limit: bool = False

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        batch = self._images(rows)
        batch["labels"] = torch.tensor([IGNORED if row["image"] is None else row["label"] for row in rows])
        batch["skipped"] = torch.tensor([row.get("skipped", 0) for row in rows])
        return batch | self._texts(rows) if "text" in rows[0] else batch

    def _images(self, rows: list[dict]) -> dict[str, Tensor]:
        embeds = _stacked([row["image"] for row in rows])
        if embeds is not None:
            return {"image_embeds": embeds}
        size = input_size(self.processor)
        images = [Image.new("RGB", size) if row["image"] is None else row["image"] for row in rows]
        if any(row.get("box") is not None for row in rows):
            images = [
                image.resize(size, Image.Resampling.BICUBIC, box=row["box"])
                for image, row in zip(images, rows, strict=True)
            ]
            options = {"do_resize": False, "do_center_crop": False}
        else:
            options = {}
        return dict(self.processor.image_processor(images, return_tensors="pt", **options))

    def _texts(self, rows: list[dict]) -> dict[str, Tensor]:
        texts = [row["text"] for row in rows]
        embeds = _stacked(texts)
        if embeds is not None:
            return {"text_embeds": embeds, "captions_cut": torch.tensor([row.get("cut", False) for row in rows])}
        batch = {}
        if self.distinct_texts:
            place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
            batch["text_rows"] = torch.tensor([place[text] for text in texts])
            texts = list(place)
        tokens, cut = tokenize(self.processor, texts, "max_length" if self.pad_to_limit else True)
        batch["captions_cut"] = cut[batch["text_rows"]] if self.distinct_texts else cut
        return batch | tokens


def _stacked(values: list) -> Tensor | None:
    """Embeddings `(B, D)` of a frozen tower, zeros for a row without; None where the rows hold pictures or texts."""
    known = next((value for value in values if isinstance(value, Tensor)), None)
    if known is None:
        return None
    return torch.stack([value if isinstance(value, Tensor) else torch.zeros_like(known) for value in values])
