"""Reading files that anybody may have written, and checking what they hold."""

import json
import os
import socket
from typing import Annotated, Any, Literal, TypedDict

import pytest

from mmft_hf.core.arguments import Range
from mmft_hf.core.errors import UserError
from mmft_hf.core.reading import NotAFile, open_regular, parse_json, parse_yaml, read_json, read_text
from mmft_hf.core.schema import ClassNames, mismatch
from mmft_hf.core.seals import is_as_written, sealed


def test_pipes_sockets_devices_and_folders_are_not_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("socket")
    for name, kind in (("pipe", "a named pipe"), ("socket", "a socket"), ("/dev/zero", "a device")):
        with pytest.raises(NotAFile, match=kind):
            open_regular(name)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(UserError, match="directory"):
        read_text(tmp_path)


def test_a_regular_file_is_read_through_a_link_and_a_dangling_one_is_missing(tmp_path):
    (tmp_path / "file").write_text("é")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert read_text(tmp_path / "link") == "é"
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "dangling")
    with pytest.raises(UserError, match="at most 1 bytes"):
        read_text(tmp_path / "file", most=1)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[" * 100_000 + "]" * 100_000, "damaged"),
        ("[" * 60 + "]" * 60, "more than 50 levels"),
        ("1" * 5000, "damaged"),
        (str(2**63), "more than 63 bits"),
        ('{"a": "\\ud800"}', "half of a character"),
        ("{", "damaged"),
        (b"\xff\xfe\xfd", "damaged"),
    ],
)
def test_json_that_could_not_be_used_is_refused(text, found):
    with pytest.raises(UserError, match=f"file.json.*{found}.*Type this"):
        parse_json(text, "file.json", Any, "Type this.")


def bomb(lines: list[str]) -> str:
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            bomb(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]),
            "aliases written out",
        ),
        (
            bomb(["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12))]),
            "written out",
        ),
        ("a: &a [*a]", "what stands before it"),
        ("[" * 60 + "]" * 60, "at most 50 levels"),
        ("[" * 5000, "levels|expected YAML"),
        ("!!python/object/apply:os.system [true]", "expected YAML"),
        ("!!bool maybe", "expected YAML"),
        ("!!timestamp never", "expected YAML"),
        ("a: 0x" + "f" * 10_000, "63 bits"),
        ("a: b: c", "expected YAML"),
    ],
)
def test_yaml_that_could_not_be_used_is_refused(text, found):
    with pytest.raises(UserError, match=found):
        parse_yaml(text, "file.yaml")


def test_aliases_in_bounds_are_read():
    assert parse_yaml("base: &b {x: 1}\nmore: {<<: *b, y: 2}\n", "f") == {"base": {"x": 1}, "more": {"x": 1, "y": 2}}


class _Person(TypedDict):
    name: str


class Person(_Person, total=False):
    age: Annotated[int, Range(0)] | None
    kind: Literal["cat", "dog"]
    friends: dict[str, list[float]]


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"name": "a", "age": None, "kind": "cat", "friends": {"x": [1, 2.5]}, "newer": [1]}, None),
        ({}, "field name"),
        ({"name": 1}, "field name"),
        ({"name": "a", "age": -1}, "field age"),
        ({"name": "a", "age": True}, "field age"),
        ({"name": "a", "kind": "cow"}, "field kind"),
        ({"name": "a", "friends": {"x": [1, float("nan")]}}, "field friends.x[1]"),
        ({"name": "a", "friends": [1]}, "field friends"),
        ([], ""),
    ],
)
def test_the_first_wrong_field_is_named(value, place):
    wrong = mismatch(value, Person)
    assert (wrong and wrong[0]) == place


@pytest.mark.parametrize("names", [[], ["a", "a"], ["a", ""], ["a", 1], ["a", "x" * 1001], "ab", None])
def test_class_names_are_distinct_and_fit_a_table(names):
    assert mismatch(names, ClassNames) and not mismatch(["a", "b c", "é"], ClassNames)


def test_a_seal_tells_a_changed_record():
    record = sealed({"a": 0.1, "b": [1, None, "é"], 3: "x"})
    assert is_as_written(parse_json(json.dumps(record), "f"))
    assert not is_as_written(record | {"a": 0.2}) and not is_as_written(record | {"c": 1})
    assert is_as_written({"a": 1})  # version 0.1 wrote no seals
