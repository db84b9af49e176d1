"""API keys in a store: what is kept, what is never forgotten, and what a store that answers wrongly does not open."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from server.errors import Forbidden, Unauthorized, Unavailable
from server.gateway.access.keys import REFRESH_INTERVAL_S, Caller, KnownKeys
from server.store.redis.keys import ACCESS_KEYS
from server.store.redis.servers.connection import READ_TIMEOUT_S
from server.store.tenants.access_keys import AccessKey, AccessKeys, Scope, access_key, new_secret
from server.store.tenants.rates import Allowance
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
    return replace(access_key(secret, "app", "acme", (Scope.GENERATE, Scope.ADMIN), limits), created_ms=1)


def sent(secret: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"mta.example.org"), (b"authorization", f"Bearer {secret}".encode())]


def refused(keys: KnownKeys, headers: list[tuple[bytes, bytes]]) -> str:
    found = keys.caller(headers)
    assert isinstance(found, Unauthorized)
    return found.code


async def test_a_key_is_kept_without_its_secret_and_stays_known_as_revoked(store: AccessKeys, raw: Redis) -> None:
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
    for revision, bank in enumerate(("9f2c41d0", ""), ring.revision + 1):
        assert await store.revision() == (ring.id, revision)
        await store.set_bank("acme", bank)
        assert (await store.all()).banks == ({"acme": bank} if bank else {})


async def test_the_first_key_is_made_once_however_many_try(store: AccessKeys) -> None:
    keys = [key_of(new_secret()) for _ in range(8)]
    made = await asyncio.gather(*(store.add(key, only_first=True) for key in keys))
    assert sum(made) == 1
    (kept,) = (await store.all()).keys
    assert kept == keys[made.index(True)]
    assert await store.add(kept, only_first=True), "the answer to a repeated call is the same"
    await store.revoke(kept.digest, 1)
    assert not await store.add(keys[made.index(False)], only_first=True)


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


async def test_a_store_that_cannot_be_read_at_the_start_is_not_one_without_keys(store: AccessKeys, raw: Redis) -> None:
    await raw.set(ACCESS_KEYS, "not a hash")
    with pytest.raises(Unavailable):
        await KnownKeys("default").refresh(store)


def test_a_change_counts_everywhere_within_five_seconds() -> None:
    assert REFRESH_INTERVAL_S + READ_TIMEOUT_S < 5
