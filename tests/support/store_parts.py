"""Gateways and workers reduced to what they do with the store, to be run step by step and let die anywhere."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np

from bank.lookup.signature import Signature
from server.errors import Unavailable
from server.gateway.users.privacy import Erasing
from server.store.adapters import AdapterStore, StoredAdapter
from server.store.jobs import Job, JobId, JobState, JobStore, Lease, Submission, Trained
from server.store.profile_record import AdapterNote, Profile, StoredItem, StoredSignature
from server.store.profiles import Change, Erasure, ProfileStore, Snapshot
from server.store.queue import UserQueue
from server.store.redis.servers.append_only_file import AppendOnlyFile
from server.store.redis.servers.connection import RedisConnection
from server.store.tenants.access_keys import AccessKeys
from server.store.tenants.user_key import UserKeys

BANK = "9f2c41d0"
RECIPE = f"mta3:{BANK}:shared:c"
LEASE_S = 15.0
SECRET, TENANT = "a secret for tests only", "tests"
KEYS = UserKeys(SECRET, TENANT)
EMBEDDER = "3887c9b9af8fe702"
_numbers = itertools.count()


class Fault(StrEnum):
    """What befalls one write."""

    LOST_REQUEST = "the request never arrives"
    LOST_ANSWER = "it is done, but nobody hears of it"
    TWICE = "the answer is lost, and the client sends it again"


class FaultyConnection(RedisConnection):
    """Fails at the n-th write after `fail`; for the caller that is also what its own death there looks like."""

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


class StoreParts:
    """One process's stores, on a connection of its own that can be made to fail."""

    def __init__(self, url: str) -> None:
        self.connection = FaultyConnection(url)
        self.profiles, self.jobs = ProfileStore(self.connection), JobStore(self.connection)
        self.keys = AccessKeys(self.connection)
        self.adapters, self.signing = AdapterStore(self.connection), UserQueue(self.connection, "sign", BANK)

    @classmethod
    @asynccontextmanager
    async def opened(cls, url: str) -> AsyncIterator[StoreParts]:
        """Connected, until the block ends."""
        parts = cls(url)
        await parts.connection.check()
        try:
            yield parts
        finally:
            await parts.connection.close()

    async def put(self, user: str, text: str) -> None:
        """Let one item be all that a user has."""
        key = KEYS.key(user)
        before = await self.profiles.read(key)
        assert await self.profiles.commit(key, before.version, put_of(user, text, before), before.epoch)

    async def erase(self, user: str) -> Erasure | None:
        """As the gateway does; there are no engines."""

        async def drop(user_key: str) -> None:
            pass

        erasing = Erasing(
            self.profiles,
            adapters=self.adapters,
            jobs=self.jobs,
            signing=lambda bank: UserQueue(self.connection, "sign", bank),
            bank=BANK,
            log_file=AppendOnlyFile(self.connection),
            drop=drop,
        )
        return await erasing.erase(KEYS.user(user))


async def submitted(jobs: JobStore, user_key: str, *samples: str, **fields: object) -> Job:
    """A job, queued, of one sample where none is given; `fields` as of a `Submission`."""
    encoded = [sample.encode() for sample in samples or ("a",)]
    given = {"samples": encoded, "append": False, "config": "{}", "bank": BANK} | fields
    job = await jobs.submit(user_key, Submission(**given), 100)  # type: ignore[arg-type]
    assert job is not None
    return job


async def claimed(jobs: JobStore, job_id: JobId, lease_s: float = LEASE_S) -> Lease:
    lease = await jobs.claim(job_id, lease_s)
    assert lease is not None
    return lease


async def state(jobs: JobStore, job_id: JobId) -> JobState:
    job = await jobs.job(job_id)
    return job.state


def put_of(user: str, text: str, snapshot: Snapshot) -> Change:
    """A change that lets one item be all that a user has."""
    before = snapshot.profile
    kept = {"adapter": before.adapter, "signature": before.signature} if before else {}
    updated_ms = before.updated_ms + 1 if before else 1
    profile = Profile(user, 1, updated_ms, EMBEDDER, np.ones(4, "f4") / 2, **kept)  # type: ignore[arg-type]
    return Change(profile, {"it": StoredItem(0, {"text": text})}, {}, ())


@dataclass
class WorkerSteps:
    """A worker that can be stopped between any two of its steps."""

    parts: StoreParts
    bank: str = BANK
    taken: JobId | None = None  # a job that the queue gave it
    lease: Lease | None = None  # a job that it has claimed
    signing: str | None = None  # a user whose signature it was asked for

    async def take(self) -> None:
        self.taken = await self.parts.jobs.next_job(self.bank, 0.001)

    async def claim(self) -> None:
        if self.taken is not None:
            job, self.taken = self.taken, None
            self.lease = await self.parts.jobs.claim(job, LEASE_S)

    async def reject(self) -> bool:
        return await self.parts.jobs.end(self.lease, Trained(JobState.REJECTED, 1.0, 1.0))

    async def promote(self) -> str | None:
        """End the claimed job with an adapter; the adapter's id, if it was written."""
        key, raw = self.lease.job.id.user_key, f"adapter {next(_numbers)}".encode()
        recipe = RECIPE.replace(BANK, self.bank)
        stored = StoredAdapter(f"id{next(_numbers)}", recipe, hashlib.sha256(raw).hexdigest(), raw)
        snapshot = await self.parts.profiles.read(key)
        if snapshot.profile is None:
            return None
        noted = replace(snapshot.profile, adapter=AdapterNote(stored.id, recipe, len(raw), 1))
        trained = Trained(JobState.SUCCEEDED, 2.0, 1.0)
        done = await self.parts.jobs.promote(self.lease, trained, noted, snapshot.version, stored)
        return stored.id if done else None

    async def take_signing(self) -> None:
        self.signing = await self.parts.signing.take(0.001)

    async def sign(self) -> None:
        assert self.signing is not None
        await self.parts.signing.count_attempt(self.signing)
        snapshot = await self.parts.profiles.read(self.signing)
        if snapshot.profile is not None:
            made = StoredSignature(Signature(BANK, 1, np.ones(2, "f4")), snapshot.profile.updated_ms)
            change = Change(replace(snapshot.profile, signature=made), {}, {}, ())
            await self.parts.profiles.commit(self.signing, snapshot.version, change, snapshot.epoch)
        await self.parts.signing.remove(self.signing)
        self.signing = None
