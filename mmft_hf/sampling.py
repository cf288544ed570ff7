"""Which examples are drawn when: few-shot subsets and the order of an epoch, as functions of seeds alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def generator(*key: int) -> np.random.Generator:
    """A random generator that depends on the whole numbers given (a seed, an epoch, a row) and on nothing else.

    So the draws are the same for any number of workers or processes, and after a resume.
    """
    return np.random.default_rng(np.random.SeedSequence([int(k) for k in key]))


def few_shot_split(labels: Sequence[int], shots: int, seed: int = 0) -> list[int]:
    """Row numbers of `min(shots, n)` examples of each class, drawn without replacement, in ascending order.

    Args:
        labels: Class of each row (`C` classes).
        shots: Examples per class, at least 1. A class with fewer gives all it has.
        seed: The only source of chance.

    Raises:
        ValueError: `shots` is below 1.
    """
    if shots < 1:
        raise ValueError(f"shots: expected 1 or more examples per class, found {shots}.")
    labels = np.asarray(labels)
    chosen: list[int] = []
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        # One generator per class: adding a class does not change what the others draw.
        chosen += generator(seed, c).permutation(rows)[:shots].tolist()
    return sorted(chosen)


def hold_out(labels: Sequence[int], fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Splits row numbers into (rest, held out), `fraction` of every class (at least one of a class of two or more)."""
    labels = np.asarray(labels)
    held: list[int] = []
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        n = min(len(rows) - 1, max(1, round(fraction * len(rows))))
        held += generator(seed, c).permutation(rows)[:n].tolist()
    rest = sorted(set(range(len(labels))) - set(held))
    return rest, sorted(held)


class EpochSampler:
    """Shuffled row numbers that carry their epoch: it yields `epoch * length + row`.

    A data set then knows the epoch of each read without any state that workers, processes or a resume would have to
    share: see `TrainingView`. The Trainer calls `set_epoch`; accelerate shards the stream of numbers. To a `DataLoader`
    anything with a length that yields row numbers is a sampler; so this module needs no torch.
    """

    def __init__(self, length: int, seed: int = 0):
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = generator(self.seed, self.epoch).permutation(self.length)
        return iter((self.epoch * self.length + order).tolist())
