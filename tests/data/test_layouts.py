"""Folders and tables as people have them: one table of layouts, each read by every verb, with the rows and notes that are right.

A layout is a line of `LAYOUTS`. Files are written with braces (`{train,test}/{cat,dog}/{1..3}.png`); so are the pictures expected of each
split and class, relative to the folder. A picture inside a table is named by the path that is stored with it.
"""

import io
import json
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage

from mmft_hf.benchmark.run.data_checks import check_labels
from mmft_hf.captioning.workflow import load_data
from mmft_hf.core.arguments import DataArguments
from mmft_hf.core.errors import UserError, in_python
from mmft_hf.data.sources import open_source
from mmft_hf.data.splits import load_splits, load_test_split


@dataclass
class Layout:
    """What is in a folder, and what is read from it.

    Args:
        name: says what is special.
        files: of the folder; pictures get pixels, other files their own name as content.
        rows: the pictures of each split and class. None as class: pictures without one.
        notes: a pattern for each note, in order. No further note may appear.
        refused: a pattern of the message, if the layout is refused.
        options: further settings.
        make: writes what `files` cannot say.
        opened: what `--dataset_name` names, relative to the folder.
    """

    name: str
    files: str
    rows: dict[str, dict[str | None, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    refused: str = ""
    options: dict = field(default_factory=dict)
    make: Callable[[Path], object] | None = None
    opened: str = ""


def expand(text: str) -> list[str]:
    """`{a,b}/{1..2}.png` as `a/1.png`, `a/2.png`, `b/1.png`, `b/2.png`. Blanks separate; `␣` is a blank in a name."""
    found = []
    for word in text.split():
        words = [word]
        while any("{" in w for w in words):
            words = [
                w.replace(m[0], choice, 1)
                for w in words
                for m in [re.search(r"\{(.*?)\}", w)]
                for choice in choices(m[1])
            ]
        found += [w.replace("␣", " ") for w in words]
    return found


def choices(inside: str) -> list[str]:
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        return list(map(str, range(int(bounds[1]), int(bounds[2]) + 1)))
    return inside.split(",")


def link(place: str, target: str) -> Callable[[Path], None]:
    """Makes a link in the folder, to a path relative to the folder."""

    def make(root: Path) -> None:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).symlink_to(root / target)

    return make


def write(name: str, text: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")

    return make


def both(*makers: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        for maker in makers:
            maker(root)

    return make


PETS = {"cat": "{}cat/{{1..3}}.png", "dog": "{}dog/{{1..3}}.png"}
PET_FILES = "{cat,dog}/{1..3}.png"


def pets(folder: str = "") -> dict[str | None, str]:
    """Three cats and three dogs in two folders."""
    return {name: text.format(folder) for name, text in PETS.items()}


def lines(name: str, *rows: dict) -> Callable[[Path], None]:
    """Writes a JSONL file."""
    return write(name, "".join(json.dumps(row) + "\n" for row in rows))


def _png() -> bytes:
    file = io.BytesIO()
    PILImage.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


PICTURE = _png()


def table(rows: dict[str, str]) -> Dataset:
    """The pictures of each class, stored in the table."""
    pairs = [(file, label) for label, files in rows.items() for file in expand(files)]
    pictures = [{"bytes": PICTURE, "path": file} for file, _ in pairs]
    names = list(rows)
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": pictures, "label": [names.index(label) for _, label in pairs]}, features)


def parquet(*names: str) -> Callable[[Path], None]:
    """Writes parquet files; each holds three cats and three dogs, called as `stored` calls them."""

    def make(root: Path) -> None:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            table(stored(name)).to_parquet(root / name)

    return make


def stored(*names: str) -> dict[str | None, str]:
    """The pictures that `parquet` puts into these files."""
    return {label: f"{{{','.join(Path(name).stem for name in names)}}}_{label}{{1..3}}.png" for label in ("cat", "dog")}


def card(*files: tuple[str, str], **config) -> Callable[[Path], None]:
    """Writes a card that names the files of each split."""
    front = {
        "configs": [{"config_name": "default", "data_files": [{"split": s, "path": p} for s, p in files], **config}]
    }
    return write("README.md", f"---\n{json.dumps(front)}\n---\n# Pets\n")


def csv_of(name: str, folder: str = "images/") -> Callable[[Path], None]:
    """Writes a CSV file that lists `1.png` to `6.png` of a folder."""
    rows = [f"{folder}{i}.png,{'cat' if i < 4 else 'dog'}\n" for i in range(1, 7)]
    return write(name, "image,label\n" + "".join(rows))


def packed(
    name: str, content="binary", text="string", order=("bytes", "path"), names: tuple[str, ...] = ()
) -> Callable[[Path], None]:
    """Writes the pictures of `parquet` as other tools do: with other types of Arrow, other numbers of the classes."""

    def make(root: Path) -> None:
        pairs = [(file, label) for label, files in stored(name).items() for file in expand(files)]
        kind = pa.struct([(part, getattr(pa, {"bytes": content, "path": text}[part])()) for part in order])
        images = pa.array([{"bytes": PICTURE, "path": file} for file, _ in pairs], kind)
        labels = pa.array([label for _, label in pairs])
        rows = pa.table({"image": images, "label": labels.cast(getattr(pa, text)())})
        if names:
            rows = table({label: stored(name)[label] for label in names}).data.table
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(rows, root / name)
        else:
            with pa.OSFile(str(root / name), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
                writer.write_table(rows)

    return make


def tar(*names: str) -> Callable[[Path], None]:
    """Writes tars of WebDataset with the pictures of `parquet`."""

    def make(root: Path) -> None:
        for name in names:
            with tarfile.open(root / name, "w") as file:
                for label, files in stored(name).items():
                    for picture in expand(files):
                        for member, data in ((picture, PICTURE), (f"{picture[:-4]}.cls", label.encode())):
                            info = tarfile.TarInfo(member)
                            info.size = len(data)
                            file.addfile(info, io.BytesIO(data))

    return make


def saved(name: str, *splits: str) -> Callable[[Path], None]:
    """Writes what `save_to_disk` writes."""

    def make(root: Path) -> None:
        parts = {split: table(stored(split)) for split in splits or (name,)}
        (DatasetDict(parts) if splits else parts[name]).save_to_disk(root / name)

    return make


def csv_text(change: Callable[[str], str], name: str = "train.csv") -> Callable[[Path], None]:
    """Writes the list of `csv_of`, changed."""
    rows = [f"images/{i}.png,{'cat' if i < 4 else 'dog'}\n" for i in range(1, 7)]
    return write(name, change("image,label\n" + "".join(rows)))


PICTURES = "images/{1..6}.png"
LISTED = {"cat": "images/{1..3}.png", "dog": "images/{4..6}.png"}
OUTSIDE = "Nothing outside of the folder is read or fetched"
ALL = ("train", "validation", "test")
TWO_LEVELS = "two levels that can be the classes: site_a, site_b, or cat, dog below them. "

LAYOUTS = [
    # -- classes --------------------------------------------------------------------------------------------------------
    Layout("class folders", PET_FILES, {"train": pets()}),
    Layout(
        "levels below a class belong to it",
        "cat/{indoor,outdoor/day}/{1..2}.png dog/{1..3}.png",
        {"train": {"cat": "cat/{indoor,outdoor/day}/{1..2}.png", "dog": "dog/{1..3}.png"}},
    ),
    Layout(
        "one level that every class has belongs to the class",
        "{cat,dog}/images/{1..3}.png",
        {"train": {"cat": "cat/images/{1..3}.png", "dog": "dog/images/{1..3}.png"}},
    ),
    Layout(
        "pictures in a class and below it",
        "cat/{1..2}.png cat/indoor/{1..2}.png dog/{1..3}.png dog/indoor/1.png",
        {"train": {"cat": "cat/{1..2}.png cat/indoor/{1..2}.png", "dog": "dog/{1..3}.png dog/indoor/1.png"}},
    ),
    Layout(
        "split words in file names mean nothing",
        "cat/{test_cat_001,train,dev-2}.png dog/{valid.1,test,val}.png",
        {"train": {"cat": "cat/{test_cat_001,train,dev-2}.png", "dog": "dog/{valid.1,test,val}.png"}},
    ),
    Layout(
        "split words within folder names mean nothing",
        "{my_train_data,test-tube,valid␣passport}/{1..3}.png",
        {
            "train": {
                name: f"{name.replace(' ', '␣')}/{{1..3}}.png"
                for name in ("my_train_data", "test-tube", "valid passport")
            }
        },
    ),
    Layout(
        "split words below a class mean nothing",
        "cat/test/{1..3}.png dog/{1..3}.png",
        {"train": {"cat": "cat/test/{1..3}.png", "dog": "dog/{1..3}.png"}},
    ),
    Layout(
        "the folder itself is called train",
        "test/train/{cat,dog}/{1..3}.png",
        {"train": pets("test/train/")},
        opened="test/train",
    ),
    Layout(
        "numbers as classes",
        "{0..10}/{1..3}.png",
        {"train": {str(k): f"{k}/{{1..3}}.png" for k in range(11)}},
    ),
    Layout(
        "names that need quoting",
        '[ab]*?␣%20#/{1..3}.png it\'s␣"ä"/[1]␣{1..3}.png $HOME;~/{1..3}.png',
        {
            "train": {
                "[ab]*? %20#": "[ab]*?␣%20#/{1..3}.png",
                'it\'s "ä"': 'it\'s␣"ä"/[1]␣{1..3}.png',
                "$HOME;~": "$HOME;~/{1..3}.png",
            }
        },
    ),
    Layout(
        "suffixes in any case",
        "cat/{1.PNG,2.Jpg,3.jpeg} dog/{1.jpe,2.jfif,3.JPEG}",
        {"train": {"cat": "cat/{1.PNG,2.Jpg,3.jpeg}", "dog": "dog/{1.jpe,2.jfif,3.JPEG}"}},
    ),
    Layout(
        "files that begin with _ are pictures like others",
        "{cat,dog}/_DSC{1..3}.png",
        {"train": {"cat": "cat/_DSC{1..3}.png", "dog": "dog/_DSC{1..3}.png"}},
    ),
    # -- splits ---------------------------------------------------------------------------------------------------------
    Layout("three splits", "{train,validation,test}/" + PET_FILES, {split: pets(f"{split}/") for split in ALL}),
    Layout(
        "split words in other letters",
        "{Train,VAL,Test}/" + PET_FILES,
        {"train": pets("Train/"), "validation": pets("VAL/"), "test": pets("Test/")},
    ),
    Layout(
        "other words for splits are said",
        "{Training_Set,validate,holdout}/" + PET_FILES,
        {"train": pets("Training_Set/"), "validation": pets("validate/"), "test": pets("holdout/")},
        [
            "'Training_Set' is read as the train split",
            "'holdout' is read as the test split",
            "'validate' is read as the validation",
        ],
    ),
    Layout(
        "two folders for one split",
        "{train,test,eval}/" + PET_FILES,
        {"train": pets("train/"), "test": pets("test/"), "eval": pets("eval/")},
        ["'eval' is a further split"],
    ),
    Layout(
        "a class called test in every split",
        "{train,test}/{cat,test,train}/{1..3}.png",
        {s: {name: f"{s}/{name}/{{1..3}}.png" for name in ("cat", "test", "train")} for s in ("train", "test")},
    ),
    Layout(
        "a further split",
        "{train,test,test_night}/" + PET_FILES,
        {split: pets(f"{split}/") for split in ("train", "test", "test_night")},
        ["'test_night' is a further split"],
    ),
    Layout(
        "folders beside the splits",
        "{train,test}/" + PET_FILES + " birds/{1..2}.png unsorted/{a,b}/{1..2}.png",
        {split: pets(f"{split}/") for split in ("train", "test")},
        [
            "Left out, because they are beside the splits: birds \\(2 pictures\\), unsorted \\(4 pictures\\). .* --test_split birds"
        ],
    ),
    Layout(
        "splits of other names",
        "{fold1,fold2,Fold␣3}/" + PET_FILES,
        {"fold1": pets("fold1/"), "fold␣3".replace("␣", " "): pets("Fold␣3/"), "fold2": pets("fold2/")},
        ["'fold2' is a further split"],
        options={"train_split": "fold1", "test_split": "fold 3"},
    ),
    Layout(
        "the same levels in each split, with a folder for all classes",
        "{train,test}/images/" + PET_FILES,
        {split: pets(f"{split}/images/") for split in ("train", "test")},
        ["Classes are read from train/images, the only folder there"],
    ),
    Layout(
        "class folders beside a test folder with the same classes",
        PET_FILES + " test/" + PET_FILES,
        {"train": pets(), "test": pets("test/")},
        ["folders beside test are read as the classes of the training split"],
    ),
    # -- a folder around ------------------------------------------------------------------------------------------------
    Layout(
        "a folder around the classes",
        "images/" + PET_FILES,
        {"train": pets("images/")},
        ["Read from images, the only folder"],
    ),
    Layout(
        "folders around the splits",
        "a/b/{train,test}/" + PET_FILES + " README.md a/.DS_Store",
        {"train": pets("a/b/train/"), "test": pets("a/b/test/")},
        ["Read from a/b, the only folder"],
    ),
    # -- without a class ------------------------------------------------------------------------------------------------
    Layout(
        "one picture at the top",
        PET_FILES + " cover.png",
        {"train": pets()},
        ["1 picture lies in no class folder, left out: cover.png"],
    ),
    Layout(
        "pictures beside the classes and the splits",
        "{train,test}/" + PET_FILES + " cover.png train/{1..3}.png",
        {split: pets(f"{split}/") for split in ("train", "test")},
        ["4 pictures lie in no class folder, left out: cover.png, train/1.png, train/2.png, …"],
    ),
    Layout(
        "a test folder without classes",
        "train/" + PET_FILES + " test/{1..4}.png",
        {"train": pets("train/"), "test": {None: "test/{1..4}.png"}},
    ),
    Layout(
        "a test folder without classes in a folder",
        "train/" + PET_FILES + " test/unknown/{1..4}.png",
        {"train": pets("train/"), "test": {None: "test/unknown/{1..4}.png"}},
    ),
    Layout(
        "empty folders",
        PET_FILES + " bird/ fish/readme.txt",
        {"train": pets()},
        ["Folders without a picture that can be read: bird, fish", "text files: 1 .fish/readme.txt"],
    ),
    Layout(
        "a class that a split lacks",
        "train/" + PET_FILES + " test/cat/{1..3}.png test/dog/",
        {"train": pets("train/"), "test": {"cat": "test/cat/{1..3}.png"}},
        ["Split 'test' lacks pictures of 1 of 2 classes: dog", "without a picture that can be read: test/dog"],
    ),
    # -- what is no picture ---------------------------------------------------------------------------------------------
    Layout(
        "what systems leave behind",
        PET_FILES
        + " .DS_Store cat/{._1.png,Thumbs.db} __MACOSX/cat/1.png dog/{desktop.ini,.a/1.png} @eaDir/1.png .git/1.png",
        {"train": pets()},
    ),
    Layout(
        "all that is not read, by reason",
        PET_FILES
        + " cat/IMG_1 cat/{a,b}.cr2 cat/a.psd notes.txt cat/n.txt old.zip a.mp4 b.xyz README.md LICENSE _old/{1..2}.png",
        {"train": pets()},
        [
            r"Pictures that cannot be read, left out: 3 \(cat/a.cr2, cat/a.psd, cat/b.cr2\)\. Convert them",
            r"Left out: videos: 1 \(a.mp4\); other files: 1 \(b.xyz\); files without a suffix: 1 \(cat/IMG_1\); text files: 2 "
            r"\(cat/n.txt, notes.txt\); archives, which have to be unpacked: 1 \(old.zip\); folders that begin with _: 1 "
            r"\(_old with 2 pictures\)\.",
        ],
    ),
    Layout(
        "lists beside class folders",
        PET_FILES + " train.csv cat/b.jsonl split_zhou_Pets.json",
        {"train": pets()},
        ["not read: cat/b.jsonl, split_zhou_Pets.json, train.csv. .* --dataset_name .*pets/train.csv"],
    ),
    Layout(
        "a run in the folder",
        PET_FILES
        + " out/{mmft.json,confusion.png,predictions_test.parquet} captioned/{captions.json,captions.html,captions.png}",
        {"train": pets()},
        ["folders that mmft-hf wrote: 2 .captioned, out"],
    ),
    # -- links ----------------------------------------------------------------------------------------------------------
    Layout(
        "links to folders and files",
        "../stock/{tom,rex}/{1..3}.png cat/4.png",
        {"train": {"cat": "cat/4.png cat/tom/{1..3}.png", "dog": "dog/{1..3}.png"}},
        make=both(link("cat/tom", "../stock/tom"), link("dog", "../stock/rex")),
    ),
    Layout(
        "links that lead back, nowhere, or to a picture that is there",
        PET_FILES,
        {"train": pets()},
        [
            "Links to pictures that are read already, left out: 1 .dog/again.png",
            "broken links: 1 .cat/lost.png.; .*back.*: 1 .cat/up.",
        ],
        make=both(link("cat/up", "."), link("cat/lost.png", "nowhere"), link("dog/again.png", "dog/1.png")),
    ),
    # -- metadata files -------------------------------------------------------------------------------------------------
    Layout(
        "metadata with captions, classes from folders",
        "train/" + PET_FILES + " test/" + PET_FILES,
        {"train": {"cat": "train/cat/{1..2}.png", "dog": "train/dog/{1..3}.png"}, "test": pets("test/")},
        ["1 of 12 images are in no metadata file"],
        make=lines(
            "train/metadata.jsonl",
            *[{"file_name": name, "captions": ["one", "two"]} for name in expand("cat/{1..2}.png dog/{1..3}.png")],
        ),
    ),
    Layout(
        "metadata with backslashes",
        PET_FILES,
        {"train": pets()},
        make=lines("metadata.jsonl", *({"file_name": f.replace("/", "\\"), "n": 1} for f in expand(PET_FILES))),
    ),
    Layout(
        "metadata with classes, pictures without folders",
        "{train,test}/{1..6}.png",
        {split: {"cat": f"{split}/{{1..3}}.png", "007": f"{split}/{{4..6}}.png"} for split in ("train", "test")},
        make=both(
            *[
                write(
                    f"{s}/metadata.csv",
                    "file_name,label\n" + "".join(f"{i}.png,{'cat' if i < 4 else '007'}\n" for i in range(1, 7)),
                )
                for s in ("train", "test")
            ]
        ),
    ),
    Layout(
        "one metadata file for all, its classes win over folders",
        "{train,test}/" + PET_FILES,
        {
            split: {"Cat": f"{split}/cat/{{1..3}}.png", "Dog": f"{split}/dog/{{1..3}}.png"}
            for split in ("train", "test")
        },
        ["Metadata rows that name no picture of the folder, left out: 2 .*\\(../secret.png, nowhere.png\\)"],
        options={"label_column": "breed"},
        make=lines(
            "metadata.jsonl",
            *[{"file_name": f, "breed": f.split("/")[1].title()} for f in expand("{train,test}/" + PET_FILES)],
            {"file_name": "../secret.png", "breed": "Cat"},
            {"file_name": "nowhere.png", "breed": "Cat"},
        ),
    ),
    # -- settled by what the user types ---------------------------------------------------------------------------------
    Layout(
        "a class called train",
        "{train,bus}/{1..3}.png",
        {"train": {"train": "train/{1..3}.png", "bus": "bus/{1..3}.png"}},
        ["'train' is read as a class like the folders beside it"],
    ),
    Layout(
        "a class called test, typed",
        "{cat,test}/{1..3}.png",
        {"train": {"cat": "cat/{1..3}.png", "test": "test/{1..3}.png"}},
        options={"class_names": ["cat", "test"]},
    ),
    Layout(
        "a test folder without classes beside class folders, typed",
        PET_FILES + " test/{1..3}.png",
        {"train": pets(), "test": {None: "test/{1..3}.png"}},
        ["folders beside test are read as the classes"],
        options={"class_names": ["cat", "dog"]},
    ),
    Layout(
        "two levels, the first typed as classes",
        "{site_a,site_b}/" + PET_FILES,
        {"train": {site: f"{site}/" + PET_FILES for site in ("site_a", "site_b")}},
        options={"class_names": ["site_a", "site_b"]},
    ),
    Layout(
        "two levels, the second typed as classes",
        "{site_a,site_b}/" + PET_FILES,
        {"train": {name: f"{{site_a,site_b}}/{name}/{{1..3}}.png" for name in ("cat", "dog")}},
        options={"class_names": ["dog", "cat"]},
    ),
    Layout(
        "two levels, the first typed as splits",
        "{site_a,site_b}/" + PET_FILES,
        {"site_a": pets("site_a/"), "site_b": pets("site_b/")},
        options={"train_split": "site_a", "test_split": "site_b"},
    ),
    # -- tables ---------------------------------------------------------------------------------------------------------
    Layout(
        "parquet files by split",
        "LICENSE",
        {split: stored(split) for split in ALL},
        make=parquet("train.parquet", "validation.parquet", "test.parquet"),
    ),
    Layout(
        "shards in data/, as on the Hub",
        ".gitattributes assets/logo.png",
        {
            "train": stored("train-00000-of-00002", "train-00001-of-00002"),
            "validation": stored("val-00000-of-00001"),
            "test_new": stored("test_new-00000-of-00001"),
        },
        make=parquet(*[f"data/{s}.parquet" for s in expand("train-0000{0..1}-of-00002 {val,test_new}-00000-of-00001")]),
    ),
    Layout(
        "a folder of parquet files for each split",
        "",
        {split: stored("0000") for split in ("train", "test")},
        make=parquet("default/train/0000.parquet", "default/test/0000.parquet"),
    ),
    Layout(
        "a configuration, typed",
        "",
        {"train": stored("train")},
        options={"dataset_config_name": "b"},
        make=parquet("a/test.parquet", "b/train.parquet"),
    ),
    Layout(
        "parts of one table",
        "_SUCCESS",
        {"train": stored(*[f"part-{i:05}-1b4e28ba-2fa1-11d2-883f-0016d3cca427.c000.snappy.parquet" for i in range(2)])},
        make=parquet(*[f"part-{i:05}-1b4e28ba-2fa1-11d2-883f-0016d3cca427.c000.snappy.parquet" for i in range(2)]),
    ),
    Layout(
        "splits that the card names",
        "",
        {"fit": stored("a1", "a2"), "final": stored("b")},
        options={"train_split": "fit", "test_split": "final"},
        make=both(
            parquet("x/a1.parquet", "x/a2.parquet", "b.parquet"), card(("fit", "**/a[12].parquet"), ("final", "b.*"))
        ),
    ),
    Layout(
        "a captioned folder that is given as data",
        "captions.json captions.html captions.png journal/{notes.jsonl,journal-1.sqlite}",
        {"train": stored("train-00000-of-00001")},
        make=both(parquet("data/train-00000-of-00001.parquet"), card(("train", "data/train-*.parquet"))),
    ),
    Layout(
        "a data set of save_to_disk",
        "cache-0123456789abcdef.arrow",
        {"train": stored("x")},
        make=lambda root: table(stored("x")).save_to_disk(root),
    ),
    Layout(
        "splits of save_to_disk",
        "",
        {split: stored(split) for split in ("train", "test")},
        make=lambda root: DatasetDict({s: table(stored(s)) for s in ("test", "train")}).save_to_disk(root),
    ),
    Layout(
        "CSV files and the pictures that they list",
        "images/{1..6}.png",
        dict.fromkeys(("train", "test"), LISTED),
        ["Read from train.csv, test.csv; not read: notes.csv"],
        make=both(csv_of("train.csv"), csv_of("test.csv"), csv_of("notes.csv")),
    ),
    Layout(
        "one CSV file of any name",
        "images/{1..6}.png",
        {"train": LISTED},
        ["Images and labels were read from labels.csv"],
        make=csv_of("labels.csv"),
    ),
    Layout(
        "tables whose names only contain a split word",
        "",
        refused="names do not say which split they are: pets_test.csv, pets_train.csv",
        make=both(csv_of("pets_train.csv"), csv_of("pets_test.csv")),
    ),
    Layout(
        "two tables for a split",
        "",
        refused="expected one table for split 'train', found train.csv, train.parquet",
        make=both(csv_of("train.csv"), parquet("train.parquet")),
    ),
    Layout(
        "several configurations",
        "",
        refused="found a, b. If these are configurations, type --dataset_config_name a",
        make=parquet("a/train.parquet", "b/train.parquet"),
    ),
    Layout(
        "class folders and a table with pictures",
        PET_FILES,
        refused="found pictures in folders and train.parquet. For the table type --dataset_name .*train.parquet",
        make=parquet("train.parquet"),
    ),
    *(
        Layout(name, "b/", refused=OUTSIDE, make=both(parquet("a.parquet"), card(("train", path), **options)))
        for name, path, options in (
            ("a card that names an address", "https://example.org/a.parquet", {}),
            ("a card that names the Hub", "hf://datasets/a/b/a.parquet", {}),
            ("a card that leads out", "b/../../a.parquet", {}),
            ("a card that leads out by its folder", "a.parquet", {"data_dir": ".."}),
            ("a card that names any file", "/etc/passwd", {}),
        )
    ),
    Layout(
        "a card that names files that are not there",
        "",
        refused="files that its README.md names, found none for 'b-\\*.parquet'",
        make=both(parquet("a.parquet"), card(("train", "b-*.parquet"))),
    ),
    # -- refused --------------------------------------------------------------------------------------------------------
    Layout("an empty folder", "", refused="found an empty folder"),
    Layout(
        "pictures that cannot be read alone",
        "{cat,dog}/{1..2}.cr2",
        refused="found none. Pictures that cannot be read, left out: 4",
    ),
    Layout("pictures without folders", "{1..3}.png", refused="found 3 pictures without a class .1.png, 2.png, …"),
    Layout("one class", "cat/{1..3}.png", refused="two classes or more; found one: cat"),
    Layout(
        "two levels that may be classes",
        "{site_a,site_b}/" + PET_FILES,
        refused=f"{TWO_LEVELS}For the first, type --class_names site_a site_b. For the second, type --class_names cat dog; or, for "
        "one folder alone, --dataset_name .*/site_a; or, if the first are splits, --train_split site_a --test_split site_b",
    ),
    Layout(
        "two levels in a split",
        "train/{site_a,site_b}/" + PET_FILES,
        refused=f"{TWO_LEVELS}.* --dataset_name .*/train --train_split site_a --test_split site_b",
    ),
    Layout(
        "two levels far down, the second typed as classes",
        "{site_a,site_b}/a/b/c/" + PET_FILES,
        {"train": {name: f"{{site_a,site_b}}/a/b/c/{name}/{{1..3}}.png" for name in ("cat", "dog")}},
        options={"class_names": ["dog", "cat"]},
    ),
    Layout(
        "classes at several levels, typed",
        "site_a/2019/{cat,dog}/{1..3}.png site_b/{cat,dog}/{1..3}.png dog/night/{1..2}.png",
        {
            "train": {
                "cat": "site_{a/2019,b}/cat/{1..3}.png",
                "dog": "site_{a/2019,b}/dog/{1..3}.png dog/night/{1..2}.png",
            }
        },
        options={"class_names": ["dog", "cat"]},
    ),
    Layout(
        "a class called unknown in a split that has no other",
        "train/{cat,unknown}/{1..3}.png test/unknown/{1..3}.png",
        {
            "train": {"cat": "train/cat/{1..3}.png", "unknown": "train/unknown/{1..3}.png"},
            "test": {"unknown": "test/unknown/{1..3}.png"},
        },
        ["'test' lacks pictures of 1 of 2 classes: cat"],
    ),
    Layout(
        "several collections with splits",
        "{old,new}/{train,test}/{cat,dog}/{1..3}.png",
        refused="found splits inside classes .*--class_names new old; or, for one folder alone, --dataset_name .*/(new|old)",
    ),
    Layout(
        "split words within names of folders of classes",
        "{seg_pred,seg_test,seg_train}/{cat,dog}/{1..3}.png",
        refused="two levels .* if the first are splits, --train_split seg_train --test_split seg_test",
    ),
    Layout(
        "split words within names, and a test folder without classes",
        "pets_train/pets_train/{cat,dog}/{1..3}.png pets_test/pets_test/{1..3}.png",
        refused="found pets_test, pets_train, .*--train_split pets_train. If they are classes, type "
        "--class_names pets_test pets_train",
    ),
    Layout(
        "split words within names, typed as classes",
        "pets_train/{cat,dog}/{1..3}.png pets_test/{1..3}.png",
        {"train": {"pets_train": "pets_train/{cat,dog}/{1..3}.png", "pets_test": "pets_test/{1..3}.png"}},
        options={"class_names": ["pets_train", "pets_test"]},
    ),
    Layout(
        "split words within names, typed as splits",
        "pets_train/pets_train/{cat,dog}/{1..3}.png pets_test/pets_test/{1..3}.png",
        {"pets_train": pets("pets_train/pets_train/")},
        ["Left out, .* pets_test .3 pictures.", "Classes are read from pets_train/pets_train"],
        options={"train_split": "pets_train"},
    ),
    Layout(
        "a train folder with a name in another language",
        "{entrainement,test}/" + PET_FILES,
        refused="found test beside entrainement, .* --train_split entrainement --test_split test. If they are classes",
    ),
    Layout(
        "backslashes as an archive of Windows leaves them",
        "train\\{cat,dog}\\{1..3}.png",
        refused=r"found 6 pictures without a class .train\\cat.*archive of Windows: unpack it with unzip",
    ),
    Layout("two levels further down", "{site_a,site_b}/2019/" + PET_FILES, refused=TWO_LEVELS),
    Layout(
        "two levels and a picture beside them", "{site_a,site_b}/" + PET_FILES + " site_a/map.png", refused=TWO_LEVELS
    ),
    Layout(
        "splits inside classes",
        "{cat,dog}/{train,test}/{1..3}.png",
        refused="splits inside classes .cat/test, cat/train.. Move them to the top .test/cat, train/cat.*--class_names cat dog",
    ),
    Layout(
        "a test folder without classes beside class folders",
        PET_FILES + " test/{1..3}.png",
        refused="found test beside cat, dog, .* --test_split test. If it is a class, type --class_names cat dog test",
    ),
    Layout(
        "a train folder beside another that may be a class",
        "train/{steam,electric}/{1..3}.png bus/{city,tour}/{1..3}.png",
        refused="found train beside bus, .* --train_split train. If it is a class, type --class_names bus train",
    ),
    Layout(
        "train without classes",
        "train/{1..3}.png test/" + PET_FILES,
        refused="class in train, .* found 3 pictures without",
    ),
    Layout(
        "splits without classes",
        "{train,test}/{1..3}.png",
        refused="class in train, .* found 3 pictures without a class",
    ),
    Layout(
        "one class in train", "train/cat/{1..3}.png test/" + PET_FILES, refused="two classes or more; found one: cat"
    ),
    Layout("masks", "{images,masks}/{1..3}.png", refused="found images, masks, which are no classes"),
    Layout(
        "masks of class folders",
        "{images,masks}/" + PET_FILES,
        refused="found images, masks, which are no classes .*Type --dataset_name .*/images, or",
    ),
    Layout(
        "a list of pictures and marks",
        "images/{1..3}.png annotations/{list.txt,trimaps/1.png}",
        refused="found annotations, images, which are no classes",
    ),
    Layout(
        "detection labels",
        "images/{train,val}/{1..3}.png labels/{train,val}/{1..3}.txt",
        refused="class in images/train",
    ),
    Layout(
        "a split twice",
        "{Train,train}/" + PET_FILES,
        refused="expected one folder for each split, found Train and train",
    ),
    Layout(
        "two metadata rows for a picture",
        PET_FILES,
        refused="several for 1, for example cat/1.png. Merge them",
        make=lines("metadata.jsonl", *[{"file_name": "cat/1.png", "text": text} for text in "ab"]),
    ),
    Layout(
        "metadata of other pictures",
        PET_FILES,
        refused="expected paths of pictures, relative to this file, in column file_name; found none that is there",
        make=lines("cat/metadata.jsonl", {"file_name": "cat/1.png", "text": "a"}),
    ),
    Layout(
        "metadata without a class",
        "{1..6}.png",
        refused="metadata has columns text, breed: .* --label_column NAME",
        make=lines("metadata.jsonl", *[{"file_name": f"{i}.png", "text": "a", "breed": "x"} for i in range(1, 7)]),
    ),
    # -- tables as other tools and people write them ----------------------------------------------------------------------
    Layout(
        "structs of large types (polars)",
        "",
        {"train": stored("train")},
        make=packed("train.parquet", "large_binary", "large_string"),
    ),
    Layout(
        "structs of views",
        "",
        {"train": stored("train")},
        make=packed("train.parquet", "binary_view", "string_view"),
    ),
    Layout(
        "structs with the path first",
        "",
        {"train": stored("train")},
        make=packed("train.parquet", order=("path", "bytes")),
    ),
    Layout("an Arrow file", "", {"train": stored("train")}, make=packed("train.arrow")),
    Layout(
        "classes in another order in another file",
        "",
        {split: stored(split) for split in ALL},
        make=both(
            packed("train.parquet", names=("dog", "cat")),
            packed("validation.parquet", names=("cat", "dog")),
            packed("test.parquet"),
        ),
    ),
    Layout(
        "classes in another order in another shard",
        "",
        {"train": stored("train-00000-of-00002", "train-00001-of-00002")},
        make=both(
            packed("train-00000-of-00002.parquet", names=("dog", "cat")),
            packed("train-00001-of-00002.parquet", names=("cat", "dog")),
        ),
    ),
    Layout("a dataset of save_to_disk", "", {"train": stored("data")}, make=saved("data"), opened="data"),
    Layout(
        "splits of save_to_disk",
        "",
        {s: stored(s) for s in ("train", "test")},
        make=saved("all", "train", "test"),
        opened="all",
    ),
    Layout(
        "tars of WebDataset",
        "",
        {s: stored(f"{s}-0000") for s in ("train", "test")},
        make=tar("train-0000.tar", "test-0000.tar"),
    ),
    Layout(
        "shards of WebDataset",
        "",
        {
            "train": stored("train-000000", "train-000001"),
            "validation": stored("val-000000"),
            "test": stored("test-000000"),
        },
        make=tar("train-000000.tar", "train-000001.tar", "val-000000.tar", "test-000000.tar"),
    ),
    Layout(
        "tars whose names say no split",
        "",
        refused="tables whose names do not say which split they are: pets-train-000000.tar, pets-val-000000.tar. Call them train",
        make=tar("pets-train-000000.tar", "pets-val-000000.tar"),
    ),
    Layout("a tar, typed", "", {"train": stored("pets-7")}, make=tar("pets-7.tar"), opened="pets-7.tar"),
    Layout("CSV with semicolons", PICTURES, {"train": LISTED}, make=csv_text(lambda t: t.replace(",", ";"))),
    Layout("tabs", PICTURES, {"train": LISTED}, make=csv_text(lambda t: t.replace(",", "\t"), "train.tsv")),
    Layout("CSV with a byte order mark", PICTURES, {"train": LISTED}, make=csv_text(lambda t: f"\ufeff{t}")),
    Layout("CSV with blank lines", PICTURES, {"train": LISTED}, make=csv_text(lambda t: t.replace("\n", "\n\n"))),
    Layout("CSV with backslashes", PICTURES, {"train": LISTED}, make=csv_text(lambda t: t.replace("/", "\\"))),
    Layout(
        "JSON, one list",
        PICTURES,
        {"train": LISTED},
        make=write(
            "train.json",
            json.dumps([{"image": f"images/{i}.png", "label": "cat" if i < 4 else "dog"} for i in range(1, 7)]),
        ),
    ),
    Layout(
        "JSON lines",
        PICTURES,
        {"train": LISTED},
        make=lines(
            "train.jsonl", *[{"image": f"images/{i}.png", "label": "cat" if i < 4 else "dog"} for i in range(1, 7)]
        ),
    ),
    Layout(
        "CSV with a picture elsewhere",
        PICTURES,
        refused="row 0: expected pictures in .*pets, found /etc/passwd elsewhere",
        make=csv_text(lambda t: t.replace("images/1.png", "/etc/passwd")),
    ),
    Layout(
        "CSV with dots that lead out",
        PICTURES,
        refused="found ../../1.png elsewhere",
        make=csv_text(lambda t: t.replace("images/1.png", "../../1.png")),
    ),
    Layout(
        "CSV with an address",
        PICTURES,
        refused="Nothing is fetched",
        make=csv_text(lambda t: t.replace("images/1.png", "https://localhost/1.png")),
    ),
    Layout(
        "CSV without a header",
        PICTURES,
        refused="names of the columns in the first line",
        make=csv_text(lambda t: t.partition("\n")[2]),
    ),
    Layout(
        "CSV that was cut", PICTURES, refused="line 7: expected 2 cells .* found 1", make=csv_text(lambda t: t[:-6])
    ),
    Layout(
        "CSV with a column twice",
        PICTURES,
        refused="expected each column once, found 'label'",
        make=csv_text(lambda t: t.replace("image,label", "image,label,label")),
    ),
    Layout("an empty CSV file", PICTURES, refused="found an empty file", make=csv_text(lambda t: "")),
    Layout(
        "a damaged parquet file",
        "",
        refused="train.parquet: expected a file of type .parquet",
        make=write("train.parquet", "PAR1 and nothing else"),
    ),
]


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: layout.name)
def case(request, tmp_path_factory):
    """A layout, its folder, and the settings that open it."""
    layout: Layout = request.param
    root = tmp_path_factory.mktemp("layout") / "pets"
    root.mkdir()
    for name in expand(layout.files):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            file.write_bytes(
                PICTURE if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".jpe", ".jfif") else name.encode()
            )
        else:
            file.mkdir(exist_ok=True)
    if layout.make:
        layout.make(root)
    return layout, root, DataArguments(dataset_name=str(root / layout.opened), **layout.options)


def rows_of(dataset, root: Path) -> dict[str | None, list[str]]:
    """The pictures of each class, in order."""
    kind = dataset.features["label"]
    found: dict[str | None, list[str]] = {}
    images = dataset.cast_column("image", Image(decode=False))["image"]
    for image, label in zip(images, dataset["label"], strict=True):
        if isinstance(kind, ClassLabel):
            label = kind.names[label]
        path = image["path"]
        found.setdefault(label, []).append(os.path.relpath(path, root) if os.path.isabs(path) else path)
    return found


def expected_rows(layout: Layout, split: str) -> dict[str | None, list[str]]:
    return {name: sorted(expand(text)) for name, text in layout.rows[split].items()}


def in_order(rows: dict) -> dict:
    return {name: sorted(files) for name, files in rows.items()}


def labelled(layout: Layout) -> list[str]:
    return [split for split, classes in layout.rows.items() if set(classes) != {None}]


def refuses(layout: Layout, read: Callable[[], object]) -> bool:
    """Whether the layout is refused, with its message."""
    if layout.refused:
        with pytest.raises(UserError, match=in_python(layout.refused)):
            read()
    return bool(layout.refused)


def test_source(case):
    """What all verbs start from: the rows of each split, sorted, and the notes."""
    layout, _, args = case
    if refuses(layout, lambda: open_source(args)):
        return
    raw = open_source(args)
    assert list(raw.splits) == list(layout.rows)
    assert len(raw.notes) == len(layout.notes), raw.notes
    for note, pattern in zip(raw.notes, layout.notes, strict=True):
        assert re.search(in_python(pattern), in_python(note)), note
        assert "\n" not in note


def test_finetune(case):
    layout, root, args = case
    if refuses(layout, lambda: load_splits(args)):
        return
    splits = load_splits(args)
    roles = {"train": args.train_split or "train", "validation": args.validation_split or "validation"}
    roles["test"] = args.test_split or "test"
    train = expected_rows(layout, roles["train"] if roles["train"] in layout.rows else next(iter(layout.rows)))
    assert sorted(splits.class_names) == sorted(train)
    pooled = Counter((label, file) for label, files in train.items() for file in files)
    left = Counter((label, file) for label, files in rows_of(splits.train, root).items() for file in files)
    for role in ("validation", "test"):
        found = rows_of(getattr(splits, role), root)
        if roles[role] in labelled(layout):
            assert in_order(found) == expected_rows(layout, roles[role]), role
        else:  # held out of the training split
            left += Counter((label, file) for label, files in found.items() for file in files)
    assert left == pooled  # every picture of the training split once
    for pattern in layout.notes:
        assert any(re.search(in_python(pattern), in_python(note)) for note in splits.notes)


def test_evaluate(case):
    layout, root, args = case
    name = args.test_split or "test"
    known = sorted({label for classes in layout.rows.values() for label in classes if label}) or ["cat", "dog"]
    if refuses(layout, lambda: load_test_split(args, known)):
        return
    if name in layout.rows and name not in labelled(layout):
        with pytest.raises(UserError, match="label"):
            load_test_split(args, known)
        return
    found = load_test_split(args, known)
    assert (found is not None) == (name in layout.rows)
    if found is not None:
        assert in_order(rows_of(found, root)) == expected_rows(layout, name)


def test_caption(case, caplog):
    layout, root, args = case
    if refuses(layout, lambda: load_data(args)):
        return
    with caplog.at_level(logging.WARNING):
        data, train, _ = load_data(args)
    assert {split: in_order(rows_of(rows, root)) for split, rows in data.items()} == {
        split: expected_rows(layout, split) for split in labelled(layout)
    }
    assert train in data
    said = [record.getMessage() for record in caplog.records]
    for pattern in layout.notes:
        assert any(re.search(in_python(pattern), in_python(note)) for note in said)


def test_benchmark(case):
    layout, root, args = case
    if refuses(layout, lambda: check_labels(args, [])):
        return
    test = args.test_split or "test"
    if test in layout.rows and test not in labelled(layout):
        with pytest.raises(UserError, match=f"split '{test}': expected labels"):
            check_labels(args, [])
        return
    check_labels(args, [])
    for split in labelled(layout):
        if split not in ("train", "validation", "test", args.train_split, args.validation_split, args.test_split):
            check_labels(args, [split])  # further splits are shifts
            shift = load_test_split(replace(args, test_split=split), load_splits(args).class_names)
            assert in_order(rows_of(shift, root)) == expected_rows(layout, split)


def make_pets(root: Path, files: str) -> DataArguments:
    for name in expand(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PICTURE)
    return DataArguments(dataset_name=str(root))


def test_a_class_in_test_alone_stops_training_and_not_a_model_that_knows_it(tmp_path):
    args = make_pets(tmp_path, "train/{cat,dog}/{1..3}.png test/{cat,dog,bird}/{1..3}.png")
    with pytest.raises(UserError, match="split 'test', row 0: label 'bird' is outside the class list"):
        load_splits(args)
    assert len(load_test_split(args, ["bird", "cat", "dog", "fish"])) == 9


def test_a_test_folder_alone_is_evaluated_and_not_trained_on(tmp_path):
    args = make_pets(tmp_path, "test/{cat,dog}/{1..3}.png")
    assert rows_of(load_test_split(args, ["dog", "cat"]), tmp_path) == {
        name: expand(f"test/{name}/{{1..3}}.png") for name in ("cat", "dog")
    }
    with pytest.raises(UserError, match="one role for each split, found train and test"):
        load_splits(args)


def test_order_is_that_of_the_paths_whatever_the_file_system_says(tmp_path, monkeypatch):
    args = make_pets(tmp_path, "{z,a,m.x,m}/{10,9,1}.png")
    expected = open_source(args).splits["train"]["image"][:]
    assert [image["path"] for image in expected] == sorted(image["path"] for image in expected)
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = list(entries)[::-1]

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert open_source(args).splits["train"]["image"][:] == expected
