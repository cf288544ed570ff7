"""Class prototypes: a head with one embedding per class. An image belongs to the class of the nearest prototype.

Shapes: `C` classes, `D` embedding size, `B` items per batch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from ...core.arguments import Range
from ...core.console import some
from ...core.distributed import share_of, sum_over_processes
from ...core.errors import UserError
from ...core.files import PROTOTYPES_FILE, atomic_write
from ...core.reading import parse_json
from ...data.labels import class_names_of, has_several
from ...data.sampling import is_example
from ...data.texts import DEFAULT_TEMPLATE
from ...data.views import TextView, caption_counts
from ...model.features import BATCH_SIZE, encode_text_batches, image_embeddings, sorted_distinct
from ...model.loading import embedding_size, logit_scale
from ...model.long_captions import windows_for
from .base import REMEDY, Head, Positive, read

SOURCES = {
    "template": "the class template",
    "templates": "several class templates",
    "images": "the training images",
}
# The settings in `prototypes.safetensors`. There these two are plain text, and the others JSON.
FIRST_EDITION = ("class_names", "logit_scale", "source", "template", "fallback_classes", "template_weight")
PLAIN_TEXT = ("source", "template")


@dataclass
class ClassPrototypes(Head):
    """One unit-norm embedding per class, and the scale that turns cosines into logits.

    Args:
        embeddings (`(C, D)`, float32): unit-norm rows.
        class_names: `C` names, in the order of the rows.
        logit_scale: `exp(logit_scale)` of the model that made them.
        source: `captions`, `template`, `templates` or `images`.
        template: class template of the texts.
        fallback_classes: classes that had no caption and use the class template instead.
        template_weight: share of the class template in prototypes of captions, from 0 to 1; see `interpolate`.
    """

    kind: ClassVar[str] = "prototypes"
    formula: ClassVar[str] = "logit_scale * x @ embeddings.T"

    embeddings: Tensor
    class_names: list[str]
    logit_scale: Positive
    source: str
    template: str = DEFAULT_TEMPLATE
    fallback_classes: tuple[str, ...] = ()
    template_weight: Annotated[float, Range(0, 1)] = 0.0

    def __post_init__(self):
        self.fallback_classes = tuple(self.fallback_classes)  # JSON has lists only

    @property
    def about(self) -> str:
        """What an image is compared with, for a line that is printed."""
        mixed = f" and, with weight {self.template_weight:g}, the class template" if self.template_weight else ""
        return f"compared with {SOURCES.get(self.source, self.source)}{mixed}"

    def raw_logits(self, image_embeds: Tensor) -> Tensor:
        """`(B, C)` scaled cosines of unit-norm image embeddings `(B, D)`."""
        return self.logit_scale * image_embeds.float() @ self.embeddings.to(image_embeds.device).T

    def interpolate(self, templates: ClassPrototypes, weight: float) -> ClassPrototypes:
        """Moves prototypes of captions towards the class template: `normalize((1 - weight) * own + weight * template)`.

        A class without captions already has the template's embedding and does not change.

        Args:
            templates: prototypes of the same classes and the same model, from the class template.
            weight: from 0 (no change) to 1 (the template alone).

        Raises:
            ValueError: other classes, or a weight outside its range.

        References: Gao et al. 2021, "CLIP-Adapter" (arXiv 2110.04544), which blends learnt and zero-shot class weights alike.
        """
        if templates.class_names != self.class_names:
            raise ValueError(f"templates: expected the classes {some(self.class_names)}, in this order.")
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"weight: expected a number from 0 to 1, found {weight}.")
        mixed = F.normalize((1 - weight) * self.embeddings.double() + weight * templates.embeddings.double(), dim=1)
        return replace(self, embeddings=mixed.float(), template_weight=weight)

    @classmethod
    @torch.no_grad()
    def from_captions(
        cls,
        model: CLIPModel,
        processor: CLIPProcessor,
        dataset: Dataset,
        template: str = DEFAULT_TEMPLATE,
        batch_size: int = BATCH_SIZE,
        progress: bool = False,
        shard: bool = False,
        template_weight: float = 0.0,
        long_captions: str = "cut",
    ) -> ClassPrototypes:
        """Averages the captions of each class: normalize each embedding, mean per class, normalize.

        A caption counts once for each image that has it, and for each class of the image; equal texts are encoded once. Texts are sorted by length and
        encoded in batches of bounded size, whatever the size of a class. A class without captions gets the embedding of
        its class prompt and is listed in `fallback_classes`. If there are no captions at all, the source is `template`.

        Args:
            dataset: the training split, never an evaluation split; with the column `label` and perhaps `captions`.
            shard: each of several processes encodes its share; all of them must call this.
            template_weight: share of the class template, from 0 to 1; see `interpolate`.
            long_captions: `windows` reads captions that are longer than the text tower's limit in parts, each with the weight
                1 / number of parts, so that a caption counts once; otherwise their ends are cut.

        References: Enomoto & Yamaguchi 2026 (arXiv 2601.21426), classification by class-averaged caption embeddings.
        """
        names = class_names_of(dataset)
        texts = TextView(names, template, windows=windows_for(processor, long_captions))
        weights: Counter[tuple[int, str]] = Counter()
        for (label, parts), images in caption_counts(dataset, texts).items():
            for text in parts:
                weights[label, text] += images / len(parts)
        captioned = {label for label, _ in weights}
        missing = [c for c in range(len(names)) if c not in captioned]
        weights.update((c, text) for c in missing for text in texts.class_texts(c))
        embeddings = _average_texts(model, processor, weights, len(names), batch_size, progress, shard)
        fallback = tuple(names[c] for c in missing)
        if len(missing) == len(names):
            return cls(embeddings, names, _scale(model), "template", template, several_labels=has_several(dataset))
        several = has_several(dataset)
        found = cls(embeddings, names, _scale(model), "captions", template, fallback, several_labels=several)
        if not template_weight:
            return found
        return found.interpolate(cls.from_templates(model, processor, names, template, shard), template_weight)

    @classmethod
    @torch.no_grad()
    def from_templates(
        cls,
        model: CLIPModel,
        processor: CLIPProcessor,
        class_names: Sequence[str],
        templates: str | Sequence[str] = DEFAULT_TEMPLATE,
        shard: bool = False,
    ) -> ClassPrototypes:
        """Zero-shot prototypes: the class prompt of one template, or the average over several.

        Args:
            class_names: `C` names.
            templates: one or more texts with `{}` for the class name, for example `data.texts.TEMPLATES`.
            shard: as in `from_captions`.

        References: Radford et al. 2021, section 3.1.4 (prompt ensembling in embedding space).
        """
        texts = TextView(class_names, templates)
        weights = Counter((c, text) for c in range(len(class_names)) for text in texts.class_texts(c))
        embeddings = _average_texts(model, processor, weights, len(class_names), BATCH_SIZE, False, shard)
        source = "template" if len(texts.templates) == 1 else "templates"
        return cls(embeddings, list(class_names), _scale(model), source, texts.templates[0])

    @classmethod
    @torch.no_grad()
    def from_images(
        cls,
        model: CLIPModel,
        processor: CLIPProcessor,
        dataset: Dataset,
        batch_size: int = BATCH_SIZE,
        on_bad_image: str = "fail",
        workers: int = 0,
        progress: bool = False,
        shard: bool = False,
    ) -> ClassPrototypes:
        """Averages the image embeddings of each class: normalize each, mean per class, normalize.

        Args:
            dataset: the training split, never an evaluation split; with the columns `image` and `label`.
            shard: as in `from_captions`.

        Raises:
            UserError: a class without a readable image, or a bad image with `on_bad_image="fail"`.
        """
        names = class_names_of(dataset)
        sums = torch.zeros(len(names), embedding_size(model), dtype=torch.float64)
        counts = torch.zeros(len(names), 1, dtype=torch.float64)
        rows = share_of(len(dataset)) if shard else None
        for embeds, labels in image_embeddings(
            model, processor, dataset, batch_size, on_bad_image, workers, progress, "training", rows
        ):
            known = is_example(labels)
            embeds, labels = embeds.cpu().double()[known], labels[known]
            if labels.ndim == 2:  # an image counts for each of its classes
                rows_of, labels = labels.nonzero(as_tuple=True)
                embeds = embeds[rows_of]
            sums.index_add_(0, labels, embeds)
            counts.index_add_(0, labels, torch.ones(len(labels), 1, dtype=torch.float64))
        if shard:
            sums, counts = sum_over_processes(torch.cat([sums, counts], dim=1)).split([sums.shape[1], 1], dim=1)
        if (counts == 0).any():
            empty = [names[c] for c in torch.nonzero(counts[:, 0] == 0).flatten().tolist()]
            raise UserError(f"no readable training image of {', '.join(empty)}: no prototype can be made of them.")
        embeddings, several = F.normalize(sums, dim=1).float(), has_several(dataset)
        return cls(embeddings, names, _scale(model), "images", several_labels=several)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes `head.safetensors`, and `prototypes.safetensors`, which version 0.1 reads. Returns the first's path.

        Version 0.1 knows one label per picture alone: with several there is no such file.
        """
        path = super().save_pretrained(folder)
        if self.several_labels:
            return path
        settings = {key: getattr(self, key) for key in FIRST_EDITION}
        settings["logit_scale"] /= self.temperature
        metadata = {key: value if key in PLAIN_TEXT else json.dumps(value) for key, value in settings.items()}
        tensors = {"prototypes": self.embeddings.detach().cpu().float().contiguous()}
        with atomic_write(path.with_name(PROTOTYPES_FILE)) as temporary:
            save_file(tensors, temporary, metadata)
        return path

    @classmethod
    def from_file(cls, path: Path) -> ClassPrototypes:
        """Reads a `head.safetensors` of this kind, or a `prototypes.safetensors`."""
        if path.name != PROTOTYPES_FILE:
            return super().from_file(path)
        metadata, tensors = read(path)
        parts = {
            key: value if key in PLAIN_TEXT else parse_json(value, f"{path}, field {key}", Any, REMEDY)
            for key, value in metadata.items()
        }
        parts |= {"embeddings" if name == "prototypes" else f"tensor {name}": value for name, value in tensors.items()}
        return cls.from_parts(path, parts)


def _scale(model: CLIPModel) -> float:
    return logit_scale(model).detach().float().item()


def _average_texts(
    model: CLIPModel,
    processor: CLIPProcessor,
    weights: Counter[tuple[int, str]],
    classes: int,
    batch_size: int,
    progress: bool,
    shard: bool,
) -> Tensor:
    """Unit-norm weighted means `(C, D)` of text embeddings; `weights` are of each (class, text)."""
    texts = sorted_distinct(text for _, text in weights)
    if shard:  # every process gets short and long texts
        texts = [texts[i] for i in share_of(len(texts))]
    position = {text: i for i, text in enumerate(texts)}
    # The pairs are in the order of the texts, so that the pairs of a batch are contiguous, and no embedding is kept.
    pairs = sorted((position[text], label, n) for (label, text), n in weights.items() if text in position)
    sums = torch.zeros(classes, embedding_size(model), dtype=torch.float64)
    done = start = 0
    for embeds, _ in encode_text_batches(model, processor, texts, batch_size, progress, "Captions"):
        until = done
        while until < len(pairs) and pairs[until][0] < start + len(embeds):
            until += 1
        where, labels, own = zip(*pairs[done:until], strict=True)
        where, labels, own = torch.tensor(where), torch.tensor(labels), torch.tensor(own, dtype=torch.float64)
        sums.index_add_(0, labels, embeds.cpu().double()[where - start] * own[:, None])
        done, start = until, start + len(embeds)
    return F.normalize(sum_over_processes(sums) if shard else sums, dim=1).float()
