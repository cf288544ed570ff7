"""`mmft-hf caption refine` with steps that ask: plans, runs, kills, status, retry, and what the folder tells."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter

import pytest
from caption_server import serving
from caption_tools import NAMES, dataset, image_folder, picture, written

from mmft_hf.cli import main

COUNT = 6
CANARY = "canary-5t7u9w1x3z"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asking")
    data = dataset([picture(i) for i in range(COUNT)])
    data = data.add_column("captions", [[f"a first text {i}", f"a second text {i}"] for i in range(COUNT)])
    data.to_parquet(folder / "captioned" / "train.parquet")
    test = dataset([picture(100)]).add_column("captions", [["a text of the test split"]])
    test.to_parquet(folder / "captioned" / "test.parquet")
    return folder / "captioned"


@pytest.fixture
def server(tmp_path):
    with serving({}, tmp_path / "requests.jsonl") as running:
        yield running


def words(server, source, output, *more, steps=("diversify",)):
    url = f"{server.url}/v1"
    models = ["--captioner", "openai", "--captioner_model", "vlm", "--base_url", url]
    models += ["--writer", "openai", "--writer_model", "llm", "--writer_base_url", url]
    return list(map(str, ["caption", "refine", source, "--output_dir", output, *models, "--steps", *steps, *more]))


@pytest.fixture
def refine(server, source, tmp_path, capsys):
    """Types the command; returns the exit code and what was printed."""

    def run(*more, output=tmp_path / "out", **options):
        capsys.readouterr()
        code = main(words(server, source, output, *more, **options))
        return code, " ".join("".join(capsys.readouterr()).split())

    return run


def test_a_dry_run_tells_the_most_that_would_be_asked_and_asks_nothing(refine, server, tmp_path):
    prices = tmp_path / "prices.yaml"
    prices.write_text("models: {llm: {input: 1, output: 2}, vlm: {input: 1, output: 2}}")
    code, said = refine("--dry_run", "--prices", prices, "--max_cost_usd", 0.001, steps=("short", "diversify"))
    assert code == 0 and "Nothing was asked" in said and not server.requests() and not (tmp_path / "out").exists()
    assert "captioner 1 rewrite" in said and "writer 2 rewrite" in said
    assert "[1 rewrite · captioner · whole]" in said and "[2 rewrite · writer · text alone]" in said
    assert '"a first text' in said and "--max_cost_usd 0.001 will stop it" in said


def test_missing_roles_and_the_test_split_are_refused(server, source, tmp_path, capsys):
    start = ["caption", "refine", str(source), "--output_dir", str(tmp_path / "out"), "--steps", "diversify"]
    assert main(start) == 2
    said = " ".join("".join(capsys.readouterr()).split())
    assert (
        "--writer: expected the model that answers the questions of step 1 rewrite" in said and "--writer_model" in said
    )
    assert main(words(server, source, tmp_path / "out", "--split", "test")) == 2
    assert main(["caption", "refine", str(source), "--steps", "diversify", "--writer", "openai"]) == 2
    assert "--writer_model" in "".join(capsys.readouterr())
    assert not server.requests() and not (tmp_path / "out").exists()


def test_a_run_writes_records_card_page_and_status(refine, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WRITER_KEY", CANARY)
    key = ("--writer_api_key_env", "WRITER_KEY", "--writer_max_tokens", "500")
    code, said = refine(*key, steps=("short", "diversify"))
    assert code == 0, said
    asked = Counter(row["model"] for row in server.requests())
    assert asked["vlm"] == COUNT and asked["llm"] > 0
    assert any(CANARY in row["headers"].get("authorization", "") for row in server.requests() if row["model"] == "llm")
    rows = written(tmp_path / "out")
    new = [record for row in rows for record in row["caption_records"] if record["parents"] is not None]
    assert (
        new
        and {record["model"] for record in new} <= {"vlm", "llm"}
        and all(r["clip_tokens"] for r in new if r["text"])
    )
    details = json.loads((tmp_path / "out" / "captions.json").read_text())
    steps = details["steps"]
    assert [step["roles"] for step in steps] == [["captioner"], ["writer"]]
    assert sum(step["asked"]["calls"] for step in steps) == len(server.requests())
    assert {name: role["model"] for name, role in details["roles"].items()} == {"captioner": "vlm", "writer": "llm"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It asked the captioner (`vlm`)" in card and "Its questions do not name the class" in card
    page = (tmp_path / "out" / "refined.html").read_text()
    assert "asked the writer" in page and "written by diversify" in page
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file.name != "requests.jsonl"]
    assert not any(CANARY.encode() in file.read_bytes() for file in files)
    # Once more: nothing is asked and nothing computed.
    before, count = {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}, len(server.requests())
    code, said = refine(*key, steps=("short", "diversify"))
    assert code == 0 and "nothing was computed" in said and len(server.requests()) == count
    assert all(before[f] == hashlib.sha256(f.read_bytes()).hexdigest() for f in files if "journal" not in str(f))
    capsys.readouterr()
    assert main(["caption", "status", str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Answers to the questions of steps" in said and f"rewrite {count}" in said


def test_failures_end_with_3_and_the_same_command_continues(refine, server, tmp_path, capsys):
    server.server.script = {"rules": [{"do": "error", "status": 400, "prompt": 'Caption: "a first text 3"'}]}
    code, said = refine()
    assert code == 3 and "has no answer" in said and "To continue, type: mmft-hf caption refine" in said
    assert json.loads((tmp_path / "out" / "captions.json").read_text())["complete"] is False
    server.server.script = {}
    count = len(server.requests())
    code, said = refine()
    assert code == 0 and len(server.requests()) == count + 1, said
    assert json.loads((tmp_path / "out" / "captions.json").read_text())["complete"] is True
    # What cannot be used is opened by `retry`, for one step.
    capsys.readouterr()
    assert main(["caption", "retry", "ok", "rewrite", "--output_dir", str(tmp_path / "out")]) == 0
    opened = int(capsys.readouterr().out.split()[0])
    assert opened == len({row["prompt"] for row in server.requests()}) > 0
    assert main(["caption", "retry", "verifi", "--output_dir", str(tmp_path / "out")]) == 2
    count = len(server.requests())
    assert refine()[0] == 0 and len(server.requests()) == count + opened


def test_the_cost_limit_ends_with_3_and_what_to_type(refine, server, tmp_path):
    prices = tmp_path / "prices.yaml"
    prices.write_text("models: {llm: {input: 0, output: 1000}, vlm: {input: 0, output: 1}}")
    code, said = refine("--prices", prices, "--max_cost_usd", 1.01)  # the 1,000 tokens of one answer, and a little
    assert code == 3 and "type a larger limit" in said and not (tmp_path / "out" / "captions.json").exists()
    count = len(server.requests())
    assert 0 < count < COUNT
    code, said = refine("--prices", prices, "--max_cost_usd", 100)
    assert code == 0 and len({row["prompt"] for row in server.requests()}) == len(server.requests()) > count, said


def test_without_questions_a_folder_is_what_it_was(refine, source, tmp_path, server):
    """A preset that finds nothing to ask changes nothing, and no class loses its last caption."""
    code, said = refine(steps=("rewrite",))
    assert code == 2 and "preset" in said and not server.requests()


@pytest.mark.slow
def test_kills_at_any_time_ask_nothing_twice(source, tmp_path):
    """Ten kills in the middle of a step: every question is asked once, but those that were on their way when it was killed."""
    rules = {"rules": [{"do": "ok", "delay_ms": 60}]}
    data = image_folder(tmp_path / "images", 60)
    with serving(rules, tmp_path / "requests.jsonl", process=True) as server:
        first = ["caption", "--captioner", "template", "--dataset_name", data, "--output_dir", tmp_path / "captioned"]
        assert main(list(map(str, first))) == 0
        command = [sys.executable, "-m", "mmft_hf"]
        command += words(server, tmp_path / "captioned", tmp_path / "out", "--concurrency", 2, steps=("short",))
        kills = 0
        for _ in range(40):
            process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
            before = len(server.requests())
            while process.poll() is None and (kills == 10 or len(server.requests()) < before + 4):
                try:
                    process.wait(0.01)
                except subprocess.TimeoutExpired:
                    continue
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        assert kills == 10 and process.returncode == 0
        asked = Counter((row["picture"], row["prompt"]) for row in server.requests())
        assert len(asked) == 60 and sum(asked.values()) - 60 <= 2 * kills  # two were on their way at each kill
        rows = written(tmp_path / "out")
        assert len(rows) == 60 and all(row["captions"] for row in rows) and len(NAMES) == 2
        process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert "nothing was computed" in process.stdout and sum(asked.values()) == len(server.requests())
