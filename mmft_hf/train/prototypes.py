"""The prototypes of a run: what `--prototypes` names, of any weights."""

from __future__ import annotations

from dataclasses import replace

from datasets import Dataset
from transformers import PreTrainedModel, ProcessorMixin

from ..core.console import is_main
from ..data.labels import class_names_of, has_several
from ..data.texts import TEMPLATES
from ..predict.heads import ClassPrototypes
from .config import MMFTConfig


def prototypes_of(
    model: PreTrainedModel, processor: ProcessorMixin, train: Dataset, config: MMFTConfig, shard: bool = True
) -> ClassPrototypes:
    """Class prototypes from the source that `config.prototypes` names.

    Args:
        train: the training split.
        shard: each of several processes encodes its share; all of them must call this.
    """
    source, template = config.prototypes, config.class_template
    options = {
        "batch_size": config.per_device_eval_batch_size,
        "progress": is_main() and not config.disable_tqdm,
        "shard": shard,
    }
    if source == "captions":
        options |= {"template_weight": config.template_weight, "long_captions": config.long_captions}
        return ClassPrototypes.from_captions(model, processor, train, template, **options)
    if source == "images":
        options |= {"on_bad_image": config.on_bad_image, "workers": config.dataloader_num_workers}
        return ClassPrototypes.from_images(model, processor, train, **options)
    # The user's own template comes first among several.
    templates = template if source == "template" else [template, *(t for t in TEMPLATES if t != template)]
    found = ClassPrototypes.from_templates(model, processor, class_names_of(train), templates, shard)
    return replace(found, several_labels=has_several(train))
