"""The classifier that a run keeps: which weights, between untuned and tuned, and which head on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from ..core.console import is_main
from ..core.errors import UserError
from ..data.splits import Splits
from ..model.interpolation import interpolated
from ..predict.calibration import f1_thresholds, fit_decisions, fit_temperature, threshold_for
from ..predict.classifier import ImageClassifier
from ..predict.evaluation import Predictions
from ..predict.fitting.auto import ADJUSTED, Choice, State, select
from ..predict.fitting.data import embeddings, head_data
from ..predict.fitting.heads import FITTERS
from ..predict.heads import ClassPrototypes, Head
from .config import MMFTConfig
from .prototypes import prototypes_of
from .selection import SEVERAL, metric_name
from .terms import LossTerm


@dataclass
class Kept:
    """What a run keeps.

    Args:
        classifier: weights and head together; the head is not calibrated yet.
        prototypes: of the same weights; what an image is compared with, or a part of it.
        choice: how it was chosen.
    """

    classifier: ImageClassifier
    prototypes: ClassPrototypes
    choice: Choice

    @property
    def alpha(self) -> float:
        """The weights are `(1 - alpha) * untuned + alpha * tuned`."""
        return self.choice.chosen.alpha

    def describe(self, weights: bool = True) -> str:
        """The head, and the weights if wanted, in a few words."""
        name = self.choice.chosen.name
        head = f"with {FITTERS[name].about if name in FITTERS else 'the class template'}"
        return f"{weights_at(self.alpha)}, {head}" if weights else head

    def record(self) -> dict:
        """The choice as JSON: what was chosen, why, and each candidate with its loss, accuracy and metric on validation."""
        metric, several = self.choice.metric, self.choice.chosen.head.several_labels
        named = {} if metric in ("loss", "accuracy") else {f"validation_{metric}": lambda c: 1 - c.cost}
        accuracy = f"validation_{SEVERAL if several else 'accuracy'}"
        return {
            "head": self.choice.chosen.name,
            "head_alpha": self.alpha,
            "head_reason": self.choice.reason,
            "head_metric": metric,
            "head_chosen_on_validation": self.choice.by_validation,
            "head_validation_images": self.choice.images,
            "head_validation_groups": self.choice.groups,
            "head_candidates": [
                {"head": c.name, "alpha": c.alpha, "validation_loss": c.loss, accuracy: c.accuracy}
                | {key: value(c) for key, value in named.items()}
                for c in self.choice.candidates
                if len(c.losses)
            ],
        }


def weights_at(alpha: float) -> str:
    """The weights `(1 - alpha) * untuned + alpha * tuned` in a few words."""
    places = {0.0: "untuned weights", 0.5: "weights halfway to the tuned ones", 1.0: "tuned weights"}
    return places.get(alpha, f"weights at {alpha:g} of the way to the tuned ones")


def choose_classifier(
    untuned: ImageClassifier,
    tuned: ImageClassifier | None,
    splits: Splits,
    config: MMFTConfig,
    whole: bool = False,
    trunk: bool = False,
) -> Kept:
    """Fits the heads that `config.head` names on each set of weights, and keeps one of them.

    The test split has no part in it. Pictures of the validation split that are in the training split, too, choose nothing.
    Every process must call this, and all get the same.

    Args:
        untuned: the base model with prototypes of the class template.
        tuned: the trained model, LoRA merged, with its prototypes; None if nothing was trained, or if the untuned model was
            the best epoch.
        whole: compares untuned and tuned weights alone, so that a LoRA adapter stays what was trained.
        trunk: of the image tower the projection alone was trained, so that one pass over the images is enough for all weights.

    Raises:
        UserError: the named head does not fit the data; embeddings that are not finite.
    """
    processor = untuned.processor
    alphas = [0.0] if tuned is None else [0.0, 1.0] if whole else sorted(set(config.head_alphas))
    shared = {
        "batch_size": config.per_device_eval_batch_size,
        "on_bad_image": config.on_bad_image,
        "workers": config.dataloader_num_workers,
        "progress": is_main() and not config.disable_tqdm,
        "shard": True,
    }
    prototypes: dict[float, ClassPrototypes] = {}
    between: dict[float, PreTrainedModel] = {}  # the last one alone

    def weights(alpha: float) -> PreTrainedModel:
        if alpha == 0 or tuned is None:
            return untuned.model
        if alpha == 1:
            return tuned.model
        if alpha not in between:
            between.clear()
            between[alpha] = interpolated(tuned.model, untuned.model, alpha)
        return between[alpha]

    def states() -> Iterator[State]:
        for alpha in alphas:
            model = weights(alpha)
            # No later run has the weights of another alpha.
            how = shared | {"cached": alpha == 0 and config.cache_frozen_features, "trunk": trunk}
            prototypes[alpha] = prototypes_of(model, processor, splits.train, config)
            texts = {"template": config.class_template, "long_captions": config.long_captions}
            data = head_data(model, processor, splits.train, prototypes[alpha], **texts, **how)
            yield State(alpha, data, *embeddings(model, processor, splits.validation, name="validation", **how))

    metric = config.metric_for_best_model and metric_name(config.metric_for_best_model)
    metric = None if splits.several_labels else metric  # that of the epochs, of which single images have no part
    choice = select(states(), config.head, untuned.head, metric, config.logit_adjustment)
    alpha = choice.chosen.alpha
    return Kept(ImageClassifier(weights(alpha), processor, choice.chosen.head), prototypes[alpha], choice)


def check_adjustment(config: MMFTConfig, terms: Sequence[LossTerm] = ()) -> None:
    """Raises `UserError` where `logit_adjustment` changes nothing.

    Args:
        terms: of the loss that is minimized.
    """
    if (
        config.logit_adjustment
        and config.head not in ("auto", *ADJUSTED)
        and not any(term.over_classes for term in terms)
    ):
        raise UserError(
            f"--logit_adjustment: expected 0 with --head {config.head}, found {config.logit_adjustment:g}: it acts on the training "
            f"of the heads {' and '.join(ADJUSTED)}, and of a cross-entropy over the classes, and there is none. Leave it out, or "
            "type --head linear."
        )


# -- calibration and abstention -----------------------------------------------------------------------------------------
def calibrated(head: Head, validated: Predictions, kept: Kept | None) -> Head:
    """The head with the temperature that fits its answers on validation, with several labels also the offsets. The answers
    are what `head` gave, and are changed with it.

    Training pictures have no part in it: a head is surer of them than of new ones.
    """
    known = _new(validated, kept)
    record = {"calibrated_on": "validation", "calibration_images": int(known.sum())}
    if not known.any():
        return head
    if validated.several_labels:
        factor, offsets = fit_decisions(
            *(torch.from_numpy(part[known]) for part in (validated.logits, validated.labels))
        )
        validated.rescale(factor, offsets.numpy())
        offsets = offsets.float() if head.offsets is None else (head.offsets / factor + offsets).float()
        return replace(head, temperature=head.temperature * factor, offsets=offsets, fitted=head.fitted | record)
    logits = torch.from_numpy(np.log(np.maximum(validated.scores, np.finfo(np.float32).tiny)))
    factor = fit_temperature(logits[known], torch.from_numpy(validated.labels[known]))
    validated.rescale(factor)
    return replace(head, temperature=head.temperature * factor, fitted=head.fitted | record)


def _new(validated: Predictions, kept: Kept | None) -> np.ndarray:
    """Which rows can be read and are not among the training images, as far as that is known; bool `(n,)`."""
    known = validated.known
    return known & kept.choice.usable.numpy() if kept else known


def with_threshold(head: Head, config: MMFTConfig, validated: Predictions, kept: Kept | None) -> tuple[Head, str]:
    """The head with the threshold that `reject_below`, `reject_for_accuracy` or `threshold` asks for; and why there is none, if so."""
    wanted = config.reject_for_accuracy
    if config.threshold == "f1":
        known = _new(validated, kept)
        if not known.any():
            return (
                head,
                "There are no new validation images to choose thresholds on: a class holds from a score of 0.5 on.",
            )
        found = f1_thresholds(validated.scores[known], validated.labels[known])
        return replace(head, thresholds=torch.from_numpy(found).float()), ""
    if wanted is None:
        return head.rejecting(config.reject_below), ""
    known = _new(validated, kept)
    right = validated.predicted[known] == validated.labels[known]
    threshold = threshold_for(validated.scores[known].max(axis=1), right, wanted)
    if threshold is not None:
        return head.rejecting(threshold), ""
    return head, (
        f"No threshold was found from which on answers are right in {100 * wanted:g} % of all cases, with 95 % confidence, on "
        f"{known.sum()} validation images: every picture gets a class."
    )
