"""For tests of captioning runs: pictures, their expected captions, and their command lines.

An expected caption is computed from the bytes of the picture and from a prompt written here, never from what the library
recorded.
"""

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from caption_server import caption_of
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

NAMES = ["blue_thing", "red_thing"]
ASPECTS = ("visual", "shape", "texture")


def picture(i: int, kind: str = "PNG") -> bytes:
    """A small picture, different for each number."""
    pixels = np.random.default_rng(i).integers(0, 256, (10, 12 + i % 3, 3), dtype=np.uint8)
    file = io.BytesIO()
    PILImage.fromarray(pixels).save(file, kind)
    return file.getvalue()


def dataset(pictures, names=NAMES, labels=None) -> Dataset:
    """A dataset of encoded pictures; the default labels alternate."""
    pictures = list(pictures)
    labels = labels or [i % len(names) for i in range(len(pictures))]
    columns = {"image": [{"bytes": data, "path": None} for data in pictures], "label": labels}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(names=list(names))}))


def image_folder(path: Path, count: int, start: int = 0) -> Path:
    """`count` PNG files in one subfolder per class."""
    for i in range(start, start + count):
        file = path / NAMES[i % 2] / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i))
    return path


def prompt(name: str, aspect: str) -> str:
    name = name.replace("_", " ").lower()
    return (
        f"To differentiate this {name} photo from other general objects photos, describe its primary {aspect} "
        "characteristics based on the photo in 50 words."
    )


def expected(data: bytes, name: str, aspect: str) -> str:
    return caption_of(hashlib.sha256(data).hexdigest(), prompt(name, aspect))


def pairs(data: bytes, name: str, aspects=ASPECTS) -> set[tuple[str, str]]:
    """The requests that the server must have received for a picture: its sha256 with each prompt."""
    return {(hashlib.sha256(data).hexdigest(), prompt(name, aspect)) for aspect in aspects}


def asked(rows) -> list[tuple[str, str]]:
    """What the server was asked, from its log."""
    return [(row["picture"], row["prompt"]) for row in rows]


def wrong(rows, aspects=ASPECTS, names=NAMES) -> list:
    """Rows of a captioned dataset (images not decoded) with a missing or a wrong caption."""
    found = []
    for row in rows:
        name, data = names[row["label"]], row["image"]["bytes"]
        own = {aspect: expected(data, name, aspect) for aspect in aspects}
        records = {r["aspect"]: r["text"] for r in row["caption_records"]}
        if row["captions"] != list(own.values()) or records != own:
            found.append((row["image"]["path"], row["captions"], records))
        if row["image_sha256"] != hashlib.sha256(data).hexdigest():
            found.append((row["image"]["path"], row["image_sha256"]))
    return found


def written(folder: Path, split: str = "train") -> list[dict]:
    """The rows of a captioned folder, read without the library."""
    return [row for file in sorted((folder / "data").glob(f"{split}-*")) for row in pq.read_table(file).to_pylist()]


def undecoded(captioned) -> list[dict]:
    return list(captioned.cast_column("image", Image(decode=False)))


def caption(server, data: Path, output: Path, *more) -> list:
    """The command line of a captioning run."""
    words = ["caption", "--captioner", "openai", "--captioner_model", "m", "--base_url", f"{server.url}/v1"]
    return [*words, "--dataset_name", data, "--output_dir", output, *more]
