"""Training data: the cache of prepare.py, captions drawn at random, and augmentation of a whole batch at once."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from words import stems

IMAGE_SIZE = 64
MEAN, STD = (0.77, 0.76, 0.76), (0.36, 0.35, 0.37)  # of the training pictures on white
TEMPLATES = (
    "a photo of a {}.",
    "a photo of a {}.",
    "an icon of a {}.",
    "a drawing of a {}.",
    "a picture of a {}.",
    "{}",
)


def key_of(text):
    """Normal form under which two texts are the same name: 'Fire engines' -> 'fire engine'."""
    return " ".join(stems(text))


class Captions:
    """Draws a caption per picture and knows which other pictures it is also right for.

    keys: (N, K) sparse 0/1 matrix, picture x name, hypernym, category or tag.
    with_kinds: whether hypernyms and categories are among the captions.
    """

    def __init__(self, items, min_count=8):
        self.items, self.with_kinds = items, True
        self.keys_of = [
            {k for t in (i["name"], *i["aliases"], *i["kinds"], *i["tags"]) if (k := key_of(t))} or {"?"} for i in items
        ]
        count = Counter(k for keys in self.keys_of for k in keys)
        self.index = {k: n for n, k in enumerate(sorted(count))}
        rows = [n for n, keys in enumerate(self.keys_of) for _ in keys]
        columns = [self.index[k] for keys in self.keys_of for k in sorted(keys)]
        ones = np.ones(len(rows), np.float32)
        self.keys = csr_matrix((ones, (rows, columns)), (len(items), len(self.index)))
        common = np.array([self.index[k] for k in sorted(count) if count[k] >= min_count])
        idf = np.array([math.log(len(items) / count[k]) for k in sorted(count) if count[k] >= min_count])
        self.bag = self.keys[:, common].multiply(idf[None]).tocsr().astype(np.float32)  # targets of the auxiliary loss

    def draw(self, n, rng):
        """(caption, key it stands for) of picture n."""
        item, r = self.items[n], rng.random()
        names = [item["name"]] * 2 + item["aliases"]
        name, tags = names[rng.integers(len(names))], item["tags"]
        kinds = item["kinds"] if self.with_kinds else []
        template = TEMPLATES[rng.integers(len(TEMPLATES))]
        some = [tags[i] for i in rng.permutation(len(tags))[: rng.integers(1, 5)]] if tags else []
        if r < 0.30 and kinds:
            kind = kinds[rng.integers(len(kinds))]
            return template.format(kind), key_of(kind)
        if r < 0.40 and some:
            return (template.format(some[0]), key_of(some[0])) if r < 0.36 else (", ".join(some), key_of(name))
        if r < 0.65 and (item["gloss"] or some):
            about = item["gloss"] if item["gloss"] and (r < 0.55 or not some) else ", ".join(some)
            head = f"a photo of a {kinds[rng.integers(len(kinds))]}. " if kinds and r < 0.60 else ""
            return f"{head}{name}: {about}", key_of(name)
        return template.format(name), key_of(name)

    def batch(self, rows, rng):
        """([caption] * B, bool (B, B): picture i and caption j fit)."""
        drawn = [self.draw(n, rng) for n in rows]
        columns = [self.index.get(key, 0) for _, key in drawn]
        fits = torch.from_numpy(self.keys[rows][:, columns].toarray() > 0)
        return [text for text, _ in drawn], fits | torch.eye(len(rows), dtype=torch.bool)

    def corpus(self):
        """Every text there is, for the tokenizer."""
        for item in self.items:
            yield " ".join((item["name"], *item["aliases"], *item["kinds"], *item["tags"], item["gloss"]))
        yield from (t.format("") for t in TEMPLATES)


def load_items(folder, sources):
    """(images uint8 (N, 4, H, W), items, sampling weight (N,)) of a prepared folder.

    Emoji weigh most, colourful sets more than line icons, drawings of things more than signs.
    """
    images = np.load(Path(folder) / "images.npy", mmap_mode="r")
    items = json.loads((Path(folder) / "items.json").read_text())
    weights = {e["package"]: e["weight"] for e in sources["icons"]} | {
        "emoji": 3.0,
        "emoji_mini": 3.0,
        "openclipart": 2.0,
    }
    weight = [weights[i["source"]] for i in items]
    for n, item in enumerate(items):
        if item["source"] == "emoji":
            weight[n] *= 0.6 if item["mono"] else 1.0
        elif not item["thing"]:
            weight[n] *= 0.3
    return torch.from_numpy(np.array(images)), items, np.array(weight)


def normalise(rgb):
    """float (B, 3, H, W) in 0..1 -> the model's input."""
    return (rgb - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def augment(rgba, mono, generator):
    """uint8 (B, 4, 72, 72), bool (B,) -> normalised float (B, 3, 64, 64): colours, background, crop, rotation, flip."""
    b = len(rgba)

    def rand(*shape, low=0.0, high=1.0):
        return torch.rand(*shape, generator=generator) * (high - low) + low

    x = rgba.float().div_(255)
    opaque = (x[:, 3].amin((1, 2)) > 0.99).view(b, 1, 1, 1)
    # one colour pair, dark and light, per picture; drawings in black alone get the dark one, sometimes the other way
    dark, light = rand(b, 3, 1, 1, high=0.55) * rand(b, 1, 1, 1), 1 - rand(b, 3, 1, 1, high=0.4) * rand(b, 1, 1, 1)
    swap = rand(b, 1, 1, 1) < 0.2
    ink, paper = torch.where(swap, light, dark), torch.where(swap, dark, light)
    colourful = rand(b, 3, 1, 1) * (rand(b, 1, 1, 1) < 0.5)
    ink = torch.where(swap, ink, torch.maximum(ink, colourful * 0.8))
    mono = mono.view(b, 1, 1, 1)
    rgb = torch.where(mono, ink, x[:, :3])
    paper = torch.where(~mono & swap, light * rand(b, 3, 1, 1, low=0.3), paper)
    white = (rand(b, 1, 1, 1) < 0.6) & ~(mono & swap) | opaque
    paper = torch.where(white, torch.ones_like(paper), paper)
    x = torch.cat([rgb * x[:, 3:], x[:, 3:]], 1)  # premultiplied, so that the warp leaves no dark seam

    angle = rand(b, low=-0.25, high=0.25) * (rand(b) < 0.6)
    zoom = rand(b, low=0.68, high=1.15)
    aspect = rand(b, low=-0.12, high=0.12).exp()
    flip = 1 - 2 * (rand(b) < 0.5).float()
    free = (1.08 - zoom).clamp(min=0)  # how far a crop may move
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack(
        [
            torch.stack([cos * aspect * flip, -sin / aspect, rand(b, low=-1.0) * free], 1),
            torch.stack([sin * aspect * flip, cos / aspect, rand(b, low=-1.0) * free], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, (b, 4, IMAGE_SIZE, IMAGE_SIZE), align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", align_corners=False)
    x = x[:, :3] + (1 - x[:, 3:]) * paper

    grey = x.mean(1, keepdim=True)
    strength = (rand(b, 1, 1, 1) < 0.7).float()
    x = grey + (x - grey) * (1 + strength * rand(b, 1, 1, 1, low=-0.6, high=0.4))
    x = (x - 1) * (1 + strength * rand(b, 1, 1, 1, low=-0.35, high=0.2)) + 1
    x = x * (1 + strength * rand(b, 3, 1, 1, low=-0.15, high=0.05))
    return normalise(x.clamp(0, 1))
