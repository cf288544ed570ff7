"""Rows and a scorer with given embeddings, for tests of refining steps."""

import numpy as np

from mmft_hf.captioning.steps.base import Row, score_of
from mmft_hf.captioning.write.dataset import RECORD


class Vectors:
    """A scorer whose embeddings are given; a text that is not known is the first axis. `regions`: images by region."""

    scale = 100.0

    def __init__(self, images, texts, regions=()):
        self._images, self._texts = {"whole": np.asarray(images, np.float32)}, texts
        self._images |= {name: np.asarray(found, np.float32) for name, found in dict(regions).items()}

    def images(self, region="whole"):
        return self._images[region]

    def texts(self, texts):
        first = np.eye(self._images["whole"].shape[1], dtype=np.float32)[0]
        return np.stack([np.asarray(self._texts.get(text, first), np.float32) for text in texts])


def row(i, texts, label=0, group=None, **fields):
    """The row of image number `i` with these captions; `fields` are those of each record."""
    records = [
        dict.fromkeys(RECORD) | {"aspect": "a", "sample": k, "text": text, "status": "ok"} | fields
        for k, text in enumerate(texts)
    ]
    return Row(f"{i:064x}", label, f"class {label}", group or f"g{i}", records)


def with_values(name, values, **fields):
    """Rows of one class whose captions `0.0`, `0.1`, … have these scores; None for no score."""
    rows = []
    for i, own in enumerate(values):
        made = row(i, [f"{i}.{k}" for k in range(len(own))], **fields)
        for record, value in zip(made.records, own, strict=True):
            record["scores"] = [] if value is None else [{"name": name, "value": value}]
        rows.append(made)
    return rows


def scores(records, name):
    return [[score_of(record, name) for record in own] for own in records]


def kept(records):
    """The texts that are still captions, by row."""
    return [[r["text"] for r in own if r["status"] == "ok"] for own in records]


def auroc(high, low):
    """How often a value of the first is above one of the second; ties count half."""
    high, low = np.asarray(high)[:, None], np.asarray(low)[None]
    return float(np.mean((high > low) + 0.5 * (high == low)))


def spearman(first, second):
    """The correlation of the ranks of two lists without ties."""
    return float(np.corrcoef(np.argsort(np.argsort(first)), np.argsort(np.argsort(second)))[0, 1])


def unit(vectors):
    """Vectors of unit norm."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
