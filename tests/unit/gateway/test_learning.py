"""Which messages are learnt, when a signature is made for them, and which users are held out."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest

from bank.items.profile import Item
from bank.items.tasks import get_task
from bank.lookup.signature import empty_signature
from bench.rig.processes import PATIENCE_S
from server.clock import week_of
from server.errors import QuotaExceeded, Unavailable, UserErased
from server.gateway.experiments.arms import Arm, arm_of
from server.gateway.http.bodies import LONGEST_WRITE_S
from server.gateway.learning.messages import MAX_AGE_S, MAX_PENDING, MessageLearner, item_of
from server.gateway.users.profiles import signature_due
from server.settings import MAX_ITEM_BYTES
from server.store.profile_record import Profile, StoredSignature
from server.store.profiles import MARK_S
from server.store.tenants.user_key import User

BANK, DAY_MS = "0123abcd", 24 * 3600 * 1000
FAULTS = {"erased": UserErased(), "full": QuotaExceeded("x"), "away": Unavailable("x"), "odd": ValueError("x")}
SAID = "honestly the sea was flat all week"
ITEM = Item("a", {"text": SAID})
ANSWERED = {"role": "assistant", "content": "How was the sea?"}


def test_item_is_the_last_user_message_and_what_it_answers() -> None:
    task = get_task("chat")
    last = {"role": "user", "content": SAID}
    alone = item_of([last], task)
    assert alone is not None and alone.fields == {"text": SAID}
    again = item_of([{"role": "system", "content": "be kind"}, last], task)
    assert again == alone  # the same words have the same id
    replied = item_of([{"role": "user", "content": "hello"}, ANSWERED, last], task)
    assert replied is not None and replied.fields == {"input": ANSWERED["content"], "output": SAID}
    call = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "look", "arguments": SAID}}]}
    assert item_of([call, last], task) == alone
    long = ANSWERED | {"content": "x" * MAX_ITEM_BYTES}
    assert item_of([long, last], task) == alone
    for messages in (
        [last, ANSWERED],
        [{"role": "user", "content": None}],
        [last, call, {"role": "tool", "content": SAID}],
        [last | {"content": SAID + "x" * MAX_ITEM_BYTES}],
        [last | {"content": f"{SAID}\n```{'x' * MAX_ITEM_BYTES}```"}],
        [last | {"content": f"{SAID}\0"}],
    ):
        assert item_of(messages, task) is None


@dataclass
class Said:
    """A learner, with what it learned and dropped; profiles of the tenants in `held` are stored once it is empty."""

    held: set[str] = field(default_factory=set)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    stored: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.learner = MessageLearner(Mock(), lambda why: self.dropped.update([why]))

    def say(self, tenant: str, ago_s: float = 0) -> None:
        user = User("ada", "a" * 26, tenant)
        self.learner.learn(tenant, partial(self.learn, user, ITEM, ""), time.perf_counter() - ago_s)

    async def learn(self, user: User, item: Item, epoch: str) -> Mock:
        async with self.changed:
            await self.changed.wait_for(lambda: user.tenant not in self.held)
        if user.tenant in FAULTS:
            raise FAULTS[user.tenant]
        self.stored.append(user.tenant)
        return Mock(changed=1)

    async def release(self) -> None:
        async with self.changed:
            self.held.clear()
            self.changed.notify_all()


async def test_a_tenant_that_says_much_leaves_room_for_what_others_say() -> None:
    said = Said(held={"loud"})
    while said.learner.has_room("loud"):
        said.say("loud")
    assert said.learner.has_room("calm")
    await said.release()
    await said.learner.finish()
    assert said.learner.has_room("loud") and set(said.stored) == {"loud"}


async def test_a_tenants_messages_wait_for_none_of_anothers() -> None:
    said = Said(held={"loud"})
    said.say("loud")
    said.say("calm")
    async with asyncio.timeout(PATIENCE_S):
        while "calm" not in said.stored:
            await asyncio.sleep(0)
    assert said.stored == ["calm"]
    await said.release()
    await said.learner.finish()
    assert said.stored == ["calm", "loud"]


async def test_all_accepted_messages_are_stored_when_many_at_once() -> None:
    said = Said()
    for _ in range(2 * MAX_PENDING):  # had room when they were accepted, and ended together
        said.say("loud")
    await said.learner.finish()
    assert (len(said.stored), said.dropped) == (2 * MAX_PENDING, Counter())


async def test_every_message_that_is_dropped_is_counted() -> None:
    said = Said(held={"stalled"})
    said.say("calm", MAX_AGE_S + 1)
    for tenant in (*FAULTS, "stalled"):
        said.say(tenant)
    await said.learner.finish(0.05)
    await asyncio.sleep(0)
    assert said.dropped == {"late": 1, "stopped": 1, "failed": 1} | {
        fault.code: 1 for fault in list(FAULTS.values())[:3]
    }
    assert said.stored == []


def test_signatures_are_due_at_a_few_counts_and_then_daily() -> None:
    def of(items: int, at_ms: int = 5 * DAY_MS, signed: bool = True) -> Profile:
        made = StoredSignature(empty_signature(BANK, 3), at_ms) if signed else None
        return Profile("ada", items, at_ms, "0" * 16, np.ones(4, "f4"), signature=made)

    due = [n for n in range(1, 60) if signature_due(of(n - 1) if n > 1 else None, of(n), BANK)]
    assert due == [4, 8, 16, 32, 33]
    assert signature_due(of(512), of(512, 6 * DAY_MS), BANK)  # the first item of a day
    assert not signature_due(of(512, 6 * DAY_MS), of(512, 6 * DAY_MS + 1), BANK)
    assert signature_due(of(1, signed=False), of(2), BANK)  # items that were put still wait for one
    assert signature_due(replace(of(1), updated_ms=1), of(2), BANK)
    assert signature_due(of(1), of(2), "another0")


def test_a_share_of_users_is_held_out_for_a_week(monkeypatch: pytest.MonkeyPatch) -> None:
    users, monday_s = [f"user-{n}" for n in range(10_000)], 4 * 24 * 3600 + 52 * 7 * 24 * 3600

    def held(at_s: int, share: float = 0.05) -> set[str]:
        monkeypatch.setattr("time.time", lambda: at_s)
        return {user for user in users if arm_of(user, share) is Arm.LOWER}

    first = held(monday_s)
    assert 430 < len(first) < 570  # 500, with three standard deviations
    assert held(monday_s + 7 * 24 * 3600 - 1) == first
    next_week = held(monday_s + 7 * 24 * 3600)
    assert len(first & next_week) < 50  # drawn anew: 25 by chance
    assert held(monday_s, 0.0) == set()
    assert first < held(monday_s, 0.2)
    assert [week_of(hour) for hour in (0, 95, 96)] == [0, 0, 1]  # 1970 began on a Thursday


def test_a_mark_outlives_the_longest_write() -> None:
    assert LONGEST_WRITE_S < MAX_AGE_S < MARK_S
