"""The image tower of a run as a stock model of transformers, which classifies with the head and opens without this library."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
import transformers

from ..core.errors import UserError
from ..core.reading import read_json
from ..core.records import CheckpointConfig

# The stock class of an image tower with its projection, by the tower's model_type.
CLASSES = {
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "metaclip_2_vision_model": "MetaClip2VisionModelWithProjection",
}


def vision_class(folder: str | Path) -> str:
    """The name of that class, for the model in a folder.

    Raises:
        UserError: transformers has none for its image tower.
    """
    kind = read_json(Path(folder) / "config.json", CheckpointConfig).get("vision_config", {}).get("model_type")
    if kind not in CLASSES:
        raise UserError(
            f"--parts vision: expected an image tower of CLIP or MetaCLIP 2, for which transformers has a class with the projection, found "
            f"{kind}. Leave it out: the merged model opens with mmft_hf."
        )
    return CLASSES[kind]


def vision_files(folder: str | Path) -> dict[str, bytes]:
    """`config.json`, `model.safetensors` and `preprocessor_config.json` of the image tower and its projection, by name.

    Raises:
        UserError: as `vision_class`, or the model cannot be loaded.
    """
    from ..model.loading import load_model

    kind = getattr(transformers, vision_class(folder))
    model, processor = load_model(folder)
    config = copy.deepcopy(model.config.vision_config)
    config.projection_dim, config.id2label = model.config.projection_dim, model.config.id2label
    config.label2id = model.config.label2id
    with torch.random.fork_rng(devices=[]):
        tower = kind(config)
    names = tower.state_dict()
    tower.load_state_dict({name: value for name, value in model.state_dict().items() if name in names})
    with tempfile.TemporaryDirectory() as place:
        tower.save_pretrained(place)
        processor.image_processor.save_pretrained(place)
        return {path.name: path.read_bytes() for path in sorted(Path(place).iterdir())}
