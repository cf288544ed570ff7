"""Reconstruction: whether an image that a generator makes of a caption resembles the captioned one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL.Image import Image

from ...data.texts import DEFAULT_TEMPLATE, class_prompt
from ..steps.base import Embeddings, Row, readable

SEEDS = 1
BLOCK = 64  # pictures that are held at a time


def reconstruction(
    rows: Sequence[Row], scorer: Embeddings, generator: Callable[[str, int], Image], seeds: int = SEEDS
) -> dict[str, float | None]:
    """The mean cosine of images and of those generated from their captions, beside those generated from the class prompt.

    A generator knows famous things by their names: read the difference.

    Args:
        scorer: an encoder that will not be trained on the captions.
        generator: from a text and a seed to a picture. Equal texts are generated once.
        seeds: pictures of each text.
    """
    images = scorer.images()
    own = readable(rows, images)
    captions = [(i, rows[i].records[k]["text"]) for i in own for k in rows[i].captions()]
    prompts = [(i, class_prompt(DEFAULT_TEMPLATE, rows[i].class_name)) for i in own if rows[i].captions()]
    texts = sorted({text for _, text in captions + prompts})
    jobs = [(text, seed) for text in texts for seed in range(seeds)]
    total = {text: np.zeros(images.shape[1]) for text in texts}
    for start in range(0, len(jobs), BLOCK):
        block = jobs[start : start + BLOCK]
        embeds = scorer.encode([generator(text, seed) for text, seed in block])
        for (text, _), embed in zip(block, embeds, strict=True):
            total[text] += embed / seeds
    found = [[float(images[i] @ total[text]) for i, text in pairs] for pairs in (captions, prompts)]
    return dict(zip(LABELS, (float(np.mean(values)) if values else None for values in found), strict=True))


LABELS = ("cosine of image and image generated from its caption", "… from its class name (control)")
