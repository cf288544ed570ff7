"""A CLIP of 60,000 parameters and pictures of one colour per class: learnt in seconds, without any download."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import copy
import socket

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

# The models are so small that a second thread costs more than it brings. The processes that tests start get the same
# number, whatever the caller's environment says: sums in another order would differ in the last bit.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

COLOURS = {"red thing": (220, 30, 30), "green thing": (30, 180, 40), "blue thing": (40, 60, 220)}


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
    """Features of frozen towers are kept where the tests end, also by the processes that they start."""
    os.environ["MMFT_HF_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def byte_tokenizer() -> CLIPTokenizerFast:
    """One token per byte, begin and end tokens, limit 77."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(c + "</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizerFast(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def build_clip() -> tuple[CLIPModel, CLIPProcessor]:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={
            **tower,
            **ids,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 77,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        projection_dim=32,
    )
    size = {"height": 16, "width": 16}
    image_processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    return CLIPModel(config), CLIPProcessor(image_processor, tokenizer)


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


def colour_images(per_class: int, seed: int = 0) -> list[tuple[PILImage.Image, int]]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(per_class):
        for label, colour in enumerate(COLOURS.values()):
            pixels = np.clip(np.array(colour) + rng.integers(-30, 30, (20 + i % 5, 24, 3)), 0, 255)
            rows.append((PILImage.fromarray(pixels.astype(np.uint8)), label))
    return rows


def colour_dataset(per_class: int = 8, seed: int = 0, captions: bool = True) -> Dataset:
    """`3 * per_class` pictures; two captions each that name the colour."""
    rows = colour_images(per_class, seed)
    names = list(COLOURS)
    columns = {"image": [image for image, _ in rows], "label": [label for _, label in rows]}
    features = {"image": Image(), "label": ClassLabel(names=names)}
    if captions:
        columns["captions"] = [
            [f"{names[c].split()[0]} no {i}", f"very {names[c][:4]}"] for i, (_, c) in enumerate(rows)
        ]
        features["captions"] = List(Value("string"))
    return Dataset.from_dict(columns, features=Features(features))


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
    from mmft_hf import evaluation

    classify = evaluation.classify

    def nothing_right(model, processor, prototypes, *args, **kwargs):
        found = classify(model, processor, prototypes, *args, **kwargs)
        if prototypes.source == "captions":
            found.scores[np.arange(len(found.labels)), found.labels] = -1
        return found

    monkeypatch.setattr(evaluation, "classify", nothing_right)
