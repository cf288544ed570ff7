"""Labels are matched by the names of their classes, whatever numbers a file, split or dataset gives them."""

import io
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, config
from huggingface_hub import constants
from PIL import Image as PILImage
from tiny_clip import colour_dataset

from mmft_hf import caption_dataset, load_captioned_dataset
from mmft_hf.captioning.arguments import CaptionArguments
from mmft_hf.captioning.workflow import CaptionWorkflow
from mmft_hf.core.arguments import DataArguments
from mmft_hf.core.errors import UserError
from mmft_hf.data.hub_data import check_hub_data
from mmft_hf.data.join import join_captions
from mmft_hf.data.labels import in_order
from mmft_hf.data.splits import load_splits, load_test_split
from mmft_hf.data.views import TextView, TrainingView, check_dataset, text_rows

buffer = io.BytesIO()
PILImage.new("RGB", (2, 2)).save(buffer, "PNG")
PNG = {"bytes": buffer.getvalue(), "path": None}
CAFES = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]


def rows(labels, names=None, truth=None):
    """A dataset with these labels: numbers with `names`, or texts or numbers without."""
    values = [names.index(label) if names and isinstance(label, str) else label for label in labels]
    kind = ClassLabel(names=names) if names else None
    data = Dataset.from_dict({"image": [PNG] * len(values)}, Features({"image": Image()}))
    if names:
        return data.add_column("label", pa.array(values, pa.int64()), feature=kind).add_column("truth", truth or labels)
    return data.add_column("label", values).add_column("truth", [str(t) for t in truth or labels])


def loaded(train, test=None, validation=None, **options):
    parts = {"train": train, "validation": validation or train, "test": test or train}
    return load_splits(DataArguments(**options), DatasetDict(parts))


def wrong(splits, spelt=lambda name: name):
    """Rows whose class is not the one that their column `truth` tells."""
    parts = (splits.train, splits.validation, splits.test)
    pairs = [
        (splits.class_names[label], truth) for d in parts for label, truth in zip(d["label"], d["truth"], strict=True)
    ]
    return [pair for pair in pairs if pair[0] != spelt(pair[1])]


ABC, CBA = ["apple", "kiwi", "plum"], ["plum", "kiwi", "apple"]


# -- other numbers elsewhere --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "test",
    [
        rows(ABC, CBA),
        rows(["apple", "plum"], ["apple", "plum"]),
        rows(ABC),
        rows(["plum"], ["melon", "plum"]),  # a name that no row has
    ],
)
def test_splits_in_memory_are_joined_by_name(test):
    splits = loaded(rows(ABC * 2, ABC), test)
    assert splits.class_names == ABC and wrong(splits) == []
    assert splits.test.features["label"].names == ABC


def test_splits_in_memory_have_their_names_in_any_case_of_letters():
    data = DatasetDict({"VAL": rows(CBA), "Test": rows(CBA * 2), "Train": rows(ABC * 3), "test_extra": rows(ABC)})
    splits = load_splits(DataArguments(dataset_name="memory"), data)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [9, 3, 6]
    assert splits.class_names == ABC


def test_a_class_that_training_lacks_is_refused_by_row():
    with pytest.raises(
        UserError, match=r"split 'test', row 1: label 'pear' is outside the class list .* Correct the row"
    ):
        loaded(rows(ABC, ABC), rows(["plum", "pear"], ["plum", "pear"]))
    with pytest.raises(UserError, match=r"row 0: label 'plums' .*Did you mean 'plum'"):
        loaded(rows(ABC, ABC), rows(["plums"]))


def write(folder, name, labels, names=None, typed=True):
    """A parquet file; without `typed` its numbers have no names."""
    data = rows(labels, names)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if typed:
        data.to_parquet(path)
    else:
        pq.write_table(data.data.table.replace_schema_metadata(None), path)
    return path


@pytest.mark.parametrize(
    "places",
    [
        "train-0.parquet train-1.parquet test.parquet",
        "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet data/test-00000-of-00001.parquet",
    ],
)
def test_shards_and_splits_of_a_folder_are_joined_by_name(places, tmp_path):
    one, two, test = places.split()
    write(tmp_path, one, ABC * 2, ABC)
    write(tmp_path, two, [*CBA, "pear"], [*CBA, "pear"])
    write(tmp_path, test, ["pear", "apple"], ["pear", "apple"])
    splits = load_splits(DataArguments(dataset_name=str(tmp_path)))
    assert splits.class_names == [*ABC, "pear"] and wrong(splits) == []
    known = load_test_split(DataArguments(dataset_name=str(tmp_path)), ["pear", *CBA])
    assert known["label"][:] == [0, 3]


def test_numbers_beside_names_are_refused_and_names_beside_names_are_not(tmp_path):
    write(tmp_path, "train.parquet", ABC, ABC)
    write(tmp_path, "test.parquet", ABC, CBA, typed=False)
    with pytest.raises(
        UserError, match=r"test.parquet, column 'label': expected the names of classes, as .*train.parquet has them"
    ):
        load_splits(DataArguments(dataset_name=str(tmp_path)))
    write(tmp_path, "test.parquet", CBA)
    for split in load_captioned_dataset(str(tmp_path)).values():
        assert [split.features["label"].names[label] for label in split["label"]] == split["truth"][:]
    write(tmp_path, "test.parquet", [-1, -1])  # as challenges have it
    with pytest.raises(UserError, match="row 0: expected a class, found none"):
        load_splits(DataArguments(dataset_name=str(tmp_path), test_split="test"))


def test_names_of_the_card_hold_for_files_without_their_own(tmp_path):
    write(tmp_path, "train.parquet", CBA, CBA, typed=False)
    write(tmp_path, "test.parquet", ABC, ABC)
    names = "".join(f"          '{i}': {name}\n" for i, name in enumerate(CBA))
    card = "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n      class_label:\n        names:\n"
    (tmp_path / "README.md").write_text(f"{card}{names}---\n")
    data = load_captioned_dataset(str(tmp_path))
    for split in data.values():
        assert [split.features["label"].names[label] for label in split["label"]] == split["truth"][:]


# -- names that the user types -----------------------------------------------------------------------------------------
def test_own_names_in_any_order_are_matched_by_name():
    for train in (rows(ABC * 2, ABC), rows(ABC * 2)):
        splits = loaded(train, class_names=["kiwi", "plum", "apple"])
        assert splits.class_names == ["kiwi", "plum", "apple"] and wrong(splits) == []


NUMBERS = [str(n) for n in range(11)]
WORDS = [f"w{n}" for n in range(11)]


@pytest.mark.parametrize(
    "train", [rows(NUMBERS), rows(NUMBERS, sorted(NUMBERS)), rows(list(range(11))), rows([float(n) for n in range(11)])]
)
def test_name_k_is_that_of_number_k(train):
    splits = loaded(train, class_names=WORDS)
    assert wrong(splits, lambda truth: WORDS[int(float(truth))]) == []


@pytest.mark.parametrize("kind", [str, int, float])
def test_names_of_numbers_that_count_from_1(kind):
    """As in `1/`, `2/`, …, `11/` with eleven names: no other reading is possible, and it is said."""
    splits = loaded(rows([kind(n + 1) for n in range(11)]), rows([kind(3)]), class_names=WORDS)
    assert wrong(splits, lambda truth: WORDS[int(float(truth)) - 1]) == []
    assert splits.notes[0] == "--class_names names the numbers in the data: 1 is w0, 2 is w1, 3 is w2, …."
    with pytest.raises(UserError, match=r"split 'test', row 1: label '?0'? is outside the class list"):
        loaded(rows([1, 2]) if kind is not str else rows(["1", "2"]), rows([kind(1), kind(0)]), class_names=["a", "b"])


def test_a_test_split_that_counts_from_1(tmp_path):
    for name, numbers, expected in (("a", [3, 1], [2, 0]), ("b", [2, 0], [2, 0]), ("c", [2, 1], [2, 1])):
        write(tmp_path, f"{name}.parquet", numbers)
        args = DataArguments(dataset_name=str(tmp_path / f"{name}.parquet"), test_split="train", class_names=ABC)
        assert load_test_split(args, ABC)["label"][:] == expected


def test_numbers_sort_by_value():
    assert loaded(rows(NUMBERS)).class_names == NUMBERS
    assert in_order({"10", "9", "x"}) == ["10", "9", "x"] and in_order({"010", "9"}) == ["9", "010"]


@pytest.mark.parametrize(
    ("train", "typed"),
    [
        (rows(["1", "3", "4"]), ["a", "b", "c"]),
        (rows(["10", "20", "30"]), ["a", "b", "c"]),
        (rows(["0", "2"]), ["a", "b", "c"]),
        (rows(["0", "1"]), ["a", "b", "c"]),
        (rows(["0", "1", "x"]), ["a", "b", "c"]),
        (rows(ABC), ["a", "b", "c"]),
        (rows(ABC), ["apple", "kiwi"]),
        (rows(ABC, ABC), ["a", "b"]),
        (rows(ABC, ABC), ["kiwi", "b", "c"]),  # kiwi is number 1
    ],
)
def test_other_names_are_refused_with_both_lists(train, typed):
    with pytest.raises(UserError, match="class_names: expected the data's own") as caught:
        loaded(train, class_names=typed)
    assert ", ".join(typed) in str(caught.value) and ", ".join(train.unique("truth")) in str(caught.value)


def test_names_of_numbered_classes_are_replaced_as_a_whole_and_said():
    splits = loaded(rows(CBA * 2, CBA), rows(ABC, ABC), class_names=["prune", "kiwi", "pomme"])
    assert wrong(splits, {"plum": "prune", "kiwi": "kiwi", "apple": "pomme"}.get) == []
    assert (
        "class_names renames the classes by their numbers: 0 plum is now prune, 2 apple is now pomme."
        in splits.notes[0]
    )


# -- names that look alike -----------------------------------------------------------------------------------------------
def test_unicode_forms_are_one_name():
    for train in (rows([*CAFES, "bar"] * 2), rows([CAFES[1], "bar"] * 2, [CAFES[1], "bar"])):
        splits = loaded(train, rows([CAFES[0], CAFES[1]]))
        assert sorted(splits.class_names) == ["bar", CAFES[0]]
        assert wrong(splits, lambda name: unicodedata.normalize("NFC", name)) == []
    assert loaded(rows([CAFES[1], "bar"]), class_names=[CAFES[1], "bar"]).class_names == [CAFES[0], "bar"]


LONG = " ".join(["word"] * 75)


@pytest.mark.parametrize(
    "pair",
    [
        ("cat", " cat "),
        ("cat", "Cat"),
        ("a_b", "a b"),
        (f"{LONG} one", f"{LONG} two"),
        ("Straße", "STRASSE"),
        ("cat", "cat\u200b"),
    ],
)
def test_names_that_no_prompt_tells_apart_are_said(pair):
    with pytest.raises(UserError, match="two classes have the same name"):
        loaded(rows([*pair, *pair]))
    with pytest.raises(UserError, match="two classes have the same name"):
        loaded(rows([0, 1]), class_names=list(pair))


# -- rows without a class ------------------------------------------------------------------------------------------------
UNLABELLED = {
    "numbers of a ClassLabel": rows(["apple", -1, "kiwi", "plum", -1], ABC, ["apple", "", "kiwi", "plum", ""]),
    "none": rows(["apple", None, "kiwi", "plum", None]),
    "blank": rows(["apple", "", "kiwi", "plum", "  "]),
}


@pytest.mark.parametrize("kind", UNLABELLED)
def test_rows_without_a_class_are_refused_or_left_out_and_counted(kind):
    test = UNLABELLED[kind]
    message = r"split 'test', row 1: expected a class, found none; 2 of 5 rows have no class .* on_missing_label skip"
    with pytest.raises(UserError, match=message):
        loaded(rows(ABC, ABC), test)
    splits = loaded(rows(ABC, ABC), test, on_missing_label="skip")
    assert splits.test["truth"][:] == ["apple", "kiwi", "plum"] and wrong(splits) == []
    assert splits.test["source_row"][:] == [0, 2, 3]  # as a message about a picture names it
    assert (
        splits.notes[0] == "column 'label', split 'test': 2 of 5 rows have no class (no label, or -1) and are left out."
    )


def test_captions_are_drawn_for_the_rows_that_are_trained_on(tmp_path):
    labels = ["a", "b", None, "a", "b", None, "a", "b"] * 3
    write(tmp_path, "train.parquet", labels)
    options = {"dataset_name": str(tmp_path), "on_missing_label": "skip", "shots": 3}
    trained = load_splits(DataArguments(**options)).train["source_row"][:]
    args = CaptionArguments(captioner="template", output_dir=str(tmp_path / "out"))
    workflow = CaptionWorkflow(DataArguments(**options), args)
    kept = [row for row, label in enumerate(labels) if label]
    assert len(workflow.data["train"]) == len(kept)
    assert sorted(kept[row] for row in workflow.rows["train"]) == sorted(trained)


def test_a_split_with_no_class_at_all_is_not_skipped():
    with pytest.raises(UserError, match="row 0: expected a class, found none; 2 of 2 rows"):
        loaded(rows(["a", "b"]), rows([-1, -1]), on_missing_label="skip", test_split="test")


@pytest.mark.parametrize("label", [7, -2, -100])
def test_numbers_outside_the_list_are_refused_by_row(label):
    with pytest.raises(UserError, match=f"split 'test', row 1: label {label} is outside the class list"):
        loaded(rows(ABC, ABC), rows(["plum", label], ABC, ["plum", ""]))
    with pytest.raises(UserError, match=f"row 1: label {label} is outside the class list"):
        loaded(rows([0, label, 1, 1]), class_names=["a", "b"])


# -- a trained model ---------------------------------------------------------------------------------------------------------
def test_a_model_judges_no_bare_numbers(tmp_path):
    write(tmp_path, "test.parquet", [0, 1])
    args = DataArguments(dataset_name=str(tmp_path / "test.parquet"), test_split="train")
    with pytest.raises(UserError, match="expected class names, found plain numbers"):
        load_test_split(args, ["a", "b"])
    args.class_names = ["b", "a"]
    assert load_test_split(args, ["a", "b"])["label"][:] == [1, 0]


# -- data given in Python --------------------------------------------------------------------------------------------------
def test_the_trainer_joins_evaluation_data_by_name():
    same = rows(ABC, ABC)
    assert check_dataset("eval_dataset", same, ABC) is same
    found = check_dataset("eval_dataset", rows(["plum", "apple"], CBA), ABC)
    assert found["label"][:] == [2, 0] and found.features["label"].names == ABC
    subset = check_dataset("eval_dataset", rows(["plum"], ["plum"]), ABC)
    assert subset["label"][:] == [2]
    with pytest.raises(UserError, match=r"eval_dataset: expected the classes of train_dataset .*found others: pear"):
        check_dataset("eval_dataset", rows(["pear"], ["plum", "pear"]), ABC)


@pytest.mark.parametrize(
    ("label", "found"), [(-1, "no label"), (None, "no label"), (3, "the label 3"), (-5, "the label -5")]
)
def test_the_trainer_refuses_rows_without_a_class(label, found):
    data = rows(["plum", label, "apple"], ABC, ["plum", "", "apple"])
    with pytest.raises(
        UserError, match=rf"train_dataset, row 1: expected a class from 0 to 2, found {found} \(1 such rows\)"
    ):
        check_dataset("train_dataset", data)


def test_rows_labelled_minus_100_are_left_out_of_training():
    data = colour_dataset(1)
    data = data.remove_columns("label").add_column(
        "label", pa.array([0, -100, 2]), feature=ClassLabel(names=["a", "b", "c"])
    )
    assert check_dataset("train_dataset", data)["label"][:] == [0, -100, 2]
    view = TrainingView(data, TextView(["a", "b", "c"], "a {}."), crop_min_area=1.0)
    assert [view[i]["label"] for i in range(3)] == [0, -100, 2] and view[1]["text"] == "" and view[1]["image"] is None
    assert [row["label"] for row in text_rows(data)] == [0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.with_transform(lambda batch: batch), r"found a transform set by .*with_format\(None\)"),
        (lambda data: data.with_format("numpy"), "found the format 'numpy'"),
        (lambda data: data.to_iterable_dataset(), "found IterableDataset. Load it without streaming=True"),
        (lambda data: DatasetDict(train=data), "found DatasetDict. Give one of its splits: 'train'"),
        (lambda data: [1, 2], "found list. Give one as a datasets.Dataset"),
    ],
)
def test_data_of_another_form_are_refused_with_what_to_give(change, message):
    data = change(rows(ABC, ABC))
    with pytest.raises(UserError, match=f"train_dataset: expected .*{message}"):
        check_dataset("train_dataset", data)
    if not isinstance(data, DatasetDict):
        with pytest.raises(UserError, match=message):
            load_splits(DataArguments(), {"train": data})
        with pytest.raises(UserError, match=message):
            caption_dataset(data, None)


# -- captions of another dataset ---------------------------------------------------------------------------------------------
def test_captions_are_joined_by_the_name_of_the_class():
    images = rows(["apple", "plum"], ABC).cast_column("image", Image(decode=False))
    import hashlib

    digest = hashlib.sha256(PNG["bytes"]).hexdigest()
    for names, kind in ((CBA, ClassLabel(names=CBA)), (None, Value("string"))):
        label = 0 if names else "plum"
        texts = {"label": [label, -1 if names else None], "captions": [["of a plum"], ["of anything"]]}
        features = Features({"label": kind, "captions": [Value("string")], "image_sha256": Value("string")})
        captions = Dataset.from_dict({**texts, "image_sha256": [digest] * 2}, features)
        joined, _ = join_captions(images, DatasetDict(train=captions), "captions")
        assert joined["captions"][:] == [["of anything"], ["of a plum", "of anything"]]


# -- the Hub -------------------------------------------------------------------------------------------------------------------
def test_hub_files_that_number_classes_differently_are_refused(tmp_path, monkeypatch):
    sha, files = "0" * 40, ("data/a.parquet", "data/b.parquet")
    folder = tmp_path / "datasets--user--name" / "snapshots" / sha
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    write(folder, files[0], ABC, ABC)
    write(folder, files[1], ABC, CBA)
    data = rows(ABC, ABC)
    args = DataArguments(dataset_name="user/name")
    for names, refused in ((files[:1], False), (files, True)):
        data.info.download_checksums = {f"hf://datasets/user/name@{sha}/{name}": {} for name in names}
        if refused:
            with pytest.raises(
                UserError, match=r"found others in data/b.parquet, column 'label': plum, .*hf download user/name"
            ):
                check_hub_data(DatasetDict(train=data), args)
        else:
            check_hub_data(DatasetDict(train=data), args)


def test_hub_data_name_no_picture_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(config, "EXTRACTED_DATASETS_PATH", tmp_path / "extracted")
    args = DataArguments(dataset_name="user/name")

    def check(path):
        data = Dataset.from_dict({"image": [PNG, {"bytes": None, "path": path}], "label": ["a", "b"]})
        check_hub_data(DatasetDict(train=data), args)
        check_hub_data(DatasetDict(train=data.cast_column("image", Image(decode=False))), args)

    check(str(tmp_path / "hub/datasets--user--name/snapshots/0/a.png"))
    check(str(tmp_path / "extracted/0/a.png"))
    for path in ("/etc/passwd", "a.png", str(tmp_path / "hub/datasets--user--other/a.png"), "https://localhost/a.png"):
        with pytest.raises(
            UserError, match="split 'train', column 'image', row 1: expected pictures within the dataset"
        ):
            check(path)


def test_codes_are_read_from_selected_rows_alone():
    data = rows(ABC * 3, ABC).select([8, 0, 4])
    assert loaded(rows(ABC, ABC), data).test["label"][:] == [2, 0, 1]
    np.testing.assert_equal(len(data), 3)
