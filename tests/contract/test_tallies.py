"""Tallies as every store keeps them: added up by person and week, folded once, and nothing of an erased user."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from itertools import chain

import pytest
from redis.asyncio import Redis

from server.clock import monday, week_of
from server.errors import Unavailable
from server.gateway.experiments.arms import Arm, Level
from server.gateway.experiments.tallies import KEPT_WEEKS, LATE_HOURS, MAX_PENDING, Metric, Person, Tallies, metrics_of
from server.store.feedback import Feedback, Outcome, Rating
from server.store.redis import keys
from server.store.tallies import EVER, TALLY_S, Cell, Counts
from tests.support.store_parts import KEYS, TENANT, StoreParts

CELL = Cell(2961, 0, "stacked", "lower")
TOLD = Counts.of(Feedback("merged", "lower", Outcome.EDITED, Rating.UP, 0.1))
HOLDOUT = 0.05


def person(name: str, epoch: str = "") -> Person:
    return Person(TENANT, KEYS.key(name), epoch)


@pytest.fixture
def week(monkeypatch: pytest.MonkeyPatch) -> int:
    """This week, of which the first day is over; `to` moves the time."""
    this_week = week_of(int(time.time()) // 3600)
    to(monkeypatch, this_week)
    return this_week


def to(monkeypatch: pytest.MonkeyPatch, week: int, s: float = LATE_HOURS * 3600) -> None:
    """Let it be `s` seconds after the start of a week."""
    now_s = (week * 7 - 3) * 24 * 3600 + s
    monkeypatch.setattr("time.time", lambda: now_s)


async def test_a_tally_adds_up_and_is_taken_once(parts: StoreParts, raw: Redis) -> None:
    key, other = KEYS.key("ada"), replace(CELL, week=CELL.week + 1)
    assert await parts.tallies.add(key, "", {CELL: Counts(1, 500, 250_000) + TOLD, other: Counts(answers=1)})
    taken_back = Counts.of(Feedback("merged", "lower", Outcome.EDITED, None, 0.3)) - TOLD
    assert await parts.tallies.add(key, "", {CELL: taken_back})
    known = await parts.tallies.tally(key)
    assert known == {
        CELL: Counts(1, 500, 250_000, 1, edited=1, measured=1, changed=pytest.approx(0.3)),
        other: Counts(1),
    }
    assert 0 < await raw.ttl(keys.tally(key)) <= TALLY_S
    taken = await asyncio.gather(*(parts.tallies.take(key, CELL.week) for _ in range(3)))
    assert sorted(map(len, taken)) == [0, 0, 1]
    assert await parts.tallies.tally(key) == {other: Counts(1)}


async def test_sums_count_a_call_once_however_often_it_is_sent(parts: StoreParts) -> None:
    for token in ("one", "one", "another"):
        await parts.tallies.add_sums(TENANT, token, {CELL: (1.0, 0.1), replace(CELL, week=EVER): (1.0,)})
    assert await parts.tallies.sums(TENANT) == {CELL: (2.0, 0.2), replace(CELL, week=EVER): (2.0,)}
    await parts.tallies.drop_sums(TENANT, [CELL])
    assert list(await parts.tallies.sums(TENANT)) == [replace(CELL, week=EVER)]
    assert await parts.tallies.sums("another") == {}


async def test_people_are_known_by_week_until_they_are_popped(parts: StoreParts) -> None:
    users, tenant = {KEYS.key(f"user-{number}") for number in range(7)}, "a {strange} tenant/with: signs"
    await parts.tallies.add_people(2961, tenant, users)
    await parts.tallies.add_people(2960, TENANT, users)
    assert await parts.tallies.all_weeks() == [(2960, TENANT), (2961, tenant)]
    assert (await parts.tallies.weeks(tenant), await parts.tallies.people(2961, tenant)) == ([2961], 7)
    popped = await asyncio.gather(*(parts.tallies.pop_people(2961, tenant, 3) for _ in range(4)))
    assert sorted(chain(*popped)) == sorted(users)
    await parts.tallies.end_week(2961, tenant)
    assert await parts.tallies.all_weeks() == [(2960, TENANT)]


async def test_erasure_deletes_the_tally_and_refuses_earlier_counts(parts: StoreParts) -> None:
    tallies, key = Tallies(parts.tallies), KEYS.key("ada")
    spoken = Level.MERGED, Arm.FULL
    tallies.count_answer(person("ada"), *spoken, HOLDOUT)
    await tallies.flush()
    tallies.count_answer(person("ada"), *spoken, HOLDOUT)
    erasure = await parts.erase("ada")
    assert erasure is not None
    assert erasure.erased.keys == 1
    (week,) = await parts.tallies.weeks(TENANT)
    assert await parts.tallies.people(week, TENANT) == 0
    await tallies.flush()
    assert (await parts.tallies.tally(key), await parts.tallies.people(week, TENANT)) == ({}, 0)
    tallies.count_answer(person("ada", await parts.profiles.begin(key)), *spoken, HOLDOUT)
    await tallies.flush()
    assert await parts.tallies.people(week, TENANT) == 1


async def test_gateways_fold_each_person_once_after_the_week(
    parts: StoreParts, monkeypatch: pytest.MonkeyPatch, week: int
) -> None:
    gateways = [Tallies(parts.tallies) for _ in range(3)]
    for number in range(250):
        for _ in range(2):
            gateways[number % 3].count_answer(person(str(number)), Level.MERGED, Arm.FULL, HOLDOUT)
    for user, level in (("held", Level.COMMON), ("adapted", Level.MERGED)):
        gateways[0].count_answer(person(user), level, Arm.LOWER, HOLDOUT)
    gateways[0].count_answer(person("none"), Level.BASE, Arm.NONE, HOLDOUT)
    for share in (HOLDOUT, 0.1):  # which changed within the week
        gateways[1].count_answer(person("mixed"), Level.MERGED, Arm.FULL, share)

    async def fold() -> None:
        await asyncio.gather(*(gateway.flush() for gateway in gateways))
        await asyncio.gather(*(gateway.fold() for gateway in gateways))

    await fold()
    assert (await parts.tallies.sums(TENANT), await parts.tallies.people(week, TENANT)) == ({}, 253)
    to(monkeypatch, week + 1, LATE_HOURS * 3600 - 1)
    await fold()
    assert await parts.tallies.sums(TENANT) == {}  # feedback still counts
    to(monkeypatch, week + 1)
    for _ in range(2):
        await fold()
    sums = await parts.tallies.sums(TENANT)
    full, lower = Cell(week, 500, "merged", "full"), Cell(week, 500, "merged", "lower")
    above = replace(lower, level="stacked")  # which the merged recipe is compared with
    assert sums.keys() == {cell for one in (full, lower, above) for cell in (one, replace(one, week=EVER))}
    assert sums[full] == (250, 500, 250_000, 500 * 500**2, *[0] * 8)
    assert sums[lower] == sums[above] == (1, 1, 500, 500**2, *[0] * 8)
    assert sums[replace(full, week=EVER)] == (*[0] * 12, 250, 250, 250)  # all of them were silent
    assert await parts.tallies.all_weeks() == []
    late = Cell(week, 0, "merged", "full")
    await parts.tallies.add(KEYS.key("1"), "", {late: TOLD})  # feedback that comes after all
    await parts.tallies.add_people(week, TENANT, [KEYS.key("1")])
    await fold()
    assert (await parts.tallies.sums(TENANT), await parts.tallies.tally(KEYS.key("1"))) == (sums, {})


async def test_a_fold_or_a_flush_that_fails_counts_nobody_twice(
    parts: StoreParts, monkeypatch: pytest.MonkeyPatch, week: int
) -> None:
    tallies, spoken = Tallies(parts.tallies), (Level.MERGED, Arm.FULL)

    async def refuse(*_: object) -> None:
        raise Unavailable("the store is down")

    for number in range(150):
        tallies.count_answer(person(str(number)), *spoken, HOLDOUT)
    await tallies.flush()
    for method in ("add_people", "add"):
        with monkeypatch.context() as patched, pytest.raises(Unavailable):
            tallies.count_answer(person("0"), *spoken, HOLDOUT)
            patched.setattr(parts.tallies, method, refuse)
            await tallies.flush()
    await tallies.flush()
    to(monkeypatch, week + 1)
    with monkeypatch.context() as patched, pytest.raises(Unavailable):
        patched.setattr(parts.tallies, "add_sums", refuse)
        await tallies.fold()
    await tallies.fold()
    people, answers, *_ = (await parts.tallies.sums(TENANT))[Cell(week, 500, "merged", "full")]
    assert (people, answers) == (50, 50)
    assert await parts.tallies.all_weeks() == []


async def test_fold_drops_old_weeks_and_unused_holdout_shares(
    parts: StoreParts, monkeypatch: pytest.MonkeyPatch, week: int
) -> None:
    tallies, spoken = Tallies(parts.tallies), (Level.STACKED, Arm.FULL)
    tallies.count_answer(person("early"), *spoken, 0.5)
    for weeks in range(KEPT_WEEKS + 1):
        tallies.count_answer(person("ada"), *spoken, HOLDOUT)
        await tallies.flush()
        to(monkeypatch, week + weeks + 1)
        await tallies.fold()
    sums = await parts.tallies.sums(TENANT)
    assert {cell.share for cell in sums} == {500}
    assert sorted({cell.week for cell in sums}) == [EVER, *range(week + 1, week + 1 + KEPT_WEEKS)]
    assert sums[Cell(EVER, 500, "stacked", "full")][-3] == KEPT_WEEKS + 1


async def test_what_waits_to_be_stored_is_bounded() -> None:
    tallies = Tallies(None)  # type: ignore[arg-type]
    for number in range(MAX_PENDING + 5):
        tallies.count_answer(Person(TENANT, str(number), ""), Level.MERGED, Arm.FULL, HOLDOUT)
    tallies.count_answer(Person(TENANT, "0", ""), Level.MERGED, Arm.FULL, HOLDOUT)
    assert len(tallies._pending) == MAX_PENDING
    assert max(sum(counts.answers for counts in cells.values()) for cells in tallies._pending.values()) == 2


def test_a_person_has_the_metrics_that_something_is_known_about() -> None:
    assert metrics_of(Counts()) == {}
    assert metrics_of(Counts(answers=4)) == {Metric.SILENT: 1}
    known = Counts(4, answered=3, sent=1, edited=1, discarded=2, up=1, down=3, measured=2, changed=0.5)
    assert metrics_of(known) == {"changed": 0.25, "sent": 0.25, "discarded": 0.5, "up": 0.25, "silent": 0.25}
    assert metrics_of(Counts(1, answered=3, sent=-1, edited=2)) == {"sent": 0, "discarded": 0, "silent": 0}
    assert str(monday(week_of(0))) == "1969-12-29"
