"""Feedback as every store keeps it: one entry per answer, the newest entries, and nothing of an erased user."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import Mock

import pytest
from redis.asyncio import Redis

from server.errors import UserErased
from server.gateway.access.keys import Caller, KnownKeys
from server.gateway.access.limiter import Limiter
from server.gateway.learning.refreshing import Refreshing
from server.settings import Settings
from server.store import feedback as feedback_module
from server.store.feedback import NO_PROFILE_S, Feedback, Outcome, Rating
from server.store.redis import keys
from server.store.samples import JobBudget, Sample
from server.store.tenants.access_keys import Scope
from tests.support.store_parts import BANK, KEYS, TENANT, StoreParts, WorkerSteps, change, stored

KEY = KEYS.key("somebody")
SAID = Sample([{"role": "user", "content": "any plans?"}], "the sea")


def merged(**given: object) -> Feedback:
    return Feedback("merged", "full", **given)  # type: ignore[arg-type]


async def samples(parts: StoreParts) -> list[Sample]:
    return [entry.sample for entry in (await parts.feedback.entries(KEY)).values() if entry.sample]


async def test_feedback_is_kept_by_answer_with_the_time_of_its_text(parts: StoreParts) -> None:
    store = parts.feedback
    assert await store.entries(KEY) == {}
    rated = merged(rating=Rating.UP)
    assert await store.add(KEY, "gen-1", rated, None, "") == (rated, None)
    first = (await store.entries(KEY))["gen-1"]
    assert (first.feedback, first.sample) == (rated, None)
    await asyncio.sleep(0.01)
    assert await store.add(KEY, "gen-1", rated, None, "") == (rated, rated)
    assert (await store.entries(KEY))["gen-1"].at_ms == first.at_ms
    both, edited = (merged(outcome=Outcome.EDITED, changed=0.25, rating=rating) for rating in (Rating.UP, None))
    assert await store.add(KEY, "gen-1", edited, SAID, "") == (both, rated)
    await asyncio.sleep(0.01)
    await store.add(KEY, "gen-0", merged(outcome=Outcome.SENT), None, "")
    entries = await store.entries(KEY)
    assert list(entries) == ["gen-1", "gen-0"]  # oldest first
    said = entries["gen-1"]
    assert (said.feedback, said.sample) == (both, SAID)
    assert said.at_ms > first.at_ms  # an adapter trained between both has not seen the text
    for again in (None, SAID):
        assert await store.add(KEY, "gen-1", rated, again, "") == (both, both)
        assert (await store.entries(KEY))["gen-1"] == said
    assert await samples(parts) == [SAID]  # without a text, the earlier one stays


async def test_text_sent_during_training_counts_for_next_refresh(parts: StoreParts) -> None:
    """Jobs and texts have the store's times; the adapter has one of the worker's clock, which may be ahead."""
    user, worker, manifest = KEYS.user("somebody"), WorkerSteps(parts), Mock(short=BANK, room=2, common=True)
    quotas, budget = Mock(admit=lambda *_: nullcontext()), JobBudget(1000, 60)
    settings = Settings(refresh_samples=2, refresh_hours=0)
    limiter = Limiter(parts.rates, KnownKeys(TENANT), settings, lambda reason: None)
    refreshing = Refreshing(parts, quotas, limiter, manifest, budget, settings)
    caller = Caller(TENANT, "", frozenset(Scope))

    async def is_due(answer: str) -> bool:
        await parts.feedback.add(KEY, answer, merged(), SAID, "")
        job = await refreshing.refresh_if_due(user, caller, "")
        return job is not None and job.is_new

    await parts.put(user.id, "text")
    assert not await is_due("gen-1")
    for before, during in (("gen-2", "gen-3"), ("gen-4", "gen-5")):
        assert await is_due(before)
        await worker.take()
        await worker.claim()
        await asyncio.sleep(0.01)
        assert not await is_due(during)
        assert await worker.promote()
    assert await is_due("gen-6")


async def test_parts_that_come_at_once_are_all_kept(parts: StoreParts) -> None:
    said = (merged(rating=Rating.UP), merged(outcome=Outcome.EDITED, changed=0.25))
    for answer in map(str, range(20)):
        added = await asyncio.gather(*(parts.feedback.add(KEY, answer, each, None, "") for each in said))
        assert sorted(before is None for _, before in added) == [False, True]
    both = replace(said[1], rating=Rating.UP)
    assert {entry.feedback for entry in (await parts.feedback.entries(KEY)).values()} == {both}


async def test_the_newest_entries_are_kept(parts: StoreParts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback_module, "KEPT_FEEDBACK", 3)
    for number in (3, 1, 4, 2):
        await parts.feedback.add(KEY, f"gen-{number}", merged(outcome=Outcome.EDITED), SAID, "")
        await asyncio.sleep(0.005)
    assert list(await parts.feedback.entries(KEY)) == ["gen-1", "gen-4", "gen-2"]
    assert len(await samples(parts)) == 3


async def test_erasure_deletes_feedback_and_refuses_earlier_writes(parts: StoreParts) -> None:
    await parts.feedback.add(KEYS.key("ada"), "gen-1", merged(rating=Rating.UP), SAID, "")
    erasure = await parts.erase("ada")
    assert erasure is not None
    assert (erasure.erased.feedback, erasure.erased.samples, erasure.erased.keys) == (1, 1, 2)
    with pytest.raises(UserErased):
        await parts.feedback.add(KEYS.key("ada"), "gen-1", merged(rating=Rating.UP), SAID, "")
    assert await parts.feedback.entries(KEYS.key("ada")) == {}


def test_later_feedback_merges_over_earlier_feedback() -> None:
    before = merged(rating=Rating.UP, outcome=Outcome.EDITED, changed=0.5)
    assert merged(rating=Rating.DOWN).over(before) == merged(rating=Rating.DOWN, outcome=Outcome.EDITED, changed=0.5)
    assert merged(outcome=Outcome.DISCARDED).over(before) == merged(rating=Rating.UP, outcome=Outcome.DISCARDED)
    assert before.over(None) == before


async def test_feedback_without_a_profile_is_counted_and_expires(parts: StoreParts, raw: Redis, user: str) -> None:
    await parts.feedback.add(user, "gen-1", merged(rating=Rating.UP), None, "")
    _, held, _ = await parts.profiles.measure(user)
    assert held["people"] == 1
    assert held["bytes"] > 0
    assert 0 < await raw.ttl(keys.feedback(user)) <= NO_PROFILE_S
    assert await stored(parts.profiles, user, change("a"))
    assert await raw.ttl(keys.feedback(user)) == -1
    await parts.feedback.add(user, "gen-2", merged(rating=Rating.UP), None, "")
    assert await raw.ttl(keys.feedback(user)) == -1
