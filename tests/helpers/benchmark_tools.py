"""A small benchmark: its command line and its data."""

from types import SimpleNamespace

from datasets import Image
from tiny_clip import COLOURS, colour_dataset


def command(clip_folder, data_folder, out, *more) -> list[str]:
    words = (
        f"benchmark --model_name_or_path {clip_folder} --dataset_name {data_folder} --output_dir {out} --use_cpu true"
    )
    words += " --max_steps 2 --per_device_train_batch_size 6 --learning_rate 1e-3"
    return [*words.split(), *map(str, more)]


def some_splits(**more) -> SimpleNamespace:
    parts = {"train": colour_dataset(8), "validation": colour_dataset(4, 1), "test": colour_dataset(6, 2)} | more
    parts = {
        name: data.add_column("image_id", [f"{name} {i}" for i in range(len(data))]).cast_column(
            "image", Image(decode=False)
        )
        if hasattr(data, "add_column")
        else data
        for name, data in parts.items()
    }
    return SimpleNamespace(**parts, class_names=list(COLOURS), fingerprint=lambda: "0123456789abcdef")


def parts_of(folder, **more):
    """Train, validation, test and further splits as a folder of parquet files."""
    parts = {"train": colour_dataset(8), "validation": colour_dataset(4, 1), "test": colour_dataset(6, 2)} | more
    (folder / "data").mkdir(parents=True)
    for name, data in parts.items():
        data.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


def with_bad_picture(data, row):
    content = [row["image"] for row in data.cast_column("image", Image(decode=False))]
    content[row] = {"bytes": b"no picture", "path": None}
    return data.remove_columns("image").add_column("image", content, feature=Image())
