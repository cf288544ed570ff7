"""What all cells of a benchmark share: the untuned model and its features, the settings of fine-tuning, the last training.

Shapes: `n` images of a dataset, `C` classes, `D` embedding size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ...data.sampling import IGNORED
from ...data.splits import labels_of
from ...data.texts import TEMPLATES
from ...model.features import image_features
from ...model.loading import load_model, logit_scale
from ...model.long_captions import stretched
from ...model.memory import give_memory_back
from ...predict.calibration import image_losses
from ...predict.classifier import ImageClassifier
from ...predict.evaluation import classify
from ...predict.fitting.data import HeadData, embeddings, head_data
from ...predict.heads import ClassPrototypes, Head, LinearHead
from ...train.config import MMFTConfig
from .budgets import EQUAL, LONG, RATES_APART
from .protocol import Classifier, Task, readable_rows


@dataclass
class Trained:
    """The result of a training. Without one: the untuned model and the task's images.

    Args:
        model: with LoRA merged into its weights.
        texts: the training images with the texts that the model was trained on.
        steps: optimizer steps; None without training.
        images: images seen in these steps, each as often as it was seen.
        head: the classification head trained with the model, and `first_head`, the head it started from; None where images
            were compared with texts.
        chosen: what validation chose during the training, by name.
        seconds: wall-clock time of the training, measured by `Context.train`.
    """

    model: PreTrainedModel
    texts: Dataset
    steps: int | None = None
    head: LinearHead | None = None
    first_head: LinearHead | None = None
    chosen: dict = field(default_factory=dict)
    seconds: float = 0.0
    images: int | None = None


class Context:
    """The untuned model and the settings that every method gets.

    Args:
        model_name, revision: the untuned model.
        config: settings of all fine-tuning methods.
        learning_rates: each training runs once with each of them, and validation chooses. Default: the config's one, or with the
            budget `long` that and ten times that.
        min_steps: trainings on few images take at least this many steps.
        allow_pickle: as in `load_model`.
        budget: see `budgets`.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None,
        config: MMFTConfig,
        learning_rates: Sequence[float] | None = None,
        min_steps: int = 0,
        allow_pickle: bool = False,
        budget: str = EQUAL,
    ):
        rates = [config.learning_rate, RATES_APART * config.learning_rate][: 2 if budget == LONG else 1]
        self.config, self.learning_rates = config, tuple(learning_rates or rates)
        self.min_steps, self.budget = min_steps, budget
        self._batches = config.per_device_eval_batch_size, config.on_bad_image
        self.model, self.processor = load_model(model_name, revision, allow_pickle)
        if config.long_captions == "stretch":
            self.model, self.processor = stretched(self.model, self.processor)
        self.model.to(config.device)
        self.scale = logit_scale(self.model).item()
        self._trained: dict[tuple, Trained] = {}

    def train(self, training: Callable, task: Task, learning_rate: float) -> Trained:
        """Runs a training, or returns the previous one if it is the same.

        The models of the last training and task are kept, one for each learning rate, for the next method that shares them.
        """
        group = (training, task.shots, task.seed, task.captions)
        key = (*group, learning_rate)
        if key not in self._trained:
            self._trained = {k: v for k, v in self._trained.items() if k[:-1] == group}
            give_memory_back()
            start = time.monotonic()
            trained = training(self, task, learning_rate)
            trained.seconds += time.monotonic() - start
            self._trained[key] = trained
        return self._trained[key]

    def features(self, dataset: Dataset) -> np.ndarray:
        """Image embeddings `(n, D)` of the untuned model, float64: encoded once, then read from the cache."""
        return self._encoded(dataset)[0].double().numpy()

    def examples(self, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """`features` and labels of the readable images."""
        embeds, labels = self._encoded(dataset)
        return embeds[labels != IGNORED].double().numpy(), labels[labels != IGNORED].numpy()

    def encoded(self, model: PreTrainedModel, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        """Image embeddings `(n, D)` of a tuned or the untuned model, and labels `(n,)`, -100 for an unreadable image."""
        if model is self.model:
            return self._encoded(dataset)
        return embeddings(model, self.processor, dataset, *self._batches)

    def head_data(self, trained: Trained, prototypes: ClassPrototypes) -> HeadData:
        """What heads are fitted to: the images and texts of a training, by its weights.

        Args:
            prototypes: of the same weights.
        """
        template, cached = self.config.class_template, trained.model is self.model
        more = {"cached": cached, "long_captions": self.config.long_captions}
        return head_data(trained.model, self.processor, trained.texts, prototypes, template, *self._batches, **more)

    def _encoded(self, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        return image_features(self.model, self.processor, dataset, *self._batches)

    def classifier(self, model: PreTrainedModel, head) -> Classifier:
        """Scores `(n, C)` of a head on the image embeddings of a tuned or the untuned model."""

        def scores(dataset: Dataset) -> np.ndarray:
            if model is self.model:
                return head.logits(torch.from_numpy(self.features(dataset))).numpy()
            found = ImageClassifier(model, self.processor, head)
            return classify(found, dataset, *self._batches, progress=False).scores

        return scores

    def accuracy(self, classifier: Classifier, dataset: Dataset) -> float:
        """Share of the images that are classified correctly; unreadable ones are left out with `on_bad_image="skip"`."""
        right = classifier(dataset).argmax(axis=1) == labels_of(dataset)
        return float(right[readable_rows(dataset)].mean() if self.config.on_bad_image == "skip" else right.mean())

    def report(self, model: PreTrainedModel, head: Head, dataset: Dataset, logits: Classifier | None = None) -> dict:
        """`Predictions.report` of a head on the image embeddings of a model: every metric that can select.

        Args:
            logits (*optional*): gives those of each image, in place of the head's own.
        """
        found = classify(ImageClassifier(model, self.processor, head), dataset, *self._batches, progress=False)
        if logits is not None:
            values = torch.from_numpy(logits(dataset)).float()
            losses = image_losses(values, torch.from_numpy(found.labels))
            found = replace(found, scores=values.softmax(dim=1).numpy(), losses=losses.numpy())
        return found.report()

    def mixture(self, trained: Trained, share: float) -> Classifier:
        """Logits `(n, C)`: `share` times those of a training, the rest those of the untuned model with the training's first head."""

        def logits(dataset: Dataset) -> np.ndarray:
            tuned = trained.head.logits(self.encoded(trained.model, dataset)[0])
            untuned = trained.first_head.logits(self._encoded(dataset)[0])
            return (share * tuned + (1 - share) * untuned).numpy()

        return logits

    def template_prototypes(self, model: PreTrainedModel, class_names: list[str]) -> ClassPrototypes:
        """Class embeddings of a tuned or the untuned model: the class names in the class template."""
        return ClassPrototypes.from_templates(model, self.processor, class_names, self.config.class_template)

    def caption_prototypes(
        self, model: PreTrainedModel, texts: Dataset, template_weight: float | None = None
    ) -> ClassPrototypes:
        """Class embeddings of a tuned or the untuned model: averages of the captions of `texts`.

        Args:
            template_weight: share of the class template. Default: the config's.
        """
        weight = self.config.template_weight if template_weight is None else template_weight
        template, more = self.config.class_template, {"long_captions": self.config.long_captions}
        return ClassPrototypes.from_captions(model, self.processor, texts, template, template_weight=weight, **more)

    def zero_shot_prototypes(self, class_names: list[str]) -> ClassPrototypes:
        """Class embeddings of the untuned model, averaged over the 80 templates."""
        return ClassPrototypes.from_templates(self.model, self.processor, class_names, TEMPLATES)
