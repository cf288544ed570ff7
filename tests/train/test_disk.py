"""Disks that take no more, two runs in one folder, moved data, permissions: what `finetune` keeps and says."""

import errno
import json
import os
import re
import resource
import shlex
import shutil
import stat

import pytest
import torch
from processes import run_python
from safetensors.torch import load_file
from transformers import TrainerCallback

import mmft_hf
from mmft_hf.cli import main
from mmft_hf.core.errors import PartialResult, UserError
from mmft_hf.core.files import LOCK_FILE
from mmft_hf.core.launch import alone_in
from mmft_hf.train import run_folder
from mmft_hf.train.checkpoints import is_complete
from mmft_hf.train.trainer import MMFTTrainer

SETTINGS = {
    "num_train_epochs": 3,
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 8,
    "use_cpu": "true",
    "disable_tqdm": "true",
    "save_total_limit": 1,
}
SLOW = pytest.mark.slow
FINAL = {
    "model.safetensors",
    "config.json",
    "head.safetensors",
    "all_results.json",
    "README.md",
    "predictions_test.parquet",
}


def words(clip_folder, data_folder, out, **more) -> list[str]:
    given = {"model_name_or_path": clip_folder, "dataset_name": data_folder, "output_dir": out} | SETTINGS | more
    return ["finetune", *(word for key, value in given.items() for word in (f"--{key}", str(value)))]


@pytest.fixture
def room():
    """Sets the size that no file may exceed, as a quota would; real writes fail then, in every library."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size=None):
        resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))

    yield limit
    limit()


@pytest.fixture
def at_step(monkeypatch):
    """Calls a function once when a training of this process has done a step; -1: when it ends."""

    def plan(step, function):
        class At(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == step:
                    function()

            def on_train_end(self, args, state, control, **kwargs):
                if step == -1:
                    function()

        stock = MMFTTrainer.__init__

        def init(self, *args, **kwargs):
            stock(self, *args, **kwargs)
            self.add_callback(At())

        monkeypatch.setattr(MMFTTrainer, "__init__", init)

    return plan


@pytest.fixture(scope="module")
def straight(clip_folder, data_folder, tmp_path_factory):
    """The run as it ends without any interruption."""
    out = tmp_path_factory.mktemp("straight") / "out"
    assert main(words(clip_folder, data_folder, out)) == 0
    return out


def typed(err: str) -> list[str]:
    """The command that a message says to type, as a shell reads it."""
    return shlex.split(re.search(r"To continue, type: mmft-hf (.*)", err)[1])


def same(a, b) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def left_over(folder) -> list[str]:
    return [
        str(path) for path in folder.rglob("*") if path.name.endswith((".tmp", ".lock")) or path.name.startswith("tmp")
    ]


@pytest.mark.parametrize(
    "size", [pytest.param(60_000, id="the weights"), pytest.param(300_000, id="the optimizer", marks=SLOW)]
)
def test_a_checkpoint_that_does_not_fit(
    straight, clip_folder, data_folder, tmp_path, room, at_step, monkeypatch, capsys, size
):
    out = tmp_path / "my run"
    weights, optimizer = (
        os.path.getsize(next(straight.glob(f"checkpoint-*/{n}"))) for n in ("model.safetensors", "optimizer.pt")
    )
    assert 60_000 < weights < 300_000 < optimizer
    at_step(4, lambda: room(size))
    assert main(words(clip_folder, data_folder, out)) == 3
    room()
    err = capsys.readouterr().err
    assert f"The last complete checkpoint is {out / 'checkpoint-3'}. Make room." in err and "Traceback" not in err
    assert is_complete(out / "checkpoint-3") and not (out / "checkpoint-6").exists() and not left_over(out)
    assert not FINAL & set(os.listdir(out)) and json.loads((out / "mmft.json").read_text())["completed"] is False
    monkeypatch.undo()
    assert typed(err)[-2:] == ["--resume_from_checkpoint", "true"]
    assert main(typed(err)) == 0
    assert same(straight, out) and {*os.listdir(straight)} == {*os.listdir(out)}


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "what", ["weights", *(pytest.param(name, marks=SLOW) for name in ("predictions", "figure", "card", "record"))]
)
def test_final_files_that_do_not_fit(clip_folder, data_folder, tmp_path, room, at_step, monkeypatch, capsys, what):
    """All of them are there, or none."""
    out = tmp_path / "out"
    if what == "weights":
        at_step(-1, lambda: room(60_000))
    elif what == "predictions":
        monkeypatch.setattr("datasets.Dataset.to_parquet", full)
    elif what == "figure":
        monkeypatch.setattr(run_folder.figures, "draw_curves", full)
    elif what == "card":
        monkeypatch.setattr(run_folder.cards, "write_model_card", full)
    else:
        stock = run_folder.files.write_json

        def write_json(path, *args, **kwargs):
            full() if path.name == "mmft.json" and path.parent != out else stock(path, *args, **kwargs)

        monkeypatch.setattr(run_folder.files, "write_json", write_json)
    assert main(words(clip_folder, data_folder, out, num_train_epochs=1)) == 3
    room()
    err = capsys.readouterr().err
    assert "Make room. To continue, type: mmft-hf finetune" in err and "Traceback" not in err
    assert not FINAL & set(os.listdir(out)) and not left_over(out)
    assert any(is_complete(folder) for folder in out.glob("checkpoint-*"))
    if what == "record":
        monkeypatch.undo()
        assert main(typed(err)) == 0 and {*os.listdir(out)} > FINAL


def test_nothing_begun_is_an_error_of_the_user(clip_folder, data_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_folder.files, "write_json", full)
    assert main(words(clip_folder, data_folder, tmp_path / "new" / "out")) == 2
    err = capsys.readouterr().err
    assert "expected a place to write to, found: No space left on device" in err and "Traceback" not in err


def test_a_finished_run_that_cannot_be_overwritten_stays(straight, clip_folder, data_folder, monkeypatch, capsys):
    make, before = os.mkdir, sorted(str(path) for path in straight.rglob("*"))

    def mkdir(path, *args, **kwargs):  # as the system answers those who are not root
        if os.path.dirname(path) == str(straight):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return make(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert main(words(clip_folder, data_folder, straight, overwrite_output_dir="true")) == 2
    err = capsys.readouterr().err
    assert f"{straight}: Permission denied. Type another path" in err and "To continue" not in err
    assert sorted(str(path) for path in straight.rglob("*")) == before


def test_python_gets_the_same_message(clip_folder, data_folder, tmp_path, room, at_step):
    at_step(4, lambda: room(60_000))
    given = {key: value == "true" if value in ("true", "false") else value for key, value in SETTINGS.items()}
    epochs = given.pop("num_train_epochs")
    with pytest.raises(PartialResult, match=r"The last complete checkpoint is .*checkpoint-3\. Make room") as caught:
        mmft_hf.finetune(str(data_folder), clip_folder, tmp_path / "out", epochs, **given)
    assert caught.value.again


@SLOW
def test_a_checkpoint_that_is_written_again_is_not_complete_until_it_is_whole(
    straight, clip_folder, data_folder, tmp_path, room, at_step, capsys
):
    """After a resume from an earlier step, the later checkpoint is there already."""
    out = tmp_path / "out"
    every = words(clip_folder, data_folder, out, save_total_limit=9)
    assert main(every) == 0
    shutil.copytree(out / "checkpoint-6", out / "checkpoint-9", dirs_exist_ok=True)
    at_step(8, lambda: room(300_000))
    record = json.loads((out / "mmft.json").read_text())
    (out / "mmft.json").write_text(json.dumps(record | {"completed": False}))
    assert main([*every, "--resume_from_checkpoint", str(out / "checkpoint-6")]) == 3
    room()
    assert f"The last complete checkpoint is {out / 'checkpoint-6'}." in capsys.readouterr().err
    assert not (out / "checkpoint-9").exists()


# -- two runs -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("more", [{}, {"resume_from_checkpoint": "true"}, {"overwrite_output_dir": "true"}])
def test_a_second_run_is_refused(clip_folder, data_folder, tmp_path, capsys, more):
    out = tmp_path / "out"
    with alone_in(out):
        (out / "mmft.json").write_text("what the first one wrote")
        assert main(words(clip_folder, data_folder, out, **more)) == 2
        assert sorted(os.listdir(out)) == [LOCK_FILE, "mmft.json"]  # it has lost nothing, not even its lock
        with pytest.raises(UserError, match="found one at work here"), alone_in(out):
            pass
    err = capsys.readouterr().err
    assert f"--output_dir {out}: expected no other run, found one at work here (process {os.getpid()} on " in err
    assert "type another --output_dir" in err and "Traceback" not in err and os.listdir(out) == ["mmft.json"]


@SLOW
def test_a_second_process_is_refused_while_the_first_one_trains(clip_folder, data_folder, tmp_path, at_step):
    out, seen = tmp_path / "out", []
    first = words(clip_folder, data_folder, out, num_train_epochs=1)

    def second():
        for more in ([], ["--resume_from_checkpoint", "true"], ["--overwrite_output_dir", "true"]):
            seen.append(run_python(["-m", "mmft_hf", *first, *more], 2)[1])

    at_step(2, second)
    assert main(first) == 0 and len(seen) == 3
    assert all(f"(process {os.getpid()} on " in err and "Traceback" not in err for err in seen)


def test_a_lock_ends_with_its_process_and_a_refused_run_leaves_no_folder(clip_folder, data_folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / LOCK_FILE).write_text("process 1 on a machine that was switched off\n")
    (out / f".{32 * 'a'}.tmp").mkdir()  # of a process that was killed while writing
    assert main(words(clip_folder, data_folder, out, num_train_epochs=1)) == 0
    assert not left_over(out)
    assert main(words(clip_folder, data_folder, tmp_path / "a" / "b", learning_rate=-1)) == 2
    assert main(words(clip_folder, tmp_path / "no data", tmp_path / "a" / "b")) == 2
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_computed(
    clip_folder, data_folder, tmp_path, capsys, monkeypatch
):
    out, make = tmp_path / "read-only" / "out", os.mkdir
    out.parent.mkdir()

    def mkdir(path, *args, **kwargs):  # as the system answers those who are not root
        if os.fspath(path) == str(out):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return make(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert main(words(clip_folder, data_folder, out)) == 2
    printed = capsys.readouterr()
    assert f"{out}: Permission denied. Type another path" in printed.err and "Traceback" not in printed.err
    assert "zero-shot" not in printed.out


# -- moved data -----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_resume_survives_other_words_for_the_same_places(
    straight, clip_folder, data_folder, tmp_path, at_step, monkeypatch
):
    data, model, out = tmp_path / "data", tmp_path / "clip", tmp_path / "out"
    shutil.copytree(data_folder, data)
    shutil.copytree(clip_folder, model)

    def stop():
        raise KeyboardInterrupt

    at_step(5, stop)
    assert main(words(model, data, out)) == 3
    monkeypatch.undo()
    moved = tmp_path / "elsewhere" / "other name"
    moved.parent.mkdir()
    data.rename(moved)
    monkeypatch.chdir(tmp_path)
    again = words("./clip/", f"{moved}/", "out/", resume_from_checkpoint="out/checkpoint-3/")
    assert main(again) == 0 and same(straight, out)
    assert (
        main(words(model, os.path.relpath(moved), out, resume_from_checkpoint="true")) == 0
    )  # "already holds this run"


@SLOW
def test_a_resume_on_other_data_is_refused(clip_folder, data_folder, tmp_path, at_step, capsys):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data_folder, data)
    assert main(words(clip_folder, data, out, num_train_epochs=1)) == 0
    shutil.copy(data / "test.parquet", data / "validation.parquet")
    assert main(words(clip_folder, data, out, num_train_epochs=1, resume_from_checkpoint="true")) == 2
    assert "dataset_fingerprint was" in capsys.readouterr().err


# -- permissions ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mask", [0o022, 0o077, pytest.param(0o002, marks=SLOW)])
def test_files_are_as_readable_as_the_umask_says(clip_folder, data_folder, tmp_path, mask):
    before = os.umask(mask)
    try:
        out = tmp_path / "out"
        more = {"num_train_epochs": 1, "text_tower": "lora", "vision_tower": "lora", "weight_averaging": 0.5}
        assert main(words(clip_folder, data_folder, out, **more)) == 0
        saved = mmft_hf.ImageClassifier.from_pretrained(out)
        saved.save_pretrained(tmp_path / "again")
    finally:
        os.umask(before)
    files = [*out.rglob("*"), *(tmp_path / "again").rglob("*")]
    assert {"model.safetensors", "optimizer.pt", "adapter_model.safetensors", "mmft.json"} <= {
        path.name for path in files
    }
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in files}
    assert found == {path.name: (0o777 if path.is_dir() else 0o666) & ~mask for path in files}


# -- weights in several files -----------------------------------------------------------------------------------------------
def test_new_weights_replace_old_ones_however_they_were_divided(clip, tmp_path):
    model, processor = clip
    head = mmft_hf.ClassPrototypes.from_templates(model, processor, ["red", "green"], "a photo of a {}")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("old")
    (tmp_path / "notes.txt").write_text("of the user")
    mmft_hf.ImageClassifier(model, processor, head).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir() if "model" in path.name or path.suffix == ".txt"}
    assert names == {"model.safetensors", "notes.txt"}
