"""The grid of methods: what a cell may see, what is kept, and how a grid continues after an interruption or a failure."""

import dataclasses
import itertools
import json
import shutil
import threading
import time

import numpy as np
import pytest
from benchmark_tools import command, some_splits
from datasets import Image, List, Value
from launch_tools import ROOT
from processes import run_python, start
from tiny_clip import COLOURS, colour_dataset

from mmft_hf.baselines import linear
from mmft_hf.benchmark.report.table import summary_table
from mmft_hf.benchmark.run import grid
from mmft_hf.benchmark.run.context import Context
from mmft_hf.benchmark.run.grid import cells
from mmft_hf.benchmark.run.identity import revision_of
from mmft_hf.benchmark.run.inference import on_features
from mmft_hf.benchmark.run.methods import METHODS, weighs
from mmft_hf.benchmark.run.processes import count_of_processes, number_of_process, work_alone
from mmft_hf.benchmark.run.protocol import Cell, SealedTest, Task, make_task, parse_shots
from mmft_hf.benchmark.run.results import RESULTS_FILE, append_row, check_identity, read_results
from mmft_hf.benchmark.run.trainings import shuffled_captions
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.data.splits import labels_of
from mmft_hf.model.features import image_features


def without_digests(path) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "sha256"} for row in read_results(path)]


def numbers(folder) -> list[dict]:
    """The rows without times, in the order of their cells."""
    times = ("fit_seconds", "test_seconds", "time", "sha256")  # the digest of a row covers its times
    rows = [{k: v for k, v in row.items() if k not in times} for row in read_results(folder / RESULTS_FILE)]
    return sorted(rows, key=lambda row: (row["method"], row["shots"], row["seed"]))


SMALL = ("--methods", "zs", "zs-cap", "lp", "gda", "lp++", "flyp", "mmft+wise", "--shots", 2, "--seeds", 0, 1)


@pytest.fixture(scope="module")
def run(clip_folder, data_folder, tmp_path_factory):
    """A folder with the results of a small grid."""
    out = tmp_path_factory.mktemp("benchmark") / "out"
    assert main(command(clip_folder, data_folder, out, *SMALL)) == 0
    return out


def test_every_cell_is_a_row_with_what_it_depends_on(run):
    rows = read_results(run / RESULTS_FILE)
    assert [row["method"] for row in rows] == ["zs", *(["zs-cap", "lp", "gda", "lp++", "flyp", "mmft+wise"] * 2)]
    for row in rows:
        assert row["status"] == "done" and 0 <= row["test_accuracy"] <= 1 and row["test_images"] == 18
        assert row["identity"]["versions"]["mmft_hf"] and row["identity"]["settings"]["learning_rate"] == 0.001
    policies = {row["method"]: row["selection_policy"] for row in rows}
    assert policies["lp"] == policies["gda"] == "val-k" and policies["lp++"] == policies["flyp"] == "last"
    subset = json.loads((run / "subsets" / "shots-2_seed-1.json").read_text())
    assert len(subset["train"]["rows"]) == len(subset["train"]["images"]) == 6
    assert len(subset["validation"]["rows"]) == 6
    assert subset["train"] != json.loads((run / "subsets" / "shots-2_seed-0.json").read_text())["train"]


def test_the_report_is_there_and_is_drawn_again(run, capsys):
    page = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert main(["benchmark", "--report", str(run)]) == 0
    assert (run / "report.html").read_bytes() == page
    assert capsys.readouterr().out == f"Report: {run / 'report.html'}\n"


def test_a_second_run_changes_nothing_and_an_interrupted_one_ends_with_the_same_numbers(
    run, clip_folder, data_folder, tmp_path, capsys
):
    before = (run / RESULTS_FILE).read_text()
    assert main(command(clip_folder, data_folder, run, *SMALL)) == 0
    assert "13 of 13 cells are done already" in capsys.readouterr().out
    assert (run / RESULTS_FILE).read_text() == before
    lines = before.splitlines(keepends=True)
    out = tmp_path / "cut"
    out.mkdir()
    (out / RESULTS_FILE).write_text("".join(lines[:-2]) + lines[-2][:100])  # in the middle of a line
    assert main(command(clip_folder, data_folder, out, *SMALL)) == 0

    assert numbers(out) == numbers(run)


# -- several processes -------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_the_processes_of_a_launcher_share_the_cells(run, clip_folder, data_folder, tmp_path):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "recipes" / "benchmark.py"]
    printed, _ = run_python([*words, *command(clip_folder, data_folder, tmp_path / "out", *SMALL)[1:]])
    assert numbers(tmp_path / "out") == numbers(run)
    assert "No ± above counts the chance of the test images: with 18 of them" in printed
    assert printed.count("Comparing 7 methods") == printed.count("| method | selection |") == 1
    lines = [line.split() for line in printed.splitlines() if "  seed " in line]
    assert len(lines) == 13 and all(line[-1] == "s" and float(line[-2]) >= 0 for line in lines)
    assert {" ".join(line[2:-6]) for line in lines} == {"untuned", "2 shots"}


HANGS_AT_GDA = """
import sys, time
from mmft_hf.benchmark.run import grid
from mmft_hf.cli import main

fit = grid.fit

def hang(method, context, task):
    if method.name == "gda":
        print("at gda", flush=True)
        time.sleep(600)
    return fit(method, context, task)

grid.fit = hang
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_the_cells_of_a_killed_process_are_taken_over(run, clip_folder, data_folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = command(clip_folder, data_folder, out, *SMALL)
    other = start(["-c", HANGS_AT_GDA, *words])
    try:
        assert any("at gda" in line for line in other.stdout)
        seen = []

        def kill_when_all_else_is_done():
            while len(read_results(out / RESULTS_FILE)) < 12:
                time.sleep(0.1)
            time.sleep(1.5)  # longer than a look at what others have done
            seen.append(len(read_results(out / RESULTS_FILE)))
            other.kill()

        thread = threading.Thread(target=kill_when_all_else_is_done, daemon=True)
        thread.start()
        assert main(words) == 0
        thread.join()
    finally:
        other.kill()
        other.communicate()
    assert seen == [12]  # what a living process is at is left to it
    assert numbers(out) == numbers(run)
    assert main(words) == 0
    assert "13 of 13 cells are done already" in capsys.readouterr().out


def test_processes_of_a_launcher_are_alone_with_a_gpu_each():
    launched = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    launched |= {"TORCHELASTIC_RUN_ID": "x", "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"}
    for devices, own in (("4,7,9", "7"), ("GPU-1", "GPU-1"), ("", "")):  # three GPUs, fewer than processes, none
        environment = {**launched, "CUDA_VISIBLE_DEVICES": devices, "HOME": "/"}
        work_alone(environment)
        assert number_of_process() == 5 and count_of_processes() == 8
        assert environment == {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": own, "HOME": "/"}
    work_alone({"CUDA_VISIBLE_DEVICES": ""})
    assert number_of_process() == 0 and count_of_processes() == 1
    with pytest.raises(UserError, match=r"several processes but started one.*torchrun"):
        work_alone({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "a"})


# -- other results in the folder -----------------------------------------------------------------------------------------
def test_results_of_other_versions_are_not_mixed(run, clip_folder, data_folder, tmp_path, capsys):
    out = tmp_path / "out"
    for row in read_results(run / RESULTS_FILE):
        row["identity"]["versions"]["torch"] = "2.6.0"
        append_row(out / RESULTS_FILE, row)
    assert main(command(clip_folder, data_folder, out, *SMALL)) == 2
    printed = capsys.readouterr().err
    assert "expected results of the same versions, found others" in printed and "torch 2.6.0 there" in printed


def test_results_of_other_settings_are_not_mixed(run, clip_folder, data_folder, capsys):
    words = command(clip_folder, data_folder, run, *SMALL)
    words[words.index("--learning_rate") + 1] = "1e-4"
    assert main(words) == 2
    assert "expected results of the same settings, found others" in capsys.readouterr().err


def test_failures_with_other_data_are_ignored_and_results_are_not(tmp_path):
    """Pictures that were repaired are other data: all cells that failed at them must not stand in the way."""
    cell, path = Cell("lp", 2, 0), tmp_path / RESULTS_FILE
    row = {"method": "lp", "shots": 2, "seed": 0, "status": "failed", "identity": {"dataset_fingerprint": "0a1b"}}
    append_row(path, row)
    assert without_digests(path) == [row]
    found = a_grid([cell], some_splits(), tmp_path)
    assert found.open_cells() == [cell] and found.rows() == []
    now = row | {"identity": {}, "status": "done", "test_accuracy": 0.5, "selection_policy": "last"}
    append_row(path, now)
    append_row(path, row)
    assert found.open_cells() == [] and found.rows() == read_results(path) and without_digests(path) == [now]
    for identity, expected in (
        (
            {"dataset_fingerprint": "0a1b"},
            r"same dataset_fingerprint.*\(the pictures, labels or captions have changed since\)",
        ),
        (
            {"shift_splits": {"far": "1", "new": "2"}},
            r"\(shift_splits far there alone; shift_splits new there alone\)",
        ),
        ({"settings": {"max_grad_norm": 1.0}}, r"\(max_grad_norm 1.0 there, 0.0 here\)"),
    ):
        other = row | {"status": "done", "identity": {"shift_splits": {}, "settings": {}} | identity}
        with pytest.raises(UserError, match=expected + ".*Type another output_dir, or, to delete them, overwrite"):
            check_identity([other], {"shift_splits": {}, "settings": {}}, tmp_path)


def test_data_that_were_moved_are_the_same_data(run, clip_folder, data_folder, tmp_path, capsys):
    shutil.copytree(data_folder, tmp_path / "moved")
    assert main(command(clip_folder, tmp_path / "moved", run, *SMALL)) == 0
    assert "13 of 13 cells are done already" in capsys.readouterr().out


def test_settings_without_effect_are_refused(clip_folder, data_folder, tmp_path, capsys):
    assert main(command(clip_folder, data_folder, tmp_path / "out", "--vision_tower", "frozen")) == 2
    assert "--vision_tower: expected full, found frozen" in capsys.readouterr().err
    passed_over = [("push_to_hub", ["true"]), ("resume_from_checkpoint", ["checkpoint-3"]), ("shots", [0])]
    passed_over += [("data_seed", [0]), ("prototypes", ["template"]), ("prototypes", ["images"])]
    for name, values in (("learning_rates", [1e-4, 0]), ("min_steps", [-1]), ("seeds", [-1]), *passed_over):
        words = command(clip_folder, data_folder, tmp_path / "out", "--methods", "lp", f"--{name}", *values)
        assert main(words) == 2
        assert f"--{name}: expected" in capsys.readouterr().err
    assert main(command(clip_folder, data_folder, tmp_path / "out", "--methods", "lp", "mmtf")) == 2
    assert "--methods: found 'mmtf'. Did you mean 'mmft'? Expected one of zs, " in capsys.readouterr().err
    assert main(["benchmark", "--report", str(tmp_path / "out")]) == 2
    assert str(tmp_path / "out") in capsys.readouterr().err


def test_the_revision_of_a_folder_covers_the_files_of_the_model(clip_folder, tmp_path):
    def content(**changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(clip_folder, folder)
        for name, text in changes.items():
            (folder / name).write_text(text)
        return revision_of(str(folder), None)

    whole = content()
    more = {"README.md": "of", "all_results.json": "a run", "training_args.bin": "too"}
    assert whole == content(**more) and len(whole) == 16
    changed = [{name: "{}"} for name in ("config.json", "processor_config.json", "tokenizer.json", "model.safetensors")]
    changed += [{name: "{}"} for name in ("preprocessor_config.json", "merges.txt")]  # which were not there
    assert len({whole, *(content(**change) for change in changed)}) == 1 + len(changed)


def test_results_of_another_optimizer_are_not_mixed(run, clip_folder, data_folder, capsys):
    assert main(command(clip_folder, data_folder, run, *SMALL, "--max_grad_norm", 1.0)) == 2
    assert "expected results of the same settings, found others" in capsys.readouterr().err


class Watched:
    """A test split that says when it is touched."""

    def __init__(self, dataset, touched):
        self._dataset, self._touched = dataset, touched

    def __getattr__(self, name):
        self._touched.append(name)
        return getattr(self._dataset, name)

    def __len__(self):
        self._touched.append("len")
        return len(self._dataset)

    def __getitem__(self, key):
        self._touched.append("item")
        return self._dataset[key]


def a_context(clip_folder, tmp_path) -> Context:
    from mmft_hf import MMFTConfig

    config = MMFTConfig(str(tmp_path), max_steps=1, per_device_train_batch_size=6, use_cpu=True, disable_tqdm=True)
    return Context(str(clip_folder), None, config)


def a_grid(every, splits, folder, **more) -> grid.Grid:
    return grid.Grid(every, splits, folder, {}, say=lambda text: None, **more)


WITHOUT_SCORES = [name for name in METHODS if not weighs(name)]  # the captions of these images have none
FIRST_OF_EACH_FAMILY = list({method.family: method.name for method in reversed(METHODS.values())}.values())


@pytest.mark.parametrize(
    ("methods", "shots"),
    [
        pytest.param(FIRST_OF_EACH_FAMILY, 1, id="1"),
        pytest.param(WITHOUT_SCORES, 3, marks=pytest.mark.slow, id="3"),
        pytest.param(WITHOUT_SCORES, "full", marks=pytest.mark.slow, id="full"),
    ],
)
def test_no_method_can_read_the_test_split_before_it_is_judged(clip_folder, tmp_path, monkeypatch, methods, shots):
    touched, at_judgement = [], []
    splits = some_splits()
    splits.test = Watched(splits.test, touched)
    judge = SealedTest.judge

    def watched(self, cell, classifier):
        at_judgement.append((cell.method, list(touched)))
        opened = {name: getattr(split, "_dataset", split) for name, split in self._SealedTest__splits.items()}
        monkeypatch.setattr(self, "_SealedTest__splits", opened)
        return judge(self, cell, classifier)

    monkeypatch.setattr(SealedTest, "judge", watched)
    every = cells(methods, [shots], [0])
    shift = Watched(splits.train, touched)
    found = a_grid(every, splits, tmp_path, shifts={"shift": shift})
    assert touched == []
    rows = found.run(a_context(clip_folder, tmp_path))
    assert [row["status"] for row in rows] == ["done"] * len(methods)
    assert sorted(name for name, _ in at_judgement) == sorted(methods)
    assert all(seen == [] for _, seen in at_judgement)


def test_a_cell_is_judged_once():
    data = colour_dataset(2)
    sealed = SealedTest({"test": data, "shift": data}, list(COLOURS))
    right = np.eye(3)[labels_of(data)]
    found = sealed.judge(Cell("a", 1, 0), lambda dataset: right)
    assert found["test_accuracy"] == found["shift_accuracy"]["shift"] == 1
    assert found["predictions"] == {"test": labels_of(data).tolist(), "shift": labels_of(data).tolist()}
    with pytest.raises(ValueError, match="read once"):
        sealed.judge(Cell("a", 1, 0), lambda dataset: right)


def test_a_classifier_is_shown_pictures_and_no_answers(clip, tmp_path):
    data = colour_dataset(2).add_column("source_row", range(6)).add_column("image_id", [f"red {i}" for i in range(6)])
    splits, shown = {"test": data, "shift": data.select([5, 0, 1, 4])}, []

    def copies_labels(dataset):
        shown.append(dataset)
        return np.eye(3)[labels_of(dataset)]

    found = SealedTest(splits, list(COLOURS)).judge(Cell("a", 1, 0), copies_labels)
    assert (found["test_accuracy"], found["shift_accuracy"]["shift"]) == (2 / 6, 1 / 4)
    for seen, split in zip(shown, splits.values(), strict=True):
        assert seen.column_names == ["image", "source_row", "label"]
        assert seen.features["label"] == split.features["label"] and seen["source_row"][:] == split["source_row"][:]
        assert seen["image"][:] == split.cast_column("image", Image(decode=False))["image"][:]
    # The cache keeps no labels: whoever reads these pictures later gets their own.
    for dataset in (shown[0], data):
        _, labels = image_features(*clip, dataset, folder=tmp_path)
        assert len(list(tmp_path.iterdir())) == 1 and labels.tolist() == labels_of(dataset).tolist()


def test_a_cell_that_fails_is_kept_as_failed_and_the_grid_continues(
    clip_folder, data_folder, tmp_path, monkeypatch, capsys
):
    def not_numbers(train_x, train_y, test_x, **more):
        return np.full((len(test_x), 3), np.nan)

    with monkeypatch.context() as patch:
        broken = dataclasses.replace(METHODS["lp"], inference=on_features(not_numbers, texts=False))
        patch.setitem(METHODS, "lp", broken)
        words = command(
            clip_folder, data_folder, tmp_path / "out", "--methods", "lp", "zs-cap", "--shots", 2, "--seeds", 0
        )
        assert main(words) == 3
    printed = capsys.readouterr()
    assert "1 of 2 cells failed. To continue, type: mmft-hf benchmark" in printed.err
    assert "1 cell failed: lp, 2 shots, seed 0 (the scores are not finite)" in printed.out
    assert main(words) == 0  # only what failed is tried again
    rows = read_results(tmp_path / "out" / RESULTS_FILE)
    assert [(row["method"], row["status"]) for row in rows] == [("lp", "failed"), ("zs-cap", "done"), ("lp", "done")]


@pytest.mark.parametrize("blank", [None, [""], [None, " \n"]])
def test_methods_that_need_captions_fail_without_any(clip_folder, tmp_path, blank):
    train = colour_dataset(8, captions=False)
    if blank is not None:
        train = train.add_column("captions", [blank] * len(train), feature=List(Value("string")))
    context = a_context(clip_folder, tmp_path)
    rows = a_grid(cells(["zs-cap", "lp", "mmft"], [2], [0]), some_splits(train=train), tmp_path).run(context)
    assert [row["status"] for row in rows] == ["failed", "done", "failed"]
    assert all("it needs captions" in row["error"] for row in rows[::2])
    needing = {name for name, method in METHODS.items() if method.needs_captions}
    assert {"zs-cap", "mmft", "mmft+wise"} <= needing and not {"flyp", "mmft-no-captions"} & needing


def test_shots_that_a_class_does_not_have():
    splits = some_splits(train=colour_dataset(8).select(range(22)))
    with pytest.raises(UserError, match=r"shots 8: .* fewer of 2: green thing \(7\), blue thing \(7\).*allow_fewer"):
        make_task(splits, 8, 0)
    task, rows = make_task(splits, 8, 0, allow_fewer=True)
    assert len(task.train) == 22 and len(rows["validation"]) == 12 and task.policy == "val-k"
    assert np.bincount(labels_of(make_task(splits, 2, 0)[0].validation)).tolist() == [2, 2, 2]
    full, _ = make_task(splits, "full", 5)
    assert len(full.train) == 22 and len(full.validation) == 12 and full.policy == "val-full"
    for word in ("many", "-1", "²"):
        with pytest.raises(UserError, match=f"numbers of images per class, or full, found {word!r}"):
            parse_shots(["1", word])
    assert cells(["zs", "lp"], parse_shots(["1", "01"]), [0, 0]) == [Cell("zs", 0, 0), Cell("lp", 1, 0)]


def test_shuffled_captions_keep_images_and_labels():
    data = colour_dataset(6)
    task = Task(data, data, list(COLOURS), "full", 1, "val-full")
    within, across = shuffled_captions(task, within=True), shuffled_captions(task, within=False)
    for found in (within, across):
        assert sorted(map(str, found["captions"])) == sorted(map(str, data["captions"]))
        assert found["captions"][:] != data["captions"][:] and found["label"][:] == data["label"][:]

    def own_colour(dataset):
        names = [name.split()[0] for name in COLOURS]
        return [names[row["label"]] in row["captions"][0] for row in dataset]

    assert all(own_colour(within)) and not all(own_colour(across))


def test_permuted_labels_fall_to_chance(clip_folder, tmp_path):
    context = a_context(clip_folder, tmp_path)
    train, test = colour_dataset(16), colour_dataset(40, 3)
    x, t, labels = context.features(train), context.features(test), labels_of(test)
    right = (linear.logistic_regression(x, labels_of(train), t).argmax(1) == labels).mean()
    shuffled = [np.random.default_rng(seed).permutation(labels_of(train)) for seed in range(8)]
    chance = np.mean([(linear.logistic_regression(x, y, t).argmax(1) == labels).mean() for y in shuffled])
    assert right > 0.9 and 0.2 < chance < 0.47


def test_the_table_has_means_intervals_and_policies():
    seeds = itertools.count()

    def row(method, shots, accuracy, policy="last", status="done"):
        more = {"error": "broken"} if status == "failed" else {}
        return {
            "method": method,
            "shots": shots,
            "seed": next(seeds),
            "test_accuracy": accuracy,
            "selection_policy": policy,
            "status": status,
        } | more

    rows = [row("zs", 0, 0.5), row("lp", 4, 0.6, "val-k"), row("lp", 4, 0.7, "val-k"), row("lp", 4, 0.8, "val-k")]
    rows += [row("lp", "full", 0.9, "val-full"), row("mmft", 4, 0, status="failed")]
    table = summary_table(rows)
    assert "| method | selection | seeds | untuned | 4 shots | all images |" in table
    # Student: 4.303 * 10 / sqrt(3)
    assert "| lp | val-full, val-k | 1 to 3 |  | 70.0 ± 24.8 | 90.0 |" in table
    assert "| zs | last | 1 | 50.0 |  |  |" in table and "1 cell failed: mmft, 4 shots, seed 5 (broken)" in table


def test_half_a_line_is_replaced(tmp_path):
    path = tmp_path / "r.jsonl"
    both = {"test_accuracy": 0.5, "selection_policy": "last"}
    first, second = ({"identity": {}, "method": m, "shots": 1, "seed": 0, "status": "done"} | both for m in "äb")
    append_row(path, first)
    with open(path, "a") as file:
        file.write('{"half": ')
    assert without_digests(path) == [first]
    append_row(path, second)
    assert without_digests(path) == [first, second]
    whole = path.read_text()
    for line in ("nonsense", json.dumps(first | {"shots": "<b>"}), json.dumps(first | {"seed": "0"}), "[]"):
        path.write_text(f"{whole}{line}\n")
        with pytest.raises(UserError, match="line 3"):
            read_results(path)


# -- a new method --------------------------------------------------------------------------------------------------------
ONE_MORE_ROW = """
import sys

import numpy as np

from mmft_hf.benchmark.run.inference import on_features
from mmft_hf.benchmark.run.methods import METHODS, Method
from mmft_hf.cli import main


def nearest_mean(train_x, train_y, test_x):
    means = [train_x[train_y == label].mean(axis=0) for label in np.unique(train_y)]
    return np.asarray(test_x) @ np.array(means).T


METHODS["nearest-mean"] = Method(
    "nearest-mean", None, on_features(nearest_mean, texts=False), "features", "The class whose mean image is nearest."
)
assert main(["benchmark", "--help"]) == 0
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow  # tests/test_contributing.py does as much of it in less time
def test_a_new_method_is_one_row_of_the_table(clip_folder, data_folder, tmp_path):
    out = tmp_path / "out"
    words = ("--methods", "zs", "nearest-mean", "mmft-no-captions", "--shots", 2, "--seeds", 0)
    printed, _ = run_python(["-c", ONE_MORE_ROW, *command(clip_folder, data_folder, out, *words)])
    help_text, progress = printed.split("Comparing 3 methods on")
    assert "nearest-mean" in help_text
    assert "nearest-mean 2 shots seed 0" in " ".join(progress.split()) and "| nearest-mean | last | 1 |" in progress
    rows = {row["method"]: row for row in read_results(out / RESULTS_FILE)}
    assert rows["nearest-mean"]["status"] == "done" and rows["nearest-mean"]["test_accuracy"] > 0.5
    page = (out / "report.html").read_text()
    assert "The class whose mean image is nearest." in page and "On frozen features" in page
