"""Which model and which data: settings of every verb. Light to import, since captioning needs neither torch nor a Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from .errors import UserError

TOWER_MODES = ("full", "lora", "frozen")


def choice(name: str, value: str, known) -> None:
    """Raises `UserError` unless `value` is one of `known`."""
    if value not in known:
        raise UserError(f"--{name}: expected one of {', '.join(known)}, found {value!r}.")


def check_lora(rank: int, alpha: int, dropout: float) -> None:
    """Raises `UserError` for a setting of LoRA outside its range."""
    if rank < 1:
        raise UserError(f"--lora_rank: expected 1 or more, found {rank}.")
    if alpha < 1:
        raise UserError(f"--lora_alpha: expected 1 or more, found {alpha}.")
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"--lora_dropout: expected a share from 0 to below 1, found {dropout}.")


@dataclass
class ModelArguments:
    """Which model, and which of its towers are trained."""

    model_name_or_path: str = field(
        default="builtin/tiny-clip",
        metadata={
            "help": "Hub id or folder of a CLIPModel, or of MetaCLIP, SigLIP, SigLIP 2 (of a fixed size), Chinese-CLIP, AltCLIP, "
            "ALIGN or a VisionTextDualEncoderModel. builtin/tiny-clip comes with this package."
        },
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub model. Default: its main branch."}
    )
    vision_tower: str = field(
        default="full",
        metadata={
            "help": "full: the image tower is trained; lora: small matrices beside its weights are, and are added to them "
            "at the end (type --learning_rate 1e-4 or more); frozen: it is not.",
            "choices": TOWER_MODES,
        },
    )
    text_tower: str = field(
        default="full", metadata={"help": "full, lora or frozen: the same for the text tower.", "choices": TOWER_MODES}
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of the matrices of a lora tower."})
    lora_alpha: int = field(default=16, metadata={"help": "They are added multiplied by lora_alpha / lora_rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before them."})
    lora_targets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Linear layers of a lora tower that get such matrices, by the ends of their names. Default: all in its "
            "blocks; of CLIP, q_proj k_proj v_proj out_proj fc1 fc2."
        },
    )

    def __post_init__(self):
        check_lora(self.lora_rank, self.lora_alpha, self.lora_dropout)
        if self.lora is None:
            for setting in fields(self):
                if setting.name.startswith("lora_") and getattr(self, setting.name) != setting.default:
                    raise UserError(
                        f"--{setting.name}: expected --vision_tower lora or --text_tower lora beside it, found vision tower "
                        f"{self.vision_tower}, text tower {self.text_tower}."
                    )

    @property
    def lora(self) -> dict | None:
        """The settings of LoRA, where a tower is trained by it."""
        if "lora" not in (self.vision_tower, self.text_tower):
            return None
        return {name: value for name, value in vars(self).items() if name.startswith("lora_")}


@dataclass
class DataArguments:
    """Which images, labels and captions."""

    dataset_name: str = field(
        default="builtin/emoji-mini",
        metadata={
            "help": "Hub id, folder of parquet files, folder with one subfolder of images per class, a CSV/JSONL file of "
            "image paths and labels, or a split file of CoOp (split_zhou_*.json). builtin/emoji-mini comes with this package."
        },
    )
    image_root: str | None = field(
        default=None,
        metadata={
            "help": "Folder that image paths start from. Default: that of the data set's file; of a split file of CoOp, "
            "also a folder beside it."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub data set."})
    train_split: str | None = field(default=None, metadata={"help": "Split trained on. Default: train."})
    validation_split: str | None = field(
        default=None,
        metadata={
            "help": "Split on which the best epoch is chosen. Default: validation (or valid, val, dev); if there is "
            "none, or --test_split names it, part of the training split is held out (--validation_size)."
        },
    )
    test_split: str | None = field(
        default=None,
        metadata={
            "help": "Split read once, after selection. Default: test; if there is none, part of the training split "
            "is held out (--test_size)."
        },
    )
    validation_size: float = field(
        default=0.1, metadata={"help": "Share of each class held out of train where there is no validation split."}
    )
    test_size: float = field(
        default=0.2, metadata={"help": "Share of each class held out of train where there is no test split."}
    )
    image_column: str = field(default="image", metadata={"help": "Column of the images (or of their paths)."})
    label_column: str = field(default="label", metadata={"help": "Column of the class: ClassLabel, text or number."})
    captions_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the captions: text, or a list of texts. Default: captions if there is such a column, "
            "else none: class templates alone."
        },
    )
    captions_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of captions without images, joined to the training images by the content of the files."
        },
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes, where the label column holds bare numbers."}
    )
    shots: int | None = field(
        default=None, metadata={"help": "Train on this many images of each class. Default: all of them."}
    )
    shots_seed: int = field(default=0, metadata={"help": "Seed of the few-shot subset and of held-out splits."})

    def __post_init__(self):
        for name in ("validation_size", "test_size"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise UserError(f"--{name}: expected a share between 0 and 1, found {getattr(self, name)}.")
        if self.shots is not None and self.shots < 1:
            raise UserError(f"--shots: expected 1 or more images per class, found {self.shots}. Leave it out for all.")
