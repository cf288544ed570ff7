"""Which checkpoint can be resumed: a whole one, of the same model."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel, TrainingArguments

from ..core.errors import UserError
from ..core.files import WEIGHTS_INDEX
from ..model.towers import checkpoint_state


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
    return re.fullmatch(r"checkpoint-\d+", folder.name) is not None


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has all its files. The first process writes trainer_state.json last, so that must be whole."""
    if not all((folder / name).is_file() for name in ("config.json", "scheduler.pt")):
        return False
    if not any((folder / f"optimizer.{end}").is_file() for end in ("pt", "bin")):  # bin: under FSDP
        return False
    if not list(folder.glob("*.safetensors")) or not list(folder.glob("rng_state*.pth")):
        return False
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        index = folder / WEIGHTS_INDEX
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.is_file() else ()
    except (OSError, ValueError, KeyError):
        return False
    return all((folder / shard).is_file() for shard in shards)


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The complete `checkpoint-*` of the highest step, or None."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.split("-")[1].isdigit() and is_complete(p)]
    return str(max(folders, key=lambda p: int(p.name.split("-")[1]))) if folders else None


def check_same_model(checkpoint: Path, model: PreTrainedModel) -> None:
    """Raises `UserError` if the weights of a checkpoint are not those that `model` trains."""

    def shape(config: dict) -> dict:
        keys = "model_type hidden_size num_hidden_layers intermediate_size patch_size image_size vocab_size hidden_dim".split()
        towers = {tower: config.get(tower, {}) for tower in ("vision_config", "text_config")}
        sizes = {f"{tower}.{key}": values.get(key) for tower, values in towers.items() for key in keys}
        return {"model_type": config.get("model_type"), "projection_dim": config.get("projection_dim"), **sizes}

    expected = shape(model.config.to_dict())
    found = shape(json.loads((checkpoint / "config.json").read_text()))
    differ = [f"{key} {expected[key]} (found {found[key]})" for key in expected if expected[key] != found[key]]
    if differ:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: it is a checkpoint of another model. Expected {', '.join(differ)}. "
            "Type the --model_name_or_path that it was started with, or a new --output_dir."
        )
    own = {name: list(value.shape) for name, value in checkpoint_state(model).items()}
    stored = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored |= {name: file.get_slice(name).get_shape() for name in file.keys()}
    if any(".lora_" in name for name in own | stored) and own != stored:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: it was trained with other towers, or other settings of LoRA. Type "
            "the --vision_tower, --text_tower and --lora_rank that it was started with, or a new --output_dir."
        )


def check_same_batches(checkpoint: Path, args: TrainingArguments) -> None:
    """Raises `UserError` if a step of the run that left a checkpoint had another number of images than one of `args`.

    The number of processes may differ: the order of the images and every draw depend on the step's size alone. Only random
    numbers of dropout are drawn anew then.
    """
    # Each process left its random state, on its own machine.
    left = {path.name for path in checkpoint.glob("rng_state*.pth")}
    processes = len(left)
    complete = left == {"rng_state.pth"} or left == {f"rng_state_{i}.pth" for i in range(processes)}
    batch = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["train_batch_size"]
    # With auto_find_batch_size the state has the number of images that are encoded at once.
    unknown = batch is None or not complete or args.auto_find_batch_size
    if unknown or batch * processes == args.train_batch_size * args.world_size:
        return
    even, rest = divmod(batch * processes, args.world_size)
    hint = f"--per_device_train_batch_size {even}" if not rest else f"as many processes as before ({processes})"
    raise UserError(
        f"--resume_from_checkpoint {checkpoint}: expected {batch * processes} images a step, as before ({processes} x "
        f"{batch}), found {args.train_batch_size * args.world_size} ({args.world_size} x {args.train_batch_size}): the loss "
        f"would be another one. Type {hint}."
    )


def rotate(folder: Path, limit: int, step: int, best: str | None) -> None:
    """Deletes the oldest checkpoints of a run, so that `limit` are left; that of `step`, just saved, and the best one always stay.

    Those beyond `step` are of a run that was gone back on, and count as the oldest.
    """
    steps = {
        int(path.name.rpartition("-")[2]): path for path in folder.iterdir() if is_checkpoint(path) and path.is_dir()
    }
    oldest_first = sorted(steps, key=lambda n: (n <= step, n))
    stay = {n for n in steps if n == step or (best and steps[n].name == Path(best).name)}
    for n in [n for n in oldest_first if n not in stay][: max(0, len(steps) - max(limit, len(stay)))]:
        shutil.rmtree(steps[n], ignore_errors=True)
