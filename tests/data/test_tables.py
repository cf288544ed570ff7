"""Tables of images as people and other tools write them: what is read, what is refused, and which pictures they may name."""

import io
import json
import os
import tarfile
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, config
from PIL import Image as PILImage

from mmft_hf import load_captioned_dataset
from mmft_hf.core.arguments import DataArguments
from mmft_hf.core.errors import UserError
from mmft_hf.data import mapped as mapped_module
from mmft_hf.data.images import read_image
from mmft_hf.data.splits import load_splits, load_test_split

COLOURS = {"cat": (200, 30, 30), "dog": (30, 200, 30)}


def png(name, shade=0):
    buffer = io.BytesIO()
    PILImage.new("RGB", (4, 4), tuple(min(255, c + shade) for c in COLOURS[name])).save(buffer, "PNG")
    return buffer.getvalue()


ROWS = [(name, png(name, i)) for name in COLOURS for i in range(4)]


@pytest.fixture
def pictures(tmp_path):
    """Eight pictures `pics/cat_0.png …` beside the table, and their names and classes."""
    (tmp_path / "pics").mkdir()
    rows = [(f"pics/{name}_{i % 4}.png", name) for i, (name, _) in enumerate(ROWS)]
    for (path, _), (_, data) in zip(rows, ROWS, strict=True):
        (tmp_path / path).write_bytes(data)
    return rows


def everything(path, **options):
    """Class names of all rows, with the colour that each picture really has."""
    splits = load_splits(DataArguments(dataset_name=str(path), **options))
    found = []
    for split in (splits.train, splits.validation, splits.test):
        for row in split:
            red, green, _ = read_image(row["image"]).getpixel((0, 0))
            found.append((splits.class_names[row["label"]], "cat" if red > green else "dog"))
    return sorted(found)


def read_right(path, **options):
    assert everything(path, **options) == sorted((name, name) for name, _ in ROWS)


def refused(path, **options):
    with pytest.raises(UserError) as caught:
        load_splits(DataArguments(dataset_name=str(path), **options))
    return str(caught.value)


# -- parquet and Arrow of other tools ------------------------------------------------------------------------------------
BYTES, NAMES = [data for _, data in ROWS], [name for name, _ in ROWS]
STRUCTS = [{"bytes": data, "path": None} for data in BYTES]
KINDS = {
    "binary": (pa.array(BYTES), pa.array(NAMES)),
    "large binary, large string (polars)": (pa.array(BYTES, pa.large_binary()), pa.array(NAMES, pa.large_string())),
    "views (polars, Arrow 15)": (pa.array(BYTES, pa.binary_view()), pa.array(NAMES, pa.string_view())),
    "struct": (pa.array(STRUCTS), pa.array(NAMES)),
    "struct of path and bytes": (pa.array([{"path": "a.png", "bytes": b} for b in BYTES]), pa.array(NAMES)),
    "struct of bytes alone": (pa.array([{"bytes": b} for b in BYTES]), pa.array(NAMES)),
    "struct of views": (
        pa.array(STRUCTS, pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())])),
        pa.array(NAMES),
    ),
    "dictionary (pandas categories)": (pa.array(BYTES), pa.array(NAMES).dictionary_encode()),
    "fields that may not be null (Spark)": (pa.array(BYTES), pa.array(NAMES)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["parquet", "arrow", "stream"])
def test_tables_of_other_tools(kind, suffix, tmp_path):
    image, label = KINDS[kind]
    fields = [pa.field("image", image.type, "null" not in kind), pa.field("label", label.type, "null" not in kind)]
    table = pa.table([image, label], schema=pa.schema(fields))
    path = tmp_path / f"all.{'arrow' if suffix == 'stream' else suffix}"
    if suffix == "parquet":
        pq.write_table(table, path, row_group_size=None if "views" in kind else 3)  # pyarrow cannot cut views
    else:
        new = pa.ipc.new_stream if suffix == "stream" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    read_right(path)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.int8(), [0, 1]),
        (pa.uint16(), [0, 1]),
        (pa.float32(), [0, 1]),
        (pa.decimal128(10, 2), [Decimal(0), Decimal(1)]),
        (pa.dictionary(pa.int8(), pa.int64()), [0, 1]),
    ],
)
def test_whole_numbers_of_any_type_take_typed_names(kind, values, tmp_path):
    labels = [values[name == "dog"] for name in NAMES]
    array = pa.array(labels).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(labels, kind)
    pq.write_table(pa.table({"image": BYTES, "label": array}), tmp_path / "all.parquet")
    assert "plain numbers" in refused(tmp_path / "all.parquet")
    read_right(tmp_path / "all.parquet", class_names=["cat", "dog"])


def test_a_number_that_is_too_large_for_a_class_is_refused(tmp_path):
    labels = pa.array([2**64 - 1] * len(NAMES), pa.uint64())
    pq.write_table(pa.table({"image": BYTES, "label": labels}), tmp_path / "all.parquet")
    with pytest.raises(UserError, match="numbers of classes, found 18446744073709551615"):
        load_splits(DataArguments(dataset_name=str(tmp_path / "all.parquet"), class_names=["cat", "dog"]))


def test_true_and_false_are_no_classes(tmp_path):
    pq.write_table(pa.table({"image": BYTES, "label": [name == "dog" for name in NAMES]}), tmp_path / "all.parquet")
    assert "found true and false" in refused(tmp_path / "all.parquet", class_names=["cat", "dog"])


def test_other_columns_of_any_type_stay_or_are_named(tmp_path):
    n = len(BYTES)
    table = pa.table(
        {
            "image": BYTES,
            "label": NAMES,
            "when": pa.array([0] * n, pa.timestamp("us", "UTC")),
            "price": pa.array([Decimal("1.5")] * n, pa.decimal128(10, 2)),
            "words": pa.array([["a", None]] * n, pa.large_list(pa.large_string())),
            "pairs": pa.array([[("a", 1)]] * n, pa.map_(pa.string(), pa.int8())),
        }
    )
    pq.write_table(table, tmp_path / "all.parquet")
    splits = load_splits(DataArguments(dataset_name=str(tmp_path / "all.parquet")))
    assert splits.train["words"][0] == ["a", None] and {"when", "price"} <= set(splits.train.column_names)
    assert (
        splits.notes[0]
        == "all.parquet: columns of a type that is not read are left out: pairs (map<string, int8 ('pairs')>)."
    )


@pytest.mark.parametrize(
    ("levels", "inside", "why"),
    [
        (20, "", None),
        (200, "", "nested 200 levels deep"),
        (0, '{"a": 1}', None),
        (0, "{}", "a structure without fields"),
        (2, '{"a": {}}', "a structure without fields"),
    ],
)
def test_a_column_that_nothing_can_keep_is_left_out_and_named(levels, inside, why, tmp_path):
    deep = json.loads("[" * levels + inside + "]" * levels)
    save_lines = [json.dumps({"file_name": f"{i}.png", "label": name, "deep": deep}) for i, name in enumerate(NAMES)]
    for i, picture in enumerate(BYTES):
        (tmp_path / f"{i}.png").write_bytes(picture)
    (tmp_path / "metadata.jsonl").write_text("\n".join(save_lines))
    splits = load_splits(DataArguments(dataset_name=str(tmp_path)))
    assert ("deep" in splits.train.column_names) == (why is None)
    assert any(f"deep ({why}" in note for note in splits.notes) == (why is not None)
    splits.train.select_columns(["label", *({"deep"} & set(splits.train.column_names))]).to_parquet(
        tmp_path / "a.parquet"
    )


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "all.parquet"
    pq.write_table(pa.table({"image": BYTES, "label": NAMES}, metadata={"huggingface": "{"}), path)
    assert "'huggingface'" in refused(path)
    pq.write_table(pa.table({"image": BYTES, "label": NAMES}), path)
    whole = path.read_bytes()
    for damaged in (whole[:-20], b"PAR1", whole[4:], b"\0" * 50, whole[:60] + b"\xff" * 60 + whole[120:]):
        path.write_bytes(damaged)
        assert str(path) in refused(path)
    path.write_bytes(b"")
    assert "found an empty file" in refused(path)
    for name in ("all.arrow", "all.tar"):
        (tmp_path / name).write_bytes(whole)
        assert f"{name}: expected a file of type" in refused(tmp_path / name)


def test_rows_stay_on_disk_and_are_copied_once(tmp_path, monkeypatch):
    """What `datasets.map` makes of rows in memory would be in memory, too: every picture of a captioned dataset."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "0.png").write_bytes(BYTES[0])
    (tmp_path / "all.csv").write_text("image,label\n0.png,cat\n0.png,dog\n")
    pq.write_table(pa.table({"image": BYTES, "label": NAMES}), tmp_path / "all.parquet")
    for name in COLOURS:
        (tmp_path / "folders" / name).mkdir(parents=True)
        (tmp_path / "folders" / name / "0.png").write_bytes(BYTES[0])
    for name in ("all.csv", "all.parquet", "folders"):
        first = load_captioned_dataset(str(tmp_path / name))["train"]
        assert first.cache_files
        with monkeypatch.context() as context:
            context.setattr(mapped_module, "atomic_write", lambda path: pytest.fail("written again"))
            again = load_captioned_dataset(str(tmp_path / name))["train"]
        assert again._fingerprint == first._fingerprint and again[:]["label"] == first[:]["label"]
    pq.write_table(pa.table({"image": BYTES[:4], "label": NAMES[:4]}), tmp_path / "all.parquet")
    assert len(load_captioned_dataset(str(tmp_path / "all.parquet"))["train"]) == 4


def test_a_folder_of_save_to_disk_opens(tmp_path):
    features = Features({"image": Image(), "label": ClassLabel(names=["dog", "cat"])})
    labels = [["dog", "cat"].index(name) for name in NAMES]
    data = Dataset.from_dict({"image": STRUCTS, "label": labels}, features)
    data.save_to_disk(tmp_path / "one", num_shards=3)
    read_right(tmp_path / "one")
    DatasetDict(train=data, test=data).save_to_disk(tmp_path / "two")
    test = load_test_split(DataArguments(dataset_name=str(tmp_path / "two")), ["cat", "dog"])
    assert test["label"][:] == [name == "dog" for name in NAMES]


# -- WebDataset ------------------------------------------------------------------------------------------------------------
def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tar_of_webdataset(tmp_path):
    files = {}
    for i, (name, data) in enumerate(ROWS):
        files |= {f"{i:04}.png": data, f"{i:04}.cls": str(int(name == "dog")).encode(), f"{i:04}.txt": b"a caption"}
        files |= {f"{i:04}.json": json.dumps({"kind": name, "n": i}).encode(), f"{i:04}.mask.bin": b"0"}
    path = write_tar(tmp_path / "train-0000.tar", files)
    assert "plain numbers" in refused(path)
    read_right(path, class_names=["cat", "dog"])
    read_right(path, label_column="kind", captions_column="txt")
    splits = load_splits(DataArguments(dataset_name=str(path), label_column="kind", captions_column="txt"))
    assert splits.has_captions and splits.notes[0].endswith("0000.mask.bin, 0001.mask.bin, 0002.mask.bin, … (8).")
    assert "column 'label' for the label is missing: found image, txt" in refused(
        write_tar(tmp_path / "b.tar", {"0.png": BYTES[0], "0.txt": b"x"})
    )
    assert "found no pictures" in refused(write_tar(tmp_path / "c.tar", {"0.txt": b"x"}))
    assert "one picture of each sample" in refused(write_tar(tmp_path / "d.tar", {"0.png": b"", "0.jpg": b""}))
    assert "0.json: expected a JSON object" in refused(write_tar(tmp_path / "e.tar", {"0.png": b"", "0.json": b"{"}))


def test_links_of_a_tar_lead_nowhere(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("0.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    assert "found no pictures" in refused(tmp_path / "a.tar")


# -- CSV as people have it -----------------------------------------------------------------------------------------------
def csv_of(rows, separator=",", header="image,label", end="\n"):
    lines = [header.replace(",", separator), *(separator.join(row) for row in rows)]
    return end.join(lines) + end


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("plain", lambda rows: csv_of(rows).encode()),
        ("byte order mark", lambda rows: csv_of(rows).encode("utf-8-sig")),
        ("semicolons", lambda rows: csv_of(rows, ";").encode()),
        ("tabs", lambda rows: csv_of(rows, "\t").encode()),
        ("bars", lambda rows: csv_of(rows, "|").encode()),
        ("a hint to Excel", lambda rows: ("sep=;\r\n" + csv_of(rows, ";", end="\r\n")).encode()),
        ("UTF-16 of Excel", lambda rows: csv_of(rows, "\t").encode("utf-16")),
        ("UTF-32", lambda rows: csv_of(rows).encode("utf-32")),
        ("Windows line ends", lambda rows: csv_of(rows, end="\r\n").encode()),
        ("old Mac line ends", lambda rows: csv_of(rows, end="\r").encode()),
        ("blank lines", lambda rows: csv_of(rows, end="\n\n\n").encode()),
        ("no line end", lambda rows: csv_of(rows).rstrip().encode()),
        ("blanks after commas", lambda rows: csv_of(rows, ", ").encode()),
        ("quotes", lambda rows: csv_of([(f'"{p}"', f'"{c}"') for p, c in rows]).encode()),
        (
            "line breaks in quotes",
            lambda rows: csv_of([(p, c, '"a\nb, c"') for p, c in rows], header="image,label,n").encode(),
        ),
        (
            "an index of pandas",
            lambda rows: csv_of([(str(i), *r) for i, r in enumerate(rows)], header=",image,label").encode(),
        ),
        ("separators at the line end", lambda rows: csv_of([(*r, "", "") for r in rows]).encode()),
        ("backslashes", lambda rows: csv_of([(p.replace("/", "\\"), c) for p, c in rows]).encode()),
        ("./", lambda rows: csv_of([(f"./{p}", c) for p, c in rows]).encode()),
        (
            "other columns first",
            lambda rows: csv_of([("1.5", c, p) for p, c in rows], header="size,label,image").encode(),
        ),
    ],
)
def test_csv_files(name, make, pictures, tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes(make(pictures))
    read_right(path)


def test_csv_with_tabs_by_its_suffix_and_with_absolute_paths(pictures, tmp_path):
    (tmp_path / "list.tsv").write_text(csv_of(pictures, "\t"))
    read_right(tmp_path / "list.tsv")
    for start in ("", "file://"):
        (tmp_path / "list.csv").write_text(csv_of([(f"{start}{tmp_path}/{p}", c) for p, c in pictures]))
        read_right(tmp_path / "list.csv")


def test_a_column_of_splits_is_said_not_to_be_read(pictures, tmp_path):
    rows = [(*row, "Train" if i else "test") for i, row in enumerate(pictures)]
    (tmp_path / "list.csv").write_text(csv_of(rows, header="image,label,Split"))
    splits = load_splits(DataArguments(dataset_name=str(tmp_path / "list.csv")))
    assert splits.notes[0].startswith("Column 'Split' (test, Train) is not read: its rows are one split.")


def test_csv_that_is_not_utf8_is_said(pictures, tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes(csv_of([(p, c.replace("cat", "café")) for p, c in pictures]).encode("cp1252"))
    splits = load_splits(DataArguments(dataset_name=str(path)))
    assert splits.class_names == ["café", "dog"]
    assert splits.notes[0] == "list.csv is not in UTF-8 and was read as Windows-1252."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found an empty file"),
        ("\n\n", "column 'image' for the image is missing|expected"),
        ("image,label\n", "found none: it is empty"),
        (
            "pics/cat_0.png,cat\npics/dog_0.png,dog\n",
            "names of the columns in the first line, found pics/cat_0.png, cat",
        ),
        ("image,label,label\npics/cat_0.png,cat,dog\n", "each column once, found 'label' several times"),
        ("image,label\npics/cat_0.png,cat,tabby\n", "line 2: expected 2 cells .* found 3"),
        ("image,label\npics/cat_0.png,cat\npics/d", "line 3: expected 2 cells .* found 1"),
        ('image,label\n"pics/cat_0.png,cat\n', "unexpected end of data"),
        (
            "image,label\nhttp://localhost/a.png,cat\n",
            "row 0: .*found the address http://localhost/a.png. Nothing is fetched",
        ),
        ("image,label\nC:\\pics\\a.png,cat\n", r"row 0: .*found 'C:\\\\pics"),
        (
            "image,label\npics/none.png,cat\n",
            "found none of 1; missing is for example .*/pics/none.png. Type --image_root",
        ),
        ("image,label\npics/cat_0.png,c\0at\n", "characters with the code 0. Save the file again, as UTF-8"),
        ("photo,label\npics/cat_0.png,cat\n", "column 'image' for the image is missing: found photo, label"),
    ],
)
def test_csv_files_that_are_refused(text, message, pictures, tmp_path):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=message.replace("--image_root", "(--)?image_root")):
        load_splits(DataArguments(dataset_name=str(tmp_path / "list.csv")))


@pytest.mark.parametrize(
    "names",
    [
        ["NA", "null"],
        ["None", "true"],
        ["nan", "false"],
        ["007", "7e1"],
        ["1e3", "1e4"],
        ["1.10", "1.2"],
        ["inf", "infinity"],
        ["2020-01-01", "2020-01-02"],
        ["yes", "no"],
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_text_that_looks_like_something_else_stays_text(kind, names, pictures, tmp_path):
    new = dict(zip(COLOURS, names, strict=True))
    path = tmp_path / f"list.{kind}"
    if kind == "csv":
        path.write_text(csv_of([(p, new[c]) for p, c in pictures]))
    else:
        path.write_text("".join(json.dumps({"image": p, "label": new[c]}) + "\n" for p, c in pictures))
    assert load_splits(DataArguments(dataset_name=str(path))).class_names == sorted(names)
    assert everything(path) == sorted((new[c], c) for c in NAMES)


def test_numbers_in_a_csv_file(pictures, tmp_path):
    path = tmp_path / "list.csv"
    for numbers in ("0 1", "0.0 1.0"):
        new = dict(zip(COLOURS, numbers.split(), strict=True))
        path.write_text(csv_of([(p, new[c]) for p, c in pictures]))
        assert "plain numbers (2 different ones)" in refused(path)
        read_right(path, class_names=["cat", "dog"])
        with pytest.raises(UserError, match="plain numbers"):  # a model cannot know which number is which class either
            load_test_split(DataArguments(dataset_name=str(path), test_split="train"), ["cat", "dog"])
    new = {"cat": "0.5", "dog": "1.5"}
    path.write_text(csv_of([(p, new[c]) for p, c in pictures]))
    message = refused(path)
    assert "row 0: expected a class, found the number 0.5 with a fraction" in message
    assert message.endswith("type class_names 0.5 1.5")
    assert everything(path, class_names=["1.5", "0.5"]) == sorted((new[c], c) for c in NAMES)


# -- JSON ------------------------------------------------------------------------------------------------------------------
def test_json_files(pictures, tmp_path):
    rows = [{"image": p, "label": c, "captions": ["a", "b"] if c == "cat" else None} for p, c in pictures]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    read_right(tmp_path / "list.json")
    (tmp_path / "list.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n\n".join(map(json.dumps, rows)).encode())
    read_right(tmp_path / "list.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": "a"', "line 1: expected one JSON object per line"),
        ("[1, 2]", "entry 0: expected a JSON object, found 1"),
        ('{"images": [],\n "annotations": []}', "found one object with images, annotations"),
        (
            '{"image": "a", "label": 1}\n{"image": "a", "label": "x"}',
            "column 'label': expected values of one type, found int, str",
        ),
        ('{"image": "a", "label": 99999999999999999999999}', "column 'label': expected values of one type"),
        ("[" * 100_000, "expected a file of type .jsonl"),
        ('{"image": "\\ud800", "label": "a"}', "column 'image': expected values of one type"),
    ],
)
def test_json_files_that_are_refused(text, message, tmp_path):
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        load_splits(DataArguments(dataset_name=str(tmp_path / "list.jsonl")))


def test_deep_json_that_could_be_a_split_file_is_refused(tmp_path):
    (tmp_path / "list.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"expected a file of type \.json"):
        load_splits(DataArguments(dataset_name=str(tmp_path / "list.json")))


# -- which pictures a table may name ------------------------------------------------------------------------------------
def secret(tmp_path, pictures):
    """A folder with a table, and a picture that is not in it."""
    data = tmp_path / "data"
    (tmp_path / "pics").rename(tmp_path / "private")
    data.mkdir()
    (data / "cat_0.png").write_bytes(BYTES[0])
    return data, tmp_path / "private" / "dog_0.png"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "arrow"])
@pytest.mark.parametrize("how", ["absolute", "relative", "file", "dots behind a link"])
def test_a_table_names_no_picture_elsewhere(how, kind, pictures, tmp_path):
    data, outside = secret(tmp_path, pictures)
    (tmp_path / "link target").mkdir()
    (data / "link").symlink_to(tmp_path / "link target")
    path = {
        "absolute": str(outside),
        "relative": "../private/dog_0.png",
        "file": f"file://{outside}",
        "dots behind a link": "link/../../data/link/../private/dog_0.png",
    }[how]
    rows = [{"image": "cat_0.png", "label": "cat"}, {"image": path, "label": "dog"}]
    file = data / f"all.{kind}"
    if kind == "csv":
        file.write_text(csv_of([tuple(row.values()) for row in rows]))
    elif kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:  # an `Image` column with paths and without bytes
        features = Features({"image": Image(decode=False), "label": Value("string")})
        made = Dataset.from_dict(
            {"image": [{"bytes": None, "path": r["image"]} for r in rows], "label": ["cat", "dog"]}, features
        )
        table = made.data.table
        if kind == "parquet":
            pq.write_table(table, file)
        else:
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    if how == "dots behind a link":  # is written out before it is opened
        found = load_captioned_dataset(str(file))["train"].cast_column("image", Image(decode=False))[1]["image"]["path"]
        assert found == f"{data}/private/dog_0.png" and not os.path.exists(found)
        return
    with pytest.raises(UserError, match=r"row 1: expected pictures in .*/data, found .* elsewhere") as caught:
        load_captioned_dataset(str(file))
    assert str(tmp_path / "private") in str(caught.value)
    if how != "relative":
        rooted = load_captioned_dataset(str(file), image_root=str(tmp_path))["train"]
        assert rooted.cast_column("image", Image(decode=False))[1]["image"]["path"] == str(outside)


def test_pictures_behind_links_are_read(pictures, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pics").symlink_to(tmp_path / "pics")
    (tmp_path / "data" / "list.csv").write_text(csv_of(pictures))
    read_right(tmp_path / "data" / "list.csv")
    (tmp_path / "other name").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "list.csv").write_text(csv_of([(f"{tmp_path}/other name/{p}", c) for p, c in pictures]))
    read_right(tmp_path / "data" / "list.csv")


def test_bytes_count_and_their_path_does_not(tmp_path):
    rows = [{"bytes": data, "path": "/etc/passwd"} for data in BYTES]
    pq.write_table(pa.table({"image": rows, "label": NAMES}), tmp_path / "all.parquet")
    read_right(tmp_path / "all.parquet")


def test_some_pictures_within_and_some_beside_the_table(pictures, tmp_path):
    rows = [
        {"bytes": None, "path": p} if i % 2 else {"bytes": BYTES[i], "path": None} for i, (p, _) in enumerate(pictures)
    ]
    pq.write_table(pa.table({"image": rows, "label": NAMES}), tmp_path / "all.parquet", row_group_size=3)
    read_right(tmp_path / "all.parquet")


def test_a_split_file_names_no_picture_elsewhere(pictures, tmp_path):
    data, outside = secret(tmp_path, pictures)
    rows = [["cat_0.png", 0, "cat"], [str(outside), 1, "dog"]]
    (data / "split_zhou_X.json").write_text(json.dumps({"train": rows, "val": rows[:1], "test": rows[:1]}))
    assert "expected each image once" in refused(data / "split_zhou_X.json")
    (data / "b.png").write_bytes(BYTES[1])
    (data / "c.png").write_bytes(BYTES[2])
    found = {"train": rows, "val": [["b.png", 0, "cat"]], "test": [["c.png", 0, "cat"]]}
    (data / "split_zhou_X.json").write_text(json.dumps(found))
    assert "elsewhere" in refused(data / "split_zhou_X.json")


def test_folders_with_brackets_and_signs_hold_tables(pictures, tmp_path):
    odd = tmp_path / "a [1] #%20 {x} é*?"
    odd.mkdir()
    os.rename(tmp_path / "pics", odd / "pics")
    (odd / "list.csv").write_text(csv_of(pictures))
    read_right(odd / "list.csv")
    np.testing.assert_equal(len(everything(odd / "list.csv")), 8)
