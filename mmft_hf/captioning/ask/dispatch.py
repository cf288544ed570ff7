"""Calls to a backend: how many at a time, how often again, when to stop; and what they took."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from ..types import Answer, Backend, CallError, Fatal, Request, Transient, Unanswerable
from .cost import CostMeter, estimate_tokens
from .limits import CircuitBreaker, ConcurrencyLimit, Limits, RateLimit, RetryPolicy

# The first call goes alone, and gives up sooner: a wrong key or a server that is down costs one call, not one of each.
PROBE = RetryPolicy(max_attempts=3, base_s=0.5, cap_s=4.0)
WINDOW = 4  # batches of a model in this process that are sorted by length together


_ENDS = ("stopped", "why", "kind")


@dataclass
class Outcome:
    """What a run of the driver did.

    `stopped`: why it ended early (`fatal`, `quota`, `breaker`, `cost`, `user`, `error`), None where it came to its end; `why`
    says it in words, and `kind` names the failure.
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
    kind: str = ""

    def __add__(self, other: Outcome) -> Outcome:
        """Of two runs, one after the other."""
        summed = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name not in _ENDS}
        last = other if other.stopped or not self.stopped else self
        return Outcome(**summed, **{name: getattr(last, name) for name in _ENDS})

    def summary(self) -> dict:
        """For a record of the run."""
        names = ("calls", "attempts", "tokens_in", "tokens_out", "stopped")
        counts = {name: getattr(self, name) for name in names}
        counts |= {"results": dict(self.results), "failures": dict(self.failures), "seconds": round(self.seconds, 1)}
        return counts | {"cost_usd": round(self.cost, 6) if self.cost else None}


class Stopped(Exception):
    """This call was not made, or not made again, because the run is ending."""


class Dispatcher:
    """Makes the calls of one run. Lives within one event loop.

    Args:
        on_stop: called once when the run has to end.
    """

    def __init__(self, backend: Backend, limits: Limits, meter: CostMeter, on_stop: Callable[[], None]):
        self.backend, self.limits, self.meter, self._on_stop = backend, limits, meter, on_stop
        self.outcome = Outcome()
        self.error: BaseException | None = None
        self.flying: set[asyncio.Task] = set()
        self._batched = backend.batch_size > 1
        self.most = backend.batch_size * WINDOW if self._batched else limits.concurrency
        self.width = ConcurrencyLimit(self.most, start=1)
        self._breaker = CircuitBreaker()
        self._requests, self._tokens = RateLimit(limits.requests_per_minute), RateLimit(limits.tokens_per_minute)
        self._rng = random.Random()
        self._largest_in, self._probing, self._unheard, self._answered = 0, True, 0, 0.0
        self._waiting: list[tuple[Request, asyncio.Future]] = []
        self._stop, self._landed = asyncio.Event(), asyncio.Event()
        self._batches_task = asyncio.create_task(self._batches()) if self._batched else None

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def stop(self, stopped: str, why: str, kind: str = "") -> None:
        """Ends the run: nothing new is asked, calls in flight are waited for, the rest stays open."""
        if not self.stopping:
            self.outcome.stopped, self.outcome.why, self.outcome.kind = stopped, why, kind
            self._stop.set()
            self._on_stop()

    def crashed(self, error: BaseException) -> None:
        """A full disk, or a defect of ours: nothing more can be kept, so nothing more is asked."""
        self.error = self.error or error
        self.stop("error", str(error))

    async def aclose(self) -> None:
        if self._batches_task:
            self._batches_task.cancel()
        await self.backend.aclose()

    async def ask(self, request: Request) -> tuple[Answer, dict]:
        """The answer and what it took: `tokens_in`, `tokens_out`, `cost`, `attempts`, `latency_ms`."""
        picture = request.picture
        tokens_in = estimate_tokens(picture.width, picture.height, self.meter.price) + len(request.prompt) // 3
        estimate = max(tokens_in, self._largest_in) + request.max_tokens
        failures = limited = 0
        first = None
        while True:
            started = await self._take_off(request, tokens_in, estimate)
            began, reserved = started
            first = first or began
            self.outcome.attempts += 1
            dollars = used = None
            try:
                answer = await self._generate(request)
                dollars = self.meter.of(answer.tokens_in, answer.tokens_out)
                if dollars is None:  # the server does not say what it took: a limit counts the most that it can be
                    dollars = reserved or None
                if answer.tokens_in is not None and answer.tokens_out is not None:
                    used = answer.tokens_in + answer.tokens_out
            except Transient as error:
                self.outcome.failures[error.kind] += 1
                failures, limited = failures + (not error.limited), limited + error.limited
                policy = PROBE if self._probing and not error.limited else self.limits.retry
                tries = failures
                if self._probing and error.kind in ("connect", "timeout"):
                    # Calls take turns, in case a picture is to blame. Nobody there is nobody there for all of them.
                    self._unheard += 1
                    tries = max(failures, self._unheard)
                since = max(first, self._answered) if error.limited else first
                wait = policy.wait(error, tries, limited, time.monotonic() - since, self._rng)
                if error.limited:
                    self.width.limited(began, error.wait)
                if wait is None:
                    self._gave_up(error)
                    raise
            except Unanswerable as error:
                self.outcome.failures[error.kind] += 1
                self._gave_up(error)
                raise
            except Fatal as error:
                self.outcome.failures[error.kind] += 1
                self.stop("quota" if error.kind == "quota" else "fatal", str(error), error.kind)
                raise Stopped from error
            else:
                seconds = time.monotonic() - began
                self._succeeded(answer, dollars, seconds)
                spent = {"tokens_in": answer.tokens_in, "tokens_out": answer.tokens_out, "cost": dollars}
                return answer, {**spent, "attempts": failures + limited + 1, "latency_ms": round(1000 * seconds)}
            finally:
                self.meter.settle(reserved, dollars)
                self._tokens.settle(estimate, used if used is not None else estimate)
                self.flying.discard(asyncio.current_task())
                self.width.release()
                self._landed.set()
            await self._sleep(wait)

    async def _take_off(self, request: Request, tokens_in: int, estimate: int) -> tuple[float, float]:
        """Waits for a place, for the rate limits and for the budget. Returns the time and the dollars set aside."""
        if self.stopping:  # before any wait, which nobody would end
            raise Stopped
        await self._requests.take()
        await self._tokens.take(estimate)
        began = await self.width.acquire()
        while True:
            reserved = self.meter.reserve(max(tokens_in, self._largest_in), request.max_tokens)
            if reserved is not None or self.stopping or not self.flying:
                break
            self._landed.clear()  # a call in flight mostly costs less than what is set aside for it
            await self._landed.wait()
        if reserved is None and not self.stopping:
            self.stop("cost", f"the next call could pass --max_cost_usd {self.meter.limit:g}")
        if self.stopping:
            self.width.release()
            if reserved:
                self.meter.settle(reserved, None)
            raise Stopped
        self.flying.add(asyncio.current_task())
        return began, reserved

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except asyncio.TimeoutError:
            return
        raise Stopped

    def _succeeded(self, answer: Answer, dollars: float | None, seconds: float) -> None:
        outcome = self.outcome
        outcome.calls += 1
        outcome.tokens_in += answer.tokens_in or 0
        outcome.tokens_out += answer.tokens_out or 0
        outcome.cost += dollars or 0.0
        outcome.latencies_s.append(seconds)
        self._largest_in = max(self._largest_in, answer.tokens_in or 0)
        self._breaker.record(None)
        self.width.succeeded()
        self._answered = time.monotonic()
        if self._probing:
            self._probing = False
            self.width.open()

    def _gave_up(self, error: CallError) -> None:
        self._breaker.record(error)
        if self._probing:
            # The first pictures may be such as the server does not take: others may do.
            if isinstance(error, Transient) or self._breaker.why:
                why = f"the first calls failed: {error}"
                if error.kind == "connect":
                    why = f"{error}: nothing answers there. Start the server, or type another --base_url."
                self.stop("fatal", why, error.kind)
        elif isinstance(error, Transient) and error.limited:
            self.stop("quota", f"the rate limit does not lift: {error}")
        elif why := self._breaker.why:
            self.stop("breaker", f"{why}: {error}")

    async def _generate(self, request: Request) -> Answer:
        if not self._batched:
            (answer,) = await self.backend.generate([request])
        else:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append((request, future))
            answer = await future
        if isinstance(answer, CallError):
            raise answer
        return answer

    async def _batches(self) -> None:
        """Serves those who wait in batches of similar length; what arrives meanwhile is the next window."""
        while True:
            seen = -1
            while (len(self._waiting) < self.most and len(self._waiting) != seen) or not self._waiting:
                seen = len(self._waiting)
                await asyncio.sleep(0.02)
            window = sorted(self._waiting, key=lambda pair: len(pair[0].prompt))
            self._waiting = []
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
