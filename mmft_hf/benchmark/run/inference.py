"""What a method compares images with: a head from the texts of a tuned model, its own trained head, or frozen features.

Each function takes the context, a task and the result of a training (see `context.Trained`) and returns a head: an object
with `logits(image_embeds (B, D)) -> (B, C)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ...baselines.inputs import Choice
from ...data.texts import TEMPLATES
from ...predict.heads import ClassPrototypes, LinearHead
from .context import Context, Trained
from .protocol import Task


def template(context: Context, task: Task, trained: Trained) -> ClassPrototypes:
    """The class names in the class template."""
    return _templates(context, task, trained, context.config.class_template)


def templates(context: Context, task: Task, trained: Trained) -> ClassPrototypes:
    """The class names in 80 templates, averaged."""
    return _templates(context, task, trained, TEMPLATES)


def _templates(context: Context, task: Task, trained: Trained, templates: str | Sequence[str]) -> ClassPrototypes:
    return ClassPrototypes.from_templates(trained.model, context.processor, task.class_names, templates)


def captions(context: Context, task: Task, trained: Trained) -> ClassPrototypes:
    """Class averages of the captions of the training images."""
    return _captions(context, trained, task.train, context.config.template_weight)


def training_texts(context: Context, task: Task, trained: Trained) -> ClassPrototypes:
    """Class averages of the texts that the model was trained on."""
    return _captions(context, trained, trained.texts, context.config.template_weight)


def mixed(context: Context, task: Task, trained: Trained) -> ClassPrototypes:
    """Halfway between `training_texts` and `template`."""
    return _captions(context, trained, trained.texts, 0.5)


def _captions(context: Context, trained: Trained, texts: Dataset, template_weight: float) -> ClassPrototypes:
    return ClassPrototypes.from_captions(
        trained.model, context.processor, texts, context.config.class_template, template_weight=template_weight
    )


def trained_head(context: Context, task: Task, trained: Trained) -> LinearHead:
    """The head that was trained with the model."""
    return trained.head


@dataclass
class FeatureHead:
    """A classifier of frozen features.

    Args:
        scores: features `(n, D)` -> scores `(n, C)`.
        choice: the parameters that validation chose, where there are any to choose.
    """

    scores: Callable[[Tensor], np.ndarray]
    choice: Choice | None = None

    def logits(self, image_embeds: Tensor) -> Tensor:
        """`(B, C)` scores of unit-norm image embeddings `(B, D)`."""
        return torch.from_numpy(self.scores(image_embeds))


def on_features(
    method: Callable[..., np.ndarray],
    choose: Callable[..., Choice] | None = None,
    images: Callable[[Task], Dataset] = lambda task: task.train,
    texts: bool = True,
    seeded: bool = False,
) -> Callable[[Context, Task, Trained], FeatureHead]:
    """A method of `baselines` on the image features of the untuned model.

    Args:
        method: `(train_x, train_y, test_x, **parameters) -> scores`.
        choose: `(train_x, train_y, val_x, val_y, …) -> Choice`: picks parameters of `method` on validation.
        images: the training images.
        texts: whether the method takes class texts (`zero_shot`) and the model's `scale`.
        seeded: whether it takes a `seed`.
    """

    def head(context: Context, task: Task, trained: Trained) -> FeatureHead:
        train, options = context.examples(images(task)), {}
        if texts:
            zero_shot = context.zero_shot_prototypes(task.class_names).embeddings.double().numpy()
            options |= {"zero_shot": zero_shot, "scale": context.scale}
        if seeded:
            options["seed"] = task.seed
        choice = choose(*train, *context.examples(task.validation), **options) if choose else None
        parameters = options | (choice.parameters if choice else {})
        return FeatureHead(lambda features: method(*train, features, **parameters), choice)

    return head
