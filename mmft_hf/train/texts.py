"""The texts of a training, as its settings name them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import ProcessorMixin

from ..data.caption_sources import parse_mix
from ..data.views import TextView
from ..model.long_captions import windows_for
from .config import MMFTConfig


def texts_of(class_names: Sequence[str], config: MMFTConfig, processor: ProcessorMixin, seed: int = 0) -> TextView:
    """Which texts an image may get, and which one it gets in an epoch.

    Args:
        class_names: `C` names.
        processor: that of the model, whose text tower has a limit.
        seed: of all draws.
    """
    windows = windows_for(processor, config.long_captions)
    mix = tuple(parse_mix(config.text_mix or ()).items())
    return TextView(class_names, config.class_template, config.caption_dropout, seed, windows, mix)
