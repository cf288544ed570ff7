"""Datasets as files and folders, and pictures that cannot be read."""

import csv
import json
import struct
import zlib

from datasets import Image
from tiny_clip import COLOURS, colour_dataset, colour_images


def save_pictures(folder, per_class, seed=0):
    """One sub-folder of pictures per class."""
    for i, (image, label) in enumerate(colour_images(per_class, seed)):
        target = folder / list(COLOURS)[label]
        target.mkdir(parents=True, exist_ok=True)
        image.save(target / f"{i:03}.png")
    return folder


def write_csv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_column(dataset, name, values):
    feature = dataset.features[name]
    return dataset.remove_columns(name).add_column(name, values, feature=feature)


def with_bad_picture(row, dataset=None):
    dataset = (dataset or colour_dataset(2)).cast_column("image", Image(decode=False))
    pictures = dataset["image"][:]
    pictures[row] = {"bytes": b"no picture", "path": None}
    return with_column(dataset, "image", pictures).cast_column("image", Image())


def png_of_size(width, height):
    """A PNG with a header and no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
