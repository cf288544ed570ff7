"""The driver: asks for what a plan lacks, many calls at a time, and commits every answer to the journal as it comes."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from ...data.images import BadImage, stored_bytes
from ..types import Answer, Backend, CallError, Picture, Request, Unanswerable
from .captioner import Captioner
from .cost import CostMeter
from .dispatch import Dispatcher, Outcome, Stopped
from .journal import Journal, JournalError, JournalReader, unsettled_slots
from .limits import Limits
from .pictures import prepare, sha256
from .plan import Keys, Plan, Slot, WorkItem

LARGER_BUDGET = 4  # times the tokens, where a model spent all of them on thinking


class Gone(Exception):
    """A picture is not what it was when the run was planned. By the next run it may be again."""


class Driver:
    """Fills a plan. One object serves one run.

    Args:
        data: the data set whose pictures are not decoded; `data[row]["image"]` is read when its turn comes.
        checker: see `checks.CaptionChecker`.
        meter: prices, what was spent, and the limit.
        done (*optional*): called after each caption with the outcome so far, for a progress bar.
    """

    def __init__(
        self,
        captioner: Captioner,
        keys: Keys,
        backend: Backend,
        journal: Journal,
        checker,
        data,
        limits: Limits,
        meter: CostMeter,
        run_id: str | None = None,
        done: Callable[[Outcome, int], None] | None = None,
    ):
        self.captioner, self.keys, self.backend, self.journal = captioner, keys, backend, journal
        self.checker, self.data, self.limits, self.meter = checker, data, limits, meter
        self.run_id = run_id
        self._done = done or (lambda outcome, captions: None)
        self._known = JournalReader(journal.folder)
        self._tasks: set[asyncio.Task] = set()

    # -- the run ------------------------------------------------------------------------------------------------------
    async def run(self, plan: Plan) -> Outcome:
        """Asks for everything that the plan lacks. Ends early after `stop`; answers on their way are kept.

        Raises:
            JournalError: an answer cannot be kept.
        """
        started = time.monotonic()
        self._tried = unsettled_slots(self.journal.folder)
        self.calls = Dispatcher(self.backend, self.limits, self.meter, self._on_stop)
        # So many captions are prepared or asked for at a time: pictures are in memory for these alone.
        self._ahead = 2 * self.calls.most + len(self.captioner.prompts.aspects) * self.captioner.samples
        self._room = asyncio.Semaphore(self._ahead)
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="pictures")
        try:
            for job in plan.items:
                calls = self._calls_of(job)
                for _ in calls:
                    await self._room.acquire()
                if self.calls.stopping:
                    break
                self._start(self._job(job, calls))
            while self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            self._pool.shutdown(wait=False, cancel_futures=True)
            await self.calls.aclose()
            self._known.close()
            self.calls.outcome.seconds = time.monotonic() - started
        if self.calls.error is not None:
            raise self.calls.error
        return self.calls.outcome

    def stop(self, stopped: str, why: str) -> None:
        """Ends the run: nothing new is asked, calls in flight are waited for, the rest stays open."""
        self.calls.stop(stopped, why)

    def drop(self) -> None:
        """Gives up the calls in flight, too."""
        for task in list(self._tasks):
            task.cancel()

    def _on_stop(self) -> None:
        for task in self._tasks - self.calls.flying:
            task.cancel()
        for _ in range(self._ahead):
            self._room.release()

    def _start(self, coroutine) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.calls.crashed(task.exception())

    # -- one picture --------------------------------------------------------------------------------------------------
    def _calls_of(self, job: WorkItem) -> list[tuple[Slot, ...]]:
        """Which slots share a call: those of one sample where all aspects are asked at once, else none."""
        if not self.captioner.joint:
            return [(slot,) for slot in job.slots]
        by_sample: dict[int, list[Slot]] = {}
        for slot in job.slots:
            by_sample.setdefault(slot.sample, []).append(slot)
        return [tuple(slots) for slots in by_sample.values()]

    async def _job(self, job: WorkItem, calls: list[tuple[Slot, ...]]) -> None:
        started = 0
        try:
            try:
                picture = await asyncio.get_running_loop().run_in_executor(self._pool, self._picture, job)
            except (BadImage, Gone) as error:
                status = "bad_image" if isinstance(error, BadImage) else "failed"
                row = {"status": status, "error_class": "picture", "error": str(error)}
                self._put(job, [(slot, 0, row) for slot in job.slots])
                self._finished(job, len(job.slots), status)
                return
            tried = [slot.key for slot in job.slots if slot.key in self._tried]
            history = self._known.history(tried) if tried else {}
            for slots in calls:
                self._start(self._call(job, picture, slots, history))
                started += 1
        finally:
            for _ in calls[started:]:
                self._room.release()

    def _picture(self, job: WorkItem) -> Picture:
        try:
            data = stored_bytes(self.data[job.row]["image"])  # a picture, if its sha256 is the planned one
        except BadImage as error:
            raise Gone(str(error)) from error
        if sha256(data) != job.image_sha256:
            raise Gone("expected the picture that was planned, found that it changed since")
        return prepare(data, self.captioner.pictures)

    async def _call(self, job: WorkItem, picture: Picture, slots: tuple[Slot, ...], history: dict) -> None:
        try:
            tried = any(row["pending"] for slot in slots for row in history.get(slot.key, ()))
            if self.captioner.joint and len(slots) == len(self.captioner.prompts.aspects) and not tried:
                slots = await self._joint(job, picture, slots, history)
            for slot in slots:
                await self._single(job, picture, slot, history.get(slot.key, []))
        except Stopped:
            pass
        finally:
            self._room.release()

    async def _joint(self, job: WorkItem, picture: Picture, slots: tuple[Slot, ...], history: dict) -> tuple[Slot, ...]:
        """One call for all aspects. Returns the slots that need a further call of their own."""
        aspects = tuple(slot.aspect for slot in slots)
        request = Request(picture, slots[0].prompt, self.keys.budget(), aspects, slots[0].seed)
        try:
            answer, spent = await self.calls.ask(request)
        except Unanswerable as error:
            # What is refused as a whole may be answered one by one: the server may not know structured answers.
            answer, spent = Answer(""), {"attempts": 1, "error": str(error)}
        except CallError as error:
            self._failed(job, slots, error)
            return ()
        texts = parse_joint(answer.text, aspects)
        rows, again = [], []
        for i, slot in enumerate(slots):
            # Tokens and cost stand in the first row alone, so that sums are right.
            row = {
                **(spent if i == 0 else dict.fromkeys(spent)),
                "call_id": slots[0].key,
                "attempts": spent["attempts"],
            }
            if texts is None:
                row |= {"status": "failed", "pending": 1, "raw_text": answer.text, "error_class": "bad_json"}
                row |= {"error": row.get("error") or "the answer is no JSON object with the aspects as keys"}
                row |= {"finish_reason": answer.finish_reason, "model": answer.model}
            else:
                row |= self._checked(job, slot, Answer(texts[slot.aspect], "stop", answer.model), slot.single, 0)
            rows.append((slot, 0, row))
            if row["pending"]:
                again.append(slot)
                history[slot.key] = [{"thinking_tokens": 0, **row, "key": slot.key}]
            else:
                self._finished(job, 1, row["status"])
        self._put(job, rows)
        return tuple(again)

    async def _single(self, job: WorkItem, picture: Picture, slot: Slot, history: list[dict]) -> None:
        """Asks for one caption, and again, in other words, where a check turns the answer down.

        An answer that the journal has, after which only the next try was due, is taken from there.
        """
        stored = {row["key"]: row for row in history}
        prompt, budget = slot.prompt, self.keys.budget()
        first = 0
        if self.captioner.joint:  # its first try was one call for all aspects; from here on it is asked alone
            row = stored.get(slot.key)
            if row and row["pending"] and not self._cut(row) and not self._turned_down(job, slot, row, slot.single, 0):
                return
            first, prompt, budget = self._next_try(job, slot, row)
        for reask in range(first, self._last_try + 1):
            key = slot.key if reask == 0 else self.keys.key(job.image_sha256, slot.aspect, prompt, slot.sample, reask)
            row = stored.get(key)
            if row and row["pending"] and not self._cut(row):
                if not self._turned_down(job, slot, row, prompt, reask):
                    return
            else:
                request = Request(picture, prompt, budget, (slot.aspect,), int(key[:7], 16))
                try:
                    answer, spent = await self.calls.ask(request)
                except CallError as error:
                    self._failed(job, (slot,), error, key, reask)
                    return
                row = {**spent, **self._checked(job, slot, answer, prompt, reask)}
                self._put(job, [(slot, reask, {**row, "key": key})])
                if not row["pending"]:
                    self._finished(job, 1, row["status"])
                    return
            _, prompt, budget = self._next_try(job, slot, row)

    def _cut(self, row: dict) -> bool:
        """Whether an answer was cut by a smaller budget than there is now, and is worth asking for again."""
        return (
            row.get("finish_reason") == "length" and (row.get("max_tokens") or 0) < self.captioner.sampling.max_tokens
        )

    def _turned_down(self, job: WorkItem, slot: Slot, row: dict, prompt: str, reask: int) -> bool:
        """Whether a stored answer still is, by the checks and the number of tries of this run. Otherwise it is the result."""
        if row.get("error_class") == "bad_json":
            return True
        answer = Answer(row["raw_text"] or "", row["finish_reason"], row["model"])
        answer = replace(answer, thinking_tokens=row["thinking_tokens"] or 0)
        checked = self._checked(job, slot, answer, prompt, reask)
        if checked["pending"]:
            return True
        # What it took is in the journal already.
        kept = {name: row.get(name) for name in ("call_id", "latency_ms", "run_id")}
        self._put(job, [(slot, reask, {**kept, **checked, "key": row["key"]})])
        self._finished(job, 1, checked["status"])
        return False

    @property
    def _last_try(self) -> int:
        return self.limits.max_reasks + self.captioner.joint

    def _next_try(self, job: WorkItem, slot: Slot, row: dict | None) -> tuple[int, str, int]:
        """Number (after a joint call), prompt and budget of the try that follows a result which was turned down."""
        prompt, budget = slot.single, self.captioner.sampling.max_tokens
        if (row and row["raw_text"] and row.get("error_class") != "bad_json") or (
            row and row.get("finish_reason") == "length"
        ):
            thinking = row["thinking_tokens"] or 0
            checked = self.checker.check(
                row["raw_text"] or "", row["finish_reason"], job.label, slot.single, thinking, last_try=False
            )
            prompt = f"{slot.single}\n{checked.reask}" if checked.reask else slot.single
            if checked.needs_larger_budget:
                budget *= LARGER_BUDGET
        return 1, prompt, budget

    def _checked(self, job: WorkItem, slot: Slot, answer: Answer, prompt: str, reask: int) -> dict:
        """The columns of the journal that say what came back and what the checks make of it."""
        last = reask >= self._last_try
        checked = self.checker.check(
            answer.text, answer.finish_reason, job.label, prompt, answer.thinking_tokens, last_try=last
        )
        return {
            "status": checked.status,
            "pending": int(checked.reask is not None and not last),
            "raw_text": answer.text,
            "text": checked.text,
            "checks": json.dumps(checked.checks),
            "finish_reason": answer.finish_reason,
            "model": answer.model,
            "thinking_tokens": answer.thinking_tokens,
        }

    # -- the journal --------------------------------------------------------------------------------------------------
    def _failed(
        self, job: WorkItem, slots: tuple[Slot, ...], error: CallError, key: str | None = None, reask: int = 0
    ) -> None:
        row = {"status": "failed", "error_class": error.kind, "error": str(error), "attempts": 1}
        self._put(job, [(slot, reask, {"key": key or slot.key, **row}) for slot in slots])
        self._finished(job, len(slots), "failed")

    def _put(self, job: WorkItem, rows: list[tuple[Slot, int, dict]]) -> None:
        results = [
            {
                "key": slot.key,
                "slot": slot.key,
                "image_sha256": job.image_sha256,
                "label": job.class_name,
                "prompt_id": slot.prompt_id,
                "aspect": slot.aspect,
                "sample": slot.sample,
                "reask": reask,
                "max_tokens": self.captioner.sampling.max_tokens,
                "run_id": self.run_id,
                **row,
            }
            for slot, reask, row in rows
        ]
        try:
            self.journal.put(results)
        except JournalError as error:
            self.calls.crashed(error)  # now, before anybody takes the place of the call that ended
            raise

    def _finished(self, job: WorkItem, captions: int, status: str) -> None:
        self.calls.outcome.results[status] += captions
        self._done(self.calls.outcome, captions)


def parse_joint(text: str, aspects: tuple[str, ...]) -> dict[str, str] | None:
    """The texts of an answer that must be one JSON object with just these keys; None where it is anything else.

    A fence of Markdown around it and thinking before it are taken off; nothing is guessed.
    """
    text = text.rsplit("</think>", 1)[-1].strip()
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or set(value) != set(aspects):
        return None
    return value if all(isinstance(text, str) for text in value.values()) else None


def _unique(pairs: list[tuple]) -> dict:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)
