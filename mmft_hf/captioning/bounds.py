"""What steps would ask at most: for `caption refine --dry_run`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ..data.images import BadImage
from .ask.cost import estimate_tokens
from .ask.driver import Gone
from .ask.pictures import shown
from .ask.roles import Role
from .asker import PicturesOfDataset
from .caption_table import CaptionTable
from .spool import Spool
from .steps.asking import Ask, answered, rendered
from .steps.base import Embeddings, Row, Step

PROMPTS = 3  # that are shown, of the first step that asks; one of each later step
SAMPLED = 32  # rows whose questions give the mean length


@dataclass
class PlannedStep:
    """What a step would ask, from the captions as they are before the first step that asks.

    Args:
        asks: the most questions by role, without those that are repeated because an answer cannot be read.
        tokens_in: about how many tokens these questions have, by role; `tokens_out`: the most that their answers can have.
        prompts: some of the questions of its first round.
    """

    number: int
    step: Step
    asks: Counter = field(default_factory=Counter)
    tokens_in: Counter = field(default_factory=Counter)
    tokens_out: Counter = field(default_factory=Counter)
    prompts: Sequence[Ask] = ()

    def dollars(self, role: Role) -> float | None:
        """The most that the questions to a role can cost; None if its price is unknown."""
        return role.meter.of(self.tokens_in[role.name], self.tokens_out[role.name])


def planned(
    table: CaptionTable, steps: Sequence[Step], scorer: Embeddings | None, roles: Mapping[str, Role]
) -> list[PlannedStep]:
    """What each step that asks would ask. Steps before the first of them are applied, to `table.rows` too."""
    found: list[PlannedStep] = []
    rows = table.rows
    data = PicturesOfDataset(table.part.images, table.part.hashes)
    for number, step in enumerate(steps, 1):
        if step.roles():
            found.append(_planned(number, step, rows, step.fit(rows, scorer), roles, data, PROMPTS if not found else 1))
        elif not found:
            fitted = step.fit(rows, scorer)
            records = step.apply(rows, scorer, [answered(step.ask(row, fitted), lambda ask: None) for row in rows])
            rows = Spool(replace(row, records=own) for row, own in zip(rows, records, strict=True))
    return found


def _planned(
    number: int,
    step: Step,
    rows: Sequence[Row],
    fitted: Any,
    roles: Mapping[str, Role],
    data: PicturesOfDataset,
    most: int,
) -> PlannedStep:
    plan = PlannedStep(number, step)
    for row in rows:
        plan.asks += step.bound(row, fitted)
    first = [ask for row in rows[:: max(1, len(rows) // SAMPLED)] for ask in next(step.ask(row, fitted), ())]
    by_role: dict[str, list[int]] = {}
    for ask in first[:SAMPLED]:
        by_role.setdefault(ask.role, []).append(_tokens(ask, roles[ask.role], data))
    everyone = [count for counts in by_role.values() for count in counts]
    for name, count in plan.asks.items():
        known = by_role.get(name) or everyone  # later rounds may ask others, with prompts of about this length
        plan.tokens_in[name] = round(count * sum(known) / len(known)) if known else 0
        plan.tokens_out[name] = count * roles[name].max_tokens
    different = {rendered(ask): ask for ask in first}
    plan.prompts = list(different.values())[:most]
    return plan


def _tokens(ask: Ask, role: Role, data: PicturesOfDataset) -> int:
    """About how many tokens a question has."""
    tokens = len(rendered(ask)) // 3
    for view in ask.pictures:
        with suppress(BadImage, Gone):
            picture = shown(data(view.image_sha256), view.what, role.pictures)
            tokens += estimate_tokens(picture.width, picture.height, role.meter.price)
    return tokens
