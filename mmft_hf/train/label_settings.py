"""Settings that have a meaning with one class for each picture alone, or with lists of labels alone."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.errors import UserError
from ..predict.fitting.heads import check_several
from ..predict.heads.base import check_unknown
from .config import MMFTConfig
from .learnable import refuse_balance


def check_single_settings(config: MMFTConfig, class_names: Sequence[str]) -> None:
    """Refuses settings that have no meaning where each picture has one class."""
    if config.threshold != "half":
        raise UserError(
            f"--threshold {config.threshold}: expected lists of labels, of which each is decided by itself, found one class for each "
            "picture. Leave it out; for an answer `unknown` there is --reject_below."
        )
    if config.reject_below is not None or config.reject_for_accuracy is not None:
        check_unknown(class_names)


def check_several_settings(config: MMFTConfig) -> None:
    """Refuses settings that have no meaning where a picture may have several labels."""
    if config.head != "auto":
        check_several(config.head)
    refuse_balance(config)
    if not config.calibrate:
        raise UserError(
            "--calibrate: expected true with several labels per picture, found false: it is calibration that decides from which "
            "score on a class holds. Leave it out."
        )
    if config.reject_for_accuracy is not None:
        raise UserError(
            "--reject_for_accuracy: expected one class for each picture, found lists of labels: each class is decided by itself, and "
            "a picture may have none. Leave it out, or type --reject_below with the score from which a class holds."
        )
