"""Retrain user adapters from stored samples after a change of bank.

An interrupted run can be started again: a user stays on the old bank's list until an adapter of another bank is
promoted, and the same samples for the same bank give the same job if it is waiting, running or succeeded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

from adapters.recipe import bank_of
from adapters.training.adapt_config import default_config
from bank.errors import BankError
from bank.manifest import BankManifest
from server.errors import UserErased
from server.store.adapters import AdapterStore
from server.store.jobs import JobStore, Submission
from server.store.profiles import ProfileStore
from server.store.samples import MAX_SAMPLES, JobBudget, encode_config
from server.store.tenants.access_keys import KeyRing
from server.store.tenants.user_key import Tenants

POLL_S = 0.5  # interval between backlog checks


@dataclass(slots=True)
class ReadaptTally:
    queued: int = 0  # users with a job, from this run or an earlier one
    settled: int = 0  # users who need no job: erased, already adapted, without samples, or served by another bank
    waiting: int = 0  # users whose profile needs a new embedding: their next request makes it, and a later run the job


@dataclass(frozen=True, slots=True)
class ServedBanks:
    ring: KeyRing
    default_bank: str | None  # bank of tenants without a bank of their own; None if unknown
    users: Tenants
    tenant: str  # tenant of users stored before the first key

    def serving_bank(self, user_key: str, user_id: str) -> str | None:
        """Return a user's bank; None if unknown or if no known tenant has the user, e.g. because the secret differs."""
        for tenant in {self.tenant, *(key.tenant for key in self.ring.keys)}:
            if user_key in self.users.users(tenant).keys(user_id):
                return self.ring.banks.get(tenant, self.default_bank)
        return None


@dataclass(frozen=True, slots=True)
class Readapting:
    """Creates jobs for users whose adapter belongs to a bank other than `manifest`, the bank served now."""

    jobs: JobStore
    adapters: AdapterStore
    profiles: ProfileStore
    manifest: BankManifest
    at_a_time: int  # maximum number of open jobs
    budget: JobBudget
    served: ServedBanks | None = None  # tells which users to skip; without it this bank serves everybody

    async def run(self, progress: Callable[[int, int], None] = lambda done, of: None) -> ReadaptTally:
        """Process the users of all other banks; `progress` gets the numbers of users done and of all users."""
        if not self.manifest.room:
            raise BankError(
                f"bank {self.manifest.short} leaves users no rank: their adapters cannot be trained again. Build it "
                "with --user-rank above 0"
            )
        tally = ReadaptTally()
        adapted = await self.adapters.adapted()
        stale = {bank: count for bank, count in adapted.items() if bank != self.manifest.short}
        for bank in stale:
            async for user_key in self.adapters.adapted_users(bank):
                await self._user(user_key, bank, tally)
                progress(tally.queued + tally.settled + tally.waiting, sum(stale.values()))
        return tally

    async def _user(self, user_key: str, bank: str, tally: ReadaptTally) -> None:
        profile, _, epoch = await self.profiles.state(user_key)
        now = bank_of(profile.adapter.recipe) if profile and profile.adapter else ""
        if profile and self.served and self.served.serving_bank(user_key, profile.user_id) != self.manifest.short:
            tally.settled += 1  # keep the user on the list for their own bank
        elif profile is None or now != bank or not await self.jobs.has_samples(user_key):
            tally.settled += 1
            await self.adapters.remove_adapted(user_key, except_bank=now if now != bank else "")
        elif profile.with_embedder(self.manifest.embedder.id) is None:
            tally.waiting += 1
        else:
            while (await self.jobs.backlog(self.manifest.short)).open >= self.at_a_time:  # noqa: ASYNC110 - no event
                await asyncio.sleep(POLL_S)
            config = encode_config(default_config(self.manifest.room, **asdict(self.budget)))
            submission = Submission([], True, config, bank=self.manifest.short, epoch=epoch, background=True)
            with suppress(UserErased):
                await self.jobs.submit(user_key, submission, MAX_SAMPLES)
            tally.queued += 1
