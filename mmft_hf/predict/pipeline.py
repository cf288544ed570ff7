"""`transformers.pipeline("mmft-image-classification", model=folder_or_hub_id)`: the trained classifier, ready to use."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModel, Pipeline
from transformers.image_utils import load_image
from transformers.pipelines import PIPELINE_REGISTRY

from ..data.images import read_image
from ..model.loading import encode_images, load_image_processor
from .heads.prototypes import ClassPrototypes

TASK = "mmft-image-classification"

# evaluate.evaluator (up to 0.4.6) asks whether a pipeline is a transformers.TFPreTrainedModel, a class that transformers
# 5 no longer has, and so fails for every pipeline. No object is an instance of this stand-in.
if not hasattr(transformers, "TFPreTrainedModel"):
    transformers.TFPreTrainedModel = type("TFPreTrainedModel", (), {})


class NoSafetensors(Exception):
    """No `UserError`: at a ValueError transformers tries the next class, which would open a pickle."""


class ModelWithPrototypes:
    """Loads a dual encoder with what lies beside it: only here is it known which revision is meant, and which token."""

    @classmethod
    def from_pretrained(cls, name, *args, **kwargs):
        try:
            model = AutoModel.from_pretrained(name, *args, **{**kwargs, "use_safetensors": True})
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise NoSafetensors(f"{name!r}: expected the weights of a dual encoder as safetensors; {reason}") from error
        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if kwargs.get(key)}
        if getattr(model, "_hf_peft_config_loaded", False) and "revision" in hub:
            # Of an adapter, pipeline() has looked the revision up at the base model; it goes by its name.
            hub["revision"] = str(hub["revision"])
        model.mmft_prototypes = ClassPrototypes.from_pretrained(name, **hub)
        model.mmft_image_processor = load_image_processor(name, **hub)
        return model


class MMFTImageClassificationPipeline(Pipeline):
    """Classifies images with a fine-tuned dual encoder and its saved class prototypes.

    Args:
        model (`CLIPModel` or another dual encoder): from the folder or Hub repository that `mmft-hf finetune` made.
        prototypes (`ClassPrototypes`, *optional*): those saved with the model, if not given.

    Inputs of the call: a path, URL, `PIL.Image`, or a list or data set of them; `top_k` (5) classes are returned.

    Returns:
        `[{"label", "score"}, …]` for one image, best first, scores being softmax probabilities over all classes; a list
        of these for several.

    Raises:
        UserError: no prototypes beside the model, or an image that cannot be read.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, prototypes: ClassPrototypes | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        # With torchvision installed the stock loader takes its backend, whose pixels differ a little from the trained ones.
        beside = getattr(self.model, "mmft_image_processor", None)
        self.image_processor = beside or load_image_processor(self.model.name_or_path)
        # evaluate.evaluator("image-classification") takes no pipeline of another task name.
        self.task = "image-classification"
        beside = getattr(self.model, "mmft_prototypes", None)
        beside = beside or (None if prototypes else ClassPrototypes.from_pretrained(self.model.name_or_path))
        self.prototypes = prototypes or beside
        if not prototypes:
            self.prototypes.check_model(self.model, self.model.name_or_path)

    def _sanitize_parameters(self, top_k=None, timeout=None):
        preprocess = {} if timeout is None else {"timeout": timeout}
        return preprocess, {}, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, image, timeout=None):
        """One picture to `{"pixel_values": (1, 3, height, width)}`."""
        if isinstance(image, str) and image.startswith(("http://", "https://")):
            image = load_image(image, timeout=timeout)
        return self.image_processor(read_image(image), return_tensors="pt")

    def _forward(self, inputs):
        with torch.no_grad():
            return {"logits": self.prototypes.logits(encode_images(self.model, inputs["pixel_values"]))}

    def postprocess(self, outputs, top_k=5):
        """Logits `(1, C)` to the `top_k` labels with their probabilities."""
        scores = outputs["logits"][0].float().softmax(dim=0)
        best = scores.topk(min(top_k, len(scores)))
        return [
            {"label": self.prototypes.class_names[i], "score": score}
            for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def register() -> None:
    """Makes the task known to `transformers.pipeline`; calling it again changes nothing."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK, MMFTImageClassificationPipeline, pt_model=ModelWithPrototypes, type="image"
        )
