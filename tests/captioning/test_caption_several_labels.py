"""Captions of pictures with several labels: prompts and checks know all labels of a picture, and the lists stay."""

import contextlib
import hashlib
import io
import json
from pathlib import Path

import pytest
from caption_server import caption_of, serving
from caption_tools import caption, picture, prompt
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value, load_dataset
from tiny_clip import striped_dataset

from mmft_hf import load_captioned_dataset
from mmft_hf.captioning import Captioner, caption_dataset
from mmft_hf.captioning.judge.checks import CaptionChecker
from mmft_hf.captioning.write.merges import merge_captions
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError
from mmft_hf.data.label_sets import LabelSets
from mmft_hf.hub.publish import dataset_files

NAMES = ["red_thing", "green_thing", "blue_thing"]
LABELS = [[], [0], [1], [0, 1], [2], [2, 0], [1, 2], [2, 1, 0], [0]]  # not in order: sets have none


def labelled(labels=LABELS, names=NAMES, start=0, captions=None) -> Dataset:
    columns = {
        "image": [{"bytes": picture(start + i), "path": f"{i}.png"} for i in range(len(labels))],
        "label": labels,
        "place": [f"at {i}" for i in range(len(labels))],
    }
    features = {"image": Image(), "label": List(ClassLabel(names=list(names))), "place": Value("string")}
    if captions:
        columns["captions"], features["captions"] = captions, List(Value("string"))
    return Dataset.from_dict(columns, Features(features))


def told(labels, names=NAMES) -> str:
    """The class name in the prompt, written here."""
    return ", ".join(names[c] for c in sorted(labels)) or "something else"


def run(*words) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = main([str(word) for word in words])
    return code, out.getvalue()


def rows_of(folder) -> list[dict]:
    data = load_dataset(str(folder), split="train").cast_column("image", Image(decode=False))
    assert data.features["label"] == List(ClassLabel(names=NAMES))
    return list(data)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory) -> tuple[Path, list[dict], str]:
    """A captioned folder, what the server was asked, and what was printed."""
    root = tmp_path_factory.mktemp("several")
    (root / "data").mkdir()
    labelled().to_parquet(root / "data" / "train.parquet")
    labelled([[1, 0], [2]], start=50).to_parquet(root / "data" / "test.parquet")
    with serving({}, root / "log.jsonl") as server:
        words = caption(server, root / "data", root / "out", "--aspects", "visual")
        code, text = run(*words)
        assert code == 0, text
        requests = server.requests()
        code, again = run(*words)
        assert code == 0 and "Nothing to do" in again and len(server.requests()) == len(requests)
    return root / "out", requests, text


# -- caption ------------------------------------------------------------------------------------------------------------
def test_a_prompt_names_all_labels_and_the_lists_stay(captioned):
    folder, requests, text = captioned
    rows = rows_of(folder)
    assert [row["label"] for row in rows] == [sorted(own) for own in LABELS]
    assert [row["place"] for row in rows] == [f"at {i}" for i in range(len(LABELS))]
    digests = [hashlib.sha256(picture(i)).hexdigest() for i in range(len(LABELS))]
    wanted = [(sha, prompt(told(own), "visual")) for sha, own in zip(digests, LABELS, strict=True)]
    assert sorted((r["picture"], r["prompt"]) for r in requests) == sorted(wanted)
    assert [row["captions"] for row in rows] == [[caption_of(*pair)] for pair in wanted]
    test = load_dataset(str(folder), split="test")
    assert test["label"][:] == [[0, 1], [2]] and test["captions"][:] == [[], []]
    assert "  classes    3, in 8 sets of labels" in text  # those of the test split are among them
    assert "Next: mmft-hf finetune" in text and "red thing, green thing" in (folder / "captions.html").read_text()
    classes = json.loads((folder / "captions.json").read_text())["statistics"]["classes"]
    counts = {entry["label"]: (entry["images"], entry["captions"]) for entry in classes["fewest"]}
    assert counts == {
        "red_thing": (5, 5),
        "green_thing": (4, 4),
        "blue_thing": (4, 4),
    }  # each class of a picture counts


def test_the_names_of_many_labels_are_not_cut(tmp_path):
    names = [f"a thing of the kind number {i}" for i in range(12)]
    data = labelled([list(range(12))], names)
    with serving({}, tmp_path / "log.jsonl") as server:
        captioner = Captioner("openai", "m", base_url=f"{server.url}/v1")
        caption_dataset(data, captioner, run_dir=tmp_path / "run", progress=False)
        assert all(", ".join(names) in request["prompt"] for request in server.requests())


def test_classes_choose_pictures_that_have_one_of_them(captioned, tmp_path):
    data = captioned[0].parent / "data"
    words = ["caption", "--captioner", "template", "--dataset_name", data, "--output_dir", tmp_path / "out"]
    code, text = run(*words, "--classes", "blue_thing")
    assert code == 0, text
    rows = rows_of(tmp_path / "out")
    assert [bool(row["captions"]) for row in rows] == [2 in own for own in LABELS]
    assert rows[5]["captions"] == ["a photo of a red thing, blue thing."]
    code, text = run(*words, "--classes", "pink")
    assert code == 2 and "expected names among red_thing, green_thing, blue_thing, found 'pink'" in text


def test_a_dataset_in_memory_keeps_its_lists():
    split = labelled()
    found = caption_dataset(DatasetDict({"train": split}), Captioner("template"), progress=False)["train"]
    assert found.features["label"] == split.features["label"]
    assert found["label"][:] == [sorted(own) for own in LABELS]
    assert found["captions"][3] == ["a photo of a red thing, green thing."]
    wrong = split.remove_columns("label").add_column("label", [["red"]] * len(split))
    with pytest.raises(UserError, match="expected lists of classes"):
        caption_dataset(wrong, Captioner("template"), progress=False)


# -- checks -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("labels", "text", "mentions", "checks"),
    [
        ([0, 1], "A red thing stands on the left.", True, set()),
        ([0, 1], "A green thing and a red thing.", True, set()),
        ([0, 1], "A blue thing stands on the left.", False, {"label_missing", "other_class"}),
        ([0, 1], "It stands on the left.", False, {"label_missing"}),
        ([2], "A red thing beside a blue thing.", True, set()),
        ([], "An empty table, or something else.", False, set()),  # no name could be missing
        ([0], "A red thing, or something else.", True, set()),
        ([0], "Something else entirely, on a table.", False, {"label_missing"}),
    ],
)
def test_a_caption_is_checked_for_any_of_the_labels(labels, text, mentions, checks):
    sets = LabelSets.of({"data": labelled()})
    checked = CaptionChecker(sets.names).check(text, "stop", sets.sets.index(tuple(labels)), last_try=True)
    assert (checked.mentions_label, set(checked.checks)) == (mentions, checks)


# -- import, merge, refine, chats, publish ------------------------------------------------------------------------------
def test_imported_captions_keep_the_lists(captioned, tmp_path):
    file = tmp_path / "ShapeCaption.json"
    file.write_text(json.dumps({f"{i}.png": f"number {i}" for i in range(len(LABELS))}))
    words = [
        "--dataset_name",
        captioned[0].parent / "data",
        "--key_rule",
        "file_name",
        "--output_dir",
        tmp_path / "out",
    ]
    code, text = run("caption", "import", file, *words)
    assert code == 0, text
    assert [(r["label"], r["captions"]) for r in rows_of(tmp_path / "out")] == [
        (sorted(own), [f"number {i}"]) for i, own in enumerate(LABELS)
    ]


def test_merged_captions_are_joined_by_the_names_of_all_labels(captioned, tmp_path):
    turned = NAMES[::-1]
    labels = [[2 - c for c in own] for own in LABELS[::-1]]
    other = labelled(labels, turned, captions=[[f"other {i}"] for i in range(len(LABELS))])
    pictures = [{"bytes": picture(i), "path": f"{i}.png"} for i in reversed(range(len(LABELS)))]
    other = other.remove_columns("image").add_column("image", pictures, feature=Image())
    (tmp_path / "other").mkdir()
    other.to_parquet(tmp_path / "other" / "train.parquet")
    code, text = run("caption", "merge", captioned[0], tmp_path / "other", "--output_dir", tmp_path / "out")
    assert code == 0 and "its classes are in another order; they were matched by name" in text
    before = rows_of(captioned[0])
    for i, row in enumerate(rows_of(tmp_path / "out")):
        assert row["label"] == sorted(LABELS[i]) == before[i]["label"]
        assert row["captions"] == [*before[i]["captions"], f"other {len(LABELS) - 1 - i}"]


def test_a_merge_refuses_labels_that_differ():
    one = labelled([[0, 1], [2]], captions=[["a"], ["b"]])
    other = labelled([[0], [2]], captions=[["c"], ["d"]])
    with pytest.raises(UserError, match=r"expected class 'red_thing, green_thing' as in one, found 'red_thing'"):
        merge_captions({"one": one, "other": other})
    single = one.remove_columns("label").add_column("label", [0, 1], feature=ClassLabel(names=NAMES))
    with pytest.raises(UserError, match="single: expected lists of classes, as other datasets or splits have"):
        merge_captions({"one": one, "single": single})
    with pytest.raises(UserError, match=r"expected the classes of one .*found pink"):
        merge_captions({"one": one, "more": labelled([[0]], [*NAMES, "pink"], captions=[["e"]])})


def test_sets_that_read_alike_are_refused():
    with pytest.raises(
        UserError, match=r"\['a', 'b'\] and \['a, b'\].* read alike|\['a, b'\] and \['a', 'b'\].* read alike"
    ):
        LabelSets.of({"data": labelled([[0, 1], [2]], ["a", "b", "a, b"])})


def test_refined_captions_chats_and_a_published_folder_keep_the_labels(captioned, tmp_path, clip_folder):
    words = ["caption", "refine", captioned[0], "--steps", "clip_score", "--scorer", clip_folder]
    code, text = run(*words, "--scorer_is_student", "true", "--output_dir", tmp_path / "refined")
    assert code == 0, text
    before, after = rows_of(captioned[0]), rows_of(tmp_path / "refined")
    assert [(r["label"], r["captions"]) for r in before] == [(r["label"], r["captions"]) for r in after]
    assert after[3]["caption_records"][0]["scores"]
    code, text = run("caption", "report", tmp_path / "refined")
    assert code == 0, text
    code, text = run("caption", "chats", captioned[0], "--output_dir", tmp_path / "chats")
    assert code == 0, text
    lines = [json.loads(line) for line in next((tmp_path / "chats").glob("*.jsonl")).read_text().splitlines()]
    assert "red thing, green thing, blue thing" in json.dumps(lines[7])
    for captions_only in (False, True):
        files = dataset_files(captioned[0], "me/them", tmp_path / f"scratch-{captions_only}", captions_only)
        assert "3 classes" in files["README.md"].decode()


def test_a_classifier_is_trained_on_the_captioned_folder(tmp_path, clip_folder):
    (tmp_path / "data").mkdir()
    for seed, (split, images) in enumerate((("train", 48), ("validation", 24), ("test", 24))):
        striped_dataset(images, seed).to_parquet(tmp_path / "data" / f"{split}.parquet")
    words = [
        "caption",
        "--captioner",
        "template",
        "--class_template",
        "a {} in stripes",
        "--dataset_name",
        tmp_path / "data",
    ]
    code, text = run(*words, "--output_dir", tmp_path / "captions")
    assert code == 0, text
    data = load_captioned_dataset(str(tmp_path / "captions"))["train"]
    assert data[3]["captions"] == ["a red thing, green thing in stripes"]
    words = [
        "finetune",
        "--dataset_name",
        tmp_path / "captions",
        "--model_name_or_path",
        clip_folder,
        "--use_cpu",
        "true",
    ]
    code, text = run(*words, "--num_train_epochs", 0, "--disable_tqdm", "true", "--output_dir", tmp_path / "model")
    assert code == 0, text
    results = json.loads((tmp_path / "model" / "all_results.json").read_text())
    assert results["several_labels"] and results["test_mean_average_precision"] > 0.4


def test_representatives_are_chosen_among_all_pictures(clip_folder, tmp_path):
    """Each picture here has a set of labels of its own, and a share of each set would be all of them."""
    labels = [[], [0], [1], [0, 1], [2], [0, 2], [1, 2], [0, 1, 2]]
    (tmp_path / "data").mkdir()
    labelled(labels).to_parquet(tmp_path / "data" / "train.parquet")
    words = (
        "caption",
        "--captioner",
        "template",
        "--dataset_name",
        tmp_path / "data",
        "--output_dir",
        tmp_path / "out",
    )
    code, text = run(*words, "--representatives", 0.25, "--scorer", clip_folder)
    assert code == 0, text
    assert sum(bool(row["captions"]) for row in rows_of(tmp_path / "out")) == 2
