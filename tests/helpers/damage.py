"""Damages files as disks, interrupted copies and people do: their bytes, or single fields of JSON, YAML and safetensors."""

import copy
import json
import os
import shutil
import socket
from pathlib import Path

import torch
import yaml
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

# What takes the place of a field, and of a whole JSON file.
VALUES = [
    None,
    True,
    -1,
    0,
    10**9,
    10**30,
    0.5,
    -1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x1b[2J",
    "\ud800",
    "x" * 10**6,
]
VALUES += [[], {}, [1], {"a": 1}, [[[[[[]]]]]], json.loads("[" * 200 + "]" * 200)]
BYTES = ["flip", "truncate", "empty", "zeros", "delete", "repeat", "random"]
PLACES = ["missing", "folder", "pipe", "dangling", "socket"]
TENSORS = ["shape", "flat", "dtype", "nan", "infinite", "drop", "rename"]


def damages(path: Path) -> st.SearchStrategy:
    """`(kind, place in the file from 0 to 1, value)` for `damage`."""
    place = st.floats(0, 1, exclude_max=True)
    kinds = [
        st.tuples(st.sampled_from(BYTES), place, st.integers(0, 255)),
        st.tuples(st.sampled_from(PLACES), place, st.none()),
    ]
    if path.suffix in (".json", ".jsonl", ".yaml"):
        fields = st.tuples(
            st.sampled_from(["value", "value", "remove", "add"]), place, st.sampled_from(range(len(VALUES)))
        )
        kinds += [fields, fields, fields, st.tuples(st.just("deep"), place, st.none())]
    if path.suffix == ".safetensors":
        kinds += [
            st.tuples(st.sampled_from(TENSORS), place, st.none()),
            st.tuples(st.just("text"), place, st.sampled_from(range(len(VALUES)))),
        ]
    return st.one_of(kinds)


def damage(path: Path, kind: str, place: float, value) -> None:
    """Damages one file in place."""
    if kind in PLACES:
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "dangling":
            path.symlink_to("nowhere")
        elif kind == "socket":
            here = os.getcwd()
            os.chdir(path.parent)  # the path of a socket may have about 100 characters
            with socket.socket(socket.AF_UNIX) as end:
                end.bind(path.name)
            os.chdir(here)
    elif kind in BYTES:
        path.write_bytes(_bytes(bytearray(path.read_bytes()), kind, place, value))
    elif kind == "deep":
        path.write_text("[" * 100_000 + "]" * 100_000 + "\n")
    elif path.suffix == ".safetensors":
        _tensors(path, kind, place, value)
    else:
        _fields(path, kind, place, value)


def _bytes(content: bytearray, kind: str, place: float, value: int) -> bytes:
    at = int(place * len(content))
    if kind == "flip":
        content[at] ^= 1 << value % 8
    elif kind == "truncate":
        del content[at:]
    elif kind == "empty":
        content.clear()
    elif kind == "zeros":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    elif kind == "delete":
        del content[at : at + 1 + value % 16]
    elif kind == "repeat":
        content[at:at] = content[at : at + 1 + value]
    elif kind == "random":
        content[at : at + 8] = bytes((value * (i + 3)) % 256 for i in range(8))
    return bytes(content)


def _fields(path: Path, kind: str, place: float, value: int) -> None:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        row = int(place * len(lines))
        lines[row] = json.dumps(_changed(json.loads(lines[row]), kind, place * len(lines) % 1, value))
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(_changed(json.loads(text), kind, place, value)))
    else:
        path.write_text(yaml.dump(_changed(yaml.safe_load(text), kind, place, value)))


def _changed(content, kind: str, place: float, value: int):
    """The content with one field changed, whichever `place` points at."""
    content, slots = copy.deepcopy(content), []

    def walk(part):
        for key in part if isinstance(part, dict) else range(len(part)):
            slots.append((part, key))
            if isinstance(part[key], (dict, list)):
                walk(part[key])

    walk(content)
    part, key = slots[int(place * len(slots))]
    if kind == "remove":
        del part[key]
    elif kind == "add" and isinstance(part, dict):
        part["more"] = VALUES[value]
    else:
        part[key] = VALUES[value]
    return content


def _tensors(path: Path, kind: str, place: float, value) -> None:
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    names = list(tensors)
    name = names[int(place * len(names))]
    found = tensors[name]
    if kind == "text":
        keys = list(metadata) or ["more"]  # an adapter has no metadata
        metadata[keys[int(place * len(keys))]] = json.dumps(VALUES[value])
    elif kind == "shape":
        tensors[name] = torch.cat([found.reshape(-1), found.reshape(-1)])
    elif kind == "flat":
        tensors[name] = found.reshape(-1)[:1].clone()
    elif kind == "dtype":
        tensors[name] = found.to(torch.int32)
    elif kind in ("nan", "infinite"):
        tensors[name] = torch.full_like(found.float(), float("nan" if kind == "nan" else "inf"))
    elif kind == "drop":
        del tensors[name]
    elif kind == "rename":
        tensors[f"{name}_"] = tensors.pop(name)
    save_file(tensors, path, metadata)


def copied(source: Path, target: Path) -> Path:
    """A copy of a folder, in which links are followed, in place of what is at `target`."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))
