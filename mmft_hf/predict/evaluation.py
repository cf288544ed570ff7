"""Classifying a whole split, once, outside of training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from transformers import CLIPModel, CLIPProcessor

from ..core.distributed import gather_shares, share_of
from .heads.prototypes import ClassPrototypes, image_embeddings
from .metrics import report


@dataclass
class Predictions:
    """Scores `(n, C)` (softmax of the logits), labels `(n,)` (-100: unreadable image) and the class names."""

    scores: np.ndarray
    labels: np.ndarray
    class_names: list[str]

    @property
    def predicted(self) -> np.ndarray:
        """Predicted class of each row, `(n,)`."""
        return self.scores.argmax(axis=1)

    def report(self) -> dict:
        """`ClassificationReport` over all readable rows."""
        return report(self.scores, self.labels, self.class_names)


@torch.no_grad()
def classify(
    model: CLIPModel,
    processor: CLIPProcessor,
    prototypes: ClassPrototypes,
    dataset: Dataset,
    batch_size: int = 256,
    on_bad_image: str = "fail",
    workers: int = 0,
    name: str = "test",
    progress: bool = True,
    shard: bool = False,
) -> Predictions:
    """Compares every image of a data set with the prototypes.

    Args:
        dataset: with columns `image` and `label`, the labels in the order of the prototypes' classes.
        shard: each of several processes encodes its share, and each image once; all of them must call this, and all get
            the whole.

    Raises:
        UserError: an image that cannot be read, with `on_bad_image="fail"`.
    """
    classes = len(prototypes.class_names)
    scores, labels = [torch.zeros(0, classes)], [torch.zeros(0, dtype=torch.long)]
    rows = share_of(len(dataset)) if shard else None
    for embeds, batch_labels in image_embeddings(
        model, processor, dataset, batch_size, on_bad_image, workers, progress, name, rows
    ):
        scores.append(prototypes.logits(embeds).softmax(dim=1).cpu())
        labels.append(batch_labels)
    whole = [gather_shares(torch.cat(part)) if shard else torch.cat(part) for part in (scores, labels)]
    return Predictions(whole[0].numpy(), whole[1].numpy(), prototypes.class_names)
