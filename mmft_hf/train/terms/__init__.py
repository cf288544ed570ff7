"""Loss terms: the summands of the training loss. One file per term, and one import here, which puts it into `TERMS`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...model.losses import Batch
from ..config import MMFTConfig
from .base import LossTerm
from .clip import Clip
from .cross_entropy import ClassTextCrossEntropy, CrossEntropy
from .gram import Gram
from .supcon import SupCon

TERMS: dict[str, type[LossTerm]] = {term.name: term for term in LossTerm.__subclasses__()}


def terms_of(loss: LossTerm | Sequence[LossTerm] | None, config: MMFTConfig) -> list[LossTerm]:
    """The terms of a training: those given, or MMFT's own two, `w * SupCon + (1 - w) * CLIP`.

    Raises:
        TypeError: something is not a `LossTerm`.
        ValueError: two terms have the same name, or there is none.
    """
    if loss is None:
        w = config.supcon_weight
        weights = (w, 1 - w)
        if config.supcon_weight_end is not None:
            weights = (config.supcon_weight_at, lambda step, steps: 1 - config.supcon_weight_at(step, steps))
        supcon, clip = SupCon(weights[0], config.include_self), Clip(weights[1])
        clip.log_weight = False  # it follows from that of SupCon
        return [supcon, clip]
    terms = list(loss) if isinstance(loss, Iterable) else [loss]
    wrong = [term for term in terms if not isinstance(term, LossTerm)]
    if wrong:
        raise TypeError(f"loss: expected terms such as SupCon(0.1), found {wrong[0]!r}. See mmft_hf.train.terms.")
    names = [term.name for term in terms]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"loss: expected one or more terms of different names, found {', '.join(names) or 'none'}.")
    return terms
