"""`mmft-hf caption` as its users read it: help, numbers, advice, and commands that work when typed."""

import json
import re

import pytest
from caption_server import serving
from caption_tools import NAMES, image_folder, picture
from datasets import load_dataset

from mmft_hf import load_captioned_dataset
from mmft_hf.captioning import Captioner, caption_dataset
from mmft_hf.cli import main
from mmft_hf.commands.caption.printing import money, rate
from mmft_hf.core.errors import UserError


def test_help_names_each_setting_once(capsys):
    assert main(["caption", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: mmft-hf caption [action …] [--config FILE.yaml] [--key value …]\n")
    text = " ".join(text.split())  # wherever the lines are broken
    assert text.count("--base_url") == 1 and "--base-url" not in text
    assert "None" not in text and "(default: outputs/captioned)" in text and "(default: visual shape texture)" in text
    assert "Default: train." in text and "--dry_run [true|false]" in text


# -- what is printed --------------------------------------------------------------------------------------------------
def test_prices_are_never_rounded_to_nothing():
    assert [money(x) for x in (0, 0.00001, 0.0041, 12.3)] == ["$0.0000", "less than $0.0001", "$0.0041", "$12.30"]
    assert [rate(x) for x in (0.1, 0.075, 15)] == ["$0.10", "$0.075", "$15.00"]


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """Runs a command in a folder of its own; returns its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = main(["caption", *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.fixture
def asking(tmp_path):
    """The settings of a run of twelve pictures against a server of its own, and that server."""
    data = image_folder(tmp_path / "pets", 12)
    whole = picture(99)
    (data / NAMES[0] / "broken.png").write_bytes(whole[: len(whole) // 2])
    with serving({"rules": [{"do": "refusal", "at": [5]}]}, tmp_path / "log.jsonl") as server:
        words = ["--dataset_name", "pets", "--captioner", "openai", "--captioner_model", "gpt-4.1-mini"]
        yield [*words, "--base_url", server.url + "/v1", "--output_dir", "out", "--aspects", "visual", "damage"], server


def test_what_is_missing_is_named_with_its_file_and_a_command_that_works(asking, say, tmp_path):
    words, server = asking
    code, text = say("plan", *words)
    assert code == 0 and "damage (your own)" in text and "gpt-4.1-mini" in text and "about $0.0" in text
    assert "Leave `plan` out to start." in text and not server.requests()
    code, text = say(*words)
    assert code == 0 and "1 refused" in text and "2 bad_image" in text and "e.g. broken.png" in text
    assert "\nNext: mmft-hf finetune --dataset_name out --on_bad_image skip\n" in text
    code, text = say(*words)
    assert "Nothing to do: out has 23 of 26 captions" in text and "1 refused, 2 bad_image" in text
    code, text = say("status", "--output_dir", "out")
    assert code == 0 and text.index("visual") < text.index("damage") < text.index("Not accepted")
    assert "  2 bad_image" in text and f"e.g. {NAMES[0]}, broken.png, " in text
    assert "<dt>file</dt><dd>broken.png</dd>" in (tmp_path / "out" / "captions.html").read_text()
    code, text = say("plan", *words)
    assert "Nothing is left to ask for." in text and "cost" not in text
    code, text = say("retry", "refused", *words)
    assert code == 0 and "1 result (refused) is asked for again." in text and "1 call answered of 1 tried;" in text


def test_other_settings_in_a_folder_are_named(asking, say):
    words, _ = asking
    say(*words)
    code, text = say(*words, "--words", 20, "--temperature", 1, "--max_tokens", 300)
    assert code == 2 and "found others: words 50 there, 20 here; temperature 0.2 there, 1.0 here." in text
    code, text = say(*words, "--captioner", "template")
    assert "found others: captioner openai gpt-4.1-mini there, template here" in text


def test_a_price_limit_says_what_to_do(asking, say):
    words, _ = asking
    code, text = say("plan", *words, "--max_cost_usd", 0.001)
    assert code == 0 and "; --max_cost_usd 0.001 will stop it" in text
    code, text = say(*words, "--max_cost_usd", 0.001)
    assert code == 3 and "The next call could exceed --max_cost_usd 0.001: type a larger limit to continue." in text


def test_a_budget_that_cuts_most_answers(asking, say):
    words, server = asking
    server.server.script = {"rules": [{"do": "truncated"}]}
    code, text = say(*words)
    assert code == 3 and "type a larger --max_tokens than 200, and only those captions are asked for again" in text
    asked = len(server.requests())
    assert say(*words)[0] == 3 and len(server.requests()) == asked  # the same budget would cut them again
    server.server.script = {}
    code, text = say(*words, "--max_tokens", 300)
    assert code == 0 and {r["body"]["max_tokens"] for r in server.requests()[asked:]} == {300}
    asked = len(server.requests())
    assert say(*words, "--max_tokens", 400)[0] == 0 and len(server.requests()) == asked


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["retry"], "found --captioner columns. Type the command of the run, with `retry` after `mmft-hf caption`."),
        (["bench"], "expected the settings of a run that asks a model"),
        (["retry", "refsed"], "Did you mean 'refused'?"),
        (["--captioner", "openai", "--captioner_model", "m", "--prompt_template", "Describe it"], "expected {aspect}"),
        (
            ["--captioner", "openai", "--captioner_model", "m", "--own_prompts", '{"wear": "?"}'],
            "Add 'wear' to the asp",
        ),
        (["plan", "--captioner", "openai", "--captioner_model", "m", "--prices", "no.yaml"], "found: No such file"),
    ],
    ids=["retry", "bench", "status", "template", "own_prompts", "prices"],
)
def test_advice(say, words, said):
    code, text = say(*words)
    assert code == 2 and said in text and "[Errno" not in text


def test_a_server_that_is_down(say, tmp_path):
    image_folder(tmp_path / "pets", 4)
    words = ["--dataset_name", "pets", "--captioner", "openai", "--captioner_model", "m", "--output_dir", "out"]
    code, text = say(*words, "--base_url", "http://127.0.0.1:9/v1")
    assert code == 2 and "127.0.0.1:9: connection refused: nothing answers there. Start the server" in text


def test_a_key_that_will_be_missing_is_named_in_the_plan(say, tmp_path, monkeypatch):
    monkeypatch.delenv("GEMINI_API_KEY", raising=False)
    image_folder(tmp_path / "pets", 4)
    words = ["--captioner", "gemini", "--captioner_model", "gemini-2.5-flash-lite", "--dry_run"]
    code, text = say("--dataset_name", "pets", *words)
    assert (
        code == 0 and "Before the run: expected a key in the environment variable GEMINI_API_KEY, found none." in text
    )


# -- figures ----------------------------------------------------------------------------------------------------------
def test_a_text_counts_once_per_image_and_tokens_once_per_picture(asking, say, tmp_path):
    words, server = asking
    repeated = tmp_path / "pets" / NAMES[1]
    first = sorted(repeated.iterdir())[0]
    (repeated / "again.jpg").write_bytes(first.read_bytes())
    server.server.script = {}
    assert say(*words)[0] == 0
    record = json.loads((tmp_path / "out" / "captions.json").read_text())
    assert record["statistics"]["attempts"] == len(server.requests()) == 24
    assert record["statistics"]["tokens_in"] == 24 * 300 and record["statistics"]["captions"] == 26
    code, text = say("merge", "out", "out/", "--output_dir", "both")
    assert code == 0 and "26 captions" in text and re.search(r"\n  captions +26\n", text)


def test_caption_dataset_says_which_column_it_lacks(tmp_path):
    data = load_captioned_dataset(str(image_folder(tmp_path / "pets", 4)))["train"]
    with pytest.raises(UserError, match="expected a column label of type ClassLabel, found image"):
        caption_dataset(data.remove_columns("label"), Captioner("template"))


def test_a_folder_that_was_written_again_opens_as_it_is_now(say, tmp_path, monkeypatch):
    for count, place in ((4, "one"), (6, "two"), (8, "two")):  # another folder of that name, and the same one grown
        image_folder(tmp_path / "pets", count)
        words = ["--dataset_name", "pets", "--captioner", "template", "--output_dir", f"{place}/captioned"]
        assert say(*words, "--overwrite_output_dir", "true")[0] == 0
        assert len(load_captioned_dataset(f"{place}/captioned")["train"]) == count
        assert len(load_dataset(str(tmp_path / place / "captioned"))["train"]) == count
