"""Whatever happened to a file that we left: exit code 2 or 3 with the file's name, or the same result, or a note that names the file.

Each example damages one file of a folder (see `helpers/damage.py`) and runs a verb that reads it. The examples are always the same.
`MMFT_FUZZ` sets the number of examples of the slow test.
"""

import contextlib
import csv
import io
import json
import logging
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers
from caption_server import serving
from caption_tools import image_folder
from damage import copied, damage, damages
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback

from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.core.seals import digest_of
from mmft_hf.hub.publish import dataset_files, model_files
from mmft_hf.predict.pipeline import TASK
from mmft_hf.train.trainer import MMFTTrainer

CPU_SECONDS, SECONDS = 10, 600  # of one verb; the second for what waits without working, on machines with other work
FAST = 10  # examples
TIMES = re.compile(r"[\d.]+ s\b|\d+ min|[\d.,]+ (images|captions)/s")


class Hang(BaseException):
    """A verb did not end."""


@contextlib.contextmanager
def bounded():
    def stop(*_):
        raise Hang

    before = [signal.signal(number, stop) for number in (signal.SIGVTALRM, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in zip((signal.SIGVTALRM, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)


def run(words) -> tuple[int, str, str]:
    """Exit code, standard output without times, and what was said on standard error, logged notes included."""
    out, err, notes = io.StringIO(), io.StringIO(), io.StringIO()
    handler, logger = logging.StreamHandler(notes), logging.getLogger("mmft_hf")
    logger.addHandler(handler)
    try:
        with bounded(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = words() if callable(words) else main([str(word) for word in words])
    finally:
        logger.removeHandler(handler)
    return code, TIMES.sub("", out.getvalue()), err.getvalue() + notes.getvalue()


def published(collect, *args) -> int:
    """What `push` would send, without a Hub."""
    try:
        files = collect(*args)
    except UserError as error:
        print(f"mmft-hf: {error}", file=sys.stderr)
        return 2
    for name, content in sorted(files.items()):
        print(name, digest_of(content))
    return 0


@pytest.fixture(scope="module")
def left(clip_folder, data_folder, tmp_path_factory):
    """The folders that the verbs leave, a server of captions, and the folder in which copies are damaged."""
    place = tmp_path_factory.mktemp("left")
    train = [
        "--model_name_or_path",
        clip_folder,
        "--dataset_name",
        data_folder,
        "--disable_tqdm",
        "true",
        "--use_cpu",
        "true",
    ]
    train += ["--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--num_train_epochs", "2"]
    photos = image_folder(place / "photos", 4)
    (place / "config.yaml").write_text("top_k: 2\nbatch_size: 3\n")
    (place / "prices.yaml").write_text(
        "date: 2026-01-01\nmodels:\n  m:\n    input: 0.1\n    output: 0.4\n    image: {tile: 512, tokens: 100}\n"
    )
    work = place / "work"

    with serving({}, place / "log.jsonl") as server:
        caption = [
            "caption",
            "--dataset_name",
            photos,
            "--captioner",
            "openai",
            "--captioner_model",
            "m",
            "--base_url",
            f"{server.url}/v1",
        ]
        caption += ["--aspects", "visual", "--prices", work / "prices" / "prices.yaml"]
        second = [*caption, "--captioner_model", "n", "--output_dir", place / "second"]
        caption += ["--output_dir", work / "captioned"]
        bench = [
            "benchmark",
            "--model_name_or_path",
            clip_folder,
            "--dataset_name",
            data_folder,
            "--use_cpu",
            "true",
            "--max_steps",
            "1",
        ]
        bench += ["--methods", "zs", "mmft", "--shots", "1", "--seeds", "0", "--output_dir", work / "bench"]
        (work / "prices").mkdir(parents=True)
        shutil.copy(place / "prices.yaml", work / "prices")
        for words in (
            ["finetune", *train, "--output_dir", work / "run"],
            ["finetune", *train, "--output_dir", work / "lora", "--vision_tower", "lora", "--max_steps", "1"],
            caption,
            second,
            bench,
        ):
            code, _, err = run(words)
            assert code == 0, err
        with pytest.MonkeyPatch.context() as patch:  # a run that was stopped after its first epoch
            init = MMFTTrainer.__init__
            patch.setattr(
                MMFTTrainer, "__init__", lambda self, *a, **k: (init(self, *a, **k), self.add_callback(StopAt(4)))[0]
            )
            assert run(["finetune", *train, "--output_dir", work / "cut"])[0] == 3
            lora = ["--vision_tower", "lora", "--output_dir", work / "cut_lora"]
            assert run(["finetune", *train, *lora])[0] == 3
        for name in ("run", "lora", "cut", "cut_lora", "captioned", "bench"):
            copied(work / name, place / name)
        (place / "adapter").mkdir()  # as it is published
        for name, content in model_files(place / "lora", "user/name", "adapter").items():
            (place / "adapter" / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        (place / "journals").mkdir()
        assert (
            run(["caption", "export", place / "journals" / "answers.parquet", "--output_dir", place / "captioned"])[0]
            == 0
        )
        named_texts(photos, place)
        (place / "settings").mkdir()
        (place / "config.yaml").rename(place / "settings" / "config.yaml")
        (place / "prices_file").mkdir()
        (place / "prices.yaml").rename(place / "prices_file" / "prices.yaml")
        (place / "prices_file").rename(place / "prices")
        picture = next(photos.rglob("*.png"))
        journal = place / "exported.parquet"

        def resume(folder, *more):
            words = ["finetune", *train, "--output_dir", folder, "--resume_from_checkpoint", "true", *more]
            code = main([str(word) for word in words])
            if code == 0:
                found = json.loads((folder / "all_results.json").read_text())
                print({key: value for key, value in found.items() if not key.startswith("train_")})
                try:
                    print(digest_of(folder / "model.safetensors"))
                except OSError as error:  # a finished run is not made again: what it notes is the answer
                    print(error)
            return code

        def exported(folder):
            code = main(["caption", "export", str(journal), "--output_dir", str(folder)])
            if code == 0:
                print(pq.read_table(journal).to_pylist())
            return code

        def again(folder):
            code = main([str(word) for word in caption])
            if code == 0:
                try:
                    rows_of(folder)
                except (pa.ArrowException, OSError, KeyError) as error:
                    print(error)
            return code

        def rows_of(folder):
            tables = [pq.read_table(file) for file in sorted((folder / "data").glob("*"))]
            print([(row["image_sha256"], row["captions"]) for table in tables for row in table.to_pylist()])

        def merged(*folders):
            shutil.rmtree(place / "merged", ignore_errors=True)
            code = main(["caption", "merge", *map(str, folders), "--output_dir", str(place / "merged")])
            if code == 0:
                rows_of(place / "merged")
            return code

        def imported(file, *more):
            shutil.rmtree(place / "imported", ignore_errors=True)
            code = main([str(word) for word in ["caption", "import", file, "--output_dir", place / "imported", *more]])
            if code == 0 and more:
                rows_of(place / "imported")
            return code if code or more else exported(place / "imported")

        def push_captions(folder):
            shutil.rmtree(place / "scratch", ignore_errors=True)
            datasets.disable_progress_bars()
            return published(dataset_files, folder, "user/name", place / "scratch")

        evaluate = ["evaluate", "--dataset_name", data_folder, "--model_name_or_path"]
        verbs = {
            "run": {
                "evaluate": lambda folder: main([str(word) for word in [*evaluate, folder]]),
                "predict": lambda folder: main(["predict", str(picture), "--model_name_or_path", str(folder)]),
                "repeat": resume,
                "push": lambda folder: published(model_files, folder, "user/name"),
            },
            "lora": {
                "push": lambda folder: published(model_files, folder, "user/name", "both"),
                "evaluate": lambda folder: main([str(word) for word in [*evaluate, folder]]),
                "predict": lambda folder: main(["predict", str(picture), "--model_name_or_path", str(folder)]),
            },
            "adapter": {"pipeline": lambda folder: piped(folder, picture)},
            "cut": {"resume": resume},
            "cut_lora": {"resume": lambda folder: resume(folder, "--vision_tower", "lora")},
            "captioned": {
                "status": lambda folder: main(["caption", "status", "--output_dir", str(folder)]),
                "export": exported,
                "again": again,
                "push": push_captions,
                "merge": lambda folder: merged(folder, place / "second"),
            },
            "journals": {"import": lambda folder: imported(folder / "answers.parquet")},
            "texts": {
                "import": lambda folder: imported(
                    folder / "VisualCaption.json", "--dataset_name", photos, "--key_rule", "class/file_name"
                )
            },
            "tables": {"merge": lambda folder: merged(folder / "jsonl", folder / "csv")},
            "bench": {"report": lambda folder: report(folder)},
            "settings": {
                "predict": lambda folder: main(
                    [
                        "predict",
                        str(picture),
                        "--model_name_or_path",
                        str(place / "run"),
                        "--config",
                        str(folder / "config.yaml"),
                    ]
                )
            },
            "prices": {"plan": lambda folder: main(["caption", "plan", *[str(word) for word in caption[1:]]])},
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(clip_folder.parent)  # where the base model has the name that the adapter knows
            yield place, work, verbs


def named_texts(photos: Path, place: Path) -> None:
    """Captions as people write them: JSON by file, and image folders with a table of each kind."""
    names = [path.relative_to(photos).as_posix() for path in sorted(photos.rglob("*.png"))]
    (place / "texts").mkdir()
    texts = {name.split("/", names[0].count("/") - 1)[-1]: f"a thing, number {i}" for i, name in enumerate(names)}
    (place / "texts" / "VisualCaption.json").write_text(json.dumps(texts))
    rows = [(name.replace("/", "_"), name.split("/")[-2], f"one of {i}") for i, name in enumerate(names)]
    for kind in ("jsonl", "csv"):
        folder = place / "tables" / kind
        folder.mkdir(parents=True)
        for name, (copy, _, _) in zip(names, rows, strict=True):
            shutil.copy(photos / name, folder / copy)
    keys = ("file_name", "label", "captions")
    lines = [json.dumps(dict(zip(keys, (name, label, [text]), strict=True))) for name, label, text in rows]
    (place / "tables" / "jsonl" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    with (place / "tables" / "csv" / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([keys, *rows])


def piped(folder, picture) -> int:
    """The pipeline on an adapter. In Python an exception says what is wrong."""
    try:
        print(transformers.pipeline(TASK, model=str(folder))(str(picture)))
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


class StopAt(TrainerCallback):
    """Ends the training after a step, as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def report(folder) -> int:
    code = main(["benchmark", "--report", str(folder)])
    if code == 0:
        print(digest_of(folder / "report.html"))
    return code


TYPED = ("settings", "prices", "texts", "tables")  # people write these files: another value is another wish
# Files that people look at, and that no verb reads.
UNREAD = re.compile(
    r".*\.(png|html|lock)|claims/.*|report/.*|subsets/.*|trainer_state\.json|exported.*|README\.md|.*-shm|.*-wal"
)


def files_of(folder: Path) -> list[str]:
    found = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return [
        name
        for name in found
        if not UNREAD.fullmatch(name) and (folder.name.startswith("cut") or not name.startswith("checkpoint-"))
    ]


def check(left, data, expected) -> None:
    """Draws a folder, a file, a verb and a damage."""
    place, _, verbs = left
    name = data.draw(st.sampled_from(sorted(verbs)))
    file = data.draw(st.sampled_from(files_of(place / name)))
    verb = data.draw(st.sampled_from(sorted(verbs[name])))
    check_one(left, name, file, verb, data.draw(damages(Path(file))), expected)


def check_one(left, name, file, verb, how, expected) -> None:
    """Damages one file and checks what the verb says."""
    place, work, verbs = left
    folder = work / name
    if (name, verb) not in expected:
        copied(place / name, folder)
        expected[name, verb] = run(lambda: verbs[name][verb](folder))
        assert expected[name, verb][0] == 0, expected[name, verb]
    copied(place / name, folder)
    with contextlib.suppress(UnicodeDecodeError, UnicodeEncodeError):
        damage(folder / file, *how)
    what = f"{name}/{file}, {verb}, {how}"
    code, out, err = run(lambda: verbs[name][verb](folder))
    assert code in (0, 2, 3), f"{what}: exit code {code}\n{err}"
    assert "Traceback" not in err, f"{what}\n{err}"
    notes = err + "\n".join(line for line in out.splitlines() if "Note: " in line)
    if code == 0 and out != expected[name, verb][1] and name not in TYPED:
        assert Path(file).name in notes or "passed over" in err, f"{what}: another result without a word\n{out}\n{err}"
    copied(place / name, folder)  # for the verbs on other folders


FOUND = [
    ("run", "model.safetensors", "repeat", ("socket", 0.0, None)),
    ("cut", "checkpoint-3/scheduler.pt", "resume", ("folder", 0.0, None)),
    ("bench", "results.jsonl", "report", ("truncate", 0.8523432834434165, 69)),
    ("run", "processor_config.json", "predict", ("remove", 0.08529330710496397, 6)),
    ("captioned", "captions.json", "status", ("missing", 0.0, None)),
    ("captioned", "journal/journal-00000.sqlite", "again", ("empty", 0.0, None)),
    ("captioned", "journal/journal-00000.sqlite", "again", ("missing", 0.0, None)),
    ("adapter", "processor_config.json", "pipeline", ("missing", 0.0, None)),
]


@pytest.mark.parametrize("found", FOUND, ids=lambda found: "-".join((*found[:3], found[3][0])).replace("/", "-"))
def test_what_was_found_once(left, found):
    check_one(left, *found, expected={})


OPTIONS = {"derandomize": True, "database": None, "deadline": None, "phases": [Phase.generate]}
OPTIONS["suppress_health_check"] = list(HealthCheck)


@pytest.mark.slow
def test_a_damaged_file_is_named_or_changes_nothing(left):
    expected = {}

    @settings(max_examples=FAST, **OPTIONS)
    @given(st.data())
    def examples(data):
        check(left, data, expected)

    examples()


@pytest.mark.slow
def test_a_damaged_file_is_named_or_changes_nothing_many_times(left):
    """300 examples take about five minutes of CPU on two cores: 0.7 s each, and 70 s to make the folders."""
    expected = {}

    @settings(max_examples=int(os.environ.get("MMFT_FUZZ", 300)), **OPTIONS)
    @given(st.data())
    def examples(data):
        check(left, data, expected)

    examples()
