"""Measures a saved classifier on a labelled split, with the zero-shot baseline beside it."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from ..core.arguments import DataArguments, setting
from ..core.console import percent, say, table
from ..core.errors import UserError
from ..core.files import RUN_FILE


@dataclass
class EvaluateArguments:
    """Which classifier, and where the figures go."""

    model_name_or_path: str = setting("outputs/mmft", "Folder that finetune left, or its Hub repository.")
    model_revision: str | None = setting(None, "Branch, tag or commit of a Hub model.")
    output_dir: str | None = setting(
        None, "Folder for report.json, per_class.csv and confusion_matrix.csv. Default: none."
    )
    per_device_eval_batch_size: int = setting(256, "Images per batch.")
    dataloader_num_workers: int = setting(0, "Processes that read images.")
    on_bad_image: str = setting("fail", "fail: stop at an unreadable image; skip: count it.", choices=("fail", "skip"))


ARGUMENTS = (DataArguments, EvaluateArguments)


def run(data_args: DataArguments, args: EvaluateArguments) -> None:
    """Prints accuracy, its interval, the baseline and a table per class."""
    from ..data.splits import load_splits, load_test_split
    from ..model.loading import default_device, load_model
    from ..predict.classifier import ImageClassifier
    from ..predict.evaluation import classify
    from ..predict.heads import ClassPrototypes

    for name, least in (("per_device_eval_batch_size", 1), ("dataloader_num_workers", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}: expected {least} or more, found {getattr(args, name)}.")
    if args.output_dir:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    classifier = ImageClassifier.from_pretrained(args.model_name_or_path, args.model_revision).to(default_device())
    names = classifier.class_names

    record = _record(args.model_name_or_path, args.model_revision)
    identity = record.get("identity", {})
    dataset = load_test_split(data_args, names)
    if dataset is None:
        # As the training cut it, whatever the settings of this call are.
        again = {**record.get("data", {}), "dataset_name": data_args.dataset_name}
        again["image_root"] = data_args.image_root or again.get("image_root")  # the images may lie elsewhere
        splits = load_splits(DataArguments(**{k: v for k, v in again.items() if k in vars(data_args)}))
        if splits.fingerprint() != identity.get("dataset_fingerprint"):
            raise UserError(
                f"data set {data_args.dataset_name!r}: there is no split named test, and these are not the data that the "
                "model was trained on, whose held-out test images could be found again. Type --test_split NAME."
            )
        dataset = splits.test

    say(
        f"Evaluating {args.model_name_or_path} on {data_args.dataset_name}: {len(dataset):,} images, {len(names)} classes, "
        f"{classifier.head.about}\n"
    )

    def score(classifier):
        workers = args.dataloader_num_workers
        return classify(classifier, dataset, args.per_device_eval_batch_size, args.on_bad_image, workers).report()

    result = score(classifier)
    base = identity.get("base_model")
    zero_shot, missing = None, None
    if base:
        try:
            untuned, _ = load_model(base, identity.get("base_model_revision"))
        except UserError as error:
            missing = error
        else:
            processor = classifier.processor
            head = ClassPrototypes.from_templates(
                untuned.to(default_device()), processor, names, identity["class_template"]
            )
            zero_shot = score(ImageClassifier(untuned, processor, head))

    def accuracy(result: dict) -> str:
        return percent(result["accuracy"], (result["accuracy_ci_low"], result["accuracy_ci_high"]))

    rows = {"accuracy": f"{accuracy(result)}   on {result['examples']:,} images"}
    if zero_shot:
        rows["zero-shot"] = f"{accuracy(zero_shot)}   {base}, untuned"
    if "top5_accuracy" in result:
        rows["top-5"] = percent(result["top5_accuracy"])
    rows["mean per class"] = percent(result["mean_per_class_accuracy"])
    if result["skipped"]:
        rows["skipped"] = f"{result['skipped']} images that cannot be read"
    table(rows)
    if missing:
        say(f"\n  Note: no zero-shot baseline, since the untuned model is gone. {missing}")
    say("\nPer class, weakest first")
    width = max(map(len, names))
    present = [c for c, row in enumerate(result["per_class"]) if row["images"]]
    for c in sorted(present, key=lambda c: result["per_class"][c]["accuracy"]):
        row, confusions = result["per_class"][c], list(result["confusion_matrix"][c])
        confusions[c] = 0
        most = max(range(len(names)), key=confusions.__getitem__)
        taken = f"most often taken for {names[most]} ({confusions[most]})" if confusions[most] else ""
        say(f"  {row['label']:<{width}}  {row['images']:>5} images  {percent(row['accuracy']):>8}  {taken}".rstrip())

    if args.output_dir:
        folder = Path(args.output_dir)
        (folder / "report.json").write_text(
            json.dumps({**result, "zero_shot": zero_shot}, indent=2) + "\n", encoding="utf-8"
        )
        _write_csv(
            folder / "per_class.csv", ["class", "images", "accuracy"], [list(r.values()) for r in result["per_class"]]
        )
        matrix = [[name, *row] for name, row in zip(names, result["confusion_matrix"], strict=True)]
        _write_csv(folder / "confusion_matrix.csv", ["true class", *names], matrix)
        say(f"\nWritten to {folder}: report.json, per_class.csv, confusion_matrix.csv")


def _record(name: str, revision: str | None) -> dict:
    """The `mmft.json` of a folder or Hub repository; empty where there is none."""
    path = Path(name) / RUN_FILE
    if not Path(name).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(name, RUN_FILE, revision=revision))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return {}
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["identity"]["base_model"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected the record that finetune leaves, found {error!r}. Restore it, or remove it to go "
            "without the zero-shot baseline."
        ) from error
    return record


def _write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
