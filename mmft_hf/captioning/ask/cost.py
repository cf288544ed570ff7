"""What captions cost: a dated table of prices that users can override, and how many tokens a picture counts for."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any, ClassVar

import yaml

from ...core.errors import UserError

# What may follow a name in the table: a date, a version. `-mini` or `-image` is another model at another price.
_VERSION = re.compile(r"(?:[-@](?:v?\d[\d.]*|latest|preview|exp))*")
_FIELDS = {"input", "output", "image"}
# base: always; tile (OpenAI), crop (Gemini) and patch: side in pixels of what costs `tokens`; pixels: of one token.
_IMAGE_FIELDS = {"base", "tile", "crop", "patch", "tokens", "pixels", "most"}


@dataclass(frozen=True)
class Price:
    """Of one model.

    Args:
        model: name in the table.
        input, output: USD per million tokens.
        date: when the table was made, or empty.
        image: how a picture is counted, as in `prices.yaml`; empty where that is unknown.
    """

    model: str
    input: float
    output: float
    date: str = ""
    image: Mapping[str, float] = field(default_factory=dict)


def price_of(model: str, overrides: str | os.PathLike | None = None) -> Price | None:
    """Returns the price of a model, or None where it is in no table: it is unknown then, not zero.

    Args:
        model: as the provider names it; `gemini-2.5-flash-lite-001` finds `gemini-2.5-flash-lite`.
        overrides: YAML file in the shape of `prices.yaml`, whose models come first.

    Raises:
        UserError: the file cannot be read, or has another shape.
    """
    model = model.removeprefix("models/")
    for table in ([_read(os.fspath(overrides))] if overrides else []) + [_builtin()]:
        known = [name for name in table if model.startswith(name) and _VERSION.fullmatch(model[len(name) :])]
        if known:
            return table[max(known, key=len)]
    return None


def estimate_tokens(width: int, height: int, price: Price | None) -> int:
    """Returns about how many tokens a picture of `width` x `height` pixels counts for, rather too many than too few.

    Where the model or its way of counting is unknown, it is a token for every 28 x 28 pixels, as open models count.
    """
    rule = dict(price.image) if price is not None and price.image else {"patch": 28, "tokens": 1}
    tokens = rule.get("base", 0)
    if "tile" in rule:
        # OpenAI: scaled down into 2048 x 2048, then to a short side of 768.
        scale = min(1, 2048 / max(width, height))
        scale *= min(1, 768 / (min(width, height) * scale))
        tokens += rule["tokens"] * _cells(width * scale, height * scale, rule["tile"])
    if "crop" in rule:
        # Gemini: one up to 384 x 384, else crops of two thirds of the short side.
        side = min(max(min(width, height) // 1.5, 256), rule["crop"])
        tokens += rule["tokens"] * (1 if max(width, height) <= 384 else _cells(width, height, side))
    if "patch" in rule:
        tokens += rule["tokens"] * min(_cells(width, height, rule["patch"]), rule.get("most", math.inf))
    if "pixels" in rule:
        tokens += min(width * height / rule["pixels"], rule.get("most", math.inf))
    return math.ceil(tokens)


def _cells(width: float, height: float, side: float) -> int:
    # Rounded first: 2048 * (768 / 2048) must not become one pixel more than 768.
    return math.ceil(round(width, 6) / side) * math.ceil(round(height, 6) / side)


@lru_cache(maxsize=1)
def _builtin() -> dict[str, Price]:
    return _table(yaml.safe_load(files(__package__).joinpath("prices.yaml").read_text("utf-8")), "prices.yaml")


def _read(path: str) -> dict[str, Price]:
    try:
        with open(path, encoding="utf-8") as file:
            data = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"price file {path}: expected a YAML file that can be read, found: {said}") from None
    return _table(data, path)


def _table(data: Any, path: str) -> dict[str, Price]:
    example = "Write models: {my-model: {input: 0.10, output: 0.40}}, in USD per million tokens."
    models = data.get("models") if isinstance(data, dict) else None
    if not isinstance(models, dict) or set(data) - {"date", "models"}:
        raise UserError(f"price file {path}: expected `models` and perhaps `date`, found something else. {example}")
    table = {}
    for name, row in models.items():
        if not isinstance(row, dict) or not {"input", "output"} <= set(row) <= _FIELDS:
            raise UserError(f"price file {path}, {name}: expected input, output and perhaps image. {example}")
        image = row.get("image") or {}
        counted = isinstance(image, dict) and set(image) <= _IMAGE_FIELDS
        numbers = [row["input"], row["output"], *(image.values() if counted else ())]
        if not counted or any(_not_a_number(n) for n in numbers):
            raise UserError(f"price file {path}, {name}: expected numbers from 0 on, found others. {example}")
        if (set(image) & {"tile", "crop", "patch"} and "tokens" not in image) or 0 in image.values():
            raise UserError(f"price file {path}, {name}: expected the tokens of a tile, crop or patch above 0.")
        table[str(name)] = Price(str(name), row["input"], row["output"], str(data.get("date") or ""), image)
    return table


def _not_a_number(value: object) -> bool:
    return isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf


class CostMeter:
    """What was spent, and what calls in flight may still cost, so that a limit is never passed.

    Args:
        price: of the model (`prices.Price`: dollars per million tokens in and out); None where it is unknown.
        spent: dollars of earlier runs.
        limit: dollars, of all runs together.
    """

    def __init__(self, price=None, spent: float = 0.0, limit: float | None = None):
        self.price, self.spent, self.limit = price, spent, limit
        self._reserved = 0.0
        self._dearest = 0.0

    def of(self, tokens_in: int | None, tokens_out: int | None) -> float | None:
        """Dollars for so many tokens; None where the price or the tokens are unknown."""
        if self.price is None or tokens_in is None or tokens_out is None:
            return None
        return (tokens_in * self.price.input + tokens_out * self.price.output) / 1e6

    def reserve(self, tokens_in: int, tokens_out: int) -> float | None:
        """Sets the most that a call can cost aside. None: the limit would be passed."""
        if self.limit is None or self.price is None:
            return 0.0
        dollars = max(self.of(tokens_in, tokens_out), self._dearest)
        if self.spent + self._reserved + dollars > self.limit:
            return None
        self._reserved += dollars
        return dollars

    def settle(self, reserved: float, dollars: float | None) -> None:
        """The call ended and cost so much."""
        self._reserved -= reserved
        if dollars:
            self.spent += dollars
            self._dearest = max(self._dearest, dollars)


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

    # What `add` reads of a row of the journal.
    COLUMNS: ClassVar = (
        *("key", "call_id", "raw_text", "error", "attempts", "tokens_in", "tokens_out", "cost"),
        *("latency_ms", "run_id", "updated_at"),
    )

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
