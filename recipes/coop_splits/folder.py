"""Turns a split file of CoOp (`split_zhou_*.json`) and the pictures it names into a folder that `--dataset_name` opens.

usage: python folder.py split_zhou_EuroSAT.json PICTURES OUT
"""

import argparse
import csv
import json
from collections import Counter
from pathlib import Path

SPLITS = {"train": "train", "val": "validation", "test": "test"}


def read(file: Path, pictures: Path) -> dict[str, list[tuple[str, str]]]:
    """The (path, class name) pairs of each split; the file has [path, class number, class name] for each picture."""
    found = json.loads(file.read_text("utf-8"))
    if not isinstance(found, dict) or found.keys() != SPLITS.keys():
        raise SystemExit(f"{file}: expected the splits {', '.join(SPLITS)}, found {', '.join(map(str, found))[:100]}.")
    splits = {
        SPLITS[split]: [(str((pictures / path).resolve()), name) for path, _, name in rows]
        for split, rows in found.items()
    }
    names = {(label, name) for rows in found.values() for _, label, name in rows}
    if len({label for label, _ in names}) != len(names) or len({name for _, name in names}) != len(names):
        raise SystemExit(f"{file}: expected one name for each class number, found {sorted(names)[:8]}.")
    paths = Counter(path for rows in splits.values() for path, _ in rows)
    twice = [path for path, count in paths.items() if count > 1]
    if twice:
        raise SystemExit(f"{file}: expected each picture once, found {len(twice)} twice, {twice[0]} for one.")
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise SystemExit(f"{len(missing)} of {len(paths)} pictures are not in {pictures}, {missing[0]} for one.")
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="split_zhou_*.json")
    parser.add_argument("pictures", type=Path, help="folder that its paths start from")
    parser.add_argument("out", type=Path, help="folder of the three CSV files")
    args = parser.parse_args()
    splits = read(args.file, args.pictures)
    args.out.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        with open(args.out / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("image", "label"), *rows])
        print(f"{split:10} {len(rows):7,} images, {len({name for _, name in rows}):4} classes")


if __name__ == "__main__":
    main()
