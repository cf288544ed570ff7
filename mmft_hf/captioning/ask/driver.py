"""The driver: asks for what a plan lacks, many calls at a time, and commits every answer to the journal as it arrives."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from ...data.images import BadImage, stored_bytes
from ..types import Answer, Backend, CallError, FieldRefused, Picture, Request, Unanswerable
from .captioner import Captioner
from .cost import CostMeter
from .dispatch import Dispatcher, Outcome, Stopped
from .journal import Journal
from .journal_reader import JournalReader, unsettled_slots
from .journal_table import JournalError
from .limits import Limits
from .pictures import prepare, sha256
from .plan import Keys, Plan, Slot, WorkItem

LARGER_BUDGET = 4  # factor on the token limit if a model spent all of its tokens on thinking


class Gone(Exception):
    """A picture is missing, or differs from the one that was planned. The next run may find it again."""


@dataclass(eq=False)
class Driver:
    """Fills a plan. One object serves one run.

    Args:
        data: the dataset, its pictures not decoded; `data[row]["image"]` is read when its turn comes.
        checker: see `CaptionChecker`.
        meter: prices, what was spent, and the limit.
        done: called after each caption with the outcome so far and the number of new captions.
        left_out: called with each field that the server refuses, and that is left out from then on.
        note: prints a line for the user.
    """

    captioner: Captioner
    keys: Keys
    backend: Backend
    journal: Journal
    checker: Any
    data: Any
    limits: Limits
    meter: CostMeter
    run_id: str | None = None
    done: Callable[[Outcome, int], None] = lambda outcome, captions: None
    left_out: Callable[[FieldRefused], None] = lambda error: None
    note: Callable[[str], None] = lambda text: None

    def __post_init__(self):
        self._known = JournalReader(self.journal.folder)
        self._tasks: set[asyncio.Task] = set()

    # -- the run ------------------------------------------------------------------------------------------------------
    async def run(self, plan: Plan) -> Outcome:
        """Asks for everything that the plan lacks. Ends early after `calls.stop`; answers on their way are kept.

        Raises:
            JournalError: an answer cannot be stored.
        """
        started = time.monotonic()
        self._tried = unsettled_slots(self.journal.folder)
        self.calls = Dispatcher(self.backend, self.limits, self.meter, self._on_stop, self.left_out, self.note)
        # The number of calls prepared or in flight, which bounds the pictures in memory.
        self._ahead = 2 * self.calls.most + len(self.captioner.prompts.aspects) * self.captioner.samples
        self._room = asyncio.Semaphore(self._ahead)
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="pictures")
        try:
            for item in plan.items:
                groups = self._groups(item)
                for _ in groups:
                    await self._room.acquire()
                if self.calls.stopping:
                    break
                self._start(self._begin(item, groups))
            while self._tasks:
                await asyncio.wait(self._tasks)
            self.calls.conclude()
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
        """Ends the run: nothing new is asked, calls in flight are waited for."""
        self.calls.stop(stopped, why)

    def drop(self) -> None:
        """Gives up the calls in flight too."""
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
    def _groups(self, item: WorkItem) -> list[Sequence[Slot]]:
        """The slots of each call: those of one sample if all aspects are asked at once, else one."""
        groups: dict[object, list[Slot]] = {}
        for slot in item.slots:
            groups.setdefault(slot.sample if self.captioner.joint else slot.key, []).append(slot)
        return list(groups.values())

    async def _begin(self, item: WorkItem, groups: list[Sequence[Slot]]) -> None:
        started = 0
        try:
            try:
                picture = await asyncio.get_running_loop().run_in_executor(self._pool, self._picture, item)
            except (BadImage, Gone) as error:
                status = "bad_image" if isinstance(error, BadImage) else "failed"
                row = {"status": status, "error_class": "picture", "error": str(error)}
                self._put(item, [(slot, 0, row) for slot in item.slots])
                self._finished(len(item.slots), status)
                return
            tried = [slot.key for slot in item.slots if slot.key in self._tried]
            history = self._known.history(tried) if tried else {}
            for slots in groups:
                self._start(self._call(item, picture, slots, history))
                started += 1
        finally:
            for _ in groups[started:]:
                self._room.release()

    def _picture(self, item: WorkItem) -> Picture:
        try:
            data = stored_bytes(self.data[item.row]["image"])  # known to be a picture if its sha256 is the planned one
        except BadImage as error:
            raise Gone(str(error)) from error
        if sha256(data) != item.image_sha256:
            raise Gone("expected the picture that was planned, found that it has changed since")
        return prepare(data, self.captioner.pictures)

    async def _call(self, item: WorkItem, picture: Picture, slots: Sequence[Slot], history: dict) -> None:
        try:
            tried = any(row["pending"] for slot in slots for row in history.get(slot.key, ()))
            if self.captioner.joint and len(slots) == len(self.captioner.prompts.aspects) and not tried:
                slots = await self._joint(item, picture, slots, history)
            for slot in slots:
                await self._single(item, picture, slot, {row["key"]: row for row in history.get(slot.key, ())})
        except Stopped:
            pass
        finally:
            self._room.release()

    async def _joint(self, item: WorkItem, picture: Picture, slots: Sequence[Slot], history: dict) -> list[Slot]:
        """Makes one call for all aspects. Returns the slots that need a call of their own."""
        aspects = tuple(slot.aspect for slot in slots)
        request = Request((picture,), slots[0].prompt, self.keys.budget(), aspects, slots[0].seed)
        try:
            answer, spent = await self.calls.ask(request)
        except Unanswerable as error:
            # What is refused as a whole may be answered one by one, e.g. if the server cannot give structured answers.
            answer, spent = Answer(""), {"attempts": 1, "error": str(error)}
        except CallError as error:
            self._failed(item, slots, error)
            return []
        texts = parse_joint(answer.text, aspects)
        rows, again = [], []
        for i, slot in enumerate(slots):
            # Only the first row has the tokens and the cost, so that sums are right.
            row = spent if i == 0 else dict.fromkeys(spent)
            row = {**row, "call_id": slots[0].key, "attempts": spent["attempts"]}
            if texts is None:
                row |= {"status": "failed", "pending": 1, "raw_text": answer.text, "error_class": "bad_json"}
                row |= {"error": row.get("error") or "the answer is not a JSON object with the aspects as keys"}
                row |= {"finish_reason": answer.finish_reason, "model": answer.model}
            else:
                row |= self._checked(item, Answer(texts[slot.aspect], "stop", answer.model), slot.single, 0)
            rows.append((slot, 0, row))
            if row["pending"]:
                again.append(slot)
                history[slot.key] = [{"thinking_tokens": 0, **row, "key": slot.key}]
            else:
                self._finished(1, row["status"])
        self._put(item, rows)
        return again

    async def _single(self, item: WorkItem, picture: Picture, slot: Slot, stored: dict[str, dict]) -> None:
        """Asks for one caption, and again in other words if a check turns the answer down.

        Args:
            stored: tries that the journal already has, by their keys; those are not asked again.
        """
        prompt, budget = slot.single, self.captioner.sampling.max_tokens
        for reask in range(self._last_try + 1):
            key = self.keys.key(item.image_sha256, slot.aspect, prompt, slot.sample, reask) if reask else slot.key
            row = stored.get(key)
            if row and row["pending"] and not self._truncated(row):
                if not self._still_turned_down(item, slot, row, prompt, reask):
                    return
            elif reask or not self.captioner.joint:  # the first try of a joint caption was the call for all aspects
                request = Request((picture,), prompt, budget, (slot.aspect,), int(key[:7], 16), slot.sample)
                try:
                    answer, spent = await self.calls.ask(request)
                except CallError as error:
                    self._failed(item, (slot,), error, key, reask)
                    return
                row = {**spent, **self._checked(item, answer, prompt, reask)}
                self._put(item, [(slot, reask, {**row, "key": key})])
                if not row["pending"]:
                    self._finished(1, row["status"])
                    return
            prompt, budget = self._next_try(item, slot, row)

    def _truncated(self, row: dict) -> bool:
        """Whether a smaller token limit than today's truncated an answer, so that it is worth asking again."""
        smaller = (row.get("max_tokens") or 0) < self.captioner.sampling.max_tokens
        return row.get("finish_reason") == "length" and smaller

    def _still_turned_down(self, item: WorkItem, slot: Slot, row: dict, prompt: str, reask: int) -> bool:
        """Whether the checks and the number of tries of this run turn a stored answer down. If not, it is the result."""
        if row.get("error_class") == "bad_json":
            return True
        answer = Answer(row["raw_text"] or "", row["finish_reason"], row["model"])
        answer = replace(answer, thinking_tokens=row["thinking_tokens"] or 0)
        checked = self._checked(item, answer, prompt, reask)
        if checked["pending"]:
            return True
        # The journal already has what the call took.
        kept = {name: row.get(name) for name in ("call_id", "latency_ms", "run_id")}
        self._put(item, [(slot, reask, {**kept, **checked, "key": row["key"]})])
        self._finished(1, checked["status"])
        return False

    @property
    def _last_try(self) -> int:
        return self.limits.max_reasks + self.captioner.joint

    def _next_try(self, item: WorkItem, slot: Slot, row: dict | None) -> tuple[str, int]:
        """Prompt and token limit of the try that follows a result which was turned down."""
        prompt, budget = slot.single, self.captioner.sampling.max_tokens
        answered = row and row["raw_text"] and row.get("error_class") != "bad_json"
        if answered or (row and row.get("finish_reason") == "length"):
            thinking = row["thinking_tokens"] or 0
            answer = row["raw_text"] or "", row["finish_reason"]
            checked = self.checker.check(*answer, item.label, slot.single, thinking, last_try=False)
            prompt = f"{slot.single}\n{checked.reask}" if checked.reask else slot.single
            if checked.needs_larger_budget:
                budget *= LARGER_BUDGET
        return prompt, budget

    def _checked(self, item: WorkItem, answer: Answer, prompt: str, reask: int) -> dict:
        """Columns of the journal: what came back, and what the checks make of it."""
        last, thinking = reask >= self._last_try, answer.thinking_tokens
        checked = self.checker.check(answer.text, answer.finish_reason, item.label, prompt, thinking, last_try=last)
        return {
            "status": checked.status,
            "pending": int(checked.reask is not None and not last),
            "raw_text": answer.text,
            "text": checked.text,
            "checks": json.dumps(checked.checks),
            "finish_reason": answer.finish_reason,
            "model": answer.model,
            "thinking_tokens": thinking,
        }

    # -- the journal --------------------------------------------------------------------------------------------------
    def _failed(
        self, item: WorkItem, slots: Sequence[Slot], error: CallError, key: str | None = None, reask: int = 0
    ) -> None:
        row = {"status": "failed", "error_class": error.kind, "error": str(error), "attempts": 1}
        self._put(item, [(slot, reask, {"key": key or slot.key, **row}) for slot in slots])
        self._finished(len(slots), "failed")

    def _put(self, item: WorkItem, rows: list[tuple[Slot, int, dict]]) -> None:
        """Commits results of an item: for each its slot, the number of the try and further columns."""
        same = {"image_sha256": item.image_sha256, "label": item.class_name, "run_id": self.run_id}
        same["max_tokens"] = self.captioner.sampling.max_tokens
        results = []
        for slot, reask, row in rows:
            own = {"key": slot.key, "slot": slot.key, "prompt_id": slot.prompt_id, "aspect": slot.aspect}
            results.append({**same, **own, "sample": slot.sample, "reask": reask, **row})
        try:
            self.journal.put(results)
        except JournalError as error:
            self.calls.crashed(error)  # at once, before another call takes the place of the one that ended
            raise

    def _finished(self, captions: int, status: str) -> None:
        self.calls.outcome.results[status] += captions
        self.done(self.calls.outcome, captions)


def parse_joint(text: str, aspects: tuple[str, ...]) -> dict[str, str] | None:
    """The texts of an answer that must be one JSON object with exactly these keys; None if it is anything else.

    A Markdown fence around it and thinking before it are removed; nothing is guessed.
    """
    text = text.rsplit("</think>", 1)[-1].strip()
    fenced = re.fullmatch(r"```(?:json)?(.*)```", text, re.DOTALL)
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
