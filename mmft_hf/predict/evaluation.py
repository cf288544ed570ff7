"""Classifying a whole split outside of training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset

from ..core.distributed import gather_shares, share_of
from ..core.errors import UserError
from ..data.labels import has_several
from ..data.sampling import is_example
from ..model.features import image_embeddings, image_features
from .calibration import area_under_risk, calibration, image_losses
from .classifier import ImageClassifier
from .heads.base import DECISION
from .metrics import area_under_roc, report, several_report, wilson_interval


@dataclass
class Predictions:
    """The answers to `n` pictures.

    Args:
        scores (`(n, C)`): softmax of the logits; with several labels their sigmoid.
        labels (`(n,)`): -100 for an unreadable image; with several labels `(n, C)`, of 1 and 0.
        losses (`(n,)`): cross-entropy of the logits, in nats, with several labels the mean binary one; 0 for an unreadable image.
        class_names: `C` names, in the order of the scores.
        logits (`(n, C)`): with several labels; their sigmoid may be rounded to 0 or 1.
        decision: with several labels, the score from which a class holds, one for all or of each class, `(C,)`.
        strongest (`(n,)`): the largest logit.
    """

    scores: np.ndarray
    labels: np.ndarray
    losses: np.ndarray
    class_names: list[str]
    logits: np.ndarray | None = None
    decision: float | np.ndarray = DECISION
    strongest: np.ndarray | None = None

    @property
    def several_labels(self) -> bool:
        """Whether an image may have several labels."""
        return self.labels.ndim == 2

    @property
    def known(self) -> np.ndarray:
        """Which images can be read, bool `(n,)`."""
        return is_example(self.labels)

    @property
    def predicted(self) -> np.ndarray:
        """Predicted class of each row, `(n,)`; with several labels bool `(n, C)`."""
        return self.scores >= self.decision if self.several_labels else self.scores.argmax(axis=1)

    def rescale(self, temperature: float, offsets: np.ndarray | None = None) -> None:
        """Divides the logits by a temperature. With several labels offsets `(C,)` are added."""
        labels = torch.from_numpy(self.labels)
        if self.several_labels:
            self.logits = (self.logits / temperature + offsets).astype(np.float32)
            logits = torch.from_numpy(self.logits)
            self.scores = logits.sigmoid().numpy()
        else:
            self.strongest = None if self.strongest is None else self.strongest / temperature
            logits = torch.from_numpy(np.log(np.maximum(self.scores, np.finfo(np.float32).tiny))) / temperature
            self.scores = logits.softmax(dim=1).numpy()
        self.losses = image_losses(logits, labels).numpy()

    def report(self) -> dict:
        """`ClassificationReport` over all readable rows, and their mean cross-entropy as `loss`; with several labels
        `metrics.several_report`."""
        parts = (self.scores, self.labels, self.class_names)
        found = several_report(*parts, self.decision) if self.several_labels else report(*parts)
        return {**found, "loss": float(self.losses[self.known].mean(dtype=np.float64))}

    def answered(self, least: float) -> dict:
        """The share of readable rows whose best class has at least this probability, and their accuracy (None: no row has)."""
        known = self.labels >= 0
        accepted = known & (self.scores.max(axis=1) >= least)
        right = (self.predicted == self.labels)[accepted]
        return {
            "answered": float(accepted.sum() / known.sum()),
            "answered_accuracy": float(right.mean()) if len(right) else None,
        }

    def unknown(self, others: Predictions, least: float | None) -> dict:
        """How well these pictures are told from others, of classes that the classifier does not know. Readable rows alone count.

        Args:
            others: the answers to the others; their labels mean nothing, except that -100 is an unreadable image.
            least: the probability below which a picture is answered `unknown`; None: each gets a class.

        Returns:
            `examples` and `skipped` of the others; the share of them that is `answered_unknown` (None without `least`); and the area
            under the ROC curve (see `metrics.area_under_roc`) of the largest logit, `auroc_logit`, and of the probability of
            the best class, `auroc_probability`; each with its 95 % interval, `…_ci_low` and `…_ci_high`.
        """
        known, new = self.known, others.known
        probabilities = self.scores[known].max(axis=1), others.scores[new].max(axis=1)
        logits = self.strongest[known], others.strongest[new]
        rejected = None if least is None else int((probabilities[1] < least).sum())
        share = None if least is None else rejected / int(new.sum())
        low, high = (None, None) if least is None else wilson_interval(rejected, int(new.sum()))
        found = {"examples": int(new.sum()), "skipped": int((~new).sum()), "answered_unknown": share}
        found |= {"answered_unknown_ci_low": low, "answered_unknown_ci_high": high}
        for name, pair in (("logit", logits), ("probability", probabilities)):
            values = area_under_roc(*pair)
            found |= dict(zip((f"auroc_{name}", f"auroc_{name}_ci_low", f"auroc_{name}_ci_high"), values, strict=True))
        return found

    def certainty(self) -> dict:
        """How far the probabilities can be trusted, over all readable rows: see `calibration.Calibration`, and `AURC`. Nothing with
        several labels."""
        if self.several_labels:
            return {}
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
    trunk: bool = False,
) -> Predictions:
    """Classifies every image of a dataset.

    Args:
        dataset: with columns `image` and `label`; its labels have the order of the classifier's classes. They are lists if the
            head is for several labels.
        shard: each of several processes encodes its share, and each image once. All of them must call this, and all get
            all predictions.
        cached: the embeddings are kept on disk (`model.features`), for an image tower that is used again as it is.
        trunk: what its projection reads is kept instead, for a tower that is used again with another projection.

    Raises:
        UserError: an image that cannot be read, with `on_bad_image="fail"`; lists of labels for a head with one, or the other
            way round.
    """
    head = classifier.head
    several = has_several(dataset)
    if several != head.several_labels:
        kinds = ("one class for each picture", "a list of labels for each picture")
        raise UserError(
            f"{name} data: expected {kinds[head.several_labels]}, as the classifier was trained on, found {kinds[several]}. Type "
            "--label_column NAME of a column of that kind."
        )
    scores = [torch.zeros(0, len(head.class_names))]
    labels = [scores[0] if several else torch.zeros(0, dtype=torch.long)]
    losses, strongest, answers = [torch.zeros(0)], [torch.zeros(0)], list(scores)
    encoder = (classifier.model, classifier.processor, dataset, batch_size, on_bad_image)
    if cached or trunk:  # every process gets all of them
        embeds, known = image_features(*encoder, name, workers=workers, shard=shard, progress=progress, trunk=trunk)
        device, shard = classifier.model.device, False
        batches = ((x.to(device), y) for x, y in zip(embeds.split(batch_size), known.split(batch_size), strict=True))
    else:
        batches = image_embeddings(*encoder, workers, progress, name, share_of(len(dataset)) if shard else None)
    for embeds, batch_labels in batches:
        scores.append(head.scores(embeds).cpu())
        labels.append(batch_labels)
        logits = head.logits(embeds).float().cpu()
        losses.append(image_losses(logits, batch_labels))
        strongest.append(logits.amax(dim=1))
        answers += [logits] if several else []

    def whole(parts: list[torch.Tensor]) -> np.ndarray:
        part = torch.cat(parts)
        return (gather_shares(part) if shard else part).numpy()

    found = Predictions(whole(scores), whole(labels), whole(losses), head.class_names, strongest=whole(strongest))
    if several:
        found.logits, found.decision = whole(answers), head.decision
    return found
