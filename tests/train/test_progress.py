"""Time left, as a training prints it."""

from types import SimpleNamespace

import pytest
import torch

from mmft_hf import MMFTConfig
from mmft_hf.train import progress


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def printed(clock, capsys, step_seconds, max_steps, device="cpu", start=0, steps=10):
    """What a training prints whose first step takes a minute longer than the others."""
    lines = progress.EpochLines([], {}, lambda: None, bar=False)
    args = SimpleNamespace(metric_for_best_model="accuracy", greater_is_better=True, device=torch.device(device))
    state = SimpleNamespace(
        global_step=start,
        max_steps=max_steps,
        best_metric=None,
        is_world_process_zero=True,
        epoch=1.0,
        num_train_epochs=10,
    )
    lines.on_train_begin(args, state, None)
    for i in range(steps):
        clock.seconds += step_seconds + 60 * (i == 0)
        state.global_step += 1
        lines.on_step_end(args, state, None)
    clock.seconds += 40  # a validation
    lines.on_log(args, state, None, {"eval_accuracy": 0.5})
    return capsys.readouterr().out.splitlines()


def test_a_long_training_says_how_long_after_its_first_steps(clock, capsys):
    first, epoch = printed(clock, capsys, 8.0, 1000)
    # (1000 - 5) steps of 8 s; then 990 steps, of which 10 took 80 + 60 + 40 s.
    assert first.startswith(
        "about 2.2 h left, at 8 s a step, plus validation. On a CPU, --num_train_epochs 0 fits a head"
    )
    assert epoch.endswith("| validation 50.0% * | about 5.0 h left")
    first, _ = printed(clock, capsys, 8.0, 1000, device="cuda")
    assert first == "about 2.2 h left, at 8 s a step, plus validation"
    first, _ = printed(clock, capsys, 8.0, 1000, start=500)  # resumed
    assert first.startswith("about 66 min left")


def test_a_short_training_says_nothing_about_time(clock, capsys):
    (epoch,) = printed(clock, capsys, 0.1, 12)
    assert epoch.endswith("| validation 50.0% *")
    (_,) = printed(clock, capsys, 1.0, 3, steps=3)


def test_epochs_by_default_depend_on_the_device(tmp_path):
    config = MMFTConfig(str(tmp_path), use_cpu=True)
    assert config.num_train_epochs == 10
    assert MMFTConfig(str(tmp_path), use_cpu=True, num_train_epochs=3).num_train_epochs == 3
    if torch.accelerator.is_available():
        assert MMFTConfig(str(tmp_path)).num_train_epochs == 50
