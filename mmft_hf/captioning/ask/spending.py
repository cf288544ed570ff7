"""What the captions of a data set took, over all runs that asked for them, as far as the journal knows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# What `Spending.add` reads of a row of the journal.
COLUMNS = ("key", "call_id", "raw_text", "error", "attempts", "tokens_in", "tokens_out", "cost", "latency_ms")
COLUMNS += ("run_id", "updated_at")


@dataclass
class Spending:
    """Sums of answers. What a single answer leaves unknown is unknown of all: no sum is too small.

    Args:
        calls: answered ones; `attempts` counts those without an answer, too.
        tokens_in, tokens_out: as the servers count them.
        cost: dollars, at the prices of the day.
        runs: when each run began and ended, in seconds.
    """

    calls: int = 0
    attempts: int = 0
    tokens_in: int | None = 0
    tokens_out: int | None = 0
    cost: float | None = 0.0
    runs: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, row: Mapping) -> None:
        """Adds a row of the journal, of `COLUMNS`."""
        if row["call_id"] not in (None, row["key"]):
            return  # one call answered several captions, and counts with the first
        self.attempts += row["attempts"] or 0
        end = row["updated_at"]
        begin, last = self.runs.get(row["run_id"], (end, end))
        self.runs[row["run_id"]] = min(begin, end - (row["latency_ms"] or 0) / 1000), max(last, end)
        if row["raw_text"] or (row["raw_text"] is not None and not row["error"]):
            self.calls += 1
            for name in ("tokens_in", "tokens_out", "cost"):
                both = getattr(self, name), row[name]
                setattr(self, name, None if None in both else sum(both))

    def __add__(self, other: Spending) -> Spending:
        """Of two splits, which one run may have captioned."""
        found = Spending(self.calls + other.calls, self.attempts + other.attempts, runs=dict(self.runs))
        for name in ("tokens_in", "tokens_out", "cost"):
            both = getattr(self, name), getattr(other, name)
            setattr(found, name, None if None in both else sum(both))
        for run, (begin, end) in other.runs.items():
            mine = found.runs.get(run, (begin, end))
            found.runs[run] = min(begin, mine[0]), max(end, mine[1])
        return found

    @property
    def seconds(self) -> float | None:
        """The time in which a run was at work, from its first question to its last answer; None without any."""
        total, until = 0.0, float("-inf")
        for begin, end in sorted(self.runs.values()):  # processes work side by side
            total += max(0.0, end - max(begin, until))
            until = max(until, end)
        return total if self.runs else None

    def summary(self) -> dict:
        """For `captions.json`; None: unknown."""
        names = ("calls", "attempts", "tokens_in", "tokens_out")
        cost, seconds = self.cost, self.seconds
        return {name: getattr(self, name) for name in names} | {
            "cost_usd": None if cost is None else round(cost, 6),
            "seconds": None if seconds is None else round(seconds, 1),
        }
