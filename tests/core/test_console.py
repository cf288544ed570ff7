"""What leaves the command line is harmless: escapes in names, formulas in CSV files, a full standard output."""

import csv
import logging
import os
import subprocess
import sys

import pytest
from tiny_clip import COLOURS, colour_dataset

from mmft_hf.cli import main
from mmft_hf.core.console import PlainFormatter, plain, say, some, table
from mmft_hf.core.files import write_csv
from mmft_hf.core.markdown import code, listed, md

EVIL = {
    "clear\x1b[2Jed": r"clear\x1b[2Jed",
    "title\x1b]0;owned\x07": r"title\x1b]0;owned\x07",
    "c1\x9b31m": r"c1\x9b31m",
    "back\x08\x08\rover": r"back\x08\x08\rover",
    "rtl\u202egnp.exe": r"rtl\u202egnp.exe",
    "iso\u2066late\u2069": r"iso\u2066late\u2069",
    "line\u2028two": r"line\u2028two",
    "zero\x00width\u200b": r"zero\x00width\u200b",
    "not text \udcff": r"not text \udcff",
}
GOOD = ["ordinary", "größe", "紅茶", "می\u200cخواهم", "👩\u200d🚒", "a\u00a0b", "50 % *", "e\u0301", "\\x1b"]


def test_nothing_in_a_name_is_obeyed_by_a_terminal(capsys):
    for name, shown in EVIL.items():
        assert plain(name) == shown and plain(shown) == shown
        say(f"class {name}"), table({"a": name}), say(some([name, name]))
        said = capsys.readouterr().out
        assert said.count(shown) == 4 and not any(c in said for c in name if not c.isprintable())
    for name in GOOD:
        assert plain(name) == name
    assert plain("two\n\tlines") == "two\n\tlines" and plain("two\n\tlines", lines=False) == r"two\n\tlines"
    assert some(["cat\nmmft-hf: all is well", "dog"]) == r"cat\nmmft-hf: all is well, dog"
    record = logging.LogRecord("mmft_hf", logging.WARNING, "", 0, "Classes %s", ("x\x1b[0m",), None)
    assert PlainFormatter().format(record) == r"Classes x\x1b[0m"


def test_messages_and_warnings_of_the_command_line_are_plain(tmp_path, capsys):
    name = "data\x1b[31m\u202e"
    assert main(["predict", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert r"data\x1b[31m\u202e" in err and "\x1b" not in err and "\u202e" not in err
    assert isinstance(logging.lastResort.formatter, PlainFormatter)


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_a_full_standard_output(words):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-m", "mmft_hf", *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 2 and "expected a place to write to, found: No space left on device" in run.stderr
    assert "Traceback" not in run.stderr and "Exception ignored" not in run.stderr


# -- CSV ----------------------------------------------------------------------------------------------------------------
FORMULAS = [
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    '=HYPERLINK("http://x","y")',
    "＝1",
    "-cat",
    "'quoted",
]


def test_no_cell_is_a_formula_and_all_can_be_read_back(tmp_path):
    harmless = ["cat", "a=b", "", "1", " =1", "été", "a,b", 'say "x"', "two\nlines"]
    write_csv(tmp_path / "a.csv", [["text", "number"], *([text, -0.5] for text in FORMULAS + harmless)])
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        (_, *rows) = csv.reader(file)
    assert [number for _, number in rows] == ["-0.5"] * len(rows)
    assert [text for text, _ in rows] == [f"'{text}" for text in FORMULAS] + harmless
    assert [text.removeprefix("'") for text, _ in rows] == [*FORMULAS[:-1], "'quoted", *harmless]


def test_no_cell_has_an_escape_that_a_terminal_would_obey(tmp_path):
    write_csv(tmp_path / "a.csv", [["red\x1b[2J", "\x07=1", "\x9b2Jtwo\nlines"]])
    assert (tmp_path / "a.csv").read_bytes() == rb"red\x1b[2J,\x07=1," + b'"' + rb"\x9b2Jtwo" + b'\nlines"\r\n'


def test_file_names_that_are_not_text_keep_their_bytes(tmp_path):
    write_csv(tmp_path / "a.csv", [[os.fsdecode(b"caf\xe9.jpg"), 1]])
    assert (tmp_path / "a.csv").read_bytes() == b"caf\xe9.jpg,1\r\n"


def test_predict_and_evaluate_write_no_formulas_and_print_no_escapes(clip, tmp_path, capsys, monkeypatch):
    import mmft_hf

    names = ["=cmd|' /C calc'!A0", "-green\x1b[2J", "blue\u202e"]
    model, processor = clip
    head = mmft_hf.ClassPrototypes.from_templates(model, processor, [*COLOURS], "a photo of a {}")
    head.class_names = names
    mmft_hf.ImageClassifier(model, processor, head).save_pretrained(tmp_path / "model")
    data = colour_dataset(2)
    (tmp_path / "test").mkdir()
    pictures = [f"@{i}\x1b[1m.png" for i in range(2)]
    for name, row in zip(pictures, data, strict=False):
        row["image"].save(tmp_path / name)
    features = data.features.copy()
    features["label"].names = names
    data.cast(features).to_parquet(tmp_path / "test" / "test.parquet")
    monkeypatch.chdir(tmp_path)
    assert main(["predict", *pictures, "--model_name_or_path", "model"]) == 0
    assert main(["predict", *pictures, "--model_name_or_path", "model", "--output_file", "out.csv"]) == 0
    words = ["--model_name_or_path", "model", "--dataset_name", "test", "--output_dir", "report"]
    assert main(["evaluate", *words]) == 0
    out, err = capsys.readouterr()
    assert (
        "\x1b" not in out + err and "\u202e" not in out + err and r"-green\x1b[2J" in out and r"@0\x1b[1m.png: " in out
    )
    for file in ("out.csv", "report/per_class.csv", "report/confusion_matrix.csv"):
        with open(file, newline="", encoding="utf-8") as opened:
            cells = [cell for row in csv.reader(opened) for cell in row]
        texts = [cell for cell in cells if not cell.replace(".", "").replace("e-", "").isdigit()]
        assert any(cell.startswith("'") for cell in texts) and not any(cell[:1] in "=+-@\t\r" for cell in texts if cell)


# -- Markdown -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", [*EVIL, "a|b", "`x`", "<script>alert(1)</script>", "two\nlines", "[a](http://b)", "![](//c)", "a`|`b"]
)
def test_a_name_stays_in_its_cell_of_a_table(name):
    """Checked by an independent reader of Markdown."""
    markdown_it = pytest.importorskip("markdown_it")
    for shown in (md(name), code(name)):
        html = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).render(f"| a | b |\n|---|---|\n| {shown} | 1 |\n")
        assert html.count("<td>") == 2 and html.count("<tr>") == 2
        assert (
            not any(tag in html for tag in ("<script", "<a ", "<img")) and "\x1b" not in html and "\u202e" not in html
        )


def test_names_with_commas_are_told_apart():
    assert some(["a", "b", "c"], 2) == "a, b, …" and listed(["a", "b", "c"]) == "a, b and c"
    names = ["blue", "once, only", "red"]
    assert some(names) == "blue; once, only; red" and some(names, 2) == "blue; once, only; …"
    assert listed(names) == "blue; once, only; and red" and listed(names[1:]) == "once, only; and red"
