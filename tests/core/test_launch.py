"""What recipes/accelerate says is what happens: CPUs, several processes, two machines, FSDP2."""

import re
import textwrap
from types import SimpleNamespace

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from launch_tools import (
    RECIPE,
    ROOT,
    YAMLS,
    cut,
    difference,
    free_port,
    launch,
    settings,
    weights,
    world_size,
)
from processes import end, start, until
from safetensors.torch import load_file
from torch.distributed.fsdp import StateDictType

from mmft_hf.core import launch as launching
from mmft_hf.core.errors import UserError
from mmft_hf.train import sharding

FILES = sorted(YAMLS.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_accelerate_reads_the_file_and_its_command(path):
    config = load_config_from_file(str(path))
    (command,) = re.findall(r"^# +accelerate launch (.+)$", path.read_text(), re.MULTILINE)
    arguments = launch_command_parser().parse_args(command.split())
    assert ROOT / arguments.config_file == path and ROOT / arguments.training_script == RECIPE
    # Either the file or the command says how many processes there are.
    assert (config.num_processes > 0) != ((arguments.num_processes or 0) > 0)
    assert ("--use_cpu" in arguments.training_script_args) == (path.stem == "multi_cpu")
    for section in ("fsdp_config", "deepspeed_config"):  # the loader takes any key in there; its parser knows them
        for key in yaml.safe_load(path.read_text()).get(section, {}):
            assert hasattr(arguments, key), key
    assert f"accelerate/{path.name}" in (ROOT / "docs" / "distributed.md").read_text()


def test_there_is_a_file_for_each_way_to_start():
    names = {"cpu", "multi_cpu", "gpu", "multi_gpu", "multi_node", "fsdp2", "deepspeed"}
    assert {path.stem for path in FILES} == names


# -- what runs ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def one(clip_folder, data_folder, tmp_path_factory):
    """One process, as cpu.yaml starts it."""
    folder = tmp_path_factory.mktemp("launch") / "one"
    words = settings(
        model_name_or_path=clip_folder, dataset_name=data_folder, output_dir=folder, per_device_train_batch_size=8
    )
    end(launch("--config_file", YAMLS / "cpu.yaml", words=words))
    assert world_size(folder) == 1
    assert difference(weights(folder), weights(clip_folder)) > 1e-2
    return folder


def two(clip_folder, data_folder, folder, **more):
    """The settings of that run on two processes, each with half of a batch."""
    more = {"output_dir": folder, "per_device_train_batch_size": 4} | more
    return settings(model_name_or_path=clip_folder, dataset_name=data_folder, **more)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_on_cpus_equal_one(one, clip_folder, data_folder, tmp_path):
    words = two(clip_folder, data_folder, tmp_path / "two", use_cpu="true")
    end(launch("--config_file", YAMLS / "multi_cpu.yaml", words=words))
    assert world_size(tmp_path / "two") == 2
    assert difference(weights(one), weights(tmp_path / "two")) < 1e-6


def start_two_machines(*folders, **more):
    port = free_port()
    options = ["--config_file", YAMLS / "multi_node.yaml", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    options += ["--main_process_port", str(port)]
    return [
        launch(*options, "--machine_rank", str(rank), words=two(folder=folder, use_cpu="true", **more))
        for rank, folder in enumerate(folders)
    ]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_machines_equal_one_process(one, clip_folder, data_folder, tmp_path):
    folder = tmp_path / "machines"
    first, second = start_two_machines(folder, folder, clip_folder=clip_folder, data_folder=data_folder)
    assert "Test accuracy on 18 images" in end(first)[0]
    assert end(second)[0] == ""
    assert world_size(folder) == 2
    assert difference(weights(one), weights(folder)) < 1e-6


@pytest.mark.slow
@pytest.mark.distributed
def test_two_machines_without_a_common_folder_are_refused(clip_folder, data_folder, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for process in start_two_machines(*folders, clip_folder=clip_folder, data_folder=data_folder):
        assert "expected one folder that all processes share, found that process 1 on" in end(process, 1)[1]
    assert [path for folder in folders for path in folder.glob("*")] == []


# -- what would have trained alone without a word ----------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.distributed
def test_several_processes_that_do_not_come_up_are_an_error(clip_folder, data_folder, tmp_path):
    common = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    started = [
        launch(*common, *option, words=two(clip_folder, data_folder, tmp_path / "out"))
        for option in (["--cpu"], ["--multi_gpu", "--main_process_port", "0"])
    ]
    alone, no_gpu = (end(process, 1)[1] for process in started)
    assert "asked for several processes but started one" in alone and "--multi_gpu" in alone
    assert "expected 2 processes that train together" in no_gpu and "Type --use_cpu true" in no_gpu
    assert "parallel_mode" not in no_gpu  # transformers warns before our message
    assert not (tmp_path / "out").exists()


def test_one_process_that_was_meant_to_be_one_is_left_alone(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    launching.check(1)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")  # left by a scheduler
    launching.check(1)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    launching.check(2)  # under MPI
    with pytest.raises(UserError, match="unset MASTER_ADDR"):
        launching.check(1)


@pytest.mark.slow
def test_processes_that_do_not_meet_are_an_error_after_the_timeout(monkeypatch):
    address = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"expected 2 processes to meet at 127.0.0.1:\d+ within 2 seconds"):
        launching.start(True, 2)


HANGS = """
import pathlib, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(f"{worker.pid}\\n")
time.sleep(600)
"""


def test_a_launcher_that_hangs_is_ended_with_its_workers(tmp_path):
    """What these tests do themselves: torchrun gives its workers sessions of their own."""
    process, written = start(["-c", HANGS, tmp_path / "pid"]), tmp_path / "pid"
    until(lambda: written.exists() and written.read_text().endswith("\n"))
    worker = psutil.Process(int(written.read_text()))
    with pytest.raises(AssertionError, match=r"did not end within 0\.1 s"):
        end(process, seconds=0.1)
    until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


# -- FSDP2 ------------------------------------------------------------------------------------------------------------
# accelerate shards on accelerators alone. Here it is told that the CPU is one, over gloo; all else is its own code and ours.
SHARDED = textwrap.dedent(
    """
    import os, sys
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
    from torch.distributed.tensor import DTensor
    from transformers import TrainerCallback
    from mmft_hf import MMFTTrainer, cli

    class Held(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            parameters = [p for p in model.parameters() if isinstance(p, DTensor)]
            held = sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in model.parameters())
            print(f"process {args.process_index} holds {held:.2f}", file=sys.stderr)

    stock = MMFTTrainer.__init__
    MMFTTrainer.__init__ = lambda self, *args, **kwargs: (stock(self, *args, **kwargs), self.add_callback(Held))[0]
    sys.exit(cli.main(["finetune", *sys.argv[1:]]))
    """
)


@pytest.fixture
def fsdp(tmp_path, clip_folder, data_folder):
    (tmp_path / "sharded.py").write_text(SHARDED)

    def run(name, code=0, **more):
        words = two(clip_folder, data_folder, tmp_path / name, **more)
        options = ["--config_file", YAMLS / "fsdp2.yaml", "--num_processes", "2"]
        return end(launch(*options, script=tmp_path / "sharded.py", words=words), code)

    return run


@pytest.mark.distributed
@pytest.mark.slow
def test_fsdp2_holds_half_and_resumes_to_the_same_weights(fsdp, tmp_path):
    adam = {"optim": "adamw_torch", "learning_rate": 1e-3, "save_total_limit": 9}
    out, err = fsdp("straight", **adam)
    held = {(int(p), float(share)) for p, share in re.findall(r"process (\d) holds ([\d.]+)", err)}
    assert {p for p, _ in held} == {0, 1} and all(0.45 < share < 0.55 for _, share in held)
    assert "Test accuracy on 18 images" in out
    cut(tmp_path / "straight", tmp_path / "cut", "checkpoint-6")
    fsdp("cut", resume_from_checkpoint="true", **adam)
    assert difference(weights(tmp_path / "straight"), weights(tmp_path / "cut")) == 0


@pytest.mark.distributed
@pytest.mark.slow
def test_fsdp2_equals_one_process(fsdp, clip_folder, data_folder, tmp_path):
    """A whole tower and one with LoRA, the best epoch, clipped gradients, layers computed twice."""
    more = {"vision_tower": "lora", "max_grad_norm": 0.5, "gradient_checkpointing": "true"}
    more |= {"load_best_model_at_end": "true", "metric_for_best_model": "loss"}
    words = two(clip_folder, data_folder, tmp_path / "alone", **more | {"per_device_train_batch_size": 8})
    end(launch("--config_file", YAMLS / "cpu.yaml", words=words))
    fsdp("sharded", **more)
    alone, sharded = weights(tmp_path / "alone"), weights(tmp_path / "sharded")
    assert difference(alone, weights(clip_folder)) > 1e-3
    assert difference(alone, sharded) < 1e-6
    adapters = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("alone", "sharded")]
    assert difference(*adapters) < 1e-6


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("vision", "text"), [("last:1", "norms"), ("norms", "head"), ("head", "last:1")])
def test_fsdp2_trains_parts_of_towers_as_one_process_does(vision, text, fsdp, clip_folder, data_folder, tmp_path):
    more = {"vision_tower": vision, "text_tower": text, "head": "prototypes", "load_best_model_at_end": "false"}
    words = two(clip_folder, data_folder, tmp_path / "alone", **more | {"per_device_train_batch_size": 8})
    end(launch("--config_file", YAMLS / "cpu.yaml", words=words))
    fsdp("sharded", **more)
    before, alone, sharded = (weights(folder) for folder in (clip_folder, tmp_path / "alone", tmp_path / "sharded"))
    moved = {key for key in before if (before[key] != alone[key]).any()}
    assert moved and len(moved) < len(before) / 2  # a part
    assert moved == {key for key in before if (before[key] != sharded[key]).any()}
    assert difference(alone, sharded) < 1e-6


def test_fsdp_with_what_it_cannot_do_is_refused():
    config = load_config_from_file(str(YAMLS / "fsdp2.yaml")).fsdp_config
    fine = {
        "fsdp_version": config["fsdp_version"],
        "state_dict_type": StateDictType[config["fsdp_state_dict_type"]],
        "cpu_ram_efficient_loading": config["fsdp_cpu_ram_efficient_loading"],
    }
    args = {"loss_chunk_size": None, "auto_find_batch_size": False}

    def check(**changes):
        found = args | fine | changes
        plugin = SimpleNamespace(**{key: found[key] for key in fine})
        sharding.check_settings(SimpleNamespace(**{key: found[key] for key in args}), plugin)

    check()
    for name, value, said in (
        ("loss_chunk_size", 2, "loss_chunk_size: expected nothing under FSDP, found 2"),
        ("auto_find_batch_size", True, "auto_find_batch_size: expected nothing under FSDP"),
        ("fsdp_version", 1, "fsdp_version: expected 2, found 1"),
        ("state_dict_type", StateDictType.SHARDED_STATE_DICT, "expected FULL_STATE_DICT, found SHARDED_STATE_DICT"),
        ("cpu_ram_efficient_loading", True, "fsdp_cpu_ram_efficient_loading: expected false, found true"),
    ):
        with pytest.raises(UserError, match=said):
            check(**{name: value})


def test_checkpoints_of_fsdp_and_others_are_kept_apart(tmp_path):
    (tmp_path / "optimizer.bin").touch()
    sharding.check_checkpoint(tmp_path, fsdp=True)
    with pytest.raises(UserError, match="expected a run with FSDP, like the one that wrote it, found one without"):
        sharding.check_checkpoint(tmp_path, fsdp=False)
    (tmp_path / "optimizer.bin").rename(tmp_path / "optimizer.pt")
    sharding.check_checkpoint(tmp_path, fsdp=False)
    with pytest.raises(UserError, match="expected a run without FSDP, like the one that wrote it, found one with"):
        sharding.check_checkpoint(tmp_path, fsdp=True)
