"""Classifying a whole split outside of training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset

from ..core.distributed import gather_shares, share_of
from ..data.sampling import IGNORED
from ..model.features import image_embeddings, image_features
from .calibration import area_under_risk, calibration
from .classifier import ImageClassifier
from .metrics import report


@dataclass
class Predictions:
    """The answers to `n` pictures.

    Args:
        scores (`(n, C)`): softmax of the logits.
        labels (`(n,)`): -100 for an unreadable image.
        losses (`(n,)`): cross-entropy of the logits, in nats; 0 for an unreadable image.
        class_names: `C` names, in the order of the scores.
    """

    scores: np.ndarray
    labels: np.ndarray
    losses: np.ndarray
    class_names: list[str]

    @property
    def predicted(self) -> np.ndarray:
        """Predicted class of each row, `(n,)`."""
        return self.scores.argmax(axis=1)

    def rescale(self, temperature: float) -> None:
        """Divides the logits by a temperature."""
        logits = torch.from_numpy(np.log(np.maximum(self.scores, np.finfo(np.float32).tiny))) / temperature
        self.scores = logits.softmax(dim=1).numpy()
        labels = torch.from_numpy(self.labels)
        self.losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").numpy()

    def report(self) -> dict:
        """`ClassificationReport` over all readable rows, and their mean cross-entropy as `loss`."""
        found = report(self.scores, self.labels, self.class_names)
        return {**found, "loss": float(self.losses[self.labels >= 0].mean(dtype=np.float64))}

    def answered(self, least: float) -> dict:
        """The share of readable rows whose best class has at least this probability, and their accuracy (None: no row has)."""
        known = self.labels >= 0
        accepted = known & (self.scores.max(axis=1) >= least)
        right = (self.predicted == self.labels)[accepted]
        return {
            "answered": float(accepted.sum() / known.sum()),
            "answered_accuracy": float(right.mean()) if len(right) else None,
        }

    def certainty(self) -> dict:
        """How far the probabilities can be trusted, over all readable rows: see `calibration.Calibration`, and `AURC`."""
        known = self.labels >= 0
        scores, labels = self.scores[known], self.labels[known]
        found = calibration(scores, labels)
        area, excess = area_under_risk(scores.max(axis=1), scores.argmax(axis=1) == labels)
        return {
            "brier_score": found.brier,
            "calibration_error": found.error,
            "calibration_error_null": found.null_error,
            "aurc": area,
            "aurc_excess": excess,
        }


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
    cached: bool = False,
) -> Predictions:
    """Classifies every image of a dataset.

    Args:
        dataset: with columns `image` and `label`; its labels have the order of the classifier's classes.
        shard: each of several processes encodes its share, and each image once. All of them must call this, and all get
            all predictions.
        cached: the embeddings are kept on disk (`model.features`), for an image tower that is used again as it is.

    Raises:
        UserError: an image that cannot be read, with `on_bad_image="fail"`.
    """
    head = classifier.head
    scores, labels = [torch.zeros(0, len(head.class_names))], [torch.zeros(0, dtype=torch.long)]
    losses = [torch.zeros(0)]
    encoder = (classifier.model, classifier.processor, dataset, batch_size, on_bad_image)
    if cached:  # every process gets all of them
        embeds, known = image_features(*encoder, name, workers=workers, shard=shard, progress=progress)
        device, shard = classifier.model.device, False
        batches = ((x.to(device), y) for x, y in zip(embeds.split(batch_size), known.split(batch_size), strict=True))
    else:
        batches = image_embeddings(*encoder, workers, progress, name, share_of(len(dataset)) if shard else None)
    for embeds, batch_labels in batches:
        scores.append(head.scores(embeds).cpu())
        labels.append(batch_labels)
        logits = head.logits(embeds).float().cpu()
        losses.append(F.cross_entropy(logits, batch_labels, ignore_index=IGNORED, reduction="none"))
    parts = [torch.cat(part) for part in (scores, labels, losses)]
    return Predictions(*((gather_shares(part) if shard else part).numpy() for part in parts), head.class_names)
