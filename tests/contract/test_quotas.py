"""What tenants hold is counted, and held against their quotas by gateways that share a store."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from unittest.mock import AsyncMock, Mock

import pytest
from redis.asyncio import Redis

from server.errors import QuotaExceeded
from server.gateway.access import quotas as rules
from server.gateway.access.keys import KnownKeys
from server.gateway.access.quotas import RECOUNT_INTERVAL_S, Quotas
from server.gateway.users.adapting import Adapting, TrainingRequest
from server.store.feedback import Feedback
from server.store.jobs import Submission
from server.store.redis import keys
from server.store.tenants import holdings
from server.store.tenants.access_keys import Scope, access_key, new_secret
from server.store.tenants.holdings import Held
from server.store.tenants.rates import Quota
from server.store.tenants.user_key import Tenants, User, UserKeys
from tests.support.store_parts import BANK, KEYS, SECRET, TENANT, StoreParts, WorkerSteps, change, stored, submitted

QUOTA = Quota(people=3, bytes=50_000, adapters=1)
PERSON = Held(people=1, bytes=100)


@dataclass
class Gateway:
    """One of several gateways."""

    parts: StoreParts
    quotas: Quotas = field(init=False)
    refused: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        parts, known, tenants = self.parts, KnownKeys("default"), Tenants(SECRET, TENANT)
        self.quotas = Quotas(parts.holdings, parts.profiles, parts.rates, known, tenants, self.refused.append)

    async def refresh(self) -> Gateway:
        await self.quotas.keys.refresh(self.parts.keys)
        await self.quotas.count()
        return self

    async def put(self, name: str, text: str = "text") -> User:
        user = KEYS.user(name)
        is_new = await self.parts.profiles.load(user.key) is None
        with self.quotas.admit(user, lambda: Held(people=is_new, bytes=len(text))):
            await self.parts.put(name, text)
        return user

    def used(self) -> dict[str, float]:
        return {what: used for tenant, what, used, _ in self.quotas.used() if tenant == TENANT}


@pytest.fixture
async def gateways(parts: StoreParts, monkeypatch: pytest.MonkeyPatch) -> tuple[Gateway, Gateway]:
    monkeypatch.setattr(rules, "COUNT_TURNS", 1)
    await parts.keys.add(access_key(new_secret(), "app", TENANT, Scope))
    await parts.keys.set_quota(TENANT, QUOTA)
    return await Gateway(parts).refresh(), await Gateway(parts).refresh()


def refusal(quotas: Quotas, name: str, wanted: Callable[[], Held]) -> str:
    with pytest.raises(QuotaExceeded) as caught, quotas.admit(KEYS.user(name), wanted):
        raise AssertionError("it was let in")
    assert (caught.value.status, caught.value.code) == (403, "quota_exceeded")
    return caught.value.message


async def test_a_quota_travels_with_the_keys_until_it_is_removed(
    parts: StoreParts, gateways: tuple[Gateway, ...]
) -> None:
    ring = await parts.keys.all()
    assert ring.quotas == {TENANT: QUOTA} == gateways[0].quotas.keys.quotas
    await parts.keys.set_quota(TENANT, Quota())
    assert (await parts.keys.all()).quotas == {}
    await gateways[0].refresh()
    with ExitStack() as admitted:
        for number in range(9):
            admitted.enter_context(gateways[0].quotas.admit(KEYS.user(f"u{number}"), lambda: PERSON))
    assert gateways[0].used() == {}


async def test_all_gateways_count_people_and_refuse_above_quota(gateways: tuple[Gateway, Gateway]) -> None:
    here, there = gateways
    for name in ("ada", "bob"):
        await here.put(name)
    await here.quotas.count()
    await there.quotas.count()
    assert there.used()["people"] == 2 and there.used()["bytes"] > 400
    await there.put("cai")
    assert there.used()["people"] == 3, "a gateway knows at once what it has let in itself"
    told = refusal(there.quotas, "dan", lambda: PERSON)
    assert "used 3 of its quota of 3 people" in told and f"mta keys quota {TENANT} --people" in told
    assert there.refused == ["quota"]
    await there.put("ada", "more text of somebody who is there")
    await there.quotas.count()
    await here.quotas.count()
    assert here.used() == there.used() and here.used()["people"] == 3
    refusal(here.quotas, "dan", lambda: PERSON)
    await here.parts.erase("ada")
    here.quotas.changed(KEYS.user("ada"))
    await here.quotas.count()
    await here.put("dan")


async def test_who_asks_for_nothing_here_is_counted_in_turn(
    gateways: tuple[Gateway, Gateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = gateways
    monkeypatch.setattr(rules, "COUNT_TURNS", 3)

    async def told(name: str) -> list[float]:
        await there.put(name)
        await there.quotas.count()
        told = []
        for _ in range(3):
            await here.quotas.count()
            told.append(here.used()["people"])
        return told

    assert await told("ada") == [0, 0, 1]
    refusal(here.quotas, "bob", lambda: Held(people=9))
    assert await told("bob") == [2, 2, 2]


async def test_what_is_admitted_counts_until_it_is_measured(gateways: tuple[Gateway, Gateway]) -> None:
    here, _ = gateways
    with ExitStack() as admitted:
        for name in ("ada", "bob", "cai"):
            admitted.enter_context(here.quotas.admit(KEYS.user(name), lambda: PERSON))
        await here.quotas.count()
        refusal(here.quotas, "dan", lambda: PERSON)
    refusal(here.quotas, "dan", lambda: PERSON)
    await here.quotas.count()
    assert here.used()["people"] == 0, "none of them was written"
    await here.put("dan")


async def test_bytes_are_those_of_everything_that_grows(gateways: tuple[Gateway, Gateway]) -> None:
    here, _ = gateways
    user = await here.put("ada", "x" * 1000)
    await here.quotas.count()
    before = here.used()["bytes"]
    assert 1000 < before < 3000
    await submitted(here.parts.jobs, user.key, "a sample " * 1000)
    here.quotas.changed(user)
    await here.quotas.count()
    assert before + 9000 < here.used()["bytes"] < before + 12_000
    refusal(here.quotas, "ada", lambda: Held(bytes=45_000))
    with here.quotas.admit(user, lambda: Held(bytes=-10)):
        pass


async def test_room_counts_once_it_is_made(gateways: tuple[Gateway, Gateway]) -> None:
    here, _ = gateways
    user = await here.put("ada", "x" * 40_000)
    await here.quotas.count()
    with ExitStack() as admitted:
        for _ in range(3):  # of the same data, and each may fail
            admitted.enter_context(here.quotas.admit(user, lambda: Held(bytes=-30_000)))
        refusal(here.quotas, "bob", lambda: Held(people=1, bytes=20_000))
        await here.quotas.count()
        refusal(here.quotas, "bob", lambda: Held(people=1, bytes=20_000))


async def test_samples_that_replace_more_need_no_room(gateways: tuple[Gateway, Gateway]) -> None:
    here, _ = gateways
    user = await here.put("ada")
    await submitted(here.parts.jobs, user.key, *(f"{n:01000}" for n in range(40)))
    here.quotas.changed(user)
    await here.quotas.count()
    assert here.used()["bytes"] > 40_000
    find = AsyncMock(return_value=(user, await here.parts.profiles.load(user.key), ""))
    profiles = Mock(find=find, quotas=here.quotas, is_forgotten=Mock(return_value=False))
    adapting = Adapting(here.parts.jobs, Mock(), profiles, *[Mock()] * 4)
    fewer = Submission([f"{n:01001}".encode() for n in range(20)], False, "{}", BANK)
    with pytest.raises(QuotaExceeded):
        await adapting._submit(user, TrainingRequest([], {}, True, ""), replace(fewer, append=True))
    assert await adapting._submit(user, TrainingRequest([], {}, False, ""), fewer)
    await here.quotas.count()
    assert 20_000 < here.used()["bytes"] < 30_000


async def test_adapter_counts_from_its_job_until_the_job_fails(gateways: tuple[Gateway, Gateway]) -> None:
    here, there = gateways
    worker = WorkerSteps(here.parts)
    for ends, adapters in ((worker.reject, 0), (worker.promote, 1)):
        user = await here.put("ada")
        with here.quotas.admit(user, lambda: Held(adapters=1)):
            await submitted(here.parts.jobs, user.key, str(ends))
        await here.quotas.count()
        await there.quotas.count()
        refusal(there.quotas, "bob", lambda: Held(adapters=1))
        await worker.take()
        await worker.claim()
        assert await ends()
        await here.quotas.count()
        assert here.used()["adapters"] == adapters
    assert not here.quotas._waiting


async def test_who_has_only_rated_counts_for_their_tenant_alone(
    parts: StoreParts, gateways: tuple[Gateway, Gateway]
) -> None:
    here, there = gateways
    await parts.keys.add(access_key(new_secret(), "app", "another", Scope))
    await parts.keys.set_quota("another", QUOTA)
    await here.refresh()
    user = KEYS.user("a rater")
    await parts.feedback.add(user.key, "gen-1", Feedback("base", "none"), None, "")
    here.quotas.changed(user)
    await here.quotas.count()
    counted = here.used()
    assert (counted["people"], counted["bytes"] > 0) == (1, True)
    await there.quotas.recount()
    await there.refresh()
    found = {(tenant, what): used for tenant, what, used, _ in there.quotas.used()}
    assert (there.used(), found["another", "people"]) == (counted, 0)


async def test_a_recount_puts_a_wrong_count_right(
    parts: StoreParts, gateways: tuple[Gateway, Gateway], raw: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "_PAUSE_S", 0)
    monkeypatch.setattr(holdings, "SCANNED", 10)
    here, there = gateways
    await asyncio.gather(*(parts.put(f"u{number}", "text") for number in range(50)))  # nobody noted them
    await stored(parts.profiles, UserKeys(SECRET, "another").key("u1"), change("a", user_id="u1"))
    await raw.set(keys.profile("y" * 26), "damaged")
    await parts.put("ghost", "text")
    ghost = KEYS.key("ghost")
    _, held, _ = await parts.profiles.measure(ghost)
    await parts.holdings.note(TENANT, {ghost: held, KEYS.key("u1"): Counter(people=1, bytes=10**9, adapters=7)})
    await parts.erase("ghost")
    assert (await there.refresh()).used() == {"people": 2, "bytes": held["bytes"] + 10**9, "adapters": 7}
    await asyncio.gather(here.quotas.recount(), there.quotas.recount())
    await here.quotas.count()
    measured = [(await parts.profiles.measure(KEYS.key(f"u{number}")))[1]["bytes"] for number in range(50)]
    assert here.used() == {"people": 50, "bytes": sum(measured), "adapters": 0}
    assert await raw.hlen(keys.count(TENANT)) == 50 + len(("people", "bytes", "adapters"))
    await parts.put("late", "text")
    await asyncio.gather(here.quotas.recount(), there.quotas.recount())
    assert (await here.refresh()).used()["people"] == 50, "the next one is due in an hour"
    (lease,) = [name async for name in raw.scan_iter("mta:held:*")]
    assert RECOUNT_INTERVAL_S - 60 < await raw.ttl(lease) <= RECOUNT_INTERVAL_S
    await raw.delete(lease)
    await there.quotas.recount()
    assert (await here.refresh()).used()["people"] == 51
    await parts.keys.set_quota(TENANT, replace(QUOTA, people=4))
    await parts.put("latest", "text")
    await (await here.refresh()).quotas.recount()
    assert (await here.refresh()).used()["people"] == 52
