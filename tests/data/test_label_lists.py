"""Several labels per picture: where they come from, how splits and few-shot subsets are drawn, and what a batch holds."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from data_tools import save_pictures, write_csv, write_jsonl
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from test_labels import PNG, loaded
from tiny_clip import striped_dataset

from mmft_hf.benchmark.run.arguments import BenchmarkArguments, BenchmarkData
from mmft_hf.benchmark.run.workflow import run_benchmark
from mmft_hf.core.arguments import DataArguments, ModelArguments
from mmft_hf.core.errors import UserError
from mmft_hf.data.identical import find_identical
from mmft_hf.data.join import join_captions
from mmft_hf.data.labels import has_several, images_per_class, labels_of
from mmft_hf.data.sampling import IGNORED, few_shot_split, hold_out
from mmft_hf.data.splits import load_splits, load_test_split
from mmft_hf.data.views import ImageView, TextView, TrainingView, check_dataset
from mmft_hf.model.collator import MMFTDataCollator
from mmft_hf.train.config import MMFTConfig

LISTS = [["red", "round"], ["round"], [], ["red", "red"], ["big", "round", "red"], ["big"]] * 3


def sets(dataset, names):
    """The labels of each row by name."""
    return [{names[c] for c in row} for row in dataset["label"][:]]


def lists(labels, kind=None):
    kind = kind or List(Value("string"))
    data = Dataset.from_dict({"image": [PNG] * len(labels)}, Features({"image": Image()}))
    values = pa.array(labels, Features({"label": kind}).arrow_schema.field(0).type)
    return data.add_column("label", values, feature=kind)


# -- where labels are read ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["jsonl", "parquet", "classes", "csv", "folder"])
def test_lists_of_labels_are_read_from_any_table(form, tmp_path):
    pictures = sorted(save_pictures(tmp_path / "pictures", 6).rglob("*.png"))
    rows = [{"image": str(p), "label": own} for p, own in zip(pictures, LISTS, strict=True)]
    options = {}
    if form == "jsonl":
        name = write_jsonl(tmp_path / "rows.jsonl", rows)
    elif form == "csv":
        cells = [";".join(row["label"]) or ";" for row in rows]
        name = write_csv(tmp_path / "rows.csv", [row | {"label": c} for row, c in zip(rows, cells, strict=True)])
        options = {"label_separator": ";"}
    elif form == "folder":
        root = tmp_path / "pictures"
        write_jsonl(
            root / "metadata.jsonl",
            [{"file_name": str(p.relative_to(root)), "label": r["label"]} for p, r in zip(pictures, rows, strict=True)],
        )
        name = root
    else:
        name = tmp_path / "rows.parquet"
        columns = {"image": [str(p) for p in pictures], "label": LISTS}
        kind = Value("string")
        if form == "classes":  # in an order that is the data's own
            kind = ClassLabel(names=["round", "red", "big"])
            columns["label"] = [[kind.str2int(word) for word in own] for own in LISTS]
        Dataset.from_dict(columns, Features({"image": Value("string"), "label": List(kind)})).to_parquet(name)
    splits = load_splits(DataArguments(str(name), validation_size=0.2, **options))
    assert splits.several_labels
    assert splits.class_names == (["round", "red", "big"] if form == "classes" else ["big", "red", "round"])
    found = {}
    for split in (splits.train, splits.validation, splits.test):
        files = [row["path"] for row in split.cast_column("image", Image(decode=False))["image"]]
        found |= dict(zip(files, sets(split, splits.class_names), strict=True))
        assert all(row == sorted(set(row)) for row in split["label"])  # each class once, in order
    assert found == {str(p): set(own) for p, own in zip(pictures, LISTS, strict=True)}


def test_files_with_other_classes_are_joined_by_name(tmp_path):
    for name, names, labels in (
        ("train-0", ["a", "b"], [[0, 1], [1]] * 3),
        ("train-1", ["b", "c"], [[0], [0, 1]] * 3),
        ("test-0", ["c", "b", "a"], [[0, 2], []]),
    ):
        kind = Features({"image": Image(), "label": List(ClassLabel(names=names))})
        Dataset.from_dict({"image": [PNG] * len(labels), "label": labels}, kind).to_parquet(
            tmp_path / f"{name}.parquet"
        )
    splits = load_splits(DataArguments(str(tmp_path)))
    assert splits.class_names == ["a", "b", "c"]
    seen = sets(splits.train, splits.class_names) + sets(splits.validation, splits.class_names)
    assert sorted(map(sorted, seen)) == sorted([["a", "b"], ["b"], ["b"], ["b", "c"]] * 3)
    assert sets(splits.test, splits.class_names) == [{"a", "c"}, set()]
    known = load_test_split(DataArguments(str(tmp_path)), ["c", "a", "b", "d"])
    assert sets(known, ["c", "a", "b", "d"]) == [{"a", "c"}, set()]


def test_a_text_is_one_label_unless_a_separator_is_typed():
    texts = Dataset.from_dict({"image": [PNG] * 6}, Features({"image": Image()})).add_column("label", ["a, b", "c"] * 3)
    assert loaded(texts).class_names == ["a, b", "c"]
    splits = loaded(texts, label_separator=",")
    assert splits.class_names == ["a", "b", "c"] and sets(splits.train, splits.class_names) == [{"a", "b"}, {"c"}] * 3


def test_an_empty_separator_is_refused():
    texts = Dataset.from_dict({"image": [PNG] * 6}, Features({"image": Image()})).add_column("label", ["a", "c"] * 3)
    with pytest.raises(UserError, match="label_separator: expected what stands between the labels"):
        loaded(texts, label_separator="")


def test_two_images_of_a_class_are_too_few_for_both_held_out_splits():
    two = Dataset.from_dict({"image": [PNG] * 4}, Features({"image": Image()})).add_column(
        "label", ["a", "a", "b", "b"]
    )
    with pytest.raises(UserError, match="no class of 'train' has two images beside those held out for the test"):
        load_splits(DataArguments(), DatasetDict(train=two))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["a", "b", "a;b"], "'a;b' may be several labels in one text. If they are, type --label_separator ';'"),
        ([";", "a", "a;b", "b"], "such as 'a;b' may be"),  # not the empty list
        (["red|big", "red|small", "big|small"], "type --label_separator '|'"),
        (["['a', 'b']", "['a']"], "look like lists written as text"),
        (["Paris, France", "Rome, Italy"], ""),
        (["a, b", "c"], ""),
    ],
)
def test_texts_that_look_like_several_labels_are_told_and_not_split(labels, told):
    texts = Dataset.from_dict({"image": [PNG] * len(labels)}, Features({"image": Image()})).add_column("label", labels)
    splits = loaded(texts)
    assert splits.class_names == sorted(labels)
    assert [note for note in splits.notes if "--label_separator" in note or "several" in note] == (
        [note for note in splits.notes if told in note] if told else []
    )
    assert not told or any(told in note for note in splits.notes)


def test_lists_of_one_label_each_are_told():
    assert any("exactly one" in note for note in loaded(lists([["a"], ["b"]])).notes)
    assert not any("exactly one" in note for note in loaded(lists([["a"], ["b"], []])).notes)


def test_numbers_in_lists_take_typed_names():
    numbers = lists([[0, 2], [1]] * 4, List(Value("int64")))
    splits = loaded(numbers, class_names=["a", "b", "c"])
    assert sets(splits.train, splits.class_names) == [{"a", "c"}, {"b"}] * 4
    with pytest.raises(UserError, match="expected class names, found plain numbers"):
        loaded(numbers)


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([["a"], ["b", None]], Value("string"), r"row 1: expected a class in each entry of the list"),
        ([["a"], ["b"], ["", "a"]], Value("string"), r"row 2: expected a class in each entry"),
        ([["a"], None, ["b"]], Value("string"), r"row 1: expected a class, found none; 1 of 3 rows"),
        ([[0, 1], [0], [1, 7]], Value("int64"), r"row 2: label 7 is outside the class list"),
        ([[0.5], [1.0]], Value("float64"), "expected lists of class names or of whole numbers"),
        ([[["a"]], [["b"]]], List(Value("string")), "expected lists of class names"),
    ],
)
def test_lists_that_hold_no_classes_are_refused_by_row(labels, kind, message):
    with pytest.raises(UserError, match=message):
        loaded(lists(labels, List(kind)), class_names=["x", "y"] if kind == Value("int64") else None)


def test_missing_lists_are_left_out_on_request_and_empty_ones_stay():
    splits = loaded(lists([["a"], None, ["b"], []] * 2), on_missing_label="skip")
    assert sets(splits.train, splits.class_names) == [{"a"}, {"b"}, set()] * 2


def test_lists_in_one_split_and_single_labels_in_another_are_refused():
    single = Dataset.from_dict({"image": [PNG] * 2}, Features({"image": Image()})).add_column("label", ["a", "b"])
    with pytest.raises(UserError, match=r"expected lists of labels, as in .*'train'.* found one label per picture"):
        loaded(lists([["a"], ["b"]]), test=single)


def test_verbs_for_single_labels_refuse_lists(tmp_path):
    data = tmp_path / "rows.parquet"
    striped_dataset(12).to_parquet(data)
    with pytest.raises(UserError, match="benchmark: expected one class for each picture"):
        run_benchmark(
            BenchmarkArguments(methods=["zs"]),
            ModelArguments("builtin/tiny-clip"),
            BenchmarkData(str(data)),
            MMFTConfig(output_dir=str(tmp_path / "benchmark")),
        )


def test_captions_are_joined_where_a_class_is_shared():
    import hashlib

    images = lists([["a", "b"], ["c"], []], List(Value("string")))
    images = loaded(images).train.cast_column("image", Image(decode=False))
    digest = hashlib.sha256(PNG["bytes"]).hexdigest()
    texts = Dataset.from_dict(
        {"image_sha256": [digest] * 3, "captions": [["of a"], ["of c"], ["of any"]], "label": ["a", "c", None]}
    )
    joined, _ = join_captions(images, DatasetDict({"train": texts}), "texts")
    assert joined["captions"][:] == [["of a", "of any"], ["of c", "of any"], ["of any"]]


def test_identical_pictures_with_other_labels_are_told():
    data = loaded(lists([["a", "b"], ["b"], []])).train
    first = find_identical({"train": data}).labels[0]
    assert first["labels"] == ["a, b", "b"]


# -- subsets -------------------------------------------------------------------------------------------------------------
def random_labels(rows=300, classes=6, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.random((rows, classes)) < np.array([0.5, 0.3, 0.2, 0.1, 0.04, 0.02])[:classes]).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
def test_shots_give_each_class_its_images_and_draw_the_rarest_first(seed):
    labels = random_labels()
    chosen = few_shot_split(labels, 4, seed)
    counts = labels[chosen].sum(axis=0)
    assert (counts >= np.minimum(4, labels.sum(axis=0))).all() and chosen == sorted(set(chosen))
    assert (labels[chosen].sum(axis=1) == 0).sum() == 4  # pictures of no class
    rare = int(labels.sum(axis=0).argmin())
    assert counts[rare] == 4  # nothing was drawn before it
    # Without counting what other classes have brought it would be 4 for each class, and 4 for none.
    assert len(chosen) < 4 * 7
    assert few_shot_split(labels, 4, seed) == chosen != few_shot_split(labels, 4, seed + 7)


@pytest.mark.parametrize("seed", range(3))
def test_held_out_rows_keep_the_shares_of_the_classes(seed):
    labels = random_labels()
    rest, held = hold_out(labels, 0.2, seed)
    assert sorted(rest + held) == list(range(300))
    shares = labels[held].sum(axis=0) / labels.sum(axis=0)
    assert (abs(shares - 0.2) < 0.12).all()
    empty = labels.sum(axis=1) == 0
    assert abs(empty[held].sum() / empty.sum() - 0.2) < 0.05


def test_holding_out_never_takes_the_last_image_of_a_class():
    # Classes 0 and 1 share their rows with two rare classes, each of which gives one away.
    labels = np.array([[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]], dtype=np.float32)
    for seed in range(20):
        rest, held = hold_out(labels, 0.5, seed)
        assert held and (labels[rest].sum(axis=0) > 0).all()


# -- views and batches ---------------------------------------------------------------------------------------------------
def test_views_give_a_row_of_ones_and_zeros_and_texts_join_the_names(clip):
    _, processor = clip
    data = check_dataset("train_dataset", striped_dataset(8, captions=True))
    names = data.features["label"].feature.names
    view = TrainingView(data, TextView(names), crop_min_area=1)
    rows = [view[i] for i in range(8)]
    assert rows[3]["text"] == "a photo of a red thing, green thing. red t and green no 3"
    assert rows[0]["text"] == "a photo of a something else. no 0"
    batch = MMFTDataCollator(processor)([*rows, view[-1]])  # -1: padding
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"][:8].tolist() == [[float((i >> c) % 2) for c in range(3)] for i in range(8)]
    assert batch["labels"][8].tolist() == [IGNORED] * 3
    assert (labels_of(data) == batch["labels"][:8].numpy()).all()
    assert images_per_class(data).tolist() == [4, 4, 4] and has_several(data)


def test_a_bad_picture_is_no_example(clip):
    from data_tools import with_bad_picture

    _, processor = clip
    view = ImageView(with_bad_picture(2, striped_dataset(4)), on_bad_image="skip")
    batch = MMFTDataCollator(processor)([view[i] for i in range(4)])
    assert batch["labels"][2].tolist() == [IGNORED] * 3 and batch["labels"][1].tolist() == [1, 0, 0]


def test_evaluation_data_are_matched_by_name():
    data = striped_dataset(8)
    names = data.features["label"].feature.names
    turned = check_dataset("eval_dataset", data, names[::-1])
    assert (labels_of(turned) == labels_of(data)[:, ::-1]).all()
    with pytest.raises(UserError, match="label 'blue thing' is outside"):
        check_dataset("eval_dataset", data, names[:2])


@pytest.mark.parametrize(("label", "found"), [(None, "no list"), ([5], "the label 5")])
def test_the_trainer_refuses_rows_that_hold_no_list_of_classes(label, found):
    kind = List(ClassLabel(names=["a", "b"]))
    data = Dataset.from_dict({"image": [PNG] * 2}, Features({"image": Image()}))
    data = data.add_column("label", pa.array([[0], label], pa.list_(pa.int64())), feature=kind)
    with pytest.raises(UserError, match=f"row 1: expected a list of classes from 0 to 1, found {found}"):
        check_dataset("train_dataset", data)
