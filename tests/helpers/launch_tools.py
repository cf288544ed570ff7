"""Starting `mmft-hf finetune` as users do: through accelerate's launcher, or rank by rank without any launcher."""

import json
import shutil
import socket
import subprocess
from pathlib import Path

from processes import start
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
YAMLS = ROOT / "recipes" / "accelerate"
RECIPE = ROOT / "recipes" / "finetune.py"


def settings(**given) -> list[str]:
    """The command line of a short run. Adam would blow the rounding of gradients that are zero up to whole steps."""
    given = {"num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.1, "load_best_model_at_end": "false"} | given
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def launch(*options, script=RECIPE, words=()) -> subprocess.Popen:
    """`accelerate launch OPTIONS recipes/finetune.py WORDS`."""
    return start(["-m", "accelerate.commands.launch", *options, script, *words])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def world_size(folder: Path) -> int:
    return json.loads((folder / "mmft.json").read_text())["identity"]["world_size"]


def cut(run: Path, copy: Path, last: str) -> None:
    """What a run would have left, had it been killed before it wrote the checkpoint `last`."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / last)
    record = json.loads((copy / "mmft.json").read_text())
    (copy / "mmft.json").write_text(json.dumps(record | {"completed": False}))
    (copy / "model.safetensors").unlink()
