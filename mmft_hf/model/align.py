"""The projections of two towers into their common space, by one ridge regression instead of a training.

Shapes: `n` pictures, `C` classes, `V` and `H` widths of the image tower and of the text tower, `D` size of the common space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, PreTrainedModel, ProcessorMixin

from ..core.builtin import builtin
from ..core.errors import UserError
from ..data.sampling import IGNORED, hold_out
from ..data.splits import captions_of
from ..data.texts import DEFAULT_TEMPLATE, class_prompt
from .features import BATCH_SIZE, image_features, text_features
from .opening import first_line, open_config
from .weights import find_weights

RIDGES = tuple(10.0**power for power in range(-4, 3))
HELD_OUT = 0.2  # of the training pictures of each class, to choose the ridge
SCALES = torch.logspace(0, 2, 201, dtype=torch.float64)  # of the logits; 100 is the highest of CLIP


@dataclass(frozen=True)
class Projections:
    """`vision` `(D, V)` and `text` `(D, H)`, in float64."""

    vision: Tensor
    text: Tensor


@dataclass(frozen=True)
class Alignment:
    """What `align_towers` has chosen.

    Args:
        ridge: relative to the mean eigenvalue of the regression's second moments.
        accuracy: zero-shot, on the held-out training pictures, from 0 to 1, of projections that have not seen them.
        pictures: how many these are.
        scale: of the logits.
        targets: number of pairs that the regression learned from.
    """

    ridge: float
    accuracy: float
    pictures: int
    scale: float
    targets: int


def ridge_regression(inputs: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """The weights `W` `(inputs' width, targets' width)` of least mean |x W - y|^2 + λ |W|^2, in float64, without a constant.

    Args:
        ridge: λ, as a multiple of the mean eigenvalue of the inputs' second moments, so that it has no unit.
    """
    inputs, targets = inputs.double(), targets.double()
    moments = inputs.T @ inputs / len(inputs)
    width = len(moments)
    penalty = ridge * moments.trace() / width * torch.eye(width, dtype=torch.float64)
    return torch.linalg.solve(moments + penalty, inputs.T @ targets / len(inputs))


def from_pairs(images: Tensor, texts: Tensor, ridge: float) -> Projections:
    """Projections from `n` pictures `(n, V)` and their texts `(n, H)`: pictures are mapped to texts, which stay, and `D` is `H`.

    The reverse knows nothing of how pictures vary within a class. On builtin/emoji-mini, with an EfficientNet and a MiniLM, it
    was right on 44 to 49 % of the validation pictures, this on 53 %.
    """
    images, texts = (F.normalize(x.double(), dim=-1) for x in (images, texts))
    return Projections(ridge_regression(images, texts, ridge).T, torch.eye(texts.shape[1], dtype=texts.dtype))


def from_class_rows(rows: Tensor, texts: Tensor, ridge: float) -> Projections:
    """Projections from the rows `(C, V)` of an image classifier and the texts `(C, H)` of its classes: texts are mapped to rows.

    The mean of the rows, which adds the same to the logits of all classes, is taken out of them. What pictures have outside of
    the space of the mapped texts does not change which one is closest; it is left out, so that `D` is at most `H`.
    """
    rows = rows.double() - rows.double().mean(dim=0)
    weights = ridge_regression(F.normalize(texts.double(), dim=-1), rows, ridge)
    left, sizes, right = torch.linalg.svd(weights.T, full_matrices=False)
    return Projections(left.T, sizes[:, None] * right)


def cosines(found: Projections, images: Tensor, texts: Tensor) -> Tensor:
    """Cosines `(n, C)` of pictures `(n, V)` and texts `(C, H)` after the projections."""
    images, texts = images.double() @ found.vision.T, texts.double() @ found.text.T
    return F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T


def align_towers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    train: Dataset,
    class_template: str = DEFAULT_TEMPLATE,
    class_rows: tuple[Sequence[str], Tensor] | None = None,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    **options,
) -> Alignment:
    """Replaces the projections and the scale of a model that `combine_towers` made. Both towers stay as they are.

    Pairs are the training pictures, each with the mean of its captions' vectors and that of its class template. The ridge is
    the one with the highest zero-shot accuracy on a part of the training pictures (of equal ones the largest), which the
    regression has not seen; then it learns from all. The scale has the least cross-entropy on that part.

    Args:
        train: training pictures: columns `image`, `label` and, if there are any, `captions`. Never give evaluation pictures.
        class_rows: names and rows `(C, V)` of an image classifier (see `classifier_rows`), to learn from instead of pairs.
            The pictures then choose only ridge and scale.
        seed: of the part that is held out.
        options: of `features.Encoding`, and `on_bad_image`.

    Raises:
        UserError: the model is not made of two towers, or there are fewer than two classes with two pictures.
    """
    if model.config.model_type != "vision-text-dual-encoder":
        raise UserError(
            f"align: expected a model of two towers, found a {type(model).__name__}. Use combine_towers(…)."
        )
    names = train.features["label"].names
    encode = _tower_outputs(model, processor, batch_size)
    images, labels = encode(image_features, train, **options)
    readable = (labels != IGNORED).nonzero().flatten()
    images, labels = images[readable], labels[readable]
    prompts = [class_prompt(class_template, name) for name in names]
    if not images.isfinite().all() or not images.any():
        raise UserError(
            "--vision_model: expected an image tower whose outputs are finite and not all zero, found others. Copy the model again, or "
            "type another one."
        )
    rest, held = hold_out(labels.tolist(), HELD_OUT, seed)
    if len({labels[row].item() for row in held}) < 2:
        raise UserError(
            "--dataset_name: expected two classes or more with at least two training pictures each, to choose the ridge by; found "
            f"{len(held)}. Add pictures."
        )
    text_options = {name: value for name, value in options.items() if name != "on_bad_image"}

    def vectors_of(lists: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """The vector `(H,)` of each text in the lists, and of each prompt."""
        distinct = sorted({text for texts in lists for text in texts} | set(prompts))
        return dict(zip(distinct, encode(text_features, distinct, **text_options), strict=True))

    def mean_of(texts: Sequence[str]) -> Tensor:
        return torch.stack([vectors[text] for text in texts]).mean(dim=0)

    solve: Callable[[list[int], float], Projections]
    if class_rows is None:
        captions = train["captions"][:] if "captions" in train.column_names else [None] * len(train)
        owned = [captions_of(captions[row]) for row in readable.tolist()]
        vectors = vectors_of(owned)
        classes = torch.stack([vectors[prompt] for prompt in prompts])
        pairs = classes[labels]
        for i, own in enumerate(owned):
            if own:
                pairs[i] = (pairs[i] + mean_of(own)) / 2
        solve, targets = (lambda rows, ridge: from_pairs(images[rows], pairs[rows], ridge)), len(pairs)
    else:
        known, weights = class_rows
        synonyms = [[class_prompt(class_template, part) for part in name.split(", ")] for name in known]
        vectors = vectors_of(synonyms)
        classes = torch.stack([vectors[prompt] for prompt in prompts])
        texts = torch.stack([mean_of(own) for own in synonyms])
        solve, targets = (lambda rows, ridge: from_class_rows(weights, texts, ridge)), len(weights)

    truth, found = labels[held], {}
    for ridge in RIDGES:
        found[ridge] = cosines(solve(rest, ridge), images[held], classes)
    accuracies = {ridge: (scores.argmax(dim=1) == truth).double().mean().item() for ridge, scores in found.items()}
    ridge = max(RIDGES, key=lambda ridge: (accuracies[ridge], ridge))
    losses = [F.cross_entropy(scale * found[ridge], truth).item() for scale in SCALES]
    scale = SCALES[losses.index(min(losses))].item()
    install(model, solve(list(range(len(images))), ridge), images, classes, scale)
    return Alignment(ridge, accuracies[ridge], len(held), scale, targets)


@torch.no_grad()
def install(model: PreTrainedModel, found: Projections, images: Tensor, texts: Tensor, scale: float) -> None:
    """Writes projections into a model, so that pictures `(n, V)` and texts `(C, H)` have a mean norm of 1, and the scale."""
    for name, inputs, weights in (("visual", images, found.vision), ("text", texts, found.text)):
        size = (inputs.double() @ weights.T).norm(dim=-1).mean()
        layer = nn.Linear(weights.shape[1], weights.shape[0], bias=False)
        layer.weight.copy_(weights / size)
        setattr(model, f"{name}_projection", layer.to(model.device))
    model.config.projection_dim = model.projection_dim = len(found.vision)
    model.logit_scale.fill_(math.log(scale))


def _tower_outputs(model: PreTrainedModel, processor: ProcessorMixin, batch_size: int) -> Callable:
    """`image_features` or `text_features` without the projections: unit-norm outputs of the towers."""

    def encode(features: Callable, inputs, **options):
        own = (model.visual_projection, model.text_projection)
        model.visual_projection = model.text_projection = nn.Identity()
        try:
            return features(model, processor, inputs, batch_size, **options)
        finally:
            model.visual_projection, model.text_projection = own

    return encode


@torch.no_grad()
def classifier_rows(name: str | Path, allow_pickle: bool = False) -> tuple[list[str], Tensor]:
    """Class names and weight rows `(C, V)` of an image classifier whose logits are a linear layer on its pooled output.

    Raises:
        UserError: it is no image classifier, its logits are made otherwise, or its classes have no names.
    """
    name = str(name)
    config = open_config(name, "--vision_model")
    try:
        path = builtin(name)
        weights = find_weights(path, None, allow_pickle, getattr(config, "transformers_weights", None))
        options = {"dtype": torch.float32, "output_loading_info": True}
        model, found = weights.from_pretrained(AutoModelForImageClassification, path, config, **options)
    except UserError:
        raise
    except Exception as error:  # no such class for this kind of model
        raise UserError(
            f"--class_rows true: expected an image classifier as --vision_model, found {name}, which is none "
            f"({first_line(error)}). Leave it out to learn from pairs."
        ) from error
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.out_features == len(names)]
    if found["missing_keys"] or not layers:
        raise UserError(
            f"--class_rows true: expected an image classifier as --vision_model, found no trained classifier in {name}. Leave it "
            "out to learn from pairs."
        )
    pooled = []
    layers[-1].register_forward_pre_hook(lambda layer, inputs: pooled.append(inputs[0]))
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    model.eval()(pixel_values=pixels)
    tower = model.base_model(pixel_values=pixels)
    output = getattr(tower, "pooler_output", None)
    if output is None or not torch.allclose(pooled[0].flatten(1), output.flatten(1), atol=1e-4):
        raise UserError(
            f"--class_rows true: expected a classifier on the tower's pooled output, found a {type(model).__name__}, which "
            "compares its rows with something else. Leave it out to learn from pairs."
        )
    if all(label == f"LABEL_{i}" for i, label in enumerate(names)):
        raise UserError(
            f"--class_rows true: expected class names in config.json of {name} (id2label), found only numbers."
        )
    return names, layers[-1].weight.detach().clone()
