"""Tunes a language model or a sentence encoder on pairs of captions (LoRA), as the text trunk of `mmft-hf finetune --text_trunk`.

It learns that two captions of one picture belong together, from the training split alone, and finds captions by captions before and
after, on validation pictures. The folder that it writes holds the LoRA weights and names the base model.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

# Python looks for modules in this script's folder first.
sys.path.pop(0)

from mmft_hf.cli import quiet_libraries
from mmft_hf.commands.parser import parse
from mmft_hf.core.arguments import ALLOW_PICKLE, DataArguments, Range, check_settings, setting
from mmft_hf.core.console import is_main, many, percent, say, table
from mmft_hf.core.errors import UserError, command_line_spelling
from mmft_hf.core.files import TRUNK_FILES, write_json
from mmft_hf.data.texts import DEFAULT_TEMPLATE, check_template

PROGRAM = "python recipes/llm2clip/cc.py"
RESULTS = "cc_results.json"
HELD_OUT = 0.1  # of the training pictures, where validation pictures have no captions


@dataclass
class TrunkArguments:
    """The language model or sentence encoder, and how it makes vectors."""

    text_trunk: str | None = setting(None, "Hub id, folder or GGUF file of a language model or a sentence encoder.")
    revision: str | None = setting(None, "Branch, tag or commit of it on the Hub.")
    gguf_file: str | None = setting(None, "Name of its GGUF file, if --text_trunk names only the folder or repository.")
    pooling: str | None = setting(
        None, "mean, first or last token. Default: what its files say, else mean.", choices=("mean", "first", "last")
    )
    bidirectional: bool | None = setting(
        None,
        "Whether a decoder reads in both directions. Default: yes, unless it is a sentence encoder, which stays as it is.",
    )
    instruction: str | None = setting(None, "Text before every text, here and later. Default: none.")
    max_length: int = setting(512, "Tokens of a text, at most.", range=Range(3))
    dtype: str = setting("float32", "Type of the base model's weights.", choices=("float32", "bfloat16", "float16"))
    allow_pickle: bool = setting(False, ALLOW_PICKLE)


@dataclass
class TuningArguments:
    """The tuning."""

    output_dir: str = setting("outputs/trunk", "Folder of the tuned encoder.")
    num_train_epochs: float = setting(3.0, "Passes over the training pictures.", range=Range(0, open=("low",)))
    max_steps: int = setting(-1, "Steps, in place of epochs.", range=Range(-1))
    per_device_train_batch_size: int = setting(
        64, "Pictures per process and step; more are more negatives.", range=Range(2)
    )
    per_device_eval_batch_size: int = setting(64, "Texts per batch when they are only encoded.", range=Range(1))
    learning_rate: float = setting(2e-4, "Highest learning rate.", range=Range(0))
    scale: float = setting(50.0, "Factor of the cosines.", range=Range(0, open=("low",)))
    same_class: str = setting(
        "mask",
        "Texts of other pictures of the same class. mask: left out, so that vectors tell classes apart; negative: pushed apart, "
        "too, so that they also tell the pictures of a class apart.",
        choices=("mask", "negative"),
    )
    lora_rank: int = setting(
        16, "Rank of the LoRA matrices, which all linear layers of the blocks get.", range=Range(1)
    )
    lora_alpha: int = setting(32, "LoRA matrices are scaled by lora_alpha / lora_rank.", range=Range(1))
    lora_dropout: float = setting(0.05, "Dropout on their input.", range=Range(0, 1, open=("high",)))
    class_template: str = setting(DEFAULT_TEMPLATE, "Text of a class, the pair of a picture's only caption.")
    seed: int = setting(0, "Seed of LoRA's start, of the draws and of the order.", range=Range())
    bf16: bool = setting(False, "Compute in bfloat16 while tuning.")
    gradient_checkpointing: bool = setting(False, "Recompute activations: less memory, more time.")
    resume_from_checkpoint: bool = setting(False, "Go on from the last checkpoint in --output_dir.")


ARGUMENTS = (DataArguments, TrunkArguments, TuningArguments)
NO_RESULT = ("output_dir", "resume_from_checkpoint", "per_device_eval_batch_size")  # settings that change no weight


def run(data_args: DataArguments, trunk: TrunkArguments, args: TuningArguments) -> dict:
    """Tunes and saves the encoder; returns what `cc_results.json` holds."""
    import torch
    from transformers import TrainingArguments, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    from mmft_hf.data.labels import refuse_several
    from mmft_hf.data.sampling import hold_out
    from mmft_hf.data.splits import load_splits
    from mmft_hf.model.caption_encoder import CaptionEncoder
    from mmft_hf.model.features import Encoding
    from mmft_hf.train.caption_contrast import CaptionPairs, CaptionTrainer, caption_retrieval, same_settings

    check_settings(trunk), check_settings(args), check_template(args.class_template)
    if not trunk.text_trunk:
        raise UserError("--text_trunk: expected a Hub id or a folder, found none. Type --text_trunk NAME.")
    folder = Path(args.output_dir)
    settings = {**asdict(data_args), **asdict(trunk), **asdict(args)}
    settings = {key: value for key, value in settings.items() if key not in NO_RESULT}
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if args.resume_from_checkpoint:
        same_settings(folder, RESULTS, settings)
    elif last or (folder / TRUNK_FILES[0]).exists():
        raise UserError(
            f"--output_dir {folder}: expected a new folder, found a run in it. Type another one, or --resume_from_checkpoint true to go on."
        )
    splits = load_splits(data_args)
    refuse_several(splits.train, "cc.py")
    pairs = CaptionPairs(splits.train, args.class_template, args.seed)
    held = CaptionPairs(splits.validation, args.class_template)
    where = "validation pictures"
    if len(held) < 2 and len(pairs):
        pairs, held = pairs.divided(*hold_out(pairs.labels, HELD_OUT, args.seed))
        where = "training pictures, which are held out, since validation pictures have no captions"
    if len(pairs) < 2 or len(held) < 2:
        raise UserError(
            f"--captions_column: expected captions of four training pictures or more, found pairs of captions of {len(pairs) + len(held)}. Type "
            "--captions_column NAME, or write captions first: mmft-hf caption."
        )
    encoder = CaptionEncoder.from_pretrained(
        trunk.text_trunk,
        pooling=trunk.pooling,
        bidirectional=trunk.bidirectional,
        instruction=trunk.instruction,
        max_length=trunk.max_length,
        revision=trunk.revision,
        gguf_file=trunk.gguf_file,
        dtype=trunk.dtype,
        allow_pickle=trunk.allow_pickle,
    )
    training = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.per_device_train_batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,
        weight_decay=0.0,
        bf16=args.bf16,
        seed=args.seed,
        logging_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        remove_unused_columns=False,
        report_to=[],
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    how = Encoding(args.per_device_eval_batch_size, shard=True, progress=is_main())
    say(f"Tuning {trunk.text_trunk} on pairs of captions of {data_args.dataset_name}\n")
    before = caption_retrieval(encoder.to(training.device), held.fixed(), how)
    set_seed(args.seed)
    encoder.add_lora(args.lora_rank, args.lora_alpha, args.lora_dropout)
    if args.gradient_checkpointing:
        encoder.checkpoint_gradients()
    results = {"settings": settings, "pairs": len(pairs), "left_out": pairs.left_out, "before": before}
    if is_main():
        write_json(folder / RESULTS, results)
    trainer = CaptionTrainer(encoder, training, pairs, args.scale, args.same_class)
    trainer.train(resume_from_checkpoint=last if args.resume_from_checkpoint else None)
    trainer.save_model()
    results["after"] = after = caption_retrieval(encoder, held.fixed(), how)
    if is_main():
        write_json(folder / RESULTS, results)
    table(
        {
            "base model": f"{trunk.text_trunk}, {encoder.record()['parameters'] / 1e6:,.1f} million parameters, frozen",
            "LoRA": f"rank {args.lora_rank}, {sum(p.numel() for p in encoder.parameters() if p.requires_grad) / 1e6:,.2f} million parameters",
            "pairs": f"of {len(pairs):,} training pictures",
            "captions found by captions": f"on {len(held):,} {where}",
            "  before": found_text(before),
            "  after": found_text(after),
            "  chance": f"{percent(after['chance'])} at 1",
        }
    )
    if pairs.left_out:
        say(f"\n  Note: {many(pairs.left_out, 'training picture')} without a caption left out.")
    for note in splits.notes:
        say(f"\n  Note: {note}")
    say(f"\nThe text trunk is in {folder}. Next:")
    words = ["--text_trunk", str(folder), "--dataset_name", data_args.dataset_name]
    words += ["--captions_column", data_args.captions_column] if data_args.captions_column else []
    say(f"  mmft-hf finetune {shlex.join(words)}")
    return results


def found_text(figures: dict) -> str:
    at_1, at_5, of_class = (percent(figures[name]) for name in ("recall_at_1", "recall_at_5", "class_at_1"))
    return f"{at_1} at 1, {at_5} at 5; of the same class {of_class}"


@command_line_spelling()
def main(argv: list[str] | None = None) -> int:
    try:
        settings = parse("cc.py", sys.modules[__name__], list(sys.argv[1:] if argv is None else argv))
        quiet_libraries()
        run(*settings)
        return 0
    except UserError as error:
        print(f"cc.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cc.py: stopped by you. To go on, type the same with --resume_from_checkpoint true.", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
