"""Real processes over gloo: the loss and its gradients equal those of one process."""

import functools
import json
import shutil
from pathlib import Path

import pytest
from distributed_cases import CASES, FAST, SIZES, run
from forked import fork
from launch_tools import free_port
from processes import run_python
from safetensors.torch import load_file

from mmft_hf.train.terms import TERMS

SLOW = [name for name in CASES if name not in FAST]


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Trains cases on several processes; their folder."""

    @functools.cache
    def launch(world: int, names: tuple[str, ...]) -> Path:
        folder = tmp_path_factory.mktemp("several")
        code = f"from distributed_cases import main; main({str(folder)!r}, *{names!r})"
        where = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = [
            fork(code, folder / f"{rank}.txt", ["distributed_cases"], RANK=rank, LOCAL_RANK=rank, **where)
            for rank in range(world)
        ]
        for rank in ranks:
            assert rank.wait() == 0, "".join(rank.text for rank in ranks)
        return folder

    return launch


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Tensors and numbers of a case, trained in this process."""
    return functools.cache(lambda name: run(name, tmp_path_factory.mktemp("alone")))


# Two processes train some cases; in slow tests, two others train the rest, and three train all of them.
TWO, THREE = (2, FAST), (3, tuple(CASES))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "sizes"),
    [pytest.param(TWO, sizes, id=str(sizes)) for sizes in SIZES[2]]
    + [pytest.param(THREE, sizes, marks=pytest.mark.slow, id=str(sizes)) for sizes in SIZES[3]],
)
def test_loss_and_gradients_equal_one_process(several, processes, sizes):
    found = json.loads((several(*processes) / "losses.json").read_text())[str(sizes)]
    assert found["largest gradient"] > 1e-3
    assert found["loss"] < 1e-12
    assert found["gradient"] < 1e-12


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "name"),
    [pytest.param(TWO, name, id=f"2-{name}") for name in TERMS]
    + [pytest.param(THREE, name, marks=pytest.mark.slow, id=f"3-{name}") for name in TERMS],
)
def test_every_term_on_several_processes_equals_one(several, processes, name):
    """With an unlike number of rows in each process."""
    found = json.loads((several(*processes) / "terms.json").read_text())[name]
    assert found["largest"] > 1e-3
    assert found["values"] < 1e-12 and found["gradients"] < 1e-12


def difference(some: dict, others: dict) -> float:
    return max((some[key] - others[key]).abs().max().item() for key in some)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "name"),
    [pytest.param(TWO, name, id=f"2-{name}") for name in FAST]
    + [pytest.param((2, tuple(SLOW)), name, marks=pytest.mark.slow, id=f"2-{name}") for name in SLOW]
    + [pytest.param(THREE, name, marks=pytest.mark.slow, id=f"3-{name}") for name in CASES],
)
def test_training_on_several_processes_equals_one(several, alone, processes, name):
    folder, world = several(*processes), processes[0]
    expected, numbers = alone(name)
    found = load_file(folder / f"{name}.safetensors")
    found_numbers = json.loads((folder / f"{name}.json").read_text())
    assert found_numbers.pop("world") == world
    assert found.keys() == expected.keys()
    gradients = [key for key in expected if key.startswith("gradient")]
    assert max(expected[key].abs().max().item() for key in gradients) > 1e-2
    # bfloat16 rounds sums over other rows otherwise, but by no more than it rounds the sums of one process.
    rounding = difference(expected, alone("full")[0]) if "bf16" in name else 0.0
    atol = max(1e-6, rounding)
    assert difference(found, expected) < atol < 0.05
    assert found_numbers == pytest.approx({k: v for k, v in numbers.items() if k != "world"}, abs=10 * atol)


@pytest.mark.slow
@pytest.mark.distributed
def test_finetune_on_two_processes_equals_one(clip_folder, data_folder, tmp_path):
    def finetune(launcher: list[str], name: str, batch: int) -> dict:
        settings = {
            "model_name_or_path": clip_folder,
            "dataset_name": data_folder,
            "output_dir": tmp_path / name,
            "per_device_train_batch_size": batch,
            "num_train_epochs": 2,
            # Adam would blow the rounding of gradients that are zero (those of k_proj.bias) up to whole steps.
            "optim": "sgd",
            "learning_rate": 0.1,
            "use_cpu": "true",
            "load_best_model_at_end": "false",
        }
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        out, _ = run_python(["-m", *launcher, "mmft_hf", "finetune", *words])
        record = json.loads((tmp_path / name / "mmft.json").read_text())
        assert record["identity"]["world_size"] == 8 // batch
        assert out.count("Test accuracy on 18 images") == 1
        return load_file(tmp_path / name / "model.safetensors")

    one = finetune([], "one", 8)
    two = finetune(["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"], "two", 4)
    start = load_file(clip_folder / "model.safetensors")
    assert max((one[name] - start[name]).abs().max().item() for name in one) > 1e-2
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-6


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_cut_within_an_epoch_go_on_as_if_they_had_not_been_on_two_or_one(
    clip_folder, data_folder, tmp_path
):
    """Three steps an epoch, saved every two: step 4 lies within the second epoch."""

    def finetune(name: str, *more: str, processes: int = 2, batch: int = 4, code: int = 0):
        settings = f"--model_name_or_path {clip_folder} --dataset_name {data_folder} --output_dir {tmp_path / name}"
        settings += f" --num_train_epochs 2 --per_device_train_batch_size {batch} --learning_rate 1e-3 --use_cpu true"
        settings += " --save_strategy steps --save_steps 2 --save_total_limit 9 --load_best_model_at_end false"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*(launcher if processes > 1 else []), "-m", "mmft_hf", "finetune"]
        _, err = run_python([*command, *settings.split(), *more], code)
        return err if code else load_file(tmp_path / name / "model.safetensors")

    def cut(name: str) -> None:
        """What an interruption after checkpoint-4 leaves: no later checkpoint, no results, a record that says so."""
        shutil.copytree(tmp_path / "straight", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoint-6")
        record = json.loads((tmp_path / name / "mmft.json").read_text())
        (tmp_path / name / "mmft.json").write_text(json.dumps(record | {"completed": False}))
        (tmp_path / name / "model.safetensors").unlink()

    straight = finetune("straight")
    resume = ("--resume_from_checkpoint", "true")
    cut("resumed")
    assert difference(straight, finetune("resumed", *resume)) == 0
    # On one process, in steps of as many images. Adam makes whole steps of the rounding of k_proj.bias' zero gradients.
    cut("converted")
    converted = finetune("converted", *resume, processes=1, batch=8)
    assert difference({k: v for k, v in converted.items() if "k_proj.bias" not in k}, straight) < 1e-5
    cut("refused")
    message = finetune("refused", *resume, processes=1, batch=4, code=2)
    assert "world_size was 2, now 1" in message
    assert "With 1 instead of 2 processes, --per_device_train_batch_size 8 keeps the steps of 8 images" in message
