"""Weights in a local folder: safetensors, a pickle, and index files that name the one or the other."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import mmft_hf
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError

SAYS = "--allow_pickle true"


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def folder(clip_folder, tmp_path):
    """The tiny CLIP without weights."""
    shutil.copytree(clip_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "model"


def state(clip_folder) -> dict[str, torch.Tensor]:
    return mmft_hf.load_model(clip_folder)[0].state_dict()


def shards(folder, tensors, suffix, index) -> None:
    """Two files of weights and their index."""
    names = sorted(tensors)
    halves = {f"part-{i}{suffix}": {n: tensors[n].contiguous() for n in names[i::2]} for i in range(2)}
    for file, half in halves.items():
        save_file(half, folder / file) if suffix == ".safetensors" else torch.save(half, folder / file)
    content = {"metadata": {}, "weight_map": {n: file for file, half in halves.items() for n in half}}
    (folder / index).write_text(json.dumps(content))


def same(model, tensors) -> bool:
    return all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("suffix", "index"),
    [
        (".bin", None),
        (".bin", "pytorch_model.bin.index.json"),
        (".bin", "model.safetensors.index.json"),
        (".safetensors", "model.safetensors.index.json"),
    ],
)
def test_pickles_are_read_only_where_that_is_allowed(folder, clip_folder, caplog, suffix, index):
    tensors = state(clip_folder)
    if index:
        shards(folder, tensors, suffix, index)
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    pickled = suffix == ".bin"
    if pickled:
        with pytest.raises(UserError, match="found only a pickle") as refused:
            mmft_hf.load_model(folder)
        assert "type allow_pickle true" in str(refused.value) and (index or "pytorch_model.bin") in str(refused.value)
    model, _ = mmft_hf.load_model(folder, allow_pickle=True)
    assert same(model, tensors) and model.mmft_weights.pickled is pickled
    assert ("read with weights_only=True" in caplog.text) is pickled
    assert model.name_or_path == str(folder)


def test_safetensors_come_before_a_pickle(folder, clip_folder, tmp_path):
    torch.save({"a": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    shutil.copy(clip_folder / "model.safetensors", folder)
    for allowed in (False, True):
        assert not mmft_hf.load_model(folder, allow_pickle=allowed)[0].mmft_weights.pickled
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["evil", "garbage", "no tensors", "empty"])
def test_a_pickle_of_something_else_is_refused_and_not_run(folder, tmp_path, content):
    path = folder / "pytorch_model.bin"
    if content == "evil":
        torch.save({"logit_scale": Evil(tmp_path / "ran")}, path)
    elif content == "no tensors":
        torch.save([1, "two"], path)
    else:
        path.write_bytes(b"garbage" if content == "garbage" else b"")
    with pytest.raises(UserError, match="expected a pickle of a model's tensors and nothing else"):
        mmft_hf.load_model(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected an object"),
        ("{", "expected JSON, found a damaged file"),
        ('{"weight_map": {"a": 3}}', "expected text, found 3"),
        ('{"weight_map": {}}', "expected the files of the weights, found none"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "expected file names in the same folder"),
        ('{"weight_map": {"a": "/tmp/other.safetensors"}}', "expected file names in the same folder"),
        ('{"weight_map": {"a": "missing.safetensors"}}', "found no such file"),
        ('{"weight_map": {"a": "x.safetensors", "b": "y.pkl"}}', "found only a pickle"),
    ],
)
def test_damaged_and_strange_index_files_are_refused(folder, content, message):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=message):
        mmft_hf.load_model(folder)


def test_no_weights_at_all(folder):
    with pytest.raises(UserError, match=r"expected model\.safetensors next to config\.json, found no weights"):
        mmft_hf.load_model(folder)


@pytest.mark.slow
def test_the_verbs_take_the_setting(folder, clip_folder, data_folder, tmp_path, capsys):
    torch.save(state(clip_folder), folder / "pytorch_model.bin")
    model, out = ["--model_name_or_path", str(folder)], tmp_path / "out"
    training = "--num_train_epochs 1 --per_device_train_batch_size 8 --use_cpu true --disable_tqdm true".split()
    words = ["finetune", *model, "--dataset_name", str(data_folder), "--output_dir", str(out), *training]
    assert main(words) == 2 and SAYS in capsys.readouterr().err and not out.exists()
    assert main([*words, "--allow_pickle", "true"]) == 0
    assert json.loads((out / "mmft.json").read_text())["base_model_weights"]["pickled"] is True
    assert "read from a pickle, with `weights_only=True`" in (out / "README.md").read_text()
    assert (out / "model.safetensors").is_file()

    evaluate = ["evaluate", "--model_name_or_path", str(out), "--dataset_name", str(data_folder)]
    capsys.readouterr()
    assert main(evaluate) == 0
    printed = capsys.readouterr().out
    assert "no zero-shot baseline" in printed and SAYS in printed
    assert main([*evaluate, "--allow_pickle", "true"]) == 0
    assert "untuned" in capsys.readouterr().out

    for name in ("head.safetensors", "mmft.json"):
        shutil.copy(out / name, folder)
    picture = next(iter((out).glob("*.png")))
    assert main(["predict", str(picture), *model]) == 2 and SAYS in capsys.readouterr().err
    assert main(["predict", str(picture), *model, "--allow_pickle", "true"]) == 0
    assert "thing" in capsys.readouterr().out
    words = [
        "benchmark",
        *model,
        "--dataset_name",
        str(data_folder),
        "--output_dir",
        str(tmp_path / "grid"),
        "--use_cpu",
        "true",
    ]
    words += ["--methods", "zs", "--shots", "1", "--seeds", "0"]
    assert main(words) == 2 and SAYS in capsys.readouterr().err
    assert main([*words, "--allow_pickle", "true"]) == 0
