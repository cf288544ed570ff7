"""The order of an epoch: every row once, or every class alike, and the same for any number of processes."""

from collections import Counter

import numpy as np
import pytest
from tiny_clip import colour_dataset
from torch.utils.data import BatchSampler
from training import make_trainer

from mmft_hf import ClassBalancedSampler
from mmft_hf.core.errors import UserError
from mmft_hf.data.sampling import PADDING, EpochSampler
from mmft_hf.data.views import TextView, TrainingView

LABELS = [0] * 40 + [1] * 17 + [2] * 3 + [3] * 1 + [4] * 9


def steps(sampler, processes: int, batch_size: int) -> list[list[list[int]]]:
    """What each process gets at each step, as accelerate deals batches out: every W-th to each of W processes."""
    batches = list(BatchSampler(sampler, batch_size, drop_last=False))
    assert len(batches) % processes == 0 and all(len(batch) == batch_size for batch in batches)
    return [batches[i : i + processes] for i in range(0, len(batches), processes)]


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [12, 13, 19, 23, 5, 1])
@pytest.mark.parametrize("balanced", [False, True])
def test_steps_have_the_same_rows_for_any_number_of_processes(processes, length, balanced):
    def sampler(processes, batch_size):
        if balanced:
            return ClassBalancedSampler(np.arange(length) % 4, 12, 2, 3, processes, batch_size)
        return EpochSampler(length, 3, processes, batch_size)

    alone = list(sampler(1, None))
    assert len(alone) == length == len(sampler(1, None))
    found = steps(sampler(processes, 12 // processes), processes, 12 // processes)
    assert len(sampler(processes, 12 // processes)) == 12 * len(found)
    for i, step in enumerate(found):
        own = [[row for row in batch if row != PADDING] for batch in step]
        assert sorted(row for rows in own for row in rows) == sorted(alone[12 * i : 12 * i + 12])
        assert max(map(len, own)) - min(map(len, own)) <= 1


def test_an_epoch_has_every_row_once_and_epochs_differ():
    sampler = EpochSampler(50, 7)
    first = list(sampler)
    assert first == list(sampler) == list(EpochSampler(50, 7))
    sampler.set_epoch(2)
    third = list(sampler)
    assert [key // 50 for key in third] == [2] * 50
    assert sorted(key % 50 for key in third) == list(range(50)) and [key % 50 for key in third] != first
    assert list(EpochSampler(50, 8)) != first


def test_batches_are_balanced():
    sampler = ClassBalancedSampler(LABELS, step_size=12, samples_per_class=4, seed=1)
    drawn = Counter()
    for epoch in range(10):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        rows = [key % len(LABELS) for key in keys]
        # No draw is like another one, neither in this epoch nor in others.
        assert len(set(keys)) == len(keys) == len(LABELS)
        for start in range(0, len(rows), 12):
            batch = rows[start : start + 12]
            assert len(set(batch)) == len(batch)
            counts = Counter(LABELS[row] for row in batch)
            assert counts[3] <= 1 and counts[2] <= 3
            assert max(counts.values()) <= 8  # at most where one round of the classes ends and the next begins
            if len(batch) == 12:
                assert sum(count >= 2 for count in counts.values()) >= 2
        drawn.update(LABELS[row] for row in rows)
    # Classes of 40, 17 and 9 images are drawn alike, though one has four times as many.
    assert max(drawn[0], drawn[1], drawn[4]) < 1.15 * min(drawn[0], drawn[1], drawn[4])
    assert drawn[2] > drawn[3] > 0


def test_every_image_of_a_class_has_its_turn():
    sampler = ClassBalancedSampler([0] * 10 + [1] * 10, step_size=4, samples_per_class=2)
    assert sorted(key % 20 for key in sampler) == list(range(20))


def test_visits_of_a_row_have_crops_and_captions_of_their_own():
    data = colour_dataset(4)
    view = TrainingView(data, TextView(["a", "b", "c"], "{}"), crop_min_area=0.5)
    labels = [0, 1, 2] + [0] * 9  # rows 1 and 2 are in every batch
    keys = [key for key in ClassBalancedSampler(labels, 6, 2) if key % 12 == 1]
    assert len(keys) == 2  # once in each batch
    assert len({view[key]["box"] for key in keys}) == len(keys)
    assert {view[key]["label"] for key in keys} == {data[1]["label"]}


@pytest.mark.parametrize("samples", [0, 13])
def test_impossible_batches_are_refused(samples):
    with pytest.raises(ValueError, match=f"samples_per_class: expected 1 to 12 .*found {samples}"):
        ClassBalancedSampler(LABELS, 12, samples)


def test_the_trainer_balances_its_batches(clip, tmp_path):
    rows = [i for i in range(48) if i % 3 == 0 or i < 12]  # 16, 4 and 4 images
    trainer = make_trainer(clip, tmp_path, colour_dataset(16).select(rows), False, max_steps=4, samples_per_class=2)
    labels = [label for batch in trainer.get_train_dataloader() for label in batch["labels"].tolist()]
    assert len(labels) == 24
    assert all(len(set(labels[i : i + 8])) == 3 for i in range(0, 24, 8))
    trainer.train()
    assert all(log["anchors_with_positives"] == 1 for log in trainer.state.log_history if "loss" in log)


def test_more_samples_than_a_batch_holds_are_refused_in_the_words_of_the_command_line(clip, tmp_path):
    with pytest.raises(UserError, match=r"samples_per_class: expected 2 to 8 .*found 9"):
        make_trainer(clip, tmp_path, evaluate=False, samples_per_class=9)
