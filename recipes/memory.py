"""Measures the peak memory of every way that pictures take, with photographs of 12 megapixels.

    python recipes/memory.py                     # 32 and 64 pictures, batches of 256
    python recipes/memory.py --pictures 256      # one batch of the default size

Each figure is the peak of a process of its own, less that of the same process with a single picture: what the other pictures
cost. A picture of 12 megapixels is 36 MB when it is decoded.

  evaluate    `classify` in batches of 256, as `mmft-hf evaluate` and the validation of `finetune` do
  features    `image_features`, which the baselines and frozen towers read
  predict     `ImageClassifier.predict` in batches of 256
  train       two steps of MMFTTrainer with the whole set as one batch
  caption     what `mmft-hf caption` sends, prepared one after the other
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

# This folder has an evaluate.py, which must not hide the library of that name.
sys.path.pop(0)

WAYS = ("evaluate", "features", "predict", "train", "caption")
WIDTH, HEIGHT = 4000, 3000
BATCH = 256


def write_photos(folder: Path, count: int) -> None:
    """Writes JPEG files with smooth colours and some noise; of each, only the last byte differs."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT), 3)
    pixels = np.asarray(coarse).astype(np.int16) + rng.integers(-8, 9, (HEIGHT, WIDTH, 1), dtype=np.int16)
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    for i in range(count):
        (folder / f"{i:03}.jpg").write_bytes(buffer.getvalue() + bytes([i % 256]))


def measure(way: str, folder: Path, count: int) -> tuple[int, float]:
    """Peak memory of this process in bytes, and the seconds of the way itself."""
    import torch
    from datasets import ClassLabel, Dataset, Features, Image

    import mmft_hf
    from mmft_hf.captioning.ask.pictures import PicturePolicy, prepare
    from mmft_hf.model.features import image_features
    from mmft_hf.predict.evaluation import classify

    torch.set_num_threads(1)
    files = sorted(str(path) for path in folder.iterdir())[:count]
    names = ["a", "b"]
    columns = {"image": files, "label": [i % 2 for i in range(len(files))]}
    dataset = Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(names=names)}))
    model, processor = mmft_hf.load_model("builtin/tiny-clip")
    head = mmft_hf.ClassPrototypes.from_templates(model, processor, names, "a photo of a {}.")
    classifier = mmft_hf.ImageClassifier(model, processor, head).eval()
    start = time.perf_counter()
    if way == "evaluate":
        classify(classifier, dataset, BATCH, progress=False)
    elif way == "features":
        image_features(model, processor, dataset, BATCH)
    elif way == "predict":
        classifier.predict(files, batch_size=BATCH)
    elif way == "caption":
        for file in files:
            prepare(Path(file).read_bytes(), PicturePolicy())
    else:
        settings = {
            "max_steps": 2,
            "per_device_train_batch_size": count,
            "loss_chunk_size": 16,
            "save_strategy": "no",
            "eval_strategy": "no",
        }
        settings |= {"load_best_model_at_end": False}
        config = mmft_hf.MMFTConfig(str(folder / "out"), use_cpu=True, disable_tqdm=True, report_to=[], **settings)
        mmft_hf.MMFTTrainer(model, config, dataset, processing_class=processor).train()
    seconds = time.perf_counter() - start
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], Path(args.one[1]), args.pictures[0])))
        return
    with TemporaryDirectory() as folder:
        pictures = Path(folder, "photos")
        pictures.mkdir()
        write_photos(pictures, max(args.pictures))

        def peak(way: str, count: int) -> tuple[int, float]:
            command = [sys.executable, __file__, "--one", way, str(pictures), "--pictures", str(count)]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MMFT_HF_CACHE": folder}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                raise SystemExit(f"{way}, {count} pictures: {done.stderr[-2000:]}")
            return tuple(json.loads(done.stdout.splitlines()[-1]))

        print("| way | " + " | ".join(f"{n} pictures" for n in args.pictures) + " | seconds a picture |")
        print("|---" * (len(args.pictures) + 2) + "|")
        for way in args.ways:
            alone = peak(way, 1)[0]
            found = [peak(way, count) for count in args.pictures]
            cells = [f"{max(0, used - alone) / 1e6:,.0f} MB" for used, _ in found]
            print(f"| {way} | {' | '.join(cells)} | {found[-1][1] / args.pictures[-1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
