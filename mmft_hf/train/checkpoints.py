"""Checkpoints: what they hold, which is the best, which one can be resumed, and which state is never saved."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, TrainerState, TrainingArguments

from ..core.errors import UserError
from ..core.files import STATE_FILE, WEIGHTS_INDEX, atomic_folder, no_room, widen_permissions, write_json
from ..core.reading import check_regular, open_regular, read_json
from ..core.records import CheckpointConfig, ShardIndex, TrainingState
from ..core.seals import digest_of
from ..model.embedding import quick_attention
from ..model.towers import checkpoint_state, lora_layers, plain_state

logger = logging.getLogger(__name__)
CHECKSUMS_FILE = "checksums.json"
ARCHIVES = (".pt", ".pth", ".bin")  # zip files of torch


class NotFinite(UserError):
    """A loss, or what the model answers, is infinite or no number."""


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
    return re.fullmatch(r"checkpoint-\d+", folder.name) is not None


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has all its files. The first process writes trainer_state.json last, so that must be whole."""
    patterns = ("config.json", "scheduler.pt", "optimizer.*", "*.safetensors", "rng_state*.pth")  # optimizer.bin: FSDP
    if not all(any(path.is_file() for path in folder.glob(pattern)) for pattern in patterns):
        return False
    try:
        read_json(folder / STATE_FILE, TrainingState)
        index = folder / WEIGHTS_INDEX
        shards = read_json(index, ShardIndex)["weight_map"].values() if index.exists() else ()
    except (OSError, UserError):
        return False
    return all((folder / shard).is_file() for shard in shards)


def write_checksums(folder: Path) -> None:
    """Records the digests of a checkpoint's files, so that a damaged one is never resumed from.

    Files of torch are archives with a checksum of every part already.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != CHECKSUMS_FILE]
    write_json(folder / CHECKSUMS_FILE, {path.name: digest_of(path) for path in files if path.suffix not in ARCHIVES})


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a complete checkpoint, all of which are read before any of them is used; None: nothing."""
    path = folder / CHECKSUMS_FILE
    try:
        digests = read_json(path, dict[str, str]) if path.exists() else {}  # version 0.1 recorded none
        for name, digest in digests.items():
            path = folder / Path(name).name
            if digest_of(path) != digest:
                raise UserError(f"{path.name} is not what was saved")
        path = folder / "config.json"
        read_json(path, CheckpointConfig)
        path = folder / STATE_FILE
        TrainerState(**read_json(path, TrainingState))
        for path in sorted(path for path in folder.iterdir() if not path.is_dir()):
            if path.suffix == ".safetensors":
                check_regular(path)
                with safe_open(path, framework="pt") as file:  # compares the sizes in its header with that of the file
                    file.keys()
            elif path.suffix in ARCHIVES:
                with open_regular(path) as file, zipfile.ZipFile(file) as archive:
                    if part := archive.testzip():
                        raise UserError(f"{path.name} is damaged in {part}")
    except UserError as error:  # names the file
        return str(error).rstrip(".")
    except Exception as error:  # whatever the readers of these formats raise for content that is none
        said = " ".join(str(error).split())[:200]
        return f"{path.name} is missing" if isinstance(error, FileNotFoundError) else f"{path.name} is damaged ({said})"
    return None


@contextmanager
def reading(checkpoint: str | os.PathLike | None) -> Iterator[None]:
    """Within this context the stock Trainer reads a checkpoint: content that it cannot use is the user's to replace."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a pickle that holds more than numbers, states of another optimizer, …
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: expected a checkpoint of this run, found another or a damaged one "
            f"({type(error).__name__}: {said}). Type --resume_from_checkpoint with an earlier one, or a new --output_dir."
        ) from error


def _unusable(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; None if it can."""
    return damage(folder) or (None if is_complete(folder) else "some of its files are missing")


def _checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder, by their step."""
    found = (path for path in folder.glob("checkpoint-*") if is_checkpoint(path) and path.is_dir())
    return {int(path.name.rpartition("-")[2]): path for path in found}


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The complete `checkpoint-*` of the highest step, or None."""
    complete = {step: path for step, path in _checkpoints(Path(output_dir)).items() if is_complete(path)}
    return str(complete[max(complete)]) if complete else None


def last_whole_checkpoint(output_dir: str | os.PathLike, but: Path | None = None) -> str | None:
    """The complete `checkpoint-*` of the highest step whose files are whole (see `damage`), or None. Damaged ones are logged."""
    for _, path in sorted(_checkpoints(Path(output_dir)).items(), reverse=True):
        if but and path.resolve() == but.resolve():
            continue
        if wrong := _unusable(path):
            logger.warning("Note: %s is passed over: %s.", path, wrong)
            continue
        return str(path)
    return None


def check_same_model(checkpoint: Path, model: PreTrainedModel) -> None:
    """Raises `UserError` if the weights of a checkpoint are not those that `model` trains."""

    def shape(config: dict) -> dict:
        keys = "model_type hidden_size num_hidden_layers intermediate_size patch_size image_size vocab_size hidden_dim".split()
        towers = {tower: config.get(tower, {}) for tower in ("vision_config", "text_config")}
        sizes = {f"{tower}.{key}": values.get(key) for tower, values in towers.items() for key in keys}
        whole = {key: config.get(key) for key in ("model_type", "projection_dim", "text_pooling")}
        whole["text_trunk"] = (config.get("text_trunk") or {}).get("digest", "")[:12]
        return whole | sizes

    expected = shape(model.config.to_dict())
    found = shape(read_json(checkpoint / "config.json", CheckpointConfig))
    differ = [f"{key} {expected[key]} (found {found[key]})" for key in expected if expected[key] != found[key]]
    if differ:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: it is a checkpoint of another model. Expected {', '.join(differ)}. "
            "Type the --model_name_or_path (and --text_trunk) that the run was started with, or a new --output_dir."
        )
    own = {name: list(value.shape) for name, value in checkpoint_state(model).items()}
    stored = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored |= {name: file.get_slice(name).get_shape() for name in file.keys()}
    if any(".lora_" in name for name in own | stored) and own != stored:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: it was trained with other towers, or other settings of LoRA. Type "
            "the --vision_tower, --text_tower and --lora_rank that the run was started with, or a new --output_dir."
        )


def check_best(checkpoint: Path, args: TrainingArguments) -> None:
    """Raises `UserError` if the best checkpoint so far, which the end of the run may return to, is missing or damaged."""
    state = read_json(checkpoint / STATE_FILE, TrainingState)
    step = state["best_global_step"]
    if not args.load_best_model_at_end or step is None or state["best_metric"] is None:
        return
    places = (Path(args.output_dir) / f"checkpoint-{step}", Path(state["best_model_checkpoint"] or "."))
    best = next((place for place in places if is_checkpoint(place) and place.is_dir()), places[0])
    wrong = "it is missing" if not best.is_dir() else _unusable(best)
    if wrong is None:
        return
    earlier = {
        n: path for n, path in _checkpoints(Path(args.output_dir)).items() if n < step and _unusable(path) is None
    }
    again = (
        f"--resume_from_checkpoint {shlex.quote(str(earlier[max(earlier)]))}"
        if earlier
        else "--overwrite_output_dir true to train again"
    )
    raise UserError(
        f"--resume_from_checkpoint {checkpoint}: expected the best checkpoint so far, {best}, but {wrong}. Restore it, or type {again}."
    )


def check_same_batches(checkpoint: Path, args: TrainingArguments) -> None:
    """Raises `UserError` if the run that left a checkpoint had another number of images per step than `args` gives.

    The number of processes may differ: the order of the images and every draw depend on the step's size alone. Only the
    random numbers of dropout differ.
    """
    # Each process left its random state, on its own machine.
    left = {path.name for path in checkpoint.glob("rng_state*.pth")}
    processes = len(left)
    complete = left == {"rng_state.pth"} or left == {f"rng_state_{i}.pth" for i in range(processes)}
    batch = read_json(checkpoint / STATE_FILE, TrainingState)["train_batch_size"]
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
    """Deletes the oldest checkpoints of a run until `limit` are left. The one of `step`, just saved, and the best one stay.

    Checkpoints beyond `step` come from a run that was resumed from an earlier one; they count as the oldest.
    """
    steps = _checkpoints(folder)
    oldest_first = sorted(steps, key=lambda n: (n <= step, n))
    stay = {n for n in steps if n == step or (best and steps[n].name == Path(best).name)}
    for n in [n for n in oldest_first if n not in stay][: max(0, len(steps) - max(limit, len(stay)))]:
        shutil.rmtree(steps[n], ignore_errors=True)


class TrainingCheckpoints:
    """The part of `MMFTTrainer` that saves, selects and resumes."""

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if self.state.global_step == 0 and self.args.load_best_model_at_end and self.state.best_metric is None:
            self._determine_best_metric(metrics, trial)
            # The stock code reads a best step of 0 as no best step.
            self.state.best_model_checkpoint = str(Path(self.args.output_dir) / "checkpoint-0")
            self._save_checkpoint(self.model_wrapped, trial)
        return metrics

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        if is_checkpoint(folder):
            state_dict = checkpoint_state(model, state_dict) if lora_layers(model) else state_dict
            # save_pretrained gives some weights (of ViT and AltCLIP) the names of older versions. The stock Trainer reads a
            # checkpoint by today's names, and would skip the others with a warning.
            model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        else:
            state_dict = plain_state(model, state_dict)
        try:
            if is_checkpoint(folder):
                self._save_files(folder, state_dict)
            else:
                with atomic_folder(folder) as new:
                    self._save_files(new, state_dict)
        finally:
            vars(model).pop("save_pretrained", None)

    def _save_files(self, folder: Path, state_dict: dict) -> None:
        super()._save(str(folder), state_dict)
        # A pickle that nothing reads, with all settings of this machine in it.
        (folder / "training_args.bin").unlink(missing_ok=True)

    def _expect_finite_losses(self, but: int = 0) -> None:
        """Checks the losses of the last steps, except the newest `but`."""
        while len(self._unseen_losses) > but:
            step, loss, arrived = self._unseen_losses.pop(0)
            if arrived is not None:
                arrived.synchronize()
            if not torch.isfinite(loss):
                self.stop_at("the loss", loss.item(), step)

    def stop_at(self, what: str, value: float, step: int) -> None:
        """Raises the error of a number that is not finite. No checkpoint is saved after such an evaluation."""
        checkpoint = last_complete_checkpoint(self.args.output_dir)
        good = "good " if self.args.eval_strategy != "no" else ""  # without evaluations, it was never checked
        kept = f"The last {good}checkpoint is {checkpoint}." if checkpoint else "There is no checkpoint yet."
        raise NotFinite(
            f"{what} became {value} at step {step} (epoch {self.state.epoch or 0:.2f}). {kept} Type a smaller "
            "--learning_rate, or --max_grad_norm 1.0, with a new --output_dir."
        )

    def _issue_warnings_after_load(self, load_result):
        if not lora_layers(self.model):
            super()._issue_warnings_after_load(load_result)

    def _save_checkpoint(self, *args, **kwargs):
        self._expect_finite_losses()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:  # until the new one is whole, no older one of this name counts as complete
            (folder / STATE_FILE).unlink(missing_ok=True)
            (folder / CHECKSUMS_FILE).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(*args, **kwargs)
        except Exception as error:
            if self.args.should_save and no_room(error):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            write_checksums(folder)
            widen_permissions(folder)
        if self.args.should_save and limit:
            rotate(Path(self.args.output_dir), limit, self.state.global_step, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint, *args, **kwargs):
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
        self.forget_prototypes()

    def _load_optimizer_and_scheduler(self, checkpoint):
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        self.forget_prototypes()

    def _init_training_state(self, *args, **kwargs):
        with reading(kwargs.get("resume_from_checkpoint", args[3] if len(args) > 3 else None)):
            result = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step is not None and self.state.best_metric is not None:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            if best.is_dir():
                self.state.best_model_checkpoint = str(best)
        return result

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Trains, or continues from a checkpoint; the result is the same, bit for bit on a CPU with the same number of threads.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the last complete one of `args.output_dir`.
                Incomplete checkpoints are skipped; without a complete one, training starts from the beginning.

        Raises:
            UserError: the checkpoint is incomplete or belongs to another model; a loss is not finite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                logger.warning(
                    "There is no complete checkpoint in %s: training starts from the beginning.", self.args.output_dir
                )
        elif resume_from_checkpoint and (wrong := _unusable(Path(resume_from_checkpoint))):
            found = last_whole_checkpoint(self.args.output_dir, but=Path(resume_from_checkpoint))
            raise UserError(
                f"--resume_from_checkpoint {resume_from_checkpoint}: expected a complete checkpoint of this Trainer, but {wrong}"
                + (
                    f". Type --resume_from_checkpoint {shlex.quote(found)}."
                    if found
                    else "; there is none in the output folder."
                )
            )
        model = self.accelerator.unwrap_model(self.model)
        if resume_from_checkpoint:
            check_same_model(Path(resume_from_checkpoint), model)
            check_same_batches(Path(resume_from_checkpoint), self.args)
            check_best(Path(resume_from_checkpoint), self.args)
        with quick_attention(model, self.args.bf16):
            result = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        self._expect_finite_losses()  # of the last step, where nothing was evaluated or saved after it
        return result
