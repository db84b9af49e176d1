"""After a change of bank: user adapters of the old bank are trained again, from the stored samples.

Users are served merged meanwhile. Each is on the list of the old bank until an adapter of another bank is promoted, so
an interrupted run can simply be started again: the same samples for the same bank are the same job, as long as it is
waiting, running or succeeded. Users whom another bank serves, since their tenant names it, are left alone.
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
    """How many users on the list met which end.

    Attributes:
        queued: have a job, made now or by an earlier run.
        settled: need none: erased, adapted since, without samples, or served by another bank.
        waiting: have a profile from another embedder; their next request remakes it, for the next run to see.
    """

    queued: int = 0
    settled: int = 0
    waiting: int = 0


class ServedBanks:
    """Which bank serves whom, where tenants name banks.

    Tenants that name none have the bank `own`; `tenant` is the one whose users were stored before there were keys.
    """

    def __init__(self, ring: KeyRing, own: str, users: Tenants, tenant: str) -> None:
        tenants = {tenant, *(key.tenant for key in ring.keys)}
        self._banks = {name: ring.banks.get(name, own) for name in tenants}
        self._users = users

    def of(self, user_key: str, user_id: str) -> str:
        """A user's bank; empty for a user of no tenant that is known, such as by another secret."""
        for tenant, bank in self._banks.items():
            if self._users.users(tenant).key(user_id) == user_key:
                return bank
        return ""


class Readapting:
    """Makes jobs for users whose adapter is stale: of another bank than `manifest`, the one that is served now.

    At most `at_a_time` jobs may be open. Without `served` this bank serves everybody.
    """

    def __init__(
        self,
        jobs: JobStore,
        adapters: AdapterStore,
        profiles: ProfileStore,
        *,
        manifest: BankManifest,
        at_a_time: int,
        budget: JobBudget,
        served: ServedBanks | None = None,
    ) -> None:
        self._jobs = jobs
        self._adapters = adapters
        self._profiles = profiles
        self._manifest = manifest
        self._at_a_time = at_a_time
        self._budget = budget
        self._served = served

    async def stale(self) -> dict[str, int]:
        """Other banks, with how many users of each are on the list."""
        adapted = await self._adapters.adapted()
        return {bank: count for bank, count in adapted.items() if bank != self._manifest.short}

    async def run(self, on_user: Callable[[ReadaptTally], None] = lambda tally: None) -> ReadaptTally:
        """Work through the lists of all other banks; BankError where this one leaves users no rank to adapt with."""
        if not self._manifest.room:
            raise BankError(
                f"bank {self._manifest.short} leaves users no rank: their adapters cannot be trained again. Build it "
                "with --user-rank above 0"
            )
        tally = ReadaptTally()
        for bank in await self.stale():
            async for user_key in self._adapters.adapted_users(bank):
                await self._user(user_key, bank, tally)
                on_user(tally)
        return tally

    async def _user(self, user_key: str, bank: str, tally: ReadaptTally) -> None:
        epoch = await self._profiles.epoch(user_key)
        profile = await self._profiles.load(user_key)
        now = bank_of(profile.adapter.recipe) if profile and profile.adapter else ""
        if profile is not None and not self._serves(user_key, profile.user_id):
            tally.settled += 1  # stays on the list, for the bank that does serve them
        elif profile is None or now != bank or not await self._jobs.samples(user_key):
            tally.settled += 1
            await self._adapters.forget_adapted(user_key, but=now if now != bank else "")
        elif profile.seen_by(self._manifest.embedder.id) is None:
            tally.waiting += 1
        else:
            await self._room()
            usual = default_config(self._manifest.room, self._manifest.common)
            config = encode_config(replace(usual, **asdict(self._budget)))
            kept = Submission([], True, config, bank=self._manifest.short, epoch=epoch, background=True)
            with suppress(UserErased):
                await self._jobs.submit(user_key, kept, MAX_SAMPLES)
            tally.queued += 1

    def _serves(self, user_key: str, user_id: str) -> bool:
        return self._served is None or self._served.of(user_key, user_id) == self._manifest.short

    async def _room(self) -> None:
        """Wait until few enough jobs are open."""
        while True:
            if (await self._jobs.backlog(self._manifest.short)).open < self._at_a_time:
                return
            await asyncio.sleep(PAUSE_S)
