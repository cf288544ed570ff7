"""Another head for a finished run, without training again."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from transformers import TrainerState

from ..core.arguments import DataArguments, ModelArguments
from ..core.errors import UserError
from ..core.files import RESULTS_FILE, RUN_FILE, STATE_FILE
from ..core.reading import read_json
from ..core.records import CardRecord, RunRecord, RunResults, check_metrics
from ..data.splits import load_splits
from ..model.weights import Weights
from ..predict.classifier import ImageClassifier
from ..predict.evaluation import classify
from ..predict.heads import ClassPrototypes
from .choice import calibrated, check_adjustment, choose_classifier, weights_at, with_threshold
from .config import MMFTConfig
from .label_settings import check_several_settings, check_single_settings
from .run_folder import RunFolder
from .selection import metric_name
from .workflow import IN_MEMORY

# What heads, and the record of the choice, depend on.
SETTINGS = (
    "class_template long_captions prototypes template_weight on_bad_image seed load_best_model_at_end metric_for_best_model"
).split()
AGAIN = "Copy the file again, or run mmft-hf finetune again."


@dataclass
class Refitted:
    """What `refit` wrote.

    Args:
        output_dir: folder of the classifier.
        metrics: the content of its `all_results.json`.
        before: that of the run.
        no_threshold: why there is no threshold, if `reject_for_accuracy` asked for one.
    """

    output_dir: Path
    metrics: dict
    before: dict
    no_threshold: str = ""


def refit(
    folder: str | Path, output_dir: str | Path, head: str = "auto", dataset_name: str | None = None, **settings
) -> Refitted:
    """Fits another head to the weights that a run kept, and writes a classifier with its results and card.

    Validation calibrates it and, with `auto`, chooses the head. The test split is read again: to choose among heads by what it
    says would make the choice look better than it is.

    Args:
        folder: of a finished run.
        output_dir: a new folder.
        head: as in `--head`.
        dataset_name: where the data of the run are now. Default: where they were.
        settings: of `MMFTConfig`, e.g. `reject_for_accuracy`.

    Raises:
        UserError: the folder holds no finished run; the data are not those of the run; the head does not fit them; the output
            folder is in use.
    """
    folder, output_dir = Path(folder), Path(output_dir)
    try:
        if not read_json(folder / RUN_FILE, RunRecord, AGAIN)["completed"]:
            raise UserError(
                f"{str(folder)!r}: expected the folder of a finished run, found an interrupted one. Finish it first: type its "
                "command with --resume_from_checkpoint true."
            )
        record = read_json(folder / RUN_FILE, CardRecord, AGAIN)
        before = read_json(folder / RESULTS_FILE, RunResults, AGAIN)
        check_metrics(before, str(folder / RESULTS_FILE), AGAIN)
    except FileNotFoundError as error:
        raise UserError(
            f"{str(folder)!r}: expected the folder of a finished run, with {RUN_FILE} and {RESULTS_FILE}, found no "
            f"{Path(error.filename).name}. Type the --output_dir of mmft-hf finetune."
        ) from error
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(
            f"--output_dir {output_dir}: expected a new or empty folder, found one in use. Type another --output_dir."
        )
    identity = record["identity"]
    data = {**record["data"], **({"dataset_name": dataset_name} if dataset_name else {})}
    data_args = DataArguments(**{key: value for key, value in data.items() if key in _names(DataArguments)})
    if data_args.dataset_name == IN_MEMORY:
        raise UserError(f"{folder}: its data were in memory. Type --dataset_name, a folder or Hub id that holds them.")
    splits = load_splits(data_args)
    several = splits.several_labels
    if splits.fingerprint() != identity["dataset_fingerprint"]:
        raise UserError(
            f"--dataset_name {data_args.dataset_name}: expected the data of the run, with the fingerprint "
            f"{identity['dataset_fingerprint']}, found {splits.fingerprint()}: pictures, labels or captions were changed since. "
            "Run mmft-hf finetune on them."
        )
    # No setting of the training: its precision, say, may be none that this machine knows.
    known = {key: value for key, value in {**identity, **identity["other_settings"]}.items() if key in SETTINGS}
    metric = metric_name(known.get("metric_for_best_model"))
    if f"zero_shot_test_{metric}" not in before:  # version 0.1 did not measure it on the test split
        known["metric_for_best_model"], metric = None, "accuracy"
    config = MMFTConfig(**known | {"output_dir": str(output_dir), "head": head, "report_to": "none"} | settings)
    check_adjustment(config)
    if several:
        check_several_settings(config)
    else:
        check_single_settings(config, splits.class_names)
    towers = {key: identity[key] for key in ("vision_tower", "text_tower")} | (identity["lora"] or {})
    model_args = ModelArguments(identity["base_model"], identity["base_model_revision"], **towers)
    run = RunFolder(str(output_dir), model_args, data_args, config, splits)
    run.identity = identity  # the training was that of the run
    found = ImageClassifier.from_pretrained(folder)
    found.model.to(config.device)
    template = ClassPrototypes.from_templates(found.model, found.processor, splits.class_names, config.class_template)
    template = replace(template, several_labels=several)
    kept = choose_classifier(ImageClassifier(found.model, found.processor, template), None, splits, config)
    chosen = kept.classifier

    def score(dataset, name):
        how = (config.per_device_eval_batch_size, config.on_bad_image, config.dataloader_num_workers)
        return classify(chosen, dataset, *how, name=name)

    validated = score(splits.validation, "validation")
    if config.calibrate:
        chosen.head = calibrated(chosen.head, validated, kept)
    chosen.head, no_threshold = with_threshold(chosen.head, config, validated, kept)
    validated.decision = chosen.head.decision
    run.splits.notes = [*record["notes"], *([no_threshold] if no_threshold else [])]
    predictions = score(splits.test, "test")
    validation = validated.report()
    zero_shot = {
        key.removeprefix("zero_shot_test_"): v for key, v in before.items() if key.startswith("zero_shot_test_")
    }
    state = TrainerState.load_from_json(str(folder / STATE_FILE))
    of_head = ("thresholds", "unknown_split")  # what the other head may lack
    metrics = {key: value for key, value in before.items() if key not in of_head} | run.results(
        predictions,
        zero_shot,
        {f"validation_{name}": validation[name] for name in ("accuracy", metric)},
        {},
        state,
        False,
        kept,
        chosen.head,
    )
    # There is one set of weights, that of the run.
    alpha = before.get("head_alpha", 0.0 if before["zero_shot_won"] else 1.0)
    metrics |= {"best_epoch": before["best_epoch"], "head_alpha": alpha, "refitted": True}
    metrics["head_candidates"] = [found | {"alpha": alpha} for found in metrics["head_candidates"]]
    if kept.choice.chosen.name == head:  # nothing was chosen
        metrics["head_reason"] = "the head that was typed"
    weights = weights_at(before["head_alpha"]) if "head_alpha" in before else before["selection"]
    metrics["selection"] = (
        f"the weights of {folder.name} ({weights}), {kept.describe(weights=False)}; {metrics['head_reason']}"
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    run.claim(None)
    base = Weights(Path(), **record.get("base_model_weights", {}))
    run.save(chosen, predictions, metrics, state, base, kept.prototypes.source)
    return Refitted(output_dir, metrics, before, no_threshold)


def _names(kind: type) -> set[str]:
    return {field.name for field in fields(kind) if field.init}
