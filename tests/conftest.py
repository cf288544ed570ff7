"""Fixtures of all tests: the tiny CLIP, its data, no network, one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import copy
import gc
import socket
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tiny_clip import build_clip, colour_dataset

# The models are so small that a second thread costs more than it brings. The processes that tests start get the same
# number, whatever the caller's environment says: sums in another order would differ in the last bit.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# The scripts that tests start find the helpers as the tests themselves do.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])]
)


@pytest.fixture(autouse=True, scope="session")
def modules_are_no_garbage():
    """What was imported stays: every training collects garbage, and would search a million objects of modules for it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any connection to another machine is an error; loopback stays open."""
    connect = socket.socket.connect

    def guarded(self, address):
        host = address[0] if isinstance(address, tuple) else ""
        assert self.family == socket.AF_UNIX or host in ("127.0.0.1", "::1", "localhost"), f"network access: {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Features of frozen towers and converted datasets are kept where the tests end, for each worker of pytest-xdist and the
    processes that its tests start."""
    os.environ["MMFT_HF_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)


@pytest.fixture(scope="session")
def _clip():
    return build_clip()


@pytest.fixture
def clip(_clip):
    """A fresh copy of (model, processor)."""
    return copy.deepcopy(_clip)


@pytest.fixture(scope="session")
def clip_folder(_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    _clip[0].save_pretrained(folder)
    _clip[1].save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """Train, validation and test as a folder of parquet files."""
    folder = tmp_path_factory.mktemp("colours")
    for seed, (split, per_class) in enumerate((("train", 8), ("validation", 4), ("test", 6))):
        colour_dataset(per_class, seed).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture
def captions_classify_nothing(monkeypatch):
    """No image is classified right by prototypes of captions, so that the zero-shot classifier is better."""
    from mmft_hf.train import workflow

    classify = workflow.classify

    def nothing_right(classifier, *args, **kwargs):
        found = classify(classifier, *args, **kwargs)
        if classifier.head.source == "captions":
            found.scores[np.arange(len(found.labels)), found.labels] = -1
        return found

    monkeypatch.setattr(workflow, "classify", nothing_right)
