"""The metrics that `mmft-hf caption report --metrics` computes on demand."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from ...core.errors import UserError, nearest
from ...core.functions import named_function
from ..steps.base import Embeddings, Row
from ..steps.diversity import contextual_vendi
from .best_of import best_of
from .conditional import conditional_retrieval
from .explained import explained_images
from .reconstruction import reconstruction

Metric = Callable[[Sequence[Row], Embeddings], dict]
METRICS: dict[str, Metric] = {
    "vendi": contextual_vendi,
    "sce": explained_images,
    "conditional_retrieval": conditional_retrieval,
}
_BEST_OF = re.compile(r"(\w+)@max_(\d+)")
FORMS = (*METRICS, "SCORE@max_K", "reconstruction=package.module:function")


def check_scores(words: Sequence[str], known: Sequence[str]) -> None:
    """Raises `UserError` for `SCORE@max_K` with a score that no caption has.

    Args:
        words: metrics as they are typed.
        known: names of the scores that captions have.
    """
    for word in words:
        if (found := _BEST_OF.fullmatch(word)) and found[1] not in known:
            raise UserError(
                f"--metrics {word}: expected a score that the captions have ({', '.join(known) or 'they have none'}), found "
                f"{found[1]!r}.{nearest(found[1], known)}"
            )


def metric_of(word: str) -> tuple[Metric, bool]:
    """A metric as it is typed, and whether it needs a scorer.

    Raises:
        UserError: an unknown metric; a function that cannot be imported.
    """
    if word in METRICS:
        return METRICS[word], True
    if (found := _BEST_OF.fullmatch(word)) and int(found[2]):
        return lambda rows, scorer: best_of(rows, found[1], int(found[2])), False
    name, given, function = word.partition("=")
    if name == "reconstruction" and given:
        return partial(reconstruction, generator=named_function(function, "--metrics reconstruction")), True
    raise UserError(f"--metrics: expected some of {', '.join(FORMS)}, found {word!r}.{nearest(word, FORMS)}")
