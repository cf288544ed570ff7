"""The methods of a benchmark: a task in, a classifier out.

| name | what it is |
|---|---|
| `zs`, `zs-ens` | the untuned model, with the class template, or with the average over 80 templates |
| `zs-cap` | the untuned model, with class averages of the training captions |
| `lp` | logistic regression on frozen image features, C from validation |
| `gda`, `tip`, `tip-f` | see `baselines`, their parameters from validation |
| `lp++`, `zs-lp`, `clap` | see `baselines`, without validation |
| `flyp` | both towers, contrastive loss with class templates (w = 0), as in FLYP with one template |
| `mmft`, `mmft-lora` | the method, with whole towers, or with LoRA in both |
| `mmft-w0`, `mmft-w1` | with the CLIP loss alone, or the SupCon loss alone |
| `mmft-no-captions` | the loss of `mmft` on class templates, also at inference |
| `mmft-train-captions`, `mmft-test-captions` | captions in training only, or at inference only |
| `mmft-shuffle-within`, `mmft-shuffle-across` | captions shuffled among the images of a class, or among all |
| `NAME+wise` | halfway between the untuned weights and those of NAME (a fine-tuned one), with prototypes of these |
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from tempfile import TemporaryDirectory

import numpy as np
import torch
from datasets import Dataset
from transformers import set_seed

from ..baselines import clap, gda, linear, lp_plus_plus, tip_adapter
from ..configuration import MMFTConfig
from ..data import labels_of
from ..evaluation import classify
from ..features import image_features
from ..modeling import load_model
from ..modeling import logit_scale as scale_of
from ..prompts import TEMPLATES
from ..prototypes import ClassPrototypes
from ..sampling import generator
from ..towers import merge, set_towers
from .protocol import FULL, Classifier, Task

WISE = "+wise"
ALPHA = 0.5  # WiSE-FT's recommendation where nothing is tuned


@dataclass
class Fitted:
    """What a method made of a task: the classifier, its validation accuracy, the policy, and what validation chose."""

    classifier: Classifier
    policy: str
    validation_accuracy: float | None = None
    chosen: dict = field(default_factory=dict)


class Workshop:
    """Models and features that all cells share.

    Args:
        model_name, revision: the untuned model.
        config: settings of the fine-tuning methods, the same for all of them.
    """

    def __init__(self, model_name: str, revision: str | None, config: MMFTConfig):
        self.model_name, self.revision, self.config = model_name, revision, config
        self.model, self.processor = load_model(model_name, revision)
        self.model.to(config.device)
        self.scale = scale_of(self.model).item()

    def features(self, dataset: Dataset) -> np.ndarray:
        """Image embeddings `(n, D)` of the untuned model: encoded once, then read from the cache."""
        embeds, _ = image_features(
            self.model, self.processor, dataset, self.config.per_device_eval_batch_size, self.config.on_bad_image
        )
        return embeds.double().numpy()

    def template_prototypes(self, class_names: list[str], several: bool = False) -> ClassPrototypes:
        """Zero-shot class weights of the untuned model."""
        template = self.config.class_template
        templates = [template, *(t for t in TEMPLATES if t != template)] if several else template
        return ClassPrototypes.from_templates(self.model, self.processor, class_names, templates)

    def by_prototypes(self, model, prototypes: ClassPrototypes) -> Classifier:
        """Scores by comparing images with prototypes."""

        def classifier(dataset: Dataset) -> np.ndarray:
            if model is self.model:
                return prototypes.logits(torch.from_numpy(self.features(dataset))).numpy()
            size, bad = self.config.per_device_eval_batch_size, self.config.on_bad_image
            return classify(model, self.processor, prototypes, dataset, size, bad, progress=False).scores

        return classifier


def accuracy(classifier: Classifier, dataset: Dataset) -> float:
    """Share of the images of a data set that are classified right."""
    return float((classifier(dataset).argmax(axis=1) == labels_of(dataset)).mean())


# -- without training ----------------------------------------------------------------------------------------------------
def zero_shot(shop: Workshop, task: Task, several: bool = False) -> Fitted:
    """`zs`, `zs-ens`."""
    prototypes = shop.template_prototypes(task.class_names, several)
    return Fitted(shop.by_prototypes(shop.model, prototypes), "last")


def zero_shot_captions(shop: Workshop, task: Task) -> Fitted:
    """`zs-cap`."""
    template = shop.config.class_template
    prototypes = ClassPrototypes.from_captions(shop.model, shop.processor, task.train, template)
    return Fitted(shop.by_prototypes(shop.model, prototypes), "last")


# -- on frozen features ----------------------------------------------------------------------------------------------------
def frozen(shop: Workshop, task: Task, method: Callable, choose: Callable | None, texts: bool, scaled: bool) -> Fitted:
    """A method of `baselines` on the features of the untuned model; `choose` picks its parameters on validation.

    Args:
        texts, scaled: whether it is given the class texts' embeddings, and the scale of the model's logits.
    """
    train, more = (shop.features(task.train), labels_of(task.train)), {}
    if scaled:
        more["scale"] = shop.scale
    if texts:
        more |= {"zero_shot": shop.template_prototypes(task.class_names, several=True).embeddings.double().numpy()}
    chosen, policy, found = {}, "last", None
    if choose is not None:
        choice = choose(*train, shop.features(task.validation), labels_of(task.validation), **more)
        chosen, policy, found = choice.parameters, task.policy, choice.accuracy

    def classifier(dataset: Dataset) -> np.ndarray:
        return method(*train, shop.features(dataset), **more, **chosen)

    found = accuracy(classifier, task.validation) if found is None else found
    return Fitted(classifier, policy, found, chosen)


# -- fine-tuning -----------------------------------------------------------------------------------------------------------
def without_captions(dataset: Dataset) -> Dataset:
    """The same images, with class templates alone."""
    return dataset.remove_columns("captions") if "captions" in dataset.column_names else dataset


def shuffled_captions(dataset: Dataset, seed: int, within: bool) -> Dataset:
    """The same images with each other's captions, of the same class or of any."""
    labels, order = labels_of(dataset), np.arange(len(dataset))
    groups = [np.flatnonzero(labels == c) for c in np.unique(labels)] if within else [order.copy()]
    for i, rows in enumerate(groups):
        order[rows] = generator(seed, i, 3).permutation(rows)
    captions = dataset["captions"][:]
    kind = dataset.features["captions"]
    return dataset.remove_columns("captions").add_column("captions", [captions[i] for i in order], feature=kind)


def fine_tune(
    shop: Workshop,
    task: Task,
    change: Callable[[Dataset], Dataset] = lambda dataset: dataset,
    inference: str | None = None,
    towers: str = "full",
    alpha: float = 1.0,
    **settings,
) -> Fitted:
    """Trains on `change(task.train)` and classifies by prototypes.

    Args:
        inference: prototypes of the task's own `captions` or the class `template`, whatever was trained on; default: what
            was trained on.
        alpha: weights are `(1 - alpha) * untuned + alpha * tuned`.
        settings: of `MMFTConfig`, in place of the benchmark's.
    """
    from ..trainer import MMFTTrainer

    train = change(task.train)
    full = task.shots == FULL
    set_seed(task.seed)
    model = copy.deepcopy(shop.model)
    if towers == "lora":
        set_towers(model, "lora", "lora")
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        config = copy.deepcopy(shop.config)
        settings = {"output_dir": folder, "seed": task.seed, "disable_tqdm": True, **settings}
        if not full:  # the last step, as few images of validation select badly
            settings |= {
                "eval_strategy": "no",
                "eval_on_start": False,
                "save_strategy": "no",
                "load_best_model_at_end": False,
            }
        for name, value in settings.items():
            setattr(config, name, value)
        trainer = MMFTTrainer(model, config, train, task.validation if full else None, shop.processor)
        trainer.train()
    tuned = trainer.accelerator.unwrap_model(trainer.model)
    if towers == "lora":
        merge(tuned)
    if alpha < 1:
        with torch.no_grad():
            untuned = shop.model.state_dict()
            for name, value in tuned.state_dict().items():
                if value.is_floating_point():
                    value.lerp_(untuned[name], 1 - alpha)
    template = shop.config.class_template
    if inference == "template":
        prototypes = ClassPrototypes.from_templates(tuned, shop.processor, task.class_names, template)
    else:
        texts = task.train if inference == "captions" else train
        prototypes = ClassPrototypes.from_captions(tuned, shop.processor, texts, template)
    classifier = shop.by_prototypes(tuned, prototypes)
    return Fitted(classifier, task.policy if full else "last", accuracy(classifier, task.validation))


def _shuffle(within: bool) -> Callable:
    return lambda shop, task, **more: fine_tune(
        shop, task, lambda dataset: shuffled_captions(dataset, task.seed, within), **more
    )


FROZEN = {
    "lp": (linear.logistic_regression, linear.choose, False, False),
    "gda": (gda.gda, gda.choose, True, True),
    "tip": (tip_adapter.tip, tip_adapter.choose, True, True),
    "tip-f": (tip_adapter.tip_f, tip_adapter.choose_f, True, True),
    "lp++": (lp_plus_plus.lp_plus_plus, None, True, False),
    "zs-lp": (clap.zs_lp, None, True, True),
    "clap": (clap.clap, None, True, True),
}
FINE_TUNED: dict[str, Callable[..., Fitted]] = {
    "flyp": lambda shop, task, **more: fine_tune(shop, task, without_captions, supcon_weight=0.0, **more),
    "mmft": lambda shop, task, **more: fine_tune(shop, task, **more),
    "mmft-lora": lambda shop, task, **more: fine_tune(shop, task, towers="lora", **more),
    "mmft-w0": lambda shop, task, **more: fine_tune(shop, task, supcon_weight=0.0, **more),
    "mmft-w1": lambda shop, task, **more: fine_tune(shop, task, supcon_weight=1.0, **more),
    "mmft-no-captions": lambda shop, task, **more: fine_tune(shop, task, without_captions, **more),
    "mmft-train-captions": lambda shop, task, **more: fine_tune(shop, task, inference="template", **more),
    "mmft-test-captions": lambda shop, task, **more: fine_tune(
        shop, task, without_captions, inference="captions", **more
    ),
    "mmft-shuffle-within": _shuffle(True),
    "mmft-shuffle-across": _shuffle(False),
}
METHODS = ("zs", "zs-ens", "zs-cap", *FROZEN, *FINE_TUNED, *(f"{name}{WISE}" for name in FINE_TUNED))
# These read captions and mean nothing without.
NEEDS_CAPTIONS = {"zs-cap"} | {
    name for name in METHODS if name.startswith("mmft") and not name.startswith("mmft-no-captions")
}
# At no shots there is nothing but the class names.
WITHOUT_TRAINING = ("zs", "zs-ens")


def fit(name: str, shop: Workshop, task: Task) -> tuple[Fitted, float]:
    """Runs a method on a task; also the seconds that it took."""
    start = time.monotonic()
    base = name.removesuffix(WISE)
    if base in ("zs", "zs-ens"):
        fitted = zero_shot(shop, task, several=base == "zs-ens")
    elif base == "zs-cap":
        fitted = zero_shot_captions(shop, task)
    elif base in FROZEN:
        fitted = frozen(shop, task, *FROZEN[base])
    else:
        fitted = FINE_TUNED[base](shop, task, **({"alpha": ALPHA} if name != base else {}))
    return fitted, time.monotonic() - start
