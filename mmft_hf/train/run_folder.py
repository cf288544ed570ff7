"""The output folder of a fine-tuning run: which run it belongs to, whether it may be written to, and its final files."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from dataclasses import fields
from pathlib import Path

from accelerate import PartialState
from transformers import TrainerState

from ..core import files
from ..core.arguments import DataArguments, ModelArguments
from ..core.console import is_main
from ..core.errors import UserError
from ..core.launch import check_shared
from ..core.reading import read_json
from ..core.records import RunRecord, Tuning
from ..core.seals import digests_of, note_if_changed, sealed
from ..data.caption_sources import parse_mix, sources_digest, sources_of, with_caption_sources
from ..data.caption_weights import weights_digest, with_caption_weights
from ..data.splits import Splits
from ..hub import cards
from ..hub.cards.sources import run_sources, trunk_source
from ..model.adapted_processor import AdaptedProcessor
from ..model.towers import Adapter
from ..model.weights import Weights
from ..predict import figures, sheet
from ..predict.classifier import ImageClassifier
from ..predict.evaluation import Predictions
from ..predict.heads import Head
from ..predict.metrics import class_sizes
from ..version import __version__
from .choice import Kept
from .config import MMFTConfig
from .selection import by_metric, metric_name

# Settings that every record contains. Other settings that decide the result are recorded if they differ from their default.
DECIDING = (
    "learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps weight_decay "
    "adam_beta1 adam_beta2 adam_epsilon optim lr_scheduler_type warmup_steps max_grad_norm seed data_seed bf16 fp16 "
    "eval_strategy eval_steps load_best_model_at_end world_size supcon_weight include_self class_template prototypes "
    "crop_min_area on_bad_image samples_per_class caption_dropout template_weight supcon_weight_end "
    "weight_averaging long_captions text_mix"
).split()

# Metrics of the test split in the results, beside accuracy and the one that selects.
SEVERAL_LABELS = ("mean_average_precision", "micro_f1", "macro_f1")
FURTHER = ("mean_per_class_accuracy", "top5_accuracy", *SEVERAL_LABELS)

# Their product is the number of images in a step.
STEP = ("per_device_train_batch_size", "world_size")


class RunFolder:
    """The output folder of one run.

    Args:
        path: the output folder.
        model_args, data_args, config, splits: settings and data of the run, which make up its identity.
    """

    def __init__(
        self, path: str, model_args: ModelArguments, data_args: DataArguments, config: MMFTConfig, splits: Splits
    ):
        self.path = Path(path)
        self.splits = splits
        self.config = config
        # Through JSON, because that is how they will be read back: enums become text.
        plain = json.loads(json.dumps({**config.to_dict(), "world_size": config.world_size}, default=str))
        self.defaults = default = {field.name: field.default for field in fields(MMFTConfig)}
        mix = parse_mix(config.text_mix or ())
        sources = with_caption_sources(splits.train, mix)[0] if sources_of(mix) else None
        weights = with_caption_weights(splits.train, config.sample_weight)[0] if config.sample_weight else None
        self.identity = {
            "base_model": model_args.model_name_or_path,
            "base_model_revision": model_args.model_revision,
            "vision_tower": model_args.vision_tower,
            "text_tower": model_args.text_tower,
            "text_trunk": model_args.text_trunk,
            "lora": model_args.lora,
            "dataset": data_args.dataset_name,
            "dataset_config_name": data_args.dataset_config_name,
            "dataset_fingerprint": splits.fingerprint(),
            "captions": splits.has_captions,
            "shots": data_args.shots,
            "shots_seed": data_args.shots_seed,
            **({"caption_weights": weights_digest(weights)} if weights else {}),
            **({"caption_sources": sources_digest(sources)} if sources else {}),
            **{key: plain[key] for key in DECIDING},
            "other_settings": {
                k: v for k, v in plain.items() if k not in DECIDING and v != default.get(k) and config.decides(k)
            },
        }
        # `evaluate` needs these to find a held-out test split again.
        self.data_settings = vars(data_args)
        self.completed = False
        self.tuning: Tuning | None = None  # what a search of the learning rate has found, also before an interruption

    def check(self, overwrite: bool, resume: str | bool | None) -> str | bool | None:
        """Checks that this run may use the folder, without writing to it. Returns the checkpoint to resume from.

        Raises:
            UserError: the folder holds another run, or files that no run wrote.
        """
        if isinstance(resume, str) and resume.lower() in ("true", "false"):
            resume = resume.lower() == "true"
        found = self._read()
        if found is None:
            if self.path.is_dir() and any(not files.is_temporary(entry.name) for entry in self.path.iterdir()):
                raise UserError(
                    f"--output_dir {self.path}: expected an empty or new folder, found files that are not a run of mmft-hf. "
                    "Type another --output_dir."
                )
            return resume
        # An older version without a setting did what the setting's default does.
        before = {**self.defaults, **found["identity"]}
        differ = [k for k, v in self.identity.items() if not _same(k, before.get(k), v)]
        # The order of the images and all random draws depend on the size of a step, not on the number of processes.
        if _step_size(found["identity"]) == _step_size(self.identity):
            differ = [k for k in differ if k not in STEP]
        if resume and differ:
            pairs = [f"{k} was {before.get(k)!r}, now {self.identity[k]!r}" for k in differ]
            raise UserError(
                f"--resume_from_checkpoint: the run in {self.path} had other settings: {'; '.join(pairs)}. Type the "
                f"same settings to continue it, or another --output_dir.{self._other_processes(found['identity'])}"
            )
        if not resume and not overwrite:
            state = "a finished run" if found["completed"] else "an unfinished run"
            what = f"with other settings ({', '.join(differ)})" if differ else "with the same settings"
            go_on = "" if differ else " To continue it, type --resume_from_checkpoint true."
            raise UserError(
                f"--output_dir {self.path}: it holds {state} {what}.{go_on} To keep it, type another --output_dir; "
                "to delete it, --overwrite_output_dir true."
            )
        self.completed = bool(resume) and found["completed"]
        self.tuning = found.get("tuning") if resume else None
        return resume

    def _other_processes(self, before: dict) -> str:
        """What to type if only the number of processes differs."""
        even, rest = divmod(_step_size(before), self.identity["world_size"])
        if before.get("world_size") == self.identity["world_size"] or rest or not even:
            return ""
        return (
            f" With {self.identity['world_size']} instead of {before['world_size']} processes, "
            f"--per_device_train_batch_size {even} keeps the steps of {_step_size(before)} images."
        )

    def claim(self, resume: str | bool | None) -> None:
        """Takes the folder for this run. Unless the run is resumed, an earlier run in it is deleted."""
        state = PartialState()
        state.wait_for_everyone()  # every process has read the record before one writes it
        check_shared(self.path)
        if is_main():
            for entry in self.path.iterdir():  # of a process that was killed while writing
                if files.is_temporary(entry.name) and entry.name != files.LOCK_FILE:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            if not resume:
                with files.atomic_folder(self.path):  # a folder that cannot be written to loses nothing
                    pass
                self._clear()
            self._write(self.path, completed=False)
        state.wait_for_everyone()

    def keep_tuning(self, tuning: Tuning) -> None:
        """Records the state of a search in the folder, which is claimed, so that a resume does not repeat it."""
        self.tuning = tuning
        if is_main():
            self._write(self.path, completed=False)

    def _read(self) -> dict | None:
        path = self.path / files.RUN_FILE
        try:
            record = read_json(path, RunRecord, "Type another --output_dir.")
        except FileNotFoundError:
            return None
        note_if_changed(record, path)
        return record

    def _write(self, folder: Path, completed: bool, **more) -> None:
        content = {
            "completed": completed,
            "mmft_hf": __version__,
            "identity": self.identity,
            "data": self.data_settings,
            **({"tuning": self.tuning} if self.tuning else {}),
        }
        files.write_json(folder / files.RUN_FILE, sealed(content | more))

    def _clear(self) -> None:
        """Deletes the files that a run writes, by their exact names, and nothing else."""
        if not (self.path / files.RUN_FILE).is_file():
            return
        # The record goes last, so that a process killed in between leaves a folder that is still recognized as a run.
        for entry in sorted(self.path.iterdir(), key=lambda entry: entry.name == files.RUN_FILE):
            if entry.is_dir() and re.fullmatch(r"checkpoint-\d+", entry.name):
                shutil.rmtree(entry)
            elif entry.is_file() and files.belongs_to_run(entry.name):
                entry.unlink()
            elif entry.is_dir() and entry.name in files.SUBFOLDERS:
                if {file.name for file in entry.iterdir()} <= set(files.SUBFOLDERS[entry.name]):
                    shutil.rmtree(entry)

    def results(
        self,
        predictions: Predictions,
        zero_shot_test: dict,
        validation: dict[str, float],
        train_metrics: dict,
        state: TrainerState,
        zero_shot_won: bool,
        kept: Kept | None,
        head: Head,
    ) -> dict:
        """The content of `all_results.json`.

        Args:
            predictions: of the chosen classifier on the test split.
            zero_shot_test: `ClassificationReport` of the untuned model.
            validation, train_metrics: further entries.
            state: of the Trainer.
            zero_shot_won: whether the untuned model with the class template was better on validation than all else.
            kept: how weights and head were chosen; None for the prototypes of the best epoch.
            head: of the chosen classifier.
        """
        test = predictions.report()
        metric = metric_name(self.config.metric_for_best_model)
        by = by_metric(metric)
        selected = self.config.load_best_model_at_end
        epochs = {log["step"]: log["epoch"] for log in state.log_history if "eval_loss" in log}
        untuned = zero_shot_won or (kept is not None and kept.alpha == 0)
        best_epoch = 0.0 if untuned else epochs.get(state.best_global_step) if selected else state.epoch
        shared = dict.fromkeys(("accuracy", "accuracy_ci_low", "accuracy_ci_high", "mean_per_class_accuracy", metric))
        smallest, largest = class_sizes(row["images"] for row in test["per_class"])
        start = "the start of the adaptor" if self.identity.get("text_trunk") else "the untuned model"
        selection = (
            f"the untuned model with the class template: no epoch was better on validation{by}"
            if zero_shot_won
            else f"epoch {best_epoch:g} of {state.epoch:g}, the best on validation{by}; epoch 0 is {start}"
            if selected
            else f"the last epoch ({state.epoch:g})"
        )
        if kept is not None:
            found = epochs.get(state.best_global_step, 0.0) if selected else state.epoch
            of = f"; the tuned ones are of epoch {found:g} of {state.epoch:g}" if kept.alpha else ""
            selection = f"{kept.describe()}{of}; {kept.choice.reason}"
        trained = state.global_step > 0
        used = kept.choice.by_validation or (selected and trained) if kept else selected
        return {
            **{f"zero_shot_test_{key}": zero_shot_test[key] for key in shared if key in zero_shot_test},
            **{f"test_{key}": test[key] for key in shared if key in test},
            **{f"test_{key}": test[key] for key in FURTHER if key in test},
            **{f"zero_shot_test_{key}": zero_shot_test[key] for key in SEVERAL_LABELS if key in zero_shot_test},
            "test_images": test["examples"],
            "test_images_of_smallest_class": smallest,
            "test_images_of_largest_class": largest,
            "test_skipped_images": test["skipped"],
            **validation,
            "selection_policy": "val-full" if used else "last",
            "selection_metric": metric,
            "selection": selection,
            "best_epoch": best_epoch,
            "zero_shot_won": zero_shot_won,
            **({"head": "prototypes"} if kept is None else kept.record()),
            "several_labels": head.several_labels,
            "temperature": head.temperature,
            "reject_below": head.reject_below,
            **({} if head.thresholds is None else {"thresholds": head.decision.tolist()}),
            **{f"test_{name}": value for name, value in predictions.certainty().items()},
            "seed": self.config.seed,
            **({"tuning": self.tuning} if self.tuning else {}),
            **train_metrics,
        }

    def save(
        self,
        classifier: ImageClassifier,
        predictions: Predictions,
        results: dict,
        state: TrainerState,
        weights: Weights,
        source: str,
        adapter: Adapter | None = None,
    ) -> None:
        """Writes the classifier, its results and its card: all of them, or none if the disk takes no more.

        Args:
            predictions: on the test split.
            results: from `results`.
            state: of the Trainer.
            weights: those of the base model.
            source: of the prototypes.
            adapter: of a LoRA run.
        """
        record = {
            "class_names": self.splits.class_names,
            "model_type": classifier.model.config.model_type,
            "base_model_weights": weights.record(),
            "selection": results["selection"],
            "notes": self.splits.notes,
            "prototypes": source,
            "head": classifier.head.kind,
            "sources": self._sources(classifier),
            "versions": cards.versions(),
        }
        with files.atomic_folder(self.path) as folder:
            classifier.save_pretrained(folder)
            if adapter:
                # Whoever opens the adapter with stock tools gets the weights that it was trained on, as safetensors.
                base, revision = self.identity["base_model"], weights.converted or self.identity["base_model_revision"]
                adapter.save_pretrained(folder / files.ADAPTER_FOLDER, cards.public_name(base), revision)
            sheet.predictions_table(predictions).to_parquet(folder / files.PREDICTIONS_FILE)
            sheet.contact_sheet(self.splits.test, predictions).save(folder / files.SHEET_FILE, optimize=True)
            selected = self.config.load_best_model_at_end and not results["zero_shot_won"]
            drawn = "mean_average_precision" if predictions.several_labels else "accuracy"
            zero_shot, best = results[f"zero_shot_validation_{drawn}"], results["best_epoch"] if selected else None
            figures.draw_curves(folder / files.CURVES_FILE, state.log_history, zero_shot, best, drawn)
            if not predictions.several_labels:
                confusion = predictions.report()["confusion_matrix"]
                figures.draw_confusion(folder / files.CONFUSION_FILE, confusion, self.splits.class_names)
                known, scores = predictions.known, predictions.scores
                certain, right = scores.max(axis=1)[known], (predictions.predicted == predictions.labels)[known]
                figures.draw_certainty(folder / files.CERTAINTY_FILE, certain, right, classifier.head.reject_below)
            files.write_json(folder / files.RESULTS_FILE, results)
            state.save_to_json(str(folder / files.STATE_FILE))
            self._write(folder, completed=True, **record, files=digests_of(folder))
            cards.write_model_card(folder)

    def _sources(self, classifier: ImageClassifier) -> dict:
        found = run_sources(self.identity, self.data_settings, self.splits, MMFTConfig)
        if isinstance(classifier.processor, AdaptedProcessor):
            found["text_trunk"] = trunk_source(classifier.processor.trunk.record())
        return found


def _same(setting: str, before, now) -> bool:
    """Whether a setting has the value that it had. Data are known by their fingerprint, wherever they are now."""
    if setting == "dataset" or before == now:
        return True
    if setting not in ("base_model", "text_trunk") or before is None or now is None:
        return False
    return Path(before).exists() and os.path.realpath(before) == os.path.realpath(now)


def _step_size(identity: dict) -> int:
    """Number of images in a step, over all processes."""
    return math.prod(identity.get(name) or 0 for name in STEP)
