"""A captioned folder on a disk that takes no more, its permissions, and data that were moved."""

import errno
import json
import os
import stat

import pyarrow.parquet as pq
import pytest
from tiny_clip import colour_dataset

from mmft_hf.captioning.write import output_folder
from mmft_hf.cli import main


def words(data, out, *more) -> list[str]:
    return ["caption", "--captioner", "template", "--dataset_name", str(data), "--output_dir", str(out), *more]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    colour_dataset(2).to_parquet(tmp_path / "data" / "train.parquet")
    return tmp_path / "data"


def content(folder) -> dict:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["_write_shards", "write_json"])
def test_the_earlier_captions_stay(data, tmp_path, monkeypatch, capsys, what):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "out"
    monkeypatch.setattr(output_folder, what, full)
    assert main(words(data, out)) == 2  # nothing was begun
    assert "No space left on device" in capsys.readouterr().err and not content(out)
    monkeypatch.undo()
    assert main(words(data, out)) == 0
    before = content(out)
    monkeypatch.setattr(output_folder, what, full)
    other = words(data, out, "--class_template", "a drawing of a {}.", "--overwrite_output_dir", "true")
    assert main(other) == 3
    err = capsys.readouterr().err
    assert (
        f"{out} has its earlier captions. Make room. To continue, type: mmft-hf caption" in err
        and "Traceback" not in err
    )
    assert content(out) == before
    monkeypatch.undo()
    assert main(other) == 0 and content(out) != before


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_are_as_readable_as_the_umask_says(data, tmp_path, mask):
    before = os.umask(mask)
    try:
        assert main(words(data, tmp_path / "out")) == 0
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"captions.json", "captions.html", "README.md"} <= modes.keys() and set(modes.values()) == {0o666 & ~mask}, (
        modes
    )


def test_captioning_continues_after_its_data_were_moved(data, tmp_path, capsys):
    out = tmp_path / "out"

    def name() -> str:
        return json.loads((out / "captions.json").read_text())["made_from"]["dataset_name"]

    assert main(words(data, out)) == 0 and name() == "data"
    captions = pq.read_table(out / "data").column("captions")
    (tmp_path / "disk").mkdir()
    moved = data.rename(tmp_path / "disk" / "pets")
    assert main(words(moved, out)) == 0 and name() == "pets"
    assert "pets" in (out / "README.md").read_text()
    assert pq.read_table(out / "data").column("captions").equals(captions)

    colour_dataset(3).to_parquet(moved / "train.parquet")  # it has grown
    assert main(words(moved.rename(tmp_path / "more"), out)) == 0 and name() == "more"

    (tmp_path / "other").mkdir()
    colour_dataset(2).to_parquet(
        tmp_path / "other" / "train.parquet"
    )  # some pictures that were captioned are not in it
    before = content(out)
    assert main(words(tmp_path / "other", out)) == 2
    assert "dataset_name more there, other here" in capsys.readouterr().err and content(out) == before
