"""A captioning run over one split: plan, fill, read. `caption_dataset` does the three, as the command line does."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Image
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from ..core.errors import UserError
from ..data.images import BadImage, original_bytes
from .ask.captioner import Captioner
from .ask.cost import CostMeter, price_of
from .ask.dispatch import Outcome
from .ask.driver import Driver
from .ask.journal import Journal, JournalReader, settled_slots, spent_dollars
from .ask.limits import Limits
from .ask.pictures import prepare, sha256
from .ask.plan import Keys, Plan, WorkItem, make_plan
from .judge.checks import CaptionChecker
from .write.dataset import JournalSource, Results, add_captions, results_of, text_source, without_captions


def new_run_id() -> str:
    """Date and time, in UTC."""
    return datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S%fZ")[:-4] + "Z"


class CaptionRun:
    """One split, one captioner, one folder. Use it as a context manager: it holds the journal's lock.

    Args:
        captioner: with a backend that asks a model.
        dataset: columns `image` and `label` (`ClassLabel`).
        run_dir: folder; the journal is in `journal/` in it.
        checker: see `CaptionChecker`.
        limits: how fast.
        max_cost_usd: dollars that all runs in this folder may cost together.
        prices (*optional*): YAML file of prices that win over the built-in table.
        rows: that are asked for; None: all. Results of other rows, from earlier runs, are read all the same.
        rank, world: this process and how many share the work.

    Raises:
        UserError: a limit on the cost of a model whose price is unknown; another run at work in the folder.
    """

    def __init__(
        self,
        captioner: Captioner,
        dataset: Dataset,
        run_dir: str | Path,
        checker: CaptionChecker,
        limits: Limits | None = None,
        max_cost_usd: float | None = None,
        prices: str | None = None,
        run_id: str | None = None,
        rows: Container[int] | None = None,
        rank: int = 0,
        world: int = 1,
        progress: bool = True,
    ):
        self.captioner, self.checker, self.limits = captioner, checker, limits or Limits()
        self.dataset = dataset.cast_column("image", Image(decode=False))
        self.run_id, self.rows, self.rank, self.world = run_id or new_run_id(), rows, rank, world
        self.progress = progress
        self.price = None if captioner.backend == "transformers" else price_of(captioner.model, prices)
        if max_cost_usd is not None and self.price is None:
            free = " A model in this process costs nothing." if captioner.backend == "transformers" else ""
            raise UserError(
                f"--max_cost_usd: expected a model whose price is known, found {captioner.model!r}, which is not in the "
                f"price table.{free} Type --prices FILE.yaml with its price, or leave --max_cost_usd out."
            )
        self.max_cost_usd = max_cost_usd
        self.backend = captioner.open(self.limits.concurrency)
        self.keys = Keys(captioner, self.backend.identity())
        self.folder = Path(run_dir) / "journal"
        self.journal: Journal | None = None

    def __enter__(self) -> CaptionRun:
        self.journal = Journal(self.folder, self.rank)
        return self

    def __exit__(self, *_) -> None:
        if self.journal:
            self.journal.close()
            self.journal = None

    def plan(self) -> Plan:
        """Reads every picture once, for its sha256, and finds what the journal lacks. Makes no call."""
        done = settled_slots(self.folder, self.captioner.sampling.max_tokens)
        with tqdm(total=len(self.dataset), desc="Planning", unit=" images", disable=not self.progress) as bar:
            return make_plan(self.dataset, self.keys, done, self.rows, (self.rank, self.world), bar.update)

    def sizes(self, jobs: Iterable[WorkItem]) -> list[tuple[int, int]]:
        """Width and height in pixels of what would be sent for these; unreadable pictures are left out."""
        found = []
        for job in jobs:
            with suppress(BadImage):
                picture = prepare(original_bytes(self.dataset[job.row]["image"]), self.captioner.pictures)
                found.append((picture.width, picture.height))
        return found

    def fill(self, plan: Plan) -> Outcome:
        """Asks for what is missing. Ctrl-C once: waits for the calls in flight; twice: gives them up.

        Raises:
            UserError: the key's variable is not set.
            JournalError: an answer cannot be kept.
        """
        if not plan.items:
            return Outcome()
        self.backend.check_key()
        meter = CostMeter(self.price, spent_dollars(self.folder), self.max_cost_usd)
        with tqdm(
            total=plan.open,
            desc="Captions",
            unit=" captions",
            disable=not self.progress,
            mininterval=0.2 if sys.stderr.isatty() else 10,
        ) as bar:

            def done(outcome: Outcome, captions: int) -> None:
                bar.set_postfix_str(self._state(outcome), refresh=False)
                bar.update(captions)

            driver = Driver(
                self.captioner,
                self.keys,
                self.backend,
                self.journal,
                self.checker,
                self.dataset,
                self.limits,
                meter,
                self.run_id,
                done,
            )
            return _run(driver, plan, bar.write)

    def _state(self, outcome: Outcome) -> str:
        parts = [f"${outcome.cost:.4f}" if self.price else ""]
        parts += [f"{kind} {count}" for kind, count in outcome.failures.most_common(3)]
        return ", ".join(part for part in parts if part)

    def results(self, plan: Plan) -> Results:
        """What all processes have for the whole plan."""
        found = results_of(self.folder, plan.slots, plan.others)
        # Files that a data set names may change without it, and rows that were asked for without a result have a record.
        return replace(found, digest=sha256(f"{plan.digest} {found.digest}".encode()))

    def fingerprint(self, results: Results) -> str:
        """Changes with the pictures, the captioner, the checks and the results of this plan, and with nothing else."""
        spec = self.captioner.spec(self.backend.identity())
        return Hasher.hash((self.dataset._fingerprint, spec, self.checker.spec(), results.digest, 1))

    def source(self, plan: Plan, results: Results) -> JournalSource:
        """The records of each row."""
        names = self.dataset.features["label"].names
        return JournalSource(self.keys, JournalReader(self.folder), self.checker, names, plan.slots, results.repeated)

    def read(self, plan: Plan, results: Results) -> Dataset:
        """The data set with the contract's columns (see `add_captions`)."""
        source = self.source(plan, results)
        try:
            return add_captions(self.dataset, source, self.fingerprint(results), self.progress)
        finally:
            source.reader.close()


def _run(driver: Driver, plan: Plan, write: Callable[[str], None]) -> Outcome:
    """Runs the driver to its end; in a thread of its own where an event loop runs already, as in a notebook."""
    loop, pressed = None, 0

    def stop() -> None:
        write("Stopping: answers on their way are waited for and kept. Press Ctrl-C again to give them up.")
        driver.stop("user", "stopped by you")

    def interrupt(*_) -> None:  # prints nothing itself: the signal may have come in the middle of printing
        nonlocal pressed
        pressed += 1
        loop.call_soon_threadsafe(stop if pressed == 1 else driver.drop)

    async def main() -> Outcome:
        nonlocal loop
        loop, before = asyncio.get_running_loop(), {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return await driver.run(plan)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main())
    found, finished = [], threading.Event()

    def work() -> None:
        try:
            found.append(asyncio.run(main()))
        except BaseException as error:
            found.append(error)
        finally:
            finished.set()

    threading.Thread(target=work).start()
    while not finished.is_set():
        try:
            finished.wait()  # `join`, once interrupted, may take a thread that works for one that ended
        except KeyboardInterrupt:
            with contextlib.suppress(RuntimeError):  # it has just come to its end
                interrupt()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


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
    """Adds `captions`, `caption_records` and `image_sha256` to a labelled image data set.

    Answers are kept in `run_dir` as they come: called again, on the same data or on more, it asks only for what is missing.

    Args:
        dataset: columns `image` (`Image`) and `label` (`ClassLabel`), and those that the captioner reads. Of a
            `DatasetDict`, `splits` are captioned; the others get the same columns with nothing in them.
        captioner: see `Captioner`.
        tokenizer (*optional*): of the model that will be trained; counts `clip_tokens` and finds captions over its limit.
        run_dir: folder of the journal; needed where a model is asked.
        limits, max_cost_usd, prices: how fast and for how much (see `CaptionRun`).
        check_actions: what happens where a check fires (see `CaptionChecker`).
        run_id (*optional*): recorded with every caption; default: the time.

    Returns:
        The data set, images with their original bytes. Each row's `captions` are its accepted texts, each once;
        `caption_records` has every try. What failed is a status there, never an exception.

    Raises:
        UserError: no `run_dir`; a missing column; credentials, quota, server: no further call could succeed.
        KeyboardInterrupt: Ctrl-C; what was answered is kept.
    """
    if isinstance(dataset, DatasetDict):
        for split in splits:
            if split not in dataset:
                raise UserError(f"splits: expected splits among {', '.join(dataset)}, found {split!r}.")
        options = {
            "limits": limits,
            "max_cost_usd": max_cost_usd,
            "prices": prices,
            "check_actions": check_actions,
            "run_id": run_id or new_run_id(),
            "progress": progress,
        }
        return DatasetDict(
            {
                name: caption_dataset(split, captioner, tokenizer, run_dir, **options)
                if name in splits
                else without_captions(split, progress)
                for name, split in dataset.items()
            }
        )
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
    checker = make_checker(captioner, names, tokenizer, check_actions)
    if not captioner.asks:
        return caption_with_texts(dataset, captioner, checker, run_id, progress)
    if run_dir is None:
        raise UserError("run_dir: expected a folder, where every answer is kept as it comes. Type run_dir='captions'.")
    options = (limits, max_cost_usd, prices, run_id)
    with CaptionRun(captioner, dataset, run_dir, checker, *options, progress=progress) as run:
        plan = run.plan()
        outcome = run.fill(plan)
        if outcome.stopped == "user":
            raise KeyboardInterrupt
        if outcome.stopped == "fatal":
            raise UserError(outcome.why)
        return run.read(plan, run.results(plan))


def make_checker(
    captioner: Captioner, class_names: list[str], tokenizer=None, actions: Mapping[str, str] | None = None
) -> CaptionChecker:
    """The checks for a captioner: texts that people wrote are counted and flagged, never changed."""
    words = captioner.prompts.words
    return CaptionChecker(class_names, tokenizer, words=words, actions=actions, clean=captioner.asks)


def caption_with_texts(
    dataset: Dataset,
    captioner: Captioner,
    checker: CaptionChecker,
    run_id: str | None = None,
    progress: bool = True,
    rows: Container[int] | None = None,
) -> Dataset:
    """`caption_dataset` for `columns` and `template`, which ask nobody."""
    undecoded = dataset.cast_column("image", Image(decode=False))
    source = text_source(undecoded, captioner, checker, run_id)
    asked = None if rows is None else sorted(rows)
    fingerprint = Hasher.hash((undecoded._fingerprint, captioner.spec(), checker.spec(), run_id, asked, 1))
    return add_captions(undecoded, source, fingerprint, progress, rows)
