"""Compares methods on one data set under one protocol: shots, seeds, and a test split that none can read before the end."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path

from ..arguments import DataArguments, ModelArguments, choice
from ..configuration import MMFTConfig
from ..console import say, table
from ..errors import PartialResult, UserError


@dataclass
class BenchmarkArguments:
    """Which methods, on how many images, how often."""

    methods: list[str] = field(
        default_factory=lambda: ["zs", "zs-ens", "zs-cap", "lp", "gda", "tip-f", "lp++", "flyp", "mmft"],
        metadata={"help": "Methods by name; an unknown one lists them all."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Each draws a subset, an order and captions, alike for all methods."},
    )
    allow_fewer: bool = field(
        default=False, metadata={"help": "Take what there is of a class with fewer images than shots."}
    )


@dataclass
class BenchmarkData(DataArguments):
    """The data of `DataArguments`, at several shots."""

    shots: list[str] = field(
        default_factory=lambda: ["1", "4", "16", "full"],
        metadata={"help": "Training images per class: several numbers, or full for all."},
    )

    def __post_init__(self):
        # The data as `load_splits` takes them: whole.
        self.whole = DataArguments(**{f.name: getattr(self, f.name) for f in fields(self) if f.name != "shots"})


ARGUMENTS = (BenchmarkArguments, ModelArguments, BenchmarkData, MMFTConfig)


def run(args: BenchmarkArguments, model_args: ModelArguments, data_args: BenchmarkData, config: MMFTConfig) -> None:
    """Runs the grid, or what is left of it, and prints its table."""
    if find_spec("sklearn") is None:  # now, not after the first cells; it brings scipy
        raise UserError("benchmark: expected scikit-learn, found none. Type: pip install 'mmft_hf[benchmark]'")
    from ..benchmark.grid import RESULTS_FILE, cells, parse_shots, run_grid
    from ..benchmark.methods import METHODS, Workshop
    from ..benchmark.table import summary_table
    from ..cards import versions
    from ..data import load_splits
    from ..run_folder import DECIDING

    for name in args.methods:
        choice("methods", name, METHODS)
    for tower in ("vision_tower", "text_tower"):
        if getattr(model_args, tower) != "full":
            raise UserError(
                f"--{tower}: expected full, found {getattr(model_args, tower)}. A method says what it trains: --methods mmft-lora."
            )
    grid = cells(args.methods, parse_shots(data_args.shots), args.seeds)
    splits = load_splits(data_args.whole)
    identity = {
        "base_model": model_args.model_name_or_path,
        "base_model_revision": model_args.model_revision,
        "dataset": data_args.dataset_name,
        "dataset_fingerprint": splits.fingerprint(),
        # A cell has its own seed.
        "settings": {name: str(getattr(config, name)) for name in (*DECIDING, "decode_cache") if name != "seed"},
        "versions": {k: v for k, v in versions().items() if k in ("mmft_hf", "torch", "transformers", "peft")},
    }
    say(f"Comparing {len(args.methods)} methods on {data_args.dataset_name} with {model_args.model_name_or_path}\n")
    rows = {
        "classes": len(splits.class_names),
        "images": f"{len(splits.train):,} train, {len(splits.validation):,} validation, {len(splits.test):,} test",
        "cells": f"{len(grid)}: {len(args.methods)} methods, shots {' '.join(data_args.shots)}, "
        f"seeds {' '.join(map(str, args.seeds))}",
        "output": config.output_dir,
    }
    table(rows)
    say()
    shop = Workshop(model_args.model_name_or_path, model_args.model_revision, config)
    folder = Path(config.output_dir)
    found = run_grid(grid, shop, splits, folder, identity, args.allow_fewer, say)
    say(f"\nTest accuracy in %, mean over seeds, with 95 % interval over seeds\n\n{summary_table(found)}")
    say(f"\nEvery cell is a line of {folder / RESULTS_FILE}; which images each task had is in {folder / 'subsets'}.")
    failed = sum(row["status"] == "failed" for row in found)
    if failed:
        raise PartialResult(f"{failed} of {len(grid)} cells failed.", again=True)
