"""What heads are fitted to: embeddings of the training pictures and of their texts, by one set of weights.

Shapes: `n` training images, `m` captions, `C` classes, `D` embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from ...core.distributed import gather_shares, share_of
from ...core.errors import UserError
from ...data.sampling import is_example
from ...data.texts import DEFAULT_TEMPLATE, TEMPLATES
from ...data.views import TextView, caption_counts
from ...model.features import (
    BATCH_SIZE,
    encode_text_batches,
    image_embeddings,
    image_features,
    sorted_distinct,
    text_features,
)
from ...model.long_captions import windows_for
from ..heads import ClassPrototypes, Head
from .inputs import Inputs, check


@dataclass
class HeadData:
    """The arrays that a head is fitted to, all of one model.

    Args:
        prototypes: what images are compared with without another head; its embeddings `(C, D)` are P.
        templates (`(C, D)`): E, unit-norm averages over several class templates.
        images (`(n, D)`), labels (`(n,)`, or `(n, C)` where an image may have several): unit-norm embeddings of the
            readable training images.
        captions (`(m, D)`), caption_labels (`(m,)`): unit-norm embeddings of the different captions of each class. Without
            captions m is 0.
        fitted: heads that were fitted with their default options, by name.
    """

    prototypes: ClassPrototypes
    templates: Tensor
    images: Tensor
    labels: Tensor
    captions: Tensor
    caption_labels: Tensor
    fitted: dict[str, Head] = field(default_factory=dict, init=False, repr=False)

    @property
    def class_names(self) -> list[str]:
        """`C` names."""
        return self.prototypes.class_names

    @property
    def scale(self) -> float:
        """`exp(logit_scale)` of the model."""
        return self.prototypes.logit_scale

    @property
    def texts(self) -> Tensor:
        """B `(C, D)`: the normalized sums of P and E."""
        return F.normalize(self.prototypes.embeddings.double() + self.templates.double(), dim=1)

    def inputs(self, texts: Tensor) -> Inputs:
        """The images and their labels with class texts `(C, D)`, checked."""
        return check(self.images, self.labels, self.images[:1], texts, unit_norm=True)

    @property
    def every_class(self) -> bool:
        """Whether each class has an image."""
        if self.several_labels:
            return bool((self.labels.sum(dim=0) > 0).all())
        return len(self.labels.unique()) == len(self.class_names)

    @property
    def several_labels(self) -> bool:
        """Whether an image may have several labels."""
        return self.labels.ndim == 2


@torch.no_grad()
def head_data(
    model,
    processor,
    train: Dataset,
    prototypes: ClassPrototypes,
    template: str = DEFAULT_TEMPLATE,
    batch_size: int = BATCH_SIZE,
    on_bad_image: str = "fail",
    workers: int = 0,
    progress: bool = False,
    shard: bool = False,
    cached: bool = False,
    trunk: bool = False,
    long_captions: str = "cut",
) -> HeadData:
    """Encodes what heads are fitted to.

    Args:
        train: the training split, with columns `image`, `label` and perhaps `captions`.
        prototypes: of the same model and classes.
        template: class template of the captions. In English it is averaged with 80 others for `HeadData.templates`.
        shard: each of several processes encodes its share; all of them must call this, and all get everything.
        cached: embeddings are kept on disk, for weights that are used again.
        trunk: what the projection of the image tower reads is kept on disk, for several weights that differ in it alone.
        long_captions: as in `ClassPrototypes.from_captions`. The embedding of a caption in parts is their normalized sum.

    Raises:
        UserError: an image that cannot be read, with `on_bad_image="fail"`; fewer than two readable images.
    """
    names = prototypes.class_names
    images, labels = embeddings(
        model, processor, train, batch_size, on_bad_image, workers, progress, "training", shard, cached, trunk
    )
    readable = is_example(labels)
    images, labels = images[readable], labels[readable]
    if len(labels) < 2:
        raise UserError(f"--head: expected at least two readable training images, found {len(labels)}.")
    view = TextView(names, template, windows=windows_for(processor, long_captions))
    pairs = sorted((parts, label) for label, parts in caption_counts(train, view))
    own_templates = TextView(names, templates_like(template))
    prompts = [text for c in range(len(names)) for text in own_templates.class_texts(c)]
    distinct = sorted_distinct([*(text for parts, _ in pairs for text in parts), *prompts])
    if cached:
        encoded = text_features(model, processor, distinct, batch_size, shard=shard, progress=progress)
    else:
        mine = [distinct[i] for i in share_of(len(distinct))] if shard else distinct
        parts = [found.float().cpu() for found, _ in encode_text_batches(model, processor, mine, batch_size, progress)]
        encoded = torch.cat(parts) if parts else torch.zeros(0, images.shape[1])
        encoded = gather_shares(encoded) if shard else encoded
    place = {text: i for i, text in enumerate(distinct)}
    return HeadData(
        prototypes,
        F.normalize(
            encoded[[place[text] for text in prompts]].view(len(names), -1, encoded.shape[1]).mean(dim=1), dim=1
        ),
        images,
        labels,
        _of_parts(encoded, [[place[text] for text in parts] for parts, _ in pairs]),
        torch.tensor([label for _, label in pairs], dtype=torch.long),
    )


def _of_parts(encoded: Tensor, rows: list[list[int]]) -> Tensor:
    """Embeddings `(m, D)` of m captions, from the rows of their parts in `encoded`."""
    found = encoded[[own[0] for own in rows]]
    for i, own in enumerate(rows):
        if len(own) > 1:
            found[i] = F.normalize(encoded[own].double().sum(dim=0), dim=0).to(found.dtype)
    return found


def templates_like(template: str) -> Sequence[str]:
    """The template, and 80 others if it is in English, as far as its letters tell."""
    return [template, *(other for other in TEMPLATES if other != template)] if template.isascii() else [template]


def embeddings(
    model,
    processor,
    dataset: Dataset,
    batch_size: int = BATCH_SIZE,
    on_bad_image: str = "fail",
    workers: int = 0,
    progress: bool = False,
    name: str = "evaluation",
    shard: bool = False,
    cached: bool = False,
    trunk: bool = False,
) -> tuple[Tensor, Tensor]:
    """Unit-norm embeddings `(n, D)` of all pictures and their labels `(n,)` or `(n, C)` (-100: unreadable), in row order."""
    if cached or trunk:
        options = {"workers": workers, "progress": progress, "shard": shard, "trunk": trunk}
        return image_features(model, processor, dataset, batch_size, on_bad_image, name, **options)
    rows = share_of(len(dataset)) if shard else None
    batches = image_embeddings(model, processor, dataset, batch_size, on_bad_image, workers, progress, name, rows)
    found = [(embeds.float().cpu(), labels) for embeds, labels in batches]
    if not found:  # more processes than pictures
        found = [(torch.zeros(0, 1), torch.zeros(0, dtype=torch.long))]
    columns = [torch.cat(column) for column in zip(*found, strict=True)]
    return tuple(gather_shares(column) if shard else column for column in columns)
