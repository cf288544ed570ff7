"""`mmft-hf caption refine` and `caption report` as they are typed: what is written, what is left alone, what is refused."""

import hashlib
import json
import pickle
import re
import socket
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from caption_tools import dataset, picture, undecoded, written
from datasets import Dataset, DatasetDict, load_dataset
from tiny_clip import COLOURS, colour_dataset

import mmft_hf
from mmft_hf.captioning.apply import apply_steps
from mmft_hf.captioning.caption_table import CaptionTable
from mmft_hf.captioning.steps import scorer as scoring
from mmft_hf.captioning.steps.asking import answered
from mmft_hf.captioning.steps.base import Step, scored
from mmft_hf.captioning.steps.clip_score import ClipScore
from mmft_hf.captioning.steps.select import Select
from mmft_hf.captioning.steps.self_retrieval import SelfRetrieval
from mmft_hf.captioning.steps.settings import make_step
from mmft_hf.captioning.write.figures import own_figures
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.data.splits import load_captioned_dataset

RECIPES = Path(__file__).parents[2] / "recipes" / "captions" / "steps"
CHOICES = {"best_of_n": ("clip", 1), "specific": ("sr_pct", 3), "listener": ("sr_prob", 1)}
HOSTILE = "<b>red</b> | ignore this & [that](x)"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A captioned folder of 18 images with four captions each, and a validation split without captions."""
    folder = tmp_path_factory.mktemp("captions")
    data = colour_dataset(6, captions=False)
    names = list(COLOURS)
    texts = [
        [f"{names[c]} {i}", f"{'very ' * (i % 3)}bright {i}", HOSTILE if i == 0 else f"a photo, {i}", "it is there"]
        for i, c in enumerate(data["label"])
    ]
    splits = DatasetDict({"train": data.add_column("texts", texts), "validation": colour_dataset(2, 1, captions=False)})
    for name, split in splits.items():
        split.to_parquet(folder / "raw" / f"{name}.parquet")
    words = ["caption", "--captioner", "columns", "--text_columns", "texts", "--output_dir", str(folder / "captioned")]
    assert main([*words, "--dataset_name", str(folder / "raw")]) == 0
    return folder / "captioned"


@pytest.fixture
def refine(source, clip_folder, tmp_path, capsys):
    """Types `mmft-hf caption refine`; returns the exit code and what was printed."""

    def run(*words, scorer=clip_folder, output=tmp_path / "out"):
        model = ["--scorer", scorer] if scorer else []
        capsys.readouterr()
        code = main([str(w) for w in ("caption", "refine", source, "--output_dir", output, *model, *words)])
        return code, " ".join("".join(capsys.readouterr()).split())

    return run


def digests(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def score(record, name):
    return {s["name"]: s["value"] for s in record["scores"]}[name]


# -- what is written --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", CHOICES)
def test_recipes(recipe, refine, source, tmp_path):
    before = digests(source)
    code, said = refine("--steps", RECIPES / f"{recipe}.yaml")
    assert code == 0 and "Next: mmft-hf finetune" in said, said
    assert digests(source) == before
    by, keep = CHOICES[recipe]
    old, new = written(source), written(tmp_path / "out")
    dropped = 0
    for one, two in zip(old, new, strict=True):
        assert one["image"] == two["image"] and one["label"] == two["label"]
        assert [r["text"] for r in one["caption_records"]] == [r["text"] for r in two["caption_records"]]
        ranked = sorted(two["caption_records"], key=lambda r: (-score(r, by), r["aspect"], r["sample"]))
        best, others = ranked[:keep], ranked[keep:]
        assert {r["text"] for r in best} == set(two["captions"]) and len(two["captions"]) == min(keep, 4)
        assert all(r["status"] == "ok" and r["step"] is None for r in best)
        assert all(r["status"] == "dropped" and (r["step"], r["removed_by"]) == (None, "select") for r in others)
        assert all(r["score"] == score(r, by) for r in ranked)
        dropped += len(others)
    details = json.loads((tmp_path / "out" / "captions.json").read_text())
    assert sum(details["steps"][-1]["dropped"].values()) == dropped == 18 * (4 - keep)
    opened = load_dataset(str(tmp_path / "out"))
    assert opened["train"].features == opened["validation"].features and not any(opened["validation"]["captions"])


@pytest.mark.parametrize(
    ("recipe", "step", "kept"), [("cycle", "select", 66), ("representatives", "representatives", 24)]
)
def test_recipes_that_keep_a_share(recipe, step, kept, refine, tmp_path):
    """Of 24 captions of each class, nine tenths are 22; of six images, a quarter are two."""
    code, said = refine("--steps", RECIPES / f"{recipe}.yaml")
    assert code == 0, said
    rows = written(tmp_path / "out")
    records = [record for row in rows for record in row["caption_records"]]
    assert len(records) == 72 and sum(len(row["captions"]) for row in rows) == kept
    assert {r["removed_by"] for r in records if r["status"] == "dropped"} == {step}


def test_the_second_run_computes_nothing(refine, tmp_path):
    assert refine("--steps", RECIPES / "best_of_n.yaml")[0] == 0
    before = digests(tmp_path / "out")
    code, said = refine("--steps", RECIPES / "best_of_n.yaml")
    assert code == 0 and "nothing was computed" in said
    assert digests(tmp_path / "out") == before
    code, said = refine("--steps", RECIPES / "specific.yaml")
    assert code == 2 and "expected the settings of the captions there" in said
    assert digests(tmp_path / "out") == before
    assert refine("--steps", RECIPES / "specific.yaml", "--overwrite_output_dir", "true")[0] == 0
    assert {len(row["captions"]) for row in written(tmp_path / "out")} == {3}


def test_the_python_function_gives_what_the_command_writes(refine, source, clip_folder, tmp_path):
    assert refine("--steps", RECIPES / "best_of_n.yaml")[0] == 0
    data, steps = load_captioned_dataset(str(source))["train"], ["clip_score", {"select": {"by": "clip", "keep": 1}}]
    found = undecoded(mmft_hf.refine_captions(data, steps, str(clip_folder), progress=False))
    assert found == undecoded(load_dataset(str(tmp_path / "out"))["train"])
    with pytest.raises(UserError, match="scorer: expected the model that step clip_score"):
        mmft_hf.refine_captions(data, steps)
    with pytest.raises(UserError, match="expected a step, or a step with its options"):
        mmft_hf.refine_captions(data, [{"clip_score": {}, "select": {}}])


def test_captioning_does_not_replace_refined_captions(refine, source, tmp_path, capsys):
    assert refine("--steps", "clip_score")[0] == 0
    before = digests(tmp_path / "out")
    words = [
        "caption",
        "--captioner",
        "columns",
        "--text_columns",
        "texts",
        "--dataset_name",
        str(source.parent / "raw"),
    ]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    assert "expected the settings of the captions there" in capsys.readouterr().err
    assert digests(tmp_path / "out") == before


def test_scores_alone_keep_every_caption(refine, source, tmp_path):
    code, said = refine("--steps", "clip_score", "self_retrieval")
    assert code == 0, said
    assert [row["captions"] for row in written(tmp_path / "out")] == [row["captions"] for row in written(source)]


def test_a_refined_folder_is_refined_further(refine, source, clip_folder, tmp_path, capsys):
    (tmp_path / "more.yaml").write_text("steps: [select: {by: clip, keep: 2}]")
    assert refine("--steps", "clip_score")[0] == 0
    words = ["caption", "refine", tmp_path / "out", "--steps", tmp_path / "more.yaml", "--output_dir", tmp_path / "two"]
    assert main([str(word) for word in words]) == 0  # needs no scorer
    assert {len(row["captions"]) for row in written(tmp_path / "two")} == {2}
    details = json.loads((tmp_path / "two" / "captions.json").read_text())
    assert [step["name"] for step in details["steps"]] == ["clip_score", "select"]


def test_dry_run_writes_nothing(refine, tmp_path):
    code, said = refine("--steps", RECIPES / "specific.yaml", "--dry_run", "true")
    assert code == 0 and "no calls and nothing to pay for" in said and "18 images, 72 captions" in said
    assert "step 3 select (by sr_pct, keep 3)" in said
    assert not (tmp_path / "out").exists()


def test_more_processes_than_one_are_told_that_they_do_nothing(refine, monkeypatch):
    words = ("--steps", RECIPES / "specific.yaml", "--dry_run", "true")
    assert "processes refines" not in refine(*words)[1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, said = refine(*words)
    assert code == 0 and "one of the 2 processes refines, and the others end at once" in said
    monkeypatch.setenv("RANK", "1")
    assert refine(*words) == (0, "")


def test_a_run_that_was_stopped_goes_on(refine, tmp_path, monkeypatch):
    """Blocks of pictures that were encoded before a stop are not encoded again, and the result is the same."""
    assert refine("--steps", "clip_score", output=tmp_path / "whole")[0] == 0
    monkeypatch.setenv("MMFT_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(scoring, "BLOCK", 5)
    encode, cached = scoring.encode_pictures_once, []

    def stopping(model, processor, view, how):
        if len(cached) == 2:
            raise KeyboardInterrupt
        return counting(model, processor, view, how)

    def counting(model, processor, view, how):
        found = encode(model, processor, view, how)
        cached.append(found.hit)
        return found

    monkeypatch.setattr(scoring, "encode_pictures_once", stopping)
    code, said = refine("--steps", "clip_score")
    assert code == 3 and "To continue, type: mmft-hf caption refine" in said
    assert not list((tmp_path / "out").rglob("*.parquet"))
    monkeypatch.setattr(scoring, "encode_pictures_once", counting)
    cached.clear()
    assert refine("--steps", "clip_score")[0] == 0
    assert cached == [True, True, False, False]
    whole, continued = written(tmp_path / "whole"), written(tmp_path / "out")
    for one, two in zip(whole, continued, strict=True):
        for a, b in zip(one["caption_records"], two["caption_records"], strict=True):
            assert score(a, "clip") == pytest.approx(score(b, "clip"), abs=1e-6)


def test_row_order_changes_no_bit(source, clip_folder):
    data = load_captioned_dataset(str(source))["train"]
    found = []
    for rows in (data, data.shuffle(seed=3)):
        table = CaptionTable("x", rows)
        apply_steps(
            table, [ClipScore(strata=4), SelfRetrieval(listener=3)], scoring.Scorer(str(clip_folder), table.images())
        )
        found.append({row["image_sha256"]: row["caption_records"] for row in undecoded(table.dataset())})
    assert found[0] == found[1]


def test_without_steps_nothing_changes_not_a_byte(source, tmp_path):
    data = load_captioned_dataset(str(source))["train"]
    table = CaptionTable("x", data)
    assert apply_steps(table, [], None) == []
    assert undecoded(table.dataset()) == undecoded(data) and table.dataset().column_names == data.column_names
    for name, one in (("before", data), ("after", table.dataset())):
        one.to_parquet(tmp_path / name)
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()


def test_steps_are_pure_functions_that_need_no_network(source, clip_folder, monkeypatch):
    """Twice the same bytes, from every step that asks nobody, with all sockets blocked."""

    def blocked(*_):
        raise AssertionError("a step without questions opened a socket")

    table = CaptionTable("x", load_captioned_dataset(str(source))["train"])
    scorer = scoring.Scorer(str(clip_folder), table.images())
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, blocked)
    options = {"select": {"by": "clip", "keep": 2}, "representatives": {"share": 0.5}, "cycle": {"reassign": True}}
    made = [make_step(name, options.get(name, {})) for name in ("clip_score", "self_retrieval", "cycle")]
    made += [make_step(name, options[name]) for name in ("select", "representatives")]
    made += [make_step("verify", {"claims": "clauses", "by": "scorer", "then": "drop", "trust": 0.0})]
    assert not any(step.roles() for step in made)
    for step in made:
        rows = table.rows
        apply_steps(table, [step], scorer, allow_empty_classes=True)
        fitted = step.fit(rows, scorer)
        found = [answered(step.ask(row, fitted), blocked) for row in rows]
        once, again = (pickle.dumps([*step.apply(rows, scorer, found)]) for _ in range(2))
        assert once == again, step.name


@pytest.mark.slow
def test_memory_hardly_grows_with_the_number_of_captions():
    """Records take 6.5 KB each in memory. Those of all rows are never there together: what remains is a fifth of that."""
    peaks = []
    for images in (300, 900):
        captions = [[f"text {k} of image {i}, which is a little longer" for k in range(4)] for i in range(images)]
        data = dataset([picture(i) for i in range(images)]).add_column("captions", captions)
        tracemalloc.start()
        table = CaptionTable("x", data)
        apply_steps(table, [Scored(), Select("s", keep=2), Scored("t"), Select("t", keep=1)], None)
        refined = table.dataset()
        own_figures(refined)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (4 * 600) < 1300


@dataclass(frozen=True)
class Scored(Step):
    """A step that gives each caption its length as a score."""

    score: str = "s"
    name: ClassVar[str] = "scored"
    about: ClassVar[str] = "scores"

    def writes(self):
        return (self.score,)

    def needs_scorer(self):
        return False

    def apply(self, rows, scorer, found=()):
        return scored(rows, {(i, k): {self.score: i + k} for i, row in enumerate(rows) for k in row.captions()})


def test_a_folder_without_the_new_fields_opens(source, tmp_path, clip_folder, capsys):
    """As the first edition wrote it: records without scores and step."""
    data = load_dataset(str(source))
    (tmp_path / "old").mkdir()
    for name, split in data.items():
        rows = undecoded(split)
        for row in rows:
            row["caption_records"] = [
                {k: v for k, v in r.items() if k not in ("scores", "step")} for r in row["caption_records"]
            ]
        features = split.features.copy()
        kept = {k: v for k, v in features["caption_records"].feature.items() if k not in ("scores", "step")}
        features["caption_records"] = type(features["caption_records"])(kept)
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "old" / f"{name}.parquet")
    words = ["caption", "refine", tmp_path / "old", "--steps", RECIPES / "best_of_n.yaml", "--scorer", clip_folder]
    assert main([*map(str, words), "--output_dir", str(tmp_path / "new")]) == 0
    assert {len(row["captions"]) for row in written(tmp_path / "new")} == {1}


# -- the report -------------------------------------------------------------------------------------------------------
def test_page_card_and_console_have_the_figures(refine, source, tmp_path, capsys):
    assert refine("--steps", RECIPES / "best_of_n.yaml")[0] == 0
    out = tmp_path / "out"
    rows = written(out)
    kept = [r for row in rows for r in row["caption_records"] if r["status"] == "ok"]
    everything = [r for row in rows for r in row["caption_records"]]
    clip = [f"{sum(score(r, 'clip') for r in some) / len(some):.4g}" for some in (everything, kept)]
    words = [
        len(set(w)) / len(w)
        for some in (everything, kept)
        if (w := [x for r in some for x in re.findall(r"\w+", r["text"])])
    ]
    shared = [sum(n > 1 for n in Counter(r["text"] for r in some).values()) for some in (everything, kept)]
    expected = [
        ("captions", "72", "18"),
        ("captions per image", "4", "1"),
        ("mean clip", *clip),
        ("different words, as a share of all words", *(f"{round(w, 4):.4g}" for w in words)),
        ("texts shared by several images", *map(str, shared)),
    ]
    capsys.readouterr()
    assert main(["caption", "report", str(out)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    page, card = (out / "refined.html").read_text(), (out / "README.md").read_text()
    for name, before, after in expected:
        assert f"{name} {before} {after}" in printed
        assert f"<tr><th>{name}</th><td>{before}</td><td>{after}</td></tr>" in page
        assert f"| {name} | {before} | {after} |" in card
    assert "\n\n| figure | before | after |" in card and "\n\nImages with what was kept" in card
    assert "## Steps, in order" in card and "1. `clip_score`" in card and "2. `select` (by: clip, keep: 1)" in card
    assert "<b>red" not in page and "&lt;b&gt;red&lt;/b&gt;" in page
    assert "dropped by select" in page and "<script" not in page and "http" not in page.replace("http-equiv", "")


def test_comparison_with_another_dataset(refine, source, tmp_path, capsys):
    assert refine("--steps", RECIPES / "best_of_n.yaml")[0] == 0
    capsys.readouterr()
    assert main(["caption", "report", str(tmp_path / "out"), "--compare", str(source)]) == 0
    assert "captions 72 18" in " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "out" / "compared.html").read_text()
    assert page.count("<dt>gone") == 3 * 12 and page.count("<dt>kept") == 12 and "<dt>new" not in page
    other = tmp_path / "other"
    colour_dataset(3, seed=9).to_parquet(other / "train.parquet")
    assert main(["caption", "report", str(tmp_path / "out"), "--compare", str(other)]) == 2
    assert "expected captions of the images of" in capsys.readouterr().err


def test_what_cannot_be_reported(source, tmp_path, capsys):
    assert main(["caption", "report", str(source)]) == 2
    assert "which no step has changed" in capsys.readouterr().err
    assert main(["caption", "report", str(tmp_path)]) == 2
    assert main(["caption", "report"]) == 2
    assert "expected one captioned folder, found none" in capsys.readouterr().err


@pytest.mark.slow
def test_another_model_judges_what_one_has_chosen(refine, clip_folder, tmp_path):
    code, said = refine("--steps", RECIPES / "best_of_n.yaml", "--report_scorer", clip_folder)
    assert code == 2 and "expected another model than --scorer" in said
    assert refine("--steps", RECIPES / "best_of_n.yaml", "--report_scorer", "builtin/photo")[0] == 2  # the student
    code, said = refine("--steps", RECIPES / "best_of_n.yaml", "--report_scorer", "builtin/tiny-clip")
    assert code == 0, said
    card = (tmp_path / "out" / "README.md").read_text()
    before, after = re.search(r"\| mean clip by builtin/tiny-clip \| (\S+) \| (\S+) \|", card).groups()
    rows, table = written(tmp_path / "out"), CaptionTable("out", load_captioned_dataset(str(tmp_path / "out"))["train"])
    judge = scoring.Scorer("builtin/tiny-clip", table.images())
    order = {row.image_sha256: i for i, row in enumerate(table.rows)}
    found = {"ok": [], "dropped": []}
    for row in rows:
        image = judge.images()[order[row["image_sha256"]]]
        for record in row["caption_records"]:
            found[record["status"]].append(float(judge.texts([record["text"]])[0] @ image))
    every = found["ok"] + found["dropped"]
    assert float(before) == pytest.approx(sum(every) / len(every), rel=1e-3)
    assert float(after) == pytest.approx(sum(found["ok"]) / len(found["ok"]), rel=1e-3)
    assert "`builtin/tiny-clip` chose nothing" in card and "Vendi score" in card


# -- what is refused --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "clip_scor"], "Did you mean 'clip_score'"),
        ([], "--steps: expected one or more of clip_score, self_retrieval"),
        (["--steps", "clip_score", "--split", "test"], "expected the split to train on, found 'test'"),
        (["--steps", "clip_score", "--split", "validation"], "Only training captions are refined"),
        (["--steps", "clip_score", "--train_split", "validation"], "Only training captions are refined"),
        (["--steps", "clip_score", "--classes", "red thing"], "Leave --classes out"),
        (["--steps", "clip_score", "--group_column", "labl"], "Did you mean 'label'"),
        (["--steps", "clip_score", "--shots", "2"], "Leave --shots out"),
        (["--steps", "none.yaml"], "expected a YAML file, but no such file"),
    ],
)
def test_bad_input(refine, tmp_path, words, said):
    code, found = refine(*words)
    assert code == 2 and said in found, found
    assert not (tmp_path / "out").exists()


def test_the_student_is_no_scorer_unless_that_is_typed(refine, clip_folder, tmp_path):
    code, said = refine("--steps", "clip_score", "--model_name_or_path", clip_folder)
    assert code == 2 and "a model flatters what it learns from" in said
    assert refine("--steps", "clip_score", scorer="builtin/photo")[0] == 2  # what finetune trains by default
    code, said = refine("--steps", "clip_score", scorer=None)
    assert code == 2 and "expected the model that step clip_score scores captions with" in said
    words = ("--model_name_or_path", clip_folder, "--scorer_is_student", "true")
    assert refine("--steps", "clip_score", *words)[0] == 0
    assert "the model that will be trained itself" in (tmp_path / "out" / "README.md").read_text()


def test_a_class_that_would_lose_its_last_caption_stops_the_run(refine, tmp_path):
    (tmp_path / "all.yaml").write_text("steps: [clip_score, select: {by: clip, above: 2}]")
    code, said = refine("--steps", tmp_path / "all.yaml")
    assert code == 2 and "would lose the last one" in said and "Nothing was written" in said
    assert not list((tmp_path / "out").rglob("*.parquet"))


@pytest.mark.parametrize("place", ["", "inside"])
def test_the_source_is_never_written_to(refine, source, place):
    before = digests(source)
    code, said = refine("--steps", "clip_score", output=source / place)
    assert code == 2 and "which is only read" in said
    assert digests(source) == before


def test_a_plan_imports_no_torch():
    code = "import sys, mmft_hf.commands.caption.refining; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_unreadable_copied_and_uncaptioned_images_pass(clip_folder, tmp_path, capsys):
    """A picture that cannot be read keeps its captions without a score, a copy has the scores of its picture."""
    rows = undecoded(colour_dataset(2))
    rows += [dict(rows[0]), {**rows[1], "captions": []}]
    rows[4] = {**rows[4], "image": {"bytes": b"no picture", "path": None}}
    (tmp_path / "in").mkdir()
    Dataset.from_list(rows, features=colour_dataset(1).features).to_parquet(tmp_path / "in" / "train.parquet")
    (tmp_path / "a.yaml").write_text("steps: [clip_score, self_retrieval: {listener: 2}, select: {by: clip, keep: 1}]")
    words = ["caption", "refine", tmp_path / "in", "--steps", tmp_path / "a.yaml", "--scorer", clip_folder]
    assert main([*map(str, words), "--output_dir", str(tmp_path / "out")]) == 0
    assert " 2 1 clip_score" in " ".join(capsys.readouterr().out.split())  # the two captions without a score
    found = written(tmp_path / "out")
    assert [len(row["captions"]) for row in found] == [1, 1, 1, 1, 2, 1, 1, 0]
    # The other images of the class of row 1 are its copy and the one that cannot be read.
    assert not any(s["name"] == "sr_rank" for r in found[1]["caption_records"] for s in r["scores"])
    assert found[4]["image"]["bytes"] == b"no picture" and not any(r["scores"] for r in found[4]["caption_records"])
    for one, two in zip(found[0]["caption_records"], found[6]["caption_records"], strict=True):
        assert one["status"] == two["status"] and one["text"] == two["text"]
        values = [{s["name"]: s["value"] for s in r["scores"]} for r in (one, two)]
        assert values[0] == pytest.approx(values[1], abs=1e-6)  # sums of the same numbers in another order


def test_a_report_with_further_metrics(refine, clip_folder, tmp_path, capsys):
    assert refine("--steps", RECIPES / "best_of_n.yaml")[0] == 0

    def report(*words):
        capsys.readouterr()
        code = main([str(word) for word in ("caption", "report", tmp_path / "out", "--metrics", *words)])
        return code, " ".join("".join(capsys.readouterr()).split())

    code, said = report("vendi", "clip@max_2", "--scorer", clip_folder)
    assert code == 0 and "captions over images (Vendi)" in said, said
    assert "images with fewer than 2 captions with clip 0 18" in said
    before, after = re.search(r"best clip of 2 captions (\S+) (\S+)", said).groups()
    assert float(before) < 1 and after == "–"  # one caption of each image is left
    assert "captions over images (Vendi)" in (tmp_path / "out" / "refined.html").read_text()
    code, said = report("clip@max_1")
    assert code == 0 and "best clip of 1 captions" in said
    code, said = report("sce")
    assert code == 2 and "--scorer: expected the model that --metrics compares" in said
    code, said = report("vendy", "--scorer", clip_folder)
    assert code == 2 and "Did you mean 'vendi'" in said
