"""`transformers.pipeline("mmft-image-classification", model=folder_or_hub_id)`: a saved classifier, ready to use."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModel, Pipeline
from transformers.image_utils import load_image
from transformers.pipelines import PIPELINE_REGISTRY

from ..model.loading import load_image_processor
from .classifier import ImageClassifier
from .heads import Head, load_head

TASK = "mmft-image-classification"

# evaluate.evaluator (up to 0.4.6) asks whether a pipeline is a transformers.TFPreTrainedModel. transformers 5 no longer has
# that class, so every pipeline would fail. No object is an instance of this stand-in.
if not hasattr(transformers, "TFPreTrainedModel"):
    transformers.TFPreTrainedModel = type("TFPreTrainedModel", (), {})


class NoSafetensors(Exception):
    """Not a `UserError`: at a ValueError transformers tries the next class, which would open a pickle."""


class ModelWithHead:
    """Loads a dual encoder together with the head and the image processor of its folder.

    Only here are the revision and the token of `pipeline(…)` known.
    """

    @classmethod
    def from_pretrained(cls, name, *args, **kwargs):
        try:
            model = AutoModel.from_pretrained(name, *args, **{**kwargs, "use_safetensors": True})
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise NoSafetensors(f"{name!r}: expected the weights of a dual encoder as safetensors; {reason}") from error
        hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if kwargs.get(key)}
        if getattr(model, "_hf_peft_config_loaded", False) and "revision" in hub:
            # For an adapter, pipeline() has resolved the revision in the base model's repository; its name still fits.
            hub["revision"] = str(hub["revision"])
        model.mmft_head = load_head(name, **hub)
        model.mmft_image_processor = load_image_processor(name, **hub)
        return model


class MMFTImageClassificationPipeline(Pipeline):
    """Classifies images with a fine-tuned dual encoder and its saved head.

    Args:
        model (`CLIPModel` or another dual encoder): from the folder or Hub repository that `mmft-hf finetune` wrote.
        prototypes (`ClassPrototypes` or another head, *optional*): used instead of the head saved with the model.

    Call it with a path, URL or `PIL.Image`, or with a list or dataset of them; `top_k` (5) classes are returned.

    Returns:
        `[{"label", "score"}, …]` for one image, best first; the scores are softmax probabilities over all classes. For
        several images, a list of these.

    Raises:
        UserError: there is no head in the model's folder, or an image cannot be read.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, prototypes: Head | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        name = self.model.name_or_path
        # With torchvision installed the stock loader takes its backend, whose pixels differ slightly from those of training.
        self.image_processor = getattr(self.model, "mmft_image_processor", None) or load_image_processor(name)
        # evaluate.evaluator("image-classification") accepts no pipeline with another task name.
        self.task = "image-classification"
        head = prototypes or getattr(self.model, "mmft_head", None) or load_head(name)
        if not prototypes:
            head.check_model(self.model, name)
        self.classifier = ImageClassifier(self.model, self.image_processor, head)

    def _sanitize_parameters(self, top_k=None, timeout=None):
        preprocess = {} if timeout is None else {"timeout": timeout}
        return preprocess, {}, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, image, timeout=None):
        """One picture to `{"pixel_values": (1, 3, height, width)}`."""
        if isinstance(image, str) and image.startswith(("http://", "https://")):
            image = load_image(image, timeout=timeout)
        return {"pixel_values": self.classifier.preprocess([image])}

    def _forward(self, inputs):
        with torch.no_grad():
            return {"logits": self.classifier(inputs["pixel_values"])}

    def postprocess(self, outputs, top_k=5):
        """Logits `(1, C)` to the `top_k` labels with their probabilities."""
        return self.classifier.best(outputs["logits"], top_k)[0]


def register() -> None:
    """Registers the task with `transformers.pipeline`; calling it again changes nothing."""
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(TASK, MMFTImageClassificationPipeline, pt_model=ModelWithHead, type="image")
