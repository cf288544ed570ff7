"""`transformers.pipeline("mmft-image-classification", model=folder_or_hub_id)`: a saved classifier, ready to use."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoConfig, AutoModel, Pipeline
from transformers.image_utils import load_image
from transformers.pipelines import PIPELINE_REGISTRY

from ..core.errors import UserError
from ..core.files import ADAPTER_FILES, is_weights
from ..core.reading import read_json
from ..core.records import AdapterConfig
from ..core.seals import is_loaded, note_changed_files
from ..model.loading import load_image_processor
from ..model.weights import find_weights
from .classifier import ImageClassifier
from .heads import Head, load_head

TASK = "mmft-image-classification"
HUB = ("token", "cache_dir", "local_files_only")  # settings of pipeline(…) for downloads

# evaluate.evaluator (up to 0.4.6) asks whether a pipeline is a transformers.TFPreTrainedModel. transformers 5 no longer has
# that class, so every pipeline would fail. No object is an instance of this stand-in.
if not hasattr(transformers, "TFPreTrainedModel"):
    transformers.TFPreTrainedModel = type("TFPreTrainedModel", (), {})


class NoWeights(Exception):
    """Not a `UserError`: at a ValueError transformers tries the next class, which would open a pickle."""


class ModelWithHead:
    """Loads a dual encoder together with the head and the image processor of its folder.

    Only here are the revision and the token of `pipeline(…)` known.
    """

    @classmethod
    def from_pretrained(cls, name, config=None, allow_pickle=False, revision=None, **kwargs):
        hub = {key: kwargs.pop(key) for key in HUB if key in kwargs}
        kwargs.pop("trust_remote_code", None)
        try:
            adapter = find_adapter(name, revision, **hub)
            if Path(name).is_dir():
                note_changed_files(name, is_loaded)
            if adapter:
                # pipeline() has resolved the revision in the base model's repository; its name still fits the adapter's.
                revision = revision and str(revision)
                source = (adapter["base_model_name_or_path"], adapter.get("revision"))
            else:
                source = (name, revision)
            if config is None:
                config = AutoConfig.from_pretrained(source[0], revision=source[1], trust_remote_code=False, **hub)
            weights = find_weights(*source, allow_pickle, getattr(config, "transformers_weights", None), **hub)
            model = weights.from_pretrained(AutoModel, name, config, **kwargs)
            if adapter:
                model.load_adapter(name, adapter_kwargs={"revision": revision, **hub})
            model.mmft_image_processor = load_image_processor(name, revision, **hub)
        except UserError as error:
            told = " In Python, pass model_kwargs={'allow_pickle': True}." if "allow_pickle true" in str(error) else ""
            raise NoWeights(f"{error}{told}") from error
        except Exception as error:  # peft and safetensors have errors of their own for content that is none
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise NoWeights(
                f"{name!r}: expected the weights of a dual encoder as safetensors, and an image processor; {reason}"
            ) from error
        try:
            model.mmft_head = load_head(name, revision, **hub)
        except UserError as error:
            model.mmft_head = error  # the pipeline raises it, unless it was given a head
        return model


def find_adapter(name: str, revision: str | None = None, **hub) -> dict | None:
    """The settings of the LoRA adapter that a folder or Hub repository holds in place of a model; None for a model.

    Raises:
        OSError: the repository cannot be read, or its adapter is no safetensors.
        UserError: its settings are damaged.
    """
    settings, weights = ADAPTER_FILES
    if Path(name).is_dir():
        path = Path(name) / settings
        if any(is_weights(file.name) for file in Path(name).iterdir()) or not path.is_file():
            return None
        if not path.with_name(weights).is_file():
            raise OSError(f"there is no {weights}")
    else:
        try:
            path = Path(hf_hub_download(name, settings, revision=revision and str(revision), **hub))
        except EntryNotFoundError:
            return None
        hf_hub_download(name, weights, revision=path.parent.name, **hub)
    return read_json(path, AdapterConfig, "Copy the adapter again.")


class MMFTImageClassificationPipeline(Pipeline):
    """Classifies images with a fine-tuned dual encoder and its saved head.

    Args:
        model (`CLIPModel` or another dual encoder): from the folder or Hub repository that `mmft-hf finetune` wrote.
        prototypes (`ClassPrototypes` or another head, *optional*): used instead of the head saved with the model.

    `pipeline(…, model_kwargs={"allow_pickle": True})` reads weights that exist only as a pickle, with `weights_only=True`.

    Call it with a path, URL or `PIL.Image`, or with a list or dataset of them; `top_k` (5) classes are returned.

    Returns:
        `[{"label", "score"}, …]` for one image, best first; the scores are softmax probabilities over all classes. For
        several images, a list of these. Where a picture may have several labels: all classes with a score of 0.5 (or the head's
    `reject_below`) or more, whatever `top_k`; an empty list says that none holds.

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
        if isinstance(head, UserError):
            raise head
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


register()
