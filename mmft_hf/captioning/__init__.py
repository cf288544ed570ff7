"""Captioning: a labelled image dataset in, the same dataset with captions out."""

from .ask.captioner import Captioner

__all__ = ["Captioner", "caption_dataset", "refine_captions"]


def __getattr__(name: str):
    if name == "caption_dataset":  # on first use: `mmft-hf caption --help` needs no `datasets`
        from .workflow import caption_dataset

        return caption_dataset
    if name == "refine_captions":
        from .refine import refine_captions

        return refine_captions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
