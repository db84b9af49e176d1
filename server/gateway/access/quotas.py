"""Quotas of tenants: what they hold is counted in the background, and a request beyond a quota is refused before it.

A gateway knows at once what its own requests will add, and within `COUNT_INTERVAL_S` of a tenant's first request what
others did. Tokens a day are counted with the other rates (`limiter.py`).
"""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from zlib import crc32

from server.gateway.access.keys import KnownKeys
from server.store.profile_record import decode_profile
from server.store.profiles import ProfileStore
from server.store.tenants.holdings import Held, HoldingStore
from server.store.tenants.rates import Quota, Rates, quota_exceeded
from server.store.tenants.user_key import Tenants, User

COUNT_INTERVAL_S = 1.0
COUNT_TURNS = 60  # counts until each tenant was counted that asked for nothing here: a thousand took 0.3 s
RECOUNT_CHECK_S = 5.0
RECOUNT_INTERVAL_S = 3600.0  # from the end of a recount to the next
_PAUSE_S = 0.1  # after each step of a recount
_LEASE_S = 60.0  # another gateway may begin anew if the one that recounts is gone for so long
_BATCH = 200  # people measured at once


@dataclass
class Quotas:
    store: HoldingStore
    profiles: ProfileStore
    rates: Rates
    keys: KnownKeys
    users: Tenants
    refused: Callable[[str], None]  # called with the reason of each refusal
    _used: dict[str, Held] = field(default_factory=dict)  # by tenant, with what waits to be counted
    _writing: dict[object, tuple[User, Held]] = field(default_factory=dict)  # what was admitted
    _waiting: dict[User, Held] = field(default_factory=dict)  # who is to be measured; what was admitted for them
    _asking: set[str] = field(default_factory=set)  # tenants that added something since the last count, or tried to
    _turn: int = 0

    @contextmanager
    def admit(self, user: User, wanted: Callable[[], Held]) -> Iterator[None]:
        """Count what is about to be added to a tenant's holdings, for the duration of a `with` block that writes it.

        Raises `QuotaExceeded`, but never for a request that makes room, which counts once it is measured.
        """
        if (quota := self.keys.quotas.get(user.tenant)) is None:
            yield
            return
        self._asking.add(user.tenant)
        used, more = self._used.setdefault(user.tenant, Held()), +wanted()
        for what, most in _exceeded(quota, used, more):
            self.refused("quota")
            raise quota_exceeded(user.tenant, what, used[what], most, more[what])
        used.update(more)
        self._writing[token := object()] = (user, more)
        try:
            yield
        finally:
            del self._writing[token]
            self.changed(user, more)

    def have_room(self, user: User, wanted: Held) -> bool:
        """Return whether `admit` would accept this now."""
        quota, used = self.keys.quotas.get(user.tenant, Quota()), self._used.get(user.tenant, Held())
        return not any(_exceeded(quota, used, wanted))

    def changed(self, user: User, admitted: Held | None = None) -> None:
        """Have a user measured soon, since their data has changed."""
        if user.tenant in self.keys.quotas:
            self._waiting[user] = waits = Held(self._waiting.pop(user, None))  # a new object, as `count` notices
            waits.update(admitted)

    def used(self) -> Iterator[tuple[str, str, float, int]]:
        """Yield for each quota its tenant, what it is of, how much is used, and the quota."""
        for tenant, used in self._used.items():
            for what, most in self.keys.quotas.get(tenant, Quota()).limits.items():
                yield tenant, what, used[what], most

    async def count(self) -> None:
        """Measure those who have changed, and read what all gateways have counted of who asks; of others in turn."""
        measured, held = dict(islice(self._waiting.items(), _BATCH)), defaultdict[str, dict[str, Held]](dict)
        trains = dict[User, bool]()
        for user in measured:
            for key in user.every_key:
                _, held[user.tenant][key], trained = await self.profiles.measure(key)
                trains[user] = trained or trains.get(user, False)
        await self._note(held)
        for user, admitted in measured.items():
            if self._waiting.get(user) is admitted:  # else they have changed meanwhile
                del self._waiting[user]
                if trains[user]:  # a job may end without an adapter
                    self.changed(user)
        self._turn = (self._turn + 1) % COUNT_TURNS
        quotas = self.keys.quotas
        in_turn = islice(quotas, self._turn, None, COUNT_TURNS)
        for tenant in quotas.keys() & self._asking.union(held, in_turn, quotas.keys() - self._used.keys()):
            self._asking.discard(tenant)
            self._used[tenant] = used = await self.store.count(tenant, quotas[tenant])
            for user, admitted in chain(self._waiting.items(), self._writing.values()):
                used.update(admitted if user.tenant == tenant else None)

    async def recount(self) -> None:
        """Measure everybody, once quotas have changed and then every hour; one gateway does so at a time."""
        tenants = [name for name, quota in self.keys.quotas.items() if quota.limits.keys() - {"tokens"}]
        lease, me = f"recounted/{crc32(repr(sorted(self.keys.quotas.items())).encode())}", secrets.token_hex(8)
        if not tenants or await self.rates.acquire(lease, [me], _LEASE_S, 1) is None:
            return
        async for tenant, user_keys in self.store.all_people(tenants):
            measured = defaultdict[str, dict[str, Held]](dict)
            for user_key in user_keys:
                record, held, _ = await self.profiles.measure(user_key)
                for owner in [tenant] if tenant else self._owners(user_key, record, tenants):
                    measured[owner][user_key] = held
            await self._note(measured)
            await self.rates.renew(lease, [me], _LEASE_S)
            await asyncio.sleep(_PAUSE_S)
        await self.rates.renew(lease, [me], RECOUNT_INTERVAL_S)

    def _owners(self, user_key: str, record: bytes, tenants: list[str]) -> list[str]:
        """Return which of the tenants a user with this record belongs to: one or none."""
        try:
            user_id = decode_profile(record).user_id
        except ValueError:  # damaged, or erased meanwhile
            return []
        return [tenant for tenant in tenants if user_key in self.users.users(tenant).keys(user_id)]

    async def _note(self, measured: Mapping[str, Mapping[str, Held]]) -> None:
        for tenant, people in measured.items():
            await self.store.note(tenant, people)


def _exceeded(quota: Quota, used: Held, more: Held) -> Iterator[tuple[str, int]]:
    """Yield the limits that `more` would exceed; what makes room exceeds none."""
    for what, most in quota.limits.items():
        if more[what] > 0 and used[what] + more[what] > most:
            yield what, most
