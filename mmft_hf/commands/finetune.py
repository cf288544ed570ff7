"""Fine-tunes a CLIP model on images and captions, and saves a classifier that needs neither to predict."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.arguments import DataArguments, ModelArguments
from ..core.console import many, percent, say, some, table
from ..core.files import RESULTS_FILE, SHEET_FILE
from ..data.labels import labels_of
from ..train.config import MMFTConfig
from ..train.selection import by_metric, is_better, shown
from .push import keys_note

if TYPE_CHECKING:
    from ..model.memory import MemoryEstimate
    from ..train.workflow import FinetunePlan, FinetuneResult

ARGUMENTS = (ModelArguments, DataArguments, MMFTConfig)
# What the metrics are called where a picture may have several labels; accuracy is then the share of pictures with exactly the
# right ones.
SEVERAL_LABELS = {
    "mean_average_precision": "mAP",
    "micro_f1": "micro F1",
    "macro_f1": "macro F1",
    "accuracy": "exact match",
}


def run(model_args: ModelArguments, data_args: DataArguments, config: MMFTConfig) -> None:
    """Trains, selects on validation, reads the test split once, and saves everything to `config.output_dir`."""
    from ..train.workflow import run_finetuning

    run_finetuning(model_args, data_args, config, reporter=Terminal())


class Terminal:
    """Prints what will be trained, the result next to the zero-shot baseline, and what to type next."""

    def started(self, plan: FinetunePlan) -> None:
        model_args, config, splits = plan.model_args, plan.config, plan.splits
        names = splits.class_names
        rows = {
            "classes": f"{len(names)}: {some(names, 6)}",
            "images": f"{len(splits.train):,} train, {len(splits.validation):,} validation, {len(splits.test):,} test",
            "captions": _captions(config, splits),
        }
        if splits.several_labels:
            rows["labels"] = f"several per image, {labels_of(splits.train).sum(axis=1).mean():.1f} on average"
        if config.num_train_epochs > 0 or config.max_steps > 0:
            rows |= _training(plan)
        else:
            rows["training"] = "none: a head is fitted to the untuned model"
        zero_shot = percent(plan.zero_shot_accuracy)
        if splits.several_labels:
            zero_shot = f"mean average precision {zero_shot}"
        rows["zero-shot"] = f'{zero_shot} on validation, untuned, with "{config.class_template}"'
        rows["output"] = config.output_dir
        say(f"Fine-tuning {model_args.model_name_or_path} on {plan.data_args.dataset_name}\n")
        table(rows)
        for note in splits.notes:
            say(f"\n  Note: {note}")
        say()

    def finished(self, result: FinetuneResult) -> None:
        from ..predict.metrics import uneven_note

        folder, metrics = result.output_dir, result.metrics
        if result.repeated:
            say(f"{folder} already holds this run, complete. Its results are in {folder / RESULTS_FILE}.")
            return

        def accuracy(prefix: str) -> str:
            interval = (metrics[f"{prefix}test_accuracy_ci_low"], metrics[f"{prefix}test_accuracy_ci_high"])
            return percent(metrics[f"{prefix}test_accuracy"], interval)

        gain = 100 * (result.test_accuracy - result.zero_shot_test_accuracy)
        several, images = metrics.get("several_labels"), metrics["test_images"]
        heading = f"Results on {images} test images, exact match" if several else f"Test accuracy on {images} images,"
        say(f"\n{heading} with 95 % interval\n")
        now = "fine-tuned" if metrics.get("head_alpha", 1) else "new head"  # on untuned weights
        rows = {"zero-shot": accuracy("zero_shot_"), now: f"{accuracy('')}   {gain:+.1f} points"}
        note = ""
        if several:
            rows = several_labels_rows(metrics)
        else:
            mean, before = (metrics[f"{of}test_mean_per_class_accuracy"] for of in ("", "zero_shot_"))
            note = uneven_note(metrics["test_images_of_smallest_class"], metrics["test_images_of_largest_class"])
            if note:
                rows = {"mean per class": beside_zero_shot(mean, before)} | rows
            else:
                rows["mean per class"] = percent(mean)
        if "test_top5_accuracy" in metrics:
            rows["top-5"] = percent(metrics["test_top5_accuracy"])
        rows["classifier" if "head_candidates" in metrics else "selection"] = metrics["selection"]
        if others := _others(metrics):
            rows["others"] = others
        if "test_calibration_error" in metrics:
            error, null = metrics["test_calibration_error"], metrics["test_calibration_error_null"]
            rows["calibration"] = f"error {error:.3f}; {null:.3f} would be perfect on so many images"
        rows |= threshold_row(metrics["reject_below"], several, metrics.get("thresholds"))
        if unknown := metrics.get("unknown_split"):
            rows |= unknown_rows(unknown["name"], unknown)
        metric = metrics["selection_metric"]
        tuned, untuned = metrics[f"test_{metric}"], metrics[f"zero_shot_test_{metric}"]
        if metric != "accuracy" and not several:
            rows[metric.replace("_", " ")] = f"{shown(metric, tuned)}, zero-shot {shown(metric, untuned)}"
        table(rows)
        if note:
            say(f"\n  {note}")
        if note and metric != "mean_per_class_accuracy":
            say("  Type --metric_for_best_model mean_per_class_accuracy to have it select, too.")
        if not is_better(metric, tuned, untuned):
            by = by_metric(metric)
            rate = "" if "tuning" in metrics else " (--tune 6 searches it)"
            cause, advice = "Fine-tuning", f"more images, more epochs or another learning rate{rate}"
            if now == "new head":
                cause, advice = "The new head", "more images, or captions"
            say(f"\n  {cause} did not help here: the untuned model is as good{by}. Try {advice}.")
        if metrics["test_skipped_images"]:
            say(f"\n  {metrics['test_skipped_images']} test images could not be read and are not counted.")
        if result.no_threshold:
            say(f"\n  {result.no_threshold}")
        if names := result.fallback_classes:
            say(f"\n  {len(names)} classes without captions are classified by the template: {some(names, 8)}")
        say(f"\nEverything is in {folder} ({SHEET_FILE} shows some pictures). Next:")
        saved = shlex.quote(str(folder))
        say(f"  mmft-hf predict YOUR_PICTURE.jpg --model_name_or_path {saved}")
        say(f"  mmft-hf evaluate --model_name_or_path {saved} --dataset_name YOUR_DATA")

    def pushing(self, result: FinetuneResult, repo_id: str) -> None:
        say(f"\nPushing {result.output_dir} to {repo_id}")
        if note := keys_note(Path(result.output_dir)):
            say(note)

    def pushed(self, result: FinetuneResult, repo_id: str) -> None:
        say(f"It is at {result.url}. Use it:\n  mmft-hf predict YOUR_PICTURE.jpg --model_name_or_path {repo_id}")


def threshold_row(
    least: float | None, several: bool | None, thresholds: Sequence[float] | None = None
) -> dict[str, str]:
    """What `reject_below`, or the thresholds of the classes, do, for a table. `several`: a picture may have several labels."""
    if thresholds is not None:
        low, high = percent(min(thresholds)), percent(max(thresholds))
        return {"decision": f"a class holds from a score of its own on, {low} to {high}"}
    if least is None:
        return {}
    if several:
        return {"decision": f"a class holds from a score of {percent(least)} on"}
    return {"unknown": f"the answer to a picture whose best class has less than {percent(least)}"}


def unknown_rows(name: str, found: dict) -> dict[str, str]:
    """What the pictures of unknown classes were answered, for a table."""
    images = f"{name}, {found['examples']:,} images" + (
        f" ({found['skipped']} cannot be read)" if found["skipped"] else ""
    )
    answered = "no threshold, so each gets a class: type --reject_below"
    if (share := found["answered_unknown"]) is not None:
        ends = found["answered_unknown_ci_low"], found["answered_unknown_ci_high"]
        answered = f"{percent(share, ends)} answered unknown"

    def area(name: str) -> str:
        value, low, high = (found[f"auroc_{name}{end}"] for end in ("", "_ci_low", "_ci_high"))
        return f"{value:.2f} ({low:.2f} to {high:.2f})"

    apart = f"AUROC {area('logit')} by the largest logit, {area('probability')} by the probability; 0.5 is chance"
    return {"unknown classes": f"{images}: {answered}", "told from test": apart}


def beside_zero_shot(value: float, untuned: float, interval: tuple[float, float] | None = None) -> str:
    """`58.5 %, zero-shot 12.5 %   +46.0 points`, with a 95 % interval of the value if there is one."""
    return f"{percent(value, interval)}, zero-shot {percent(untuned)}   {100 * (value - untuned):+.1f} points"


def several_labels_rows(metrics: dict) -> dict[str, str]:
    """The results on the test images where a picture may have several labels, beside those of the untuned model."""
    intervals = {"accuracy": (metrics["test_accuracy_ci_low"], metrics["test_accuracy_ci_high"])}
    return {
        name: beside_zero_shot(metrics[f"test_{key}"], metrics[f"zero_shot_test_{key}"], intervals.get(key))
        for key, name in SEVERAL_LABELS.items()
    }


def _training(plan: FinetunePlan) -> dict[str, str]:
    """What will be trained, and how."""
    model_args, config = plan.model_args, plan.config
    w = config.supcon_weight
    loss = f"{w:g} SupCon + {1 - w:g} CLIP"
    if config.supcon_weight_end is not None:
        loss = f"w SupCon + (1 - w) CLIP with w from {w:g} to {config.supcon_weight_end:g}"
    rate = "to be found" if config.tune else f"{config.learning_rate:g}"
    trunk = plan.text_trunk
    if trunk and config.head_learning_rate:
        rate += f" (adaptor {config.head_learning_rate:g})"
    elif trunk:
        rate += " (adaptor 10 times that)" if config.tune else f" (adaptor {10 * config.learning_rate:g})"
    rows = {"loss": f"{loss}, learning rate {rate}, seed {config.seed}"}
    if trunk:
        from ..model.adapted_processor import parameters_shown

        rows["texts"] = (
            f"vectors of {trunk['name']} ({parameters_shown(trunk['parameters'])}), computed once, in place of the text tower"
        )
    parts = {"vision": "vision tower", "text": "adaptor" if trunk else "text tower"}
    rows["trained"] = ", ".join(
        f"{parts[tower]} {getattr(model_args, f'{tower}_tower')} ({trained:,} of {total:,} parameters"
        + (f", {layers} layers)" if layers else ")")
        for tower, (trained, total, layers) in plan.parameters.items()
    )
    epochs = config.num_train_epochs
    length = many(config.max_steps, "step") if config.max_steps > 0 else f"{epochs:g} epoch{'s' * (epochs != 1)}"
    where = f"on each of {config.world_size} processes" if config.world_size > 1 else f"on {config.device}"
    rows["training"] = f"{length}, batches of {config.per_device_train_batch_size} {where}"
    if config.class_balance:
        rows["training"] += ", each class equally often"
    if config.weight_averaging:
        rows["training"] += f", weights averaged with decay {config.weight_averaging:g}"
    if config.tune:
        from ..train.tuning import tuning_line

        rows["tuning"] = tuning_line(config, len(plan.splits.train))
    rows["memory"] = memory_line(plan.memory, config)
    return rows


def _others(metrics: dict) -> str:
    """What the other candidates had on validation: the heads on the chosen weights, and the chosen head on other weights."""
    name, alpha, found = metrics["head"], metrics.get("head_alpha"), metrics.get("head_candidates", ())
    metric = metrics.get("head_metric", "loss")
    key = f"validation_{metric}"
    parts = []
    for c in found:
        if (c["head"] == name) != (c["alpha"] == alpha) or c["head"] == "zero-shot" != name:
            where = f" at {c['alpha']:g}" if c["alpha"] != alpha else ""
            parts.append((c[key], f"{c['head']}{where} {shown(metric, c[key])}"))
    own = [c[key] for c in found if (c["head"], c["alpha"]) == (name, alpha)]
    best_first = sorted(parts, reverse=metric != "loss")
    what = f"validation {metric.replace('_', ' ')}"
    return f"{what} {shown(metric, own[0])}; {', '.join(text for _, text in best_first)}" if own and parts else ""


def _captions(config: MMFTConfig, splits) -> str:
    if not splits.has_captions:
        return f'none: class template "{config.class_template}" alone'
    per_image = splits.captions_per_image()
    text = f'{per_image.mean():.1f} per training image, after "{config.class_template}"'
    if without := int((per_image == 0).sum()):
        text += f"; {without} images have none and use that alone"
    if config.long_captions == "windows":
        text += "; long ones are read in parts"
    if config.long_captions == "stretch":
        text += "; the text tower is stretched for long ones"
    if config.sample_weight:
        text += f"; they count by {config.sample_weight}"
    if config.text_mix:
        text += f"; sources {', '.join(config.text_mix)}, otherwise all captions"
    if config.caption_dropout:
        text += f"; left out with probability {config.caption_dropout:g}"
    return text


def memory_line(estimate: MemoryEstimate, config: MMFTConfig) -> str:
    """What a training step will take, and what to type if that is more than there is."""
    from ..model.memory import available_memory

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
        line += f"\n{'':12}More than the {_gigabytes(available)} available. " + (
            f"Type --loss_chunk_size {fits}: the same loss, a third slower."
            if fits
            else "Type --vision_tower lora --text_tower lora, or take a smaller model."
        )
    return line


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 95e6 else f"{size / 1e6:.0f} MB"
