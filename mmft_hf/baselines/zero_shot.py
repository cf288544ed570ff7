"""Zero-shot: the class whose text is nearest. Shapes and conventions as in `baselines`."""

from __future__ import annotations

import numpy as np

from .inputs import check_features


def zero_shot(test_x, weights, scale: float = 100.0) -> np.ndarray:
    """Scores `(N, C)`: `scale` times the cosines. No training example is needed.

    Args:
        test_x (`(N, D)`), weights (`(C, D)`): unit-norm embeddings of images and of class texts. The same weights made with
            one template, averaged over several, or over a class's captions are the rows `zs`, `zs-ens` and `zs-cap`.
        scale: `exp(logit_scale)` of the model; 100 is where CLIP's ends.

    Computed in float64.

    References: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 3.1.
    """
    images, texts = check_features(test_x, weights)
    return (scale * images @ texts.T).cpu().numpy()
