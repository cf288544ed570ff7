"""Captions one split in three steps: plan what the journal lacks, ask for it, read the answers into a dataset."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from datasets import Dataset, Image
from datasets.fingerprint import Hasher
from tqdm.auto import tqdm

from ..core.console import plain
from ..core.errors import UserError
from ..data.images import BadImage, original_bytes
from .ask.captioner import Captioner
from .ask.cost import CostMeter, price_of
from .ask.dispatch import Outcome
from .ask.driver import Driver
from .ask.journal import Journal
from .ask.journal_reader import JournalReader, left_out, settled_slots, spent_dollars
from .ask.limits import Limits
from .ask.pictures import prepare, sha256
from .ask.plan import Keys, Plan, WorkItem, make_plan
from .ask.running import finished
from .judge.checks import CaptionChecker
from .types import FieldRefused
from .write.dataset import JournalSource, Results, TextSource, add_captions, results_of


def new_run_id() -> str:
    """The current time in UTC to the millisecond, e.g. `20261130T051133123Z`."""
    return datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S%fZ")[:-4] + "Z"


def make_checker(
    captioner: Captioner, class_names: list[str], tokenizer=None, actions: Mapping[str, str] | None = None, **options
) -> CaptionChecker:
    """The checks for a captioner. Texts that people wrote are counted and flagged, but never changed."""
    words = captioner.prompts.words
    return CaptionChecker(class_names, tokenizer, words, actions=actions, clean=captioner.asks, **options)


def add_texts(
    dataset: Dataset,
    captioner: Captioner,
    checker: CaptionChecker,
    run_id: str | None = None,
    progress: bool = True,
    rows: Container[int] | None = None,
) -> Dataset:
    """Captions a split from its text columns or from class templates (`columns`, `template`), without a model."""
    undecoded = dataset.cast_column("image", Image(decode=False))
    source = TextSource(undecoded, captioner, checker, run_id)
    asked = None if rows is None else sorted(rows)
    fingerprint = Hasher.hash((undecoded._fingerprint, captioner.spec(), checker.spec(), run_id, asked, 1))
    return add_captions(undecoded, source, fingerprint, progress, rows)


@dataclass(eq=False)
class SplitCaptioner:
    """Captions one split with a model. Use it as a context manager: it holds the lock of the journal.

    Args:
        captioner: with a backend that asks a model.
        dataset: columns `image` and `label` (`ClassLabel`).
        run_dir: folder whose subfolder `journal/` keeps the answers.
        checker: see `CaptionChecker`.
        limits: how fast the backend is called.
        max_cost_usd: most US dollars that all runs in this folder may cost together.
        prices (*optional*): YAML file of prices, which override the built-in table.
        run_id: recorded with every caption; default: the current time.
        rows: the rows to caption; None: all. Results of other rows from earlier runs are still read.
        rank, world: index of this process, and the number of processes that share the work.
        progress: whether to show progress bars.

    Raises:
        UserError: a cost limit for a model of unknown price; another run is at work in the folder.
    """

    captioner: Captioner
    dataset: Dataset
    run_dir: str | Path
    checker: CaptionChecker
    limits: Limits | None = None
    max_cost_usd: float | None = None
    prices: str | None = None
    run_id: str | None = None
    rows: Container[int] | None = None
    rank: int = 0
    world: int = 1
    progress: bool = True

    def __post_init__(self):
        self.dataset = self.dataset.cast_column("image", Image(decode=False))
        self.limits, self.run_id = self.limits or Limits(), self.run_id or new_run_id()
        model, local = self.captioner.model, self.captioner.backend == "transformers"
        self.price = None if local else price_of(model, self.prices)
        if self.max_cost_usd is not None and self.price is None:
            free = " A model in this process costs nothing." if local else ""
            raise UserError(
                f"--max_cost_usd: expected a model whose price is known, found {model!r}, which is not in the price table.{free} "
                "Type --prices FILE.yaml with its price, or leave --max_cost_usd out."
            )
        self.backend = self.captioner.open(self.limits.concurrency)
        self.keys = Keys(self.captioner, self.backend.identity())
        self.folder = Path(self.run_dir) / "journal"

    def __enter__(self) -> SplitCaptioner:
        self.journal = Journal(self.folder, self.rank)
        return self

    def __exit__(self, *_) -> None:
        self.journal.close()

    def plan(self) -> Plan:
        """Reads every picture once to hash it, and finds what the journal lacks. Makes no call and takes no lock."""
        done = settled_slots(self.folder, self.captioner.sampling.max_tokens)
        return make_plan(self.dataset, self.keys, done, self.rows, (self.rank, self.world), self.progress)

    def sizes(self, items: Iterable[WorkItem]) -> list[tuple[int, int]]:
        """Width and height in pixels of the pictures as they would be sent, without the unreadable ones."""
        found = []
        for item in items:
            with suppress(BadImage):
                picture = prepare(original_bytes(self.dataset[item.row]["image"]), self.captioner.pictures)
                found.append((picture.width, picture.height))
        return found

    def fill(self, plan: Plan) -> Outcome:
        """Asks for what is missing. The first Ctrl-C waits for the calls in flight, the second gives them up.

        Raises:
            UserError: the environment variable of the key is not set.
            JournalError: an answer cannot be stored.
        """
        if not plan.items:
            return Outcome()
        self.backend.check_key()
        meter = CostMeter(self.price, spent_dollars(self.folder), self.max_cost_usd)
        every = 0.2 if sys.stderr.isatty() else 10
        options = {"desc": "Captions", "unit": " captions", "disable": not self.progress, "mininterval": every}
        with tqdm(total=plan.open, **options) as bar:

            def done(outcome: Outcome, captions: int) -> None:
                state = [f"${outcome.cost:.4f}"] if self.price else []
                state += [f"{kind} {count}" for kind, count in outcome.failures.most_common(3)]
                bar.set_postfix_str(", ".join(state), refresh=False)
                bar.update(captions)

            def without(error: FieldRefused) -> None:
                self.journal.put_left_out(self.run_id, self.captioner.model, error.field, error.instead, str(error))
                bar.write(plain(self._says(error)))

            def note(text: str) -> None:
                bar.write(plain(f"Note: {text}"))

            for row in self.left_out():
                if row["run_id"] == self.run_id:  # refused earlier in this run: for another split
                    self.backend.leave_out(FieldRefused(row["said"], row["field"], row["instead"]))
            asked = (self.captioner, self.keys, self.backend, self.journal, self.checker, self.dataset)
            driver = Driver(*asked, self.limits, meter, self.run_id, done, without, note)
            return finished(driver, lambda: driver.run(plan), bar.write)

    def _says(self, error: FieldRefused) -> str:
        """Says that a field is left out, and how to ask without it from the start."""
        if error.instead:
            options = {**self.captioner.sampling.options, error.field: None}
            options[error.instead] = self.captioner.sampling.max_tokens
            what, flag = f"{error.instead} is sent instead of {error.field}", shlex.quote(json.dumps(options))
            return f"Note: {what}. {error} To ask so from the start: --request_options {flag}"
        flag = " ".join([*self.captioner.sampling.omit, error.field])
        return f"Note: {error.field} is left out from now on. {error} To leave it out from the start: --omit {flag}"

    def left_out(self) -> list[dict]:
        """The fields that runs left out of their requests to this model, because the server refused them."""
        return [row for row in left_out(self.folder) if row["model"] == self.captioner.model]

    def results(self, plan: Plan) -> Results:
        """What all processes have stored for the whole plan."""
        found = results_of(self.folder, plan.slots, plan.others)
        # The digest covers the pictures, since files that a dataset names may change without it, and the rows that
        # were asked for, since those without a result get a record too.
        return replace(found, digest=sha256(f"{plan.digest} {found.digest}".encode()))

    def fingerprint(self, results: Results) -> str:
        """Changes with the pictures, the captioner, the checks and the results of this plan, and with nothing else."""
        spec = self.captioner.spec(self.backend.identity())
        return Hasher.hash((self.dataset._fingerprint, spec, self.checker.spec(), results.digest, 1))

    def source(self, plan: Plan, results: Results) -> JournalSource:
        """Looks up the records of a row."""
        names = self.dataset.features["label"].names
        return JournalSource(self.keys, JournalReader(self.folder), self.checker, names, plan.slots, results.repeated)

    def read(self, plan: Plan, results: Results) -> Dataset:
        """The dataset with the columns `captions`, `caption_records` and `image_sha256` (see `add_captions`)."""
        source = self.source(plan, results)
        try:
            return add_captions(self.dataset, source, self.fingerprint(results), self.progress)
        finally:
            source.reader.close()
