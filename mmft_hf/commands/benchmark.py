"""Compares methods on one data set under one protocol: shots, seeds, and a test split that none can read before the end.

Several processes may work at one grid: the same command in a second terminal, or torchrun and accelerate launch with
recipes/benchmark.py, each with a GPU of its own. Each takes the cells that nobody has.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path

from ..benchmark.run.processes import Claims, number_of_process
from ..core.arguments import DataArguments, ModelArguments
from ..core.console import say, table
from ..core.errors import PartialResult, UserError, nearest
from ..core.files import ADAPTER_FILES, MODEL_FILES, read_json, write_json
from ..data.images import content_hash
from ..train.config import MMFTConfig

# Beside the settings, what numbers depend on.
VERSIONED = ("mmft_hf", "torch", "transformers", "peft", "scikit-learn")


@dataclass
class BenchmarkArguments:
    """Which methods, on how many images, how often."""

    methods: list[str] = field(
        default_factory=lambda: "zs zs-ens zs-cap lp gda tip-f lp++ flyp mmft mmft-no-captions".split(),
        metadata={"help": "Methods by name; an unknown one lists them all."},
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Each draws a subset, an order and captions, alike for all methods."},
    )
    allow_fewer: bool = field(
        default=False, metadata={"help": "Take what there is of a class with fewer images than shots."}
    )
    learning_rates: list[float] | None = field(
        default=None,
        metadata={
            "help": "Each fine-tuning method is fitted once with each of them (ten times as large for LoRA), and validation "
            "chooses. Default: learning_rate alone."
        },
    )
    min_steps: int = field(
        default=0,
        metadata={"help": "Train few images for at least so many steps. Default: 0, num_train_epochs alone decides."},
    )
    shift_splits: list[str] | None = field(
        default=None,
        metadata={"help": "Further splits of the same classes that every method is judged on, beside the test split."},
    )
    group_column: str | None = field(
        default=None,
        metadata={"help": "Test images with the same value there are not independent: intervals count them as one."},
    )
    report: str | None = field(
        default=None, metadata={"help": "Draw the report of a folder of results once more, and do nothing else."}
    )

    def __post_init__(self):
        if any(rate <= 0 for rate in self.learning_rates or ()):
            raise UserError(f"--learning_rates: expected numbers above 0, found {min(self.learning_rates):g}.")
        if wrong := [seed for seed in self.seeds if not 0 <= seed < 2**32]:
            raise UserError(f"--seeds: expected numbers from 0 to {2**32 - 1}, found {wrong[0]}.")
        if self.min_steps < 0:
            raise UserError(f"--min_steps: expected 0 or more, found {self.min_steps}.")


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
    first = number_of_process() == 0
    for module in ("sklearn", "matplotlib"):  # now, not after the first cells; the former brings scipy
        if find_spec(module) is None:
            raise UserError(
                f"benchmark: expected {'scikit-learn' if module == 'sklearn' else module}, found none. Type: "
                "pip install 'mmft_hf[benchmark]'"
            )
    if args.report:
        if first:
            _write_report(Path(args.report))
        return
    from ..benchmark.run import data_summary as describe
    from ..benchmark.run.checks import notes_on, unreadable, with_what_they_need
    from ..benchmark.run.deletion import delete_benchmark
    from ..benchmark.run.grid import Grid, cells, parse_shots
    from ..benchmark.run.methods import METHODS, Context
    from ..benchmark.run.protocol import make_task
    from ..benchmark.run.results import CLAIMS, RESULTS_FILE, SUBSETS
    from ..benchmark.run.shifts import check_labels, load_shifts
    from ..benchmark.run.summary import image_note, summary_table
    from ..data.splits import load_splits

    for name in args.methods:
        if name not in METHODS:
            raise UserError(f"--methods: found {name!r}.{nearest(name, METHODS)} Expected one of {', '.join(METHODS)}.")
    for tower in ("vision_tower", "text_tower"):
        if getattr(model_args, tower) != "full":
            raise UserError(
                f"--{tower}: expected full, found {getattr(model_args, tower)}. A method says what it trains: --methods mmft-lora."
            )
    for name in ("push_to_hub", "resume_from_checkpoint"):
        if getattr(config, name):
            raise UserError(
                f"--{name}: expected nothing, found {getattr(config, name)}. A benchmark keeps and publishes no model, and goes on "
                "where it stopped by itself. Leave it out."
            )
    if config.data_seed is not None:
        raise UserError(
            f"--data_seed: expected nothing, found {config.data_seed}. Each of --seeds draws order, crops and captions of its own. "
            "Leave it out."
        )
    if config.prototypes != "captions":  # with others an epoch would be selected by what is not judged
        raise UserError(
            f"--prototypes: expected captions, found {config.prototypes}. A method says what images are compared with: --methods "
            "mmft-train-captions for the class template, flyp-ens for several. Leave it out."
        )
    listed = cells(args.methods, parse_shots(data_args.shots), args.seeds)
    if not listed:
        raise UserError(
            f"--shots: expected a number above 0 for {', '.join(args.methods)}, found {' '.join(data_args.shots)}. Type --shots 1 4, or "
            "a method that needs no images: --methods zs."
        )
    check_labels(data_args.whole, args.shift_splits or ())
    splits = load_splits(data_args.whole)
    methods, left_out = with_what_they_need(args.methods, splits, data_args.dataset_name)
    listed = cells(methods, parse_shots(data_args.shots), args.seeds)
    shifts = load_shifts(data_args.whole, args.shift_splits or (), splits.class_names)
    judged = {"test": splits.test, **shifts}
    describe.groups_of(judged, args.group_column)  # is there such a column?
    identity = _identity(args, model_args, data_args, config, splits, shifts)
    folder, skip = Path(config.output_dir), config.on_bad_image == "skip"
    if config.overwrite_output_dir:
        for n in {cell.shots for cell in listed}:
            make_task(splits, n, 0, args.allow_fewer)  # what cannot be run deletes nothing
        delete_benchmark(folder)
    grid = Grid(
        listed,
        splits,
        folder,
        identity,
        shifts,
        args.allow_fewer,
        skip_bad_images=skip,
        say=say,
    )
    left = grid.open_cells()
    with Claims(folder / CLAIMS).alone("data"):
        data = _describe(folder, splits, judged, args, model_args, data_args)
        if not skip:
            _read_pictures(folder, data, left, splits, judged, args.allow_fewer)
    if first:
        count = f"{len(methods)} method{'' if len(methods) == 1 else 's'}"
        say(f"Comparing {count} on {data_args.dataset_name} with {model_args.model_name_or_path}\n")
        tested = "".join(f", {len(dataset):,} {name}" for name, dataset in judged.items())
        rows = {
            "classes": len(splits.class_names),
            "images": f"{len(splits.train):,} train, {len(splits.validation):,} validation{tested}",
            "cells": f"{len(listed)}: {count}, shots {' '.join(data_args.shots)}, "
            f"seeds {' '.join(map(str, args.seeds))}",
            "output": config.output_dir,
        }
        table(rows)
        passed_over = {name: unreadable(name, dataset) for name, dataset in judged.items()} if skip and left else {}
        notes = notes_on(splits, judged, {cell.shots for cell in listed}, passed_over)
        for note in (*left_out, *notes, *_about_duplicates(data)):
            say(f"\n  Note: {note}")
        say()
        if len(left) < len(listed):
            say(f"{len(listed) - len(left)} of {len(listed)} cells are done already.")
    context = None
    if left:
        context = Context(
            model_args.model_name_or_path, model_args.model_revision, config, args.learning_rates, args.min_steps
        )
    found = grid.run(context)
    if not first:
        return
    say(f"\nTest accuracy in %, mean over seeds, with 95 % interval over seeds\n\n{summary_table(found)}")
    if note := image_note(found, groups=len(set((data["groups"] or {}).get("test", ())))):
        say(f"\n{note}")
    say(f"\nEvery cell is a line of {folder / RESULTS_FILE}; which images each task had is in {folder / SUBSETS}.")
    with grid.claims.alone("report"):
        _write_report(folder)
    failed = sum(row["status"] == "failed" for row in found)
    if failed:
        raise PartialResult(f"{failed} of {len(listed)} cells failed.", again=True)


def _identity(args, model_args, data_args, config, splits, shifts) -> dict:
    """What results depend on beside method, shots and seed."""
    from ..benchmark.run.shifts import fingerprint_of
    from ..core.repositories import describe_source
    from ..hub.cards import versions
    from ..train.run_folder import DECIDING, IDLE

    plain = json.loads(json.dumps(config.to_dict(), default=str))  # enums become text
    default = {f.name: f.default for f in fields(MMFTConfig)}
    # A cell has its own seed. What has its default is not named, so that results stay valid when an option comes along.
    chosen = {k: v for k, v in plain.items() if v != default.get(k) and (k in DECIDING or not IDLE.fullmatch(k))}
    chosen.pop("seed", None)
    known = versions() | {name: importlib.metadata.version(name) for name in ("peft", "scikit-learn")}
    model, revision = model_args.model_name_or_path, model_args.model_revision
    return {
        "base_model": describe_source(model, revision, "model", offline=True)["name"],
        "base_model_revision": _content_of(model, revision),
        "dataset": describe_source(data_args.dataset_name, data_args.dataset_revision, "dataset", offline=True)["name"],
        "dataset_fingerprint": splits.fingerprint(),
        "shift_splits": {name: fingerprint_of(dataset) for name, dataset in shifts.items()},
        "settings": {**chosen, "learning_rates": args.learning_rates, "min_steps": args.min_steps},
        "versions": {name: known[name] for name in VERSIONED},
    }


def _content_of(model: str, revision: str | None) -> str | None:
    """What tells a model that a name does not: of a folder 16 hex digits of its files' hash, on the Hub the commit."""
    folder = Path(model)
    if folder.is_dir():
        files = sorted([*folder.glob("*.safetensors"), *(folder / name for name in (*MODEL_FILES, ADAPTER_FILES[0]))])
        contents = {path.name: content_hash({"path": str(path)}).hex() for path in files if path.is_file()}
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]
    if model.startswith("builtin/"):
        return None  # of this version of the package
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json", revision=revision)).parent.name
    except Exception:  # what is wrong with it is said where it is loaded
        return revision


def _describe(folder: Path, splits, judged, args, model_args, data_args) -> dict:
    """`data.json` of the grid: as it is there, or made where it is not, or of other data."""
    from ..benchmark.run import data_summary as describe
    from ..benchmark.run.shifts import fingerprint_of
    from ..core.repositories import describe_source
    from ..hub.cards.sources import captioning_cost

    key = {
        "data": splits.fingerprint(),
        "judged": {name: fingerprint_of(dataset) for name, dataset in judged.items()},
        "group_column": args.group_column,
    }
    found = read_json(folder / describe.DATA_FILE)
    if isinstance(found, dict) and found.get("made_from") == key:
        return found
    names = {
        "dataset": describe_source(data_args.dataset_name, data_args.dataset_revision, "dataset", offline=True)["name"],
        "model": describe_source(model_args.model_name_or_path, model_args.model_revision, "model", offline=True)[
            "name"
        ],
    }
    # What else is to be typed for the same data; a report puts it into its command.
    others = {
        f.name: getattr(data_args, f.name) for f in fields(DataArguments) if f.name not in ("dataset_name", "shots")
    }
    defaults = {f.name: f.default for f in fields(DataArguments)}
    typed = {k: v for k, v in others.items() if v != defaults[k]} | ({"allow_fewer": True} if args.allow_fewer else {})
    found = {**names, **describe.describe(splits, judged, args.group_column), "arguments": typed, "made_from": key}
    if found["captions"]:
        cost = None
        if data_args.captions_column in (None, "captions"):  # others were not written by mmft-hf caption
            name, revision = data_args.dataset_name, data_args.dataset_revision
            cost = captioning_cost(
                *((data_args.captions_dataset, None) if data_args.captions_dataset else (name, revision))
            )
        unknown = dict.fromkeys(("captioner", "calls", "cost_usd", "tokens_in", "tokens_out", "seconds"))
        found["captions"] |= cost or unknown
    write_json(folder / describe.DATA_FILE, found, indent=None, ensure_ascii=False, allow_nan=False)
    return found


def _read_pictures(folder: Path, data: dict, left, splits, judged, allow_fewer: bool) -> None:
    """Refuses pictures that cannot be read, of all that the cells left will need; once, and `data.json` says for which."""
    from ..benchmark.run import data_summary as describe
    from ..benchmark.run.checks import refuse_unreadable

    wanted, seen = {f"{cell.shots} shots, seed {cell.seed}" for cell in left}, set(data.get("pictures_read_for", ()))
    if not wanted <= seen:
        refuse_unreadable(splits, judged, left, allow_fewer)
        data = data | {"pictures_read_for": sorted(wanted | seen)}
        write_json(folder / describe.DATA_FILE, data, indent=None, ensure_ascii=False, allow_nan=False)


def _about_duplicates(data: dict) -> list[str]:
    """What pictures in two splits mean, in a sentence."""
    if not data["duplicates_count"]:
        return []
    some = "; ".join(
        f"{images[0]} of {splits[0]} is {images[1]} of {splits[1]}"
        for splits, images in ((d["splits"], d["images"]) for d in data["duplicates"][:3])
    )
    count = data["duplicates_count"]
    return [
        f"{count} {'pictures are' if count > 1 else 'picture is'} in two splits, byte for byte ({some}): what is learnt or chosen "
        "on one is then measured on the other. They stay in; take them out of one split for a fair comparison."
    ]


def _write_report(folder: Path) -> None:
    """Draws the report of a folder of results."""
    from ..benchmark.report import write_report

    say(f"Report: {write_report(folder)}")
