"""What is kept of tenants: API keys, which are never forgotten and open nothing by mistake, and what limits count."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio import Redis

from bench.rig.valkey import ValkeyProcess
from server.errors import Forbidden, Unauthorized, Unavailable
from server.gateway.access.keys import REFRESH_INTERVAL_S, Caller, KnownKeys
from server.gateway.access.limiter import Limiter
from server.settings import Settings
from server.store.redis.keys import ACCESS_KEYS
from server.store.redis.scripts import Script
from server.store.redis.servers.connection import READ_TIMEOUT_S
from server.store.tenants import rates as scripts
from server.store.tenants.access_keys import AccessKey, AccessKeys, Policy, Scope, access_key, new_secret
from server.store.tenants.rates import MOST_DEBT, Allowance, Quota, Rate, Rates, Use
from tests.support.store_parts import StoreParts

LOCAL = [(b"host", b"127.0.0.1:8000")]


@pytest.fixture
def store(parts: StoreParts) -> AccessKeys:
    return parts.keys


@pytest.fixture
def secret() -> str:
    return new_secret()


@pytest.fixture
async def known(store: AccessKeys, secret: str) -> KnownKeys:
    """A gateway that has seen that key."""
    known = KnownKeys("default")
    await known.refresh(store)
    await store.add(key_of(secret))
    await known.refresh(store)
    return known


def key_of(secret: str) -> AccessKey:
    limits = Allowance(requests=5, jobs=0)
    return replace(access_key(secret, "app", "acme", (Scope.GENERATE, Scope.ADMIN), Policy(limits)), created_ms=1)


def sent(secret: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"mta.example.org"), (b"authorization", f"Bearer {secret}".encode())]


def refused(keys: KnownKeys, headers: list[tuple[bytes, bytes]]) -> str:
    found = keys.caller(headers)
    assert isinstance(found, Unauthorized)
    return found.code


async def test_key_is_stored_without_secret_and_listed_when_revoked(store: AccessKeys, raw: Redis) -> None:
    assert await store.revision() == ("", 0)
    assert (await store.all()).keys == []
    key = key_of(secret := new_secret())
    assert await store.add(key)
    ring = await store.all()
    assert (ring.keys, ring.id, ring.revision) == ([key], *await store.revision())
    assert hashlib.sha256(secret.encode()).hexdigest() == key.digest
    kept = repr(await raw.hgetall(ACCESS_KEYS))
    assert key.digest in kept
    assert secret[:-4] not in kept
    assert await store.revoke(key.digest, 7)
    assert not await store.revoke(key.digest, 8)
    assert not await store.revoke(key_of(new_secret()).digest, 8)
    assert (await store.all()).keys == [replace(key, revoked_ms=7)]
    assert len(ring.id) == 16
    for bank in ("9f2c41d0", ""):
        before = await store.revision()
        await store.set_bank("acme", bank)
        assert (await store.all()).banks == ({"acme": bank} if bank else {})
        assert (await store.revision())[0] == before[0] == ring.id
        assert (await store.revision())[1] > before[1]  # by which gateways of the version before see it


async def test_the_first_key_is_made_once_however_many_try(store: AccessKeys) -> None:
    keys = [key_of(new_secret()) for _ in range(8)]
    made = await asyncio.gather(*(store.add(key, only_first=True) for key in keys))
    assert sum(made) == 1
    (kept,) = (await store.all()).keys
    assert kept == keys[made.index(True)]
    assert await store.add(kept, only_first=True), "the answer to a repeated call is the same"
    await store.revoke(kept.digest, 1)
    assert not await store.add(keys[made.index(False)], only_first=True)


async def test_a_key_expires_and_the_hour_of_its_last_use_is_known(
    store: AccessKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = time.time()
    hour = int(now_s) // 3600
    monkeypatch.setattr("time.time", lambda: now_s)
    brief, lasting = new_secret(), new_secret()
    await store.add(replace(key_of(brief), expires_ms=int(now_s * 1000) + 60_000, note="for the summer"))
    await store.add(key_of(lasting))
    assert {key.note for key in (await store.all()).keys} == {"for the summer", ""}
    known = KnownKeys("default")
    await known.refresh(store)
    await known.note_used(store)
    assert await store.used() == {}
    for _ in range(2):
        assert isinstance(known.caller(sent(brief)), Caller)
    await known.note_used(store)
    assert await store.used() == {key_of(brief).digest: hour}
    monkeypatch.setattr("time.time", lambda: now_s + 3600)
    assert refused(known, sent(brief)) == "expired_api_key"
    assert isinstance(known.caller(sent(lasting)), Caller)
    await known.note_used(store)
    assert await store.used() == {
        key_of(brief).digest: hour,
        key_of(lasting).digest: hour + 1,
    }


def test_while_no_key_exists_this_machine_alone_is_answered() -> None:
    keys = KnownKeys("default")
    for host in (b"127.0.0.1:8000", b"localhost", b"LOCALHOST:80", b"[::1]:8000", b"127.8.9.1"):
        found = keys.caller([(b"host", host), (b"authorization", b"whatever")])
        assert found == Caller("default", "", frozenset(Scope))
    hosts = (b"mta.example.org", b"10.0.0.1:8000", b"127.0.0.1.example.org", b"localhost.example.org", b"", b"[::2]")
    for headers in ([], *([(b"host", host)] for host in hosts), [*LOCAL, (b"host", b"example.org")]):
        with pytest.raises(Forbidden, match="mta keys create") as caught:
            keys.caller(headers)
        assert caught.value.code == "no_api_key_exists"


@pytest.mark.parametrize("name", ["Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Via"])
def test_while_no_key_exists_a_proxys_requests_are_refused(name: str) -> None:
    with pytest.raises(Forbidden) as caught:
        KnownKeys("default").caller([*LOCAL, (name.lower().encode(), b"10.0.0.7")])
    assert caught.value.code == "no_api_key_exists"


async def test_only_a_bearer_with_the_whole_secret_counts(known: KnownKeys, secret: str) -> None:
    too_long = "Bearer " + "x" * 10_000
    for header in ("", "Bearer", "Bearer ", "Basic {}", "{}", "Bearer {} {}", "Bearer {}x", "bearer\t{}", too_long):
        value = header.replace("{}", secret).encode()
        assert refused(known, [*LOCAL, (b"authorization", value)]) == "invalid_api_key", header
    assert refused(known, [*sent(secret), (b"authorization", b"Bearer x")]) == "invalid_api_key"


async def test_a_store_that_lost_its_keys_or_has_others_opens_nothing(
    store: AccessKeys, known: KnownKeys, raw: Redis, secret: str, caplog: pytest.LogCaptureFixture
) -> None:
    before, ring, others = known.caller(sent(secret)), (await store.all()).id, [new_secret() for _ in range(3)]
    await raw.flushall()
    await known.refresh(store)
    assert known.caller(sent(secret)) == before
    assert refused(known, LOCAL) == "missing_api_key"
    for other in others:  # at a revision as high as the first ring's, and higher
        await store.add(key_of(other))
        await known.refresh(store)
        assert known.caller(sent(secret)) == before
        assert refused(known, sent(other)) == "invalid_api_key"
    assert caplog.text.count("lost API keys") == 1 + len(others)
    await raw.flushall()
    await raw.hset(ACCESS_KEYS, mapping={"revision": 1_000, "ring": ring})  # a part of the keys
    for reading in (known.refresh(store), store.all()):
        with pytest.raises(Unavailable) as caught:
            await reading
        assert caught.value.code == "store_corrupt"
    assert known.caller(sent(secret)) == before


async def test_a_key_lost_in_a_failover_counts_no_more(store: AccessKeys, known: KnownKeys, raw: Redis) -> None:
    lost, revoked, after = (new_secret() for _ in range(3))
    await store.add(key_of(revoked))
    behind = await raw.hgetall(ACCESS_KEYS)  # of a replica
    await store.revoke(key_of(revoked).digest, 7)
    await known.refresh(store)
    await store.add(key_of(lost))
    await known.refresh(store)
    assert isinstance(known.caller(sent(lost)), Caller)
    await raw.delete(ACCESS_KEYS)
    await raw.hset(ACCESS_KEYS, mapping=behind)
    for _ in range(2):  # as many changes as were lost
        await store.add(key_of(after := new_secret()))
    await known.refresh(store)
    assert refused(known, sent(lost)) == "invalid_api_key"
    assert isinstance(known.caller(sent(after)), Caller)
    assert refused(known, sent(revoked)) == "revoked_api_key"


async def test_a_change_reads_what_changed_alone(
    store: AccessKeys, known: KnownKeys, nodes: list[ValkeyProcess]
) -> None:
    """10,000 keys took 180 ms of the event loop."""
    await asyncio.gather(*(store.add(key_of(new_secret())) for _ in range(200)))
    await known.refresh(store)
    secret, clients = new_secret(), [node.client() for node in nodes]

    async def read_bytes() -> int:
        return sum([(await client.info("stats"))["total_net_output_bytes"] for client in clients])

    changes = (
        lambda: store.add(key_of(secret)),
        lambda: store.set_quota("acme", Quota(tokens=7)),
        lambda: store.set_bank("acme", "9f2c41d0"),
        lambda: store.set_quota("acme", Quota()),
        lambda: store.set_bank("acme", ""),
        lambda: store.revoke(key_of(secret).digest, 7),
    )
    seen = []
    for change in changes:
        await change()
        before = await read_bytes()
        await known.refresh(store)
        assert await read_bytes() - before < 40_000
        accepted = isinstance(known.caller(sent(secret)), Caller)
        seen.append((accepted, known.bank_of("acme"), known.quotas.get("acme")))
    for client in clients:
        await client.aclose()
    tokens = Quota(tokens=7)
    assert seen == [
        (True, None, None),
        (True, None, tokens),
        (True, "9f2c41d0", tokens),
        (True, "9f2c41d0", None),
        (True, None, None),
        (False, None, None),
    ]


async def test_changes_by_the_version_before_are_seen(store: AccessKeys, known: KnownKeys, raw: Redis) -> None:
    secret = new_secret()
    await store.add(key_of(secret))
    await known.refresh(store)
    await raw.hset(ACCESS_KEYS, f"revoked:{key_of(secret).digest}", 7)
    await raw.hincrby(ACCESS_KEYS, "revision", 1)
    await store.add(key_of(new_secret()))
    await known.refresh(store)
    assert refused(known, sent(secret)) == "revoked_api_key"
    names = {name.decode().partition(":")[0] for name in await raw.hgetall(ACCESS_KEYS)}
    digests = {name for name in names if len(name) == 64}  # what that version knows
    assert names - digests == {"ring", "revision", "revoked"}


async def test_unreadable_store_at_start_raises_unavailable(store: AccessKeys, raw: Redis) -> None:
    await raw.set(ACCESS_KEYS, "not a hash")
    with pytest.raises(Unavailable):
        await KnownKeys("default").refresh(store)


def test_a_change_counts_everywhere_within_five_seconds() -> None:
    assert REFRESH_INTERVAL_S + READ_TIMEOUT_S < 5


Clock = Callable[[float], None]
RATE = Rate("requests", "key-1", 5)


@pytest.fixture
def rates(parts: StoreParts) -> Rates:
    return parts.rates


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Sets the time that the server's scripts see, in seconds."""
    script = scripts._CONSUME

    def set_to(now_s: float) -> None:
        time = f"{{{int(now_s)}, {int(now_s % 1 * 1e6)}}}"
        monkeypatch.setattr(scripts, "_CONSUME", Script(script.text.replace("redis.call('TIME')", time)))

    return set_to


def limiter(rates: Rates) -> Limiter:
    return Limiter(rates, KnownKeys("default"), Settings(), lambda reason: None)


async def take(rates: Rates, rate: Rate, amount: int) -> bool:
    return (await rates.consume([Use(rate, amount)]))[0].fits


async def left(rates: Rates, rate: Rate) -> int:
    (level,) = await rates.consume([Use(rate, 0)])
    return level.left


async def test_no_more_is_taken_than_there_is_by_an_owner(rates: Rates, clock: Clock) -> None:
    clock(1000)
    assert sum(await asyncio.gather(*(take(rates, RATE, 1) for _ in range(9)))) == 5
    assert await left(rates, replace(RATE, most=20)) == 15  # another limit holds at once
    assert await left(rates, replace(RATE, most=2)) == 0
    (refused,) = await rates.consume([Use(RATE, 1)])
    assert (refused.fits, refused.left) == (False, 0)
    assert 0 < refused.fits_in_s(1) <= 12
    for other in (replace(RATE, owner=RATE.owner + "x"), replace(RATE, what="tokens")):
        assert await left(rates, other) == 5


async def test_of_several_rates_all_or_nothing(rates: Rates, clock: Clock) -> None:
    clock(1000)
    tokens = Rate("tokens", RATE.owner, 100)
    assert all(level.fits for level in await rates.consume([Use(RATE, 1), Use(tokens, 80)]))
    refused = await rates.consume([Use(RATE, 1), Use(tokens, 80)])
    assert [(level.fits, level.left) for level in refused] == [(True, 4), (False, 20)]
    assert [await left(rates, one) for one in (RATE, tokens)] == [4, 20]


async def test_what_is_given_back_can_be_taken_again(rates: Rates, clock: Clock) -> None:
    clock(1000)
    assert await take(rates, RATE, 5)
    await rates.consume([Use(RATE, -4)], anyway=True)
    assert await left(rates, RATE) == 4
    assert await take(rates, RATE, 4)
    await rates.consume([Use(RATE, 500)], anyway=True)
    level = (await rates.consume([Use(RATE, 1)]))[0]
    assert (level.left, level.fits_in_s(RATE.most) <= MOST_DEBT * RATE.window_s) == (0, True)
    lower = replace(RATE, most=2)  # what was used of a higher limit counts as all of the lower one
    assert (await rates.consume([Use(lower, 1)]))[0].fits_in_s(lower.most) <= lower.window_s


async def test_answers_that_take_more_than_estimated_are_paid_off(rates: Rates, clock: Clock) -> None:
    tokens, used = Rate("tokens", "key-1", 1000), 0
    for second in range(600):
        clock(1000 + second)
        if await take(rates, tokens, 100):
            await rates.consume([Use(tokens, 1900)], anyway=True)
            used += 2000
    assert used <= 12 * tokens.most


async def test_a_refund_never_leaves_more_than_the_limit(rates: Rates, clock: Clock) -> None:
    tokens = Rate("tokens", "key-1", 1000)
    for minute in range(12):  # an answer in each, which took a minute and a half, and none of its estimate
        clock(1000 + 120 * minute)
        assert await take(rates, tokens, 600)
        clock(1000 + 120 * minute + 90)
        await rates.consume([Use(tokens, -600)], anyway=True)
    assert await left(rates, tokens) == 1000
    assert sum([await take(rates, tokens, 100) for _ in range(100)]) == 10


async def test_use_leaks_evenly_within_a_window(rates: Rates, clock: Clock) -> None:
    clock(1000)
    assert await take(rates, RATE, 5)
    clock(1011)
    assert not await take(rates, RATE, 1)
    clock(1012)
    assert await take(rates, RATE, 1)
    assert not await take(rates, RATE, 1)
    clock(100_000)
    assert await left(rates, RATE) == 5
    assert not await take(rates, RATE, 6)
    assert await take(rates, RATE, 5)
    clock(1000)  # it was set back
    assert not await take(rates, RATE, 1)
    clock(1012)
    assert await take(rates, RATE, 1)


async def test_nothing_stays(rates: Rates, raw: Redis) -> None:
    await take(rates, RATE, 1)
    await rates.acquire("x", ["a"], 30)
    assert all([0 < await raw.pttl(key) <= 30_000 for key in await raw.keys("*")])
    await rates.consume([Use(RATE, -1)], anyway=True)
    assert not await raw.keys("mta:rates:*")


async def test_only_so_many_hold_it_until_their_leases_end(rates: Rates) -> None:
    assert await rates.acquire("x", ["a"], 30, 2) == 1
    assert await rates.acquire("x", ["b"], 30, 2) == 2
    assert await rates.acquire("x", ["c"], 30, 2) is None
    assert await rates.acquire("x", ["a"], 30, 2) == 2  # renewed
    await rates.release("x", "a")
    assert await rates.acquire("x", ["c"], 30, 2) == 2
    assert await rates.acquire("y", ["c"], 0.05, 1) == 1
    assert await rates.acquire("gateways", ["a", "b", "c"], 30) == 3
    await asyncio.sleep(0.1)
    assert await rates.acquire("y", ["d"], 30, 1) == 1


async def test_renewing_does_not_bring_back_who_left(parts: StoreParts, monkeypatch: pytest.MonkeyPatch) -> None:
    running, reached, gate, run = limiter(parts.rates), asyncio.Event(), asyncio.Event(), parts.connection.run
    member = await running._enter("key-x", 1)

    async def late(*arguments: Any) -> Any:
        reached.set()
        await gate.wait()
        return await run(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(parts.connection, "run", late)
        renewing = asyncio.create_task(running.renew_concurrent())
        await reached.wait()
    assert member
    await running._leave("key-x", member)
    gate.set()
    await renewing
    member = await running._enter("key-x", 1)
    assert member
    await running._leave("key-x", member)

    async def sent(*arguments: Any) -> Any:
        raise AssertionError(arguments)

    monkeypatch.setattr(parts.connection, "run", sent)
    await running.renew_concurrent()


async def test_a_seat_whose_answer_was_lost_is_left(parts: StoreParts, monkeypatch: pytest.MonkeyPatch) -> None:
    running, run = limiter(parts.rates), parts.connection.run

    async def lost(*arguments: Any) -> Any:
        await run(*arguments)
        raise Unavailable("lost on its way from the store")

    with monkeypatch.context() as patched:
        patched.setattr(parts.connection, "run", lost)
        member = await running._enter("key-x", 1)
    assert member
    assert not await running._enter("key-x", 1)
    await running._leave("key-x", member)
    assert await running._enter("key-x", 1)


async def test_who_goes_on_keeps_its_seat(rates: Rates, raw: Redis) -> None:
    running = limiter(rates)
    await running._enter("key-x", 1)
    await raw.pexpire("mta:held:running/key-x", 50_000)
    await running.renew_concurrent()
    assert await raw.pttl("mta:held:running/key-x") > 50_000
    assert not await running._enter("key-x", 1)
