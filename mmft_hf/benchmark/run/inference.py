"""What a method compares images with: a head from the texts of a tuned model, its own trained head, or frozen features.

Each function takes the context, a task and the result of a training (see `context.Trained`) and returns a head: an object
with `logits(image_embeds (B, D)) -> (B, C)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ...data.texts import TEMPLATES
from ...predict.fitting import auto
from ...predict.fitting.heads import fit_head
from ...predict.fitting.inputs import Choice
from ...predict.heads import ClassPrototypes, Head, LinearHead
from ...train.selection import metric_name
from .context import Context, Trained
from .protocol import Task
from .trainings import halfway


def template(context: Context, task: Task, trained: Trained) -> ClassPrototypes:
    """The class names in the class template."""
    return context.template_prototypes(trained.model, task.class_names)


def templates(context: Context, task: Task, trained: Trained) -> ClassPrototypes:
    """The class names in 80 templates, averaged."""
    return ClassPrototypes.from_templates(trained.model, context.processor, task.class_names, TEMPLATES)


def captions(context: Context, task: Task, trained: Trained) -> ClassPrototypes:
    """Class averages of the captions of the training images."""
    return context.caption_prototypes(trained.model, task.train)


def training_texts(context: Context, task: Task, trained: Trained) -> ClassPrototypes:
    """Class averages of the texts that the model was trained on."""
    return context.caption_prototypes(trained.model, trained.texts)


def mixed(context: Context, task: Task, trained: Trained) -> ClassPrototypes:
    """Halfway between `training_texts` and `template`."""
    return context.caption_prototypes(trained.model, trained.texts, template_weight=0.5)


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
    texts: str | None = "templates",
    seeded: bool = False,
) -> Callable[[Context, Task, Trained], FeatureHead]:
    """A method of `baselines` on the image features of the untuned model.

    Args:
        method: `(train_x, train_y, test_x, **parameters) -> scores`.
        choose: `(train_x, train_y, val_x, val_y, …) -> Choice`: picks parameters of `method` on validation.
        images: the training images.
        texts: the class texts (`zero_shot`) that the method takes, with the model's `scale`: averages over 80 `templates`, or
            class averages of the `captions`; None: it takes none.
        seeded: whether it takes a `seed`.
    """

    def head(context: Context, task: Task, trained: Trained) -> FeatureHead:
        train, options = context.examples(images(task)), {}
        if texts:
            by_class = captions if texts == "captions" else lambda *_: context.zero_shot_prototypes(task.class_names)
            zero_shot = by_class(context, task, trained).embeddings.double().numpy()
            options |= {"zero_shot": zero_shot, "scale": context.scale}
        if seeded:
            options["seed"] = task.seed
        choice = choose(*train, *context.examples(task.validation), **options) if choose else None
        parameters = options | (choice.parameters if choice else {})
        return FeatureHead(lambda features: method(*train, features, **parameters), choice)

    return head


def fitted(name: str) -> Callable[[Context, Task, Trained], Head]:
    """A head of `--head`, fitted to the training images and texts by the weights of a training; see `predict.fitting.heads`."""

    def head(context: Context, task: Task, trained: Trained) -> Head:
        return fit_head(name, context.head_data(trained, training_texts(context, task, trained)))

    return head


def chosen_on_validation(context: Context, task: Task, trained: Trained) -> tuple[Trained, Head, dict]:
    """Weights and head as `--head auto` chooses them on validation; see `predict.fitting.auto`.

    Returns:
        The weights, the head on them, and what was chosen by name.
    """
    untuned = Trained(context.model, trained.texts)
    weights = {0.0: untuned}
    if trained.model is not context.model:
        weights |= {0.5: halfway(replace(trained, head=None), context.model, 0.5), 1.0: trained}
    states = (
        auto.State(
            alpha,
            context.head_data(found, training_texts(context, task, found)),
            *context.encoded(found.model, task.validation),
        )
        for alpha, found in weights.items()
    )
    named, adjustment = context.config.metric_for_best_model, context.config.logit_adjustment
    choice = auto.select(states, "auto", template(context, task, untuned), named and metric_name(named), adjustment)
    kept = choice.chosen
    return weights[kept.alpha], kept.head, {"head": kept.name, "head_alpha": kept.alpha}
