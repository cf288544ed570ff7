"""Settings that several verbs share: the model and the data. Light to import: captioning needs neither torch nor a Trainer."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import ClassVar, NamedTuple

from .errors import UserError


class _TowerModes(tuple):
    """The modes of a tower by name. `last:K` stands for any number K of blocks; it is no mode itself."""

    def __contains__(self, mode) -> bool:
        if isinstance(mode, str) and mode.startswith("last:"):
            return last_blocks(mode) is not None
        return super().__contains__(mode)

    def __str__(self) -> str:
        return ", ".join(self)


def last_blocks(mode: str) -> int | None:
    """K of the mode `last:K`; None for another mode."""
    found = re.fullmatch(r"last:([1-9][0-9]{0,8})", mode, re.ASCII)
    return int(found[1]) if found else None


TOWER_MODES = _TowerModes(("full", "lora", "last:K", "norms", "head", "frozen"))
ALLOW_PICKLE = (
    "Read weights that exist only as a pickle (pytorch_model.bin), with torch's weights_only=True. Safetensors, also those "
    "that the Hub has made of the pickle, come first."
)


class Range(NamedTuple):
    """The numbers that a setting may have, from `low` to `high`; `open` names ends that are excluded (`low`, `high`)."""

    low: float = 0
    high: float = math.inf
    open: tuple[str, ...] = ()

    def __contains__(self, value) -> bool:
        if not isinstance(value, Real):
            return False
        above = self.low < value if "low" in self.open else self.low <= value
        return above and (value < self.high if "high" in self.open else value <= self.high)

    def __str__(self) -> str:
        if {"low", "high"} <= set(self.open) and self.high < math.inf:
            return f"between {self.low} and {self.high}"
        low = f"above {self.low}" if "low" in self.open else f"{self.low}"
        if self.high == math.inf:
            return low if "low" in self.open else f"{low} or more"
        return f"{low} to below {self.high}" if "high" in self.open else f"{low} to {self.high}"


SHARE = Range(0, 1, open=("low", "high"))
PLACES = ("output_dir", "output_file")  # settings that name what is written
LARGEST = 10**15  # of a whole number, so that sums and products with it are far from the 63 bits that libraries take


class _Metadata(dict):
    """The metadata of a setting. HfArgumentParser hands a copy of it to argparse, which knows none of `OWN`: they can be
    looked up, but are not among the keys that are copied."""

    OWN = ("range", "decides", "chosen")

    def keys(self):
        return [key for key in super().keys() if key not in self.OWN]

    def copy(self):
        return {key: self[key] for key in self.keys()}


def setting(default, help: str, **metadata):
    """A field of a dataclass of settings.

    Args:
        default: a list is copied for each object.
        help: what `--help` prints.
        metadata: `choices`, or a `range` (`Range`): what the setting may be, see `check_settings`; `decides`: whether the
            setting can change the result of a run, so that a resume compares it; `chosen`: the default in words, where the
            machine decides. Further arguments of `argparse.ArgumentParser.add_argument`.
    """
    value = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**value, metadata=_Metadata({"help": help, **metadata}))


def check_settings(settings) -> None:
    """Raises `UserError` for a setting outside the choices or the range of its field, or a huge number. None is always allowed."""
    for known in fields(settings):
        value, allowed = getattr(settings, known.name), known.metadata.get("range")
        if value is None:
            continue
        if "choices" in known.metadata:
            choice(known.name, value, known.metadata["choices"])
        if allowed is not None and value not in allowed:
            raise UserError(f"--{known.name}: expected {allowed}, found {value!r}.")
        if type(value) is int and abs(value) > LARGEST:
            raise UserError(f"--{known.name}: expected at most {LARGEST:,}, found {value!r}.")
        if known.name in PLACES:
            check_place(known.name, value)


def check_place(name: str, path: str) -> None:
    """Raises `UserError` for a path that nothing can be written to. Safetensors and parquet write to names in UTF-8 alone."""
    try:
        fine = bool(path) and "\0" not in path and bool(path.encode())
    except UnicodeEncodeError:
        fine = False
    if not fine:
        raise UserError(f"--{name}: expected a path in UTF-8, found {path!r}. Type another name.")


def choice(name: str, value: str, known) -> None:
    """Raises `UserError` unless `value` is one of `known`."""
    if value not in known:
        raise UserError(f"--{name}: expected one of {', '.join(known)}, found {value!r}.")


@dataclass
class ModelArguments:
    """The model, and which of its towers are trained."""

    GROUPS: ClassVar = {"model": "*"}

    model_name_or_path: str = setting(
        "builtin/photo",
        "Hub id or folder of a dual encoder: CLIP, MetaCLIP, SigLIP, SigLIP 2 (fixed size), Chinese-CLIP, AltCLIP, "
        "ALIGN or a VisionTextDualEncoderModel. builtin/photo and builtin/tiny-clip (10 MB, icons) come with this package.",
    )
    model_revision: str | None = setting(None, "Branch, tag or commit on the Hub. Default: the main branch.")
    allow_pickle: bool = setting(False, ALLOW_PICKLE)
    vision_tower: str = setting(
        "full",
        "How the image tower is trained. full: all weights; lora: low-rank matrices, merged into the weights at "
        "the end (use --learning_rate 1e-4 or more); last:K, for example last:4: its last K blocks and what follows them; norms: "
        "scales and shifts of its norms; head: its projection alone; frozen: not at all.",
        choices=TOWER_MODES,
    )
    text_tower: str = setting("full", "How the text tower is trained.", choices=TOWER_MODES)
    text_trunk: str | None = setting(
        None,
        "Hub id or folder of a caption encoder, that is a language model or a sentence encoder, whose vectors take the place of the "
        "text tower: an adaptor on them is trained, and the encoder itself is not needed to predict. Default: the model's own text "
        "tower.",
    )
    lora_rank: int = setting(8, "Rank of the LoRA matrices.", range=Range(1))
    lora_alpha: int = setting(16, "LoRA matrices are scaled by lora_alpha / lora_rank.", range=Range(1))
    lora_dropout: float = setting(0.0, "Dropout on the input of the LoRA matrices.", range=Range(0, 1, open=("high",)))
    lora_targets: list[str] | None = setting(
        None,
        "Names (or their ends) of the layers that get LoRA matrices. Default: all linear ones in the tower's blocks, for "
        "CLIP q_proj k_proj v_proj out_proj fc1 fc2; of a convolutional tower the convolutions.",
    )

    def __post_init__(self):
        check_settings(self)
        if self.lora is None:
            for field in fields(self):
                if field.name.startswith("lora_") and getattr(self, field.name) != field.default:
                    raise UserError(
                        f"--{field.name}: expected --vision_tower lora or --text_tower lora with it, found vision tower "
                        f"{self.vision_tower}, text tower {self.text_tower}."
                    )

    @property
    def lora(self) -> dict | None:
        """The LoRA settings if a tower is trained with LoRA, else None."""
        if "lora" not in (self.vision_tower, self.text_tower):
            return None
        return {name: value for name, value in vars(self).items() if name.startswith("lora_")}


@dataclass
class DataArguments:
    """The images, labels and captions."""

    GROUPS: ClassVar = {"data": "*"}

    dataset_name: str = setting(
        "builtin/emoji-mini",
        "Hub id, folder of tables, folder with one subfolder of images per class, table (parquet, Arrow, CSV, JSON, tar of "
        "WebDataset), or CoOp split file (split_zhou_*.json). builtin/emoji-mini comes with this package.",
    )
    image_root: str | None = setting(
        None,
        "Folder that image paths are relative to, and that they do not leave. Default: the folder of the file that lists "
        "them; for a CoOp split file also a folder next to it.",
    )
    dataset_config_name: str | None = setting(None, "Configuration of a Hub dataset.")
    dataset_revision: str | None = setting(None, "Branch, tag or commit of a Hub dataset.")
    train_split: str | None = setting(None, "Split to train on. Default: train.")
    validation_split: str | None = setting(
        None,
        "Split that selects the best epoch. Default: validation (or valid, val, dev); without one, or if "
        "--test_split names it, part of the training split is held out (--validation_size).",
    )
    test_split: str | None = setting(
        None,
        "Split that is read once, after selection. Default: test; without one, part of the training split is held "
        "out (--test_size).",
    )
    unknown_split: str | None = setting(
        None,
        "A split, or a folder, with pictures of classes that the classifier does not know. finetune and evaluate tell how many of them "
        "are answered `unknown`, and how well they are told from the test pictures; nothing is fitted to them. Pictures of its own "
        "classes are left out.",
    )
    validation_size: float = setting(
        0.1, "Share of each class to hold out if there is no validation split.", range=SHARE
    )
    test_size: float = setting(0.2, "Share of each class to hold out if there is no test split.", range=SHARE)
    image_column: str = setting("image", "Column with the images or their paths.")
    label_column: str = setting(
        "label", "Column with the class: ClassLabel, text or number; or lists of them, for several labels per picture."
    )
    label_separator: str | None = setting(
        None,
        'What separates the labels of a picture in a column of text, for example ";". Default: a text is one label.',
    )
    captions_column: str | None = setting(
        None,
        "Column with the captions: a text or a list of texts. Default: captions if that column exists; otherwise "
        "training uses the class template alone.",
    )
    captions_dataset: str | None = setting(
        None,
        "Hub id or folder with captions but no images. They are joined to the training images by file content "
        "(sha256).",
    )
    class_names: list[str] | None = setting(
        None,
        "Class names. If the label column or the class folders hold numbers, name k is that of number k; the data's own names "
        "may be given in any order.",
    )
    on_missing_label: str = setting(
        "error",
        "Rows without a label (nothing, or -1). error: stop at the first; skip: leave them out and count them.",
        choices=("error", "skip"),
    )
    shots: int | None = setting(None, "Number of training images per class. Default: all.", range=Range(1))
    shots_seed: int = setting(0, "Seed for the few-shot subset and for held-out splits.")

    def __post_init__(self):
        check_settings(self)
