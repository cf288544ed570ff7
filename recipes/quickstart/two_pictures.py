"""Writes two test pictures of the embedded emoji to a folder, to have something to predict: `two_pictures.py FOLDER`."""

import sys
from pathlib import Path

from mmft_hf import load_captioned_dataset

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    test = load_captioned_dataset("builtin/emoji-mini")["test"]
    for row in (test[7], test[len(test) // 2]):
        row["image"].save(folder / f"{row['concept_name'].replace(' ', '_')}.png")
