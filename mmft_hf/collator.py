"""From rows to tensors: pictures and texts, just in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPProcessor

# Label of an image that could not be read; losses and metrics leave it out.
IGNORED = -100


def tokenize(processor: CLIPProcessor, texts: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """Tokenises texts, padded to the longest of them and cut at the text tower's limit with the end token kept.

    Returns:
        `{"input_ids", "attention_mask"}`, both `(B, T)`, and `cut`, bool `(B,)`: which texts lost tokens.
    """
    tokens = processor.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    cut = torch.tensor([bool(encoding.overflowing) for encoding in tokens.encodings])
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}, cut


def input_size(processor: CLIPProcessor) -> tuple[int, int]:
    """Width and height in pixels of what the image tower sees."""
    image_processor = processor.image_processor
    size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
    return size["width"], size["height"]


@dataclass
class MMFTDataCollator:
    """Batches of images, with one text each in training.

    Args:
        processor: of the model; resizes, crops and normalises, and tokenises.

    Each row has `image` (a PIL image; None for one that could not be read) and `label`. A row of training also has
    `text`, and `box` (left, top, right, bottom in pixels): the crop that is resized to the model's input. Without a box
    the processor's own resize and centre crop apply. `skipped` counts unreadable images that the row stands for.

    Returns:
        `pixel_values` `(B, 3, height, width)`, `labels` `(B,)` (-100 where the image is None), `skipped` `(B,)`, and in
        training `input_ids`, `attention_mask` `(B, T)` and `captions_cut` `(B,)`.
    """

    processor: CLIPProcessor

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        size = input_size(self.processor)
        images = [Image.new("RGB", size) if row["image"] is None else row["image"] for row in rows]
        if rows[0].get("box") is not None:
            images = [
                image.resize(size, Image.Resampling.BICUBIC, box=row["box"])
                for image, row in zip(images, rows, strict=True)
            ]
            options = {"do_resize": False, "do_center_crop": False}
        else:
            options = {}
        batch = dict(self.processor.image_processor(images, return_tensors="pt", **options))
        batch["labels"] = torch.tensor([IGNORED if row["image"] is None else row["label"] for row in rows])
        batch["skipped"] = torch.tensor([row.get("skipped", 0) for row in rows])
        if "text" in rows[0]:
            tokens, batch["captions_cut"] = tokenize(self.processor, [row["text"] for row in rows])
            batch |= tokens
        return batch
