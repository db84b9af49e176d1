"""Gateways and workers reduced to what they do with the store, to be let die anywhere; people made up to be stored."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any
from unittest.mock import AsyncMock

import numpy as np
import redis

from bank.lookup.signature import Signature
from bench.rig.processes import PATIENCE_S
from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable
from server.gateway.users.privacy import Erasing
from server.store.adapters import AdapterVersion, new_adapter_id
from server.store.append_only_file import AppendOnlyFile
from server.store.jobs import Job, JobId, JobState, JobStore, Lease, Submission, Trained
from server.store.opening import Stores
from server.store.profile_record import AdapterNote, Profile, StoredItem, StoredSignature, StoredVector
from server.store.profiles import Change, Erasure, ProfileStore, Snapshot
from server.store.redis import keys
from server.store.redis.servers.connection import RedisConnection
from server.store.tenants.user_key import UserKeys
from tests.support.valkeys.cluster import ValkeyCluster

BANK = "9f2c41d0"
RECIPE = f"mta3:{BANK}:shared:c"
LEASE_S = 15.0
LATER_MS = 1 << 52
SECRET, TENANT = "a secret for tests only", "tests"
KEYS = UserKeys(SECRET, TENANT)
EMBEDDER = "3887c9b9af8fe702"
REPLICA_TIMEOUT_MS = "server.store.redis.servers.base.REPLICA_TIMEOUT_MS"
_numbers = itertools.count()


class Fault(StrEnum):
    LOST_REQUEST = "the request never arrives"
    LOST_ANSWER = "it is done, but nobody hears of it"
    TWICE = "the answer is lost, and the client sends it again"


class FaultyConnection(RedisConnection):
    """Fails at the n-th write after `fail`; a caller's own death there looks the same."""

    _fault: Fault | None = None
    _left = 0

    def fail(self, fault: Fault | None, after_writes: int = 0) -> None:
        self._fault, self._left = fault, after_writes

    async def write(self, script: str, names: Sequence[str], *arguments: Any) -> Any:
        fault = self._fault if self._left == 0 else None
        self._left -= 1
        if fault is None:
            return await super().write(script, names, *arguments)
        self._fault = None
        if fault is Fault.LOST_REQUEST:
            raise Unavailable("lost on its way to the store")
        await super().write(script, names, *arguments)
        if fault is Fault.LOST_ANSWER:
            raise Unavailable("lost on its way from the store")
        return await super().write(script, names, *arguments)


class StoreParts(Stores):
    """One process's stores, on a connection of its own that can be made to fail."""

    def __init__(self, url: str) -> None:
        self.connection = FaultyConnection(url)
        super().__init__(self.connection, None)
        self.to_sign = self.signing(BANK)

    @classmethod
    @asynccontextmanager
    async def opened(cls, url: str) -> AsyncIterator[StoreParts]:
        parts = cls(url)
        try:
            await parts.until_checked()
            yield parts
        finally:
            await parts.connection.close()

    async def until_checked(self) -> None:
        """Wait as a process at its start does: a busy machine can keep a server from answering in time."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                with suppress(Unavailable):
                    await self.connection.check()
                    return
                await asyncio.sleep(0.1)

    async def put(self, user: str, text: str) -> None:
        """Let one item be all that a user has."""
        key = KEYS.key(user)
        epoch, before = await self.profiles.begin(key), await self.profiles.read(key)
        assert await self.profiles.commit(key, before.version, put_of(user, text, before), epoch)

    async def erase(self, user: str, users: UserKeys = KEYS) -> Erasure | None:
        """As the gateway does; there are no engines."""
        return await Erasing(self, BANK, AsyncMock()).erase(users.user(user))


@asynccontextmanager
async def connected(url: str, **options: bool) -> AsyncIterator[RedisConnection]:
    """A process's connection, checked unless options are given."""
    connection = RedisConnection(url, **options)
    try:
        if not options:
            await connection.check()
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[ProfileStore]:
    async with connected(url) as connection:
        yield ProfileStore(connection)


@asynccontextmanager
async def strict_and_lenient(url: str) -> AsyncIterator[tuple[RedisConnection, RedisConnection]]:
    async with connected(url, require_durable=True) as strict, connected(url, require_durable=False) as lenient:
        yield strict, lenient


async def submitted(jobs: JobStore, user_key: str, *samples: str, **fields: object) -> Job:
    """A queued job, by default of one sample; `fields` as of a `Submission`."""
    encoded = [sample.encode() for sample in samples or ("a",)]
    given = {"samples": encoded, "append": False, "config": "{}", "bank": BANK} | fields
    job = await jobs.submit(user_key, Submission(**given), 100)  # type: ignore[arg-type]
    assert job is not None
    return job


async def claimed(jobs: JobStore, job_id: JobId, lease_s: float = LEASE_S) -> Lease:
    lease = await jobs.claim(job_id, lease_s)
    assert lease is not None
    return lease


def put_of(user: str, text: str, snapshot: Snapshot) -> Change:
    before = snapshot.profile
    kept = {"adapter": before.adapter, "signature": before.signature} if before else {}
    updated_ms = before.updated_ms + 1 if before else 1
    profile = Profile(user, 1, updated_ms, EMBEDDER, np.ones(4, "f4") / 2, **kept)  # type: ignore[arg-type]
    return Change(profile, {"it": StoredItem(0, {"text": text})}, {}, ())


def vector(seed: int) -> np.ndarray:
    raw = np.random.default_rng(seed).standard_normal(384).astype("f4")
    return (raw / np.linalg.norm(raw)).astype("f2").astype("f4")


def profile(user_id: str = "author-033", items: int = 0, **changes: object) -> Profile:
    return replace(Profile(user_id, items, 1_700_000_000_000, EMBEDDER, vector(0)), **changes)


def change(names: str = "", drop: str = "", **changes: object) -> Change:
    """A change that puts an item and its vector for each letter."""
    items = {name: StoredItem(order, {"text": f"text of {name}"}) for order, name in enumerate(names)}
    vectors = {name: StoredVector(EMBEDDER, vector(ord(name))) for name in names}
    return Change(profile(items=len(names), **changes), items, vectors, tuple(drop))


async def stored(store: ProfileStore, key: str, change: Change) -> bool:
    """Store somebody who is unknown, as a request does."""
    return await store.commit(key, b"", change, await store.begin(key))


def users_at(cluster: ValkeyCluster, home: ValkeyProcess) -> Iterator[str]:
    """Keys of users whom no other test knows, and whom one of the primaries holds."""
    for number in _numbers:
        key = KEYS.key(f"user-of-a-cluster-{number}")
        if cluster.home_of(keys.profile(key)) is home:
            yield key


def on_disk(text: str, *servers: ValkeyProcess) -> bool:
    while True:
        with suppress(FileNotFoundError):  # a rewrite has renamed a file meanwhile: look at all again
            files = (path for server in servers for path in server.folder.rglob("*") if path.is_file())
            return any(text.encode() in path.read_bytes() for path in files)


async def forgotten(connection: RedisConnection, key: str, *servers: ValkeyProcess) -> None:
    """What is stored of a user and erased stands in the files of its servers, and then leaves them."""
    store, file, secret = ProfileStore(connection), AppendOnlyFile(connection), "words that nobody shall find again"
    await stored(store, key, change("a", user_id=secret))
    asked = await file.announce(key)
    assert await store.erase(key, asked.erase_by_ms, asked.rewritten_by_ms)
    assert all(on_disk(secret, server) for server in servers)
    await until_forgotten(connection, secret, *servers)


async def until_forgotten(connection: RedisConnection, text: str, *servers: ValkeyProcess) -> None:
    """Look after the append-only files, as a gateway does, until the text is gone from them."""
    file = AppendOnlyFile(connection)
    async with asyncio.timeout(60):
        while on_disk(text, *servers):
            await file.rewrite_if_due()
            await asyncio.sleep(0.05)


def held_by(url: str) -> dict[str, str]:
    """A digest of what each key holds, but for the gateways' own signs of life, which change every two seconds."""
    with redis.from_url(url) as store:
        names = sorted(name.decode() for name in store.scan_iter() if not name.startswith(b"mta:held:gateways/"))
        return {name: hashlib.blake2b(store.dump(name) or b"", digest_size=8).hexdigest() for name in names}


class Writing:
    """Users whose record is written all the while, each time with a higher `updated_ms`."""

    def __init__(self, store: ProfileStore, users: Sequence[str]) -> None:
        self._store, self._enough = store, False
        self._tried, self.acknowledged = dict.fromkeys(users, 0), dict.fromkeys(users, 0)

    async def __aenter__(self) -> Writing:
        self._running = [asyncio.create_task(self._write(user)) for user in self._tried]
        return self

    async def __aexit__(self, *_: object) -> None:
        """What was acknowledged is there."""
        self._enough = True
        await asyncio.gather(*self._running)
        for user, written in self.acknowledged.items():
            found = await self._store.load(user)
            assert written <= found.updated_ms <= self._tried[user]

    async def goes_on(self) -> None:
        before = dict(self.acknowledged)
        while not all(self.acknowledged[user] > before[user] + 10 for user in before):
            assert not any(task.done() for task in self._running), self._running
            await asyncio.sleep(0.02)

    async def _write(self, user: str) -> None:
        while not self._enough:
            self._tried[user] = number = self._tried[user] + 1
            try:
                epoch, snapshot = await self._store.begin(user), await self._store.read(user)
                assert await self._store.commit(user, snapshot.version, change("a", updated_ms=number), epoch)
                self.acknowledged[user] = number
            except Unavailable as error:
                assert error.code in ("store_unavailable", "store_not_durable")
                await asyncio.sleep(0.05)


@dataclass
class WorkerSteps:
    """A worker that can be stopped between any two of its steps."""

    parts: StoreParts
    bank: str = BANK
    at_most: int = 3  # kept versions
    taken: JobId | None = None  # a job that the queue gave it
    lease: Lease | None = None  # a job that it has claimed
    signing: str | None = None  # a user whose signature it was asked for

    async def take(self) -> None:
        self.taken = await self.parts.jobs.next_job(self.bank, 0.02)

    async def claim(self) -> None:
        if self.taken is not None:
            job, self.taken = self.taken, None
            self.lease = await self.parts.jobs.claim(job, LEASE_S)

    async def reject(self) -> bool:
        return await self.parts.jobs.end(self.lease, Trained(JobState.REJECTED, 1.0, 1.0))

    async def promote(self) -> str | None:
        """End the claimed job with an adapter; the adapter's id, if it was written."""
        raw = f"adapter {next(_numbers)}".encode()
        late_ms = time.time_ns() // 1_000_000 + 60_000  # a worker's clock may be ahead
        note = AdapterNote(new_adapter_id(), RECIPE.replace(BANK, self.bank), len(raw), late_ms)
        made = AdapterVersion(note, hashlib.sha256(raw).hexdigest(), 2, 10, 2.0, 1.0)
        trained = Trained(JobState.SUCCEEDED, 2.0, 1.0)
        done = await self.parts.jobs.promote(self.lease, trained, made, raw, at_most=self.at_most)
        return note.id if done else None

    async def take_signing(self) -> None:
        self.signing = await self.parts.to_sign.take(0.02)

    async def sign(self) -> None:
        assert self.signing is not None
        await self.parts.to_sign.count_attempt(self.signing)
        snapshot = await self.parts.profiles.read(self.signing)
        if snapshot.profile is not None:
            made = StoredSignature(Signature(BANK, 1, np.ones(2, "f4")), snapshot.profile.updated_ms)
            signed = Change(replace(snapshot.profile, signature=made), {}, {}, ())
            await self.parts.profiles.commit(self.signing, snapshot.version, signed, snapshot.epoch)
        await self.parts.to_sign.remove(self.signing)
        self.signing = None
