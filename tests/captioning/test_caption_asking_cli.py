"""`mmft-hf caption refine` with steps that ask: plans, runs, kills, status, retry, and what the folder tells."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from caption_server import serving
from caption_tools import NAMES, dataset, image_folder, picture, written
from scripted_responder import ScriptedResponder

import mmft_hf
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError

RECIPES = Path(__file__).parents[2] / "recipes" / "captions" / "steps"
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
    assert "captioner 1 short" in said and "writer 2 diversify" in said
    assert "[1 short · captioner · whole]" in said and "[2 diversify · writer · text alone]" in said
    assert '"a first text' in said and "--max_cost_usd 0.001 will stop it" in said


def test_missing_roles_and_the_test_split_are_refused(server, source, tmp_path, capsys):
    start = ["caption", "refine", str(source), "--output_dir", str(tmp_path / "out"), "--steps", "diversify"]
    assert main(start) == 2
    said = " ".join("".join(capsys.readouterr()).split())
    assert (
        "--writer: expected the model that answers the questions of step 1 diversify" in said
        and "--writer_model" in said
    )
    assert main(words(server, source, tmp_path / "out", "--split", "test")) == 2
    assert main(["caption", "refine", str(source), "--steps", "diversify", "--writer", "openai"]) == 2
    assert "--writer_model" in "".join(capsys.readouterr())
    assert main(words(server, source, tmp_path / "out", "--report_scorer", str(tmp_path / "no-model"))) == 2
    assert "For example, type --report_scorer google/" in "".join(capsys.readouterr())
    assert not server.requests() and not (tmp_path / "out" / "data").exists()


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
    assert "Answers to the questions of steps" in said and f"all {count}" in said and "short 6" in said


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
    assert main(["caption", "retry", "ok", "diversify", "--output_dir", str(tmp_path / "out")]) == 0
    opened = int(capsys.readouterr().out.split()[0])
    assert opened == len({row["prompt"] for row in server.requests()}) > 0
    assert main(["caption", "retry", "verifi", "--output_dir", str(tmp_path / "out")]) == 2
    count = len(server.requests())
    assert refine()[0] == 0 and len(server.requests()) == count + opened


def test_the_page_shows_what_checks_rejected_and_why(refine, server, tmp_path, capsys):
    def reply(prompt, picture):
        quoted = re.search(r'"(a (first|second) text (\d))"', prompt)
        answers = {"a first text 3": "I cannot help with that request.", "a first text 1": "a second text 1"}
        return answers.get(quoted[1], f"a new {quoted[2]} text {quoted[3]}")

    server.server.reply = reply
    code, said = refine()
    assert code == 0, said
    page = (tmp_path / "out" / "refined.html").read_text()
    assert main(["caption", "report", str(tmp_path / "out")]) == 0
    for shown in (page, (tmp_path / "out" / "refined.html").read_text()):
        shown = " ".join(re.sub("<[^>]*>", " ", shown).split())
        assert (
            "rejected by diversify: the model or its provider refused; the class is not named I cannot help with that request."
            in shown
        )
        assert "rejected by diversify: another caption has the same text a second text 1" in shown
    # A caption that was replaced still tells who wrote it, so that `parents` lead to it.
    for row in written(tmp_path / "out"):
        places = {f"{r['aspect']}#{r['sample']}@{r['step'] or 'caption'}": r for r in row["caption_records"]}
        for record in row["caption_records"]:
            for parent in record["parents"] or ():
                assert places[parent]["removed_by"] == ("diversify" if record["status"] == "ok" else None)


def test_the_cost_limit_ends_with_3_and_what_to_type(refine, server, tmp_path):
    prices = tmp_path / "prices.yaml"
    prices.write_text("models: {llm: {input: 0, output: 1000}, vlm: {input: 0, output: 1}}")
    code, said = refine("--prices", prices, "--max_cost_usd", 1.01)  # the 1,000 tokens of one answer, and a little
    assert code == 3 and "type a larger limit" in said and not (tmp_path / "out" / "captions.json").exists()
    count = len(server.requests())
    assert 0 < count < COUNT
    code, said = refine("--prices", prices, "--max_cost_usd", 100)
    assert code == 0 and len({row["prompt"] for row in server.requests()}) == len(server.requests()) > count, said


def test_rewriting_without_a_preset_is_refused(refine, server):
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


# -- recipes against a truthful judge -----------------------------------------------------------------------------------
FRUITS = "apple pear plum cherry lemon grape melon peach fig date olive mango".split()
TOOLS = "hammer saw drill file wrench plane chisel level rasp clamp spade rake".split()


def truthful(count=12):
    """A dataset whose captions name what is true of its images; in the second of each image one name is of another class."""
    data, truth, texts = [], {}, []
    for i in range(count):
        own, foreign = (FRUITS, TOOLS) if i % 2 == 0 else (TOOLS, FRUITS)
        first, second = own[i % 12], own[(i + 5) % 12]
        data.append(picture(i))
        truth[hashlib.sha256(data[-1]).hexdigest()] = {first, second}
        texts.append([f"it shows a {first}, beside it a {second}", f"it shows a {first}, beside it a {foreign[i]}"])
    records = [
        [{"aspect": f"a{k}", "text": t, "status": "ok", "model": f"m{k}", "sample": 0} for k, t in enumerate(own)]
        for own in texts
    ]
    return dataset(data).add_column("captions", texts).add_column("caption_records", records), truth


@pytest.mark.parametrize("recipe", ["fact_checked", "seed_then_scale", "judge_select_refine", "arena"])
def test_recipes_that_ask(recipe, server, clip_folder, tmp_path, capsys):
    data, truth = truthful()
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "train.parquet")
    responder = ScriptedResponder(truth, names=[*FRUITS, *TOOLS])
    empty = hashlib.sha256(b"").hexdigest()
    server.server.reply = lambda prompt, shown: responder.reply(prompt, [] if shown == empty else [shown])
    more = [
        "--judge",
        "openai",
        "--judge_model",
        "vlm",
        "--judge_base_url",
        f"{server.url}/v1",
        "--scorer",
        clip_folder,
    ]
    start = words(server, tmp_path / "data", tmp_path / "out", *more, steps=(RECIPES / f"{recipe}.yaml",))
    assert main([*start, "--dry_run"]) == 0 and not server.requests()
    plan = capsys.readouterr().out
    most = sum(int(n.replace(",", "")) for n in re.findall(r"^ *([\d,]+) .* (?:judge|writer) ", plan, re.MULTILINE))
    assert main(start) == 0, "".join(capsys.readouterr())
    said = capsys.readouterr().out
    assert 0 < len(server.requests()) <= most and "vlm judges captions that it wrote" not in said
    details = json.loads((tmp_path / "out" / "captions.json").read_text())
    asked = [step["asked"] for step in details["steps"] if "asked" in step]
    assert sum(one["calls"] for one in asked) == len(server.requests())
    assert all(one["unparsable"] == one["failed"] == one["refused"] == 0 for one in asked)
    rows = written(tmp_path / "out")
    assert all(row["captions"] for row in rows)
    if recipe in ("fact_checked", "seed_then_scale"):
        assert details["steps"][0]["figures"]["decoy_recall"] == 1
        for row in rows:
            named = responder.names_in(" ".join(row["captions"]))
            assert set(named) <= truth[row["image_sha256"]]
        facts = pq.read_table(tmp_path / "out" / "steps.parquet").to_pylist()
        denied = {
            (fact["image_sha256"], fact["text"])
            for fact in facts
            if fact["verdict"] == "no" and fact["kind"] != "decoy"
        }
        assert {image for image, _ in denied} == set(truth) and {fact["step"] for fact in facts} == {"verify"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It asked the judge" in card
    count = len(server.requests())
    assert main(start) == 0 and len(server.requests()) == count


def test_a_judge_of_its_own_captions_is_named(server, source, tmp_path, capsys):
    url = f"{server.url}/v1"
    server.server.reply = lambda prompt, shown: "yes" if "Answer with one word" in prompt else "a text"
    start = words(
        server, source, tmp_path / "out", "--judge", "openai", "--judge_model", "llm", "--judge_base_url", url
    )
    start[start.index("diversify")] = "verify"
    assert main([*start, "--dry_run"]) == 0
    assert "llm judges captions that it wrote itself" in " ".join(capsys.readouterr().out.split())


def test_the_python_function_asks_too(server, tmp_path):
    data, truth = truthful(4)
    responder = ScriptedResponder(truth, names=[*FRUITS, *TOOLS])
    empty = hashlib.sha256(b"").hexdigest()
    server.server.reply = lambda prompt, shown: responder.reply(prompt, [] if shown == empty else [shown])
    roles = dict.fromkeys(("judge", "writer"), mmft_hf.Captioner("openai", "m", base_url=f"{server.url}/v1"))
    step = {"verify": {"then": "drop", "decoys": 0}}
    with pytest.raises(UserError, match="run_dir"):
        mmft_hf.refine_captions(data, [step], roles=roles)
    with pytest.raises(UserError, match="judge: expected the model"):
        mmft_hf.refine_captions(data, [step], run_dir=tmp_path)
    found = mmft_hf.refine_captions(data, [step], roles=roles, run_dir=tmp_path, progress=False)
    assert [len(own) for own in found["captions"]] == [1] * 4
    count = len(server.requests())
    mmft_hf.refine_captions(data, [step], roles=roles, run_dir=tmp_path, progress=False)
    assert len(server.requests()) == count > 0
