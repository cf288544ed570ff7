"""Pictures of colours whose captions say the colour after more text than a text tower reads, and a CLIP that knows colours."""

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from tiny_clip import COLOURS, build_clip, colour_images

from mmft_hf.data.sentences import sentences_of
from mmft_hf.model.collator import pixels_of, tokenize
from mmft_hf.model.loading import encode_images, encode_texts

NAMES = ["kind one", "kind two", "kind three"]  # tell nothing
FILLER = (
    "It stands on a table of wood. The light comes from above, and it is noon. Behind it are two chairs."  # 81 tokens
)
SHORT = [name.split()[0] for name in COLOURS]


def fact(label: int) -> str:
    return f"It is {SHORT[label]}."


def planted(per_class: int = 4, seed: int = 0, shift: int = 0, say=fact) -> Dataset:
    """Captions of filler, and behind it what `say` says about a colour.

    Args:
        shift: which colour a kind has: another one with each of 0, 1 and 2.
    """
    rows = colour_images(per_class, seed)
    columns = {
        "image": [image for image, _ in rows],
        "label": [(colour + shift) % 3 for _, colour in rows],
        "captions": [[f"{FILLER} {say(colour)}"] for _, colour in rows],
    }
    features = {"image": Image(), "label": ClassLabel(names=NAMES), "captions": List(Value("string"))}
    return Dataset.from_dict(columns, features=Features(features))


def knows_colours(steps: int = 60):
    """A tiny CLIP that was taught what the colours of pictures are called, and that kinds and filler say nothing of them."""
    model, processor = build_clip()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    rng, pictures = np.random.default_rng(0), colour_images(12, seed=9)
    pixels = torch.stack([pixels_of(processor.image_processor, image) for image, _ in pictures])
    labels = torch.tensor([label for _, label in pictures])
    sentences = sentences_of(FILLER)
    for _ in range(steps):
        first = [rng.choice(["", *sentences]) for _ in range(9)]
        facts = [f"a photo of a {rng.choice(NAMES)}. {first[i]} {fact(i % 3)}" for i in range(9)]
        filler = [f"a photo of a {name}. {sentence}" for name in NAMES for sentence in sentences]
        texts = encode_texts(model, *tokenize(processor, facts + filler)[0].values())
        logits = 10 * encode_images(model, pixels) @ texts.T
        optimizer.zero_grad()
        right = (torch.arange(len(logits[0])) % 3 == labels[:, None]) & (torch.arange(len(logits[0])) < 9)
        (-logits.log_softmax(1)[right].mean()).backward()
        optimizer.step()
    return model.eval(), processor
