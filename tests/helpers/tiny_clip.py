"""A CLIP of 60,000 parameters and pictures of one colour per class: learnt in seconds, without any download."""

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

COLOURS = {"red thing": (220, 30, 30), "green thing": (30, 180, 40), "blue thing": (40, 60, 220)}


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


def striped_dataset(images: int = 24, seed: int = 0, captions: bool = False) -> Dataset:
    """Pictures of three stripes, each grey or of a colour of its own: the labels are the colours that are there, also none.

    The stripes stand in any order, so that a colour is known by itself alone.
    """
    rng, names = np.random.default_rng(seed), list(COLOURS)
    pictures, labels = [], []
    for i in range(images):
        own = [c for c in range(3) if (i >> c) % 2] if i < 8 else np.flatnonzero(rng.random(3) < 0.45).tolist()
        stripes = np.full((24, 24, 3), 128)
        for place, c in enumerate(rng.permutation(3)):
            if c in own:
                stripes[:, 8 * place : 8 * place + 8] = list(COLOURS.values())[c]
        pixels = np.clip(stripes + rng.integers(-20, 20, stripes.shape), 0, 255).astype(np.uint8)
        pictures.append(PILImage.fromarray(pixels))
        labels.append(own)
    columns, features = {"image": pictures, "label": labels}, {"image": Image(), "label": List(ClassLabel(names=names))}
    if captions:
        columns["captions"] = [[" and ".join(names[c][:5] for c in own) + f" no {i}"] for i, own in enumerate(labels)]
        features["captions"] = List(Value("string"))
    return Dataset.from_dict(columns, features=Features(features))
