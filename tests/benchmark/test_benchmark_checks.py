"""Checks and notes before the first cell of a benchmark, and `--overwrite_output_dir`."""

import json
import re
import shlex
from types import SimpleNamespace

import pytest
from benchmark_tools import command, parts_of, some_splits, with_bad_picture
from tiny_clip import COLOURS, colour_dataset

from mmft_hf.benchmark.run import workflow
from mmft_hf.benchmark.run.data_checks import notes_on, refuse_unreadable, runnable, unreadable
from mmft_hf.benchmark.run.grid import Grid
from mmft_hf.benchmark.run.processes import Claims
from mmft_hf.benchmark.run.protocol import Cell, make_task
from mmft_hf.benchmark.run.results import RESULTS_FILE, append_row, read_results
from mmft_hf.cli import main
from mmft_hf.commands import caption
from mmft_hf.commands.parser import parse
from mmft_hf.core.errors import UserError
from mmft_hf.data.splits import labels_of, text_columns


# -- pictures ------------------------------------------------------------------------------------------------------------
def test_pictures_that_cannot_be_read_cost_no_cell_and_bind_nothing(clip_folder, tmp_path, capsys):
    bad = parts_of(
        tmp_path / "bad", train=with_bad_picture(colour_dataset(8), 3), test=with_bad_picture(colour_dataset(6, 2), 7)
    )
    out, words = tmp_path / "out", ("--methods", "lp", "--shots", "full", "--seeds", 0)
    assert main(command(clip_folder, bad, out, *words)) == 2
    expected = "expected pictures that can be read, found 2 that cannot: row 3 of train, row 7 of test. Repair or remove them, or type --on_bad_image skip"
    assert expected in capsys.readouterr().err and not (out / RESULTS_FILE).exists()
    # As an older version left it, after every cell had failed at them.
    append_row(
        out / RESULTS_FILE,
        {
            "method": "lp",
            "shots": "full",
            "seed": 0,
            "status": "failed",
            "error": "x",
            "identity": {"dataset_fingerprint": "0a1b"},
        },
    )
    assert main(command(clip_folder, parts_of(tmp_path / "mended"), out, *words)) == 0
    printed = capsys.readouterr().out
    assert "cell failed" not in printed and f"Report: {out / 'report.html'}" in printed
    assert [row["status"] for row in read_results(out / RESULTS_FILE)] == ["done"]
    assert json.loads((out / "data.json").read_text())["pictures_read_for"] == ["full shots, seed 0"]


def test_only_training_pictures_that_are_used_are_read():
    splits = some_splits()
    splits.train = splits.train.add_column("source_row", range(24))
    used = make_task(splits, 2, 0)[1]["train"]
    free = next(row for row in range(24) if row not in used)
    judged = {"test": splits.test, "far": splits.test}
    refuse_unreadable(
        SimpleNamespace(**vars(splits) | {"train": with_bad_picture(splits.train, free)}),
        judged,
        [Cell("lp", 2, 0)],
        False,
    )
    for part, row in (("train", used[0]), ("validation", 2)):
        broken = SimpleNamespace(**vars(splits) | {part: with_bad_picture(getattr(splits, part), row)})
        with pytest.raises(
            UserError, match=f"found 1 that cannot: row {row} of {part}. Repair or remove it, or type on_bad"
        ):
            refuse_unreadable(broken, judged, [Cell("lp", 2, 0)], False)
    far = splits.test
    for row in range(9):
        far = with_bad_picture(far, row)
    with pytest.raises(UserError, match=r"found 9 that cannot: row 0 of far, .* row 7 of far, …\. Repair"):
        refuse_unreadable(splits, judged | {"far": far}, [Cell("zs", 0, 0)], False)


def test_notes_on_missing_images():
    splits = some_splits(train=colour_dataset(8).select(range(22)))
    splits.notes = ["There are no captions: training uses the class template alone.", "Held out."]
    test = with_bad_picture(splits.test, 4)
    far = splits.test.select([0, 1, 3, 4])
    summary = {"class_names": list(COLOURS), "train_images_per_class": [8, 7, 7], "duplicates_count": 0}
    summary["labels"] = {"test": labels_of(test).tolist(), "far": labels_of(far).tolist()}
    summary |= {
        "two_labels": [{"labels": ["red thing", "blue thing"], "images": ["row 1", "row 2"]}],
        "two_labels_count": 3,
    }
    found = notes_on(splits, summary, [16, 0, 8, "full", 7], {"test": unreadable("test", test), "far": []})
    assert found == [
        "Held out.",
        "8 shots: 2 of 3 classes have fewer training images (7); all of them are taken.",
        "16 shots: 3 of 3 classes have fewer training images (7 to 8); all of them are taken.",
        "1 of 3 classes has no far image: blue thing. Accuracy is over the other classes.",
        "1 of 18 test images cannot be read and are not counted: row 4 of test.",
        "Identical pictures with different labels: 3 pictures, such as row 1 (red thing) and row 2 (blue thing). At most one of "
        "the labels is right.",
    ]


# -- captions ------------------------------------------------------------------------------------------------------------
def test_without_captions_methods_that_need_them_are_left_out_and_the_others_run(clip_folder, tmp_path, capsys):
    parts = {
        name: colour_dataset(n, seed, captions=False)
        for seed, (name, n) in enumerate((("train", 4), ("validation", 2), ("test", 3)))
    }
    data, out = parts_of(tmp_path / "my data", **parts), tmp_path / "out"
    words = ["--shots", 9, "--seeds", 0, "--allow_fewer", "true"]
    arguments = command(clip_folder, "D", out, "--methods", "zs-cap", "mmft", "lp", *words)
    arguments[arguments.index("D")] = str(data)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    (note,) = re.findall(r"  Note: (Left out.*)", printed)
    assert note.startswith(
        "Left out, because the training images have no captions: zs-cap, mmft. To write them, type: mmft-hf "
    )
    assert "Comparing 1 method on" in printed and "training uses the class template" not in printed
    assert "Note: 9 shots: 3 of 3 classes have fewer training images (4); all of them are taken." in printed
    assert [row["method"] for row in read_results(out / RESULTS_FILE)] == ["lp"]
    typed = shlex.split(re.search(r"mmft-hf caption (.*?) \(", note)[1])
    assert parse("caption", caption, typed)[0].dataset_name == str(data)
    arguments[arguments.index("lp")] = "mmft+wise"
    assert main(arguments) == 2
    assert (
        "--methods zs-cap mmft mmft+wise: expected captions of the training images, found none. To write"
        in capsys.readouterr().err
    )


def test_texts_that_could_be_captions_are_named():
    texts = colour_dataset(2).rename_column("captions", "texts")
    splits = SimpleNamespace(train=texts, has_captions=False)
    assert text_columns(texts) == ["texts"]
    left, (note,) = runnable(["mmft", "lp", "mmft"], splits, "D")
    assert left == ["lp"] and "no captions: mmft. It has texts in texts: type --captions_column texts to" in note
    assert runnable(["zs", "mmft-no-captions"], splits, "D") == (["zs", "mmft-no-captions"], [])


# -- --overwrite_output_dir ------------------------------------------------------------------------------------------------
def test_overwriting_deletes_the_files_of_a_benchmark_and_no_others(
    clip_folder, data_folder, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    again = ("--overwrite_output_dir", "true", "--methods", "lp", "--seeds", 0, "--shots")
    assert main(command(clip_folder, data_folder, out, *again, 1)) == 0
    mine = [out / "mine.txt", out / "report" / "mine.png", out / "subsets" / "mine.json"]
    for path in (*mine, out / "maps.json", out / "report" / "map.png"):  # the last two as version 0.1 left them
        path.write_text("mine")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()

    def refused(*more) -> str:
        assert main(command(clip_folder, data_folder, out, *again, *more)) == 2
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        return capsys.readouterr().err

    assert "--shots 9: expected this many training images" in refused(9)  # what cannot be run deletes nothing
    with Claims(out / "claims").take("lp 1 shots seed 0"):
        assert "expected one process at" in refused(2)
    with monkeypatch.context() as patch:
        patch.setattr(workflow, "count_of_processes", lambda: 8)
        assert "found 8, which would delete each other's results" in refused(2)
    with monkeypatch.context() as patch:
        patch.setattr(Grid, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(command(clip_folder, data_folder, out, *again, 2)) == 3
    assert "To continue, type: mmft-hf benchmark" in (printed := capsys.readouterr().err)
    assert printed.rstrip().endswith("--overwrite_output_dir false")  # what is typed then must not delete
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert left == {"data.json", "mine.txt", "report/mine.png", "subsets/mine.json"}
    (out / RESULTS_FILE).write_text("no benchmark\n")
    assert main(command(clip_folder, data_folder, out, *again, 2)) == 2
    assert f"{RESULTS_FILE}, line 1: expected JSON" in capsys.readouterr().err and (out / RESULTS_FILE).exists()


def test_a_report_of_no_folder_names_the_one_that_was_typed(clip_folder, data_folder, tmp_path, capsys):
    words = command(clip_folder, data_folder, tmp_path / "results", "--report", "true")
    assert main(words) == 2
    assert f"Type mmft-hf benchmark --report {tmp_path / 'results'}" in capsys.readouterr().err
