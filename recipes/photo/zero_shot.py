"""Zero-shot accuracy of a folder on validation splits, with `--final` also on test splits and on photographs; writes figures.json."""

import argparse
import json
from pathlib import Path

import torch
from datasets import load_dataset
from PIL import Image

from mmft_hf.model.loading import encode_images, encode_texts, load_model
from mmft_hf.predict.metrics import wilson_interval

SPLITS = {
    "emoji_mini": ("validation", "test", "test_new_vendor"),
    "emoji": ("validation", "validation_new_vendor", "test", "test_new_vendor", "test_mono"),
    "openclipart": ("validation", "test"),
}
TEMPLATE = "a photo of a {}."


class ZeroShot:
    def __init__(self, folder: str):
        self.model, self.processor = load_model(folder)
        self.model.eval()

    @torch.no_grad()
    def classify(self, pictures: list[Image.Image], names: list[str]) -> torch.Tensor:
        """Class numbers `(pictures)`."""
        tokens = self.processor.tokenizer([TEMPLATE.format(name) for name in names], padding=True, return_tensors="pt")
        texts = encode_texts(self.model, tokens["input_ids"], tokens["attention_mask"])
        found = []
        for start in range(0, len(pictures), 64):
            batch = [picture.convert("RGB") for picture in pictures[start : start + 64]]
            pixels = self.processor.image_processor(batch, return_tensors="pt")["pixel_values"]
            found.append((encode_images(self.model, pixels) @ texts.T).argmax(-1))
        return torch.cat(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin/photo")
    parser.add_argument("--data", type=Path, help="folder of emoji_mini, emoji and openclipart")
    parser.add_argument(
        "--photographs", type=Path, help="folder into which the packages of photographs.json were unpacked"
    )
    parser.add_argument("--final", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, figures = ZeroShot(args.model), []

    def add(name, split, pictures, labels, names):
        right, n = int((model.classify(pictures, names) == torch.tensor(labels)).sum()), len(labels)
        low, high = wilson_interval(right, n)
        figures.append(
            {"set": name, "split": split, "classes": len(names), "right": right, "n": n, "low": low, "high": high}
        )
        print(
            f"{name} {split}: {right} of {n}, {100 * right / n:.1f} % ({100 * low:.1f} to {100 * high:.1f})", flush=True
        )

    for name, splits in SPLITS.items() if args.data else ():
        data = load_dataset(str(args.data / name))
        for split in splits:
            if args.final or split.startswith("validation"):
                rows = data[split]
                spoken = [label.replace("_", " ") for label in rows.features["label"].names]
                add(name, split, rows["image"], rows["label"], spoken)
    if args.photographs:
        classes = json.loads((Path(__file__).parent / "photographs.json").read_text())["classes"]
        pictures = [
            (Image.open(args.photographs / file), i) for i, files in enumerate(classes.values()) for file in files
        ]
        add("photographs", "of Debian packages", [p for p, _ in pictures], [i for _, i in pictures], list(classes))
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
