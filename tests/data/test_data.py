"""Every way data come in, what is split off them, and what training reads of them."""

import io
import struct

import numpy as np
import pytest
from data_tools import png_of_size, save_pictures, with_bad_picture, with_column, write_csv, write_jsonl
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets
from PIL import Image as PILImage
from tiny_clip import COLOURS, colour_dataset, colour_images
from torch.utils.data import DataLoader, Subset

from mmft_hf import MMFTConfig, MMFTTrainer, few_shot_split, load_captioned_dataset
from mmft_hf.core.arguments import DataArguments
from mmft_hf.core.errors import UserError
from mmft_hf.data import images
from mmft_hf.data.images import BadImage, random_crop_box, read_image
from mmft_hf.data.sampling import generator, hold_out
from mmft_hf.data.splits import captions_of, labels_of, load_splits, load_test_split
from mmft_hf.data.views import ImageView, TextView, TrainingView

NAMES = list(COLOURS)


def splits_of(name, **options):
    options = {key: str(value) if key == "image_root" else value for key, value in options.items()}
    return load_splits(DataArguments(dataset_name=str(name), **options))


def paths_of(dataset):
    return [row["path"] for row in dataset.cast_column("image", Image(decode=False))["image"]]


@pytest.fixture(scope="module")
def flat_folder(tmp_path_factory):
    """Class folders alone, ten pictures in each."""
    return save_pictures(tmp_path_factory.mktemp("flat"), 10)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with `pictures/0.png …` and the class name of each."""
    folder = tmp_path_factory.mktemp("listed")
    (folder / "pictures").mkdir()
    rows = []
    for i, (image, label) in enumerate(colour_images(6)):
        image.save(folder / "pictures" / f"{i}.png")
        rows.append({"image": f"pictures/{i}.png", "label": NAMES[label], "captions": f"caption {i}"})
    return folder, rows


# -- where data come from ---------------------------------------------------------------------------------------------
def test_parquet_folder(data_folder):
    splits = splits_of(data_folder)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [24, 12, 18]
    assert splits.class_names == NAMES
    assert splits.has_captions and splits.captions_per_image().tolist() == [2] * 24
    assert splits.notes == []


def test_single_parquet_file_is_split_by_class(tmp_path):
    path = tmp_path / "all.parquet"
    colour_dataset(10).to_parquet(path)
    splits = splits_of(path)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [21, 3, 6]
    assert len(splits.notes) == 2


def test_image_folder_with_train_and_test(tmp_path):
    save_pictures(tmp_path / "train", 10)
    save_pictures(tmp_path / "test", 3, seed=1)
    splits = splits_of(tmp_path)
    assert splits.class_names == sorted(NAMES)
    assert len(splits.test) == 9 and all("/test/" in path for path in paths_of(splits.test))
    assert np.bincount(labels_of(splits.validation)).tolist() == [1, 1, 1]
    assert all("/train/" in path for path in paths_of(splits.train) + paths_of(splits.validation))
    assert not splits.has_captions
    assert any("no captions" in note for note in splits.notes)


def test_labels_of_an_image_folder_are_its_folders(flat_folder):
    data = load_captioned_dataset(str(flat_folder))["train"]
    for row in data.select(range(0, 30, 7)):
        name = data.features["label"].names[row["label"]]
        assert np.abs(np.asarray(row["image"]).mean((0, 1)) - COLOURS[name]).max() < 15


def test_flat_image_folder_is_split_by_class_without_overlap(flat_folder):
    splits = splits_of(flat_folder)
    for split, per_class in ((splits.train, 7), (splits.validation, 1), (splits.test, 2)):
        assert np.bincount(labels_of(split)).tolist() == [per_class] * 3
    everything = [path for split in (splits.train, splits.validation, splits.test) for path in paths_of(split)]
    assert len(set(everything)) == len(everything) == 30


def test_held_out_splits_depend_on_shots_seed_alone(flat_folder):
    first, again = splits_of(flat_folder), splits_of(flat_folder)
    assert paths_of(first.test) == paths_of(again.test)
    assert paths_of(first.validation) == paths_of(again.validation)
    few = splits_of(flat_folder, shots=2)
    assert paths_of(few.test) == paths_of(first.test)
    assert paths_of(few.validation) == paths_of(first.validation)
    assert paths_of(splits_of(flat_folder, shots_seed=1).test) != paths_of(first.test)


def test_image_folder_with_captions_in_metadata(tmp_path):
    save_pictures(tmp_path / "train", 4)
    files = sorted((tmp_path / "train").rglob("*.png"))
    rows = [
        {"file_name": f"{p.parent.name}/{p.name}", "label": p.parent.name, "captions": [f"text of {p.name}"]}
        for p in files
    ]
    write_jsonl(tmp_path / "train" / "metadata.jsonl", rows)
    splits = splits_of(tmp_path)
    assert splits.has_captions and splits.class_names == sorted(NAMES)
    for path, captions in zip(paths_of(splits.train), splits.train["captions"][:], strict=True):
        assert captions == [f"text of {path.rsplit('/', 1)[1]}"]


@pytest.mark.parametrize("labelled", [True, False])
def test_metadata_of_training_pictures_alone(labelled, tmp_path):
    for seed, split in enumerate(("train", "validation", "test")):
        save_pictures(tmp_path / split, 3, seed)
    files = sorted((tmp_path / "train").rglob("*.png"))
    rows = [{"file_name": str(p.relative_to(tmp_path / "train")), "text": f"text of {p.parent.name}"} for p in files]
    if labelled:
        rows = [{**row, "label": row["text"][8:]} for row in rows]
    write_jsonl(tmp_path / "train" / "metadata.jsonl", rows[1:])
    splits = splits_of(tmp_path, captions_column="text")
    assert splits.class_names == sorted(NAMES) and len(splits.train) == 8
    for split in (splits.train, splits.validation, splits.test):
        assert [splits.class_names[c] for c in labels_of(split)] == [path.split("/")[-2] for path in paths_of(split)]
    assert [len(splits.validation), len(splits.test)] == [9, 9]
    assert splits.train["captions"][:] == [row["text"] for row in rows[1:]]
    assert splits.notes == ["1 of 27 images are in no metadata file and are left out."]
    assert "type --captions_column text" in splits_of(tmp_path).notes[-1]


def test_lists_beside_class_folders_are_told(tmp_path):
    for split in ("train", "test"):
        save_pictures(tmp_path / split, 3)
        write_csv(tmp_path / f"{split}.csv", [{"image": f"{split}/red thing/000.png", "label": "red thing"}])
    note = splits_of(tmp_path).notes[0]
    assert "not read: test.csv, train.csv. " in note and note.endswith(f"type --dataset_name {tmp_path / 'train.csv'}.")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_list_of_paths_and_names(kind, pictures, tmp_path_factory, monkeypatch):
    folder, rows = pictures
    path = (write_csv if kind == "csv" else write_jsonl)(folder / f"list.{kind}", rows)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    splits = splits_of(path)
    assert splits.class_names == sorted(NAMES)
    assert splits.has_captions
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 18
    for split in (splits.train, splits.validation, splits.test):
        for row in split:
            i = int(row["captions"].split()[1])
            assert splits.class_names[row["label"]] == rows[i]["label"]
            with PILImage.open(folder / "pictures" / f"{i}.png") as expected:
                assert np.array_equal(np.asarray(read_image(row["image"])), np.asarray(expected))


def test_paths_may_be_absolute(pictures, tmp_path):
    folder, rows = pictures
    path = write_csv(tmp_path / "list.csv", [{**row, "image": str(folder / row["image"])} for row in rows])
    splits = splits_of(path, image_root=folder)
    assert ImageView(splits.train).read(0)["image"].mode == "RGB"


def test_folder_of_csv_files_is_one_split_per_file(pictures, tmp_path):
    folder, rows = pictures
    absolute = [{**row, "image": str(folder / row["image"])} for row in rows]
    write_csv(tmp_path / "train.csv", absolute[:9])
    write_csv(tmp_path / "validation.csv", absolute[9:12])
    write_csv(tmp_path / "test.csv", absolute[12:][::-1])
    splits = splits_of(tmp_path, image_root=folder)
    assert [splits.class_names[c] for c in labels_of(splits.train)] == [row["label"] for row in rows[:9]]
    assert [splits.class_names[c] for c in labels_of(splits.test)] == [row["label"] for row in rows[12:][::-1]]


def test_files_beside_train_are_its_splits_in_any_case_of_letters(pictures, tmp_path):
    folder, rows = pictures
    path = write_csv(tmp_path / "Train.csv", rows[:9])
    write_csv(tmp_path / "Hold-out.CSV", rows[9:15])
    write_csv(tmp_path / "VALID.csv", rows[12:][::-1])
    write_csv(tmp_path / "train_extra.csv", rows)
    splits = splits_of(path, image_root=folder)
    assert splits.notes == ["VALID.csv and Hold-out.CSV next to Train.csv are read as further splits."]
    assert paths_of(splits.test) == [str(folder / row["image"]) for row in rows[9:15]]
    assert paths_of(splits.validation) == [str(folder / row["image"]) for row in rows[12:][::-1]]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_files_beside_train_are_its_other_splits(kind, pictures, tmp_path):
    folder, rows = pictures
    names = {"red thing": "7", "green thing": "8", "blue thing": "nine"}  # numbers alone in one file are names, too
    rows = [{**row, "image": str(folder / row["image"]), "label": names[row["label"]]} for row in rows]
    lean = [{"label": row["label"], "image": row["image"]} for row in rows]  # no captions there, other order of columns
    write = write_csv if kind == "csv" else write_jsonl
    path = write(tmp_path / f"train.{kind}", [{**row, "text": row["captions"]} for row in rows[:9]])
    write(tmp_path / f"val.{kind}", [row for row in lean[9:15] if row["label"] != "nine"])
    write(tmp_path / f"test.{kind}", lean[12:][::-1])
    write_csv(tmp_path / "dev.txt", lean)
    splits = splits_of(path, captions_column="text", image_root=folder)
    assert splits.notes == [f"val.{kind} and test.{kind} next to train.{kind} are read as further splits."]
    assert splits.class_names == ["7", "8", "nine"] and splits.captions_per_image().tolist() == [1] * 9
    for split, expected in (
        (splits.validation, [r for r in rows[9:15] if r["label"] != "nine"]),
        (splits.test, rows[12:][::-1]),
    ):
        assert paths_of(split) == [row["image"] for row in expected]
        assert [splits.class_names[c] for c in labels_of(split)] == [row["label"] for row in expected]
    known = load_test_split(DataArguments(dataset_name=str(path), image_root=str(folder)), splits.class_names)
    assert paths_of(known) == paths_of(splits.test)
    assert splits.train.features == splits.test.features  # as parquet files of one dataset have to have
    # A list without labels judges nothing; one of another name stands for itself.
    write(tmp_path / f"test.{kind}", [{"image": row["image"]} for row in rows[12:]])
    assert "Split 'test' has no labels and is left out." in splits_of(path, image_root=folder).notes
    write(tmp_path / f"test.{kind}", [{"picture": row["image"]} for row in rows[12:]])
    with pytest.raises(UserError, match="split 'test': expected images, or their paths, in column 'image', found none"):
        splits_of(path, image_root=folder)
    write(tmp_path / f"train.{kind}", [{**row, "year": 1999} for row in rows])
    write(tmp_path / f"test.{kind}", [{**row, "year": "unknown"} for row in rows])
    if kind == "csv":  # whose cells are text, whatever some of them look like
        assert splits_of(path, image_root=folder).train["year"][:] == ["1999"] * 18
    else:
        with pytest.raises(UserError, match=r"test.jsonl, column 'year': expected .*int64.* as in .*train.jsonl"):
            splits_of(path, image_root=folder)
    alone = splits_of(write(tmp_path / f"all.{kind}", rows), image_root=folder)
    assert len(alone.train) + len(alone.validation) + len(alone.test) == 18


def test_text_labels_are_numbered_alike_in_every_split(tmp_path):
    dataset = colour_dataset(4)
    text = [NAMES[c] for c in dataset["label"]]
    dataset = dataset.remove_columns("label").add_column("label", text)
    dataset.to_parquet(tmp_path / "train.parquet")
    only_red = dataset.filter(lambda label: label == "red thing", input_columns="label")
    only_red.to_parquet(tmp_path / "validation.parquet")
    only_red.to_parquet(tmp_path / "test.parquet")
    splits = splits_of(tmp_path)
    assert splits.class_names == ["blue thing", "green thing", "red thing"]
    assert labels_of(splits.test).tolist() == [2] * 4
    assert splits.test.features["label"].names == splits.class_names


def test_numbers_take_the_names_typed_by_the_user(pictures, tmp_path):
    folder, rows = pictures
    numbers = [{"image": str(folder / r["image"]), "label": NAMES.index(r["label"])} for r in rows]
    path = write_csv(tmp_path / "list.csv", numbers)
    splits = splits_of(path, class_names=["rouge", "vert", "bleu"], image_root=folder)
    assert splits.train.features["label"] == ClassLabel(names=["rouge", "vert", "bleu"])
    assert set(labels_of(splits.train)) == {0, 1, 2}


def test_class_names_rename_by_position(data_folder):
    splits = splits_of(data_folder, class_names=["rouge", "vert", "bleu"])
    assert splits.test.features["label"].names == ["rouge", "vert", "bleu"]
    assert labels_of(splits.test).tolist() == labels_of(splits_of(data_folder).test).tolist()


def test_emoji_mini():
    data = load_captioned_dataset("builtin/emoji-mini")
    sizes = {split: len(dataset) for split, dataset in data.items()}
    assert sizes == {"train": 618, "validation": 213, "test": 267, "test_new_vendor": 218}
    names = data["train"].features["label"].names
    assert len(names) == 24
    for dataset in data.values():
        assert dataset.features["label"].names == names
        assert set(dataset["label"]) == set(range(24))
    assert data["test"][0]["image"].size[0] > 0


def test_split_of_another_name_is_used_when_named(tmp_path):
    for seed, name in enumerate(("fit", "choose", "final")):
        colour_dataset(3 + seed, seed).to_parquet(tmp_path / f"{name}.parquet")
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("fit", "choose", "final")}
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        + "".join(f"  - split: {name}\n    path: {name}.parquet\n" for name in files)
        + "---\n"
    )
    splits = splits_of(tmp_path, train_split="fit", validation_split="choose", test_split="final")
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [9, 12, 15]
    with pytest.raises(UserError, match=r"no training split: found fit, choose, final. Type train_split NAME"):
        splits_of(tmp_path)


@pytest.mark.parametrize("alias", ["valid", "val", "dev"])
def test_validation_split_goes_by_its_usual_names(alias, tmp_path):
    for seed, name in enumerate(("train", alias, "test")):
        colour_dataset(3 + seed, seed).to_parquet(tmp_path / f"{name}.parquet")
    assert len(splits_of(tmp_path).validation) == 12


def test_one_split_never_plays_two_roles(data_folder, tmp_path):
    colour_dataset(4).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(UserError, match=r"'test'.*found train and test.*Type train_split NAME"):
        splits_of(tmp_path)
    with pytest.raises(UserError, match=r"'train'.*found train and test"):
        splits_of(data_folder, test_split="train")
    with pytest.raises(UserError, match=r"'test'.*found test and validation"):
        splits_of(data_folder, validation_split="test")


# -- columns ----------------------------------------------------------------------------------------------------------
def test_columns_are_mapped_by_name(tmp_path):
    renamed = colour_dataset(10).rename_columns({"image": "picture", "label": "kind", "captions": "texts"})
    renamed.to_parquet(tmp_path / "train.parquet")
    splits = splits_of(tmp_path, image_column="picture", label_column="kind", captions_column="texts")
    assert {"image", "label", "captions"} <= set(splits.train.column_names)
    assert splits.class_names == NAMES and splits.captions_per_image().tolist() == [2] * 21


def test_a_column_with_a_contract_name_and_another_role_makes_way(tmp_path):
    dataset = colour_dataset(10).rename_columns({"image": "picture", "label": "kind", "captions": "texts"})
    dataset = dataset.add_column("image", [f"id {i}" for i in range(30)])
    dataset = dataset.add_column("label", ["unrelated"] * 30).add_column("captions", [7] * 30)
    dataset.to_parquet(tmp_path / "train.parquet")
    splits = splits_of(tmp_path, image_column="picture", label_column="kind", captions_column="texts")
    assert splits.class_names == NAMES
    assert splits.train["captions"][0][1].startswith("very")
    assert ImageView(splits.train).read(0)["image"].size == (24, 20)


def test_a_captions_column_is_found_without_being_named_and_ignored_where_another_is(data_folder, tmp_path):
    assert splits_of(data_folder).has_captions
    colour_dataset(10).add_column("alt", ["another"] * 30).to_parquet(tmp_path / "train.parquet")
    assert splits_of(tmp_path, captions_column="alt").train["captions"][0] == "another"


def test_other_columns_stay(tmp_path):
    colour_dataset(10).add_column("licence", ["CC0"] * 30).to_parquet(tmp_path / "train.parquet")
    assert splits_of(tmp_path).train["licence"][0] == "CC0"


# -- captions ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ("", []),
        ("  ", []),
        (" one ", ["one"]),
        ([], []),
        ([None, "", " a", "b\n"], ["a", "b"]),
    ],
)
def test_captions_of(value, expected):
    assert captions_of(value) == expected


def test_captions_may_be_missing_for_some_images(tmp_path):
    dataset = colour_dataset(10)
    captions = [None, [], ["", " "], *dataset["captions"][3:]]
    features = Features({**dataset.remove_columns("captions").features, "captions": List(Value("string"))})
    dataset = Dataset.from_dict({**dataset.remove_columns("captions").to_dict(), "captions": captions}, features)
    dataset.to_parquet(tmp_path / "train.parquet")
    for split in ("validation", "test"):
        colour_dataset(2).to_parquet(tmp_path / f"{split}.parquet")
    splits = splits_of(tmp_path)
    assert splits.captions_per_image().tolist() == [0, 0, 0] + [2] * 27
    view = TrainingView(splits.train, TextView(NAMES, "a photo of a {}."))
    assert [view[i]["text"] for i in range(3)] == [f"a photo of a {name}." for name in NAMES]


@pytest.mark.parametrize("empty", [None, []])
def test_a_captions_column_without_any_caption_is_the_same_as_none(empty, pictures, tmp_path):
    folder, rows = pictures
    rows = [{**row, "image": str(folder / row["image"]), "captions": empty} for row in rows]
    splits = splits_of(write_jsonl(tmp_path / "list.jsonl", rows), image_root=folder)
    text = TrainingView(splits.train, TextView(splits.class_names, "a {}."))[0]["text"]
    assert text == f"a {splits.class_names[splits.train['label'][0]]}."


def test_text_columns_are_offered_where_there_are_no_captions(tmp_path):
    colour_dataset(10).rename_column("captions", "tags").to_parquet(tmp_path / "train.parquet")
    splits = splits_of(tmp_path)
    assert not splits.has_captions
    assert "--captions_column tags" in splits.notes[-1]


# -- splits -----------------------------------------------------------------------------------------------------------
LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 0, 0, 1, 0]  # 6, 4 and 2 of each class


def test_few_shot_split_takes_the_same_number_of_each_class_or_all_it_has():
    rows = few_shot_split(LABELS, 3)
    assert np.bincount(np.array(LABELS)[rows]).tolist() == [3, 3, 2]
    assert rows == sorted(set(rows))


def test_few_shot_split_is_seeded():
    labels = np.repeat(range(5), 40)
    assert few_shot_split(labels, 4, seed=3) == few_shot_split(labels, 4, seed=3)
    assert few_shot_split(labels, 4, seed=3) != few_shot_split(labels, 4, seed=4)


def test_few_shot_split_of_a_class_does_not_depend_on_the_others():
    with_both = [row for row in few_shot_split(LABELS, 2) if LABELS[row] == 0]
    alone = few_shot_split([0 if c == 0 else 9 for c in LABELS], 2)
    assert with_both == [row for row in alone if LABELS[row] == 0]


def test_few_shot_split_refuses_less_than_one():
    with pytest.raises(ValueError, match="expected 1 or more examples per class, found 0"):
        few_shot_split(LABELS, 0)


def test_shots_are_taken_from_training_alone(data_folder):
    splits = splits_of(data_folder, shots=2)
    assert np.bincount(labels_of(splits.train)).tolist() == [2, 2, 2]
    assert [len(splits.validation), len(splits.test)] == [12, 18]
    assert any("val-full" in note for note in splits.notes)


def test_hold_out_takes_a_share_of_every_class():
    rest, held = hold_out(LABELS, 0.5)
    assert np.bincount(np.array(LABELS)[held]).tolist() == [3, 2, 1]
    assert sorted(rest + held) == list(range(12))


def test_hold_out_takes_one_of_two_and_none_of_one():
    rest, held = hold_out([0, 0, 1], 0.01)
    assert len(held) == 1 and held[0] in (0, 1)
    assert 2 in rest
    assert hold_out([0, 0], 0.99)[0] != []


# -- the test split of a trained model --------------------------------------------------------------------------------
def test_test_labels_are_matched_by_name_when_the_order_differs(data_folder):
    order = ["blue thing", "red thing", "green thing"]
    test = load_test_split(DataArguments(dataset_name=str(data_folder)), order)
    stored = Dataset.from_parquet(str(data_folder / "test.parquet"))
    assert [order[c] for c in test["label"]] == [NAMES[c] for c in stored["label"]]
    assert test.features["label"].names == order


def test_a_model_may_know_more_classes_than_the_test_split(data_folder):
    known = ["yellow thing", *NAMES]
    test = load_test_split(DataArguments(dataset_name=str(data_folder)), known)
    assert set(labels_of(test)) == {1, 2, 3}


def test_class_names_typed_for_a_test_split_are_matched_by_name(data_folder, pictures, tmp_path):
    names = ["rouge", "vert", "bleu"]
    test = load_test_split(DataArguments(dataset_name=str(data_folder), class_names=names), names[::-1])
    stored = Dataset.from_parquet(str(data_folder / "test.parquet"))
    assert labels_of(test).tolist() == [2 - c for c in stored["label"]]

    folder, rows = pictures
    numbers = [{"image": str(folder / r["image"]), "label": NAMES.index(r["label"])} for r in rows]
    path = write_csv(tmp_path / "list.csv", numbers)
    args = DataArguments(dataset_name=str(path), class_names=names, test_split="train", image_root=str(folder))
    assert labels_of(load_test_split(args, names[::-1])).tolist() == [2 - row["label"] for row in numbers]


def test_no_test_split_is_none(flat_folder):
    assert load_test_split(DataArguments(dataset_name=str(flat_folder)), NAMES) is None


# -- fingerprint ------------------------------------------------------------------------------------------------------
def save_splits(folder, train):
    folder.mkdir()
    train.to_parquet(folder / "train.parquet")
    for seed, split in ((1, "validation"), (2, "test")):
        colour_dataset(2, seed).to_parquet(folder / f"{split}.parquet")
    return folder


def test_a_picture_is_identified_by_file_name_and_size(tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "é.png").write_bytes(b"12345")
    stored = [(None, str(tmp_path / "a b" / "é.png")), (b"123", "b/z.png"), (b"12", None)]
    stored += [(b"", "x.png"), (None, "gone/y.png"), (None, "no\0name.png")]
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=NAMES)})
    columns = {"image": [{"bytes": b, "path": p} for b, p in stored], "label": [0, 1, 2] * 2}
    rows = Dataset.from_dict(columns, features)
    found = load_splits(DataArguments(), DatasetDict(train=rows, validation=rows, test=rows)).test
    assert found["image_id"][:] == ["é.png:5", "z.png:3", ":2", "x.png:0", "y.png:-1", "no\0name.png:-1"]
    assert list(found["source_row"]) == list(range(6))


def test_fingerprint_is_of_the_content_not_of_the_place(tmp_path):
    train = colour_dataset(2)
    one = splits_of(save_splits(tmp_path / "one", train)).fingerprint()
    assert one == splits_of(save_splits(tmp_path / "two", train)).fingerprint()
    assert len(one) == 16 and int(one, 16) >= 0


def test_fingerprint_changes_with_a_caption_a_label_and_a_name(tmp_path):
    train = colour_dataset(2)
    captions = [["other", train["captions"][0][1]], *train["captions"][1:]]
    labels = [1, *train["label"][1:]]
    variants = {
        "same": splits_of(save_splits(tmp_path / "same", train)),
        "caption": splits_of(save_splits(tmp_path / "caption", with_column(train, "captions", captions))),
        "label": splits_of(save_splits(tmp_path / "label", with_column(train, "label", labels))),
        "names": splits_of(tmp_path / "same", class_names=["x", "y", "z"]),
        "shots": splits_of(tmp_path / "same", shots=1),
    }
    assert len({splits.fingerprint() for splits in variants.values()}) == len(variants)


# -- nothing is opened before it is needed ----------------------------------------------------------------------------
@pytest.mark.parametrize("source", ["parquet", "folder"])
def test_no_picture_is_opened_before_training(source, data_folder, flat_folder, clip, tmp_path, monkeypatch):
    opened = []
    original = PILImage.open
    monkeypatch.setattr(PILImage, "open", lambda *args, **kwargs: opened.append(args) or original(*args, **kwargs))
    splits = splits_of(data_folder if source == "parquet" else flat_folder, shots=4)
    splits.fingerprint()
    model, processor = clip
    config = MMFTConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        per_device_train_batch_size=4,
        eval_strategy="no",
        save_strategy="no",
        eval_on_start=False,
        load_best_model_at_end=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = MMFTTrainer(
        model=model,
        args=config,
        train_dataset=splits.train,
        eval_dataset=splits.validation,
        processing_class=processor,
    )
    assert opened == []
    trainer.train()
    # accelerate reads one batch ahead
    assert 4 <= len(opened) <= 8


# -- draws of training ------------------------------------------------------------------------------------------------
def many_captions(count=6):
    dataset = colour_dataset(2, captions=False)
    captions = [[f"text {row}.{k}" for k in range(count)] for row in range(len(dataset))]
    return dataset.add_column("captions", captions)


def draws(view, keys, workers=0):
    loader = DataLoader(Subset(view, keys), batch_size=None, num_workers=workers, collate_fn=lambda row: row)
    return [(row["text"], row["box"], row["label"]) for row in loader]


def test_draws_are_the_same_for_any_number_of_workers():
    view = TrainingView(many_captions(), TextView(NAMES, "a {}.", seed=3), crop_min_area=0.5)
    keys = list(range(3 * len(view)))
    assert draws(view, keys) == draws(view, keys, workers=2)


def test_draws_depend_on_seed_epoch_and_row_not_on_the_order_of_reading():
    data = many_captions()
    view = TrainingView(data, TextView(NAMES, "a {}.", seed=3))
    keys = list(range(3 * len(view)))
    assert draws(view, keys[::-1])[::-1] == draws(TrainingView(data, TextView(NAMES, "a {}.", seed=3)), keys)
    assert draws(TrainingView(data, TextView(NAMES, "a {}.", seed=4)), keys) != draws(view, keys)


def test_draws_of_a_row_do_not_depend_on_its_neighbours():
    data = many_captions()
    view = TrainingView(data, TextView(NAMES, "a {}."))
    longer = TrainingView(concatenate_datasets([data, data]), TextView(NAMES, "a {}."))
    assert draws(view, [len(view) + 1]) == draws(longer, [len(longer) + 1])


def test_every_caption_is_drawn_about_equally_often():
    view = TrainingView(many_captions(4), TextView(NAMES, "a {}."))
    # The text alone matters here: without reading the pictures this takes no time.
    picture = PILImage.new("RGB", (8, 8))
    rows = view.rows[:]
    view.read = lambda row: {"image": picture, "label": rows["label"][row], "captions": rows["captions"][row]}
    counts = np.zeros((len(view), 4), dtype=int)
    for epoch in range(200):
        for row in range(len(view)):
            counts[row, int(view[epoch * len(view) + row]["text"][-1])] += 1
    assert counts.min() > 20  # 50 expected, standard deviation 6
    assert np.abs(counts.sum(0) - 300).max() < 60


def test_epochs_draw_different_captions_of_the_image():
    view = TrainingView(many_captions(), TextView(NAMES, "a {}."))
    texts = [view[epoch * len(view) + 1]["text"] for epoch in range(8)]
    assert all(text.startswith("a green thing. text 1.") for text in texts)
    assert len(set(texts)) > 2


def test_crop_boxes_lie_inside_and_keep_the_area():
    rng = generator(0)
    for _ in range(300):
        width, height = (int(n) for n in rng.integers(1, 60, 2))
        left, top, right, bottom = random_crop_box(width, height, 0.5, rng)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
    for _ in range(100):
        left, top, right, bottom = random_crop_box(400, 400, 0.5, rng)
        assert 0.49 <= (right - left) * (bottom - top) / 160_000 <= 1.0
        assert 0.74 <= (right - left) / (bottom - top) <= 1.35


def test_crops_differ_between_epochs_and_whole_images_have_none():
    data = many_captions()
    view = TrainingView(data, TextView(NAMES, "a {}."), crop_min_area=0.5)
    assert len({view[epoch * len(view)]["box"] for epoch in range(5)}) > 1
    whole = TrainingView(data, TextView(NAMES, "a {}."), crop_min_area=1.0)
    assert all(whole[key]["box"] is None for key in range(2 * len(whole)))


# -- bad pictures in a view -------------------------------------------------------------------------------------------


def test_half_of_the_pictures_are_mirrored_and_no_other_draw_changes():
    wide = PILImage.new("RGB", (4, 2))
    wide.putpixel((0, 0), (255, 0, 0))
    data = many_captions()
    data = data.remove_columns("image").add_column(
        "image", [as_stored(wide)] * len(data), feature=data.features["image"]
    )
    views = [TrainingView(data, TextView(NAMES, "a {}.", seed=3), 0.5, horizontal_flip=flip) for flip in (False, True)]
    mirrored = []
    for key in range(20 * len(data)):  # 20 epochs
        (one, other), again = (view[key] for view in views), views[1][key]
        assert (one["box"], one["text"]) == (other["box"], other["text"])
        assert other["image"].tobytes() == again["image"].tobytes()
        mirrored.append(other["image"].getpixel((3, 0)) == (255, 0, 0))
        assert mirrored[-1] != (other["image"].getpixel((0, 0)) == (255, 0, 0))
    assert 0.3 < np.mean(mirrored) < 0.7 and mirrored[: len(data)] != mirrored[len(data) :]


def as_stored(picture) -> dict:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def test_a_bad_picture_is_named_by_its_row():
    view = TrainingView(with_bad_picture(3), TextView(NAMES, "a {}."))
    assert view[2]["skipped"] == 0
    with pytest.raises(UserError, match=r"training image, row 3 cannot be read.*on_bad_image skip"):
        view[3]


def test_the_next_good_picture_takes_the_place_of_a_bad_one():
    view = TrainingView(with_bad_picture(5), TextView(NAMES, "a {}."), on_bad_image="skip")
    row = view[5]
    assert row["skipped"] == 1
    assert row["label"] == view[0]["label"] == 0


def test_no_readable_picture_at_all_is_an_error():
    data = colour_dataset(1).select([0])
    view = TrainingView(with_bad_picture(0, data), TextView(NAMES, "a {}."), on_bad_image="skip")
    with pytest.raises(UserError, match="none of the training images can be read"):
        view[0]


def test_evaluation_leaves_a_bad_picture_empty():
    view = ImageView(with_bad_picture(3), on_bad_image="skip")
    assert view[3] == {"image": None, "label": -100, "skipped": 1}


def test_a_bad_picture_is_reported_once(caplog):
    for epoch in range(3):
        view = ImageView(with_bad_picture(3), on_bad_image="skip", name=f"reported once {epoch // 2}")
        assert view[3]["skipped"] == view[3]["skipped"] == 1
    rows = [record.message for record in caplog.records if "row 3 is skipped" in record.message]
    assert [row.split(" image")[0] for row in rows] == ["reported once 0", "reported once 1"]


# -- reading one picture ----------------------------------------------------------------------------------------------
def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_transparency_is_laid_on_white():
    image = PILImage.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    read = read_image(encoded(image))
    assert read.mode == "RGB"
    assert [read.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (10, 20, 30)]


def test_transparency_of_a_palette_is_laid_on_white():
    image = PILImage.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putpixel((1, 0), 1)
    read = read_image(encoded(image, transparency=0))
    assert [read.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 200, 0)]


def test_grey_with_alpha_is_laid_on_white():
    assert read_image(PILImage.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("options", [{}, {"transparency": 7}])
def test_sixteen_bit_grey_keeps_its_shades(options):
    values = np.linspace(500, 60_000, 16, dtype=np.uint16).reshape(4, 4)
    read = np.asarray(read_image(encoded(PILImage.fromarray(values), **options)))[:, :, 0]
    assert read.min() == 0 and read.max() == 255
    assert len(np.unique(read)) == 16


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV", "F", "I"])
def test_other_modes_become_rgb(mode):
    assert read_image(PILImage.new("RGB", (3, 2), "red").convert("L" if mode in "FI" else mode).convert(mode)).mode == (
        "RGB"
    )


def test_exif_orientation_turns_the_picture_upright():
    image = PILImage.new("RGB", (4, 2), "white")
    exif = PILImage.Exif()
    exif[0x0112] = 6
    assert read_image(encoded(image, "JPEG", exif=exif)).size == (2, 4)


def test_a_picture_comes_as_path_bytes_dictionary_or_image(tmp_path):
    image = PILImage.new("RGB", (3, 2), (1, 2, 3))
    data = encoded(image)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    sources = [path, str(path), data, {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}, image]
    for source in sources:
        read = read_image(source)
        assert read.size == (3, 2) and read.getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("source", [None, {"bytes": None, "path": None}, b"", b"no picture", "no/such/file.png", 7])
def test_what_is_no_picture_is_a_bad_image(source):
    with pytest.raises(BadImage):
        read_image(source)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damage_anywhere_is_a_bad_image_or_a_picture(kind):
    whole = encoded(colour_images(1)[0][0], kind)
    rng = generator(0)
    for _ in range(60):
        damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for where in rng.integers(0, len(damaged), 6):
            damaged[where] = rng.integers(256)
        try:
            assert read_image(bytes(damaged)).mode == "RGB"
        except BadImage:
            pass


def test_damage_that_only_the_exif_code_meets_is_a_bad_image(monkeypatch):
    def stumble(image):
        raise struct.error("required argument is not an integer")

    monkeypatch.setattr(images.ImageOps, "exif_transpose", stumble)
    with pytest.raises(BadImage, match="required argument is not an integer"):
        read_image(encoded(PILImage.new("RGB", (2, 2))))


def test_a_file_of_another_kind_is_named_as_such():
    with pytest.raises(BadImage, match="found a file of none of these formats"):
        read_image(b"%PDF-1.7")


def test_cut_file_is_a_bad_image():
    whole = encoded(colour_images(1)[0][0])
    with pytest.raises(BadImage):
        read_image(whole[: len(whole) // 2])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [14_000, 60_000])
def test_huge_picture_is_refused_by_its_header(side, monkeypatch):
    monkeypatch.setattr(images, "_to_rgb", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(BadImage, match="pixels"):
        read_image(png_of_size(side, side))


def test_limit_of_pixels_is_inclusive(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 6)
    assert read_image(PILImage.new("RGB", (3, 2))).size == (3, 2)
    with pytest.raises(BadImage, match="expected at most 6 pixels, found 7 x 1"):
        read_image(PILImage.new("RGB", (7, 1)))
