"""Joins the two towers: projections `(D, 1280)` and `(D, 384)`, without biases, trained on cached features.

Images are drawings with their texts, and ImageNet's classes, of which there are no pictures here: a class's row in the image
tower's own classifier stands for its pictures.
"""

import random

import numpy as np
import torch
import torch.nn.functional as F
from texts import TEMPLATES
from torch import nn

SIZE = 384
HELD_OUT = 150  # classes of ImageNet by which choices are made


def split_classes(number: int, seed: int = 0):
    """Rows of the classes to train on and to choose by."""
    order = np.random.default_rng(seed).permutation(number)
    return np.sort(order[HELD_OUT:]), np.sort(order[:HELD_OUT])


def as_pictures(rows: torch.Tensor) -> torch.Tensor:
    """Rows `(classes, 1280)` of a classifier, without their mean: their directions stand for pictures of the classes."""
    return rows.float() - rows.float().mean(0)


class Projections(nn.Module):
    def __init__(self, images: int = 1280, texts: int = 384, size: int = SIZE):
        super().__init__()
        self.visual, self.text = nn.Linear(images, size, bias=False), nn.Linear(texts, size, bias=False)

    def images(self, features):
        return F.normalize(self.visual(features), dim=-1)

    def texts(self, features):
        return F.normalize(self.text(features), dim=-1)


def contrast(images, texts, scale, same):
    """CLIP's loss; pairs that are `same` `(B, B)` but not the diagonal are no negatives."""
    logits = scale * images @ texts.T
    logits = logits.masked_fill(same & ~torch.eye(len(logits), dtype=torch.bool), float("-inf"))
    goal = torch.arange(len(logits))
    return (F.cross_entropy(logits, goal) + F.cross_entropy(logits.T, goal)) / 2


def train(sources, embed, steps=600, size=256, rate=1e-3, decay=0.1, dropout=0.1, scale=9.0, seed=0):
    """Trains the projections.

    Args:
        sources: `(share, features (N, 1280), texts: N lists of words, groups: N ids)`; rows of one group are no negatives of each other.
        embed: texts to the text tower's pooled output `(texts, 384)`.
        decay: weight decay of AdamW. dropout: of the image features.
        scale: of the cosines in the loss. It is not trained: small ones generalize better to classes that were never seen.
    """
    torch.manual_seed(seed)
    draw, numbers = random.Random(seed), np.random.default_rng(seed)
    unique = list(dict.fromkeys(text for _, _, texts, *_ in sources for row in texts for text in row))
    place, vectors = {text: i for i, text in enumerate(unique)}, embed(unique)
    model = Projections()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 50, 0.5 * (1 + np.cos(np.pi * step / steps)))
        loss = 0
        for share, features, texts, groups in sources:
            rows = numbers.choice(len(features), min(size, len(features)), replace=False)
            chosen = [draw.choice(texts[row]) for row in rows]
            ids = torch.tensor([place[text] for text in chosen])
            group = groups[rows]
            same = torch.from_numpy(group[:, None] == group[None]) | (ids[:, None] == ids[None])
            images = F.dropout(features[rows], dropout)
            loss = loss + share * contrast(model.images(images), model.texts(vectors[ids]), scale, same)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, embed, features, labels, names, templates=("a photo of a {}.",)) -> float:
    """Zero-shot top-1 of image features `(N, 1280)`."""
    texts = [embed([template.format(name) for name in names]) for template in templates]
    prototypes = F.normalize(sum(model.texts(text) for text in texts), dim=-1)
    return ((model.images(features) @ prototypes.T).argmax(-1) == torch.as_tensor(labels)).float().mean().item()


@torch.no_grad()
def fitted_scale(model, embed, sets) -> float:
    """The factor of the cosines, between 1 and 100, under which the class texts of `(features, labels, names)` are likeliest."""
    scales = torch.logspace(0, 2, 81)
    total = torch.zeros(len(scales))
    for features, labels, names in sets:
        cosines = model.images(features) @ model.texts(embed([f"a photo of a {name}." for name in names])).T
        goal = torch.as_tensor(labels)
        total += torch.stack([F.cross_entropy(scale * cosines, goal) for scale in scales])
    return scales[total.argmin()].item()


def class_texts(names: list[list[str]], glosses: list[str], templates=TEMPLATES) -> list[list[str]]:
    """Texts per class: its names in templates, and its first name with the gloss."""
    return [
        [template.format(name) for name in lemmas for template in templates] + [f"{lemmas[0]}: {gloss}"] * 2
        for lemmas, gloss in zip(names, glosses, strict=True)
    ]
