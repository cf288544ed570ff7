"""How fast a backend is called: concurrency that yields to rate limits, calls and tokens per minute, retries, a circuit breaker."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from ..types import CallError, Transient

MAX_ATTEMPTS = 6
MAX_ELAPSED_S = 600.0
# A server that asks for more than this speaks of a quota of the day: waiting in front of the screen makes no sense.
LONGEST_WAIT_S = 300.0


@dataclass
class RetryPolicy:
    """Which failures are tried again, and after how long.

    Full jitter (Brooker 2015, "Exponential Backoff and Jitter"): a wait drawn from 0 to `min(cap, base * 2^k)` seconds.
    A server's own hint is a lower bound. Rate limits do not use up attempts, only the time that a call may take.
    """

    max_attempts: int = MAX_ATTEMPTS
    max_elapsed_s: float = MAX_ELAPSED_S
    base_s: float = 1.0
    cap_s: float = 60.0

    def wait(self, error: Transient, failures: int, limited: int, elapsed_s: float, rng: random.Random) -> float | None:
        """Seconds until the next try, None where there should be none.

        Args:
            failures: tries of this call that failed so far, without those that a rate limit turned away (`limited`).
            elapsed_s: seconds since its first try; where a rate limit holds, since anybody got an answer, too.
        """
        if failures >= self.max_attempts or elapsed_s >= self.max_elapsed_s:
            return None
        doublings = min(failures + limited - 1, 60)  # of those that a rate limit sends away there is no end
        jitter = rng.uniform(0, min(self.cap_s, self.base_s * 2**doublings))
        if not error.wait:  # "at once" from a server that has just refused is no hint
            return jitter
        if error.wait > LONGEST_WAIT_S:
            return None
        # Those who were sent away together do not come back together.
        return error.wait + min(jitter, 0.1 * error.wait + 0.05)


class ConcurrencyLimit:
    """How many calls may be in flight: halved by a rate limit, one more after each round without one (AIMD).

    A pause that a server asks for holds back every call, not only the one that was told.

    Args:
        most: calls.
        start: calls until `open`.
    """

    def __init__(self, most: int, start: int | None = None):
        self.most, self.now, self.in_flight = most, start or most, 0
        self.paused_until = 0.0
        self._clean, self._last_cut = 0, 0.0
        self._free: deque[asyncio.Future] = deque()

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
                waiter = asyncio.get_running_loop().create_future()
                self._free.append(waiter)
                await waiter

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
        """A rate limit turned away a call that started then. Those that were in flight together halve the width once."""
        if wait:
            self.paused_until = max(self.paused_until, time.monotonic() + min(wait, LONGEST_WAIT_S))
        self._clean = 0
        if started >= self._last_cut:
            self.now, self._last_cut = max(1, self.now // 2), time.monotonic()

    def _wake(self) -> None:
        places = self.now - self.in_flight
        while self._free and places > 0:
            waiter = self._free.popleft()
            if not waiter.done():
                waiter.set_result(None)
                places -= 1


class RateLimit:
    """At most so many per minute, evenly: a bucket that holds `burst_s` seconds' worth and refills all the time."""

    def __init__(self, per_minute: float | None, burst_s: float = 5.0):
        self.per_second = per_minute / 60 if per_minute else None
        self._room = max(1.0, burst_s * self.per_second) if self.per_second else 0.0
        self._level, self._then = self._room, time.monotonic()

    async def take(self, amount: float = 1.0) -> None:
        """Waits until the bucket is not in debt, then takes. What is larger than the bucket leaves it in debt."""
        if self.per_second is None:
            return
        while True:
            now = time.monotonic()
            self._level = min(self._room, self._level + (now - self._then) * self.per_second)
            self._then = now
            need = min(amount, self._room)
            if self._level >= need:
                self._level -= amount
                return
            await asyncio.sleep((need - self._level) / self.per_second)

    def settle(self, estimated: float, actual: float) -> None:
        """Corrects what was taken by what was used."""
        self._level += estimated - actual


class CircuitBreaker:
    """Opens when calls fail as a rule: the first 20 all in the same way, or more than half of the last 200."""

    FIRST, RECENT = 20, 200

    def __init__(self):
        self._recent: deque[str | None] = deque(maxlen=self.RECENT)
        self._succeeded = False

    def record(self, error: CallError | None) -> None:
        """One call that ended, after all its tries."""
        self._recent.append(error.kind if error else None)
        self._succeeded = self._succeeded or error is None

    @property
    def why(self) -> str | None:
        """What to tell the user, once it is open."""
        kinds = Counter(kind for kind in self._recent if kind)
        if not kinds:
            return None
        (kind, count), failed = kinds.most_common(1)[0], sum(kinds.values())
        if not self._succeeded and count >= self.FIRST:
            return f"the first {count} calls all failed ({kind})"
        if len(self._recent) == self.RECENT and failed > self.RECENT / 2:
            return f"{failed} of the last {self.RECENT} calls failed (most of them: {kind})"
        return None


@dataclass
class Limits:
    """How fast, and for how much.

    Args:
        concurrency: calls in flight at most.
        requests_per_minute, tokens_per_minute: as the provider grants them; None: no limit of our own.
        max_reasks: further tries of a caption that a check turned down.
        retry: waits between tries of a call that failed.
    """

    concurrency: int = 16
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    max_reasks: int = 1
    retry: RetryPolicy = field(default_factory=RetryPolicy)
