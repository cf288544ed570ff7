"""Captioning: odd servers, odd data, odd moments; one short test each."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from caption_server import serving
from caption_tools import ASPECTS, NAMES, caption, dataset, image_folder, picture, undecoded, written
from datasets import ClassLabel, Dataset, Features, Image
from forked import start
from launch_tools import free_port

from mmft_hf.captioning import Captioner, caption_dataset
from mmft_hf.captioning.ask.cost import Spending
from mmft_hf.captioning.ask.journal import Journal
from mmft_hf.captioning.ask.journal_reader import by_slot, settled_slots
from mmft_hf.captioning.ask.limits import Limits, RetryPolicy
from mmft_hf.captioning.ask.pictures import sha256
from mmft_hf.captioning.ask.processes import Processes
from mmft_hf.captioning.judge.checks import CaptionChecker
from mmft_hf.captioning.split import SplitCaptioner
from mmft_hf.captioning.types import Sampling, Transient
from mmft_hf.captioning.write.output_folder import CaptionFolder
from mmft_hf.core.errors import UserError
from mmft_hf.data.images import BadImage, original_bytes
from mmft_hf.hub.cards.sources import captioning_cost

QUICK = RetryPolicy(base_s=0.02, cap_s=0.1)
PICTURES = [picture(i) for i in range(40)]
HISTORY = ("key", "slot", "status", "pending", "reask", "updated_at")


@pytest.fixture
def server(tmp_path):
    with serving({}, tmp_path / "requests.jsonl") as running:
        yield running


@pytest.fixture
def run(server, tmp_path):
    """Captions a dataset in one folder."""

    def go(data, limits=None, actions=None, **settings):
        captioner = Captioner("openai", **{"model": "m", "base_url": f"{server.url}/v1", **settings})
        options = {"limits": limits or Limits(4, retry=QUICK), "check_actions": actions, "progress": False}
        return undecoded(caption_dataset(data, captioner, run_dir=tmp_path / "run", **options))

    return go


def says(text, **more) -> dict:
    """A rule: this answer."""
    choice = {"message": {"content": text}, "finish_reason": more.pop("finish_reason", "stop")}
    return {"do": "ok", "body": {"model": "m", "choices": [choice], **more}}


def history(folder) -> list[list[tuple]]:
    """The tries of each slot as (reask, status, pending), the one that counts last."""
    return [[(r["reask"], r["status"], r["pending"]) for r in rows] for _, rows in by_slot(folder / "journal", HISTORY)]


def on_disk(files) -> Dataset:
    """A dataset that names its files."""
    columns = {"image": [{"bytes": None, "path": str(f)} for f in files], "label": [i % 2 for i in range(len(files))]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(names=NAMES)}))


# -- what servers say -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "odd",
    [
        {"model": {"a": 1}},
        {"model": "x" * 10**6},
        {"usage": {"prompt_tokens": 10**30, "completion_tokens": 10**10}},
    ],
    ids=["no name", "long name", "counts"],
)
def test_odd_fields_beside_a_good_caption_do_no_harm(server, run, odd):
    server.server.script = {"rules": [says("a fine blue thing", **odd)]}
    (row,) = run(dataset(PICTURES[:1]))
    assert row["captions"] == ["a fine blue thing"] and row["caption_records"][0]["tokens_in"] is None


def test_an_ending_that_is_no_word_is_a_bad_answer(server, run):
    server.server.script = {"rules": [says("a fine blue thing", finish_reason={"a": 1}) | {"at": [2]}]}
    (row,) = run(dataset(PICTURES[:1]))
    assert [r["status"] for r in row["caption_records"]] == ["ok"] * 3 and len(server.requests()) == 4


def test_half_a_character_in_an_answer_or_a_class_name_can_be_stored(server, run):
    server.server.script = {"rules": [says("a fine blue thing \ud83d")]}
    (row,) = run(dataset(PICTURES[:1], names=["blue_thing\udce9", "b"]))  # a folder named in Latin-1
    assert row["captions"] == ["a fine blue thing ?"]


# -- waits ------------------------------------------------------------------------------------------------------------
def test_a_server_that_hangs_from_the_start_costs_the_tries_of_one_call(server, run):
    server.server.script = {"rules": [{"do": "hang"}]}
    with pytest.raises(UserError, match="no answer within"):
        run(dataset(PICTURES), Limits(16), timeout_s=0.1)
    assert len(server.requests()) == 3


def test_waits_grow_after_many_rate_limits_and_where_a_server_says_at_once():
    waits = [RetryPolicy().wait(Transient("x", "", 0.0, True), 0, 1100, 1.0, random.Random(i)) for i in range(50)]
    assert max(waits) > 30 and min(waits) < 30


def test_the_resets_beside_a_server_error_are_no_wait(server, run):
    headers = {"x-ratelimit-reset-tokens": "6m0s", "x-ratelimit-remaining-tokens": "149000"}
    server.server.script = {"rules": [{"do": "error", "at": [4], "headers": headers}]}
    assert all(len(row["captions"]) == 3 for row in run(dataset(PICTURES[:4])))


def test_a_rate_limit_under_which_others_get_on_ends_no_run(server, run):
    server.server.script = {"rules": [{"do": "ok", "every": 6}, {"do": "rate_limit"}]}
    retry = RetryPolicy(base_s=0.02, cap_s=0.1, max_elapsed_s=1.0)
    assert all(len(row["captions"]) == 3 for row in run(dataset(PICTURES[:20]), Limits(8, retry=retry)))


def test_a_stop_waits_for_no_pause(server, run):
    """One call is sent away for 100 s; another comes back after the stop, with an answer that needs a second try."""
    looped = says("la " * 20) | {"delay_ms": 800}
    server.server.script = {
        "rules": [{"at": [1]}, {"do": "rate_limit", "at": [2], "retry_after": 100}, looped, {"do": "ok"}]
    }
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        run(dataset(PICTURES[:2]), Limits(4))
    assert len(server.requests()) == 5
    assert time.monotonic() - begun < 100, "the pause was over"


# -- several processes ------------------------------------------------------------------------------------------------
def test_a_process_that_is_two_splits_ahead_is_not_waited_for_again(tmp_path):
    first, second = Processes(), Processes()
    second.rank, second.launch, first.world, second.world = 1, first.launch, 2, 2
    (tmp_path / "rank-00001-test-earlier.done").touch()
    second.done(tmp_path, "train"), second.done(tmp_path, "test")
    for split in ("train", "test"):
        first.done(tmp_path, split)
        waiting = threading.Thread(target=first.wait, args=(tmp_path, split), daemon=True)
        waiting.start(), waiting.join(10)
        assert not waiting.is_alive()
    assert not list(tmp_path.glob("*.done"))


def test_under_a_launcher_one_process_asks_a_server_about_all_pictures(server, tmp_path):
    data, environment = image_folder(tmp_path / "data", 4), {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = caption(server, data, tmp_path / "out")
    others = [start(words, tmp_path / f"{rank}.txt", RANK=str(rank), **environment) for rank in (1, 0)]
    assert [process.wait() for process in others] == [0, 0] and len(server.requests()) == 12
    assert (tmp_path / "out" / "captions.json").exists()


# -- commands ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def command(server, tmp_path):
    """Runs `mmft-hf caption` on a folder of 6 pictures to its end; returns exit code and output."""
    data = image_folder(tmp_path / "data", 6)

    def go(*more, action=(), source=data):
        words = caption(server, source, tmp_path / "out", *more)
        environment = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
        running = start([words[0], *action, *words[1:]], tmp_path / "output.txt", **environment)
        return running.wait(), running.text

    return go


def test_retry_of_one_class_leaves_the_results_of_others(command, server, tmp_path):
    assert command()[0] == 0
    assert command("--classes", "red_thing", action=("retry", "ok"))[0] == 0
    assert len(server.requests()) == 18 + 9
    assert [len(row["captions"]) for row in written(tmp_path / "out")] == [3] * 6


def test_what_a_server_calls_its_model_cannot_command_the_terminal(command, server, tmp_path):
    server.server.script = {"rules": [says("a fine thing", model="\x1b[31mevil")]}
    texts = [command()[1], command(action=("status",))[1]]
    assert "evil" in texts[1] and not any("\x1b[31m" in text for text in texts)


def test_a_writer_waits_for_those_who_read(tmp_path):
    """Without a write-ahead log a reader, such as `status`, holds it up for as long as it reads."""
    with Journal(tmp_path) as journal:
        assert journal._db.execute("PRAGMA busy_timeout").fetchone() == (60_000,)


# -- folders ----------------------------------------------------------------------------------------------------------
def test_a_folder_is_ours_from_the_first_moment_of_a_run_to_the_last(tmp_path, monkeypatch):
    journal = tmp_path / "out" / "journal"
    journal.mkdir(parents=True)
    (journal / "journal-00000.lock").touch()
    folder = CaptionFolder(tmp_path / "out")
    folder.claim({"a": 1}, False)
    Journal(journal).close()
    # Wherever a kill hits while the first dataset is written: before each change of the folder.
    for name in ("mkdir", "write_text", "replace"):
        change, count = getattr(Path, name), iter(range(100))
        for stop in range(8):

            def killed(self, *args, change=change, stop=stop, count=count, **options):
                if next(count) == stop:
                    raise InterruptedError
                return change(self, *args, **options)

            with monkeypatch.context() as patch, contextlib.suppress(InterruptedError):
                patch.setattr(Path, name, killed)
                folder.write({"train": dataset(PICTURES[:1])}, {"made_from": {"a": 1}})
            count = iter(range(100))
            folder.claim({"a": 1}, False)  # raises, if the folder were taken for another's
            assert (journal / "journal-00000.sqlite").is_file()
        shutil.rmtree(folder.path / "data", ignore_errors=True), (folder.path / "captions.json").unlink()


@pytest.mark.parametrize("name", ["../mine.txt", "ABSOLUTE", 7])
def test_a_record_that_names_files_elsewhere_is_no_record(tmp_path, name):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    (tmp_path / "out").mkdir()
    record = {"files": [str(mine) if name == "ABSOLUTE" else name], "made_from": {}}
    (tmp_path / "out" / "captions.json").write_text(json.dumps(record))
    folder = CaptionFolder(tmp_path / "out")
    with pytest.raises(UserError, match=r"field files.*: expected (files of this folder|text), found"):
        folder.claim({}, True)
    with pytest.raises(UserError, match=r"captions\.json"):
        folder.write({"train": dataset(PICTURES[:1])}, {})
    assert mine.read_text() == "mine"


# -- answers that were bought -----------------------------------------------------------------------------------------
def looped(server, run, tmp_path, **settings):
    """A run whose first answers were turned down, killed before any second try; and how many requests that took."""
    server.server.script = {"rules": [says("la " * 20)]}
    run(dataset(PICTURES[:2]), **settings)
    with sqlite3.connect(tmp_path / "run" / "journal" / "journal-00000.sqlite") as db:
        db.execute("DELETE FROM results WHERE reask > 0")
    assert all(rows == [(0, "rejected", 1)] for rows in history(tmp_path / "run"))
    return len(server.requests())


def test_with_fewer_tries_allowed_an_answer_that_was_turned_down_is_the_result(server, run, tmp_path):
    count = looped(server, run, tmp_path)
    rows = run(dataset(PICTURES[:2]), Limits(4, max_reasks=0))
    assert len(server.requests()) == count and history(tmp_path / "run") == [[(0, "rejected", 0)]] * 6
    assert all(r["status"] == "rejected" and r["attempts"] == 1 for row in rows for r in row["caption_records"])


@pytest.mark.parametrize("aspects_per_call", ["one", "all"])
def test_with_other_checks_an_answer_that_was_turned_down_may_do(server, run, tmp_path, aspects_per_call):
    text = "a fine piece" if aspects_per_call == "one" else json.dumps(dict.fromkeys(ASPECTS, "a fine piece"))
    server.server.script = {"rules": [{"do": "error", "status": 400, "prompt": "Use the words"}, says(text)]}
    run(dataset(PICTURES[:2]), actions={"label_missing": "reask"}, aspects_per_call=aspects_per_call)
    count = len(server.requests())
    rows = run(dataset(PICTURES[:2]), aspects_per_call=aspects_per_call)
    assert len(server.requests()) == count and all(row["captions"] == ["a fine piece"] for row in rows)


def test_a_final_result_in_one_file_beats_a_turned_down_answer_in_another(tmp_path):
    same = {"key": "a", "slot": "a", "status": "rejected"}
    with Journal(tmp_path, 0) as first, Journal(tmp_path, 1) as second:
        first.put([{**same, "pending": 1, "updated_at": 1.0}]), second.put([{**same, "updated_at": 2.0}])
        assert settled_slots(first.folder) == {"a"}
    ((_, rows),) = by_slot(tmp_path, HISTORY)
    assert [row["pending"] for row in rows] == [0]


# -- pictures ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("change", [Path.unlink, lambda file: file.write_bytes(picture(9))], ids=["gone", "another"])
def test_a_picture_that_changes_during_a_run_is_asked_about_when_it_is_back(server, run, tmp_path, change):
    files = sorted(image_folder(tmp_path / "data", 2).rglob("*.png"))
    data, before = on_disk(files), files[1].read_bytes()
    captioner = Captioner("openai", "m", base_url=f"{server.url}/v1")
    with SplitCaptioner(captioner, data, tmp_path / "run", CaptionChecker(NAMES), progress=False) as running:
        plan = running.plan()
        change(files[1])
        assert running.fill(plan).results == {"ok": 3, "failed": 3}
    files[1].write_bytes(before)
    assert [len(row["captions"]) for row in run(data)] == [3, 3] and len(server.requests()) == 6


def test_paths_in_the_data_give_nothing_but_pictures(tmp_path):
    (tmp_path / "key.png").write_text("sk-secret")
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "key.png", tmp_path / "pipe.png", tmp_path, "/proc/self/environ", "/dev/zero"):
        with pytest.raises(BadImage):
            original_bytes({"bytes": None, "path": str(path)})


def test_a_file_that_was_replaced_is_not_taken_from_a_cache(command, tmp_path):
    assert image_folder(tmp_path / "data", 4)
    files = sorted((tmp_path / "data").rglob("*.png"))
    table = tmp_path / "data.csv"
    table.write_text("image,label\n" + "".join(f"{file},{file.parent.name}\n" for file in files))
    assert command("--classes", "blue_thing", source=table)[0] == 0
    assert files[-1].parent.name == "red_thing"  # nobody asks about it
    files[-1].write_bytes(picture(99))
    code, text = command("--classes", "blue_thing", source=table)
    assert code == 0 and picture(99) in [row["image"]["bytes"] for row in written(tmp_path / "out")], text


def test_rows_asked_for_in_vain_have_records(command, server, tmp_path):
    assert command("--classes", "blue_thing")[0] == 0
    server.server.script = {"rules": [{"do": "quota"}]}
    assert command()[0] == 3
    statuses = [[r["status"] for r in row["caption_records"]] for row in written(tmp_path / "out")]
    assert sorted(statuses) == [["not_run"] * 3] * 3 + [["ok"] * 3] * 3


# -- what is read -----------------------------------------------------------------------------------------------------
def test_an_echo_of_the_second_prompt_is_no_caption(server, run, tmp_path):
    echo = says("This blue thing. Answer in one plain paragraph of at most 50 words.")
    server.server.script = {"rules": [echo | {"prompt": "Answer in one plain"}, says("la " * 20)]}
    (row,) = run(dataset(PICTURES[:1]))
    assert {tries[-1][1] for tries in history(tmp_path / "run")} == {"rejected"}
    assert row["captions"] == [] and {r["status"] for r in row["caption_records"]} == {"rejected"}


def test_status_counts_a_call_for_all_aspects_once(command, server):
    server.server.script = {"mode": "json", "aspects": list(ASPECTS)}
    assert command("--aspects_per_call", "all")[0] == 0
    assert re.search(r"attempts +6\n", command(action=("status",))[1]) and len(server.requests()) == 6


def test_a_temperature_of_0_is_one_of_0_0(server, run):
    run(dataset(PICTURES[:1]), sampling=Sampling(temperature=0))
    run(dataset(PICTURES[:1]), sampling=Sampling(temperature=0.0))
    assert len(server.requests()) == 3


def test_a_picture_that_a_router_turns_down_stops_no_run(server, run):
    error = {"code": 403, "message": "your input was flagged", "metadata": {"flagged_input": "x", "reasons": ["y"]}}
    rule = {"do": "error", "status": 403, "body": {"error": error}, "picture": sha256(PICTURES[2])}
    server.server.script = {"rules": [rule]}
    rows = run(dataset(PICTURES[:6]))
    assert [len(row["captions"]) for row in rows] == [3, 3, 0, 3, 3, 3]
    assert {r["status"] for r in rows[2]["caption_records"]} == {"failed"}


def test_a_budget_among_the_options_is_the_one_that_is_counted_with(server, run):
    with pytest.raises(UserError, match="max_tokens 2000"):
        run(dataset(PICTURES[:1]), sampling=Sampling(options={"max_completion_tokens": 2000}))
    assert not server.requests()
    server.server.script = {"rules": [{"do": "thinking", "at": [1]}]}
    options = {"max_tokens": None, "max_completion_tokens": 200}
    run(dataset(PICTURES[:1]), Limits(1, retry=QUICK), sampling=Sampling(options=options))
    budgets = [row["body"]["max_completion_tokens"] for row in server.requests()]
    assert sorted(budgets) == [200, 200, 200, 800] and "max_tokens" not in server.requests()[0]["body"]


def test_a_row_without_a_class_is_named_before_anything_is_asked(server, run):
    with pytest.raises(UserError, match="row 1: expected a class, found label -1"):
        run(dataset(PICTURES[:2], labels=[0, -1]))
    assert not server.requests()


def test_the_record_of_a_run_counts_all_its_splits(command, server, tmp_path):
    for split, first in (("train", 0), ("test", 10)):
        image_folder(tmp_path / "both" / split, 4, first)
    (tmp_path / "prices.yaml").write_text("models: {m: {input: 2, output: 10}}\n")
    words = ("--split", "train", "test", "--prices", tmp_path / "prices.yaml")
    server.server.script = {"rules": [{"do": "quota", "from": 6, "to": 12}]}
    code, text = command(*words, "--concurrency", "1", source=tmp_path / "both")
    record = json.loads((tmp_path / "out" / "captions.json").read_text())
    assert code == 3 and "quota left" in text and record["last_run"]["calls"] == record["spent"]["calls"] == 5
    assert command(*words, source=tmp_path / "both")[0] == 3
    server.server.script = {}
    assert command(*words, source=tmp_path / "both")[0] == 0
    record = json.loads((tmp_path / "out" / "captions.json").read_text())
    assert record["last_run"]["calls"] == 24 - 5
    # What all runs took; the server counts 300 tokens in for each call.
    found = captioning_cost(str(tmp_path / "out"))
    records = [
        r for split in ("train", "test") for row in written(tmp_path / "out", split) for r in row["caption_records"]
    ]
    tokens_out = sum(record["tokens_out"] for record in records)
    assert (found["captioner"], found["calls"], found["tokens_in"]) == ("m", 24, 24 * 300) and tokens_out > 24
    assert found["tokens_out"] == tokens_out
    assert found["cost_usd"] == pytest.approx((2 * 24 * 300 + 10 * tokens_out) / 1e6, abs=1e-6)
    assert record["last_run"]["seconds"] - 0.2 < found["seconds"] < 60
    assert f"cost: {found['cost_usd']:.2f} USD" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_what_is_not_known_of_the_cost_of_captions_is_not_made_up(tmp_path):
    row = {
        "key": "a",
        "call_id": None,
        "raw_text": "x",
        "error": None,
        "attempts": 1,
        "tokens_in": 10,
        "tokens_out": 5,
        "cost": 0.1,
    }
    row |= {"latency_ms": 2000, "run_id": "one", "updated_at": 100.0}
    spent = Spending()
    spent.add(row)
    spent.add(row | {"key": "b", "call_id": "a", "tokens_in": None, "tokens_out": None, "cost": None})  # the same call
    spent.add(
        row | {"key": "c", "raw_text": None, "cost": None, "tokens_in": None, "attempts": 3, "updated_at": 104.0}
    )  # no answer
    spent.add(row | {"run_id": "two", "updated_at": 105.0})  # side by side for a second
    one = {"calls": 2, "attempts": 5, "tokens_in": 20, "tokens_out": 10, "cost_usd": 0.2, "seconds": 7.0}
    assert spent.summary() == one
    spent.add(row | {"cost": None, "updated_at": 110.0})
    assert spent.summary() == one | {
        "calls": 3,
        "attempts": 6,
        "tokens_in": 30,
        "tokens_out": 15,
        "cost_usd": None,
        "seconds": 12.0,
    }
    both = (spent + spent).summary()
    assert (both["calls"], both["cost_usd"], both["seconds"]) == (6, None, 12.0)

    nothing = dict.fromkeys(("calls", "cost_usd", "tokens_in", "tokens_out", "seconds"))
    (tmp_path / "captions.json").write_text('{"made_from": {"dataset_name": "d", "captioner": {"backend": "columns"}}}')
    assert captioning_cost(str(tmp_path)) == {"captioner": "columns"} | nothing
    for damaged in ("[]", '{"made_from": {"dataset_name": "d", "captioner": {"backend": "columns"}}, "spent": 3}'):
        (tmp_path / "captions.json").write_text(damaged)
        assert captioning_cost(str(tmp_path)) is None
    assert captioning_cost("builtin/emoji-mini") is None
