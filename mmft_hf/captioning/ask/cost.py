"""The cost of captions: a dated price table that users can override, a meter that keeps a limit, and sums of what was spent."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from ...core.errors import UserError
from ...core.reading import read_yaml

BUILTIN = Path(__file__).with_name("prices.yaml")
# What may follow a name of the table: a date or version. `-mini`, `-image` or `-5` is another model at another price.
_VERSION = re.compile(r"(?:[-@](?:\d{3,}(?:-\d\d){0,2}|v\d[\w.:]*|(?:latest|preview|exp)(?:-\d\d(?:-\d{2,4})?)?))*")
_FIELDS = {"input", "output", "image"}
# base: always added; tile (OpenAI), crop (Gemini) and patch: side in pixels of what costs `tokens`; pixels: per token.
_IMAGE_FIELDS = {"base", "tile", "crop", "patch", "tokens", "pixels", "most"}


# -- prices -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Price:
    """The price of one model.

    Args:
        model: name in the table.
        input, output: US dollars per million tokens.
        date: when the table was made, or empty.
        image: how the tokens of a picture are counted, as in `prices.yaml`; empty if unknown.
    """

    model: str
    input: float
    output: float
    date: str = ""
    image: Mapping[str, float] = field(default_factory=dict)


def price_of(model: str, overrides: str | os.PathLike | None = None) -> Price | None:
    """Returns the price of a model, or None if it is in no table: unknown then, not zero.

    Args:
        model: as the provider names it; `gemini-2.5-flash-lite-001` finds `gemini-2.5-flash-lite`.
        overrides: YAML file in the form of `prices.yaml`, whose models take precedence.

    Raises:
        UserError: the file cannot be read, or has another form.
    """
    model = model.removeprefix("models/")
    for table in ([read_prices(os.fspath(overrides))] if overrides else []) + [_builtin()]:
        known = [name for name in table if model.startswith(name) and _VERSION.fullmatch(model[len(name) :])]
        if known:
            return table[max(known, key=len)]
    return None


def estimate_tokens(width: int, height: int, price: Price | None) -> int:
    """Estimates the tokens of a picture of `width` x `height` pixels, rather too high than too low.

    If the model or its way of counting is unknown, one token per 28 x 28 pixels is assumed, as open models count.
    """
    rule = dict(price.image) if price is not None and price.image else {"patch": 28, "tokens": 1}
    tokens = rule.get("base", 0)
    if "tile" in rule:
        # OpenAI: scaled down into 2048 x 2048, then to a short side of 768.
        scale = min(1, 2048 / max(width, height))
        scale *= min(1, 768 / (min(width, height) * scale))
        tokens += rule["tokens"] * _cells(width * scale, height * scale, rule["tile"])
    if "crop" in rule:
        # Gemini: one crop up to 384 x 384, else crops of two thirds of the short side.
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
    return read_prices(BUILTIN)


def read_prices(path: str | Path) -> dict[str, Price]:
    """The rows of a price file by name. Raises `UserError` if it cannot be read, or has another form."""
    try:
        data: Any = read_yaml(path)
    except FileNotFoundError as error:
        raise UserError(f"price file {path}: expected a YAML file that can be read, found: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"price file {error}") from error

    def check(holds: bool, expected: str, place: str = "") -> None:
        if not holds:
            example = "Write models: {my-model: {input: 0.10, output: 0.40}}, in USD per million tokens."
            raise UserError(f"price file {path}{place}: expected {expected}, found something else. {example}")

    models = data.get("models") if isinstance(data, dict) else None
    check(isinstance(models, dict) and set(data) <= {"date", "models"}, "`models` and perhaps `date`")
    table = {}
    for name, row in models.items():
        place, fields = f", {name}", set(row) if isinstance(row, dict) else set()
        check({"input", "output"} <= fields <= _FIELDS, "input, output and perhaps image", place)
        image = row.get("image") or {}
        check(isinstance(image, dict) and set(image) <= _IMAGE_FIELDS, f"an image of {sorted(_IMAGE_FIELDS)}", place)
        numbers = [row["input"], row["output"], *image.values()]
        check(all(type(n) in (int, float) and 0 <= n < math.inf for n in numbers), "numbers from 0 on", place)
        counted = "tokens" in image or not set(image) & {"tile", "crop", "patch"}
        check(counted and 0 not in image.values(), "the tokens of a tile, crop or patch above 0", place)
        table[str(name)] = Price(str(name), row["input"], row["output"], str(data.get("date") or ""), image)
    return table


# -- what is spent ----------------------------------------------------------------------------------------------------
class _Sum:
    """US dollars that were spent, and that are set aside for calls in flight."""

    def __init__(self, spent: float):
        self.spent, self.reserved = spent, 0.0


class CostMeter:
    """Adds what was spent to what calls in flight may still cost, so that a limit is never exceeded.

    Args:
        price: of the model; None if unknown.
        spent: US dollars that earlier runs cost.
        limit: US dollars that all runs may cost together.

    Attributes:
        billed: whether what a call with pictures (True) and one without (False) costs is known.
    """

    def __init__(self, price: Price | None = None, spent: float = 0.0, limit: float | None = None):
        self.price, self.limit, self._sum = price, limit, _Sum(spent)
        self._dearest = 0.0
        self.billed: set[bool] = set()

    def beside(self, price: Price | None) -> CostMeter:
        """A meter of another model, which counts towards the same limit."""
        other = CostMeter(price, limit=self.limit)
        other._sum = self._sum
        return other

    @property
    def keeps_limit(self) -> bool:
        """Whether calls of this model count towards a limit."""
        return self.limit is not None and self.price is not None

    @property
    def spent(self) -> float:
        """US dollars so far, of all models that count towards the limit."""
        return self._sum.spent

    def of(self, tokens_in: int | None, tokens_out: int | None) -> float | None:
        """US dollars for this many tokens; None if the price or the tokens are unknown."""
        if self.price is None or tokens_in is None or tokens_out is None:
            return None
        return (tokens_in * self.price.input + tokens_out * self.price.output) / 1e6

    def reserve(self, tokens_in: int, tokens_out: int) -> float | None:
        """Sets aside the most that a call can cost, in US dollars; None if that would exceed the limit."""
        if not self.keeps_limit:
            return 0.0
        dollars = max(self.of(tokens_in, tokens_out), self._dearest)
        if self._sum.spent + self._sum.reserved + dollars > self.limit:
            return None
        self._sum.reserved += dollars
        return dollars

    def settle(self, reserved: float, dollars: float | None) -> None:
        """Replaces what was set aside for a call by what it cost."""
        self._sum.reserved -= reserved
        if dollars:
            self._sum.spent += dollars
            self._dearest = max(self._dearest, dollars)


@dataclass
class Spending:
    """The calls, tokens, money and time that the captions of a dataset took over all runs, as recorded in the journal.

    A quantity that any answer leaves unknown is None in the sum, so that no sum is too small.

    Args:
        calls: number of answered calls; `attempts` counts failed ones too.
        tokens_in, tokens_out: as the servers count them.
        cost: US dollars, at the prices when the calls were made.
        runs: start and end of each run, in seconds since the epoch.
    """

    calls: int = 0
    attempts: int = 0
    tokens_in: int | None = 0
    tokens_out: int | None = 0
    cost: float | None = 0.0
    runs: dict[str, tuple[float, float]] = field(default_factory=dict)

    # The columns of the journal that `add` reads.
    COLUMNS: ClassVar = tuple(
        "key call_id raw_text error attempts tokens_in tokens_out cost latency_ms run_id updated_at".split()
    )

    def add(self, row: Mapping) -> None:
        """Adds a row of the journal."""
        if row["call_id"] not in (None, row["key"]):
            return  # a call that answered several captions is counted with the first
        self.attempts += row["attempts"] or 0
        end = row["updated_at"]
        self._add_run(row["run_id"], end - (row["latency_ms"] or 0) / 1000, end)
        if row["raw_text"] or (row["raw_text"] is not None and not row["error"]):
            self.calls += 1
            self._add_sums(row)

    def __add__(self, other: Spending) -> Spending:
        """The sum for two splits, which the same run may have captioned."""
        found = Spending(self.calls + other.calls, self.attempts + other.attempts)
        for one in (self, other):
            found._add_sums(vars(one))
            for run, times in one.runs.items():
                found._add_run(run, *times)
        return found

    def _add_sums(self, row: Mapping) -> None:
        for name in ("tokens_in", "tokens_out", "cost"):
            both = getattr(self, name), row[name]
            setattr(self, name, None if None in both else sum(both))

    def _add_run(self, run: str, begin: float, end: float) -> None:
        first, last = self.runs.get(run, (end, end))
        self.runs[run] = min(begin, first), max(end, last)

    @property
    def seconds(self) -> float | None:
        """How long runs were at work, from first question to last answer, without overlaps; None without any run."""
        total, until = 0.0, -math.inf
        for begin, end in sorted(self.runs.values()):  # processes work side by side
            total += max(0.0, end - max(begin, until))
            until = max(until, end)
        return total if self.runs else None

    def summary(self) -> dict:
        """Entry of `captions.json`; None: unknown."""
        counts = {name: getattr(self, name) for name in ("calls", "attempts", "tokens_in", "tokens_out")}
        cost, seconds = self.cost, self.seconds
        counts["cost_usd"] = None if cost is None else round(cost, 6)
        return counts | {"seconds": None if seconds is None else round(seconds, 1)}
