"""Classifying a whole split outside of training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset

from ..core.distributed import gather_shares, share_of
from ..model.features import image_embeddings
from .classifier import ImageClassifier
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
    classifier: ImageClassifier,
    dataset: Dataset,
    batch_size: int = 256,
    on_bad_image: str = "fail",
    workers: int = 0,
    name: str = "test",
    progress: bool = True,
    shard: bool = False,
) -> Predictions:
    """Classifies every image of a dataset.

    Args:
        dataset: with columns `image` and `label`; its labels have the order of the classifier's classes.
        shard: each of several processes encodes its share, and each image once. All of them must call this, and all get
            all predictions.

    Raises:
        UserError: an image that cannot be read, with `on_bad_image="fail"`.
    """
    head = classifier.head
    scores, labels = [torch.zeros(0, len(head.class_names))], [torch.zeros(0, dtype=torch.long)]
    rows = share_of(len(dataset)) if shard else None
    for embeds, batch_labels in image_embeddings(
        classifier.model, classifier.processor, dataset, batch_size, on_bad_image, workers, progress, name, rows
    ):
        scores.append(head.scores(embeds).cpu())
        labels.append(batch_labels)
    whole = [gather_shares(torch.cat(part)) if shard else torch.cat(part) for part in (scores, labels)]
    return Predictions(whole[0].numpy(), whole[1].numpy(), head.class_names)
