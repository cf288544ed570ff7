"""A benchmark on a disk that takes no more, and a second benchmark in its folder."""

import errno
import os
import re
import resource
import shlex
import stat

import pytest
from benchmark_tools import command

from mmft_hf.benchmark.run import grid, workflow
from mmft_hf.benchmark.run.results import RESULTS_FILE, append_row, read_results
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.core.files import LOCK_FILE, Lock

CELLS = ("--methods", "zs", "lp", "gda", "--shots", 2, "--seeds", 0)


@pytest.fixture(scope="module")
def run(clip_folder, data_folder, tmp_path_factory):
    """A finished benchmark, all of whose files are readable by others."""
    out, before = tmp_path_factory.mktemp("benchmark") / "out", os.umask(0o022)
    assert main(command(clip_folder, data_folder, out, *CELLS)) == 0
    os.umask(before)
    return out


def test_files_are_as_readable_as_the_umask_says(run):
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in run.rglob("*") if path.is_file()}
    assert {"report.html", "results.jsonl", "data.json"} <= modes.keys()
    assert set(modes.values()) == {"0o644"}, modes


def test_half_a_row_is_removed(tmp_path):
    """A limit on the size of files stops the write in the middle of a line."""
    path, before = tmp_path / RESULTS_FILE, resource.getrlimit(resource.RLIMIT_FSIZE)
    append_row(path, {"first": 1})
    whole = path.read_bytes()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 40, before[1]))
        with pytest.raises(OSError) as caught:
            append_row(path, {"second": "x" * 200})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG and path.read_bytes() == whole


@pytest.mark.parametrize("where", ["row", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cell", "report"))])
def test_a_full_disk_is_no_failure_of_a_method(run, clip_folder, data_folder, tmp_path, monkeypatch, capsys, where):
    out, calls = tmp_path / "out 1", []
    module, name = {
        "cell": (grid, "fit"),  # such as a checkpoint that does not fit
        "row": (grid, "append_row"),
        "report": (workflow, "write_report"),
    }[where]
    stock = getattr(module, name)

    def until_full(*args, **kwargs):
        calls.append(1)
        if len(calls) == (1 if where == "report" else 2):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return stock(*args, **kwargs)

    monkeypatch.setattr(module, name, until_full)
    assert main([*command(clip_folder, data_folder, "-", *CELLS), "--output_dir", str(out)]) == 3  # the last one counts
    err = capsys.readouterr().err
    kept = "3 results" if where == "report" else "1 result"
    assert (
        f"No space left on device. {kept} in {out / RESULTS_FILE} stay. Make room. To continue, type: mmft-hf benchmark"
        in err
    )
    assert "Traceback" not in err and [row["status"] for row in read_results(out / RESULTS_FILE)] == ["done"] * int(
        kept[0]
    )
    monkeypatch.undo()
    assert main(shlex.split(re.search(r"To continue, type: mmft-hf (.*)", err)[1])) == 0
    accuracy = [
        {row["method"]: row["test_accuracy"] for row in read_results(folder / RESULTS_FILE)} for folder in (run, out)
    ]
    assert accuracy[0] == accuracy[1] and (out / "report.html").is_file()


def test_a_second_benchmark_with_other_settings_is_refused(run, clip_folder, data_folder, tmp_path, capsys):
    """The same command in a second terminal shares the work; see `test_benchmark.py`."""
    out = tmp_path / "out"
    out.mkdir()
    first = Lock(out / LOCK_FILE, out, "another identity")
    assert main(command(clip_folder, data_folder, out, *CELLS)) == 2
    first.release()
    err = capsys.readouterr().err
    assert (
        f"--output_dir {out}: expected no other run with other settings, found one at work here (process {os.getpid()} on"
        in err
    )
    assert os.listdir(out) == [LOCK_FILE]


def test_those_who_share_a_lock_work_together(tmp_path):
    path = tmp_path / LOCK_FILE
    one, two = Lock(path, tmp_path, "a"), Lock(path, tmp_path, "a")
    for other in (None, "b"):
        with pytest.raises(UserError, match="found one at work here"):
            Lock(path, tmp_path, other)
    one.release(remove=True)
    assert path.exists()  # the other one holds it
    with pytest.raises(UserError, match="found one at work here"):
        Lock(path, tmp_path)
    two.release(remove=True)
    assert not path.exists()
    Lock(path, tmp_path).release(remove=True)
