"""Multimodal fine-tuning of CLIP with synthetic captions (MMFT), as a Hugging Face Trainer.

Public names are imported on first use, so that `mmft-hf --help` does not import torch.
"""

import importlib
import importlib.abc
import importlib.util
import sys

from .version import __version__

_PUBLIC = {
    "AdaptedCLIP": "model.adapted_clip",
    "CaptionEncoder": "model.caption_encoder",
    "ClassBalancedSampler": "data.sampling",
    "ClassPrototypes": "predict.heads.prototypes",
    "ClassificationReport": "predict.metrics",
    "Captioner": "captioning",
    "ImageClassifier": "predict.classifier",
    "MMFTConfig": "train.config",
    "MMFTDataCollator": "model.collator",
    "MMFTImageClassificationPipeline": "predict.pipeline",
    "MMFTLoss": "model.losses",
    "MMFTTrainer": "train.trainer",
    "PromptSet": "data.texts",
    "align_towers": "model.align",
    "caption_dataset": "captioning",
    "clip_loss": "model.losses",
    "combine_towers": "model.combine",
    "few_shot_split": "data.sampling",
    "finetune": "train.workflow",
    "load_captioned_dataset": "data.splits",
    "load_model": "model.loading",
    "refine_captions": "captioning",
    "set_towers": "model.towers",
    "push_captioned_dataset": "hub.publish",
    "push_model": "hub.publish",
    "supcon_loss": "model.losses",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_PUBLIC])


# `import mmft_hf` makes transformers.pipeline("mmft-image-classification") available. transformers.pipelines imports torch,
# so it is not imported here. If it is not loaded yet, the pipeline is registered as soon as it is.
_PIPELINES = "transformers.pipelines"


def _register_pipeline() -> None:
    importlib.import_module(".predict.pipeline", __name__)  # it may be what imports transformers.pipelines just now


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != _PIPELINES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                _register_pipeline()

            spec.loader.exec_module = execute_and_register
        return spec


if _PIPELINES in sys.modules:
    _register_pipeline()
else:
    sys.meta_path.insert(0, _RegisterAfterImport())
