"""Asks the questions of steps: several roles, one journal, one limit of dollars."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Image
from tqdm.auto import tqdm

from ..core.console import many, plain
from ..core.errors import PartialResult, UserError
from ..core.markdown import public_name
from ..data.images import BadImage, stored_bytes
from .apply import Asked
from .ask.dispatch import Outcome
from .ask.driver import Gone
from .ask.journal import Journal
from .ask.journal_reader import by_slot, read_rows, settled_slots
from .ask.limits import Limits
from .ask.pictures import sha256
from .ask.questions import QuestionDriver
from .ask.roles import Role
from .ask.running import finished
from .judge.checks import CaptionChecker
from .steps.base import Row, Step
from .types import FieldRefused


class PicturesOfDataset:
    """The bytes of the pictures of a dataset by sha256, read when they are needed.

    Args:
        images: column `image`, not decoded.
        hashes: of each row; None if it cannot be read.
    """

    def __init__(self, images: Dataset, hashes: Sequence[str | None]):
        self._images = images.select_columns("image").cast_column("image", Image(decode=False))
        self._rows = {digest: row for row, digest in enumerate(hashes) if digest}

    def __call__(self, digest: str) -> bytes:
        """Raises `Gone` if it cannot be read, or differs from what it was."""
        try:
            data = stored_bytes(self._images[self._rows[digest]]["image"])
        except (BadImage, KeyError) as error:
            raise Gone(str(error)) from error
        if sha256(data) != digest:
            raise Gone("expected the picture that was planned, found that it has changed since")
        return data


class Asker:
    """Asks for `apply_steps`. Use it as a context manager: it holds the lock of the journal.

    Args:
        roles: who answers.
        data: the bytes of a picture, by its sha256.
        run_dir: folder whose subfolder `journal/` keeps the answers.
        checker: checks answers that are captions.
        progress: whether to show progress bars.
        steps: all that it will be called with, in order. A model in this process stays loaded as long as one of them asks it.

    Attributes:
        outcome: the calls of this run.
        open: number of questions without an answer that the next run asks again.
    """

    def __init__(
        self,
        roles: Mapping[str, Role],
        data: Callable[[str], bytes],
        run_dir: str | Path,
        checker: CaptionChecker,
        limits: Limits,
        run_id: str,
        progress: bool = True,
        steps: Sequence[Step] = (),
    ):
        self.roles, self.data, self.checker, self.limits = roles, data, checker, limits
        self.run_id, self.progress = run_id, progress
        self.folder = Path(run_dir) / "journal"
        self.outcome, self.open = Outcome(), 0
        self._seen: set[bytes] = set()
        self._to_come = [step for step in steps if step.roles()]

    def __enter__(self) -> Asker:
        self.journal = Journal(self.folder)
        self._known = {bytes.fromhex(row["slot"]) for row in read_rows(self.folder, ("slot",))}
        return self

    def __exit__(self, *_) -> None:
        self.journal.close()

    def digest(self) -> str:
        """Of all answers that the journal holds."""
        found = hashlib.sha256()
        for _, rows in by_slot(self.folder, ("slot", "key", "status", "pending", "reask", "updated_at", "raw_text")):
            for row in rows:
                said = sha256(f"{row['raw_text']}".encode())
                found.update(f"{row['key']} {row['status']} {row['pending']} {said}\n".encode())
        return found.hexdigest()

    def __call__(self, step: Step, rows: Sequence[Row], fitted: Any) -> Asked:
        """Asks the questions of a step. The first Ctrl-C waits for the calls in flight, the second gives them up.

        Raises:
            PartialResult: the run ended before all was asked; what was answered is kept.
            UserError: no further call can succeed; the variable of a key is not set.
        """
        roles = {name: self.roles[name] for name in step.roles()}
        for role in roles.values():
            role.check_key()
        every = 0.2 if sys.stderr.isatty() else 10
        options = {"desc": step.title, "unit": " images", "disable": not self.progress, "mininterval": every}
        with tqdm(total=len(rows), **options) as bar:

            def done() -> None:
                dollars = next(iter(roles.values())).meter.spent
                bar.set_postfix_str(f"${dollars:.4f}" if dollars else "", refresh=False)
                bar.update()

            def without(role: Role, error: FieldRefused) -> None:
                self.journal.put_left_out(self.run_id, role.captioner.model, error.field, error.instead, str(error))
                what = (
                    f"{error.instead} is sent instead of {error.field}"
                    if error.instead
                    else f"{error.field} is left out"
                )
                bar.write(plain(f"Note: {role.name}: {what} from now on. {error}"))

            asked = (
                roles,
                self.journal,
                self.checker,
                self.data,
                self.limits,
                self.run_id,
                step.title,
                self._known,
                self._seen,
            )
            self._to_come = self._to_come[1:]
            again = frozenset(id(self.roles[name].backend) for later in self._to_come for name in later.roles())
            driver = QuestionDriver(*asked, done, without, lambda text: bar.write(plain(f"Note: {text}")), again)
            outcome = finished(driver, lambda: driver.run(rows, lambda row: step.ask(row, fitted)), bar.write)
        self.outcome += outcome
        self.open += driver.tally.open
        if outcome.stopped:
            raise self._stopped(step, outcome)
        writer = next((roles[name] for name in ("writer", "captioner") if name in roles), None)
        model = writer and public_name(writer.captioner.model)
        return Asked(driver.found, driver.tally.figures(), model, driver.tally.rejected)

    def _stopped(self, step: Step, outcome: Outcome) -> Exception:
        kept = (
            f"{many(len(settled_slots(self.folder)), 'answer')} in {self.folder} stay, and will not be asked for again"
        )
        if outcome.stopped == "fatal":
            return UserError(f"step {step.title}: {outcome.why.rstrip('.')}. {kept}; the corrected command continues.")
        if outcome.stopped == "cost":
            return PartialResult(f"step {step.title}: {outcome.why}: type a larger limit to continue. {kept}.")
        return PartialResult(f"step {step.title}: {outcome.why.rstrip('.')}. {kept}.", again=True)
