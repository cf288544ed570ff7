"""The main job: `finetune` trains on images and captions, selects on validation, tests once and saves a classifier.

`mmft-hf finetune` reads its settings, calls `run_finetuning` and prints through a `Reporter`.
"""

from __future__ import annotations

import copy
import math
import shlex
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import Pipeline, TrainerState, pipeline, set_seed

from ..core.arguments import DataArguments, ModelArguments
from ..core.console import is_main
from ..core.errors import PartialResult, UserError, nearest
from ..core.files import RESULTS_FILE, RUN_FILE, keeping
from ..core.launch import alone_in, together
from ..core.markdown import public_name
from ..core.reading import read_json
from ..core.records import RunResults
from ..core.seals import note_changed_files
from ..data.identical import find_identical
from ..data.labels import labels_of, refuse_without_classes
from ..data.splits import Splits, load_splits
from ..data.strangers import unknown_pictures
from ..data.texts import class_prompt
from ..data.views import text_rows
from ..hub.client import check_access, check_name, make_repo
from ..hub.publish import push_model
from ..model.adapted_processor import TextTrunk
from ..model.adapted_start import with_text_trunk
from ..model.collator import same_prompts
from ..model.features import Encoding
from ..model.loading import load_model
from ..model.long_captions import share_cut, stretched
from ..model.memory import MemoryEstimate, estimate_memory
from ..model.towers import Adapter, merge, parameter_counts, set_towers
from ..predict.classifier import ImageClassifier
from ..predict.evaluation import classify
from ..predict.fitting.auto import ZERO_SHOT
from ..predict.fitting.data import templates_like
from ..predict.heads import ClassPrototypes
from ..predict.pipeline import TASK
from .checkpoints import last_complete_checkpoint
from .choice import calibrated, check_adjustment, choose_classifier, with_threshold
from .config import MMFTConfig
from .label_settings import check_several_settings, check_single_settings
from .learnable import check_fittable, check_learnable
from .run_folder import RunFolder
from .selection import by_metric, check_metric, is_better
from .terms import terms_of
from .texts import texts_of
from .trainer import MMFTTrainer
from .tuning import replaced, search

MANY_CUT = 0.05  # share of captions that are cut, from which on a note says so
IN_MEMORY = "in-memory data"  # recorded as the name of a dataset that was given as an object


@dataclass
class FinetunePlan:
    """The model, the data and the settings of a training that is about to start.

    Args:
        model_args, data_args, config: the settings.
        splits: the data.
        parameters: for each tower its trained parameters, all of its parameters and its layers with LoRA.
        zero_shot_accuracy: of the untuned model with the class template, on validation, from 0 to 1; with several labels per
            picture its mean average precision.
        memory: estimate of a training step in one process.
        text_trunk: the name and the number of parameters of the caption encoder of `text_trunk`, if there is one.
    """

    model_args: ModelArguments
    data_args: DataArguments
    config: MMFTConfig
    splits: Splits
    parameters: dict[str, tuple[int, int, int]]
    zero_shot_accuracy: float
    memory: MemoryEstimate
    text_trunk: Mapping | None = None


@dataclass
class FinetuneResult:
    """A finished run.

    Args:
        output_dir: folder of the classifier, its results and its card.
        metrics: the content of `all_results.json`; accuracies go from 0 to 1.
        fallback_classes: classes without captions, which the class template stands for.
        no_threshold: why there is no threshold, if `reject_for_accuracy` asked for one.
        repeated: the folder already held this run, complete, and nothing was trained.
        url: the address of the commit, if the run was pushed to the Hub.
    """

    output_dir: Path
    metrics: dict
    fallback_classes: tuple[str, ...] = ()
    no_threshold: str = ""
    repeated: bool = False
    url: str | None = None

    @property
    def test_accuracy(self) -> float:
        """Accuracy of the classifier on the test split, from 0 to 1; with several labels per picture, the share of pictures with
        exactly the right ones."""
        return self.metrics["test_accuracy"]

    @property
    def zero_shot_test_accuracy(self) -> float:
        """Accuracy of the untuned model with the class template on the test split, from 0 to 1."""
        return self.metrics["zero_shot_test_accuracy"]

    @cached_property
    def classifier(self) -> Pipeline:
        """The saved classifier: `result.classifier("cat.jpg")` gives `[{"label", "score"}, …]`, best first."""
        return pipeline(TASK, model=str(self.output_dir))


class Reporter:
    """Receives the events of a run, in the main process. This base class prints nothing."""

    def started(self, plan: FinetunePlan) -> None:
        """Before the training."""

    def finished(self, result: FinetuneResult) -> None:
        """After everything is saved."""

    def pushing(self, result: FinetuneResult, repo_id: str) -> None:
        """Before the upload."""

    def pushed(self, result: FinetuneResult, repo_id: str) -> None:
        """After the upload."""


def finetune(
    dataset: str | Dataset | Mapping[str, Dataset] = "builtin/emoji-mini",
    model: str | Path = "builtin/photo",
    output_dir: str | Path = "outputs/mmft",
    epochs: float | None = None,
    *,
    reporter: Reporter | None = None,
    **settings,
) -> FinetuneResult:
    """Fine-tunes a dual encoder and saves a classifier: all that `mmft-hf finetune` does.

    The untuned model with the class template is a candidate, too. The best epoch is chosen on validation; the test split
    is read once, after that. If a split is missing, part of the training split is held out for it.

    Args:
        dataset: Hub id, folder or file, as for `--dataset_name`; or a `Dataset` or several of them by split name, with the
            columns that `image_column`, `label_column` and `captions_column` name.
        model: Hub id or folder of a dual encoder, `builtin/photo` or `builtin/tiny-clip`.
        output_dir: folder of the results. A folder that holds another run is not overwritten.
        epochs: epochs of training. Default: 50 with an accelerator, 10 on a CPU.
        reporter: receives the events of the run. Default: only the lines of the epochs are printed.
        settings: any setting of `mmft-hf finetune` by its name, e.g. `learning_rate=1e-5`, `shots=16`, `vision_tower="lora"`.

    Returns:
        The accuracies on the test split, the classifier and its folder.

    Raises:
        UserError: an unknown setting, a value outside its range, data or a model that cannot be used.
        PartialResult: the run is finished, but could not be pushed; the disk takes no more; or another process of the run has
            ended.
    """
    given = {"model_name_or_path": str(model), "output_dir": str(output_dir), "num_train_epochs": epochs} | settings
    if isinstance(dataset, (str, Path)):
        in_memory, given = None, {"dataset_name": str(dataset)} | given
    else:
        splits = {"train": dataset} if isinstance(dataset, Dataset) else dataset
        found = list(splits.values()) if isinstance(splits, Mapping) else [splits]
        if not all(isinstance(split, Dataset) for split in found):
            types = ", ".join(sorted({type(split).__name__ for split in found}))
            raise UserError(
                f"dataset: expected a Hub id, a folder, a Dataset or Datasets by split name, found {types}. "
                "Make one with datasets.load_dataset or Dataset.from_dict."
            )
        # Rows that were selected or shuffled are an index into other rows; written out, each row is where it belongs.
        in_memory = DatasetDict({name: split.flatten_indices() for name, split in splits.items()})
        given = {"dataset_name": IN_MEMORY} | given
    kinds = (ModelArguments, DataArguments, MMFTConfig)
    names = [{field.name for field in fields(kind) if field.init} for kind in kinds]
    known = set().union(*names)
    for name in given:
        if name not in known:
            raise UserError(f"finetune: unknown setting {name}.{nearest(name, known)}")
    filled = [kind(**{k: v for k, v in given.items() if k in own}) for kind, own in zip(kinds, names, strict=True)]
    return run_finetuning(*filled, in_memory, reporter)


def run_finetuning(
    model_args: ModelArguments,
    data_args: DataArguments,
    config: MMFTConfig,
    dataset: DatasetDict | None = None,
    reporter: Reporter | None = None,
) -> FinetuneResult:
    """`finetune` with its settings in three dataclasses.

    Args:
        dataset: splits in memory, used instead of `data_args.dataset_name`.
        reporter: receives the events of the run, in the main process.
    """
    reporter = reporter if reporter and is_main() else Reporter()
    output_dir = config.output_dir
    with (
        together(lambda: last_complete_checkpoint(output_dir)),
        alone_in(output_dir),
        ExitStack() as begun,
    ):
        return _run(model_args, data_args, config, dataset, reporter, begun)


def _kept(output_dir: str) -> str:
    """What is left of an interrupted run, in a sentence."""
    checkpoint = last_complete_checkpoint(output_dir)
    return f"The last complete checkpoint is {checkpoint}." if checkpoint else "There is no complete checkpoint yet."


def _run(model_args, data_args, config, dataset, reporter, begun: ExitStack) -> FinetuneResult:
    # -- checks, before anything expensive -----------------------------------------------------------------------------
    if config.push_to_hub:
        name = check_access(config.hub_model_id or Path(config.output_dir).absolute().name, config.hub_token)
        check_name(name, "model", RUN_FILE, config.hub_token)
        config.hub_model_id = name
    splits = load_splits(data_args, dataset)
    several = splits.several_labels
    metric = check_metric(config.metric_for_best_model, splits.class_names, several)
    if several:
        refuse_without_classes(splits.validation, "validation")
        refuse_without_classes(splits.test, "test")
        check_several_settings(config)
        if data_args.unknown_split is not None:
            raise UserError(
                "--unknown_split: expected one class for each picture, found lists of labels: the answer to a picture of none of the "
                "classes is an empty list. Leave it out."
            )
        config.metric_for_best_model, config.greater_is_better = metric, True
    else:
        check_single_settings(config, splits.class_names)
    if model_args.text_trunk and config.long_captions != "cut":
        raise UserError(
            f"--long_captions: expected cut with --text_trunk, whose caption encoder reads whole captions, found {config.long_captions}. "
            "Leave it out."
        )
    strangers = None
    if data_args.unknown_split is not None:
        strangers, left_out = unknown_pictures(data_args, data_args.unknown_split, splits.class_names, dataset)
        splits.notes += left_out
    labels, terms = labels_of(splits.train), terms_of(None, config)
    trains = config.max_steps > 0 or config.num_train_epochs > 0  # else a head alone is fitted
    check_adjustment(config, terms if trains else ())
    if trains:
        check_learnable(labels, terms, config)
    elif not several:
        check_fittable(labels)
    folder = RunFolder(config.output_dir, model_args, data_args, config, splits)
    resume = folder.check(config.overwrite_output_dir, config.resume_from_checkpoint)
    if folder.completed:
        metrics = _results_of(folder.path)
        _check_head(folder.path, metrics, config, data_args.unknown_split)
        result = FinetuneResult(folder.path, metrics, repeated=True)
        reporter.finished(result)
        return _pushed(result, config, reporter)

    if is_main():
        parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
        if strangers is not None:
            parts.setdefault(data_args.unknown_split, strangers.select_columns("image"))
        splits.notes += find_identical(parts).notes()

    # -- the untuned model: baseline, and first candidate --------------------------------------------------------------
    set_seed(config.seed)
    load = partial(load_model, model_args.model_name_or_path, model_args.model_revision, model_args.allow_pickle)
    base, base_processor = load()
    if model_args.text_trunk:
        reader = TextTrunk(model_args.text_trunk, allow_pickle=model_args.allow_pickle)
        start = partial(_with_text_trunk, reader, splits, config)
    else:
        start = stretched if config.long_captions == "stretch" else _as_it_is
    model, processor = start(base.to(config.device), base_processor)
    for names in same_prompts(processor, splits.class_names, config.class_template):
        splits.notes.append(
            f"The text tower reads the same prompt for {' and '.join(shorten(name, 60) for name in names[:3])}"
            f"{' and others' * (len(names) > 3)}: texts of the class alone cannot tell them apart, only captions or "
            "--prototypes images can. Give them other names, or type a shorter --class_template."
        )

    if is_main():
        splits.notes += _cut_note(processor, config, splits)

    # One pass over the images of a split is then enough for all weights of the run.
    trunk = model_args.vision_tower == "head" and config.cache_frozen_features
    score = partial(
        classify,
        batch_size=config.per_device_eval_batch_size,
        on_bad_image=config.on_bad_image,
        workers=config.dataloader_num_workers,
        progress=is_main() and not config.disable_tqdm,
        shard=True,
        # Validation is encoded by the training, too, and test for the untuned model.
        cached=model_args.vision_tower == "frozen" and config.cache_frozen_features,
        trunk=trunk,
    )
    set_towers(model, model_args.vision_tower, model_args.text_tower, **(model_args.lora or {}))
    if trains:
        check_learnable(labels, terms, config, model)
    # By the model's own text tower, also where another one is trained.
    zero_shot = ClassPrototypes.from_templates(
        base, base_processor, splits.class_names, config.class_template, shard=True
    )
    del base
    zero_shot = replace(zero_shot, several_labels=several)
    untuned_scores = score(ImageClassifier(model, processor, zero_shot), splits.validation, name="validation")
    if several:  # there is no decision without
        zero_shot, _ = with_threshold(calibrated(zero_shot, untuned_scores, None), config, untuned_scores, None)
        untuned_scores.decision = zero_shot.decision
    untuned_validation = untuned_scores.report()
    parameters, memory = parameter_counts(model), _memory(model, processor, config, splits)
    plan = FinetunePlan(
        model_args,
        data_args,
        config,
        splits,
        parameters,
        untuned_validation[metric if several else "accuracy"],
        memory,
        model.config.text_trunk if model_args.text_trunk else None,
    )
    reporter.started(plan)

    # -- training and selection ----------------------------------------------------------------------------------------
    if config.push_to_hub and is_main():  # as late as possible, so that an earlier failure leaves no empty repository
        make_repo(config.hub_model_id, "model", config.hub_private_repo, config.hub_revision, config.hub_token)
    folder.claim(resume)
    begun.enter_context(keeping(lambda: _kept(config.output_dir)))  # until here, a run in the folder is as it was
    trainer = compared = adapter = None
    state, train_metrics = TrainerState(epoch=0.0), {}
    if trains:
        if config.tune:
            tuning = search(
                lambda settings: _trainer(copy.deepcopy(model), settings, splits, processor),
                config,
                len(splits.train),
                folder.tuning,
                folder.keep_tuning,
            )
            config = replaced(config, learning_rate=tuning["learning_rate"])
        trainer = _trainer(model, config, splits, processor)
        train_metrics = trainer.train(resume_from_checkpoint=resume).metrics
        state = trainer.state
        tuned = trainer.accelerator.unwrap_model(trainer.model)
        adapter = Adapter.of(tuned)
        if adapter:  # from here on everything is measured and built with the weights that are saved
            merge(tuned)
        compared = ImageClassifier(tuned, processor, trainer.build_prototypes())
        validated = score(compared, splits.validation, name="validation")
        if np.isnan(validated.scores).any():  # possible in a run of one step
            trainer.stop_at("the output of the trained model", math.nan, state.global_step)

    # -- the classifier: which weights, and which head on them ---------------------------------------------------------
    untuned = ImageClassifier(start(load()[0].to(config.device), base_processor)[0], processor, zero_shot)
    kept = None
    if config.head == "prototypes":
        # The zero-shot classifier wins only if no epoch was as good by the metric that compared the epochs.
        before, after = untuned_validation[metric], validated.report()[metric]
        zero_shot_won = config.load_best_model_at_end and is_better(metric, before, after)
        chosen, validated = (untuned, untuned_scores) if zero_shot_won else (compared, validated)
        adapter = None if zero_shot_won else adapter
    else:
        # Whether the best epoch is the untuned model.
        same = trains and config.load_best_model_at_end and state.best_global_step == 0
        kept = choose_classifier(untuned, None if same else compared, splits, config, adapter is not None, trunk)
        if same:
            by = by_metric(metric)
            kept.choice.reason = (
                f"no epoch was better on validation{by} than the untuned model; head: {kept.choice.reason}"
            )
        chosen, zero_shot_won = kept.classifier, kept.choice.chosen.name == ZERO_SHOT
        adapter = None if kept.alpha < 1 else adapter
        validated = score(chosen, splits.validation, name="validation")
    if config.calibrate and not (several and chosen.head is zero_shot):
        chosen = ImageClassifier(chosen.model, processor, calibrated(chosen.head, validated, kept))
    rejecting, no_threshold = with_threshold(chosen.head, config, validated, kept)
    chosen, validated.decision = ImageClassifier(chosen.model, processor, rejecting), rejecting.decision
    splits.notes += [no_threshold] if no_threshold else []
    validation = validated.report()

    # -- the sealed test split, once, for the result and the baseline --------------------------------------------------
    once = config.cache_frozen_features  # for the untuned weights, which may have been chosen
    zero_shot_test = score(untuned, splits.test, name="test", cached=once)
    cached = once and (chosen.model is untuned.model or model_args.vision_tower == "frozen")
    predictions = score(chosen, splits.test, name="test", cached=cached)
    others = None
    if strangers is not None:
        others = score(chosen, strangers, name=data_args.unknown_split)
        if not others.known.any():
            raise UserError(
                f"--unknown_split {data_args.unknown_split}: expected pictures that can be read, found none."
            )

    # -- files ---------------------------------------------------------------------------------------------------------
    validations = {
        **{f"validation_{name}": validation[name] for name in ("accuracy", metric)},
        **{f"zero_shot_validation_{name}": untuned_validation[name] for name in ("accuracy", metric)},
        "validation_skipped_images": untuned_validation["skipped"],
    }
    metrics = folder.results(
        predictions, zero_shot_test.report(), validations, train_metrics, state, zero_shot_won, kept, chosen.head
    )
    if others is not None:
        found = predictions.unknown(others, chosen.head.reject_below)
        metrics["unknown_split"] = {"name": public_name(data_args.unknown_split)} | found
    fallback = (kept.prototypes if kept else chosen.head).fallback_classes
    source = (kept.prototypes if kept else chosen.head).source
    if is_main():
        # The base of an adapter would be the start of this training, which is nowhere to be had.
        kept_adapter = None if start is not _as_it_is else adapter
        folder.save(chosen, predictions, metrics, state, untuned.model.mmft_weights, source, kept_adapter)
    result = FinetuneResult(folder.path, metrics, fallback, no_threshold)
    reporter.finished(result)
    if trainer and config.push_to_hub and is_main():
        trainer._finish_current_push()
    return _pushed(result, config, reporter)


def _as_it_is(model, processor):
    return model, processor


def _with_text_trunk(trunk: TextTrunk, splits: Splits, config: MMFTConfig, model, processor):
    """The model and processor with which a training on vectors of a caption encoder starts."""
    names, template = splits.class_names, config.class_template
    view = texts_of(names, config, processor)
    texts = {text for row in text_rows(splits.train.remove_columns("image")) for text in view.possible_texts(row)}
    texts.update(class_prompt(template, name) for name in names)
    # Heads, and prototypes of several templates, read these.
    several = config.head != "prototypes" or config.prototypes == "templates"
    further = (class_prompt(other, name) for other in templates_like(template) for name in names) if several else ()
    progress = is_main() and not config.disable_tqdm
    how = Encoding(config.per_device_eval_batch_size, shard=True, progress=progress)
    return with_text_trunk(model, processor, trunk, texts, how, further)


def _cut_note(processor, config: MMFTConfig, splits: Splits) -> list[str]:
    """A note where so many captions are cut that reading them in parts is worth a try; a few thousand of them tell."""
    if not splits.has_captions or config.long_captions == "windows":
        return []
    rows = splits.train.select(range(0, len(splits.train), 1 + len(splits.train) // 1000)).remove_columns("image")
    view = texts_of(splits.class_names, config, processor)
    share = share_cut(processor, [text for row in text_rows(rows) for (text,) in view.caption_texts(row)])
    if share < MANY_CUT:
        return []
    return [
        f"{share:.0%} of the captions, with the class template before them, are longer than the {processor.tokenizer.model_max_length} "
        "tokens that the text tower reads, and lose their ends. To use these too, type --long_captions windows."
    ]


def _trainer(model, config: MMFTConfig, splits: Splits, processor) -> MMFTTrainer:
    try:
        return MMFTTrainer(model, config, splits.train, splits.validation, processor)
    except UserError:
        raise
    except (ImportError, ValueError, RuntimeError) as error:
        # The stock Trainer's refusals. A tracker that is not installed says so with a RuntimeError.
        if isinstance(error, RuntimeError) and "to be installed" not in str(error):
            raise
        raise UserError(f"finetune: {str(error).strip()}") from error


def _results_of(folder: Path) -> dict:
    """`all_results.json` of a finished run."""
    again = "Type --resume_from_checkpoint false --overwrite_output_dir true to train again, or copy the file again."
    try:
        metrics = read_json(folder / RESULTS_FILE, RunResults, again)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder / RESULTS_FILE}: expected the results of this finished run, found none. {again}"
        ) from error
    note_changed_files(folder)
    return metrics


def _check_head(folder: Path, metrics: dict, config: MMFTConfig, unknown_split: str | None) -> None:
    """Refuses another head for a finished run, where nothing is fitted or measured."""
    if unknown_split is not None and "unknown_split" not in metrics:
        again = ["mmft-hf", "evaluate", "--model_name_or_path", str(folder), "--unknown_split", unknown_split]
        raise UserError(
            f"--unknown_split {unknown_split}: expected a run that is not finished, found one that was finished without. Type "
            f"{shlex.join(again)} --dataset_name …"
        )
    before, least = metrics.get("head", "prototypes"), metrics.get("reject_below")
    other_threshold = config.threshold == "f1" and not metrics.get("thresholds")
    if config.head not in ("auto", before) or config.reject_below not in (None, least) or other_threshold:
        raise UserError(
            f"--resume_from_checkpoint: expected the head of this finished run, {before} with reject_below {least}, found "
            f"--head {config.head} with {config.reject_below}{' and --threshold f1' * other_threshold}. Type mmft-hf head {shlex.quote(str(folder))}, which fits another "
            "one without training."
        )


def _pushed(result: FinetuneResult, config: MMFTConfig, reporter: Reporter) -> FinetuneResult:
    """Publishes what is in the folder, if that is wanted: the chosen weights with their results and card."""
    if not config.push_to_hub or not is_main():
        return result
    reporter.pushing(result, config.hub_model_id)
    options = {"private": config.hub_private_repo, "revision": config.hub_revision, "token": config.hub_token}
    try:
        result.url = push_model(result.output_dir, config.hub_model_id, **options)
    except (UserError, PartialResult) as error:
        again = ["mmft-hf", "push", str(result.output_dir), "--repo_id", config.hub_model_id]
        again += ["--private", "true"] if config.hub_private_repo else []
        again += ["--revision", config.hub_revision] if config.hub_revision else []
        raise PartialResult(
            f"{error} The results are in {result.output_dir}. To continue, type: {shlex.join(again)}"
        ) from error
    reporter.pushed(result, config.hub_model_id)
    return result


def _memory(model, processor, config: MMFTConfig, splits: Splits) -> MemoryEstimate:
    """Estimates a training step; a few hundred rows tell how long the texts are."""
    some = splits.train.select(range(0, len(splits.train), 1 + len(splits.train) // 256)).remove_columns("image")
    view = texts_of(splits.class_names, config, processor)
    texts = [text for row in text_rows(some) for text in view.possible_texts(row)]
    half = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
    autocast = torch.autocast(config.device.type, half) if half else nullcontext()
    return estimate_memory(model, processor, texts, autocast, config.weight_averaging > 0)
