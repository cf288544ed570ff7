"""The settings of training in a benchmark."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.arguments import setting
from ...train.config import MMFTConfig


@dataclass
class BenchmarkConfig(MMFTConfig):
    """The settings of training, with a number of epochs that does not depend on the machine: several may share a benchmark."""

    num_train_epochs: float = setting(50.0, "Epochs of training.")
