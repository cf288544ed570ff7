"""Captions from JSON files and from other captioned datasets: each must reach its own picture, or none.

The oracle is outside the code under test: a caption holds the first 16 digits of its own picture's sha256.
"""

import hashlib
import io
import json
import shutil
import unicodedata
from dataclasses import dataclass, field

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value, load_dataset
from PIL import Image as PILImage

from mmft_hf.captioning.write import imports
from mmft_hf.captioning.write.dataset import CAPTION_FEATURES, RECORD
from mmft_hf.captioning.write.imports import import_captions
from mmft_hf.captioning.write.merges import merge_captions
from mmft_hf.core.errors import UserError
from mmft_hf.data.splits import load_captioned_dataset

CLASSES = ("cats", "dogs")


@dataclass
class Checked:
    text: str
    status: str
    checks: list[str] = field(default_factory=list)
    clip_tokens: int | None = None
    mentions_label: bool = False
    reask: bool = False


class Checker:
    """Refuses what begins with "bad", and notes what it is asked."""

    def __init__(self):
        self.asked = []

    def check(self, text, finish_reason, label, prompt="", thinking_tokens=0, last_try=False):
        assert last_try
        self.asked.append((text, finish_reason, label))
        if not text:
            return Checked("", "empty", ["empty"])
        bad = text.startswith("bad")
        return Checked(text, "rejected" if bad else "ok", ["loop"] * bad, len(text), "cat" in text)


def picture(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 11, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def about(data: bytes, word: str = "picture") -> str:
    return f"a {word} {hashlib.sha256(data).hexdigest()[:16]}"


def bytes_of(dataset) -> list[bytes]:
    return [row["image"]["bytes"] for row in dataset.cast_column("image", Image(decode=False))]


def check_pairs(dataset, data: list[bytes]) -> None:
    """Every caption and record is about the picture in its row; the pictures are exactly `data`."""
    assert dataset["image_sha256"][:] == [hashlib.sha256(d).hexdigest() for d in data]
    for row, content in zip(dataset, data, strict=True):
        own = hashlib.sha256(content).hexdigest()[:16]
        texts = row["captions"] + [r["text"] for r in row["caption_records"] if r["text"]]
        assert all(own in text for text in texts), texts


@pytest.fixture
def folder(tmp_path):
    """Two classes whose three pictures have the same file names."""
    for c, name in enumerate(CLASSES):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "photos" / name / f"00{i}.jpg").write_bytes(picture(10 * c + i))
    return tmp_path / "photos"


@pytest.fixture
def photos(folder):
    return load_captioned_dataset(str(folder))["train"]


def contents(dataset) -> list[bytes]:
    """The contents of the files in an image folder, row by row."""
    return [open(row["path"], "rb").read() for row in dataset.cast_column("image", Image(decode=False))["image"]]


def rows_of(images: list[bytes], labels: list[int], names=CLASSES, paths=None, **columns) -> Dataset:
    """A dataset in memory; `columns` are additional columns."""
    features = {"image": Image(), "label": ClassLabel(names=list(names))}
    for name in columns:
        features[name] = CAPTION_FEATURES.get(name) or Value("string")
    paths = paths or [f"{i}.jpg" for i in range(len(images))]
    data = [{"bytes": content, "path": path} for content, path in zip(images, paths, strict=True)]
    return Dataset.from_dict({"image": data, "label": labels, **columns}, features=Features(features))


def captioned(images, labels, texts, names=CLASSES, aspect="visual", model="m", **columns) -> Dataset:
    """One accepted record per text; `texts` is a list per image."""
    records = [
        [
            dict.fromkeys(RECORD)
            | {"aspect": aspect, "text": t, "status": "ok", "model": model, "prompt_id": "p", "sample": i}
            for i, t in enumerate(row)
        ]
        for row in texts
    ]
    return rows_of(images, labels, names, captions=texts, caption_records=records, **columns)


def write(path, values):
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def run(dataset, files, rule, **options):
    files = files if isinstance(files, list) else [files]
    return import_captions(dataset, files, rule, checker=options.pop("checker", Checker()), **options)


# -- key rules --------------------------------------------------------------------------------------------------------
def key_of(dataset, row: int, rule: str) -> str:
    path = dataset.cast_column("image", Image(decode=False))[row]["image"]["path"]
    *_, class_name, file = path.split("/")
    return {
        "file_name": file,
        "class/file_name": f"{class_name}/{file}",
        "class_file_name": f"{class_name}_{file}",
        "index": str(row),
        "class_index": f"{class_name}_{row}.jpg",
    }[rule]


@pytest.mark.parametrize("rule", ["class/file_name", "class_file_name", "index", "class_index"])
def test_pairs_are_right_under_each_rule(photos, tmp_path, rule):
    data = contents(photos)
    values = {key_of(photos, row, rule): about(content) for row, content in enumerate(data)}
    mixed = dict(sorted(values.items(), key=lambda item: item[1]))  # the order of the keys must not matter
    captions, report = run(photos, write(tmp_path / "VisualCaption.json", mixed), rule.replace("class_index", "index"))
    check_pairs(captions, data)
    assert captions["captions"][:] == [[about(content)] for content in data]
    assert not report.files[0].unmatched_keys and not report.files[0].images_without and not report.images_without
    record = captions[0]["caption_records"][0]
    assert (record["aspect"], record["model"], record["prompt_id"]) == ("visual", "imported", "VisualCaption")
    assert record["sample"] == 0 and record["status"] == "ok" and record["attempts"] is None


def test_same_file_names_are_refused_and_the_rule_that_helps_is_named(photos, tmp_path):
    path = write(tmp_path / "VisualCaption.json", {"001.jpg": "whose?"})
    with pytest.raises(
        UserError, match=r"'001.jpg' fits cats/001.jpg \(row 1\), dogs/001.jpg .*class/file_name"
    ) as error:
        run(photos, path, "file_name")
    assert "write keys such as cats/001.jpg, dogs/001.jpg" in str(error.value)
    write(path, {"001.jpg": "whose?", "cats/001.jpg": "a cat", "dogs/001.jpg": "a dog"})
    with pytest.raises(UserError, match="Type key_rule class/file_name"):
        run(photos, path, "file_name")


def test_file_names_that_are_unique_among_the_keys_work(folder, tmp_path):
    (folder / "cats" / "only.jpg").write_bytes(picture(77))
    photos = load_captioned_dataset(str(folder))["train"]
    captions, report = run(photos, write(tmp_path / "Shape.json", {"only.jpg": about(picture(77))}), "file_name")
    check_pairs(captions, contents(photos))
    assert sum(map(len, captions["captions"])) == 1 and len(report.images_without) == 6


def test_underscores_that_make_two_pictures_share_a_key_are_refused(tmp_path):
    data = rows_of([picture(1), picture(2)], [0, 1], ("a", "a_b"), ["b_c.jpg", "c.jpg"])
    with pytest.raises(UserError, match=r"fits a/b_c.jpg .*Rule file_name tells them apart"):
        run(data, write(tmp_path / "x.json", {"a_b_c.jpg": "whose?"}), "class_file_name")


def test_two_keys_for_one_picture_are_refused(photos, tmp_path):
    with pytest.raises(UserError, match=r"'1' and '001', which both fit cats/001.jpg"):
        run(photos, write(tmp_path / "x.json", {"1": "this", "001": "or this"}), "index")


def test_numbered_keys_whose_class_is_not_the_row_s_are_refused(photos, tmp_path):
    values = {f"{('cats', 'dogs')[row % 2]}_{row}.jpg": "text" for row in range(6)}
    with pytest.raises(UserError, match=r"expected rows in the order of the keys, found key 'dogs_1.jpg' at row 1"):
        run(photos, write(tmp_path / "x.json", values), "index")


def test_the_class_is_the_label_s_name_or_the_folder(folder, tmp_path):
    photos = load_captioned_dataset(str(folder))["train"]
    photos = photos.cast_column("label", ClassLabel(names=["house cat", "dog"]))
    data = contents(photos)
    values = {"cats/000.jpg": about(data[0]), "house cat/001.jpg": about(data[1]), "dog/002.jpg": about(data[5])}
    captions, _ = run(photos, write(tmp_path / "x.json", values), "class/file_name")
    check_pairs(captions, data)
    assert [len(c) for c in captions["captions"]] == [1, 1, 0, 0, 0, 1]


def test_accents_are_compared_however_they_are_spelt(tmp_path):
    data = rows_of([picture(1)], [0], paths=[unicodedata.normalize("NFD", "crème.jpg")])
    key = unicodedata.normalize("NFC", "crème.jpg")
    captions, _ = run(data, write(tmp_path / "x.json", {key: about(picture(1))}), "file_name")
    check_pairs(captions, [picture(1)])


# -- what is not matched ----------------------------------------------------------------------------------------------
def test_both_sides_are_reported(photos, tmp_path):
    data = contents(photos)
    first = {"cats/000.jpg": about(data[0]), "cats/999.jpg": "nobody", "birds/000.jpg": "nobody"}
    second = {"cats/000.jpg": about(data[0], "shape"), "dogs/002.jpg": about(data[5])}
    paths = [write(tmp_path / "VisualCaption.json", first), write(tmp_path / "ShapeCaption.json", second)]
    captions, report = run(photos, paths, "class/file_name")
    check_pairs(captions, data)
    assert [f.unmatched_keys for f in report.files] == [["cats/999.jpg", "birds/000.jpg"], []]
    assert [len(f.images_without) for f in report.files] == [5, 4]
    assert report.images_without == ["cats/001.jpg", "cats/002.jpg", "dogs/000.jpg", "dogs/001.jpg"]
    text = "\n".join(report.lines())
    assert "1 of 3 keys matched" in text and "2 keys fit no image: cats/999.jpg, birds/000.jpg." in text
    assert "4 of 6 images got no usable caption" in text and "cats/001.jpg, cats/002.jpg, dogs/000.jpg, …" in text


def test_a_file_that_fits_nothing_is_refused_with_the_rule_that_fits(photos, tmp_path):
    path = write(tmp_path / "x.json", {"cats_000.jpg": "a cat", "zebra_000.jpg": "a zebra"})
    with pytest.raises(UserError) as error:
        run(photos, path, "class/file_name")
    for part in ("cats/000.jpg", "cats_000.jpg", "key_rule class_file_name", "fits 1 of 2 keys"):
        assert part in str(error.value)
    good = write(tmp_path / "good.json", {"cats/000.jpg": "a cat"})
    with pytest.raises(UserError, match=r"x\.json"):
        run(photos, [good, path], "class/file_name")
    with pytest.raises(UserError, match="another dataset"):
        run(photos, write(path, {"zebra.png": "a zebra"}), "class_file_name")


def test_pictures_without_file_names_need_the_index(tmp_path):
    data = rows_of([picture(1), picture(2)], [0, 1], paths=[None, None])
    path = write(tmp_path / "x.json", {"1": about(picture(2))})
    with pytest.raises(UserError, match=r"such as none; found 1, and none fits.*key_rule index"):
        run(data, path, "file_name")
    captions, report = run(data, path, "index")
    check_pairs(captions, [picture(1), picture(2)])
    assert report.images_without == ["row 0 of the dataset"]


# -- values -----------------------------------------------------------------------------------------------------------
def test_flat_and_merged_layouts(photos, tmp_path):
    data = contents(photos)
    merged = {"0": [about(data[0], "first"), about(data[0], "second")], "1": []}
    flat = {
        "0": about(data[0], "flat"),
        "1": [about(data[1], "x"), about(data[1], "y")],
        "2": None,
        "3": " \n",
        "4": [None],
    }
    paths = [write(tmp_path / "all.json", merged), write(tmp_path / "TextureCaption.json", flat)]
    captions, report = run(photos, paths, "index", model="gemini")
    check_pairs(captions, data)
    records = captions["caption_records"][:]
    brief = [[(r["aspect"], r["sample"], r["status"]) for r in row] for row in records]
    assert brief == [
        [("unknown", 0, "ok"), ("unknown", 1, "ok"), ("texture", 0, "ok")],
        [("unknown", 0, "empty"), ("texture", 0, "ok"), ("texture", 1, "ok")],
        [("texture", 0, "empty")],
        [("texture", 0, "empty")],
        [("texture", 0, "empty")],
        [],
    ]
    assert records[2][0]["text"] is None and records[2][0]["checks"] == ["empty"]
    assert {r["model"] for row in records for r in row} == {"gemini"}
    assert captions["captions"][0] == [r["text"] for r in records[0]] and captions["captions"][2] == []
    assert report.statuses == {"ok": 5, "empty": 4}


@pytest.mark.parametrize(
    ("name", "aspect"),
    [
        ("VisualCaption", "visual"),
        ("ShapeCaption", "shape"),
        ("petals", "petals"),
        ("Color_Caption", "color"),
        ("Caption", "caption"),
    ],
)
def test_the_aspect_of_a_flat_file_is_its_name(photos, tmp_path, name, aspect):
    captions, report = run(photos, write(tmp_path / f"{name}.json", {"0": "a cat"}), "index")
    assert captions[0]["caption_records"][0]["aspect"] == report.files[0].aspect == aspect


def test_quotes_are_straightened_and_the_checker_decides(photos, tmp_path):
    checker = Checker()
    values = {"0": "the “cat’s”\n  tail", "3": "bad bad bad"}
    path = tmp_path / "x.json"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(values, ensure_ascii=False).encode()
    )  # a byte order mark, as Windows writes it
    captions, report = run(photos, path, "index", checker=checker)
    assert checker.asked == [('the "cat\'s" tail', None, 0), ("bad bad bad", None, 1)]
    assert captions["captions"][0] == ['the "cat\'s" tail'] and captions["captions"][3] == []
    good, bad = captions[0]["caption_records"][0], captions[3]["caption_records"][0]
    assert good["mentions_label"] and good["clip_tokens"] == len(good["text"])
    assert bad["status"] == "rejected" and bad["text"] is None and bad["checks"] == ["loop"]
    assert "dogs/000.jpg" in report.images_without


def test_the_default_checker_judges_but_changes_nothing(photos, tmp_path, clip):
    text = "**Sure!** Here is a caption: one of the cats."
    path = write(tmp_path / "x.json", {"0": text, "1": None})
    captions, _ = import_captions(photos, [path], "index", tokenizer=clip[1].tokenizer)
    record, empty = captions[0]["caption_records"][0], captions[1]["caption_records"][0]
    assert record["text"] == text and record["mentions_label"] and record["clip_tokens"] > 30
    assert empty["status"] == "empty" and empty["text"] is None


def test_captions_that_are_there_stay_and_nothing_is_doubled(photos, tmp_path):
    data = contents(photos)
    visual = write(tmp_path / "VisualCaption.json", {"0": about(data[0]), "1": about(data[1])})
    shape = write(tmp_path / "ShapeCaption.json", {"0": about(data[0], "shape")})
    once, _ = run(photos, visual, "index", model="a")
    twice, _ = run(once, shape, "index", model="b")
    check_pairs(twice, data)
    assert twice["captions"][0] == [about(data[0]), about(data[0], "shape")]
    assert [(r["aspect"], r["model"]) for r in twice[0]["caption_records"]] == [("visual", "a"), ("shape", "b")]
    again, report = run(twice, [visual, shape], "index", model="a")
    assert report.repeated == 2
    assert [len(r) for r in again["caption_records"]] == [3, 1, 0, 0, 0, 0]  # "shape" by "a" is another caption
    assert again["captions"][:] == twice["captions"][:]


def test_texts_of_several_pictures_are_marked(photos, tmp_path):
    captions, _ = run(photos, write(tmp_path / "x.json", {"0": "A pet.", "1": "a  pet.", "2": "mine"}), "index")
    assert [r["checks"] for row in captions["caption_records"] for r in row] == [["duplicate"], ["duplicate"], []]


def test_captions_without_records_stay_behind_the_new_ones(tmp_path):
    data = rows_of([picture(1)], [0], captions=[["by hand"]])
    captions, _ = run(data, write(tmp_path / "x.json", {"0": "new"}), "index")
    assert captions["captions"][0] == ["new", "by hand"]


# -- invalid caption files -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"0": "one", "1": "x", "0": "two"}', "each key once, found 0 more than once"),
        ('{"0": {"visual": "a"}}', "expected a text, a list of texts or null, found {"),
        ('{"0": [["a"]]}', "expected a text, a list of texts or null"),
        ('{"0": 0}', "expected a text, a list of texts or null, found 0"),
        ('{"0": false}', "expected a text, a list of texts or null"),
        ('{"0": ["a", NaN]}', "expected a text, a list of texts or null"),
        ('{"0": "half \\ud83d"}', "expected a text, a list of texts or null"),
        ('["a", "b"]', "expected a JSON object of captions by image, found a JSON list"),
        ("{}", "found an empty one"),
        ('{"0": "a"', "expected a JSON file in UTF-8"),
        ("[" * 100_000, "expected a JSON file in UTF-8"),
        ('{"0": "café"}'.encode("latin-1"), "expected a JSON file in UTF-8"),
        (None, "expected a JSON file in UTF-8"),
    ],
)
def test_wrong_files_are_refused(photos, tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"x\.json") as error:
        run(photos, path, "index")
    assert message in str(error.value)


def test_large_files_and_wrong_arguments_are_refused(photos, tmp_path, monkeypatch):
    path = write(tmp_path / "x.json", {"0": "a cat"})
    with pytest.raises(UserError, match="Did you mean 'file_name'"):
        run(photos, path, "filename")
    with pytest.raises(UserError, match="one or more different ones"):
        run(photos, [path, path], "index")
    with pytest.raises(UserError, match="columns image, label"):
        run(photos.remove_columns("label"), path, "index")
    with pytest.raises(UserError, match="labels with class names"):
        run(photos.cast_column("label", Value("int64")), path, "index")
    monkeypatch.setattr(imports, "MAX_FILE_BYTES", 10)
    with pytest.raises(UserError, match="at most 10 bytes"):
        run(photos, path, "index")


# -- pictures ---------------------------------------------------------------------------------------------------------
def test_pictures_of_a_folder_are_taken_in_as_they_are_now(photos, folder, tmp_path):
    path = write(tmp_path / "x.json", {"0": "a cat"})
    for seed in (0, 99):  # the second time, a picture was replaced under its name
        (folder / "cats" / "000.jpg").write_bytes(picture(seed))
        captions, _ = run(photos, path, "index")
        assert bytes_of(captions) == contents(photos) and bytes_of(captions)[0] == picture(seed)
        assert captions["image_sha256"][0] == hashlib.sha256(picture(seed)).hexdigest()


def test_bytes_survive_the_way_to_disk(photos, folder, tmp_path):
    """A selection in another order, written as parquet, its source deleted, opened again, and captioned once more."""
    chosen = photos.select([4, 0, 5])
    data = contents(chosen)
    values = {f"{row}": about(content) for row, content in enumerate(data)}
    captions, _ = run(chosen, write(tmp_path / "VisualCaption.json", values), "index")
    captions.to_parquet(tmp_path / "out" / "train.parquet")
    shutil.rmtree(folder)
    again = load_dataset(str(tmp_path / "out"), split="train")
    assert bytes_of(again) == data
    check_pairs(again, data)
    assert isinstance(again[0]["image"], PILImage.Image) and again.features["label"].names == list(CLASSES)
    more = {"dogs/001.jpg": about(data[0], "shape"), "cats/000.jpg": about(data[1], "shape")}
    captions, _ = run(again, write(tmp_path / "ShapeCaption.json", more), "class/file_name")
    check_pairs(captions, data)
    assert [len(c) for c in captions["captions"]] == [2, 2, 1]


def test_a_picture_that_is_not_the_recorded_one_is_refused(tmp_path):
    data = rows_of([picture(1)], [0], image_sha256=["0" * 64])
    with pytest.raises(UserError, match="expected the picture with sha256 000000000000"):
        run(data, write(tmp_path / "x.json", {"0": "a cat"}), "index")


def test_pictures_that_cannot_be_read_are_reported(photos, folder, tmp_path):
    (folder / "cats" / "001.jpg").unlink()
    captions, report = run(photos, write(tmp_path / "x.json", {"0": "a", "1": "b"}), "index")
    assert report.unreadable == ["cats/001.jpg"] and "1 images cannot be read" in "\n".join(report.lines())
    assert captions["image_sha256"][1] is None and captions["captions"][1] == ["b"]
    merged, report = merge_captions({"a": captions, "b": captions})
    assert len(merged) == 6 and merged["captions"][:] == captions["captions"][:]
    assert report.unreadable == {"a": ["cats/001.jpg"], "b": ["cats/001.jpg"]}


# -- merge ------------------------------------------------------------------------------------------------------------
PICTURES = [picture(i, ("JPEG", "PNG")[i % 2]) for i in range(6)]


def test_merged_captions_follow_their_pictures(tmp_path):
    a = captioned(PICTURES[:4], [0, 0, 1, 1], [[about(p)] for p in PICTURES[:4]])
    order = [5, 2, 0, 4]
    texts = [[about(PICTURES[i], "shape"), about(PICTURES[i])] for i in order]
    b = captioned([PICTURES[i] for i in order], [0, 0, 1, 0], texts, names=CLASSES[::-1], aspect="shape", model="n")
    merged, report = merge_captions({"a": a, "b": b})
    data = [*PICTURES[:4], PICTURES[5], PICTURES[4]]
    assert bytes_of(merged) == data
    check_pairs(merged, data)
    assert merged.features["label"].names == list(CLASSES) and merged["label"][:] == [0, 0, 1, 1, 1, 1]
    assert merged.column_names == [*a.column_names, "image_sha256"]
    assert merged["captions"][0] == [
        about(PICTURES[0]),
        about(PICTURES[0], "shape"),
    ]  # a text that both have is taken once
    assert [(r["aspect"], r["model"]) for r in merged[0]["caption_records"]] == [("visual", "m")] + [("shape", "n")] * 2
    assert (report.images, report.captions, report.records, report.repeated) == (6, 10, 12, 0)
    assert report.missing == {"a": ["dogs/0.jpg", "dogs/3.jpg"], "b": ["cats/1.jpg", "dogs/3.jpg"]}
    assert report.remapped == ["b"] and "matched by name" in "\n".join(report.lines())
    merged.to_parquet(tmp_path / "merged.parquet")
    assert bytes_of(load_dataset("parquet", data_files=str(tmp_path / "merged.parquet"), split="train")) == data


def test_labels_are_matched_by_name():
    a = captioned(PICTURES[:2], [0, 1], [["x"], ["y"]], names=("cats", "dogs", "owls"))
    b = captioned(PICTURES[:3], [1, 0, 1], [["x2"], ["y2"], ["z2"]], names=("dogs", "cats"))
    merged, _ = merge_captions({"a": a, "b": b})
    assert merged["label"][:] == [0, 1, 0] and merged["captions"][:] == [["x", "x2"], ["y", "y2"], ["z2"]]
    with pytest.raises(UserError, match=r"b: expected the classes of a \(cats, dogs\), found owls"):
        merge_captions({"a": b.cast_column("label", ClassLabel(names=["cats", "dogs"])), "b": a})


def test_exact_records_are_taken_once_and_failures_stay():
    a = captioned(PICTURES[:1], [0], [["one"]])
    failed = dict.fromkeys(RECORD) | {"aspect": "shape", "status": "failed", "sample": 0}
    records = [[*a[0]["caption_records"], failed, failed | {"status": "refused"}]]
    b = rows_of(PICTURES[:1], [0], captions=[["one", "by hand"]], caption_records=records)
    merged, report = merge_captions({"a": a, "b": b, "a again": a})
    assert [r["status"] for r in merged[0]["caption_records"]] == ["ok", "failed", "refused"] and report.repeated == 2
    assert merged["captions"][:] == [["one", "by hand"]]
    by_hand = a.remove_columns("caption_records")
    assert merge_captions({"a": a, "b": by_hand})[0]["captions"][:] == [["one"]]


def test_pictures_that_are_there_twice():
    p, q = PICTURES[:2]
    a = captioned([p, q, p], [0, 1, 0], [["p1"], ["q"], ["p2"]])
    b = captioned([p], [0], [["p3"]])
    merged, _ = merge_captions({"a": a, "b": b})
    assert merged["captions"][:] == [["p1", "p2", "p3"], ["q"], ["p1", "p2", "p3"]]
    two = captioned([p, p], [0, 1], [["cat"], ["dog"]])  # one picture, two classes: told apart by class
    merged, report = merge_captions({"two": two, "b": captioned([p], [1], [["dog again"]])})
    assert merged["label"][:] == [0, 1] and merged["captions"][:] == [["cat"], ["dog", "dog again"]]
    assert report.missing == {"two": [], "b": ["cats/0.jpg"]}
    with pytest.raises(UserError, match=r"b, row 0 \(dogs/0.jpg, sha256 .*expected class 'cats' as in a, found 'dogs'"):
        merge_captions({"a": b, "b": captioned([p], [1], [["dog"]])})


def test_other_columns_and_selections():
    texts = [[about(p)] for p in PICTURES]
    a = captioned(PICTURES, [0] * 6, texts, note=[str(i) for i in range(6)]).select([3, 1])
    b = captioned(PICTURES, [0] * 6, texts, aspect="shape").select([1, 5, 3])
    merged, _ = merge_captions({"a": a, "b": b})
    check_pairs(merged, [PICTURES[3], PICTURES[1], PICTURES[5]])
    assert bytes_of(merged) == [PICTURES[3], PICTURES[1], PICTURES[5]]
    assert merged["note"][:] == ["3", "1", None]
    other = b.add_column("note", [[1], [2], [3]], feature=List(Value("int32")))
    with pytest.raises(UserError, match="columns of the same types"):
        merge_captions({"a": a, "b": other})


def test_what_cannot_be_merged():
    a = captioned(PICTURES[:1], [0], [["one"]])
    with pytest.raises(UserError, match="two or more, found 1"):
        merge_captions({"a": a})
    with pytest.raises(UserError, match="b: expected columns image, label and captions"):
        merge_captions({"a": a, "b": rows_of(PICTURES[:1], [0])})
    with pytest.raises(UserError, match="row 0: expected a class, found -1"):
        merge_captions({"a": a, "b": captioned(PICTURES[:1], [-1], [["one"]])})
