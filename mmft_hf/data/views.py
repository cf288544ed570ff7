"""What a data loader sees of a data set: rows that are read, cropped and given a text at the moment they are needed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import NamedTuple

from datasets import ClassLabel, Dataset, Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from ..core.errors import UserError
from .cache import DecodedPictures
from .images import BadImage, random_crop_box, read_image
from .sampling import IGNORED, PADDING, generator
from .splits import captions_of
from .texts import training_text

logger = logging.getLogger(__name__)


class Features(NamedTuple):
    """Unit-norm embeddings `(n, D)`, float32, mapped from the file where there is one; a flag per row, bool `(n,)`
    (pictures: readable; texts: cut at the tower's limit); whether they were on disk already."""

    embeds: Tensor
    flags: Tensor
    hit: bool


@functools.cache
def _warn_once(message: str) -> None:
    """A bad picture is met again in every epoch: it is named once."""
    logger.warning(message)


class ImageView(TorchDataset):
    """Rows for evaluation: `image`, `label`, `skipped`.

    Args:
        dataset: with columns `image` and `label`; `source_row`, if there is one, names a bad picture in its own split.
        on_bad_image: `fail` raises `UserError` with the row's number; `skip` gives `image=None`, which the collator
            turns into a blank picture with label -100, left out of every metric and counted.
        name: of the split, for messages.
        short_side: of pictures as the decode cache keeps them (`cache.DecodedPictures`), in pixels; None: no such cache.
    """

    def __init__(
        self, dataset: Dataset, on_bad_image: str = "fail", name: str = "evaluation", short_side: int | None = None
    ):
        columns = [c for c in ("image", "label", "captions", "source_row") if c in dataset.column_names]
        # Undecoded: datasets would raise inside itself at a bad picture, without the row's number.
        self.rows = dataset.select_columns(columns).cast_column("image", Image(decode=False))
        self.on_bad_image = on_bad_image
        self.name = name
        self.short_side = short_side
        self._read = DecodedPictures(short_side).read if short_side else read_image
        self.features: Features | None = None
        # Rows held out of another split are named by their place there.
        split = str(dataset.split or "")
        self.origin = "" if split in ("", name, name.removesuffix("ing")) else f" of split {split!r}"

    def __len__(self) -> int:
        return len(self.rows)

    def use_features(self, features: Features) -> None:
        """From now on a row's `image` is its embedding `(D,)`, and no picture is opened."""
        self.features = features
        self.rows = self.rows.remove_columns("image")

    def read(self, row: int) -> dict:
        """The row with its picture read (None where it cannot be, and `on_bad_image` is `skip`)."""
        values = self.rows[row]
        try:
            values["image"] = self._read(values["image"]) if self.features is None else self._embedding(row)
        except BadImage as error:
            path = (values.get("image") or {}).get("path")
            place = f"row {values.get('source_row', row)}{self.origin}"
            where = f"{self.name} image, {place}{f' ({path})' if path else ''}"
            if self.on_bad_image == "fail":
                raise UserError(
                    f"{where} cannot be read: {error}. Repair or remove it, or type --on_bad_image skip."
                ) from error
            _warn_once(f"{where} is skipped: {error}")
            values["image"] = None
        return values

    def _embedding(self, row: int) -> Tensor:
        if not self.features.flags[row]:
            raise BadImage("it could not be read when it was encoded")
        return self.features.embeds[row]

    def __getitem__(self, row: int) -> dict:
        values = self.read(row)
        return {"image": values["image"], "label": values["label"], "skipped": int(values["image"] is None)}


class TrainingView(ImageView):
    """Rows for training: `image`, `box`, `label`, `text`, `skipped`, as a function of (seed, epoch, row) alone.

    Indexed by `epoch * length + row`, which `EpochSampler` yields. One caption is drawn uniformly from those of the
    image; it follows the class template. With `on_bad_image="skip"` the next readable row takes the place of a bad one,
    so that batches keep their size in every process, and `skipped` counts the rows passed over. A number of the sampler that
    stands for no row gives `image=None` and the label -100.

    Args:
        class_names: `C` names, in the order of the labels.
        template: with `{}` for the class name; of several, one is drawn for each read.
        seed: of all draws.
        crop_min_area: smallest share of the area that a random crop keeps; 1 means no random crop.
        caption_dropout: probability of the class template alone in place of a caption.
    """

    def __init__(
        self,
        dataset: Dataset,
        class_names: list[str],
        template: str | Sequence[str],
        seed: int = 0,
        crop_min_area: float = 0.9,
        on_bad_image: str = "fail",
        short_side: int | None = None,
        caption_dropout: float = 0.0,
    ):
        super().__init__(dataset, on_bad_image, "training", short_side)
        self.class_names = class_names
        self.templates = (template,) if isinstance(template, str) else tuple(template)
        self.seed = seed
        self.crop_min_area = crop_min_area
        self.caption_dropout = caption_dropout
        self.text_features: tuple[dict[str, int], Features] | None = None

    def use_text_features(self, positions: dict[str, int], features: Features) -> None:
        """From now on a row's `text` is its embedding `(D,)`, and `cut` says whether the text lost tokens.

        Args:
            positions: the row of `features` of every text that can be drawn.
        """
        self.text_features = positions, features

    def __getitem__(self, key: int) -> dict:
        if key == PADDING:
            return {"image": None, "box": None, "label": IGNORED, "text": "", "skipped": 0}
        epoch, row = divmod(key, len(self))
        for skipped in range(len(self)):
            values = self.read((row + skipped) % len(self))
            if values["image"] is not None:
                break
        else:
            raise UserError("none of the training images can be read.")
        # 1: a stream of its own, apart from the sampler's (seed, epoch).
        rng = generator(self.seed, epoch, row, 1)
        captions = captions_of(values.get("captions"))
        caption = captions[rng.integers(len(captions))] if captions else None
        # 2: again a stream of its own, so that every other draw is what it would be without.
        if self.caption_dropout and generator(self.seed, epoch, row, 2).random() < self.caption_dropout:
            caption = None
        box = random_crop_box(*values["image"].size, self.crop_min_area, rng) if self.crop_min_area < 1 else None
        template = self.templates[rng.integers(len(self.templates)) if len(self.templates) > 1 else 0]
        text = training_text(template, self.class_names[values["label"]], caption)
        found = {"image": values["image"], "box": box, "label": values["label"], "text": text, "skipped": skipped}
        if self.text_features is None:
            return found
        positions, features = self.text_features
        place = positions[text]
        return found | {"text": features.embeds[place], "cut": bool(features.flags[place])}


def check_dataset(name: str, dataset: Dataset, class_names: list[str] | None = None) -> None:
    """Raises `UserError` unless there are images and labels with class names, these ones if they are given."""
    for column in ("image", "label"):
        if column not in dataset.column_names:
            raise UserError(
                f"{name}: expected columns image and label, found {', '.join(dataset.column_names)}. Use "
                "mmft_hf.load_captioned_dataset(…), or dataset.rename_columns({…})."
            )
    if not isinstance(dataset.features["label"], ClassLabel):
        raise UserError(
            f"{name}: expected labels with class names (ClassLabel), found {dataset.features['label']}. Use "
            "mmft_hf.load_captioned_dataset(…), or dataset.class_encode_column('label')."
        )
    if class_names is not None and dataset.features["label"].names != class_names:
        raise UserError(f"{name}: expected the class names of train_dataset, in the same order.")
