"""Fine-tunes a CLIP model on images and captions, and saves a classifier that needs neither to predict."""

from __future__ import annotations

import math
import os
import shlex
from pathlib import Path

from ..core.arguments import DataArguments, ModelArguments, choice
from ..core.console import is_main, percent, say, table
from ..core.errors import PartialResult, UserError
from ..core.files import RUN_FILE
from ..core.launch import together
from ..hub.client import check_access, check_name, make_repo
from ..train.checkpoints import last_complete_checkpoint
from ..train.config import MMFTConfig
from ..train.run_folder import Run

ARGUMENTS = (ModelArguments, DataArguments, MMFTConfig)


def run(model_args: ModelArguments, data_args: DataArguments, config: MMFTConfig) -> None:
    """Trains, selects on validation, reads the test split once, and leaves everything in `config.output_dir`."""
    with together(lambda: last_complete_checkpoint(config.output_dir)):
        _run(model_args, data_args, config)


def _run(model_args: ModelArguments, data_args: DataArguments, config: MMFTConfig) -> None:
    import numpy as np
    from transformers import set_seed

    from ..data.splits import load_splits
    from ..model.loading import load_model
    from ..model.towers import Adapter, merge, parameter_counts, set_towers
    from ..predict.classifier import ImageClassifier
    from ..predict.evaluation import classify
    from ..predict.heads.prototypes import ClassPrototypes
    from ..train.trainer import MMFTTrainer

    metrics = ("accuracy", "top5_accuracy", "mean_per_class_accuracy", "loss")
    choice("metric_for_best_model", config.metric_for_best_model.removeprefix("eval_"), metrics)
    if config.push_to_hub:
        # Now, not after the training.
        name = check_access(config.hub_model_id or Path(config.output_dir).absolute().name, config.hub_token)
        check_name(name, "model", RUN_FILE, config.hub_token)
        config.hub_model_id = name

    # -- before anything expensive -----------------------------------------------------------------------------------
    splits = load_splits(data_args)
    folder = Run(config.output_dir, model_args, data_args, config, splits)
    resume = folder.check(config.overwrite_output_dir, config.resume_from_checkpoint)
    if folder.completed:
        say(f"{folder.path} holds this very run, complete. Its results are in {folder.path / 'all_results.json'}.")
        if config.push_to_hub and is_main():
            _push(folder.path, config)
        return
    set_seed(config.seed)
    model, processor = load_model(model_args.model_name_or_path, model_args.model_revision)
    model.to(config.device)

    def score(model, prototypes, dataset, name):
        return classify(
            ImageClassifier(model, processor, prototypes),
            dataset,
            config.per_device_eval_batch_size,
            config.on_bad_image,
            config.dataloader_num_workers,
            name,
            progress=is_main() and not config.disable_tqdm,
            shard=True,
        )

    # -- what is about to happen -------------------------------------------------------------------------------------
    set_towers(model, model_args.vision_tower, model_args.text_tower, **(model_args.lora or {}))
    zero_shot = ClassPrototypes.from_templates(model, processor, splits.class_names, config.class_template, shard=True)
    untuned_validation = score(model, zero_shot, splits.validation, "validation").report()
    _announce(
        model_args,
        data_args,
        config,
        splits,
        parameter_counts(model),
        untuned_validation["accuracy"],
        _memory(model, processor, config, splits),
    )

    # -- training and selection --------------------------------------------------------------------------------------
    if config.push_to_hub and is_main():  # as late as can be, so that what fails before leaves no empty repository
        make_repo(config.hub_model_id, "model", config.hub_private_repo, config.hub_revision, config.hub_token)
    folder.claim(resume)
    try:
        trainer = MMFTTrainer(model, config, splits.train, splits.validation, processor)
    except (ImportError, ValueError) as error:  # the stock Trainer's refusals, e.g. of a tracker that is not installed
        raise UserError(f"finetune: {str(error).strip()}") from error
    train_metrics = trainer.train(resume_from_checkpoint=resume).metrics
    state = trainer.state
    tuned = trainer.accelerator.unwrap_model(trainer.model)
    adapter = Adapter.of(tuned)
    if adapter:  # from here on everything is measured and made with the weights that are saved
        merge(tuned)
    prototypes = trainer.build_prototypes()
    validated = score(tuned, prototypes, splits.validation, "validation")
    if np.isnan(validated.scores).any():  # a run of one step may get here with it
        trainer.stop_at("the output of the trained model", math.nan, state.global_step)
    validation = validated.report()["accuracy"]

    # -- the sealed test split, once, for the result and the baseline --------------------------------------------------
    untuned = load_model(model_args.model_name_or_path, model_args.model_revision)[0].to(config.device)
    zero_shot_test = score(untuned, zero_shot, splits.test, "test")
    # The zero-shot classifier is a candidate, too; it wins only where no epoch reached its validation accuracy.
    zero_shot_won = config.load_best_model_at_end and untuned_validation["accuracy"] > validation
    if zero_shot_won:
        tuned, prototypes, validation = untuned, zero_shot, untuned_validation["accuracy"]
        adapter = None
    predictions = zero_shot_test if zero_shot_won else score(tuned, prototypes, splits.test, "test")
    if is_main():
        results = folder.save(
            model=tuned,
            processor=processor,
            prototypes=prototypes,
            predictions=predictions,
            zero_shot_test=zero_shot_test.report(),
            validation={
                "validation_accuracy": validation,
                "zero_shot_validation_accuracy": untuned_validation["accuracy"],
                "validation_skipped_images": untuned_validation["skipped"],
            },
            train_metrics=train_metrics,
            state=state,
            zero_shot_won=zero_shot_won,
            adapter=adapter,
        )
        _show(folder.path, results, prototypes)
    if config.push_to_hub and is_main():
        trainer._finish_current_push()
        _push(folder.path, config)


def _push(path: Path, config: MMFTConfig) -> None:
    """Publishes what is in the folder: the weights that were chosen, with their results and card."""
    from ..hub.publish import push_model

    say(f"\nPushing {path} to {config.hub_model_id}")
    options = {"private": config.hub_private_repo, "revision": config.hub_revision, "token": config.hub_token}
    try:
        url = push_model(path, config.hub_model_id, **options)
    except (UserError, PartialResult) as error:
        again = ["mmft-hf", "push", str(path), "--repo_id", config.hub_model_id]
        again += ["--private", "true"] if config.hub_private_repo else []
        again += ["--revision", config.hub_revision] if config.hub_revision else []
        raise PartialResult(f"{error} The results are in {path}. To go on, type: {shlex.join(again)}") from error
    say(f"It is at {url}. Use it:\n  mmft-hf predict YOUR_PICTURE.jpg --model_name_or_path {config.hub_model_id}")


def _memory(model, processor, config, splits) -> str:
    """What a step will take, and what to type if that is more than there is."""
    from contextlib import nullcontext

    import torch

    from ..data.splits import captions_of
    from ..data.texts import training_text
    from ..model.memory import available_memory, estimate_memory

    # A few hundred rows tell how long texts are.
    some = splits.train.select(range(0, len(splits.train), 1 + len(splits.train) // 256)).remove_columns("image")
    texts = [
        training_text(config.class_template, splits.class_names[row["label"]], caption)
        for row in some
        for caption in captions_of(row.get("captions")) or [None]
    ]
    half = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
    autocast = torch.autocast(config.device.type, half) if half else nullcontext()
    estimate = estimate_memory(model, processor, texts, autocast, config.weight_averaging > 0)
    batch, chunk = config.per_device_train_batch_size, config.loss_chunk_size
    total, available = estimate.total(batch, chunk), available_memory(config.device)
    at_once = min(batch, chunk or batch)
    sharded = any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))
    less = "at most " if config.gradient_checkpointing or config.fsdp or config.deepspeed or sharded else ""
    line = (
        f"{less}{_gigabytes(total)} for a step, estimated: {_gigabytes(estimate.weights)} weights, "
        f"{_gigabytes(estimate.gradients_and_optimizer)} gradients and optimizer, "
        f"{_gigabytes(at_once * estimate.activations_per_image)} activations of {at_once} images"
        + (f", {_gigabytes(estimate.average)} averaged weights" if estimate.average else "")
    )
    if available is not None and total > available and not less:
        fits = estimate.chunk_that_fits(batch, available)
        line += f"\n{'':12}More than the {_gigabytes(available)} there are. " + (
            f"Type --loss_chunk_size {fits}: the same loss, a third slower."
            if fits
            else "Type --vision_tower lora --text_tower lora, or take a smaller model."
        )
    return line


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 95e6 else f"{size / 1e6:.0f} MB"


def _announce(model_args, data_args, config, splits, counts, zero_shot: float, memory: str) -> None:
    """Says what will be trained on what, before it starts."""
    names = splits.class_names
    rows = {
        "classes": f"{len(names)}: {', '.join(names[:6])}{', …' if len(names) > 6 else ''}",
        "images": f"{len(splits.train):,} train, {len(splits.validation):,} validation, {len(splits.test):,} test",
    }
    if splits.has_captions:
        per_image = splits.captions_per_image()
        without = int((per_image == 0).sum())
        rows["captions"] = f'{per_image.mean():.1f} per training image, after "{config.class_template}"' + (
            f"; {without} images have none and use that alone" if without else ""
        )
        if config.caption_dropout:
            rows["captions"] += f"; left out with probability {config.caption_dropout:g}"
    else:
        rows["captions"] = f'none: class template "{config.class_template}" alone'
    w = config.supcon_weight
    loss = f"{w:g} SupCon + {1 - w:g} CLIP"
    if config.supcon_weight_end is not None:
        loss = f"w SupCon + (1 - w) CLIP with w from {w:g} to {config.supcon_weight_end:g}"
    rows["loss"] = f"{loss}, learning rate {config.learning_rate:g}, seed {config.seed}"
    rows["trained"] = ", ".join(
        f"{tower} tower {getattr(model_args, f'{tower}_tower')} ({trained:,} of {total:,} parameters"
        + (f", {layers} layers)" if layers else ")")
        for tower, (trained, total, layers) in counts.items()
    )
    length = f"{config.max_steps} steps" if config.max_steps > 0 else f"{config.num_train_epochs:g} epochs"
    batch = config.per_device_train_batch_size
    rows["training"] = f"{length}, batches of {batch}" + (
        f" on each of {config.world_size} processes" if config.world_size > 1 else f" on {config.device}"
    )
    if config.weight_averaging:
        rows["training"] += f", weights averaged with decay {config.weight_averaging:g}"
    rows["memory"] = memory
    rows["zero-shot"] = f'{percent(zero_shot)} on validation, untuned, with "{config.class_template}"'
    rows["output"] = config.output_dir
    say(f"Fine-tuning {model_args.model_name_or_path} on {data_args.dataset_name}\n")
    table(rows)
    for note in splits.notes:
        say(f"\n  Note: {note}")
    say()


def _show(path: Path, results: dict, prototypes) -> None:
    """Prints the result beside the zero-shot baseline, and what to type next."""

    def line(prefix: str) -> str:
        interval = (results[f"{prefix}test_accuracy_ci_low"], results[f"{prefix}test_accuracy_ci_high"])
        return percent(results[f"{prefix}test_accuracy"], interval)

    gain = 100 * (results["test_accuracy"] - results["zero_shot_test_accuracy"])
    say(f"\nTest accuracy on {results['test_images']} images, with 95 % interval\n")
    rows = {"zero-shot": line("zero_shot_"), "fine-tuned": f"{line('')}   {gain:+.1f} points"}
    rows["mean per class"] = percent(results["test_mean_per_class_accuracy"])
    if "test_top5_accuracy" in results:
        rows["top-5"] = percent(results["test_top5_accuracy"])
    rows["selection"] = results["selection"]
    table(rows)
    if results["test_accuracy"] <= results["zero_shot_test_accuracy"]:
        say(
            "\n  Fine-tuning did not help here: the untuned model is as good. Try more images, epochs or learning rate."
        )
    if results["test_skipped_images"]:
        say(f"\n  {results['test_skipped_images']} test images could not be read and are not counted.")
    if prototypes.fallback_classes:
        names = prototypes.fallback_classes
        some = f"{', '.join(names[:8])}{', …' if len(names) > 8 else ''}"
        say(f"\n  {len(names)} classes without captions are classified by the template: {some}")
    say(f"\nEverything is in {path} (predictions_test.png shows some pictures). Next:")
    say(f"  mmft-hf predict YOUR_PICTURE.jpg --model_name_or_path {path}")
    say(f"  mmft-hf evaluate --model_name_or_path {path} --dataset_name YOUR_DATA")
