"""Adds captions to a labelled image data set: texts that it already has, or class templates."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from ..configuration import DataArguments
from ..console import say, table
from ..errors import UserError
from ..prompts import DEFAULT_TEMPLATE
from ..version import __version__

RECORD_FILE = "captions.json"


@dataclass
class CaptionArguments:
    """Who writes the captions, and where they go."""

    output_dir: str = field(
        default="outputs/captioned",
        metadata={"help": "Folder of the captioned data set: parquet files, one per split."},
    )
    captioner: str = field(
        default="columns",
        metadata={
            "help": "columns: texts that the data set already has (--text_columns); template: class templates.",
            "choices": ("columns", "template"),
        },
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "Columns that hold the texts. Default: the only column of lists of texts."}
    )
    class_template: str = field(
        default=DEFAULT_TEMPLATE, metadata={"help": "Template of --captioner template; {} stands for the class name."}
    )
    model_name_or_path: str = field(
        default="builtin/tiny-clip",
        metadata={"help": "Model that will be trained: its tokenizer counts tokens, its limit is checked."},
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the data set in output_dir."})


ARGUMENTS = (DataArguments, CaptionArguments)


def run(data_args: DataArguments, args: CaptionArguments) -> None:
    """Captions the training split, passes the others on, and writes a folder that `--dataset_name` opens."""
    from datasets import Features, Image

    from ..captioning import ColumnsCaptioner, TemplateCaptioner, caption_dataset
    from ..captioning.dataset import CAPTION_FEATURES
    from ..data import is_text, load_captioned_dataset, text_columns
    from ..modeling import load_tokenizer

    output = Path(args.output_dir)
    ours = _files_of_ours(output)
    if ours and not args.overwrite_output_dir:
        raise UserError(
            f"--output_dir {output}: expected no data set there, found one of mmft-hf. Type another --output_dir, or "
            "--overwrite_output_dir true."
        )
    if not ours and output.is_dir() and any(output.iterdir()):
        raise UserError(
            f"--output_dir {output}: expected an empty or new folder, found files that mmft-hf did not write. Type another "
            "--output_dir."
        )
    options = {k: v for k, v in vars(data_args).items() if k not in ("dataset_name", "dataset_config_name")}
    data = load_captioned_dataset(data_args.dataset_name, data_args.dataset_config_name, **options)
    train = data_args.train_split or ("train" if "train" in data else next(iter(data)))
    columns = args.text_columns
    if args.captioner == "columns" and not columns:
        columns = text_columns(data[train])
        if len(columns) != 1:
            found = ", ".join(columns) or f"none among {', '.join(data[train].column_names)}"
            raise UserError(
                f"--text_columns: expected one column of lists of texts, found {found}. Type --text_columns NAME."
            )
    for column in columns or ():
        if column in data[train].features and not is_text(data[train].features[column]):
            kind = data[train].features[column]
            raise UserError(f"--text_columns: expected columns of text or of lists of texts, found {column} of {kind}.")
    captioner = ColumnsCaptioner(columns) if args.captioner == "columns" else TemplateCaptioner([args.class_template])
    tokenizer = load_tokenizer(args.model_name_or_path)

    say(f"Captioning {data_args.dataset_name}\n")
    table(
        {
            "classes": len(data[train].features["label"].names),
            "images": f"{len(data[train]):,} of split {train}; other splits get no captions: "
            + ", ".join(f"{name} {len(split):,}" for name, split in data.items() if name != train),
            "captioner": f"{args.captioner} ({', '.join(columns) if args.captioner == 'columns' else args.class_template})",
            "output": output,
        }
    )
    run_id = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    captioned = caption_dataset(data[train], captioner, tokenizer, run_id)

    # Into a folder beside it, which takes its place when it is whole.
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "data").mkdir(parents=True)
    for name, split in data.items():
        if name == train:
            split = captioned
        else:
            # Captions of evaluation images are never used: they get none, so that all splits have the same columns.
            undecoded = split.cast_column("image", Image(decode=False))
            features = Features({**undecoded.features, **CAPTION_FEATURES})
            split = undecoded.map(_without_captions, features=features).cast_column("image", Image())
        split.to_parquet(partial / "data" / f"{name}-00000-of-00001.parquet")

    records = [record for row in captioned["caption_records"] for record in row]
    good = [record for record in records if record["status"] == "ok"]
    lengths = sorted(record["clip_tokens"] for record in good)
    limit = tokenizer.model_max_length
    manifest = {
        "run_id": run_id,
        "dataset_name": data_args.dataset_name,
        "split": train,
        "captioner": args.captioner,
        "columns": columns,
        "class_template": args.class_template if args.captioner == "template" else None,
        "images": len(captioned),
        "captions": len(good),
        "empty": len(records) - len(good),
        "mmft_hf": __version__,
        "files": sorted(f"data/{path.name}" for path in (partial / "data").iterdir()),
    }
    (partial / RECORD_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    if ours:
        # File by file, since the user may have put others there. The record is replaced last: after a kill in between
        # the folder is still known as ours, and the same command mends it.
        for old in ours[:-1]:
            old.unlink(missing_ok=True)
        for new in (*sorted((partial / "data").iterdir()), partial / RECORD_FILE):
            new.replace(output / new.relative_to(partial))
        shutil.rmtree(partial)
    else:
        if output.is_dir():
            output.rmdir()  # empty, or it would have been refused
        partial.rename(output)
    say("")
    table(
        {
            "captions": f"{len(good):,} kept, {len(good) / len(captioned):.1f} per image; {len(records) - len(good)} empty",
            "without": f"{sum(not c for c in captioned['captions'])} images have no caption",
            "tokens": f"median {lengths[len(lengths) // 2]}, longest {lengths[-1]}; "
            f"{sum(n > limit for n in lengths)} over the model's {limit}"
            if lengths
            else "none",
            "label named": f"in {sum(r['mentions_label'] for r in good) / max(len(good), 1):.0%} of the captions",
        }
    )
    say(f"\nNext: mmft-hf finetune --dataset_name {output}")


def _files_of_ours(output: Path) -> list[Path]:
    """What an earlier run left in the folder, by its own record; the record last."""
    try:
        record = json.loads((output / RECORD_FILE).read_text(encoding="utf-8"))
        return [*(output / name for name in record["files"]), output / RECORD_FILE]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _without_captions(row: dict) -> dict:
    import hashlib

    from ..captioning.dataset import image_bytes

    data, path = image_bytes(row["image"])
    image = {"bytes": data, "path": path}
    return {"image": image, "captions": [], "caption_records": [], "image_sha256": hashlib.sha256(data).hexdigest()}
