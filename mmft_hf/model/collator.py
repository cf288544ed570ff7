"""From rows to tensors: pictures and texts are prepared when a batch needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from transformers import BaseImageProcessor, ProcessorMixin

from ..data.sampling import IGNORED
from ..data.texts import beginning, class_prompt
from .adapted_processor import AdaptedProcessor
from .families import is_padded

# What rows hold of a frozen tower, or of its trunk.
KEPT = ("image_embeds", "image_trunk", "text_embeds", "text_trunk")


def tokenize(
    processor: ProcessorMixin, texts: Sequence[str], padding: bool | str = True
) -> tuple[dict[str, Tensor], Tensor]:
    """Tokenizes texts, truncated at the text tower's limit; the end token is kept.

    SigLIP was trained on lower-case texts padded to the limit, and reads the padding, so it gets exactly that. An AdaptedCLIP
    reads vectors of whole texts instead, which its processor gives.

    Args:
        padding: True pads to the longest text, `max_length` to the limit.

    Returns:
        `{"input_ids", "attention_mask"}`, both `(B, T)`, for SigLIP without the mask, for an AdaptedCLIP `{"text_vectors"}`
        `(B, d)`; and which texts were truncated, bool `(B,)`.
    """
    if isinstance(processor, AdaptedProcessor):
        vectors, cut = processor.trunk.encoded(texts)
        return {"text_vectors": vectors}, cut
    padded = is_padded(processor)
    texts = [text.lower() for text in texts] if padded else list(texts)
    tokenizer = processor.tokenizer
    limit = tokenizer.model_max_length

    def count(text: str) -> int:
        return len(tokenizer(text, verbose=False)["input_ids"])

    texts = [beginning(text, limit, count) for text in texts]
    padding = "max_length" if padded else padding
    tokens = tokenizer(texts, padding=padding, truncation=True, return_tensors="pt")
    if tokens.encodings is not None:
        cut = [bool(encoding.overflowing) for encoding in tokens.encodings]
    else:  # a tokenizer written in Python does not tell
        whole = tokenizer(texts, verbose=False)["input_ids"]
        cut = [len(ids) > limit for ids in whole]
    names = ("input_ids",) if padded else ("input_ids", "attention_mask")
    return {name: tokens[name] for name in names}, torch.tensor(cut)


def same_prompts(processor: ProcessorMixin, class_names: Sequence[str], template: str) -> list[list[str]]:
    """The groups of classes whose prompts are the same tokens, or the same vector: no text tower tells them apart.

    They differ beyond the limit, in letters that the tokenizer does not distinguish, or in signs that it does not know.
    """
    tokens, _ = tokenize(processor, [class_prompt(template, name) for name in class_names])
    groups: dict[tuple, list[str]] = {}
    read = next(iter(tokens.values()))
    masks = tokens.get("attention_mask", torch.ones_like(read)).bool()
    for name, ids, mask in zip(class_names, read, masks, strict=True):
        groups.setdefault(tuple(ids[mask].tolist()), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def input_size(processor: ProcessorMixin | BaseImageProcessor) -> tuple[int, int] | None:
    """Width and height in pixels of the image tower's input; None if pictures keep their proportions."""
    image_processor = getattr(processor, "image_processor", processor)
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", False) else image_processor.size
    return (size["width"], size["height"]) if "width" in size else None


def pixels_of(image_processor: BaseImageProcessor, image: Image.Image) -> Tensor:
    """What the image tower sees of one picture: `(3, height, width)`, resized, cropped and normalized."""
    return image_processor(image, return_tensors="pt")["pixel_values"][0]


@dataclass
class MMFTDataCollator:
    """Batches of images, with one text each in training.

    Args:
        processor: that of the model; it resizes, crops, normalizes and tokenizes.
        distinct_texts: each text is tokenized (and so encoded) once, however many images of the batch have it.
        pad_to_limit: texts are padded to the tower's limit, so that every batch has the same shapes, for `torch.compile`.
        texts: False leaves out the texts of the rows, for a loss that uses none.
        class_texts: one text of each of `C` classes, which every training batch has in addition.

    A row has `image` (a PIL image, or None for one that could not be read), or what `prepare` made of it, and `label`. A training row also has `text`, and
    `box` (left, top, right, bottom in pixels): the crop that is resized to the model's input. Without a box the processor's
    own resize and centre crop apply. `skipped` counts the unreadable images that the row stands for; `weight`, if there is one, says
    how much the pair of image and text counts. Embeddings of a frozen
    tower (see `train.frozen`) come as `image_embeds` and `text_embeds` `(D,)`, pooled outputs of a frozen trunk as `image_trunk`
    and `text_trunk` `(H,)`, instead of `image` and `text`; `cut` says whether such a text was truncated.

    Returns:
        `pixel_values` `(B, 3, height, width)`, `labels` `(B,)`, or `(B, C)` where the rows have several (-100 where the image is None), `skipped` `(B,)`, and in
        training `input_ids`, `attention_mask` `(U, T)` of U texts (`tokenize`) and `captions_cut` `(B,)`. `text_rows` `(B,)` says which
        of the U texts each image has, `class_rows` `(C,)` which are the class texts; without `text_rows` the first B texts
        are those of the images. Rows with embeddings give `image_embeds`, `text_embeds` `(B, D)` instead of pixels and
        tokens; those with pooled outputs `image_trunk`, `text_trunk` `(B, H)`. Rows with weights give `weights` `(B,)`.
    """

    processor: ProcessorMixin
    distinct_texts: bool = False
    pad_to_limit: bool = False
    texts: bool = True
    class_texts: tuple[str, ...] = ()

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        batch = {key: torch.stack([row[key] for row in rows]) for key in KEPT if key in rows[0]}
        kept_texts = "text_embeds" in batch or "text_trunk" in batch
        if "image_embeds" not in batch and "image_trunk" not in batch:
            rows = [self.prepare(row) for row in rows]
            batch["pixel_values"] = torch.stack([row["pixel_values"] for row in rows])
        labels = torch.as_tensor(np.array([row["label"] for row in rows]))
        batch |= {"labels": labels, "skipped": torch.tensor([row.get("skipped", 0) for row in rows])}
        if kept_texts:
            batch["captions_cut"] = torch.tensor([row["cut"] for row in rows])
        if "weight" in rows[0]:
            batch["weights"] = torch.tensor([row["weight"] for row in rows], dtype=torch.float32)
        if "text" in rows[0] or kept_texts:
            batch |= self._texts([row["text"] for row in rows] if self.texts and "text" in rows[0] else [])
        return batch

    def prepare(self, row: dict) -> dict:
        """The row with `pixel_values` `(3, height, width)` in place of `image` and `box`. Any other row is returned as it is."""
        if "image" not in row:
            return row
        row = dict(row)
        image, box = row.pop("image"), row.pop("box", None)
        image_processor, size = self.processor.image_processor, input_size(self.processor)
        if image is None:
            row["label"] = np.full_like(row["label"], IGNORED)
            image = Image.new("RGB", size)
        if box is None:
            return row | {"pixel_values": pixels_of(image_processor, image)}
        crop = image.resize(size, Image.Resampling.BICUBIC, box=box)
        found = image_processor(crop, return_tensors="pt", do_resize=False, do_center_crop=False)
        return row | {"pixel_values": found["pixel_values"][0]}

    def _texts(self, own: list[str]) -> dict[str, Tensor]:
        texts = [*own, *self.class_texts]
        if not texts:
            return {}
        rows = torch.arange(len(texts))
        if self.distinct_texts:
            place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
            rows, texts = torch.tensor([place[text] for text in texts]), list(place)
        tokens, cut = tokenize(self.processor, texts, "max_length" if self.pad_to_limit else True)
        batch = dict(tokens)
        if own:
            batch["captions_cut"] = cut[rows[: len(own)]]
            if self.distinct_texts:
                batch["text_rows"] = rows[: len(own)]
        if self.class_texts:
            batch["class_rows"] = rows[len(own) :]
        return batch


class PreparedRows(TorchDataset):
    """The rows of a view, each prepared for the collator as soon as it is read.

    A data loader holds all rows of a batch at once. Decoded photographs of 12 megapixels take 36 MB each, prepared ones 0.6 MB.
    """

    def __init__(self, view: TorchDataset, collator: MMFTDataCollator):
        self.view, self.collator = view, collator

    @staticmethod
    def of(view: TorchDataset, collator) -> TorchDataset:
        """The prepared rows; the view itself for a collator of another class, which may expect pictures."""
        return PreparedRows(view, collator) if type(collator) is MMFTDataCollator else view

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, key: int) -> dict:
        return self.collator.prepare(self.view[key])
