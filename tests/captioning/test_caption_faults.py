"""Captioning runs that are killed, interrupted, turned away and misled: nothing is lost, mispaired or bought twice."""

import asyncio
import random
import shlex
import signal
import sqlite3
import threading
import time
from collections import defaultdict
from email.utils import formatdate
from itertools import pairwise

import pytest
from caption_server import caption_of, serving
from caption_tools import (
    ASPECTS,
    NAMES,
    asked,
    caption,
    dataset,
    expected,
    image_folder,
    pairs,
    picture,
    prompt,
    undecoded,
    written,
    wrong,
)
from forked import start
from processes import end, until
from processes import start as start_python

from mmft_hf.captioning import Captioner, caption_dataset
from mmft_hf.captioning.ask.journal import Journal
from mmft_hf.captioning.ask.journal_reader import settled_slots
from mmft_hf.captioning.ask.limits import Limits, RetryPolicy
from mmft_hf.captioning.ask.pictures import sha256
from mmft_hf.captioning.types import Sampling

QUICK = RetryPolicy(base_s=0.02, cap_s=0.1)


@pytest.fixture
def server(tmp_path):
    with serving({}, tmp_path / "requests.jsonl") as running:
        yield running


@pytest.fixture
def command(server, tmp_path):
    """Starts `mmft-hf caption` in a process of its own, on a folder of 50 pictures."""
    data = image_folder(tmp_path / "data", 50)
    count = iter(range(100))

    def go(*more, words=None, **environment):
        words = words or caption(server, data, tmp_path / "out", *more)
        environment.setdefault("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        return start(words, tmp_path / f"output-{next(count)}.txt", **environment)

    return go


def continuing(text: str) -> list[str]:
    """The words of the command that a message says to type."""
    program, *words = shlex.split(text.rpartition("To continue, type: ")[2])
    assert program == "mmft-hf"
    return words


def journal_of(folder) -> list[tuple]:
    """What is committed, read by sqlite alone."""
    with sqlite3.connect(folder / "journal" / "journal-00000.sqlite") as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return db.execute("SELECT image_sha256, aspect, status, text FROM results").fetchall()


# -- kill -9 ----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_kills_at_random_moments(tmp_path):
    """29 kills: 20 while captions are asked for, 6 while the dataset is written, 3 of the installed command."""
    data, rng, delay = image_folder(tmp_path / "data", 120), random.Random(7), 0.04
    aspects = {"m": ASPECTS, **{f"own-{i}": ("visual",) for i in range(3)}}
    kills, cache = defaultdict(list), {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    script = {"rules": [{"do": "ok", "delay_ms": 1000 * delay}]}
    with serving(script, tmp_path / "requests.jsonl", process=True) as server:

        def words(model):
            more = ["--concurrency", "4", "--captioner_model", model, "--aspects", *aspects[model]]
            return [*caption(server, data, tmp_path / model), *more]

        def kill_one(model, seconds):
            process, mark = start_python(["-m", "mmft_hf.cli", *words(model)], **cache), f'"{model}"'.encode()
            until(lambda: server.log.exists() and mark in server.log.read_bytes(), every=0.1)
            time.sleep(seconds)
            process.kill()
            kills[model].append(time.time())
            end(process, -signal.SIGKILL)

        threads = [threading.Thread(target=kill_one, args=(f"own-{i}", rng.uniform(0, 0.8))) for i in range(3)]
        for thread in threads:
            thread.start()
        for i in range(20):
            size = server.log.stat().st_size if server.log.exists() else 0
            running = start(words("m"), tmp_path / "output.txt", **cache)
            if i % 2:
                until(lambda size=size: server.log.exists() and server.log.stat().st_size > size)
            time.sleep(rng.uniform(0, 0.3))
            running.kill()
            kills["m"].append(time.time())
            assert running.wait() == -signal.SIGKILL
        for thread in threads:
            thread.join()
        assert sorted(len(found) for found in kills.values()) == [1, 1, 1, 20]
        for model, names in aspects.items():
            running = start([*words(model), "--concurrency", "32"], tmp_path / "output.txt", **cache)
            assert running.wait() == 0, running.text
            rows, results = written(tmp_path / model), journal_of(tmp_path / model)
            assert not wrong(rows, names) and len(rows) == 120
            assert len(results) == len(set(results)) == 120 * len(names) and {r[2] for r in results} == {"ok"}

            times = defaultdict(list)
            for row in server.requests():
                if row["model"] == model:
                    times[row["picture"], row["prompt"]].append(row["time"])
            assert set(times) == set().union(*(pairs(picture(i), NAMES[i % 2], names) for i in range(120)))
            # Whatever was asked again was in flight at a kill, and of those there are no more than calls at once.
            again = [first for found in times.values() for first in found[:-1]]
            assert len(again) <= 4 * len(kills[model])
            for first in again:  # logged by a server that may be some milliseconds behind
                assert any(first - 0.2 <= kill <= first + delay + 0.3 for kill in kills[model])

        requests = len(server.requests())
        for _ in range(6):
            running = start([*words("m"), "--overwrite_output_dir", "true"], tmp_path / "output.txt", **cache)
            time.sleep(rng.uniform(0.05, 0.35))
            running.kill()
            assert running.wait() in (-signal.SIGKILL, 0)
        running = start(words("m"), tmp_path / "output.txt", **cache)
        assert running.wait() == 0, running.text
        assert not wrong(written(tmp_path / "m")) and len(written(tmp_path / "m")) == 120
        assert len(server.requests()) == requests


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------
def test_ctrl_c_keeps_what_is_on_its_way_and_names_the_command_that_continues(server, command, tmp_path):
    server.server.script = {"rules": [{"do": "ok", "delay_ms": 150}]}
    running = command("--concurrency", "8")
    until(lambda: len(server.requests()) >= 25)
    running.kill(signal.SIGINT)
    assert running.wait() == 3
    assert "Traceback" not in running.text and "stopped by you" in running.text
    kept = len(server.requests())
    assert 25 <= kept <= 100 and len(journal_of(tmp_path / "out")) == kept
    assert f"{kept} of 150 captions" in running.text
    server.server.script = {}
    running = command(words=continuing(running.text))
    assert running.wait() == 0
    assert len(server.requests()) == 150 and not wrong(written(tmp_path / "out"))


def test_a_second_ctrl_c_ends_at_once(server, command, tmp_path):
    server.server.script = {"rules": [{"do": "hang", "from": 11}]}
    running = command("--concurrency", "4")
    until(lambda: len(server.requests()) >= 13)
    running.kill(signal.SIGINT)
    until(lambda: "Press Ctrl-C again" in running.text)
    running.kill(signal.SIGINT)
    assert running.wait(60) == 3  # half of the time after which the calls would be given up
    assert len(journal_of(tmp_path / "out")) == 10 and "Traceback" not in running.text


def test_ctrl_c_in_a_notebook_keeps_what_is_on_its_way(server, tmp_path, request):
    # A shell's background jobs ignore Ctrl-C, and so would this one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    server.server.script = {"rules": [{"do": "ok", "delay_ms": 100}]}
    data, captioner = dataset(map(picture, range(40))), Captioner("openai", "m", base_url=f"{server.url}/v1")

    async def cell():
        return caption_dataset(data, captioner, run_dir=tmp_path, limits=Limits(4), progress=False)

    def press():
        until(lambda: len(server.requests()) >= 10)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    loop, thread = asyncio.new_event_loop(), threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(cell())
    thread.join()
    kept = len(server.requests())
    assert 10 <= kept <= 80 and len(journal_of(tmp_path)) == kept
    server.server.script = {}
    captioned = loop.run_until_complete(cell())
    loop.close()
    assert not wrong(undecoded(captioned)) and len(server.requests()) == 120


# -- storms -----------------------------------------------------------------------------------------------------------
def storm(server, tmp_path, rules, count=24, max_tokens=200):
    """Captions `count` pictures while the server plays the rules. Returns the dataset and what was asked."""
    server.server.script = {"rules": [*rules, {"do": "ok", "delay_ms": 10}]}
    before = len(server.requests())
    timeout_s = 1.0 if any(rule["do"] == "hang" for rule in rules) else 20.0
    sampling = Sampling(max_tokens=max_tokens)
    captioner = Captioner("openai", "m", base_url=f"{server.url}/v1", timeout_s=timeout_s, sampling=sampling)
    options = {"limits": Limits(8, retry=QUICK), "progress": False}
    captioned = caption_dataset(dataset(map(picture, range(count))), captioner, run_dir=tmp_path / "run", **options)
    return undecoded(captioned), server.requests()[before:]


@pytest.mark.parametrize(
    "rule",
    [
        {"do": "rate_limit"},
        {"do": "rate_limit", "retry_after": 1},
        {"do": "rate_limit", "retry_after": "date"},
        {"do": "rate_limit", "headers": {"x-ratelimit-reset-requests": "300ms"}},
        {"do": "error"},
        {"do": "unavailable", "retry_after": 1},
        {"do": "html"},
        {"do": "hang"},
        {"do": "reset"},
        {"do": "reset_middle"},
        {"do": "cut"},
        {"do": "malformed"},
        {"do": "empty_choices"},
        {"do": "huge"},
    ],
    ids=lambda rule: "-".join(map(str, rule.values()))[:30],
)
def test_storms_pass(server, tmp_path, rule):
    if rule.get("retry_after") == "date":
        rule = {**rule, "retry_after": formatdate(time.time() + 2, usegmt=True)}
    count = 8 if {"retry_after", "headers"} & set(rule) else 16
    captioned, requests = storm(server, tmp_path, [{**rule, "from": 10, "to": 9 + count}])
    assert not wrong(captioned)
    failed = [r for r in requests if r["did"] != "ok"]
    assert len(failed) == count and len(requests) == 72 + count  # each was asked again, nothing else was
    assert set(asked(requests)) == {pair for i in range(24) for pair in pairs(picture(i), NAMES[i % 2])}
    assert max(r["in_flight"] for r in requests[-20:]) >= 5
    if rule["do"] == "rate_limit":
        assert min(r["in_flight"] for r in requests[10 + count : 24 + count]) <= 4
    if "retry_after" in rule or "headers" in rule:
        quiet = max(b["time"] - a["time"] for a, b in pairwise(requests))
        assert 0.25 < quiet < 3


def test_a_storm_that_does_not_end_ends_the_run(server, command, tmp_path):
    server.server.script = {"rules": [{"do": "rate_limit", "retry_after": 4000, "after_ok": 30}]}
    running = command("--concurrency", "8")
    assert running.wait() == 3 and "the rate limit persists" in running.text
    assert len(server.requests()) <= 30 + 2 * 8
    server.server.script = {}
    assert command(words=continuing(running.text)).wait() == 0
    assert not wrong(written(tmp_path / "out"))


def test_every_row_gets_the_status_of_what_became_of_it(server, tmp_path):
    shas = [sha256(picture(i))[:16] for i in range(24)]
    rules = [
        {"do": "refusal", "picture": shas[4]},
        {"do": "truncated", "picture": shas[5]},
        {"do": "ok", "picture": shas[6], "prompt": "Answer directly, without thinking first."},
        {"do": "thinking", "picture": shas[6]},
        {"do": "thinking", "picture": shas[7]},
        {"do": "error", "status": 400, "picture": shas[8]},
        {"do": "error", "picture": shas[9]},
    ]
    captioned, requests = storm(server, tmp_path, rules)
    statuses = {i: [r["status"] for r in row["caption_records"]] for i, row in enumerate(captioned)}
    assert statuses.pop(4) == ["refused"] * 3
    assert statuses.pop(5) == ["truncated", "truncated"] * 3
    assert statuses.pop(6) == ["empty", "ok"] * 3
    assert statuses.pop(7) == ["empty", "empty"] * 3
    assert statuses.pop(8) == statuses.pop(9) == ["failed"] * 3
    assert set(map(tuple, statuses.values())) == {("ok",) * 3}
    assert not wrong([row for i, row in enumerate(captioned) if i in statuses])
    budgets = defaultdict(list)
    for row in requests:
        budgets[row["picture"][:16]].append((row["body"]["max_tokens"], row["prompt"]))
    assert [len(budgets[shas[i]]) for i in (4, 5, 6, 7, 8, 9)] == [3, 6, 6, 6, 3, 18]
    assert sorted(n for n, _ in budgets[shas[6]]) == [200] * 3 + [800] * 3
    longer = [text for n, text in budgets[shas[6]] if n == 800]
    assert sorted(captioned[6]["captions"]) == sorted(caption_of(sha256(picture(6)), text) for text in longer)

    # The next run asks for what is open, and for nothing else; what a budget cut is open once there is more.
    captioned, requests = storm(server, tmp_path, [])
    assert {r["picture"][:16] for r in requests} == {shas[8], shas[9]} and len(requests) == 6
    captioned, requests = storm(server, tmp_path, [], max_tokens=900)
    assert {r["picture"][:16] for r in requests} == {shas[5], shas[7]} and len(requests) == 6
    assert {r["body"]["max_tokens"] for r in requests} == {900}
    assert [r["status"] for r in captioned[4]["caption_records"]] == ["refused"] * 3
    assert all(len(row["captions"]) == 3 for i, row in enumerate(captioned) if i != 4)


@pytest.mark.parametrize("rule", [{"do": "error", "status": 400}, {"do": "error"}], ids=["400", "500"])
def test_a_first_picture_that_the_server_cannot_take_does_not_stop_the_run(server, tmp_path, rule):
    captioned, _ = storm(server, tmp_path, [{**rule, "picture": sha256(picture(0))}])
    assert not wrong(captioned[1:]) and [r["status"] for r in captioned[0]["caption_records"]] == ["failed"] * 3


@pytest.mark.parametrize("mode", ["json", None])
def test_one_call_for_all_aspects_falls_back_to_one_each(server, tmp_path, mode):
    plain = {"do": "ok", "body": {"choices": [{"message": {"content": "no JSON"}, "finish_reason": "stop"}]}}
    server.server.script = {"rules": [{**plain, "at": [4, 9]}] if mode else [], "mode": mode, "aspects": list(ASPECTS)}
    captioner = Captioner("openai", "m", base_url=f"{server.url}/v1", aspects_per_call="all")
    captioned = undecoded(
        caption_dataset(
            dataset(map(picture, range(20))), captioner, run_dir=tmp_path, limits=Limits(8, retry=QUICK), progress=False
        )
    )
    requests = server.requests()
    joint = {r["picture"]: r for r in requests if "JSON" in r["prompt"]}
    assert len(joint) == 20 and all(
        prompt(NAMES[i % 2], aspect) in joint[sha256(picture(i))]["prompt"] for i in range(20) for aspect in ASPECTS
    )
    if not mode:  # no answer is an object with these keys
        assert len(requests) == 20 + 60
        assert [r["text"] for row in captioned for r in row["caption_records"]][::2] == [None] * 60
        assert [row["captions"] for row in captioned] == [
            [expected(picture(i), NAMES[i % 2], aspect) for aspect in ASPECTS] for i in range(20)
        ]
        return
    assert len(requests) == 20 + 2 * 2 * 3  # JSON, once more, is no caption
    for row in captioned:
        sha = row["image_sha256"]
        own = {aspect: f"{caption_of(sha, joint[sha]['prompt'])} {aspect}" for aspect in ASPECTS}
        if joint[sha]["n"] not in (4, 9):
            assert {r["aspect"]: r["text"] for r in row["caption_records"]} == own and len(row["captions"]) == 3


# -- keys and quotas --------------------------------------------------------------------------------------------------
def test_a_key_that_is_not_accepted_costs_one_call(server, command):
    server.server.script = {"rules": [{"do": "unauthorized"}]}
    running = command("--api_key_env", "MY_KEY", "--concurrency", "32", MY_KEY="sk-wrong-0123456789")
    assert running.wait() == 2 and len(server.requests()) == 1
    assert "MY_KEY" in running.text and "Traceback" not in running.text and "sk-wrong" not in running.text
    running = command("--api_key_env", "NO_SUCH_KEY")
    assert running.wait() == 2 and len(server.requests()) == 1 and "export NO_SUCH_KEY=" in running.text


def test_a_key_that_expires_keeps_what_it_bought(server, command, tmp_path):
    server.server.script = {"rules": [{"do": "ok", "delay_ms": 10}, {"do": "unauthorized"}]}
    server.server.script["rules"][0]["times"] = 100
    running = command("--api_key_env", "MY_KEY", "--concurrency", "8", MY_KEY="sk-old-0123456789")
    assert running.wait() == 2
    refused = len(server.requests()) - 100
    assert 1 <= refused <= 8 and len(journal_of(tmp_path / "out")) == 100
    assert "100 of 150 captions" in running.text and "Traceback" not in running.text
    server.server.script = {}
    assert command("--api_key_env", "MY_KEY", MY_KEY="sk-new-0123456789").wait() == 0
    assert len(server.requests()) == 150 + refused and not wrong(written(tmp_path / "out"))
    assert server.requests()[-1]["headers"]["authorization"] == "Bearer sk-new-0123456789"


def test_a_quota_that_ends_names_the_count_and_the_command_that_continues(server, command, tmp_path):
    server.server.script = {"rules": [{"do": "ok", "delay_ms": 10, "times": 60}, {"do": "quota"}]}
    running = command("--concurrency", "8")
    assert running.wait() == 3 and "90 of 150 captions are missing" in running.text
    refused = len(server.requests()) - 60
    assert 1 <= refused <= 8
    partial = written(tmp_path / "out")
    assert sum(len(row["captions"]) for row in partial) == 60 and len(partial) == 50
    server.server.script = {}
    assert command(words=continuing(running.text)).wait() == 0
    assert len(server.requests()) == 150 + refused and not wrong(written(tmp_path / "out"))


# -- two at once, and disks -------------------------------------------------------------------------------------------
def test_two_processes_on_one_folder(server, command, tmp_path):
    server.server.script = {"rules": [{"do": "ok", "delay_ms": 100}]}
    first = command("--concurrency", "4")
    until(lambda: len(server.requests()) >= 6)
    second = command()
    assert second.wait() == 2 and f"(process {first.pid} on " in second.text and "Traceback" not in second.text
    first.kill()  # which gives its lock back
    assert first.wait() == -signal.SIGKILL
    server.server.script = {}
    assert command().wait() == 0 and not wrong(written(tmp_path / "out"))


def test_a_disk_that_takes_no_more_ends_with_a_message_and_loses_nothing(server, command, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1))"
    assert command("--dry_run", "true").wait() == 0  # the cache of `datasets` is written by then
    running = command("--concurrency", "4", before=limit)
    assert running.wait() == 3 and "Traceback" not in running.text, running.text
    asked_for, kept = len(server.requests()), len(journal_of(tmp_path / "out"))
    assert 0 < kept < 150 and asked_for - kept <= 4
    assert (
        f"{kept} answers in {tmp_path / 'out' / 'journal'} stay, and will not be asked for again. Make room."
        in running.text
    )
    assert "To continue, type: mmft-hf caption " in running.text
    with Journal(tmp_path / "out" / "journal") as journal:
        assert len(settled_slots(journal.folder)) == kept
    assert command().wait() == 0
    assert len(server.requests()) == 150 + asked_for - kept and not wrong(written(tmp_path / "out"))
