"""The settings of `mmft-hf benchmark` in addition to those of model, data and training."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from ...core.arguments import DataArguments, Range, check_settings, setting
from ...core.errors import UserError
from .budgets import BUDGETS, EQUAL, LONG_STEPS
from .methods import METHODS
from .refined import DEFAULT, default_methods, parse_refined


@dataclass
class BenchmarkArguments:
    """Which methods to compare, and how.

    Attributes:
        sources: folders of refined captions by name, of `refined`.
    """

    GROUPS: ClassVar = {"benchmark": "*"}

    methods: list[str] = setting(
        "zs zs-ens zs-cap lp gda tip-f lp++ flyp mmft mmft-no-captions".split(),
        f"Methods by name: {', '.join(name for name, method in METHODS.items() if method.alpha == method.share == 1)}; NAME+wise: halfway "
        "between the untuned weights and those of NAME, for methods that train weights; NAME+mix: 0.3 times the trained and 0.7 times the untuned logits, for methods that train a head; NAME@refined: NAME with the captions of "
        f"--refined. With --refined the default is {' '.join(default_methods([DEFAULT]))}.",
    )
    refined: list[str] | None = setting(
        None,
        "Folder of mmft-hf caption refine, made of the captions of --dataset_name, whose captions NAME@refined reads instead, on the "
        "same images. Several: NAME=FOLDER NAME=FOLDER, for mmft@NAME.",
    )
    seeds: list[int] = setting([0, 1, 2], "Each seed draws a subset, an order and captions, the same for all methods.")
    allow_fewer: bool = setting(False, "Take all images of a class that has fewer images than shots.")
    learning_rates: list[float] | None = setting(
        None,
        "Fit each fine-tuning method once with each of these rates (ten times as large for LoRA and 2SFS); validation chooses. "
        "Default: learning_rate alone; with --budget long that, and ten times that.",
    )
    budget: str = setting(
        EQUAL,
        "How long methods train. equal: all with the settings given here; authors: each as its authors do, without a search; long: "
        f"{LONG_STEPS} steps for each image of a class, with two learning rates.",
        choices=BUDGETS,
    )
    min_steps: int = setting(
        0,
        "Train on few images for at least this many steps. Default: 0, num_train_epochs alone decides.",
        range=Range(),
    )
    shift_splits: list[str] | None = setting(
        None, "Further splits of the same classes to evaluate every method on, in addition to the test split."
    )
    group_column: str | None = setting(
        None, "Test images with the same value here are not independent: intervals count them as one."
    )
    report: str | None = setting(None, "Only write the report of this folder of results again.")

    def __post_init__(self):
        self.sources = parse_refined(self.refined or ())
        if self.sources and self.methods == BenchmarkArguments().methods:
            self.methods = default_methods(self.sources)
        if any(rate <= 0 for rate in self.learning_rates or ()):
            raise UserError(f"--learning_rates: expected numbers above 0, found {min(self.learning_rates):g}.")
        if wrong := [seed for seed in self.seeds if not 0 <= seed < 2**32]:
            raise UserError(f"--seeds: expected numbers from 0 to {2**32 - 1}, found {wrong[0]}.")
        check_settings(self)


@dataclass
class BenchmarkData(DataArguments):
    """The dataset, with several numbers of shots instead of a single one.

    Attributes:
        whole: the same dataset with all training images, as `load_splits` takes it.
    """

    GROUPS: ClassVar = {"benchmark": "shots", "data": "*"}

    shots: list[str] = setting(["1", "4", "16", "full"], "Training images per class: several numbers, or full for all.")

    def __post_init__(self):
        self.whole = DataArguments(**{f.name: getattr(self, f.name) for f in fields(self) if f.name != "shots"})
