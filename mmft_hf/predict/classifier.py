"""`ImageClassifier`: the one place where a picture becomes class probabilities.

Shapes: `B` pictures per batch, `C` classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel, ProcessorMixin

from ..core.console import some
from ..core.errors import UserError
from ..core.files import RUN_FILE, atomic_folder
from ..core.reading import parse_json
from ..core.records import RunRecord
from ..core.repositories import read_text_file
from ..core.seals import is_loaded, note_changed_files
from ..data.images import BadImage, read_image
from ..data.texts import DEFAULT_TEMPLATE
from ..model.collator import pixels_of
from ..model.loading import encode_images, load_model
from .heads import UNKNOWN, ClassPrototypes, Head, load_head


class ImageClassifier(nn.Module):
    """A dual encoder and a head as one module: pixels `(B, 3, height, width)` to class logits `(B, C)`.

    Args:
        model: a dual encoder, as `load_model` returns it.
        processor: that of the model, or its image processor alone.
        head: `ClassPrototypes` or another head.

    The softmax of the logits gives the class probabilities; where a picture may have several labels, their sigmoid.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin | BaseImageProcessor, head: Head):
        super().__init__()
        self.model, self.processor, self.head = model, processor, head

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | Path, revision: str | None = None, allow_pickle: bool = False
    ) -> ImageClassifier:
        """Loads a saved classifier on the CPU, in float32 and ready to predict.

        Args:
            folder_or_hub_id: what `mmft-hf finetune`, `trainer.save_model(…)` or `save_pretrained` wrote, or a Hub repository.
            revision: branch, tag or commit of the repository.
            allow_pickle: as in `load_model`.

        Raises:
            UserError: there is no model or no head, or they do not fit each other.
        """
        name = str(folder_or_hub_id)
        head = load_head(name, revision)
        if Path(name).is_dir():
            note_changed_files(name, is_loaded)
        model, processor = load_model(name, revision, allow_pickle)
        head.check_model(model, name)
        return cls(model, processor, head).eval()

    @classmethod
    def zero_shot(
        cls,
        folder_or_hub_id: str | Path,
        class_names: Sequence[str],
        revision: str | None = None,
        allow_pickle: bool = False,
    ) -> ImageClassifier:
        """A dual encoder that compares pictures with the names of any classes, by the class template of its run.

        An AdaptedCLIP needs its caption encoder for this, which says its size before it is opened.

        Args:
            folder_or_hub_id: a dual encoder, or a saved classifier, whose head is left out.
            class_names: `C` different names.
            revision, allow_pickle: as in `from_pretrained`.

        Raises:
            UserError: there is no model; fewer than two names, or equal ones; the caption encoder is missing.
        """
        name, names = str(folder_or_hub_id), [one.strip() for one in class_names]
        if len(names) < 2 or len(set(names)) < len(names) or not all(names):
            raise UserError(f"--classes: expected two or more different names, found {some(names)}.")
        if Path(name).is_dir():
            note_changed_files(name, is_loaded)
        model, processor = load_model(name, revision, allow_pickle)
        text = read_text_file(name, RUN_FILE, revision, "model")
        record = parse_json(text, f"{name}, {RUN_FILE}", RunRecord) if text else {}
        template = record.get("identity", {}).get("class_template", DEFAULT_TEMPLATE)
        head = ClassPrototypes.from_templates(model.eval(), processor, names, template)
        return cls(model, processor, head).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes all that prediction needs: model, processor, class names (in `config.json`) and head."""
        set_class_names(self.model, self.head.class_names)
        with atomic_folder(folder) as new:
            self.model.save_pretrained(new)
            self.processor.save_pretrained(new)
        self.head.save_pretrained(folder)

    @property
    def class_names(self) -> list[str]:
        """`C` names, in the order of the logits."""
        return self.head.class_names

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Class logits `(B, C)` of pixels `(B, 3, height, width)`.

        Raises:
            UserError: something else, such as a picture.
        """
        if not isinstance(pixel_values, Tensor) or pixel_values.ndim != 4:
            found = (
                f"shape {tuple(pixel_values.shape)}"
                if isinstance(pixel_values, Tensor)
                else type(pixel_values).__name__
            )
            raise UserError(
                f"ImageClassifier: expected pixels (B, 3, height, width), found {found}. For pictures and paths, type "
                "classifier.predict(…)."
            )
        return self.head.logits(encode_images(self.model, pixel_values))

    def preprocess(self, images: Sequence) -> Tensor:
        """Pixels `(B, 3, height, width)` of pictures: paths, bytes or `PIL.Image`s. One at a time is held in full size.

        Raises:
            BadImage: one that cannot be read.
        """
        image_processor = getattr(self.processor, "image_processor", self.processor)
        return torch.stack([pixels_of(image_processor, _read(image)) for image in images])

    @torch.no_grad()
    def predict(self, images, top_k: int = 5, batch_size: int = 64) -> list:
        """Classifies pictures.

        Args:
            images: a path or a `PIL.Image`, or a list of them.
            top_k: classes returned for each picture.
            batch_size: pictures per batch.

        Returns:
            For each picture `[{"label", "score"}, …]`, best first; the scores are probabilities over all classes. For a
            single picture that list alone. A picture whose best class is below the head's `reject_below` is answered
            `unknown` first, with the probability that its best class is wrong. With several labels: all classes with a score
            of 0.5 (or the head's `reject_below` or `thresholds`) or more, whatever `top_k`, best first; an empty list says that
            none holds.

        Raises:
            BadImage: a picture that cannot be read.
        """
        if isinstance(images, (str, os.PathLike, bytes, Image.Image)):
            return self.predict([images], top_k)[0]
        found = []
        for start in range(0, len(images), batch_size):
            pixels = self.preprocess(images[start : start + batch_size]).to(self.model.device)
            found += self.best(self(pixels), top_k)
        return found

    def best(self, logits: Tensor, top_k: int) -> list[list[dict]]:
        """The `top_k` classes of each row of logits `(B, C)`, as `predict` returns them."""
        several = self.head.several_labels
        count = len(self.class_names) if several else min(top_k, len(self.class_names))
        scores, classes = self.head.probabilities(logits).topk(count, dim=1)
        found = [
            [{"label": self.class_names[c], "score": score} for score, c in zip(*row, strict=True)]
            for row in zip(scores.tolist(), classes.tolist(), strict=True)
        ]
        if several:
            least = dict(zip(self.class_names, np.broadcast_to(self.head.decision, count).tolist(), strict=True))
            return [[one for one in row if one["score"] >= least[one["label"]]] for row in found]
        least = self.head.reject_below or 0
        return [
            row if row[0]["score"] >= least else [{"label": UNKNOWN, "score": 1 - row[0]["score"]}, *row][: len(row)]
            for row in found
        ]


def _read(image) -> Image.Image:
    try:
        return read_image(image)
    except BadImage as error:
        what = str(image) if isinstance(image, (str, os.PathLike)) else type(image).__name__
        raise BadImage(f"{what}: {error}. Type the path of a picture, or give its bytes or a PIL.Image.") from error


def set_class_names(model: PreTrainedModel, class_names: Sequence[str]) -> None:
    """Writes the class names into a model's config, where stock tools and `Head.check_model` look for them."""
    model.config.id2label = dict(enumerate(class_names))
    model.config.label2id = {name: i for i, name in enumerate(class_names)}
