"""The whole captioning job: `caption_dataset` for a dataset in memory, `CaptionWorkflow` from settings to a folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Image

from ..core.arguments import DataArguments
from ..core.console import is_main, many, some
from ..core.errors import PartialResult, UserError, nearest
from ..core.files import CARD_FILE, REFINED_PAGE, STEPS_FILE, keeping
from ..core.markdown import public_name
from ..data.columns import check_plain
from ..data.label_sets import LabelSets
from ..data.labels import labels_of
from ..data.splits import is_text, load_captioned_dataset, load_splits, text_columns
from .arguments import COUNTER, CaptionArguments
from .ask.captioner import Captioner
from .ask.cost import Spending
from .ask.dispatch import Outcome
from .ask.journal_reader import settled_slots
from .ask.journal_table import journal_files
from .ask.limits import Limits
from .ask.plan import Plan, digests, pictures_of
from .ask.processes import Processes
from .judge.checks import CaptionChecker, parse_actions
from .judge.tokens import load_counter
from .split import SplitCaptioner, add_texts, make_checker, new_run_id
from .steps.base import Row, readable
from .steps.representatives import Representatives
from .types import OPEN
from .write.card import CLASS_MARK, caption_card, title
from .write.comparison import refined_page
from .write.dataset import STEP_DETAILS, JournalSource, without_captions
from .write.output_folder import CaptionFolder
from .write.report import caption_report
from .write.statistics import CaptionStatistics


def caption_dataset(
    dataset: Dataset | DatasetDict,
    captioner: Captioner,
    tokenizer=None,
    run_dir: str | Path | None = None,
    *,
    splits: tuple[str, ...] = ("train",),
    limits: Limits | None = None,
    max_cost_usd: float | None = None,
    prices: str | None = None,
    check_actions: Mapping[str, str] | None = None,
    run_id: str | None = None,
    progress: bool = True,
) -> Dataset | DatasetDict:
    """Adds `captions`, `caption_records` and `image_sha256` to a labelled image dataset.

    Answers are stored in `run_dir` as they arrive. Called again, on the same data or on more, it asks only for what is
    missing.

    Args:
        dataset: columns `image` (`Image`) and `label` (`ClassLabel`, or lists of it for several labels per picture), and those
            that the captioner reads. In a `DatasetDict`, `splits` are captioned; the other splits get the same columns without
            captions.
        captioner: see `Captioner`.
        tokenizer (*optional*): of the model that will be trained; counts `clip_tokens` and finds captions over its limit.
        run_dir: folder of the journal; required if a model is asked.
        limits, max_cost_usd, prices: how fast and for how much (see `SplitCaptioner`).
        check_actions: what happens when a check fires (see `CaptionChecker`).
        run_id (*optional*): recorded with every caption; default: the current time.

    Returns:
        The dataset, images with their original bytes. `captions` of a row are its accepted texts, each once;
        `caption_records` lists every try. A failure is a status there, never an exception.

    Raises:
        UserError: no `run_dir`; a missing column; credentials, quota or server: no further call could succeed.
        KeyboardInterrupt: Ctrl-C; what was answered is kept.
    """
    run_id = run_id or (new_run_id() if isinstance(dataset, DatasetDict) else None)

    def caption(split: Dataset) -> Dataset:
        if isinstance(split, Dataset) and (sets := LabelSets.of({"dataset": split})):
            return sets.restored(caption_classes(sets.as_classes(split), captioner.for_several()))
        return caption_classes(split, captioner)

    def caption_classes(split: Dataset, captioner: Captioner) -> Dataset:
        names = _class_names(split)
        checker = make_checker(captioner, names, tokenizer, check_actions)
        if not captioner.asks:
            return add_texts(split, captioner, checker, run_id, progress)
        if run_dir is None:
            raise UserError(
                "run_dir: expected a folder in which answers are kept, found none. Type run_dir='captions'."
            )
        options = (limits, max_cost_usd, prices, run_id)
        with SplitCaptioner(captioner, split, run_dir, checker, *options, progress=progress) as run:
            plan = run.plan()
            outcome = run.fill(plan)
            if outcome.stopped == "user":
                raise KeyboardInterrupt
            if outcome.stopped == "fatal":
                raise UserError(outcome.why)
            return run.read(plan, run.results(plan))

    if not isinstance(dataset, DatasetDict):
        return caption(dataset)
    for name in splits:
        if name not in dataset:
            raise UserError(f"splits: expected splits among {', '.join(dataset)}, found {name!r}.")
    return DatasetDict(
        {n: caption(split) if n in splits else without_captions(split, progress) for n, split in dataset.items()}
    )


def _class_names(dataset: Dataset) -> list[str]:
    """The class names of a dataset that can be captioned; raises `UserError` for any other."""
    check_plain("dataset", dataset)
    for column, kind in (("image", Image), ("label", ClassLabel)):
        if not isinstance(dataset.features.get(column), kind):
            found = ", ".join(f"{name} ({type(f).__name__})" for name, f in dataset.features.items())
            raise UserError(
                f"dataset: expected a column {column} of type {kind.__name__}, found {found}. Rename or cast it, or load the "
                "data with load_captioned_dataset."
            )
    names = dataset.features["label"].names
    for row, label in enumerate(dataset["label"][:]):
        if label is None or not 0 <= label < len(names):
            raise UserError(f"dataset, row {row}: expected a class, found label {label}. Correct the row or remove it.")
    return names


def load_data(data_args: DataArguments) -> tuple[DatasetDict, str, LabelSets | None]:
    """The dataset that the settings name, the name of its training split, and with several labels per picture, their sets.

    Each picture has one class: with several labels, its set of labels.
    """
    options = {k: v for k, v in vars(data_args).items() if k not in ("dataset_name", "dataset_config_name")}
    data = load_captioned_dataset(data_args.dataset_name, data_args.dataset_config_name, **options)
    sets = LabelSets.of(data)
    if sets:
        data = DatasetDict({name: sets.as_classes(split, name) for name, split in data.items()})
    return data, data_args.train_split or ("train" if "train" in data else next(iter(data))), sets


def write_folder(
    folder: CaptionFolder,
    splits: dict,
    captioned: str,
    details: dict,
    source: JournalSource | None = None,
    step_details: Sequence[Mapping] = (),
    sets: LabelSets | None = None,
) -> CaptionStatistics:
    """Writes a captioned dataset with its report and card.

    Args:
        splits: all splits, with the columns of a captioned dataset.
        captioned: the split that the report and the card describe.
        details: content of `captions.json`.
        source (*optional*): gives the report the answers that were not accepted.
        step_details: rows of `steps.parquet`: what steps found out about single captions.
        sets (*optional*): if the classes of `splits` are sets of labels, which are written as lists again.

    Returns:
        The statistics of the captioned split.
    """
    classes, lean = splits[captioned], splits[captioned].select_columns(["label", "image_sha256"])
    if sets:
        splits = {name: sets.restored(split) for name, split in splits.items()}
    statistics = CaptionStatistics(splits[captioned])

    def rejected_text(row: int, position: int) -> str | None:
        found = lean[row]
        texts = source.raw_texts(found, found["image_sha256"]) if source and found["image_sha256"] else []
        return texts[position] if position < len(texts) else None

    def extras(path) -> None:
        caption_report(statistics, path, details, rejected_text)
        if details.get("steps"):
            page = f"{title(details)}: before and after"
            refined_page(path / REFINED_PAGE, classes, page, details, step_details)
        if step_details:
            Dataset.from_list([*step_details], features=STEP_DETAILS).to_parquet(path / STEPS_FILE)
        (path / CARD_FILE).write_text(caption_card(statistics, details, splits), encoding="utf-8")

    folder.write(splits, {**details, "statistics": statistics.figures}, extras)
    if source:
        source.reader.close()
    return statistics


@dataclass
class CaptionResult:
    """The result of a captioning run.

    Args:
        statuses: number of captions by status, over all splits.
        unreadable: number of images that cannot be read.
        outcome: the calls of this run.
        statistics: of the written captions; None if the folder already held exactly this dataset.
    """

    statuses: Counter = field(default_factory=Counter)
    unreadable: int = 0
    outcome: Outcome = field(default_factory=Outcome)
    statistics: CaptionStatistics | None = None

    @property
    def missing(self) -> int:
        """Number of captions that the next run would ask for."""
        return sum(self.statuses[status] for status in OPEN)


class CaptionWorkflow:
    """Everything that `mmft-hf caption` does, without what it prints: from settings to a captioned folder.

    Raises:
        UserError: an unusable setting, column, class or folder. Before any call.
    """

    def __init__(self, data_args: DataArguments, args: CaptionArguments):
        self.data_args, self.args = data_args, args
        self.data, self.train, self.sets = load_data(data_args)
        self.splits = args.split or [self.train]
        for split in self.splits:
            if split not in self.data:
                raise UserError(f"--split: expected one of {', '.join(self.data)}, found {split!r}.")
        if args.representatives is not None and not args.scorer:
            raise UserError(
                "--scorer: expected the model by whose embeddings --representatives are chosen, found none. Type --scorer NAME, for "
                "example google/siglip2-base-patch16-224."
            )
        self.class_names: list[str] = self.data[self.train].features["label"].names
        self.captioner = args.to_captioner(self._text_columns())
        if self.sets:
            self.captioner = self.captioner.for_several()
        self.actions = parse_actions(args.on_check or ())
        self.limits = Limits(args.concurrency, args.requests_per_minute, args.tokens_per_minute, args.max_reasks)
        self.folder = CaptionFolder(args.output_dir)
        self.run_id = new_run_id()
        self.rows = {split: self._rows(split) for split in self.splits}
        self.made_from = self._made_from()

    @cached_property
    def checker(self) -> CaptionChecker:
        tokens, template = load_counter(self.args.model_name_or_path or COUNTER), self.args.class_template
        return make_checker(self.captioner, self.class_names, tokens, self.actions, template=template)

    def _text_columns(self) -> list[str]:
        """The columns of `--captioner columns`: those typed, or the only one there is."""
        if self.args.captioner != "columns":
            return []
        columns, features = self.args.text_columns, self.data[self.train].features
        if not columns:
            columns = text_columns(self.data[self.train])
            columns = [name for name in columns if name != "captions"] or columns
            if len(columns) != 1:
                found = ", ".join(columns) or f"none among {', '.join(features)}"
                raise UserError(
                    f"--text_columns: expected one column of lists of texts, found {found}. Type --text_columns NAME, or "
                    "--captioner openai (or another) to have captions written."
                )
        for column in columns:
            if column in features and not is_text(features[column]):
                raise UserError(
                    f"--text_columns: expected columns of text or of lists of texts, found {column} of {features[column]}."
                )
        return columns

    def _rows(self, split: str) -> set[int] | None:
        """The rows selected by `--shots` and `--classes`; None: all of them."""
        rows = None
        if self.data_args.shots and split == self.train:
            # The same rows that `finetune` draws with this --shots and --shots_seed.
            drawn = load_splits(self.data_args)
            chosen = np.array(drawn.train["source_row"][:])
            rows = set((chosen - np.searchsorted(drawn.unlabelled, chosen)).tolist())  # among the rows with a class
        if self.args.classes:
            names = self.sets.class_names if self.sets else self.class_names
            for name in self.args.classes:
                if name not in names:
                    found = f"{name!r}.{nearest(name, names)}"
                    raise UserError(f"--classes: expected names among {some(names)}, found {found}")
            wanted = {names.index(name) for name in self.args.classes}
            wanted = self.sets.having(wanted) if self.sets else wanted
            of_class = {i for i, label in enumerate(labels_of(self.data[split])) if label in wanted}
            rows = of_class if rows is None else rows & of_class
        return rows if self.args.representatives is None else self._representatives(self.data[split], rows)

    def _representatives(self, split: Dataset, among: set[int] | None) -> set[int]:
        """The rows whose images stand for the others. Loads torch."""
        from .steps.scorer import Scorer

        split = split.select_columns(["image", "label"]).cast_column("image", Image(decode=False))
        numbers = sorted(range(len(split)) if among is None else among)
        own = split.select(numbers)
        found = [(label, digest if isinstance(digest, str) else "") for digest, label in digests(own)]
        order = sorted(range(len(own)), key=lambda i: found[i])
        images = Scorer(self.args.scorer, own.select(order), is_main()).images()
        # Nearly every picture may have a set of labels of its own, so with several labels all of them are chosen from together.
        pools = [0 if self.sets else found[i][0] for i in order]
        rows = [Row(found[i][1] or None, pool, "", "", ()) for i, pool in zip(order, pools, strict=True)]
        chosen = Representatives(self.args.representatives).chosen(rows, images, readable(rows, images))
        return {numbers[order[i]] for i in chosen}

    def _made_from(self) -> dict:
        """What distinguishes this dataset from another one in the same folder."""
        model = self.captioner.model and public_name(self.captioner.model)
        spec = self.captioner.spec({"backend": self.captioner.backend, "model": model})
        found = {"dataset_name": public_name(self.data_args.dataset_name), "split": self.splits}
        if self.data_args.dataset_config_name:
            found["dataset_config_name"] = self.data_args.dataset_config_name
        apart = ("prompts", "sampling", "pictures")
        found["captioner"] = {k: v for k, v in spec.items() if k not in apart}
        return found | {k: spec[k] for k in apart if k in spec}

    def open(self, split: str, **options) -> SplitCaptioner:
        """The captioner of one split. `options` override those of the settings, e.g. `limits` or `progress`."""
        args = self.args
        settings = {"limits": self.limits, "max_cost_usd": args.max_cost_usd, "prices": args.prices}
        settings |= {"run_id": self.run_id, "rows": self.rows[split], "progress": is_main(), **options}
        return SplitCaptioner(self.captioner, self.data[split], args.output_dir, self.checker, **settings)

    def run(self, say: Callable[[str], None] = lambda text: None) -> CaptionResult | None:
        """Captions, or continues to, and writes the folder.

        Args:
            say: prints a line about what begins.

        Returns:
            The result, in the main process; None in the others.

        Raises:
            PartialResult: interrupted by the user; the disk takes no more.
            UserError: no further call can succeed.
        """
        with keeping(self._kept):
            return self._run(say)

    def _kept(self) -> str | None:
        """What is there if the disk takes no more, in a sentence; None if nothing is."""
        journal = self.folder.path / "journal"
        if not journal_files(journal):
            return f"{self.folder.path} has its earlier captions." if self.folder.details() else None
        with suppress(UserError):  # the disk may be too full to read it
            return f"{many(len(settled_slots(journal)), 'answer')} in {journal} stay, and will not be asked for again."
        return f"The answers in {journal} stay, and will not be asked for again."

    def _run(self, say: Callable[[str], None]) -> CaptionResult | None:
        self.folder.claim(self.made_from, self.args.overwrite_output_dir, lambda: pictures_of(self.data))
        result, captioned, fingerprints = CaptionResult(), {}, {}
        if not self.captioner.asks:
            for split in self.splits:
                rows = self.rows[split]
                captioned[split] = add_texts(self.data[split], self.captioner, self.checker, self.run_id, rows=rows)
                fingerprints[split] = captioned[split]._fingerprint
            return self._write(result, captioned, fingerprints)
        processes = Processes(shared=self.captioner.backend == "transformers")
        source, spent, asked = None, Spending(), {}
        for split in self.splits:
            with self.open(split, rank=processes.rank, world=processes.world) as run:
                for note in run.journal.notes:
                    say(f"  {note}")
                plan = run.plan()
                say(f"\n{_begins(split, run, plan)}")
                try:
                    result.outcome += run.fill(plan)
                finally:
                    processes.done(run.folder, split)
                if not is_main():
                    continue
                processes.wait(run.folder, split)
                results = run.results(plan)
                asked = {"requests": run.backend.sampling_fields(), "left_out": run.left_out()}
                result.statuses.update(results.statuses)
                result.unreadable += len(plan.unreadable)
                spent += results.spent
                kept = f"{sum(results.statuses.values()) - results.open:,} of {len(plan.slots):,} captions are in {run.folder}"
                if result.outcome.stopped == "user":
                    raise PartialResult(f"stopped by you; {kept}.", again=True)
                if result.outcome.stopped == "fatal":
                    raise UserError(f"{result.outcome.why.rstrip('.')}. {kept}; the corrected command continues.")
                fingerprints[split] = run.fingerprint(results)
                unchanged = not result.outcome.calls and len(self.splits) == 1 and not self.args.overwrite_output_dir
                if unchanged and self.folder.is_current(self._all_fingerprints(fingerprints), self.made_from):
                    return result
                captioned[split] = run.read(plan, results)
                source = source or run.source(plan, results)
        return self._write(result, captioned, fingerprints, source, spent, asked) if is_main() else None

    def _all_fingerprints(self, fingerprints: dict[str, str]) -> dict[str, str]:
        return fingerprints | {n: d._fingerprint for n, d in self.data.items() if n not in self.splits}

    def _write(
        self,
        result: CaptionResult,
        captioned: dict[str, Dataset],
        fingerprints: dict[str, str],
        source: JournalSource | None = None,
        spent: Spending | None = None,
        asked: Mapping = MappingProxyType({}),
    ) -> CaptionResult:
        splits = {n: captioned.get(n) or without_captions(d, progress=False) for n, d in self.data.items()}
        statuses = dict(result.statuses)
        if self.captioner.asks:
            statuses["unreadable"] = result.unreadable
        details = {
            "made_from": self.made_from,
            "model": self.captioner.model and public_name(self.captioner.model),
            "run_id": self.run_id,
            "checks": self.checker.spec(),
            "statuses": statuses,
            "complete": not result.missing,
            "fingerprints": self._all_fingerprints(fingerprints),
        }
        if self.args.representatives is not None:
            details["representatives"] = {
                "share": self.args.representatives,
                "scorer": public_name(self.args.scorer),
                "images": {split: len(rows) for split, rows in self.rows.items()},
            }
        if self.captioner.asks:
            prompts = self.captioner.prompts
            details["prompt_texts"] = {aspect: prompts.prompt(aspect, CLASS_MARK) for aspect in prompts.aspects}
            details["spent"] = spent.summary()
            details["last_run"] = result.outcome.summary()
            details |= asked
        result.statistics = write_folder(self.folder, splits, self.splits[0], details, source, sets=self.sets)
        return result


def _begins(split: str, run: SplitCaptioner, plan: Plan) -> str:
    line = f"Split {split}: {many(plan.open, 'caption')} to ask for, {len(plan.slots):,} wanted in all"
    if run.world > 1:
        line = f"Split {split}: {len(plan.slots):,} captions wanted, shared by {run.world} processes"
    if plan.unreadable:
        line += f"; {many(len(plan.unreadable), 'image')} cannot be read"
    return line + (f"; prices of {run.price.date}" if run.price and run.price.date and plan.open else "") + "."
