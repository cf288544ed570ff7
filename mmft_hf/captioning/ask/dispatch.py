"""Sends requests to a backend: how many at a time, how often again, when to stop, and what that took."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from ...core.console import many
from ..types import Answer, Backend, CallError, Fatal, FieldRefused, Request, Transient, Unanswerable
from .cost import CostMeter, estimate_tokens
from .limits import CircuitBreaker, ConcurrencyLimit, Limits, RateLimit, RetryPolicy

# The first call goes alone and gives up sooner, so that a wrong key or a server that is down costs a single call.
PROBE = RetryPolicy(max_attempts=3, base_s=0.5, cap_s=4.0)
ALIKE = 3  # pictures that a server turned away in the same words before it answered any: then no picture is to blame
NOTE_EVERY_S = 10.0  # seconds without an answer after which the user is told, again and again
WINDOW = 4  # batches of a model in this process that are sorted by length together


@dataclass
class Outcome:
    """The outcome of a run of the driver.

    Args:
        calls: number of answered calls; `attempts` counts every try.
        results: captions by status; `failures`: failed tries by kind.
        latencies_s: seconds that each answered call took.
        cost: US dollars, as far as known.
        seconds: duration of the run.
        stopped: why it ended early (`fatal`, `quota`, `breaker`, `cost`, `user`, `error`), or None; `why` says it in words.
    """

    calls: int = 0
    attempts: int = 0
    results: Counter = field(default_factory=Counter)
    failures: Counter = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    seconds: float = 0.0
    stopped: str | None = None
    why: str = ""

    def __add__(self, other: Outcome) -> Outcome:
        """The outcome of two runs, one after the other."""
        last = other if other.stopped or not self.stopped else self
        ends = {"stopped": last.stopped, "why": last.why}
        names = [f.name for f in fields(self) if f.name not in ends]
        return Outcome(**{name: getattr(self, name) + getattr(other, name) for name in names}, **ends)

    def summary(self) -> dict:
        """Entry of `captions.json`."""
        names = ("calls", "attempts", "tokens_in", "tokens_out", "stopped")
        counts = {name: getattr(self, name) for name in names}
        counts |= {"results": dict(self.results), "failures": dict(self.failures), "seconds": round(self.seconds, 1)}
        return counts | {"cost_usd": round(self.cost, 6) if self.cost else None}


class Stopped(Exception):
    """A call was not made, or not repeated, because the run is ending."""


class Dispatcher:
    """Makes the calls of one run. Lives within one event loop.

    Args:
        on_stop: called once, when the run has to end.
        on_left_out: called once for each field that the server refuses and that is left out from then on.
        note: prints a line for the user.
    """

    def __init__(
        self,
        backend: Backend,
        limits: Limits,
        meter: CostMeter,
        on_stop: Callable[[], None],
        on_left_out: Callable[[FieldRefused], None] = lambda error: None,
        note: Callable[[str], None] = lambda text: None,
    ):
        self.backend, self.limits, self.meter = backend, limits, meter
        self._on_stop, self._on_left_out, self._note = on_stop, on_left_out, note
        self._unreached_since: float | None = None
        self._noted = time.monotonic()
        self._first: set[bool] = set()  # calls in flight that tell what such a call costs: with pictures, without
        self._left_out: set[str] = set()
        self._turned_away: dict[tuple[str, str], tuple[set[int], str]] = {}
        self.outcome = Outcome()
        self.error: BaseException | None = None
        self.flying: set[asyncio.Task] = set()
        self._batched = backend.batch_size > 1
        self.most = backend.batch_size * WINDOW if self._batched else limits.concurrency
        self._concurrency, self._breaker = ConcurrencyLimit(self.most), CircuitBreaker()
        self._requests, self._tokens = RateLimit(limits.requests_per_minute), RateLimit(limits.tokens_per_minute)
        self._rng = random.Random()
        self._largest_in, self._probing, self._unreached, self._answered = 0, True, 0, 0.0
        self._queue: list[tuple[Request, asyncio.Future]] = []
        self._stop, self._landed = asyncio.Event(), asyncio.Event()
        self._batches_task = asyncio.create_task(self._batches()) if self._batched else None

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def stop(self, stopped: str, why: str) -> None:
        """Ends the run: nothing new is asked, calls in flight are waited for, the rest stays open."""
        if not self.stopping:
            self.outcome.stopped, self.outcome.why = stopped, why
            self._stop.set()
            self._on_stop()

    def crashed(self, error: BaseException) -> None:
        """Ends the run after a full disk or a bug: no answer can be kept, so nothing more is asked."""
        self.error = self.error or error
        self.stop("error", str(error))

    async def aclose(self, again: bool = False) -> None:
        """Ends it. `again`: whether the backend will be asked by another one."""
        if self._batches_task:
            self._batches_task.cancel()
        await self.backend.aclose(again)

    async def ask(self, request: Request) -> tuple[Answer, dict]:
        """Returns the answer and what it took: `tokens_in`, `tokens_out`, `cost`, `attempts`, `latency_ms`.

        Raises:
            Transient, Unanswerable: no answer after all tries.
            Stopped: the run is ending.
        """
        tokens_in = sum(estimate_tokens(p.width, p.height, self.meter.price) for p in request.pictures)
        tokens_in += len(request.prompt) // 3
        estimate = max(tokens_in, self._largest_in) + request.max_tokens
        failures = limited = refused = 0
        first = None
        while True:
            began, reserved = await self._take_off(request, tokens_in, estimate)
            first = first or began
            self.outcome.attempts += 1
            dollars = used = None
            try:
                answer = await self._generate(request)
                # If the server does not say what it took, a cost limit counts the most that it can be.
                dollars = self.meter.of(answer.tokens_in, answer.tokens_out)
                dollars = (reserved or None) if dollars is None else dollars
                if answer.tokens_in is not None and answer.tokens_out is not None:
                    used = answer.tokens_in + answer.tokens_out
            except Transient as error:
                failures, limited = failures + (not error.limited), limited + error.limited
                wait = self._wait(error, failures, limited, began, first)
                if wait is None:
                    self._gave_up(error)
                    raise
            except Unanswerable as error:
                self.outcome.failures[error.kind] += 1
                self._unreached_since = None
                self._note_turned_away(request, error)
                self._gave_up(error)
                raise
            except Fatal as error:
                self.outcome.failures[error.kind] += 1
                if not (isinstance(error, FieldRefused) and self._leave_out(error)):
                    self.stop("quota" if error.kind == "quota" else "fatal", str(error))
                    raise Stopped from error
                refused, wait = refused + 1, 0.0
            else:
                seconds = time.monotonic() - began
                self._succeeded(answer, dollars, seconds)
                spent = {"tokens_in": answer.tokens_in, "tokens_out": answer.tokens_out, "cost": dollars}
                attempts = failures + limited + refused + 1
                return answer, {**spent, "attempts": attempts, "latency_ms": round(1000 * seconds)}
            finally:
                self.meter.settle(reserved, dollars)
                self._first.discard(bool(request.pictures))
                if dollars is not None:
                    self.meter.billed.add(bool(request.pictures))
                self._tokens.settle(estimate, used if used is not None else estimate)
                self.flying.discard(asyncio.current_task())
                self._concurrency.release()
                self._landed.set()
            try:
                await asyncio.wait_for(self._stop.wait(), wait)
            except asyncio.TimeoutError:
                continue
            raise Stopped

    async def _take_off(self, request: Request, tokens_in: int, estimate: int) -> tuple[float, float]:
        """Waits for the limits and for the budget. Returns the start time and the US dollars set aside."""
        if self.stopping:  # before a wait that nothing would end
            raise Stopped
        await self._requests.take()
        await self._tokens.take(estimate)
        began, kind = await self._concurrency.acquire(), bool(request.pictures)
        while True:
            # A server may bill more than is estimated. The first call with a picture, and without one, tells how much.
            unknown = self.meter.keeps_limit and kind not in self.meter.billed
            waits = unknown and kind in self._first
            reserved = None
            if not waits:
                reserved = self.meter.reserve(max(tokens_in, self._largest_in), request.max_tokens)
            if reserved is not None and unknown:
                self._first.add(kind)
            if reserved is not None or self.stopping or not self.flying:
                break
            self._landed.clear()  # a call in flight usually costs less than what is set aside for it
            await self._landed.wait()
        if reserved is None and not self.stopping:
            self.stop("cost", f"the next call could exceed --max_cost_usd {self.meter.limit:g}")
        if self.stopping:
            self._concurrency.release()
            if reserved:
                self.meter.settle(reserved, None)
            raise Stopped
        self.flying.add(asyncio.current_task())
        return began, reserved

    def _wait(self, error: Transient, failures: int, limited: int, began: float, first: float) -> float | None:
        """Seconds until the next try of a call that failed, or None to give it up."""
        self.outcome.failures[error.kind] += 1
        now = time.monotonic()
        self._note_silence(error, now)
        if error.kind != "connect":
            self._unreached_since = None
        elif not self._probing:
            self._unreached_since = self._unreached_since or now
            return self.limits.retry.wait_for_server(failures, now - self._unreached_since, now - first, self._rng)
        policy = PROBE if self._probing and not error.limited else self.limits.retry
        if self._probing and error.kind in ("connect", "timeout"):
            # While probing, calls take turns in case a picture is to blame. But a server that is down is down for all.
            self._unreached += 1
            failures = max(failures, self._unreached)
        since = max(first, self._answered) if error.limited else first
        if error.limited:
            self._concurrency.limited(began, error.wait)
        return policy.wait(error, failures, limited, now - since, self._rng)

    def _note_silence(self, error: Transient, now: float) -> None:
        """Tells the user if no call has been answered for a while."""
        if now - max(self._noted, self._answered) >= NOTE_EVERY_S:
            self._noted = now
            since = f" for {now - self._answered:.0f} s" if self._answered else ""
            self._note(f"No answer{since}: {error}. Trying again.")

    def _succeeded(self, answer: Answer, dollars: float | None, seconds: float) -> None:
        outcome = self.outcome
        outcome.calls += 1
        outcome.tokens_in += answer.tokens_in or 0
        outcome.tokens_out += answer.tokens_out or 0
        outcome.cost += dollars or 0.0
        outcome.latencies_s.append(seconds)
        self._largest_in = max(self._largest_in, answer.tokens_in or 0)
        self._breaker.record(None)
        self._concurrency.succeeded()
        self._answered, self._unreached_since = time.monotonic(), None
        if self._probing:
            self._probing = False
            self._concurrency.open()

    def _leave_out(self, error: FieldRefused) -> bool:
        """Goes on without a refused field, if the backend can. The calls on their way meet the refusal, too."""
        if not self.backend.leave_out(error):
            return False
        if error.field not in self._left_out:
            self._left_out.add(error.field)
            self._on_left_out(error)
        return True

    def _note_turned_away(self, request: Request, error: Unanswerable) -> None:
        if error.general and not self.outcome.calls:
            words = re.sub(r"\W*\w*\d[\w-]*", " ", str(error))  # without ids
            asked = (
                ("picture", tuple(p.data for p in request.pictures)) if request.pictures else ("text", request.prompt)
            )
            self._turned_away.setdefault((asked[0], words), (set(), str(error)))[0].add(hash(asked))

    def conclude(self) -> None:
        """Once nothing is left to ask: if every call was turned away in the same words, the request is at fault."""
        if not self.stopping and not self.outcome.calls:
            self._stop_if_alike(2)

    def _stop_if_alike(self, least: int) -> None:
        for (what, _), (found, said) in self._turned_away.items():
            if len(found) >= least:
                self.stop("fatal", f"{many(len(found), what)} were turned away in the same words: {said}")

    def _gave_up(self, error: CallError) -> None:
        self._breaker.record(error)
        if self._probing:
            # If the server only rejects the first pictures, others may do.
            self._stop_if_alike(ALIKE)
            if isinstance(error, Transient) or self._breaker.why:
                why = f"the first calls failed: {error}"
                if error.kind == "connect":
                    why = f"{error}: nothing answers there. Start the server, or type another --base_url."
                self.stop("fatal", why)
        elif error.kind == "connect":
            seconds = time.monotonic() - (self._unreached_since or 0)
            self.stop("breaker", f"{error}: nothing has answered there for {seconds:.0f} s")
        elif isinstance(error, Transient) and error.limited:
            self.stop("quota", f"the rate limit persists: {error}")
        elif why := self._breaker.why:
            self.stop("breaker", f"{why}: {error}")

    async def _generate(self, request: Request) -> Answer:
        if self._batched:
            future = asyncio.get_running_loop().create_future()
            self._queue.append((request, future))
            answer = await future
        else:
            (answer,) = await self.backend.generate([request])
        if isinstance(answer, CallError):
            raise answer
        return answer

    async def _batches(self) -> None:
        """Serves the queue in batches of similar length; requests that arrive meanwhile form the next window."""
        while True:
            seen = -1
            while (len(self._queue) < self.most and len(self._queue) != seen) or not self._queue:
                seen = len(self._queue)
                await asyncio.sleep(0.02)
            window = sorted(self._queue, key=lambda pair: len(pair[0].prompt))
            self._queue = []
            for start in range(0, len(window), self.backend.batch_size):
                batch = window[start : start + self.backend.batch_size]
                try:
                    answers = await self.backend.generate([request for request, _ in batch])
                except CallError as error:
                    answers = [error] * len(batch)
                except Exception as error:
                    self.crashed(error)
                    answers = [Fatal("server", str(error))] * len(batch)
                for (_, future), answer in zip(batch, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)
