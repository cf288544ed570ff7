"""`run_benchmark`: the whole of `mmft-hf benchmark` as a function."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ...core.arguments import ModelArguments
from ...core.console import many, say, some
from ...core.errors import UserError, nearest
from ...core.files import keeping
from ...core.launch import alone_in
from ...data.labels import labels_of, refuse_several
from ...data.splits import load_splits, load_test_split
from ...train.config import MMFTConfig
from ...train.selection import check_metric
from ..report.page import DRAWN, FIGURES, PAGE, check_packages, uneven, write_report
from ..report.refining import refining
from ..report.statistics import gather
from .arguments import BenchmarkArguments, BenchmarkData
from .budgets import AUTHORS, DECIDED, EQUAL
from .context import Context
from .data_checks import check_labels, notes_on, refuse_unreadable, runnable, unreadable
from .data_summary import DATA_FILE, groups_of, load_or_summarize, write_summary
from .grid import Grid, cells
from .identity import identity_of
from .methods import AT, METHODS, method_named, mixes, weighs
from .processes import Claims, count_of_processes, number_of_process
from .protocol import Shots, make_task, parse_shots
from .refined import check_sources, summary_of, with_refined
from .results import CLAIMS, FULL, RESULTS_FILE, SUBSETS, Results, read_results
from .summary import image_note, in_order, shots_name
from .trainings import none_without_captions

OLD_FILES = ("maps.json", f"{FIGURES}/map.png", f"{FIGURES}/cost.png")  # version 0.1 wrote them


@dataclass
class BenchmarkResult:
    """The results of a grid.

    Args:
        folder: of results, subsets and report.
        report: the page; only the first process of a launcher writes it, and the others have None.
        rows: one for each cell, as in `results.jsonl`.
        note: on the sampling error of the test images, for a reader of a table of the rows.
        uneven: why the mean over the classes comes first; empty where it does not.
        refining: whether refining paid, a sentence for each refined folder.
    """

    folder: Path
    report: Path | None
    rows: list[dict]
    note: str
    uneven: str = ""
    refining: list[str] = field(default_factory=list)


def run_benchmark(
    args: BenchmarkArguments,
    model_args: ModelArguments,
    data_args: BenchmarkData,
    config: MMFTConfig,
    say: Callable[[str], None] = say,
) -> BenchmarkResult:
    """Runs the cells of a grid that have no result yet, and writes the report.

    Every cell is a method at a number of shots with a seed. Its result is a line of `results.jsonl` in `config.output_dir`;
    the images that each task had are in `subsets/`. Several processes may share a folder.

    Args:
        say: prints a line of progress.

    Raises:
        UserError: a setting that is wrong or has no effect here, data that cannot be judged on, results of another identity,
            another benchmark at work in the folder.
        PartialResult: the disk takes no more.
    """
    check_supported(args, model_args, config)
    shots = parse_shots(data_args.shots)
    if not cells(args.methods, shots, args.seeds):
        raise UserError(
            f"--shots: expected a number above 0 for {', '.join(args.methods)}, found {' '.join(data_args.shots)}. Type --shots 1 4, or "
            "a method that needs no images: --methods zs."
        )
    check_labels(data_args.whole, args.shift_splits or [])
    splits = load_splits(data_args.whole)
    refuse_several(splits.train, "benchmark")
    splits = with_refined(splits, args.sources, records=bool(config.sample_weight or config.text_mix))
    check_metric(config.metric_for_best_model, splits.class_names)
    methods, left_out = runnable(args.methods, splits, data_args.dataset_name)
    grid_cells = cells(methods, shots, args.seeds)
    check_recipes(args.budget, methods, shots, labels_of(splits.train))
    shifts = {
        name: load_test_split(replace(data_args.whole, test_split=name), splits.class_names)
        for name in args.shift_splits or []
    }
    judged = {"test": splits.test, **shifts}
    groups_of(judged, args.group_column)  # raises an error if there is no such column
    identity = identity_of(args, model_args, data_args, config, splits, shifts)
    folder, skip = Path(config.output_dir), config.on_bad_image == "skip"
    # The same command in a second terminal shares the work; another benchmark would mix its results with these.
    same = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    with alone_in(folder, same), keeping(lambda: _kept(folder)):
        if config.overwrite_output_dir:
            for n in {cell.shots for cell in grid_cells}:
                make_task(splits, n, 0, args.allow_fewer)  # a grid that cannot run deletes nothing
            delete_benchmark(folder)
        grid = Grid(grid_cells, splits, folder, identity, shifts, args.allow_fewer, skip, say)
        left = grid.open_cells()
        with Claims(folder / CLAIMS).alone("data"):
            summary = load_or_summarize(folder, splits, judged, args, data_args, identity)
            wanted = {f"{cell.shots} shots, seed {cell.seed}" for cell in left}
            if new := {str(cell) for cell in grid_cells} - set(summary.get("cells", ())):
                summary = summary | {"cells": sorted({*summary.get("cells", ()), *new})}
                write_summary(folder, summary)
            new = {name: summary_of(splits, name, place) for name, place in args.sources.items()}
            if new and (found := {**summary.get("refined", {}), **new}) != summary.get("refined"):
                summary = summary | {"refined": found}
                write_summary(folder, summary)
            read = set(summary.get("pictures_read_for", ()))  # so each picture is read once
            if not skip and not wanted <= read:
                refuse_unreadable(splits, judged, left, args.allow_fewer)
                write_summary(folder, summary | {"pictures_read_for": sorted(wanted | read)})
        first = number_of_process() == 0
        if first:
            count = many(len(methods), "method")
            images = {"train": splits.train, "validation": splits.validation, **judged}
            say(f"Comparing {count} on {data_args.dataset_name} with {model_args.model_name_or_path}\n")
            say(f"  classes  {len(splits.class_names)}")
            say(f"  images   {', '.join(f'{len(dataset):,} {name}' for name, dataset in images.items())}")
            seeds = " ".join(map(str, args.seeds))
            say(f"  cells    {len(grid_cells)}: {count}, shots {' '.join(data_args.shots)}, seeds {seeds}")
            if args.budget != EQUAL:
                say(f"  budget   {args.budget}")
            say(f"  output   {folder}")
            skipped = {name: unreadable(name, dataset) for name, dataset in judged.items()} if skip and left else {}
            for note in left_out + notes_on(splits, summary, {cell.shots for cell in grid_cells}, skipped):
                say(f"\n  Note: {note}")
            say("")
            if len(left) < len(grid_cells):
                say(f"{len(grid_cells) - len(left)} of {len(grid_cells)} cells are done already.")
        context = None
        if left:
            model, revision = model_args.model_name_or_path, model_args.model_revision
            rates, pickles = args.learning_rates, model_args.allow_pickle
            context = Context(model, revision, config, rates, args.min_steps, pickles, args.budget)
        rows = grid.run(context)
        page, answers = None, []
        if first:
            with grid.claims.alone("report"):
                page = write_report(folder)
            if args.sources:
                answers = [arm.headline for arm in refining(gather(read_results(folder / RESULTS_FILE), folder))]
        groups = (summary["groups"] or {}).get("test", ())
        return BenchmarkResult(folder, page, rows, image_note(rows, len(set(groups))), uneven(summary), answers)


def _kept(folder: Path) -> str | None:
    """What an interrupted benchmark leaves, in a sentence; None if it has not begun."""
    path = folder / RESULTS_FILE
    return f"{many(len(Results(path).refresh()), 'result')} in {path} stay." if path.is_file() else None


def check_supported(args: BenchmarkArguments, model_args: ModelArguments, config: MMFTConfig) -> None:
    """Raises `UserError` for an unknown method, a missing package, or a setting that has no effect in a benchmark."""
    check_packages()
    check_budget(args, config)
    for name in args.methods:
        if name.partition(AT)[0] not in METHODS:
            raise UserError(f"--methods: found {name!r}.{nearest(name, METHODS)} Expected one of {', '.join(METHODS)}.")
    check_sources(args.methods, args.sources)
    check_weighted(args.methods, config.sample_weight)
    check_mixed(args.methods, config.text_mix)
    towers = "A method says what it trains: --methods mmft-lora."
    no_model = "A benchmark keeps and publishes no model, and an interrupted one continues by itself. Leave it out."
    prototypes = (  # an epoch must be selected by the prototypes that are judged
        "A method says what images are compared with: --methods mmft-train-captions for the class template, flyp-ens for "
        "several. Leave it out."
    )
    settings = vars(model_args) | vars(config)
    for name, expected, why in (
        ("vision_tower", "full", towers),
        ("text_tower", "full", towers),
        ("push_to_hub", None, no_model),
        ("resume_from_checkpoint", None, no_model),
        ("data_seed", None, "Each of --seeds draws an order, crops and captions of its own. Leave it out."),
        ("prototypes", "captions", prototypes),
        ("tune", None, "Type --learning_rates with the rates that each method may choose from."),
    ):
        found = settings[name]
        if found is not None and found is not False and found != expected:
            raise UserError(f"--{name}: expected {expected or 'nothing'}, found {found}. {why}")


def check_weighted(methods: Sequence[str], setting: str | None) -> None:
    """Raises `UserError` unless there is a score exactly where a method weighs captions by one."""
    weighted = [name for name in methods if weighs(name)]
    if weighted and not setting:
        raise UserError(
            f"--methods {weighted[0]}: expected the score by which captions count, found none. Type --sample_weight score:clip_gain, or "
            "another score that mmft-hf caption refine wrote."
        )
    if setting and not weighted:
        raise UserError(
            f"--sample_weight: expected a method that weighs captions, found none, with {setting}. Type --methods mmft mmft-weighted."
        )


def check_mixed(methods: Sequence[str], mix: Sequence[str] | None) -> None:
    """Raises `UserError` unless there is a mix exactly where a method draws texts by one."""
    mixed = [name for name in methods if mixes(name)]
    if mixed and not mix:
        raise UserError(f"--methods {mixed[0]}: expected the mix of texts, found none. Type --text_mix template=0.2.")
    if mix and not mixed:
        raise UserError(
            f"--text_mix: expected a method that draws texts by it, found none, with {' '.join(mix)}. Type --methods mmft mmft-text-mix."
        )


def check_budget(args: BenchmarkArguments, config: MMFTConfig) -> None:
    """Raises `UserError` for settings that the budget decides."""
    if args.budget == EQUAL:
        return
    what = f"with --budget {args.budget}, which decides it. Leave it out."
    if args.min_steps:
        raise UserError(f"--min_steps: expected 0, found {args.min_steps}, {what}")
    default = type(config)(config.output_dir, use_cpu=config.use_cpu)  # some defaults depend on the device
    for name in DECIDED[args.budget]:
        if (found := getattr(config, name)) != getattr(default, name):
            raise UserError(f"--{name}: expected nothing, found {getattr(found, 'value', found)}, {what}")
    rates = args.learning_rates
    if rates and args.budget == AUTHORS:
        raise UserError(f"--learning_rates: expected nothing, found {some(rates)}, {what}")
    if rates and len(set(rates)) != 2:
        raise UserError(
            f"--learning_rates: expected two numbers with --budget long, found {some(rates)}. Type two of them."
        )


def check_recipes(budget: str, methods: Sequence[str], shots: Sequence[Shots], labels: np.ndarray) -> None:
    """Raises `UserError` where `authors` is asked of methods whose authors say nothing.

    Args:
        labels (`(n,)`): of the training images.
    """
    if budget != AUTHORS:
        return
    counts, refused = np.bincount(labels), []
    for name in methods:
        training = method_named(name).training
        if training in (None, none_without_captions):
            continue
        if training.recipe is None:
            refused.append(f"{name} (a variant of our own, or one whose authors' numbers are not known)")
            continue
        for n in in_order(n for n in shots if n != 0):
            images = len(labels) if n == FULL else int(np.minimum(counts, n).sum())
            if why := training.recipe.refusal(n, images):
                refused.append(f"{name} with {shots_name(n)} ({why})")
    if refused:
        raise UserError(
            f"--budget authors: expected methods whose authors say how they train, found others: {'; '.join(refused)}. Leave them out "
            "of --methods or --shots, or type --budget equal or long."
        )


def delete_benchmark(folder: Path) -> None:
    """Deletes results, subsets and report of an earlier benchmark, and no other file.

    The lock files stay: they are empty, and a process that waits for one would wait forever.

    Raises:
        UserError: other processes work in the folder; its `results.jsonl` is not that of a benchmark.
    """
    what = f"--overwrite_output_dir true: expected one process at {folder}, found"
    if count_of_processes() > 1:
        raise UserError(
            f"{what} {count_of_processes()}, which would delete each other's results. Type another --output_dir, or delete it "
            "beforehand."
        )
    if not read_results(folder / RESULTS_FILE):
        return
    claims = Claims(folder / CLAIMS)
    with ExitStack() as held:
        for lock in sorted(claims.folder.glob("*.lock")):
            if not held.enter_context(claims.take(lock.stem)):
                raise UserError(f"{what} another one at {lock.stem}. Wait for its end, or type another --output_dir.")
        paths = [folder / name for name in (RESULTS_FILE, DATA_FILE, PAGE, *OLD_FILES)]
        paths += [
            *(folder / SUBSETS).glob("shots-*_seed-*.json"),
            *(folder / FIGURES / f"{name}.png" for name in DRAWN),
        ]
        for path in paths:
            path.unlink(missing_ok=True)
        for inside in (folder / SUBSETS, folder / FIGURES):
            if inside.is_dir() and not any(inside.iterdir()):
                inside.rmdir()
