"""After a change of bank: user adapters of the old bank are trained again, from the stored samples.

A user is on the list of the old bank until an adapter of another bank is promoted, so an interrupted run can simply be
started again: the same samples for the same bank are the same job while it is waiting, running or succeeded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

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

PAUSE_S = 0.5


@dataclass(slots=True)
class ReadaptTally:
    """How many users on the list met which end."""

    queued: int = 0  # have a job, made now or by an earlier run
    settled: int = 0  # need none: erased, adapted since, without samples, or served by another bank
    waiting: int = 0  # have a profile from another embedder; their next request remakes it, for the next run to see


@dataclass(frozen=True, slots=True)
class ServedBanks:
    """Which bank serves whom."""

    ring: KeyRing
    own: str  # of tenants that name none
    users: Tenants
    tenant: str  # whose users were stored before there were keys

    def of(self, user_key: str, user_id: str) -> str:
        """A user's bank; empty for a user of no tenant that is known, such as by another secret."""
        for tenant in {self.tenant, *(key.tenant for key in self.ring.keys)}:
            if self.users.users(tenant).key(user_id) == user_key:
                return self.ring.banks.get(tenant, self.own)
        return ""


@dataclass(frozen=True, slots=True)
class Readapting:
    """Makes jobs for users whose adapter is of another bank than `manifest`, the one that is served now.

    At most `at_a_time` jobs may be open. Without `served` this bank serves everybody; whom another bank serves is left
    alone.
    """

    jobs: JobStore
    adapters: AdapterStore
    profiles: ProfileStore
    manifest: BankManifest
    at_a_time: int
    budget: JobBudget
    served: ServedBanks | None = None

    async def run(self, on_user: Callable[[ReadaptTally, int], None] = lambda tally, of: None) -> ReadaptTally:
        """Work through the lists of all other banks; `on_user` is told of how many users the tally will be.

        Raises BankError where this bank leaves users no rank to adapt with.
        """
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
                on_user(tally, sum(stale.values()))
        return tally

    async def _user(self, user_key: str, bank: str, tally: ReadaptTally) -> None:
        epoch = await self.profiles.epoch(user_key)
        profile = await self.profiles.load(user_key)
        now = bank_of(profile.adapter.recipe) if profile and profile.adapter else ""
        if profile and self.served and self.served.of(user_key, profile.user_id) != self.manifest.short:
            tally.settled += 1  # stays on the list, for the bank that does serve them
        elif profile is None or now != bank or not await self.jobs.samples(user_key):
            tally.settled += 1
            await self.adapters.remove_adapted(user_key, except_bank=now if now != bank else "")
        elif profile.with_embedder(self.manifest.embedder.id) is None:
            tally.waiting += 1
        else:
            while (await self.jobs.backlog(self.manifest.short)).open >= self.at_a_time:  # noqa: ASYNC110 - no event
                await asyncio.sleep(PAUSE_S)
            usual = default_config(self.manifest.room, self.manifest.common)
            config = encode_config(replace(usual, **asdict(self.budget)))
            kept = Submission([], True, config, bank=self.manifest.short, epoch=epoch, background=True)
            with suppress(UserErased):
                await self.jobs.submit(user_key, kept, MAX_SAMPLES)
            tally.queued += 1
