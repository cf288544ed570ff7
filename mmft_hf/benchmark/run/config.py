"""The settings of training in a benchmark."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.arguments import setting
from ...train.config import MMFTConfig


@dataclass
class BenchmarkConfig(MMFTConfig):
    """The settings of training; none of their defaults that decides a result depends on the machine.

    Results of several machines are rows of one benchmark.
    """

    num_train_epochs: float = setting(50.0, "Epochs of training.")
