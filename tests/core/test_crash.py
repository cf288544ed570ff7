"""One of two processes dies: the other one ends by itself, says what to type, and that goes on to the same weights."""

import shutil
import signal
import textwrap
import time

import pyarrow
import pytest
from launch_tools import YAMLS, difference, free_port, launch, settings, weights
from processes import end, kill, start
from pyarrow import parquet

# Process 1 sends itself a signal after a step. No launcher is there to end process 0.
DYING = textwrap.dedent(
    """
    import os, sys
    from transformers import TrainerCallback
    from mmft_hf import MMFTTrainer, cli

    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if (args.process_index, state.global_step) == (1, 4) and "DIE" in os.environ:
                os.kill(os.getpid(), int(os.environ["DIE"]))

    stock = MMFTTrainer.__init__
    MMFTTrainer.__init__ = lambda self, *args, **kwargs: (stock(self, *args, **kwargs), self.add_callback(Die))[0]
    sys.exit(cli.main(["finetune", *sys.argv[1:]]))
    """
)


@pytest.fixture
def ranks(tmp_path, clip_folder, data_folder):
    """Starts both ranks by hand: three steps an epoch, with a checkpoint after each."""
    (tmp_path / "dying.py").write_text(DYING)
    started = []

    def run(name, die=None, **more):
        words = settings(
            model_name_or_path=clip_folder,
            dataset_name=data_folder,
            output_dir=tmp_path / name,
            per_device_train_batch_size=4,
            use_cpu="true",
            **more,
        )
        where = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        where |= {} if die is None else {"DIE": int(die)}
        both = [start([tmp_path / "dying.py", *words], RANK=r, LOCAL_RANK=r, **where) for r in (0, 1)]
        started.extend(both)
        return both

    yield run
    for process in started:
        kill(process)
        process.wait()


@pytest.mark.distributed
@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_run_goes_on(ranks, tmp_path):
    for process in ranks("straight"):
        end(process)
    survivor, killed = ranks("cut", die=signal.SIGKILL)
    end(killed, -signal.SIGKILL)
    _, err = end(survivor, 3)  # a process that waits for another would wait half an hour
    message = err[err.index("mmft-hf: ") :]
    assert "process 0 of 2: another process has ended or does not answer (" in message
    assert f"The last complete checkpoint is {tmp_path / 'cut' / 'checkpoint-3'}." in message
    assert "with --resume_from_checkpoint true" in message and "Traceback" not in err
    for process in ranks("cut", resume_from_checkpoint="true"):
        end(process)
    assert difference(weights(tmp_path / "straight"), weights(tmp_path / "cut")) == 0


@pytest.mark.distributed
@pytest.mark.slow
def test_a_silent_process_ends_the_other_after_the_timeout(ranks):
    survivor, _ = ranks("out", die=signal.SIGSTOP, ddp_timeout=4)
    _, err = end(survivor, 3)
    assert "does not answer (Timed out" in err and "checkpoint-3." in err


@pytest.mark.distributed
@pytest.mark.slow
def test_a_launcher_can_end_a_process_that_waits_for_another(ranks, tmp_path):
    survivor, _ = ranks("out", die=signal.SIGSTOP)  # with the timeout of half an hour
    while not (tmp_path / "out" / "checkpoint-3" / "trainer_state.json").is_file():
        assert survivor.poll() is None
        time.sleep(0.1)
    time.sleep(3)  # until it waits
    assert survivor.poll() is None
    survivor.terminate()
    _, err = end(survivor, 3)
    assert "stopped by SIGTERM, which a launcher sends when another process has ended" in err
    assert "checkpoint-3." in err


@pytest.mark.slow
@pytest.mark.distributed
def test_an_error_of_one_process_ends_the_other_under_a_launcher(clip_folder, data_folder, tmp_path):
    """The twelfth picture is read by one of the processes alone."""
    shutil.copytree(data_folder, tmp_path / "data")
    table = parquet.read_table(data_folder / "train.parquet")
    rows = table.to_pylist()
    rows[11]["image"]["bytes"] = b"no picture"
    parquet.write_table(pyarrow.Table.from_pylist(rows, table.schema), tmp_path / "data" / "train.parquet")
    words = settings(
        model_name_or_path=clip_folder,
        dataset_name=tmp_path / "data",
        output_dir=tmp_path / "out",
        per_device_train_batch_size=4,
        use_cpu="true",
    )
    _, err = end(launch("--config_file", YAMLS / "multi_cpu.yaml", words=words), 1)
    assert err.count("mmft-hf: ") == 2
    assert "row 11" in err
    assert "another process has ended" in err
