"""Features and texts of drawings: writes features.pt, with every split that is read but never a test split.

Only train concepts of the emoji sets are trained on, and of openclipart's train split the pictures whose name and keywords hold no
evaluation concept of the emoji sets (the filter of recipes/tiny_clip). Share-alike pictures and texts are left out.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from image_tower import VARIANTS, image_tower

sys.path.append(str(Path(__file__).parents[1] / "tiny_clip"))
from words import ConceptFilter

READ = {
    "emoji": ("train", "extra", "validation"),
    "emoji_mini": ("train", "validation"),
    "openclipart": ("train", "validation"),
}
TRAINED_ON = (("emoji", "train"), ("emoji", "extra"), ("emoji_mini", "train"), ("openclipart", "train"))


@torch.no_grad()
def encode(model, processor, pictures, size: int = 32) -> torch.Tensor:
    """Pooled features `(pictures, 1280)` in float32."""
    found = []
    for start in range(0, len(pictures), size):
        batch = [picture.convert("RGB") for picture in pictures[start : start + size]]
        pixels = processor(batch, return_tensors="pt")["pixel_values"].contiguous(memory_format=torch.channels_last)
        found.append(model(pixels).pooler_output)
    return torch.cat(found)


def read(model, processor, folders: dict[str, Path]) -> dict:
    """`{(set, split): (features (N, 1280) in float16, rows without pictures, class names)}`."""
    found = {}
    for name, splits in READ.items():
        data = load_dataset(str(folders[name]))
        for split in splits:
            rows = data[split]
            if split == "extra":
                rows = rows.filter(lambda part: part == "train", input_columns="concept_split")
            parts = [encode(model, processor, rows[i : i + 256]["image"]) for i in range(0, len(rows), 256)]
            texts = rows.remove_columns("image").to_list()
            found[name, split] = (torch.cat(parts).half(), texts, rows.features["label"].names)
            print(name, split, len(rows), flush=True)
    return found


def evaluation_concepts(folders: dict[str, Path]) -> list[dict]:
    """Rows of the emoji sets whose concept is in no train split."""
    columns, found = ["concept", "concept_name", "concept_split"], []
    for name in ("emoji", "emoji_mini"):
        for rows in load_dataset(str(folders[name])).values():
            found += [row for row in rows.select_columns(columns).to_list() if row["concept_split"] != "train"]
    return found


def texts_of(row: dict) -> list[str]:
    """What people wrote about a drawing: name, gloss, single keywords; the name also in two templates."""
    names, keywords = [], []
    for source, text in zip(row["text_source"], row["text"], strict=True):
        if "keywords" in source:
            keywords += [word.strip().lower() for word in text.split(",") if len(word.strip()) > 1]
        elif source != "openmoji_tags":
            names.append(text.strip().lower())
    names = [row["concept_name"].lower()] * 2 + names if row.get("concept_name") else names
    names = names or keywords[:1]  # some clip art has no title
    return [*names, *keywords[:8], f"a drawing of a {names[0]}", f"a photo of a {names[0]}."] if names else []


def drawings(found: dict, keep_out: ConceptFilter) -> tuple[torch.Tensor, list[list[str]], np.ndarray]:
    """Features `(N, 1280)`, texts per drawing, and a number per drawing that those of one concept share."""
    features, texts, concepts = [], [], []
    for name, split in TRAINED_ON:
        values, rows, _ = found[name, split]
        chosen = []
        for i, row in enumerate(rows):
            own = texts_of(row)
            if not own or "SA" in row["license"]:
                continue
            if name == "openclipart" and (keep_out.in_name(own[0]) or any(map(keep_out.is_tag, own[1:-2]))):
                continue
            chosen.append(i)
            texts.append(own)
            concepts.append(row.get("concept_name") or own[0])
        features.append(values[chosen].float())
        print(f"{name} {split}: {len(chosen)} of {len(rows)} are trained on")
    return torch.cat(features), texts, np.unique(concepts, return_inverse=True)[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("emoji", "emoji-mini", "openclipart", "tower", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--variant", choices=VARIANTS, default="lite0")
    args = parser.parse_args()
    model, processor, _, _ = image_tower(args.tower, args.variant)
    folders = {"emoji": args.emoji, "emoji_mini": args.emoji_mini, "openclipart": args.openclipart}
    found = read(model.to(memory_format=torch.channels_last), processor, folders)
    torch.save({"sets": found, "evaluation": evaluation_concepts(folders)}, args.out)


if __name__ == "__main__":
    main()
