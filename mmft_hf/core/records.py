"""Schemas of the records that we write and that others may have changed since: what each must hold to be read again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict

from .arguments import TOWER_MODES, Range
from .errors import UserError
from .schema import ClassNames

Count = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]


# -- mmft.json ----------------------------------------------------------------------------------------------------------
class _Identity(TypedDict):
    base_model: str


class Identity(_Identity, total=False):
    """What a run was made from. A run is resumed only with the same."""

    base_model_revision: str | None
    vision_tower: str
    text_tower: str
    lora: dict | None
    dataset: str
    dataset_fingerprint: str
    class_template: str
    per_device_train_batch_size: Count
    world_size: Count
    caption_weights: str
    other_settings: dict


class _Run(TypedDict):
    completed: bool
    identity: Identity


class RunRecord(_Run, total=False):
    """`mmft.json` of any run."""

    data: dict
    class_names: ClassNames
    base_model_weights: BaseWeights
    tuning: Tuning
    files: dict[str, str]
    sha256: str


class _Source(TypedDict):
    name: str
    kind: Literal["hub", "builtin", "local"]
    type: Literal["model", "dataset"]


class Source(_Source, total=False):
    """A base model or dataset, see `repositories.describe_source`."""

    revision: str | None
    license: str | list[str]
    license_name: str | list[str]
    license_link: str | list[str]


class _DataSource(Source):
    config: str | None
    test_split: str | None


class DataSource(_DataSource, total=False):
    """The dataset of a run, and the one whose images were captioned for it."""

    captions_of: Source | None


class CaptionsSource(TypedDict):
    """The captions of a run."""

    images: Count
    captions: Count
    column: str
    models: dict[str, Count]
    aspects: list[str]
    prompts: dict[str, str]
    columns: list[str]


class SplitSizes(TypedDict):
    """Images of each split."""

    train: Count
    validation: Count
    test: Count


class _Sources(TypedDict):
    base_model: Source
    dataset: DataSource
    splits: SplitSizes
    train_images_per_class: list[Count]
    captions: CaptionsSource | None
    settings: dict[str, list]
    device: str | None


class TrunkSource(Source, total=False):
    """The base model of a caption encoder."""

    parameters: Count | None
    lora: bool


class Sources(_Sources, total=False):
    """Where a run's model, data and captions came from; with `--text_trunk` also its caption encoder."""

    text_trunk: TrunkSource


class BaseWeights(TypedDict, total=False):
    """Where the weights of the base model are from, see `model.weights.Weights`."""

    commit: str | None
    converted: str | None
    reference: str | None
    pickled: bool


class KeptConversion(TypedDict):
    """The Hub's conversion of one commit of a model, in our cache."""

    commit: str
    reference: str


class WeightsIndex(TypedDict):
    """`model.safetensors.index.json`, as far as we read it ourselves: the file of each tensor."""

    weight_map: dict[str, str]


class _CardIdentity(_Identity):
    base_model_revision: str | None
    vision_tower: Annotated[str, TOWER_MODES]
    text_tower: Annotated[str, TOWER_MODES]
    dataset_fingerprint: str
    class_template: str
    per_device_train_batch_size: Count
    world_size: Count
    load_best_model_at_end: bool
    supcon_weight: float
    seed: int


class CardIdentity(_CardIdentity, total=False):
    """The identity as a card tells it."""

    supcon_weight_end: float | None
    template_weight: float
    other_settings: dict


class _CardRecord(TypedDict):
    identity: CardIdentity
    class_names: ClassNames
    notes: list[str]
    prototypes: Literal["captions", "template", "templates", "images"]
    sources: Sources
    versions: dict[str, str]


class CardRecord(_CardRecord, total=False):
    """`mmft.json` of a finished run, as its card tells it."""

    base_model_weights: BaseWeights
    head: str  # its kind; missing: prototypes


class _Results(TypedDict):
    test_accuracy: Share
    test_accuracy_ci_low: Share
    test_accuracy_ci_high: Share
    zero_shot_test_accuracy: Share
    zero_shot_test_accuracy_ci_low: Share
    zero_shot_test_accuracy_ci_high: Share
    test_images: Count
    test_skipped_images: Count
    validation_accuracy: Share
    zero_shot_validation_accuracy: Share
    selection_policy: str
    selection: str
    best_epoch: float | None
    zero_shot_won: bool


class TuningCandidate(TypedDict):
    """A learning rate that was tried for so many steps, and its metric on validation; None: the loss was not finite."""

    learning_rate: float
    steps: Count
    value: float | None


class _Tuning(TypedDict):
    metric: Literal["accuracy", "top5_accuracy", "mean_per_class_accuracy", "mean_average_precision", "loss"]
    candidates: list[TuningCandidate]


class Tuning(_Tuning):
    """A search of the learning rate, and what it has chosen; None: nothing yet."""

    learning_rate: float | None


class Tuned(_Tuning):
    """A finished search."""

    learning_rate: float


class _HeadCandidate(TypedDict):
    head: str
    alpha: Share
    validation_loss: float


class HeadCandidate(_HeadCandidate, total=False):
    """A head on one set of weights, on validation."""

    validation_accuracy: Share
    validation_mean_average_precision: Share  # with several labels per picture
    validation_mean_per_class_accuracy: Share
    validation_top5_accuracy: Share


class UnknownClasses(TypedDict):
    """The answers to pictures of classes that the classifier does not know."""

    name: str  # of the split, or the folder
    examples: Count
    skipped: Count
    answered_unknown: Share | None
    answered_unknown_ci_low: Share | None
    answered_unknown_ci_high: Share | None
    auroc_logit: Share
    auroc_logit_ci_low: Share
    auroc_logit_ci_high: Share
    auroc_probability: Share
    auroc_probability_ci_low: Share
    auroc_probability_ci_high: Share


class RunResults(_Results, total=False):
    """`all_results.json`."""

    selection_metric: Literal["accuracy", "top5_accuracy", "mean_per_class_accuracy", "mean_average_precision", "loss"]
    several_labels: bool
    test_mean_per_class_accuracy: Share
    test_mean_average_precision: Share
    test_micro_f1: Share
    test_macro_f1: Share
    zero_shot_test_mean_average_precision: Share
    zero_shot_test_micro_f1: Share
    zero_shot_test_macro_f1: Share
    validation_mean_average_precision: Share
    zero_shot_validation_mean_average_precision: Share
    test_top5_accuracy: Share
    zero_shot_test_top5_accuracy: Share
    validation_top5_accuracy: Share
    zero_shot_validation_top5_accuracy: Share
    zero_shot_test_mean_per_class_accuracy: Share
    test_images_of_smallest_class: Count
    test_images_of_largest_class: Count
    validation_mean_per_class_accuracy: Share
    zero_shot_validation_mean_per_class_accuracy: Share
    test_loss: float
    zero_shot_test_loss: float
    validation_loss: float
    zero_shot_validation_loss: float
    validation_skipped_images: Count
    seed: int
    head: str
    head_alpha: Share
    head_reason: str
    head_metric: Literal["accuracy", "top5_accuracy", "mean_per_class_accuracy", "loss"]  # missing: loss
    head_chosen_on_validation: bool
    head_validation_images: Count
    head_candidates: list[HeadCandidate]
    tuning: Tuned
    refitted: bool  # by `mmft-hf head`
    temperature: float
    reject_below: Share | None
    unknown_split: UnknownClasses
    thresholds: list[Share]  # of each class, with several labels per picture
    test_brier_score: float
    test_calibration_error: Share
    test_calibration_error_null: Share
    test_aurc: Share
    test_aurc_excess: float


def check_metrics(results: Mapping, where: str, remedy: str) -> None:
    """Raises `UserError` if `RunResults` lack a metric that runs of their kind have: with one label per picture, or with several."""
    several = results.get("several_labels", False)
    further = ("mean_average_precision", "micro_f1", "macro_f1")
    needed = ["test_mean_per_class_accuracy"]
    if several:
        needed = [f"{of}test_{name}" for of in ("", "zero_shot_") for name in further]
        needed += ["validation_mean_average_precision", "zero_shot_validation_mean_average_precision"]
    of_candidates = f"validation_{further[0] if several else 'accuracy'}"
    missing = [name for name in needed if name not in results]
    missing += [of_candidates for found in results.get("head_candidates", ()) if of_candidates not in found]
    if missing:
        raise UserError(f"{where}: expected the field {missing[0]}, found none. {remedy}")


class ModelConfig(TypedDict):
    """`config.json` of a model, as far as we read it ourselves."""

    architectures: list[str]
    model_type: str


class _AdapterConfig(TypedDict):
    base_model_name_or_path: str


class AdapterConfig(_AdapterConfig, total=False):
    """`adapter_config.json` of a LoRA adapter, as far as we read it ourselves."""

    revision: str | None


class CheckpointConfig(TypedDict, total=False):
    """`config.json` of a checkpoint, as far as a resume compares it."""

    model_type: str
    projection_dim: int | None
    vision_config: dict
    text_config: dict
    text_trunk: dict | None


class ShardIndex(TypedDict):
    """`model.safetensors.index.json`."""

    weight_map: dict[str, str]


class TrainingState(TypedDict):
    """`trainer_state.json` of a checkpoint, as far as a resume reads it."""

    global_step: Count
    max_steps: int
    num_train_epochs: Count
    epoch: float | None
    train_batch_size: Count | None
    log_history: list[dict]
    best_metric: float | None
    best_global_step: int | None
    best_model_checkpoint: str | None
    stateful_callbacks: dict[str, Any]


# -- captions.json ------------------------------------------------------------------------------------------------------
class MadeFrom(TypedDict, total=False):
    """What a captioned dataset was made from."""

    dataset_name: str
    split: str | list[str]
    captioner: dict
    prompts: dict
    sampling: dict
    pictures: dict


class Spent(TypedDict, total=False):
    """What captions took; None: unknown."""

    calls: Count | None
    attempts: Count | None
    tokens_in: Count | None
    tokens_out: Count | None
    cost_usd: Annotated[float, Range(0)] | None
    seconds: Annotated[float, Range(0)] | None


class CaptionsRecord(TypedDict, total=False):
    """`captions.json`, as far as others tell of it."""

    made_from: MadeFrom
    model: str | None
    run_id: str
    statuses: dict[str, Count]
    complete: bool
    fingerprints: dict[str, str] | None
    digests: dict[str, str]
    journals: list[str]
    prompt_texts: dict[str, str]
    spent: Spent
    last_run: dict
    checks: dict
    statistics: dict
    sha256: str


class CaptionFolderRecord(CaptionsRecord):
    """`captions.json` of a folder that a run may continue."""

    files: list[str]
