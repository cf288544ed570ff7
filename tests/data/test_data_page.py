"""docs/data.md is true: its words are splits, its layouts of pictures are read or refused, and what it says to type helps."""

import re
import shlex
from pathlib import Path

import pytest

from mmft_hf.core.arguments import DataArguments
from mmft_hf.core.errors import UserError
from mmft_hf.data.raw import split_role
from mmft_hf.data.sources import open_source

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
CODE = re.compile(r"`(.*?)`")


def rows(header: str) -> list[list[str]]:
    """The cells of the first table with this header."""
    lines = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


PICTURES = rows("| layout | what is read |")


@pytest.mark.parametrize(("split", "words"), rows("| split | words |"))
def test_words_of_splits(split, words):
    assert {split_role(word) for word in CODE.findall(words)} == {split}
    assert split_role(f"my_{split}") is None


@pytest.mark.parametrize(("layout", "meaning"), PICTURES, ids=[layout for layout, _ in PICTURES])
def test_layouts_of_pictures(layout, meaning, tmp_path):
    files = CODE.findall(layout)
    if "dog" not in layout and not layout.endswith("alone"):
        files += [file.replace("cat", "dog") for file in files]
    for file in files:
        for number in "123":
            path = tmp_path / file.replace("1.jpg", f"{number}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"picture")
    args = DataArguments(dataset_name=str(tmp_path))
    if not meaning.startswith("refused"):
        raw = open_source(args)
        labels = {label for split in raw.splits.values() for label in split["label"]} - {None}
        assert labels == ({"train", "bus"} if "bus" in layout else {"cat", "dog"})
        assert ("note" in meaning) <= bool(raw.notes)
        return
    with pytest.raises(UserError):
        open_source(args)
    for typed in CODE.findall(meaning):
        if not typed.startswith("--"):
            continue
        options = {}
        for part in typed.split("--")[1:]:
            name, *values = shlex.split(part)
            options[name] = values if name == "class_names" else values[0]
        read = open_source(DataArguments(dataset_name=str(tmp_path), **options)).splits
        if "class_names" in options:
            assert set(read["train"]["label"]) == set(options["class_names"])
        else:
            assert set(options.values()) <= set(read)
