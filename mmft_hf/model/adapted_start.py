"""Where the training of an `AdaptedCLIP` starts: its texts are placed where the text tower of the dual encoder places them.

Shapes: `n` texts, `d` size of the vectors, `D` embedding size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from .adapted_clip import AdaptedCLIP, AdaptedCLIPConfig
from .adapted_processor import AdaptedProcessor, TextTrunk
from .features import Encoding, encode_texts_once, prepare_texts, sorted_distinct
from .loading import embedding_size, head_of, logit_scale

RIDGE = 1.0
BLOCK = 4096  # texts at a time


def with_text_trunk(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    trunk: TextTrunk,
    texts: Iterable[str],
    how: Encoding,
    further: Iterable[str] = (),
) -> tuple[AdaptedCLIP, AdaptedProcessor]:
    """An `AdaptedCLIP` with the image tower of a dual encoder, whose text tower is needed for the last time.

    The blocks of the adaptor start as the identity, and its linear layer as the ridge regression from the vectors of texts to
    their embeddings by the text tower. The image tower is that of `model` itself, not a copy.

    Args:
        model, processor: of the dual encoder.
        texts: of the training, from which the regression learns. Never give texts of evaluation pictures.
        how: how texts are encoded. With `how.shard` all processes must call this.
        further: texts that are encoded together with them, for later.

    Raises:
        UserError: the caption encoder cannot be opened.
    """
    texts, adapted = sorted_distinct(texts), AdaptedProcessor(processor.image_processor, trunk)
    prepare_texts(adapted, [*texts, *further], how)
    targets = encode_texts_once(model, processor, texts, how).embeds
    found = _untrained(model, trunk.vectors(texts[:1]).shape[1])
    found.config.text_trunk = dict(trunk.known_as)
    ridge_start(found, lambda start: trunk.vectors(texts[start : start + BLOCK]), targets)
    found.mmft_start = f"ridge start from {len(texts):,} texts"
    return found, adapted


def _untrained(model: PreTrainedModel, size: int) -> AdaptedCLIP:
    """An `AdaptedCLIP` with the image tower and the scale of a dual encoder, and an adaptor of vectors of this size, random but
    the same every time."""
    name = head_of(model, "vision")
    projection = model.get_submodule(name) if name else None
    config = AdaptedCLIPConfig(
        vision_config=model.config.vision_config.to_dict(),
        text_config={"hidden_size": size},
        projection_dim=embedding_size(model),
        vision_projection=isinstance(projection, nn.Linear),
        logit_scale_init_value=logit_scale(model).log().item(),
    )
    with torch.random.fork_rng(devices=[]):  # a run makes it twice: to train it, and to compare with the start
        torch.manual_seed(0)
        found = AdaptedCLIP(config)
    found.vision_model = model.vision_model
    if projection is not None:
        found.visual_projection = projection
    for name in ("name_or_path", "mmft_weights"):
        if hasattr(model, name):
            setattr(found, name, getattr(model, name))
    return found.to(model.device).train(model.training)


@torch.no_grad()
def ridge_start(model: AdaptedCLIP, vectors, targets: Tensor, ridge: float = RIDGE) -> None:
    """Sets the adaptor to the ridge regression, with a constant that is not penalized, from vectors to targets.

    Its blocks become the identity: their second layers are zero. The regression reads what the linear layer reads, vectors after
    the layer norm, of unit norm.

    Args:
        model: its layer norm before the linear layer is new.
        vectors: returns up to `BLOCK` vectors `(b, d)` from a row on.
        targets (`(n, D)`): unit-norm embeddings of the texts.
        ridge: added to the sum of squares of each direction over all texts.
    """
    norm, linear = model.text_projection
    device, width, count = linear.weight.device, linear.in_features, len(targets)
    for layer in model.text_model.layers:
        layer.down.weight.zero_()
        layer.down.bias.zero_()
    squares = torch.zeros(width, width, dtype=torch.float64)
    products = torch.zeros(width, targets.shape[1], dtype=torch.float64)
    sums = torch.zeros(width, dtype=torch.float64)
    for start in range(0, count, BLOCK):
        read = norm(vectors(start).to(device)).double().cpu() / width**0.5
        squares += read.T @ read
        products += read.T @ targets[start : start + BLOCK].double()
        sums += read.sum(dim=0)
    mean, constant = sums / count, targets.double().mean(dim=0)
    squares -= count * torch.outer(mean, mean)
    products -= count * torch.outer(mean, constant)
    weights = torch.linalg.solve(squares + ridge * torch.eye(width, dtype=torch.float64), products)
    linear.weight.copy_(weights.T / width**0.5)
    linear.bias.copy_(constant - mean @ weights)
