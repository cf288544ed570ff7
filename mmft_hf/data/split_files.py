"""CoOp split files (`split_zhou_*.json`), which many few-shot papers share: the image paths of each split.

CoOp's few-shot subsets are not read: they are pickles, and opening a pickle can run any code.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from ..core.errors import UserError
from .image_paths import resolve_paths

SPLITS = {"train": "train", "val": "validation", "test": "test"}


def read_split_file(name: str, image_root: str | None = None) -> DatasetDict | None:
    """Reads `{"train": [[path, class number, class name], …], "val": …, "test": …}`.

    Args:
        name: path of a JSON file.
        image_root (*optional*): folder that the paths are relative to. Default: the folder of the file, or the single
            folder next to the file that holds the first image, as in CoOp's layout.

    Returns:
        Splits `train`, `validation` and `test` with `image` (absolute paths) and `label`, classes in the order of their
        numbers. None if the file is something else.

    Raises:
        UserError: other splits or rows; a class with two names; an image that is missing, elsewhere, or listed twice.
    """
    file = Path(name)
    try:
        found = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError):  # for example JSON lines
        found = None
    if not isinstance(found, dict) or "train" not in found:
        return None
    what = f"split file {name!r}: expected"
    if found.keys() != SPLITS.keys():
        raise UserError(f"{what} the splits {', '.join(SPLITS)}, found {', '.join(found)[:100]}.")
    for split, rows in found.items():
        for i, row in enumerate(rows if isinstance(rows, list) and rows else [rows]):
            if not (isinstance(row, list) and list(map(type, row)) == [str, int, str]):
                raise UserError(
                    f"{what} [path, class number, class name] for each image, found {json.dumps(row)[:80]} (split {split!r}, "
                    f"row {i})."
                )
    pairs = sorted({(number, label) for rows in found.values() for _, number, label in rows})
    numbers, labels = Counter(number for number, _ in pairs), Counter(label for _, label in pairs)
    if twice := [pair for pair in pairs if numbers[pair[0]] > 1 or labels[pair[1]] > 1]:
        raise UserError(f"{what} one name for each class number, found {', '.join(map(str, twice[:4]))}.")
    root = _root(file, found["train"][0][0], image_root)
    paths = Counter(path for rows in found.values() for path, _, _ in rows)
    if twice := [path for path, count in paths.items() if count > 1]:
        raise UserError(f"{what} each image once, found {len(twice):,} repeated, for example {twice[0]}.")
    files = {
        split: resolve_paths([path for path, *_ in rows], [root], None, f"split file {name!r}, split {split!r}")
        for split, rows in found.items()
    }
    if missing := [path for path in paths if not (root / path).is_file()]:
        raise UserError(
            f"{what} its images in {root}, found {len(paths) - len(missing):,} of {len(paths):,}; missing is for example "
            f"{missing[0]}. Type --image_root FOLDER, or complete the folder."
        )
    position = {number: i for i, (number, _) in enumerate(pairs)}
    features = Features({"image": Value("string"), "label": ClassLabel(names=[label for _, label in pairs])})
    return DatasetDict(
        {
            SPLITS[split]: Dataset.from_dict(
                {"image": files[split], "label": [position[n] for _, n, _ in rows]},
                features,
            )
            for split, rows in found.items()
        }
    )


def _root(file: Path, first: str, image_root: str | None) -> Path:
    """The folder that the paths are relative to, as an absolute path."""
    if image_root:
        return Path(image_root).absolute()
    folder = file.absolute().parent
    if (folder / first).is_file():
        return folder
    holding = [place for place in sorted(folder.iterdir()) if (place / first).is_file()]
    if len(holding) != 1:
        where = " and ".join(folder.name for folder in holding) or "neither there nor in a folder there"
        raise UserError(
            f"split file {str(file)!r}: expected its first image, {first}, in {folder} or one folder in it, found it "
            f"{f'in {where}' if holding else where}. Type --image_root FOLDER, which the paths are relative to."
        )
    return holding[0]
