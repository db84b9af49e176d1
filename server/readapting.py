"""After a change of bank: user adapters of the old one are trained again, from the samples that are kept.

Users are served merged meanwhile. Each is taken off the list of the old bank once their job is accepted, so that an
interrupted run goes on where it stopped; the job's idempotency key keeps what falls between the two from being done
twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from adapters.recipe import parse_recipe
from bank.manifest import BankManifest
from server.schemas import MAX_SAMPLES
from server.store.jobs import JobStore, Submission
from server.store.profiles import ProfileStore
from server.store.samples import default_config, encode_config

PAUSE_S = 0.5


@dataclass(slots=True)
class Counts:
    """What became of the users on the list.

    Attributes:
        asked: a job was made for them.
        settled: they need none: erased, adapted since, or without samples.
        waiting: their profile was made with another embedder; a request of theirs remakes it, and the next run sees it.
    """

    asked: int = 0
    settled: int = 0
    waiting: int = 0


class Readapting:
    """Makes jobs for users whose adapter is stale.

    Args:
        jobs: where jobs and samples are.
        profiles: where users are.
        manifest: of the bank that is served now.
        at_a_time: most jobs that may be open while another is made.
    """

    def __init__(self, jobs: JobStore, profiles: ProfileStore, manifest: BankManifest, at_a_time: int) -> None:
        self._jobs = jobs
        self._profiles = profiles
        self._manifest = manifest
        self._at_a_time = at_a_time

    async def stale(self) -> dict[str, int]:
        """Old banks, with how many users of each are on the list."""
        counts = await self._jobs.adapted()
        return {bank: count for bank, count in counts.items() if bank != self._manifest.short and count}

    async def run(self, told: Callable[[Counts], None] = lambda counts: None) -> Counts:
        """Go through the lists of all old banks; `told` hears of every user."""
        counts = Counts()
        for bank in await self.stale():
            async for user_key in self._jobs.adapted_users(bank):
                await self._user(user_key, bank, counts)
                told(counts)
        return counts

    async def _user(self, user_key: str, bank: str, counts: Counts) -> None:
        profile = await self._profiles.load(user_key)
        stale = (
            profile is not None and profile.adapter is not None and parse_recipe(profile.adapter.recipe).bank == bank
        )
        if profile is None or not stale or not await self._jobs.samples(user_key):
            counts.settled += 1
        elif profile.embedder != self._manifest.embedder.id:
            counts.waiting += 1
            return
        else:
            await self._room()
            config = encode_config(default_config(self._manifest.room, self._manifest.common))
            kept = Submission([], True, config, f"readapt to {self._manifest.fingerprint}")
            await self._jobs.submit(user_key, kept, MAX_SAMPLES)
            counts.asked += 1
        await self._jobs.forget_adapted(user_key, bank)

    async def _room(self) -> None:
        """Wait until few enough jobs are open."""
        while True:
            if await self._jobs.open_jobs() < self._at_a_time:
                return
            await asyncio.sleep(PAUSE_S)
