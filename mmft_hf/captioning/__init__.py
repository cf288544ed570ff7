"""The captioning step: a labelled image data set in, the same data set with captions out."""

from .ask.captioner import Captioner
from .runs import caption_dataset

__all__ = ["Captioner", "caption_dataset"]
