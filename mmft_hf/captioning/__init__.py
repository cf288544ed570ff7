"""The captioning step: a labelled image data set in, the same data set with captions out."""

from .backends.texts import Caption, Captioner, ColumnsCaptioner, TemplateCaptioner
from .dataset import caption_dataset

__all__ = ["Caption", "Captioner", "ColumnsCaptioner", "TemplateCaptioner", "caption_dataset"]
