"""Few-shot subsets and the order of an epoch, as functions of seeds alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np


def generator(*key: int) -> np.random.Generator:
    """A random generator that depends only on the given integers (a seed, an epoch, a row).

    Draws are therefore the same for any number of workers or processes, and after a resume.
    """
    return np.random.default_rng(np.random.SeedSequence([int(k) for k in key]))


def few_shot_split(labels: Sequence[int], shots: int, seed: int = 0) -> list[int]:
    """Row numbers of `min(shots, n)` examples of each class, drawn without replacement, in ascending order.

    Where a row may have several classes, the rarest class is drawn first. What is drawn for one class counts for the others,
    so a common class can have more than `shots`. Rows without any class are drawn as if they were a class.

    Args:
        labels: Class of each row (`C` classes), or `(n, C)`, with 1 for each of its classes.
        shots: Examples per class, at least 1. A class with fewer gives all of them.
        seed: The only source of randomness.

    Raises:
        ValueError: `shots` is below 1.
    """
    if shots < 1:
        raise ValueError(f"shots: expected 1 or more examples per class, found {shots}.")
    labels = np.asarray(labels)
    if labels.ndim == 2:
        taken = np.zeros(len(labels), dtype=bool)
        for c, rows in _rarest_first(labels):
            wanted = max(0, shots - int(taken[rows].sum()))
            taken[generator(seed, c).permutation(rows[~taken[rows]])[:wanted]] = True
        return np.flatnonzero(taken).tolist()
    chosen: list[int] = []
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        # One generator per class, so that an added class does not change the draws of the others.
        chosen += generator(seed, c).permutation(rows)[:shots].tolist()
    return sorted(chosen)


def _rarest_first(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each class of rows `(n, C)` with its rows, the smallest first; last, under the number C, the rows without a class."""
    counts = (labels > 0).sum(axis=0)
    for c in np.argsort(counts, kind="stable").tolist():
        yield c, np.flatnonzero(labels[:, c] > 0)
    yield labels.shape[1], np.flatnonzero((labels > 0).sum(axis=1) == 0)


def hold_out(labels: Sequence[int], fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Splits row numbers into (rest, held out), `fraction` of every class (at least one of a class of two or more).

    Where a row may have several classes (labels `(n, C)`), shares are as near to that as the rows allow; of every class at
    least one row stays.

    References: Sechidis et al. 2011, "On the Stratification of Multi-Label Data", which also begins with the rarest class.
    """
    labels = np.asarray(labels)
    held: list[int] = []
    if labels.ndim == 2:
        left, decided = (labels > 0).sum(axis=0), np.zeros(len(labels), dtype=bool)
        for c, rows in _rarest_first(labels):
            wanted = min(len(rows) - 1, max(1, round(fraction * len(rows)))) - len(set(rows.tolist()) & set(held))
            for row in generator(seed, c).permutation(rows[~decided[rows]]).tolist():
                own = labels[row] > 0
                if wanted > 0 and (left[own] > 1).all():
                    held.append(row)
                    left[own] -= 1
                    wanted -= 1
                decided[row] = True
        return np.setdiff1d(np.arange(len(labels)), held).tolist(), sorted(held)
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        n = min(len(rows) - 1, max(1, round(fraction * len(rows))))
        held += generator(seed, c).permutation(rows)[:n].tolist()
    rest = sorted(set(range(len(labels))) - set(held))
    return rest, sorted(held)


# Stands for no row: it fills up the last step when several processes share it.
PADDING = -1
# Label of a row that is not an example: an unreadable image, or padding of a batch. Losses and metrics leave it out.
IGNORED = -100


def is_example(labels):
    """Which rows are examples, bool `(n,)`.

    Args:
        labels: an array or tensor, `(n,)`, or `(n, C)` where a row may have several classes.
    """
    return (labels if labels.ndim == 1 else labels[:, 0]) != IGNORED


class EpochSampler:
    """Yields shuffled row numbers that carry their epoch: `epoch * length + row`.

    A dataset then knows the epoch of each read without state that workers, processes or a resume would have to share: see
    `TrainingView`. The Trainer calls `set_epoch`; accelerate gives every W-th batch of the stream to each of W processes.
    A `DataLoader` accepts anything with a length that yields row numbers, so this module needs no torch.

    Args:
        length: number of rows of the dataset, `n`.
        seed: of the order.
        processes, batch_size: W and B. The rows of an incomplete last step are dealt evenly to the processes, and each
            fills its batch up with `PADDING`: a step then has the same rows for any W with the same W * B. Without a batch
            size nothing is filled up.
    """

    def __init__(self, length: int, seed: int = 0, processes: int = 1, batch_size: int | None = None):
        self.length = length
        self.seed = seed
        self.epoch = 0
        self.processes = processes
        self.batch_size = batch_size

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.length // self._step) * self._step

    @property
    def _step(self) -> int:
        return self.processes * self.batch_size if self.batch_size else 1

    def rows(self) -> list[int]:
        """The epoch's stream of `n` numbers `epoch * length + row`, before it is dealt out."""
        order = generator(self.seed, self.epoch).permutation(self.length)
        return (self.epoch * self.length + order).tolist()

    def __iter__(self) -> Iterator[int]:
        rows = self.rows()
        last = len(rows) - len(rows) % self._step
        yield from rows[:last]
        for process in range(self.processes if last < len(rows) else 0):
            own = rows[last + process :: self.processes]
            yield from own
            yield from [PADDING] * (self.batch_size - len(own))


class ClassBalancedSampler(EpochSampler):
    """Batches in which every class has the same number of images: for classes of unequal sizes, and to give SupCon positives.

    The classes come in shuffled rounds, each with its next `samples_per_class` images. A class starts over when its images
    are used up, so images of rare classes are seen more often. No image is twice in a batch; a class with fewer images gives
    all of them. An epoch has `n` images, as without balancing.

    Args:
        labels: Class of each row (`C` classes), length `n`.
        step_size: images per step in all processes, W * B; a step has about `step_size / samples_per_class` classes.
        samples_per_class: images of a class in its turn; with 2 or more, SupCon has positives even with many classes.
        seed, processes, batch_size: as in `EpochSampler`.

    Yields `visit * n + row`, where every visit of a row has its own number, and so its own crop and caption.

    Raises:
        ValueError: `samples_per_class` is below 1, or more than a batch holds.
    """

    def __init__(
        self,
        labels: Sequence[int],
        step_size: int,
        samples_per_class: int = 2,
        seed: int = 0,
        processes: int = 1,
        batch_size: int | None = None,
    ):
        super().__init__(len(labels), seed, processes, batch_size)
        if not 1 <= samples_per_class <= step_size:
            raise ValueError(
                f"samples_per_class: expected 1 to {step_size} (a batch of all processes), found {samples_per_class}."
            )
        self.labels = np.asarray(labels)
        self.step_size = step_size
        self.samples_per_class = samples_per_class

    def rows(self) -> list[int]:
        """The epoch's stream of numbers, as in `EpochSampler`, in balanced batches of `step_size`."""
        rng = generator(self.seed, self.epoch, 2)  # 2: a separate stream
        classes = np.unique(self.labels)
        images = {c: np.flatnonzero(self.labels == c) for c in classes.tolist()}
        decks = {c: _deck(own, rng) for c, own in images.items()}
        rounds = _deck(classes, rng)
        visits = np.zeros(self.length, dtype=np.int64)
        stream: list[int] = []
        while len(stream) < self.length:
            size = min(self.step_size, self.length - len(stream))
            batch: set[int] = set()
            of_class: Counter[int] = Counter()
            while len(batch) < size:
                c = next(rounds)
                until = min(of_class[c] + self.samples_per_class, len(images[c]), of_class[c] + size - len(batch))
                while of_class[c] < until:
                    row = next(decks[c])
                    if row not in batch:
                        batch.add(row)
                        of_class[c] += 1
                        # Larger than any number of epochs, so that no other epoch has it.
                        stream.append((self.epoch + (int(visits[row]) << 32)) * self.length + row)
                        visits[row] += 1
        return stream


def _deck(values: np.ndarray, rng: np.random.Generator) -> Iterator[int]:
    """Repeats the values without end, in a new random order each time."""
    while True:
        yield from rng.permutation(values).tolist()
