"""CONTRIBUTING.md's own words, applied to a copy of the package: a term, a head, a caption check and a benchmark method."""

import json
import re
import shutil
from pathlib import Path

import pytest
from processes import run_python

import mmft_hf

PACKAGE = Path(mmft_hf.__file__).parent
pytestmark = pytest.mark.slow
TEXT = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
EXAMPLES = re.findall(r'```python title="(\S+?)(?:, in (\w+))?"\n(.*?)```', TEXT, flags=re.DOTALL)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A folder with the package and all examples in it."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(PACKAGE, root / "mmft_hf", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    (root / "mmft_hf" / "assets").symlink_to(PACKAGE / "assets")
    for file, table, code in EXAMPLES:
        path = root / file
        if not path.exists():
            path.write_text(code)
            continue
        assert len(code.strip().splitlines()) == 1, f"{file}: more than one line"
        text = path.read_text()
        # A row follows the table's opening line; an import, the imports from the same package.
        place = rf"^{table}\b.*[({{].*$" if table else r"^from \.base import .*$"
        match = re.search(place, text, flags=re.MULTILINE)
        assert match, f"{file}: no place for the line"
        path.write_text(f"{text[: match.end()]}\n{code.rstrip()}{text[match.end() :]}")
    return root


SCRIPT = """
# What the examples do, all in one process with the copy in place of the package. Prints one line of JSON.
import contextlib, io, json, sys
from tiny_clip import build_clip, colour_dataset, colour_images
from transformers import pipeline
from mmft_hf import ImageClassifier, MMFTConfig, MMFTTrainer
from mmft_hf.captioning.judge.checks import CHECKS, TABLE, Candidate
from mmft_hf.cli import main
from mmft_hf.model.features import image_features
from mmft_hf.predict.heads import HEADS
from mmft_hf.train.terms import TERMS, Clip, SupCon

out, data_folder, *benchmark = sys.argv[1:]
printed = io.StringIO()


def term():
    model, processor = build_clip()
    args = MMFTConfig(f"{out}/term", max_steps=2, per_device_train_batch_size=8, use_cpu=True, report_to="none")
    terms = [SupCon(0.1), Clip(0.9), TERMS["alignment"](0.5)]
    trainer = MMFTTrainer(model, args, colour_dataset(8), colour_dataset(4), processor, loss=terms)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "alignment_loss" in log]
    return {"log": log, "shown": "alignment" in printed.getvalue()}


def head():
    folder = f"{out}/classifier"
    model, processor = build_clip()
    data = colour_dataset(8)
    embeds, labels = image_features(model, processor, data)
    head = HEADS["nearest_mean"].fit(embeds, labels, data.features["label"].names)
    ImageClassifier(model, processor, head).save_pretrained(folder)
    image = colour_images(1)[0][0]
    scores = {row["label"]: row["score"] for row in pipeline("mmft-image-classification", model=folder)(image)}
    again = ImageClassifier.from_pretrained(folder)
    before = len(printed.getvalue())
    code = main(["evaluate", "--model_name_or_path", folder, "--dataset_name", data_folder])
    direct = head.scores(image_features(model, processor, colour_dataset(1))[0])[0]
    return {
        "code": code, "kind": again.head.kind, "printed": printed.getvalue()[before:],
        "difference": max(abs(scores[n] - p) for n, p in zip(head.class_names, direct.tolist())),
    }


def check():
    fired = [TABLE["exclamation"].finds(Candidate(t, "stop", set(), False, 0, text=t)) for t in ("Oh!", "Oh.")]
    return {"fired": fired, "listed": "exclamation" in CHECKS}


with contextlib.redirect_stdout(printed):
    found = {f.__name__: f() for f in (term, head, check)} | {"code": main(benchmark)}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(extended, clip_folder, data_folder, tmp_path_factory):
    """What a script found that uses the examples, with the copy in place of the package; and where it wrote."""
    out = tmp_path_factory.mktemp("out")
    words = f"benchmark --model_name_or_path {clip_folder} --dataset_name {data_folder} --output_dir {out}/benchmark"
    settings = "--methods zs mmft-w05 --shots 2 --seeds 0 --num_train_epochs 1 --use_cpu true"
    command = ["-c", SCRIPT, out, data_folder, *words.split(), *settings.split()]
    printed, _ = run_python(command, cwd=extended)
    return json.loads(printed.strip().splitlines()[-1]) | {"out": out}


def test_there_is_an_example_for_every_seam():
    new = [file for file, _, _ in EXAMPLES if not (PACKAGE.parent / file).exists()]
    tables = [table for _, table, _ in EXAMPLES if table]
    assert len(new) == 2 and len(tables) == 2 and len(EXAMPLES) == 6


def test_a_term_is_trained_logged_and_shown(found):
    found = found["term"]
    log = found["log"]
    parts = 0.1 * log["supcon_loss"] + 0.9 * log["clip_loss"] + 0.5 * log["alignment_loss"]
    assert log["loss"] == pytest.approx(parts, abs=1e-3)
    assert log["alignment_loss"] > 0 and found["shown"]


def test_a_head_is_saved_and_used_everywhere(found):
    found = found["head"]
    assert found["code"] == 0 and found["kind"] == "nearest_mean"
    assert found["difference"] < 1e-6
    assert re.search(r"\d+\.\d %", found["printed"])


def test_a_check_fires_and_is_listed(found):
    assert found["check"] == {"fired": [True, False], "listed": True}


def test_a_method_runs_and_is_in_results_and_report(found):
    assert found["code"] == 0
    folder = found["out"] / "benchmark"
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert "mmft-w05" in {row["method"] for row in rows}
    assert "mmft-w05" in (folder / "report.html").read_text()
