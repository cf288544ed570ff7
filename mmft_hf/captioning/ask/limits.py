"""How fast a backend is called: calls in flight, calls and tokens per minute, waits between tries, and a circuit breaker."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from ..types import CallError, Transient

# A server that asks for a longer wait means a daily quota, for which it makes no sense to wait.
LONGEST_WAIT_S = 300.0


@dataclass
class RetryPolicy:
    """Which failed calls are tried again, and after how long.

    Full jitter: a wait drawn from 0 to `min(cap, base * 2^k)` seconds. The wait that a server asks for is a lower bound.
    Rate limits do not use up the attempts of a call, only its time. Nor does a server that cannot be reached after it has answered:
    calls wait for it up to `outage_s` seconds, and then the run ends.

    Reference: Brooker 2015, "Exponential Backoff and Jitter" (AWS Architecture Blog).
    """

    max_attempts: int = 6
    max_elapsed_s: float = 600.0
    base_s: float = 1.0
    cap_s: float = 60.0
    outage_s: float = 45.0

    def wait_for_server(self, failures: int, gone_s: float, elapsed_s: float, rng: random.Random) -> float | None:
        """Seconds until the next try after a failed connection, or None if there is to be none.

        Args:
            failures, elapsed_s: see `wait`.
            gone_s: seconds since the server was found to be out of reach.
        """
        if gone_s >= self.outage_s or elapsed_s >= self.max_elapsed_s:
            return None
        return rng.uniform(0.2, 1) * min(5.0, self.base_s * 2 ** min(failures, 60))

    def wait(self, error: Transient, failures: int, limited: int, elapsed_s: float, rng: random.Random) -> float | None:
        """Seconds until the next try, or None if there is to be none.

        Args:
            failures: failed tries of this call so far, without those that a rate limit turned away (`limited`).
            elapsed_s: seconds since its first try; under a rate limit, since any call was answered, if that is later.
        """
        if failures >= self.max_attempts or elapsed_s >= self.max_elapsed_s:
            return None
        doublings = min(failures + limited - 1, 60)  # the number of rate limits has no bound
        jitter = rng.uniform(0, min(self.cap_s, self.base_s * 2**doublings))
        if not error.wait:  # "at once" from a server that has just refused tells nothing
            return jitter
        if error.wait > LONGEST_WAIT_S:
            return None
        # The jitter keeps calls that were turned away together from returning together.
        return error.wait + min(jitter, 0.1 * error.wait + 0.05)


@dataclass
class Limits:
    """How fast a backend is called.

    Args:
        concurrency: maximum number of calls in flight.
        requests_per_minute, tokens_per_minute: as the provider grants them; None: no limit of our own.
        max_reasks: how often a caption is asked for again after a check turned it down.
        retry: waits between the tries of a call that failed.
    """

    concurrency: int = 16
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_reasks: int = 1
    retry: RetryPolicy = field(default_factory=RetryPolicy)


class ConcurrencyLimit:
    """How many calls may be in flight: half as many after a rate limit, one more after each round without one (AIMD).

    A pause that a server asks for holds back every call, not only the one that was told.

    Args:
        most: number of calls after `open`; 1 before it.
    """

    def __init__(self, most: int):
        self.most, self.now, self.in_flight = most, 1, 0
        self.paused_until = 0.0
        self._clean, self._last_halved = 0, 0.0
        self._waiting: deque[asyncio.Future] = deque()

    async def acquire(self) -> float:
        """Waits for a place. Returns the time at which the call starts."""
        while True:
            pause = self.paused_until - time.monotonic()
            if pause > 0:
                await asyncio.sleep(pause)
            elif self.in_flight < self.now:
                self.in_flight += 1
                return time.monotonic()
            else:
                self._waiting.append(asyncio.get_running_loop().create_future())
                await self._waiting[-1]

    def release(self) -> None:
        self.in_flight -= 1
        self._wake()

    def open(self) -> None:
        self.now = self.most
        self._wake()

    def succeeded(self) -> None:
        self._clean += 1
        if self._clean >= self.now and self.now < self.most:
            self.now, self._clean = self.now + 1, 0
            self._wake()

    def limited(self, started: float, wait: float | None) -> None:
        """A rate limit turned away a call that started then. Calls that were in flight together halve the limit once."""
        if wait:
            self.paused_until = max(self.paused_until, time.monotonic() + min(wait, LONGEST_WAIT_S))
        self._clean = 0
        if started >= self._last_halved:
            self.now, self._last_halved = max(1, self.now // 2), time.monotonic()

    def _wake(self) -> None:
        places = self.now - self.in_flight
        while self._waiting and places > 0:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                places -= 1


class RateLimit:
    """A token bucket: it refills evenly with `per_minute` and holds as much as `burst_s` seconds add; None: no limit."""

    def __init__(self, per_minute: float | None, burst_s: float = 5.0):
        self.per_second = per_minute / 60 if per_minute else None
        self._room = max(1.0, burst_s * self.per_second) if self.per_second else 0.0
        self._level, self._then = self._room, time.monotonic()

    async def take(self, amount: float = 1.0) -> None:
        """Waits until the bucket is not in debt, then takes. An amount larger than the bucket leaves it in debt."""
        while self.per_second is not None:
            now = time.monotonic()
            self._level = min(self._room, self._level + (now - self._then) * self.per_second)
            self._then = now
            need = min(amount, self._room)
            if self._level >= need:
                self._level -= amount
                return
            await asyncio.sleep((need - self._level) / self.per_second)

    def settle(self, estimated: float, actual: float) -> None:
        """Replaces what was taken by what was used."""
        self._level += estimated - actual


class CircuitBreaker:
    """Opens when most calls fail: the first 20 all in the same way, or more than half of the last 200."""

    FIRST, RECENT = 20, 200

    def __init__(self):
        self._recent: deque[str | None] = deque(maxlen=self.RECENT)
        self._succeeded = False

    def record(self, error: CallError | None) -> None:
        """A call ended, after all its tries."""
        self._recent.append(error.kind if error else None)
        self._succeeded = self._succeeded or error is None

    @property
    def why(self) -> str | None:
        """The message for the user, once the breaker is open."""
        kinds = Counter(kind for kind in self._recent if kind)
        if not kinds:
            return None
        (kind, count), failed = kinds.most_common(1)[0], sum(kinds.values())
        if not self._succeeded and count >= self.FIRST:
            return f"the first {count} calls all failed ({kind})"
        if len(self._recent) == self.RECENT and failed > self.RECENT / 2:
            return f"{failed} of the last {self.RECENT} calls failed (most of them: {kind})"
        return None
