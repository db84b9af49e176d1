"""Users and jobs put straight into a store, as a gateway of any version might have left them there."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import redis.asyncio as redis

from adapters.training.adapt_config import AdaptConfig
from bank.manifest import BankManifest
from server.store.jobs import Job, JobId, Submission
from server.store.profile_record import Profile, StoredItem
from server.store.profiles import Change
from server.store.samples import Sample, encode_config, encode_sample
from tests.support.store_parts import KEYS, StoreParts, stored

CONFIG = encode_config(AdaptConfig(steps=4, learning_rate=0.02))
SAMPLES = [encode_sample(Sample([{"role": "user", "content": f"question {n}"}], f"{n} yes yes yes")) for n in range(8)]
_numbers = itertools.count()


class Desk(StoreParts):
    """The stores, and users of one bank."""

    manifest: BankManifest

    async def user(self, *pairs: tuple[str, str]) -> str:
        """The key of a new user who has these items."""
        key = KEYS.key(f"user-{next(_numbers)}")
        embedding = np.eye(self.manifest.embedder.dim, dtype=np.float32)[0]
        profile = Profile("ada", len(pairs), 1, self.manifest.embedder.id, embedding)
        fields = [dict(zip(("input", "output"), pair, strict=True)) for pair in pairs]
        items = {str(n): StoredItem(n, item) for n, item in enumerate(fields)}
        await stored(self.profiles, key, Change(profile, items, {}, ()))
        return key

    async def submit(
        self, samples: Sequence[bytes] = SAMPLES, config: str = CONFIG, *, user: str = "", bank: str = ""
    ) -> JobId:
        """A job: of a new user, for the bank of the desk, where nothing else is said."""
        submission = Submission(samples, False, config, bank or self.manifest.short)
        job = await self.jobs.submit(user or await self.user(), submission, len(samples))
        assert job is not None
        return job.id

    async def job(self, job_id: JobId) -> Job:
        job = await self.jobs.job(job_id)
        assert job is not None
        return job


@asynccontextmanager
async def desk_at(url: str, manifest: BankManifest) -> AsyncIterator[Desk]:
    """At a store that holds nothing."""
    async with redis.from_url(url) as raw:
        await raw.flushall()
    async with Desk.opened(url) as desk:
        desk.manifest = manifest
        yield desk
