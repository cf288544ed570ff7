"""The methods of a benchmark: a task in, a classifier out.

| name | what it is |
|---|---|
| `zs`, `zs-ens` | the untuned model, with the class template, or with the average over 80 templates |
| `zs-cap` | the untuned model, with class averages of the training captions |
| `lp` | logistic regression on frozen image embeddings, C from validation |
| `gda`, `tip`, `tip-f` | see `baselines`, their parameters from validation |
| `lp++`, `zs-lp`, `clap` | see `baselines`, without validation |
| `ce`, `ce-frozen` | image tower by cross-entropy, with a head of zero-shot weights, trained or fixed |
| `lp-ft` | the same from the head of `lp` |
| `clip-lora` | LoRA in both towers by cross-entropy over the class templates |
| `flyp`, `flyp-ens` | both towers, contrastive loss (w = 0), with one class template, or 80 of them |
| `mmft`, `mmft-lora` | the method, with whole towers, or with the LoRA of `clip-lora` |
| `mmft-lora-all` | with the LoRA of `mmft-hf finetune`: rank 8, in all linear layers of both towers |
| `mmft-frozen-text`, `mmft-frozen-vision` | `mmft` with one tower alone trained |
| `mmft-w0`, `mmft-w1` | with the CLIP loss alone, or the SupCon loss alone |
| `mmft-no-captions` | the loss of `mmft` on class templates, also at inference |
| `mmft-train-captions`, `mmft-test-captions` | captions in training only, or at inference only |
| `mmft-shuffle-within`, `mmft-shuffle-across` | captions shuffled among the images of a class, or among all |
| `lp-permuted-labels` | `lp` with labels shuffled among all images: a control that must fall to chance |
| `mmft-permuted-labels` | `mmft` likewise; the class names in its texts may keep it above chance |
| `mmft-mixed` | `mmft`, with prototypes halfway between captions and class template |
| `mmft-balanced` | `mmft` with four images of each class in a batch |
| `mmft-dropout`, `mmft-schedule` | `mmft` with half of the captions dropped; with w from 0.5 to 0 |
| `mmft-averaged` | `mmft` with the running average of the weights (decay 0.95) |
| `NAME+wise` | halfway between the untuned weights and those of NAME (a fine-tuned one), with prototypes of these |

Where this is not what the papers do: methods on frozen features see each image once, without random crops (Tip-Adapter averages
ten), as its unit-norm embedding in the common space (the linear probe of CLIP's paper takes what is before the projection). `flyp`
trains and compares with one template; as in its paper, one of several drawn at each step, it is `flyp-ens`. Class texts of the
methods on frozen features and first heads are averages over the 80 templates.

With all images validation selects the epoch of a training, with what that training compares images with: methods that share one
(`mmft-train-captions` and `mmft-mixed` that of `mmft`, `mmft-test-captions` that of `mmft-no-captions`) are judged at that epoch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from ...baselines import clap, gda, linear, lp_plus_plus, tip_adapter
from ...core.errors import UserError
from ...data.texts import TEMPLATES
from ...predict.heads import ClassPrototypes, Head
from .protocol import FULL, Classifier, Task
from .trainings import Trained, Workshop, interpolated, permuted_labels

WISE = "+wise"
ALPHA = 0.5  # WiSE-FT's recommendation where nothing is tuned


@dataclass
class Fitted:
    """What a method made of a task.

    Args:
        policy: what validation was used for: `last` (nothing), `val-k`, `val-full`.
        chosen: what it chose; `tried`: among how many candidates.
        embed: unit-norm embeddings `(n, D)` of the images of a data set, and `prototypes`: what they are compared with, if
            the method is such a one.
        steps: of the training that was kept.
        seconds: of all fits, one after the other, whoever else they serve.
    """

    classifier: Classifier
    policy: str
    validation_accuracy: float | None = None
    chosen: dict = field(default_factory=dict)
    embed: Callable[[Dataset], np.ndarray] | None = None
    prototypes: ClassPrototypes | None = None
    tried: int = 1
    steps: int | None = None
    seconds: float = 0.0


# -- without training ----------------------------------------------------------------------------------------------------
def zero_shot(shop: Workshop, task: Task, several: bool = False) -> Fitted:
    """`zs`, `zs-ens`."""
    return untuned(shop, task, shop.template_prototypes(task.class_names, several))


def zero_shot_captions(shop: Workshop, task: Task) -> Fitted:
    """`zs-cap`."""
    template, weight = shop.config.class_template, shop.config.template_weight
    texts = ClassPrototypes.from_captions(shop.model, shop.processor, task.train, template, template_weight=weight)
    return untuned(shop, task, texts)


def untuned(shop: Workshop, task: Task, prototypes: ClassPrototypes) -> Fitted:
    """The untuned model with these prototypes."""
    classifier = shop.by_prototypes(shop.model, prototypes)
    found = shop.accuracy(classifier, task.validation)
    return Fitted(classifier, "last", found, embed=shop.embedder(shop.model), prototypes=prototypes)


# -- on frozen features ----------------------------------------------------------------------------------------------------
class OnFeatures(NamedTuple):
    """A method of `baselines` on the features of the untuned model.

    Args:
        method, choose: gives scores; picks its parameters on validation, where there are any to pick.
        texts, scaled, seeded: whether it is given the class texts' embeddings, the scale of the model's logits, a seed.
    """

    method: Callable[..., np.ndarray]
    choose: Callable | None = None
    texts: bool = True
    scaled: bool = True
    seeded: bool = False


def frozen(shop: Workshop, task: Task, of: OnFeatures) -> Fitted:
    """A method on frozen features."""
    train, more = shop.examples(task.train), {}
    if of.scaled:
        more["scale"] = shop.scale
    if of.texts:
        more["zero_shot"] = shop.template_prototypes(task.class_names, several=True).embeddings.double().numpy()
    if of.seeded:
        more["seed"] = task.seed
    chosen, policy, found, tried = {}, "last", None, 1
    if of.choose is not None:
        choice = of.choose(*train, *shop.examples(task.validation), **more)
        chosen, policy, found, tried = choice.parameters, task.policy, choice.accuracy, choice.tried

    def classifier(dataset: Dataset) -> np.ndarray:
        return of.method(*train, shop.features(dataset), **more, **chosen)

    found = shop.accuracy(classifier, task.validation) if found is None else found
    return Fitted(classifier, policy, found, chosen, tried=tried)


# -- fine-tuning -----------------------------------------------------------------------------------------------------------
def fine_tune(shop: Workshop, task: Task, training: str, inference: str, alpha: float = 1.0) -> Fitted:
    """A training of `trainings`, by prototypes of its weights; validation chooses among the learning rates, if there are several.

    A rate at which training fails is out of the choice; where all fail, the first error is raised.

    Args:
        inference: prototypes of the texts it was trained on (`own`), of the task's `captions`, of the class `template`, of
            80 `templates`, halfway between captions and template (`mixed`), or the trained `head`.
        alpha: weights are `(1 - alpha) * untuned + alpha * tuned`.
    """
    best, seconds, failed = None, 0.0, {}
    for rate in shop.learning_rates:
        start = time.monotonic()
        try:
            trained = shop.train(training, task, rate)
        except UserError as error:  # a loss that is no number, say: another rate may do
            failed[rate] = error
            seconds += time.monotonic() - start
            continue
        start = time.monotonic()
        model = interpolated(trained, shop.model, alpha) if alpha < 1 else trained.model
        prototypes = prototypes_for(shop, task, trained, model, inference, alpha)
        classifier = shop.by_prototypes(model, prototypes)
        found = shop.accuracy(classifier, task.validation)
        seconds += trained.seconds + time.monotonic() - start
        if best is None or found > best.validation_accuracy:  # of equal ones the first
            chosen = {"learning_rate": rate} if len(shop.learning_rates) > 1 else {}
            chosen |= trained.chosen
            best = Fitted(classifier, "last", found, chosen, shop.embedder(model), prototypes, steps=trained.steps)
    if best is None:
        raise next(iter(failed.values()))
    if failed:
        best.chosen["failed_rates"] = " ".join(f"{rate:g}" for rate in failed)
    if best.chosen or task.shots == FULL:  # of rates, or of epochs
        best.policy = task.policy
    best.tried, best.seconds = len(shop.learning_rates), seconds
    return best


def prototypes_for(
    shop: Workshop, task: Task, trained: Trained, model: PreTrainedModel, inference: str, alpha: float
) -> Head:
    """What `model`, made of `trained`, compares images with; see `fine_tune`."""
    template = shop.config.class_template
    if inference == "head":
        return trained.head.interpolated(trained.first_head, alpha)
    if inference in ("template", "templates"):
        several = TEMPLATES if inference == "templates" else template
        return ClassPrototypes.from_templates(model, shop.processor, task.class_names, several)
    texts = task.train if inference == "captions" else trained.texts
    mixed = 0.5 if inference == "mixed" else shop.config.template_weight
    return ClassPrototypes.from_captions(model, shop.processor, texts, template, template_weight=mixed)


FROZEN = {
    "lp": OnFeatures(linear.logistic_regression, linear.choose, texts=False, scaled=False),
    "lp-permuted-labels": OnFeatures(linear.logistic_regression, linear.choose, texts=False, scaled=False),
    "gda": OnFeatures(gda.gda, gda.choose),
    "tip": OnFeatures(tip_adapter.tip, tip_adapter.choose),
    "tip-f": OnFeatures(tip_adapter.tip_f, tip_adapter.choose_f, seeded=True),
    "lp++": OnFeatures(lp_plus_plus.lp_plus_plus),
    "zs-lp": OnFeatures(clap.zs_lp, seeded=True),
    "clap": OnFeatures(clap.clap, seeded=True),
}
# Name: the training (of `trainings.TRAININGS`), and what images are compared with (see `fine_tune`).
FINE_TUNED = {
    "ce": ("ce", "head"),
    "ce-frozen": ("ce-frozen", "head"),
    "lp-ft": ("lp-ft", "head"),
    "clip-lora": ("clip-lora", "template"),
    "flyp": ("flyp", "template"),
    "flyp-ens": ("flyp-ens", "templates"),
    "mmft": ("mmft", "own"),
    "mmft-mixed": ("mmft", "mixed"),
    "mmft-train-captions": ("mmft", "template"),
    "mmft-lora": ("mmft-lora", "own"),
    "mmft-lora-all": ("mmft-lora-all", "own"),
    "mmft-frozen-text": ("mmft-frozen-text", "own"),
    "mmft-frozen-vision": ("mmft-frozen-vision", "own"),
    "mmft-balanced": ("mmft-balanced", "own"),
    "mmft-dropout": ("mmft-dropout", "own"),
    "mmft-schedule": ("mmft-schedule", "own"),
    "mmft-averaged": ("mmft-averaged", "own"),
    "mmft-w0": ("mmft-w0", "own"),
    "mmft-w1": ("mmft-w1", "own"),
    "mmft-no-captions": ("mmft-no-captions", "template"),
    "mmft-test-captions": ("mmft-no-captions", "captions"),
    "mmft-shuffle-within": ("mmft-shuffle-within", "own"),
    "mmft-shuffle-across": ("mmft-shuffle-across", "own"),
    "mmft-permuted-labels": ("mmft-permuted-labels", "own"),
}
METHODS = ("zs", "zs-ens", "zs-cap", *FROZEN, *FINE_TUNED, *(f"{name}{WISE}" for name in FINE_TUNED))
# These read captions and mean nothing without.
NEEDS_CAPTIONS = {"zs-cap"} | {
    name for name in METHODS if name.startswith("mmft") and not name.startswith("mmft-no-captions")
}
# At no shots there is nothing but the class names.
WITHOUT_TRAINING = ("zs", "zs-ens")


def training_of(name: str) -> str:
    """What a method shares with others: its training, or, where it has none, its own name."""
    base = name.removesuffix(WISE)
    return FINE_TUNED[base][0] if base in FINE_TUNED else name


def fit(name: str, shop: Workshop, task: Task) -> Fitted:
    """Runs a method on a task."""
    start = time.monotonic()
    base = name.removesuffix(WISE)
    if base in FINE_TUNED:  # with the seconds of a training that another method made
        return fine_tune(shop, task, *FINE_TUNED[base], alpha=ALPHA if name != base else 1.0)
    if base in ("zs", "zs-ens"):
        fitted = zero_shot(shop, task, several=base == "zs-ens")
    elif base == "zs-cap":
        fitted = zero_shot_captions(shop, task)
    else:
        if name == "lp-permuted-labels":
            task = replace(task, train=permuted_labels(task))
        fitted = frozen(shop, task, FROZEN[base])
    fitted.seconds = time.monotonic() - start
    return fitted
