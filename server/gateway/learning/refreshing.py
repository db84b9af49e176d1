"""Adapters that keep themselves fresh: people are adapted again after so many texts that they sent instead of answers.

Such a job comes after what clients asked for, and counts as a job of the key that sent the last text. It is judged by
the texts that the served adapter has not seen.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from functools import partial

from adapters.recipe import bank_of
from adapters.training.adapt_config import default_config
from bank.manifest import BankManifest
from server.errors import ApiError
from server.gateway.access.keys import Caller
from server.gateway.access.limiter import Limiter
from server.gateway.access.quotas import Quotas
from server.settings import Settings
from server.store.jobs import Job, Submission
from server.store.opening import Stores
from server.store.samples import MAX_SAMPLES, JobBudget, encode_config
from server.store.tenants.access_keys import Scope
from server.store.tenants.holdings import Held
from server.store.tenants.user_key import User

log = logging.getLogger("mta.gateway")

_HOUR_MS = 3600 * 1000


@dataclass
class Refreshing:
    stores: Stores
    quotas: Quotas
    limiter: Limiter
    manifest: BankManifest
    budget: JobBudget
    settings: Settings

    async def refresh_if_due(self, user: User, caller: Caller, epoch: str) -> Job | None:
        """Create and return a job if the user sent enough new texts and the caller's key may adapt.

        A lack of the store, or of the key's jobs, is logged: the next feedback tries again.
        """
        after = self.settings.refresh_samples if caller.policy.refresh is None else caller.policy.refresh
        if not after or not self.manifest.room or Scope.ADAPT not in caller.scopes:
            return None
        try:
            return await self._refresh(user, caller, after, epoch)
        except ApiError as error:
            log.warning("a user was not adapted again: %s", error.explained)
            return None

    async def _refresh(self, user: User, caller: Caller, after: int, epoch: str) -> Job | None:
        kept = await self.stores.adapters.kept(user.key)
        if kept.profile is None:
            return None
        learned_ms = await self.stores.feedback.learned_ms(user.key)
        if len(learned_ms) < after:
            return None
        adapter, seen_ms = kept.profile.adapter, 0
        jobs = await self.stores.jobs.jobs(user.key)
        if adapter and bank_of(adapter.recipe) == self.manifest.short:  # texts from while it was trained are new to it
            seen_ms = next((job.started_ms for job in jobs if job.adapter == adapter.id), adapter.created_ms)
            seen_ms = max(seen_ms, kept.chosen_ms)  # who went back to an older one does not want earlier texts again
        if sum(at_ms > seen_ms for at_ms in learned_ms) < after:
            return None
        now_ms = time.time_ns() // 1_000_000
        if jobs and (not jobs[-1].state.ended or now_ms < jobs[-1].created_ms + self.settings.refresh_hours * _HOUR_MS):
            return None
        config = encode_config(default_config(self.manifest.room, **asdict(self.budget)))
        bank, tenant = self.manifest.short, user.tenant
        submission = Submission([], True, config, bank=bank, epoch=epoch, tenant=tenant, background=True)
        with self.quotas.admit(user, lambda: Held(adapters=adapter is None)):
            submit = partial(self.stores.jobs.submit, user.key, submission, MAX_SAMPLES)
            return await self.limiter.take_job(caller, user.key, submit)
