"""Gateways and workers reduced to what they do with the store, to be run step by step and let die anywhere."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np

from bank.lookup.signature import Signature
from server.gateway.users.erasing import Erasing
from server.store.adapters import StoredAdapter
from server.store.jobs import Job, JobId, JobState, Lease, Submission, Trained
from server.store.profiles import AdapterNote, Change, Erasure, Profile, Snapshot, StoredItem, StoredSignature
from server.store.redis.access.api_keys import RedisAccessKeys
from server.store.redis.adapters import RedisAdapters
from server.store.redis.jobs import RedisJobs
from server.store.redis.profiles import RedisProfiles
from server.store.redis.queue import RedisSigning
from server.store.redis.servers.append_only_file import AppendOnlyFile
from server.store.tenants.user_key import UserKeys
from tests.support.faults import FaultyConnection

BANK = "9f2c41d0"
RECIPE = f"mta3:{BANK}:shared:c"
LEASE_S = 15.0
SECRET, TENANT = "a secret for tests only", "tests"
KEYS = UserKeys(SECRET, TENANT)
EMBEDDER = "3887c9b9af8fe702"
_numbers = itertools.count()


class StoreParts:
    """One process's stores, on a connection of its own that can be made to fail."""

    def __init__(self, url: str) -> None:
        self.connection = FaultyConnection(url)
        self.profiles, self.jobs = RedisProfiles(self.connection), RedisJobs(self.connection)
        self.keys = RedisAccessKeys(self.connection)
        self.adapters, self.signing = RedisAdapters(self.connection), RedisSigning(self.connection, BANK)

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

    async def erase(self, user: str) -> Erasure | None:
        """As the gateway does; there are no engines."""

        async def drop(user_key: str) -> None:
            pass

        erasing = Erasing(
            self.profiles,
            adapters=self.adapters,
            jobs=self.jobs,
            signing=lambda bank: RedisSigning(self.connection, bank),
            bank=BANK,
            log_file=AppendOnlyFile(self.connection),
            drop=drop,
        )
        return await erasing.erase(KEYS.user(user))


async def submitted(jobs: RedisJobs, user_key: str, *samples: str, **fields: object) -> Job:
    """A job, queued, of one sample where none is given; `fields` as of a `Submission`."""
    encoded = [sample.encode() for sample in samples or ("a",)]
    given = {"samples": encoded, "append": False, "config": "{}", "bank": BANK} | fields
    job = await jobs.submit(user_key, Submission(**given), 100)  # type: ignore[arg-type]
    assert job is not None
    return job


async def claimed(jobs: RedisJobs, job_id: JobId, lease_s: float = LEASE_S) -> Lease:
    """A lease of a job that wants a worker."""
    lease = await jobs.claim(job_id, lease_s)
    assert lease is not None
    return lease


async def state(jobs: RedisJobs, job_id: JobId) -> JobState:
    """Where a job is."""
    job = await jobs.job(job_id)
    assert job is not None
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
    """A worker that can be stopped between any two of its steps.

    Attributes:
        parts: its stores.
        taken: a job that the queue gave it.
        lease: a job that it has claimed.
        signing: a user whose signature it was asked for.
    """

    parts: StoreParts
    taken: JobId | None = None
    lease: Lease | None = None
    signing: str | None = None

    async def take(self) -> None:
        """Hear of a job."""
        self.taken = await self.parts.jobs.next_job(BANK, 0.001)

    async def claim(self) -> None:
        """Claim the job heard of."""
        if self.taken is not None:
            job, self.taken = self.taken, None
            self.lease = await self.parts.jobs.claim(job, LEASE_S)

    async def reject(self) -> bool:
        """End the claimed job without an adapter."""
        assert self.lease is not None
        return await self.parts.jobs.end(self.lease, Trained(JobState.REJECTED, 1.0, 1.0))

    async def promote(self) -> str | None:
        """End the claimed job with an adapter; the adapter's id, if it was written."""
        assert self.lease is not None
        key, raw = self.lease.job.id.user_key, f"adapter {next(_numbers)}".encode()
        stored = StoredAdapter(f"id{next(_numbers)}", RECIPE, hashlib.sha256(raw).hexdigest(), raw)
        snapshot = await self.parts.profiles.read(key)
        if snapshot.profile is None:
            return None
        noted = replace(snapshot.profile, adapter=AdapterNote(stored.id, RECIPE, len(raw), 1))
        trained = Trained(JobState.SUCCEEDED, 2.0, 1.0)
        done = await self.parts.jobs.promote(self.lease, trained, noted, snapshot.version, stored)
        return stored.id if done else None

    async def take_signing(self) -> None:
        """Hear of a user who wants a signature."""
        self.signing = await self.parts.signing.take(0.001)

    async def sign(self) -> None:
        """Make the signature that was asked for."""
        assert self.signing is not None
        await self.parts.signing.begin(self.signing)
        snapshot = await self.parts.profiles.read(self.signing)
        if snapshot.profile is not None:
            made = StoredSignature(Signature(BANK, 1, np.ones(2, "f4")), snapshot.profile.updated_ms)
            change = Change(replace(snapshot.profile, signature=made), {}, {}, ())
            await self.parts.profiles.commit(self.signing, snapshot.version, change, snapshot.epoch)
        await self.parts.signing.done(self.signing)
        self.signing = None
