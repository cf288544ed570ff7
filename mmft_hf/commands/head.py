"""Fits another head to the weights of a finished run, without training again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from ..core.arguments import Range, check_settings, setting
from ..core.console import percent, say, table
from ..core.errors import UserError
from ..train.config import MMFTConfig
from .finetune import SEVERAL_LABELS, threshold_row

SHARED = MMFTConfig.__dataclass_fields__  # whose help texts hold here, too


@dataclass
class HeadArguments:
    """Which head is fitted, and where the classifier goes."""

    head: str = setting("auto", SHARED["head"].metadata["help"], choices=SHARED["head"].metadata["choices"])
    output_dir: str | None = setting(
        None, "A new folder for the classifier. Default: that of the run, then the head's name."
    )
    dataset_name: str | None = setting(None, "Where the data of the run are now. Default: where they were.")
    logit_adjustment: float = setting(
        0.0, SHARED["logit_adjustment"].metadata["help"], range=SHARED["logit_adjustment"].metadata["range"]
    )
    calibrate: bool = setting(True, SHARED["calibrate"].metadata["help"])
    reject_below: float | None = setting(None, SHARED["reject_below"].metadata["help"], range=Range(0, 1))
    reject_for_accuracy: float | None = setting(
        None, SHARED["reject_for_accuracy"].metadata["help"], range=SHARED["reject_for_accuracy"].metadata["range"]
    )
    threshold: str = setting("half", SHARED["threshold"].metadata["help"], choices=("half", "f1"))


ARGUMENTS = (HeadArguments,)
POSITIONAL = ("folder", "the output folder of mmft-hf finetune")


def run(args: HeadArguments, folders: list[str]) -> None:
    """Fits the head, and prints its results beside those of the run."""
    from ..predict.metrics import uneven_note
    from ..train.refit import refit

    check_settings(args)
    if len(folders) != 1:
        raise UserError(
            f"head: expected one folder of a finished run, found {len(folders)}. Type mmft-hf head outputs/mmft."
        )
    folder = folders[0].rstrip("/")
    names = ("logit_adjustment", "calibrate", "reject_below", "reject_for_accuracy", "threshold")
    settings = {name: getattr(args, name) for name in names}
    output = args.output_dir or f"{folder}-{args.head}"
    found = refit(folder, output, args.head, args.dataset_name, **settings)

    several, images = found.metrics.get("several_labels"), found.metrics["test_images"]
    sizes = (found.metrics[f"test_images_of_{which}_class"] for which in ("smallest", "largest"))
    note = "" if several else uneven_note(*sizes)

    def line(metrics: dict) -> str:
        if several:
            figures = [f"{name} {percent(metrics[f'test_{key}'])}" for key, name in SEVERAL_LABELS.items()]
            validation = percent(metrics["validation_mean_average_precision"])
            return f"{', '.join(figures)}, mAP on validation {validation}"
        interval = (metrics["test_accuracy_ci_low"], metrics["test_accuracy_ci_high"])
        mean = f"mean per class {percent(metrics['test_mean_per_class_accuracy'])}, accuracy " if note else ""
        return f"{mean}{percent(metrics['test_accuracy'], interval)}, on validation {percent(metrics['validation_accuracy'])}"

    heading = f"Results on {images} test images" if several else f"Test accuracy on {images} images, with 95 % interval"
    say(f"\n{heading}\n")
    rows = {
        "before": f"{line(found.before)}, head {found.before.get('head', 'prototypes')}",
        "now": f"{line(found.metrics)}, head {found.metrics['head']}",
        "selection": found.metrics["selection"],
    }
    rows |= threshold_row(found.metrics["reject_below"], several, found.metrics.get("thresholds"))
    table(rows)
    if note:
        say(f"\n  {note}")
    if found.no_threshold:
        say(f"\n  {found.no_threshold}")
    say("\n  Choose among heads by validation: the test images cannot choose and judge.")
    say(f"\nEverything is in {found.output_dir}. Next:")
    say(f"  mmft-hf predict YOUR_PICTURE.jpg --model_name_or_path {shlex.quote(str(found.output_dir))}")
