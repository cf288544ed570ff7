"""Measures a saved classifier on a labelled split, together with the zero-shot baseline."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.arguments import ALLOW_PICKLE, DataArguments, Range, check_settings, setting
from ..core.console import percent, say, some, table
from ..core.errors import UserError
from ..core.files import RUN_FILE, keeping, write_csv, write_json
from ..core.reading import parse_json
from ..core.records import RunRecord
from ..core.repositories import read_text_file

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class EvaluateArguments:
    """Which classifier is evaluated, and where its results go."""

    model_name_or_path: str = setting("outputs/mmft", "Output folder of finetune, or its Hub repository.")
    model_revision: str | None = setting(None, "Branch, tag or commit of a Hub model.")
    allow_pickle: bool = setting(False, ALLOW_PICKLE)
    output_dir: str | None = setting(
        None,
        "Folder for report.json, per_class.csv and, with one label per picture, confusion_matrix.csv. Default: none.",
    )
    per_device_eval_batch_size: int = setting(256, "Images per batch.", range=Range(1))
    dataloader_num_workers: int = setting(0, "Processes that read images.", range=Range(0, 1024))
    on_bad_image: str = setting("fail", "fail: stop at an unreadable image; skip: count it.", choices=("fail", "skip"))
    reject_below: float | None = setting(
        None,
        "Count pictures as unanswered whose best class has a probability below this. Default: what the classifier was saved "
        "with. With several labels per picture: a class holds from this score on.",
        range=Range(0, 1),
    )


ARGUMENTS = (DataArguments, EvaluateArguments)


def run(data_args: DataArguments, args: EvaluateArguments) -> None:
    """Prints the accuracy, its interval, the zero-shot baseline and a table per class."""
    from ..data.identical import find_identical
    from ..data.labels import refuse_without_classes
    from ..data.strangers import unknown_pictures
    from ..data.texts import DEFAULT_TEMPLATE
    from ..model.loading import load_model
    from ..model.opening import default_device
    from ..predict.classifier import ImageClassifier
    from ..predict.evaluation import classify
    from ..predict.heads import ClassPrototypes
    from ..predict.metrics import class_sizes, uneven_note
    from .finetune import SEVERAL_LABELS, threshold_row, unknown_rows

    check_settings(args)
    if args.output_dir:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    source = (args.model_name_or_path, args.model_revision, args.allow_pickle)
    classifier = ImageClassifier.from_pretrained(*source).to(default_device())
    if args.reject_below is not None:
        classifier.head = classifier.head.rejecting(args.reject_below)
    names, several = classifier.class_names, classifier.head.several_labels
    record = _record(args.model_name_or_path, args.model_revision)
    identity = record.get("identity", {})
    if data_args.label_separator is None:  # labels are written as for the training
        data_args.label_separator = record.get("data", {}).get("label_separator")
    dataset, train, uncompared = _test_split(data_args, names, record)
    refuse_without_classes(dataset, data_args.test_split or "test")
    strangers, left_out = None, []
    if data_args.unknown_split:
        if several:
            raise UserError(
                "--unknown_split: expected a classifier with one class for each picture, found one with several labels, which answers "
                "with an empty list where no class holds. Leave it out."
            )
        strangers, left_out = unknown_pictures(data_args, data_args.unknown_split, names)
    say(
        f"Evaluating {args.model_name_or_path} on {data_args.dataset_name}: {len(dataset):,} images, {len(names)} classes, "
        f"{classifier.head.about}\n"
    )

    def score(classifier, rows=dataset, name="test"):
        workers = args.dataloader_num_workers
        return classify(classifier, rows, args.per_device_eval_batch_size, args.on_bad_image, workers, name)

    predictions = score(classifier)
    result, zero_shot, missing = predictions.report() | predictions.certainty(), None, None
    if base := identity.get("base_model"):
        try:
            # The commit of the training, if the main branch has moved on.
            commit = record.get("base_model_weights", {}).get("commit")
            model, processor = load_model(base, identity.get("base_model_revision") or commit, args.allow_pickle)
            model.to(default_device())
            head = ClassPrototypes.from_templates(
                model, processor, names, identity.get("class_template", DEFAULT_TEMPLATE)
            )
            head = replace(head, several_labels=several)
            zero_shot = score(ImageClassifier(model, processor, head)).report()
            if several:  # only what needs no decision, which the untuned model lacks
                zero_shot = {key: zero_shot[key] for key in ("mean_average_precision", "examples", "skipped")}
        except UserError as error:
            missing = error
    else:
        missing = f"{args.model_name_or_path} has no {RUN_FILE} that names it."

    def accuracy(result: dict) -> str:
        return percent(result["accuracy"], (result["accuracy_ci_low"], result["accuracy_ci_high"]))

    note = "" if several else uneven_note(*class_sizes(row["images"] for row in result["per_class"]))
    if several:
        rows = {"mAP": f"{percent(result['mean_average_precision'])}   on {result['examples']:,} images"}
        if zero_shot:
            rows["zero-shot"] = f"{percent(zero_shot['mean_average_precision'])}   {base}, untuned"
        rows |= {name: percent(result[key]) for key, name in SEVERAL_LABELS.items() if key.endswith("f1")}
        rows["exact match"] = accuracy(result)
    else:
        mean = percent(result["mean_per_class_accuracy"])
        if note and zero_shot:
            mean += f", zero-shot {percent(zero_shot['mean_per_class_accuracy'])}"
        rows = {"mean per class": mean} if note else {}
        rows["accuracy"] = f"{accuracy(result)}   on {result['examples']:,} images"
        if zero_shot:
            rows["zero-shot"] = f"{accuracy(zero_shot)}   {base}, untuned"
        if "top5_accuracy" in result:
            rows["top-5"] = percent(result["top5_accuracy"])
        rows.setdefault("mean per class", mean)
        rows["calibration"] = (
            f"error {result['calibration_error']:.3f}; {result['calibration_error_null']:.3f} would be perfect on so many images"
        )
    least = classifier.head.reject_below
    if several:
        own = classifier.head.thresholds
        rows |= threshold_row(least, several, None if own is None else own.tolist())
    elif least is not None:
        result |= predictions.answered(least)
        right = (
            ""
            if result["answered_accuracy"] is None
            else f", of which {percent(result['answered_accuracy'])} are right"
        )
        rows["answered"] = f"{percent(result['answered'])} with a probability of {least:.3g} or more{right}"
    if strangers is not None:
        others = score(classifier, strangers, data_args.unknown_split)
        if not others.known.any():
            raise UserError(
                f"--unknown_split {data_args.unknown_split}: expected pictures that can be read, found none."
            )
        result["unknown_split"] = found = predictions.unknown(others, least)
        rows |= unknown_rows(data_args.unknown_split, found)
    if result["skipped"]:
        rows["skipped"] = f"{result['skipped']} images that cannot be read"
    table(rows)
    if note:
        say(f"\n  {note}")
    if missing:
        say(f"\n  Note: no zero-shot baseline, because the untuned model is missing. {missing}")
    if uncompared:
        say(f"\n  Note: {uncompared}")
    parts = {"train": train} if train is not None and train is not dataset else {}
    parts |= {data_args.test_split or "test": dataset}
    if strangers is not None:
        parts.setdefault(data_args.unknown_split, strangers.select_columns("image"))
    for note in left_out + find_identical(parts).notes():
        say(f"\n  Note: {note}")
    say("\nPer class, weakest first")
    if several:
        _print_several(result["per_class"])
    else:
        _print_classes(result)
    if untested := [row["label"] for row in result["per_class"] if not row["images"]]:
        say(f"  Without a test image, and so without a figure: {some(untested)}")

    if args.output_dir:
        folder = Path(args.output_dir)
        written = ["report.json", "per_class.csv"] + ["confusion_matrix.csv"] * (not several)
        with keeping(lambda: f"The results are printed above; {folder} may lack some."):
            split = data_args.test_split or "test"
            write_json(folder / "report.json", {**result, "split": split, "zero_shot": zero_shot})
            header = ["class", *list(result["per_class"][0])[1:]]
            write_csv(folder / "per_class.csv", [header, *map(dict.values, result["per_class"])])
            if not several:
                matrix = [[name, *row] for name, row in zip(names, result["confusion_matrix"], strict=True)]
                write_csv(folder / "confusion_matrix.csv", [["true class", *names], *matrix])
        say(f"\nWritten to {folder}: {', '.join(written)}")


def _print_several(classes: list[dict]) -> None:
    """A line per class that occurs, of a classifier with several labels per picture."""
    width = max(len(row["label"]) for row in classes)
    for row in sorted((row for row in classes if row["images"]), key=lambda row: row["average_precision"]):
        found = f"precision {percent(row['precision'])}" if row["precision"] is not None else "never predicted"
        say(
            f"  {row['label']:<{width}}  {row['images']:>5} images  average precision {percent(row['average_precision']):>8}  "
            f"{found}, recall {percent(row['recall'])}"
        )


def _print_classes(result: dict) -> None:
    """A line per class that occurs, with the class that it is most often taken for."""
    import numpy as np

    names = [row["label"] for row in result["per_class"]]
    wrong = np.array(result["confusion_matrix"])
    np.fill_diagonal(wrong, 0)
    tested = [(row, counts) for row, counts in zip(result["per_class"], wrong, strict=True) if row["images"]]
    for row, counts in sorted(tested, key=lambda pair: pair[0]["accuracy"]):
        taken = f"most often taken for {names[counts.argmax()]} ({counts.max()})" if counts.any() else ""
        label = f"{row['label']:<{max(map(len, names))}}"
        say(f"  {label}  {row['images']:>5} images  {percent(row['accuracy']):>8}  {taken}".rstrip())


def _test_split(data_args: DataArguments, class_names: list[str], record: dict) -> tuple[Dataset, Dataset | None, str]:
    """The test split, or the images that the training held out for it; and the training split beside it, if there is one.

    Returns:
        Also a sentence that says why the training split cannot be compared; empty if it can, or if there is none.
    """
    from ..data.sources import open_source
    from ..data.splits import load_splits, load_test_split, load_train_split

    if (dataset := load_test_split(data_args, class_names)) is not None:
        try:
            return dataset, load_train_split(data_args, class_names), ""
        except UserError as error:
            return dataset, None, f"Identical pictures in the training split were not looked for. {error}"
    # Held out as in the training, independently of the other settings of this call.
    again = {**record.get("data", {}), "dataset_name": data_args.dataset_name}
    again["image_root"] = data_args.image_root or again.get("image_root")  # the images may have moved
    try:
        splits, why = load_splits(DataArguments(**{k: v for k, v in again.items() if k in vars(data_args)})), ""
    except UserError as error:
        splits, why = None, f" As the data of the training it cannot be read: {error}"
    if splits is None or splits.fingerprint() != record.get("identity", {}).get("dataset_fingerprint"):
        found = list(open_source(data_args).splits)
        raise UserError(
            f"dataset {data_args.dataset_name!r}: expected a split named test, or the data that the model was trained on, "
            f"with its held-out test images; found neither, only {some(found, 5)}. Type --test_split "
            f"{shlex.quote(found[0]) if len(found) == 1 else 'NAME'}.{why}"
        )
    return splits.test, splits.train, ""


def _record(name: str, revision: str | None) -> dict:
    """The `mmft.json` of a folder or Hub repository; empty if there is none."""
    text = read_text_file(name, RUN_FILE, revision, "model")
    if text is None:
        return {}
    remedy = "Restore the file, or remove it to evaluate without the zero-shot baseline."
    return parse_json(text, f"{name}, {RUN_FILE}", RunRecord, remedy)
