"""Tallies of people who are compared: counted in memory, stored every few seconds, folded once a week is over.

A lost tally is a person less in the comparison; nobody is counted twice.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import chain
from operator import add

from server.clock import this_hour, week_of
from server.gateway.experiments.arms import Arm, Level
from server.store.feedback import Feedback
from server.store.tallies import EVER, Cell, Counts, TallyStore

STORE_INTERVAL_S = 5.0
FOLD_INTERVAL_S = 600.0
KEPT_WEEKS = 13
LATE_HOURS = 24  # after the end of a week, until its tallies are folded; later feedback does not count
MAX_PENDING = 10_000  # people with counts that wait to be stored
SHARE_UNIT = 10_000
_BATCH = 100


class Metric(StrEnum):
    """The number of a person in a week, 0 to 1."""

    CHANGED = "changed"  # mean share of an answer that the person changed
    SENT = "sent"  # share of answers sent as they were, of those with an outcome
    DISCARDED = "discarded"  # share of answers discarded, of those with an outcome
    UP = "up"  # share of `up` in the ratings
    SILENT = "silent"  # share of answers without feedback


def metrics_of(counts: Counts) -> dict[Metric, float]:
    """Return the metrics that the counts of one person, or of several, say something about."""
    outcomes, ratings = counts.sent + counts.edited + counts.discarded, counts.up + counts.down
    parts = {
        Metric.CHANGED: (counts.changed, counts.measured),
        Metric.SENT: (counts.sent, outcomes),
        Metric.DISCARDED: (counts.discarded, outcomes),
        Metric.UP: (counts.up, ratings),
        Metric.SILENT: (counts.answers - counts.answered, counts.answers),
    }
    # A part can exceed its whole: a crash loses answers whose feedback comes later.
    return {metric: min(1.0, max(0.0, part / whole)) for metric, (part, whole) in parts.items() if whole > 0}


@dataclass(frozen=True, slots=True)
class Person:
    tenant: str
    user_key: str
    epoch: str


@dataclass
class Tallies:
    store: TallyStore
    _pending: dict[Person, dict[Cell, Counts]] = field(default_factory=dict)
    _storing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def count_answer(self, person: Person, level: Level, arm: Arm, holdout: float) -> None:
        """Count a complete answer; `holdout` is the share of users who are held out."""
        share = round(holdout * SHARE_UNIT)
        counts = Counts(answers=1, shares=share, shares_squared=share**2)
        self._count(person, _cell(this_hour(), level, arm), counts)

    def count_feedback(
        self, person: Person, hour: int, level: Level, arm: Arm, *, now: Feedback, before: Feedback | None
    ) -> None:
        """Count what feedback changes on an answer of `hour`; `before` is what was known about it."""
        self._count(person, _cell(hour, level, arm), Counts.of(now) - Counts.of(before))

    def _count(self, person: Person, cell: Cell, counts: Counts) -> None:
        has_room = person in self._pending or len(self._pending) < MAX_PENDING
        if cell.arm != Arm.NONE and counts != Counts() and has_room:
            cells = self._pending.setdefault(person, {})
            cells[cell] = cells.get(cell, Counts()) + counts

    async def flush(self) -> None:
        """Store what was counted since the last call; it is lost if the store is down."""
        async with self._storing:
            pending, self._pending = self._pending, {}
            people = defaultdict[tuple[int, str], set[str]](set)
            for person, cells in pending.items():
                for cell in cells:
                    people[cell.week, person.tenant].add(person.user_key)
            for (week, tenant), user_keys in people.items():
                await self.store.add_people(week, tenant, user_keys)
            for person, cells in pending.items():
                if not await self.store.add(person.user_key, person.epoch, cells):
                    await self.store.remove_erased(person.user_key, person.tenant)

    async def fold(self) -> None:
        """Add the tallies of finished weeks to the sums of their tenants; several gateways may do so at once."""
        this_week = week_of(this_hour() - LATE_HOURS)
        for week, tenant in await self.store.all_weeks():
            if week < this_week:
                while user_keys := await self.store.pop_people(week, tenant, _BATCH):
                    taken = [await self.store.take(user_key, week) for user_key in user_keys]
                    if sums := sums_of(taken):
                        await self.store.add_sums(tenant, secrets.token_hex(8), sums)
                await self.store.end_week(week, tenant)
                await self.store.drop_sums(tenant, _outdated(await self.store.sums(tenant), week))


def sums_of(taken: list[Mapping[Cell, Counts]]) -> dict[Cell, tuple[float, ...]]:
    """Return the sums of tallies: by week people and counts, for all weeks n, sum and sum of squares by metric."""
    sums = dict[Cell, tuple[float, ...]]()
    for tally in taken:
        for cell, counts in tally.items():
            if (share := counts.share) is not None:  # else it has no answers: the rest of it is folded already
                numbers = metrics_of(counts)
                powers = [(0.0, 0.0, 0.0) if x is None else (1.0, x, x * x) for x in map(numbers.get, Metric)]
                for week, more in ((cell.week, (1.0, *counts.numbers)), (EVER, tuple(chain(*powers)))):
                    key = replace(cell, week=week, share=share)
                    sums[key] = tuple(map(add, sums[key], more)) if key in sums else more
    return sums


def _outdated(sums: Mapping[Cell, object], week: int) -> list[Cell]:
    """Return the cells of weeks before the last `KEPT_WEEKS`, and those of shares that no later week has."""
    kept = {cell.share for cell in sums if cell.week > week - KEPT_WEEKS}
    return [cell for cell in sums if cell.share not in kept or EVER < cell.week <= week - KEPT_WEEKS]


def _cell(hour: int, level: Level, arm: Arm) -> Cell:
    """Return the cell of an answer; in the arm `lower`, its level is the one above the level that spoke."""
    if arm is Arm.LOWER:
        level = Level.STACKED if level is Level.MERGED else Level.MERGED
    return Cell(week_of(hour), 0, level.value, arm.value)
