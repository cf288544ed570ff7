"""Makes a dual encoder of an image tower and a text tower: their projections into a common space come from one regression."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from ..core.arguments import ALLOW_PICKLE, DataArguments, Range, check_settings, setting
from ..core.console import percent, say, table
from ..core.errors import UserError
from ..core.files import MODEL_FILES, atomic_folder, is_weights
from ..data.texts import DEFAULT_TEMPLATE, check_template
from ..model.families import POOLINGS


@dataclass
class AlignArguments:
    """The two towers, and how they are put together."""

    vision_model: str | None = setting(
        None, "Hub id or folder of an image tower (ViT, EfficientNet, ResNet, ConvNeXt, …) or of a dual encoder."
    )
    text_model: str | None = setting(
        None, "Hub id or folder of a text tower (BERT, a sentence encoder, …) or of a dual encoder."
    )
    output_dir: str = setting("outputs/aligned", "New folder of the dual encoder.")
    text_pooling: str | None = setting(
        None,
        "How the tokens of a text become one vector: mean, first ([CLS]) or last. Default: what the files of "
        "sentence-transformers say, else the tower's own pooled output.",
        choices=tuple(POOLINGS),
    )
    class_rows: bool = setting(
        False,
        "Learn from the class names and weights of the image classifier that --vision_model is, instead of the training "
        "pictures and their texts, which then only choose the ridge.",
    )
    class_template: str = setting(DEFAULT_TEMPLATE, "Text of a class, with {} for its name.")
    seed: int = setting(0, "Seed of the training pictures that choose the ridge.", range=Range())
    allow_pickle: bool = setting(False, ALLOW_PICKLE)
    per_device_eval_batch_size: int = setting(256, "Images per batch.", range=Range(1))
    dataloader_num_workers: int = setting(0, "Processes that read images.", range=Range())
    on_bad_image: str = setting(
        "fail", "fail: stop at an unreadable image; skip: leave it out.", choices=("fail", "skip")
    )


ARGUMENTS = (DataArguments, AlignArguments)


def run(data_args: DataArguments, args: AlignArguments) -> None:
    """Combines the towers, solves for the projections on the training split, and saves a folder that every verb takes."""
    from ..data.labels import refuse_several
    from ..data.splits import load_splits
    from ..model.align import align_towers, classifier_rows
    from ..model.combine import combine_towers
    from ..model.opening import default_device

    check_settings(args)
    check_template(args.class_template)
    for name in ("vision_model", "text_model"):
        if not getattr(args, name):
            raise UserError(f"--{name}: expected a Hub id or a folder, found none. Type --{name} NAME.")
    folder = Path(args.output_dir)
    others = [path.name for path in folder.iterdir() if not _is_model(path.name)] if folder.is_dir() else []
    if others:
        raise UserError(
            f"--output_dir {folder}: expected a new folder, or one with a model alone, found {sorted(others)[0]} in it. Type "
            "another one."
        )
    splits = load_splits(data_args)
    refuse_several(splits.train, "align")
    rows = classifier_rows(args.vision_model, args.allow_pickle) if args.class_rows else None
    model, processor, notes = combine_towers(
        args.vision_model, args.text_model, args.text_pooling, allow_pickle=args.allow_pickle
    )
    model.to(default_device())
    say(f"Aligning {args.vision_model} and {args.text_model} on {data_args.dataset_name}\n")
    found = align_towers(
        model,
        processor,
        splits.train,
        args.class_template,
        rows,
        args.seed,
        args.per_device_eval_batch_size,
        on_bad_image=args.on_bad_image,
        workers=args.dataloader_num_workers,
        progress=True,
    )
    with atomic_folder(folder) as new:
        model.save_pretrained(new)
        processor.save_pretrained(new)
    learned = f"{found.targets:,} training pictures and their texts"
    if rows:
        learned = f"the names and weights of {found.targets:,} classes of {args.vision_model}"
    table(
        {
            "learned from": learned,
            "text vector": getattr(model.config, "text_pooling", None) or "the text tower's own pooled output",
            "common space": f"{model.config.projection_dim} dimensions",
            "ridge": f"{found.ridge:g}, chosen on {found.pictures:,} of the training pictures, kept apart",
            "zero-shot": f"{percent(found.accuracy)} of these, with {len(splits.class_names)} classes and "
            f'"{args.class_template}"',
            "scale": f"{found.scale:.1f}",
        }
    )
    for note in (*notes, *splits.notes):
        say(f"\n  Note: {note}")
    saved = shlex.quote(str(folder))
    say(f"\nThe dual encoder is in {folder}. Next:")
    say(f"  mmft-hf finetune --model_name_or_path {saved} --dataset_name {shlex.quote(data_args.dataset_name)}")


def _is_model(name: str) -> bool:
    return name in MODEL_FILES or is_weights(name)
