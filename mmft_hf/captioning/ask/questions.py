"""Asks what a step wants to know: many rows at a time, equal questions once, every answer committed as it arrives.

It stands beside `Driver`, which fills a plan that is known from the start. Here the answers of a round decide on the questions of the
next one, so there is no plan: each row's generator runs until it ends. Questions that the journal has answered are answered
from it, so that a run which was killed goes on where it was.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ...data.images import BadImage
from ..judge.checks import CaptionChecker
from ..spool import Spool
from ..steps.asking import UNSURE, Ask, Asking, View, forced, parsed, rendered
from ..steps.base import Row
from ..types import ACCEPTED, OPEN, CallError, FieldRefused, Picture, Request
from .captioner import in_words_of
from .cost import Spending
from .dispatch import Dispatcher, Outcome, Stopped
from .driver import LARGER_BUDGET, Gone
from .journal import SUMMED, Journal
from .journal_reader import JournalReader
from .journal_table import COLUMNS, JournalError
from .limits import Limits
from .pictures import PicturePolicy, shown
from .roles import Role

MOST_ROUNDS = 8
REASKS = 1  # how often an answer that cannot be read is asked for again
KINDS = ("answered", "unsure", "unparsable", "refused", "failed")
_DATA = re.compile(r'"(?:[^"\\]|\\.)*"')  # what `quoted` writes


@dataclass
class Tally:
    """How the questions of a step were answered.

    Args:
        kinds: number of different questions by `KINDS`. An unsure answer is an answer; the last three have none.
        open: number of those that the next run asks again.
        spent: what they took over all runs, as the journal tells.
        rejected: the texts that failed the checks of captions, as rows of `steps.parquet`; their verdict names the checks.
    """

    kinds: Counter = field(default_factory=Counter)
    open: int = 0
    spent: Spending = field(default_factory=Spending)
    rejected: list[dict] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Entry of `captions.json`."""
        total = self.kinds.total()
        share = self.kinds["unparsable"] / total if total else None
        counts = {"questions": total, **{kind: self.kinds[kind] for kind in KINDS}}
        return {**counts, "unparsable_share": share, **self.spent.summary()}


@dataclass(frozen=True)
class _Judged:
    """What an answer says. `again`: the prompt of another try; None if this one counts. `larger`: it needs a larger token limit."""

    value: Any
    status: str
    again: str | None = None
    larger: bool = False
    checks: tuple[str, ...] = ()
    text: str | None = None


@dataclass(frozen=True)
class _Try:
    """One try of a question.

    Args:
        label: of the class that a caption is checked for.
        slot: key of the first try, which names the question; `key`: of this one.
        prompt: its whole text; `budget`: token limit of the answer.
        number: 0, 1, …; `last`: whether no other one follows.
    """

    row: Row
    ask: Ask
    role: Role
    label: int | None
    slot: str
    key: str
    prompt: str
    budget: int
    number: int
    last: bool


@dataclass(eq=False)
class QuestionDriver:
    """Asks the questions of one step. One object serves one step of one run.

    Args:
        step: its name, for the journal.
        data: the bytes of a picture, by its sha256. Raises `Gone`.
        checker: checks answers that are captions.
        known: keys of the questions that the journal has, to which those of this step are added.
        seen: keys of the tries that were counted for earlier steps, to which those of this one are added.
        done: called after each row that has ended.
        left_out: called with each field that a server refuses, and that is left out from then on.
        note: prints a line for the user.
        again: `id` of the backends that later steps ask, whose models stay loaded.
    """

    roles: Mapping[str, Role]
    journal: Journal
    checker: CaptionChecker
    data: Callable[[str], bytes]
    limits: Limits
    run_id: str
    step: str
    known: set[bytes]
    seen: set[bytes]
    done: Callable[[], None] = lambda: None
    left_out: Callable[[Role, FieldRefused], None] = lambda role, error: None
    note: Callable[[str], None] = lambda text: None
    again: frozenset[int] = frozenset()

    def __post_init__(self):
        self.tally = Tally()
        self._labels = {name: label for label, name in enumerate(self.checker.class_names)}
        self._counted: set[bytes] = set()
        self._rows: set[asyncio.Task] = set()
        self._asks: set[asyncio.Task] = set()
        self._flights: dict[str, asyncio.Future] = {}
        self._shown: OrderedDict[tuple, asyncio.Future] = OrderedDict()

    # -- the run ------------------------------------------------------------------------------------------------------
    async def run(self, rows: Sequence[Row], begin: Callable[[Row], Asking]) -> Outcome:
        """Runs each row's generator to its end; `found` has what they return. Ends early after `stop`.

        Args:
            begin: the generator of a row, made when its turn comes.

        Raises:
            JournalError: an answer cannot be stored.
            Exception: what a generator raised.
        """
        started = time.monotonic()
        self.found = Spool(length=len(rows))
        self._reader = JournalReader(self.journal.folder)
        by_backend: dict[int, Dispatcher] = {}
        for role in self.roles.values():
            if id(role.backend) not in by_backend:
                options = (self._on_stop, partial(self.left_out, role), partial(self._says, role))
                by_backend[id(role.backend)] = Dispatcher(role.backend, self.limits, role.meter, *options)
        self._calls = {name: by_backend[id(role.backend)] for name, role in self.roles.items()}
        self._dispatchers = list(by_backend.values())
        most = sum(calls.most for calls in self._dispatchers)
        # Rows under way, and questions whose pictures are in memory.
        self._ahead, self._room, self._ready = 2 * most, asyncio.Semaphore(2 * most), asyncio.Semaphore(2 * most)
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="pictures")
        try:
            for i, row in enumerate(rows):
                await self._room.acquire()
                if self.stopping:
                    break
                self._start(self._row(i, row, begin(row)), self._rows)
            while self._rows:
                await asyncio.wait(self._rows)
            for calls in self._dispatchers:
                calls.conclude()
        finally:
            for task in (*self._rows, *self._asks):
                task.cancel()
            self._pool.shutdown(wait=False, cancel_futures=True)
            for calls in self._dispatchers:
                await calls.aclose(again=id(calls.backend) in self.again)
            self._reader.close()
        outcome = self.outcome
        outcome.seconds = time.monotonic() - started
        if error := next((calls.error for calls in self._dispatchers if calls.error is not None), None):
            raise error
        return outcome

    @property
    def outcome(self) -> Outcome:
        """The calls of all roles so far."""
        return sum((calls.outcome for calls in self._dispatchers), Outcome())

    @property
    def stopping(self) -> bool:
        return any(calls.stopping for calls in self._dispatchers)

    def stop(self, stopped: str, why: str) -> None:
        """Ends the run: nothing new is asked, calls in flight are waited for."""
        for calls in self._dispatchers:
            calls.stop(stopped, why)

    def drop(self) -> None:
        """Gives up the calls in flight too."""
        for task in list(self._asks):
            task.cancel()

    def _on_stop(self) -> None:
        name, first = next((name, calls.outcome) for name, calls in self._calls.items() if calls.stopping)
        first.why = in_words_of(name, first.why)
        self.stop(first.stopped, first.why)
        for task in self._asks.difference(*(calls.flying for calls in self._dispatchers)):
            task.cancel()
        for _ in range(self._ahead):
            self._room.release()

    def _start(self, coroutine, among: set[asyncio.Task]) -> asyncio.Task:
        task = asyncio.create_task(coroutine)
        among.add(task)
        task.add_done_callback(among.discard)
        return task

    def _says(self, role: Role, text: str) -> None:
        self.note(f"{role.name}: {text}")

    # -- one row ------------------------------------------------------------------------------------------------------
    async def _row(self, i: int, row: Row, asking: Asking) -> None:
        try:
            asks = next(asking)
            for _ in range(MOST_ROUNDS):
                tasks = [self._start(self._answer(row, ask), self._asks) for ask in asks]
                answers = await asyncio.gather(*tasks, return_exceptions=True)
                for error in answers:
                    if isinstance(error, BaseException) and not isinstance(error, (Stopped, asyncio.CancelledError)):
                        raise error
                if any(isinstance(answer, BaseException) for answer in answers):
                    return  # the run is ending: the next one goes on from the journal
                asks = asking.send(answers)
            raise RuntimeError(f"step {self.step} asks for more than {MOST_ROUNDS} rounds")
        except StopIteration as end:
            self.found[i] = end.value
            self.done()
        except Exception as error:  # a step that fails is a defect, and nothing more is asked
            self._dispatchers[0].crashed(error)
        finally:
            self._room.release()

    async def _answer(self, row: Row, ask: Ask) -> Any:
        """The answer to a question, from the journal or from the model; None if there is none."""
        role, label = self.roles[ask.role], self._labels.get(ask.class_name)
        if ask.answer == "caption" and label is None:
            raise RuntimeError(f"step {self.step} asks for a caption of the class {ask.class_name!r}")
        prompt, budget = rendered(ask), role.max_tokens
        slot = key = role.key(ask, prompt, 0)
        last = self.limits.max_reasks if ask.answer == "caption" else REASKS
        tries = []
        for number in range(last + 1):
            made = _Try(row, ask, role, label, slot, key, prompt, budget, number, number == last)
            tries.append(await self._tried(made))
            judged = self._judged(made, tries[-1])
            if judged.again is None:
                break
            prompt, budget = judged.again, role.max_tokens * (LARGER_BUDGET if judged.larger else 1)
            key = role.key(ask, prompt, number + 1)
        self._count(made, tries, judged)
        return judged.value

    def _judged(self, made: _Try, found: Mapping) -> _Judged:
        """What a try says. `found`: its row of the journal."""
        text, finish_reason, ask = found["raw_text"], found["finish_reason"], made.ask
        if text is None:
            return _Judged(None, found["status"])
        if ask.answer == "caption":
            # Captions within the prompt are data that an answer may repeat, and not its wording.
            asked, thinking = _DATA.sub('""', made.prompt), found["thinking_tokens"] or 0
            checked = self.checker.check(
                text, finish_reason, made.label, asked, thinking, made.last, ask.scripts, says_length=True
            )
            if checked.reask and not made.last:
                again = f"{rendered(ask)}\n{checked.reask}"
                return _Judged(None, "rejected", again, checked.needs_larger_budget, checked.checks)
            fine = checked.status in ACCEPTED
            status = "rejected" if checked.status == "empty" and finish_reason != "length" else checked.status
            return _Judged(checked.text if fine else None, status, None, False, checked.checks, checked.text)
        if finish_reason == "refusal":
            return _Judged(None, "refused")
        if (value := parsed(ask, text)) is not None:
            return _Judged(value, "ok", text=text)
        if made.last:
            return _Judged(None, "truncated" if finish_reason == "length" else "rejected")
        whole = rendered(ask)
        form = whole[len(ask.prompt) :].strip() or "Answer in a few words."
        return _Judged(None, "rejected", f"{whole}\nThe answer could not be read. {form}", finish_reason == "length")

    async def _tried(self, made: _Try) -> dict:
        """The row of the journal for a try. Nothing is awaited between the look-up and the call, so no try is made twice."""
        stored = self._stored(made) if bytes.fromhex(made.slot) in self.known else None
        if stored is not None and not _to_be_asked(stored, made.role.max_tokens):
            return stored
        if flight := self._flights.get(made.key):
            return await asyncio.shield(flight)
        flight = self._flights[made.key] = asyncio.get_running_loop().create_future()
        try:
            found = await self._call(made, stored)
            flight.set_result(found)
            return found
        except BaseException:
            flight.set_exception(Stopped())
            flight.exception()  # nobody may be waiting for it
            raise
        finally:
            del self._flights[made.key]

    def _stored(self, made: _Try) -> dict | None:
        rows = self._reader.history([made.slot]).get(made.slot, ())
        return next((row for row in rows if row["key"] == made.key), None)

    async def _call(self, made: _Try, stored: dict | None) -> dict:
        ask, role = made.ask, made.role
        image = ask.pictures[0].image_sha256 if ask.pictures else made.row.image_sha256
        found = dict.fromkeys(COLUMNS) | {"key": made.key, "slot": made.slot, "image_sha256": image, "pending": 0}
        found |= {"label": made.row.class_name, "prompt_id": ask.role, "aspect": self.step, "sample": ask.sample}
        found |= {"reask": made.number, "run_id": self.run_id, "max_tokens": role.max_tokens}
        async with self._ready:
            try:
                pictures = [await self._picture(view, role.pictures) for view in ask.pictures]
                seed = int(made.key[:7], 16)
                request = Request(
                    tuple(pictures), made.prompt, made.budget, (self.step,), seed, ask.sample, forced(ask)
                )
                answer, spent = await self._calls[ask.role].ask(request)
            except (BadImage, Gone) as error:
                status = "bad_image" if isinstance(error, BadImage) else "failed"
                found |= {"status": status, "error_class": "picture", "error": str(error), "attempts": 0}
            except CallError as error:
                found |= {"status": "failed", "error_class": error.kind, "error": str(error), "attempts": 1}
            else:
                found |= {
                    **spent,
                    "raw_text": answer.text,
                    "finish_reason": answer.finish_reason,
                    "model": answer.model,
                }
                found |= {"thinking_tokens": answer.thinking_tokens}
                judged = self._judged(made, found)
                found |= {"status": judged.status, "pending": int(judged.again is not None), "text": judged.text}
                found |= {"checks": json.dumps(judged.checks)}
        found["updated_at"] = time.time()
        try:
            self.journal.put([found])
            self.known.add(bytes.fromhex(made.slot))
        except JournalError as error:
            self._dispatchers[0].crashed(error)
            raise
        if stored is not None:  # the journal adds what both calls took
            found |= {name: (stored[name] or 0) + (found[name] or 0) for name in SUMMED if stored[name] or found[name]}
        return found

    async def _picture(self, view: View, policy: PicturePolicy) -> Picture:
        """What is sent of a picture. Questions about one picture come together, so the last ones are kept."""
        place = (view.image_sha256, view.what, policy)
        if place not in self._shown:
            loop = asyncio.get_running_loop()
            self._shown[place] = loop.run_in_executor(self._pool, self._rendered, view, policy)
            while len(self._shown) > 2 * self._ahead:
                self._shown.popitem(last=False)
        self._shown.move_to_end(place)
        picture = self._shown[place]
        return picture.result() if picture.done() else await asyncio.shield(picture)

    def _rendered(self, view: View, policy: PicturePolicy) -> Picture:
        return shown(self.data(view.image_sha256), view.what, policy)

    # -- counting -----------------------------------------------------------------------------------------------------
    def _count(self, made: _Try, tries: Sequence[Mapping], judged: _Judged) -> None:
        """Counts a question once, and what its tries took once in all steps."""
        question = f"{made.slot}{made.ask.class_name or ''}".encode()
        if question in self._counted:
            return
        self._counted.add(question)
        last = tries[-1]
        if judged.value is not None:
            kind = "unsure" if judged.value == UNSURE else "answered"
        elif last["raw_text"] is None:
            kind = "failed"
        else:
            kind = "refused" if judged.status == "refused" else "unparsable"
        self.tally.kinds[kind] += 1
        if kind in ("unparsable", "refused") and made.ask.answer == "caption":
            said = {"text": judged.text or last["raw_text"], "verdict": ", ".join(judged.checks) or judged.status}
            self.tally.rejected.append(
                {"image_sha256": made.row.image_sha256, "record": None, "kind": "rejected"} | said | {"votes": []}
            )
        self.tally.open += judged.value is None and _to_be_asked(last, made.role.max_tokens)
        for tried in tries:
            if (key := bytes.fromhex(tried["key"])) not in self.seen:
                self.seen.add(key)
                self.tally.spent.add(tried)


def _to_be_asked(tried: Mapping, max_tokens: int) -> bool:
    """Whether a stored try is to be made again: it has no answer, or today's token limit may give it another one."""
    cut_off = tried["finish_reason"] == "length" and (tried["pending"] or tried["status"] in ("truncated", "empty"))
    if cut_off:
        return (tried["max_tokens"] or 0) < max_tokens
    return not tried["pending"] and tried["status"] in OPEN
