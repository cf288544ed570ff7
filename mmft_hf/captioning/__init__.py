"""Captioning: a labelled image data set in, the same data set with captions out."""

from .ask.captioner import Captioner
from .workflow import caption_dataset

__all__ = ["Captioner", "caption_dataset"]
