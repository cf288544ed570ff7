"""How the fine-tuning methods of a benchmark make their weights: a task in, a tuned model out.

Methods that differ at inference alone share a training: `mmft`, `mmft+wise` and `mmft-train-captions`, for example.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from tempfile import TemporaryDirectory

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, set_seed

from ...baselines import linear
from ...baselines.clip_lora import ALPHA, DROPOUT, RANK, attention_inputs, clip_lora
from ...baselines.cross_entropy import train_head
from ...data.sampling import IGNORED, generator
from ...data.splits import labels_of
from ...data.texts import TEMPLATES
from ...model.features import image_features
from ...model.loading import load_model
from ...model.loading import logit_scale as scale_of
from ...model.memory import give_memory_back
from ...model.towers import merge, set_towers
from ...predict.evaluation import classify
from ...predict.heads import LinearHead
from ...predict.heads.prototypes import ClassPrototypes, image_embeddings
from ...train.config import MMFTConfig
from .protocol import FULL, Classifier, Task, readable_rows

LORA_FACTOR = 10  # LoRA takes steps a decade larger than whole towers do


@dataclass
class Trained:
    """What a training left: the model (LoRA merged), the images with the texts it saw, steps and seconds.

    A head, if that classifies, and the head it started from; what validation chose for that one.
    """

    model: PreTrainedModel
    texts: Dataset
    steps: int
    seconds: float
    head: LinearHead | None = None
    first_head: LinearHead | None = None
    chosen: dict = field(default_factory=dict)


# -- texts -----------------------------------------------------------------------------------------------------------------
def own_captions(task: Task) -> Dataset:
    """The images with their captions, if they have any."""
    return task.train


def without_captions(task: Task) -> Dataset:
    """The same images, with class templates alone."""
    return task.train.remove_columns("captions") if "captions" in task.train.column_names else task.train


def shuffled(within: bool) -> Callable[[Task], Dataset]:
    """The same images with each other's captions, of the same class or of any."""
    return lambda task: shuffled_captions(task.train, task.seed, within)


def shuffled_captions(dataset: Dataset, seed: int, within: bool) -> Dataset:
    """The same rows with each other's captions, of the same class or of any."""
    labels, order = labels_of(dataset), np.arange(len(dataset))
    groups = [np.flatnonzero(labels == c) for c in np.unique(labels)] if within else [order.copy()]
    for i, rows in enumerate(groups):
        order[rows] = generator(seed, i, 3).permutation(rows)
    captions = dataset["captions"][:]
    kind = dataset.features["captions"]
    return dataset.remove_columns("captions").add_column("captions", [captions[i] for i in order], feature=kind)


def permuted_labels(task: Task) -> Dataset:
    """The images with their captions and each other's labels."""
    kind = task.train.features["label"]
    labels = generator(task.seed, 4).permutation(labels_of(task.train))
    return task.train.remove_columns("label").add_column("label", labels.tolist(), feature=kind)


# -- trainings -------------------------------------------------------------------------------------------------------------
def settings_for(shop: Workshop, task: Task, learning_rate: float, folder: str, **settings) -> MMFTConfig:
    """The benchmark's settings for one training: equal budgets for all methods.

    Few images are trained for `shop.min_steps` steps at least, and their last step is kept; with all images the best
    epoch on validation is.
    """
    config = copy.deepcopy(shop.config)
    settings = {
        "output_dir": folder,
        "seed": task.seed,
        "disable_tqdm": True,
        "learning_rate": learning_rate,
        "save_only_model": True,  # no training here is resumed, and the moments of Adam are twice the weights
    } | settings
    if task.shots != FULL:  # few images of validation select epochs badly
        settings |= {
            "eval_strategy": "no",
            "eval_on_start": False,
            "save_strategy": "no",
            "load_best_model_at_end": False,
        }
        steps = math.ceil(len(task.train) / config.per_device_train_batch_size) * config.num_train_epochs
        if config.max_steps < 0 and steps < shop.min_steps:
            settings["max_steps"] = shop.min_steps
    for name, value in settings.items():
        setattr(config, name, value)
    return config


@contextmanager
def set_up(
    shop: Workshop, task: Task, learning_rate: float, **settings
) -> Iterator[tuple[PreTrainedModel, MMFTConfig, Dataset | None]]:
    """A copy of the untuned model, the settings of `settings_for`, and what selects the epoch, if anything does."""
    set_seed(task.seed)
    model = copy.deepcopy(shop.model)
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        config = settings_for(shop, task, learning_rate, folder, **settings)
        yield model, config, task.validation if task.shots == FULL else None


def contrastive(
    texts: Callable[[Task], Dataset] = own_captions,
    vision_tower: str = "full",
    text_tower: str = "full",
    small_lora: bool = False,
    templates: bool = False,
    **settings,
) -> Callable[[Workshop, Task, float], Trained]:
    """A training by `MMFTTrainer`.

    Args:
        texts: what the images of a task are trained with.
        vision_tower, text_tower: `full`, `lora` or `frozen`.
        small_lora: the LoRA of a tower is that of `clip_lora`.
        templates: each image is read with one of 80 class templates, drawn at random.
        settings: of `MMFTConfig`, in place of the benchmark's.
    """
    if "supcon_weight" in settings:  # it stays there, wherever the benchmark's own is on its way to
        settings = {"supcon_weight_end": None} | settings

    def train(shop: Workshop, task: Task, learning_rate: float) -> Trained:
        from ...train.trainer import MMFTTrainer

        images = texts(task)
        start = time.monotonic()
        lora = "lora" in (vision_tower, text_tower)
        rate = LORA_FACTOR * learning_rate if lora else learning_rate
        with set_up(shop, task, rate, **settings) as (model, config, validation):
            if (vision_tower, text_tower) != ("full", "full"):
                where = (RANK, ALPHA, DROPOUT, attention_inputs(model)) if small_lora else ()
                set_towers(model, vision_tower, text_tower, *where)
            trainer = MMFTTrainer(model, config, images, validation, shop.processor)
            if templates:
                trainer.training_templates = TEMPLATES
            trainer.train()
        tuned = trainer.accelerator.unwrap_model(trainer.model)
        if lora:
            merge(tuned)
        return Trained(tuned, images, trainer.state.global_step, time.monotonic() - start)

    return train


def cross_entropy(start: str = "templates", fixed: bool = False) -> Callable[[Workshop, Task, float], Trained]:
    """A training of the image tower and a linear head, see `baselines.cross_entropy`.

    Args:
        start: of the head: the averages of 80 `templates`, or `regression` on frozen features, its C chosen on validation.
        fixed: the head stays.
    """

    def train(shop: Workshop, task: Task, learning_rate: float) -> Trained:
        began, chosen = time.monotonic(), {}
        if start == "regression":
            features = shop.examples(task.train)
            choice = linear.choose(*features, *shop.examples(task.validation))
            chosen = choice.parameters
            weights = [torch.from_numpy(part).float() for part in linear.head(*features, **chosen)]
            first = LinearHead(weights[0], task.class_names, weights[1])
        else:
            first = LinearHead.from_prototypes(shop.template_prototypes(task.class_names, several=True))
        with set_up(shop, task, learning_rate) as (model, config, validation):
            head, steps = train_head(model, shop.processor, config, task.train, first, validation, fixed)
        return Trained(model, task.train, steps, time.monotonic() - began, head, first, chosen)

    return train


def low_rank(shop: Workshop, task: Task, learning_rate: float) -> Trained:
    """CLIP-LoRA, see `baselines.clip_lora`."""
    start = time.monotonic()
    with set_up(shop, task, LORA_FACTOR * learning_rate) as (model, config, validation):
        steps = clip_lora(model, shop.processor, config, task.train, validation)
    return Trained(model, task.train, steps, time.monotonic() - start)


TRAININGS: dict[str, Callable[..., Trained]] = {
    "ce": cross_entropy(),
    "ce-frozen": cross_entropy(fixed=True),
    "lp-ft": cross_entropy("regression"),
    "clip-lora": low_rank,
    "flyp": contrastive(without_captions, supcon_weight=0.0),
    "flyp-ens": contrastive(without_captions, templates=True, supcon_weight=0.0, prototypes="templates"),
    "mmft": contrastive(),
    "mmft-lora": contrastive(vision_tower="lora", text_tower="lora", small_lora=True),
    "mmft-lora-all": contrastive(vision_tower="lora", text_tower="lora"),
    "mmft-frozen-text": contrastive(text_tower="frozen"),
    "mmft-frozen-vision": contrastive(vision_tower="frozen"),
    "mmft-balanced": contrastive(samples_per_class=4),
    "mmft-dropout": contrastive(caption_dropout=0.5),
    "mmft-schedule": contrastive(supcon_weight=0.5, supcon_weight_end=0.0),
    "mmft-averaged": contrastive(weight_averaging=0.95),
    "mmft-w0": contrastive(supcon_weight=0.0),
    "mmft-w1": contrastive(supcon_weight=1.0),
    "mmft-no-captions": contrastive(without_captions),
    "mmft-shuffle-within": contrastive(shuffled(True)),
    "mmft-shuffle-across": contrastive(shuffled(False)),
    "mmft-permuted-labels": contrastive(permuted_labels),
}


def interpolated(trained: Trained, untuned: PreTrainedModel, alpha: float) -> PreTrainedModel:
    """A model with the weights `(1 - alpha) * untuned + alpha * trained`, the logit scale included.

    References: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (arXiv 2109.01903), equation 1.
    """
    model = copy.deepcopy(trained.model)
    with torch.no_grad():
        weights = untuned.state_dict()
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value.lerp_(weights[name], 1 - alpha)
    return model


# -- what all cells share ----------------------------------------------------------------------------------------------
class Workshop:
    """Models and features that all cells share.

    Args:
        model_name, revision: the untuned model.
        config: settings of the fine-tuning methods, the same for all of them.
        learning_rates: each fine-tuning method is fitted once with each, and validation chooses; default: the config's.
        min_steps: few images are trained for so many steps at least.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None,
        config: MMFTConfig,
        learning_rates: Sequence[float] | None = None,
        min_steps: int = 0,
    ):
        self.model_name, self.revision, self.config = model_name, revision, config
        self.learning_rates, self.min_steps = tuple(learning_rates or [config.learning_rate]), min_steps
        self.model, self.processor = load_model(model_name, revision)
        self.model.to(config.device)
        self.scale = scale_of(self.model).item()
        self._trained: dict[tuple, Trained] = {}

    def train(self, training: str, task: Task, learning_rate: float) -> Trained:
        """A training of `trainings`; the last one is kept, with all its learning rates, for the next method that shares it."""
        group = (training, task.shots, task.seed)
        key = (*group, learning_rate)
        if key not in self._trained:
            self._trained = {k: v for k, v in self._trained.items() if k[:3] == group}
            give_memory_back()
            self._trained[key] = TRAININGS[training](self, task, learning_rate)
        return self._trained[key]

    def features(self, dataset: Dataset) -> np.ndarray:
        """Image embeddings `(n, D)` of the untuned model: encoded once, then read from the cache."""
        return self._encoded(dataset)[0].double().numpy()

    def examples(self, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """The same and labels, of those images that can be read."""
        embeds, labels = self._encoded(dataset)
        return embeds[labels != IGNORED].double().numpy(), labels[labels != IGNORED].numpy()

    def _encoded(self, dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        size, bad = self.config.per_device_eval_batch_size, self.config.on_bad_image
        return image_features(self.model, self.processor, dataset, size, bad)

    def accuracy(self, classifier: Classifier, dataset: Dataset) -> float:
        """Share of the images of a data set that are classified right; one that cannot be read counts for nothing."""
        right = classifier(dataset).argmax(axis=1) == labels_of(dataset)
        return float(right[readable_rows(dataset)].mean() if self.config.on_bad_image == "skip" else right.mean())

    def template_prototypes(self, class_names: list[str], several: bool = False) -> ClassPrototypes:
        """Zero-shot class weights of the untuned model."""
        templates = TEMPLATES if several else self.config.class_template
        return ClassPrototypes.from_templates(self.model, self.processor, class_names, templates)

    def by_prototypes(self, model, prototypes: ClassPrototypes) -> Classifier:
        """Scores by comparing images with prototypes."""

        def classifier(dataset: Dataset) -> np.ndarray:
            if model is self.model:
                return prototypes.logits(torch.from_numpy(self.features(dataset))).numpy()
            size, bad = self.config.per_device_eval_batch_size, self.config.on_bad_image
            return classify(model, self.processor, prototypes, dataset, size, bad, progress=False).scores

        return classifier

    def embedder(self, model) -> Callable[[Dataset], np.ndarray]:
        """Unit-norm embeddings `(n, D)` of the images of a data set."""
        if model is self.model:
            return self.features

        def embed(dataset: Dataset) -> np.ndarray:
            size, bad = self.config.per_device_eval_batch_size, self.config.on_bad_image
            found = image_embeddings(model, self.processor, dataset, size, bad)
            return torch.cat([embeds.cpu() for embeds, _ in found]).double().numpy()

        return embed
