"""`maps.json`: validation images and classes in the plane, before and after fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from datasets import Dataset

from ...core.files import read_json, write_json
from ...data.sampling import generator
from ...data.splits import labels_of
from .protocol import FULL, Cell

MAPS_FILE = "maps.json"
SHOWN = ("zs", "mmft")  # before and after
FEWEST, MOST = 10, 1000  # images


def cells_to_show(grid: Iterable[Cell]) -> set[Cell]:
    """The cells that get a map: of each method in `SHOWN` the one with the most shots and, among these, the first seed."""
    found: dict[str, Cell] = {}
    for cell in grid:
        if cell.method in SHOWN and (cell.method not in found or _size(cell) > _size(found[cell.method])):
            found[cell.method] = cell
    return set(found.values())


def _size(cell: Cell) -> float:
    return float("inf") if cell.shots == FULL else int(cell.shots)


def draw_map(
    embed: Callable[[Dataset], np.ndarray], prototypes: np.ndarray, images: Dataset, seed: int = 0
) -> dict | None:
    """Images and classes in the plane, by t-SNE. None for fewer than 10 images; of more than 1,000, a sample of 1,000.

    Images and prototypes are centred separately: image embeddings of a CLIP lie in one cone and text embeddings in another,
    and otherwise the plane would mostly show the gap between them. Subtracting the mean of the prototypes changes no
    prediction.

    Args:
        embed: data set -> unit-norm embeddings `(n, D)` of its images.
        prototypes: `(C, D)`.

    Returns:
        `labels` (n), `points` (n, 2), `prototypes` (C, 2).

    References: van der Maaten & Hinton 2008, "Visualizing Data using t-SNE"; Liang et al. 2022, "Mind the Gap" (arXiv
    2203.02053).
    """
    if len(images) < FEWEST:
        return None
    from sklearn.manifold import TSNE

    if len(images) > MOST:
        images = images.select(sorted(generator(seed, 5).permutation(len(images))[:MOST].tolist()))
    points = np.concatenate([_centred(embed(images)), _centred(prototypes)])
    perplexity = min(30.0, (len(points) - 1) / 3)
    plane = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(points).round(2).tolist()
    n = len(images)
    return {"labels": labels_of(images).tolist(), "points": plane[:n], "prototypes": plane[n:]}


def _centred(vectors: np.ndarray) -> np.ndarray:
    """The rows minus their mean, divided by their norms."""
    vectors = np.asarray(vectors, dtype=np.float32)
    vectors = vectors - vectors.mean(axis=0)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def keep_map(folder: Path, cell: Cell, found: dict) -> None:
    """Writes the map of a cell in place of an earlier one. No other process may write meanwhile."""
    own = {"method": cell.method, "shots": cell.shots, "seed": cell.seed}
    kept = read_json(folder / MAPS_FILE)
    others = [m for m in kept if {k: m.get(k) for k in own} != own] if isinstance(kept, list) else []
    write_json(folder / MAPS_FILE, [*others, own | found], indent=None, ensure_ascii=False, allow_nan=False)
