"""The exchange of MTA_SECRET: users move from their key by one secret to their key by the other, while requests run.

A move has four steps, each atomic and safe to repeat by several processes at once. The keys may lie on two servers.

1. The old key's epoch names the new one (`split_epoch` in `profiles.py`): from now on it refuses every write. Its data
   is read, with the mark of a write that has begun there.
2. The data is written to the new key, unless that was erased since before the first step. Now the user is there.
3. The shared sets and the queue get the new key.
4. The old key loses its data. Items and adapter stay for requests in progress; the epoch answers for the ids of jobs.

Until step 2 the user is read at the old key, and whoever wants to write finishes the move first. Where new users are
stored, and to which key users move, says the store, not the order of secrets that a process happens to have.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import methodcaller
from typing import TypeVar

from adapters.errors import MtaError
from adapters.recipe import bank_of
from server.errors import Unavailable, UserErased
from server.store.adapters import AdapterStore
from server.store.append_only_file import AppendOnlyFile
from server.store.backup.copying import AT_ONCE, StoreCopying, batches
from server.store.base import Store
from server.store.feedback import NO_PROFILE_S
from server.store.jobs import KEPT_JOBS
from server.store.profiles import ProfileStore
from server.store.queue import UserQueue
from server.store.redis import keys
from server.store.redis.scripts import script
from server.store.redis.servers.connection import RedisConnection
from server.store.tallies import TallyStore
from server.store.tenants.holdings import Held, HoldingStore
from server.store.tenants.user_key import User, UserKeys, check_values

T = TypeVar("T")

MOVED_S = 30 * 24 * 3600
ARRIVE_MS = 60_000  # a copy is written by then or not at all: far less than the tombstone of an erasure stays
GRACE_MS = 120_000  # requests in progress read items and adapter at the old key for this long, and erasures need it
MAX_TRIES = 8  # moves of a user who is erased again and again meanwhile
_IN, _FROM = "in", "from"

# KEYS of the scripts: `keys.of_user`, the last is `epoch`.

_LEAVE = script("rotation/leave")
_ARRIVE = script("rotation/arrive")
_CLEAR = script("rotation/clear")
_BEGIN = script("rotation/begin")


@dataclass(slots=True)
class Sweep:
    """Numbers of users that one pass over the store found under the second secret, or under neither."""

    moved: int = 0
    busy: int = 0  # they stay until their training ends
    unknown: int = 0  # of no known tenant, or with a record that this version cannot read


class Rotation(Store):
    """Finds users under the secrets in MTA_SECRET, and moves them. While there is one secret, `at` reads nothing."""

    def __init__(self, connection: RedisConnection, secret: str | None) -> None:
        super().__init__(connection)
        self.profiles = ProfileStore(connection)
        self._adapters = AdapterStore(connection)
        self._tallies = TallyStore(connection)
        self._holdings = HoldingStore(connection)
        self._copying = StoreCopying(connection)
        self._file = AppendOnlyFile(connection)
        self._secret = secret

    @cached_property
    def _known(self) -> list[str]:  # in the order of `User.keys`
        return check_values(self._secret)

    async def check(self) -> str:
        """Return the check value of the secret that keys new users; the first one of a store is recorded.

        Raises `MtaError` unless every user is found by these secrets.
        """
        used_in, used_from = await self._recorded()
        if not used_in:
            await self._connection.run(methodcaller("hsetnx", keys.SECRET, _IN, self._known[-1]))
            used_in, used_from = await self._recorded()
        if used_in not in self._known:
            raise MtaError(
                "MTA_SECRET is another than the one that keys the users in this store: nobody would be found. Set it "
                "back (`mta up`: the file `secret` in the data folder); to exchange it, set `NEW,OLD` and run "
                "`mta secret rotate`"
            )
        if used_from and used_from not in self._known:
            raise MtaError(
                "users still move away from the secret that MTA_SECRET no longer holds: set `NEW,OLD` again until "
                "`mta secret rotate` says that OLD can be taken away"
            )
        return used_in

    async def begin(self) -> None:
        """Make new users, and those who write, go to the first secret.

        Raises `MtaError` while users still move in the other direction.
        """
        if not await self._connection.write(_BEGIN, (keys.SECRET,), *self._known):
            raise MtaError("users still move from the first secret in MTA_SECRET to the second: swap the two")

    async def end(self) -> None:
        """Note that nobody is left under the second secret, and have what they left there leave the files."""
        await self._file.announce_expiry(GRACE_MS)
        await self._connection.run(methodcaller("hdel", keys.SECRET, _FROM))

    async def begin_write(self, user: User) -> str:
        """Return the user's epoch for a write that begins now, as `ProfileStore.begin` does."""
        return await self.at(user, lambda user: self.profiles.begin(user.key))

    async def at(self, user: User, act: Callable[[User], Awaitable[T]], *, writes: bool = True) -> T:
        """Call `act` with the user's key; once more if the user moves meanwhile, so it must be safe to repeat."""
        located = await self._locate(user, writes)
        try:
            done = await act(located)
        except UserErased:
            now = await self._locate(user, writes)
            if now.key == located.key:
                raise
            done = await act(now)
        if writes:  # a whole exchange may have passed since: a slow write of a new user would be left behind
            await self._locate(user, writes)
        return done

    async def _locate(self, user: User, writes: bool) -> User:
        """Return the user with the key to read; one who `writes` and may move has moved by then."""
        if not user.keys:
            return user
        stored, profile, _ = await self.profiles.find(user)
        if not writes:
            return stored
        used_in, used_from = await self._recorded()
        target = dict(zip(self._known, user.keys, strict=True)).get(used_in, user.keys[-1])
        if stored.key == target and profile:
            return stored
        if not used_from and profile is None:
            return replace(user, key=target)
        (source,) = set(user.keys) - {target}
        return replace(user, key=target) if await self.move(source, target, user.tenant) else stored

    async def _recorded(self) -> tuple[str, str]:
        """Return the check values of the secret that keys new users, and of the one that users leave."""
        stored = await self._connection.run(methodcaller("hmget", keys.SECRET, _IN, _FROM))
        used_in, used_from = (value.decode() if value else "" for value in stored)
        return used_in, used_from

    async def move(self, source: str, target: str, tenant: str) -> bool:
        """Move a user to another key; return False if a worker trains for the user: later, then."""
        leaving = (target, MOVED_S, ARRIVE_MS, keys.job_prefix(source), KEPT_JOBS)
        for _ in range(MAX_TRIES):
            before = await self.profiles.leave_mark(target)
            state, *left = await self._connection.write(_LEAVE, keys.of_user(source), *leaving)
            if state != b"left":
                return bool(state == b"moved")
            bank, *data = left
            if await self._connection.write(_ARRIVE, keys.of_user(target), before, keys.job_prefix(target), *data):
                break
        else:
            raise Unavailable("a user who was moved to another key was erased again and again", code="contention")
        await self._note(source, target, tenant, bank.decode())
        await self._connection.write(_CLEAR, keys.of_user(source), GRACE_MS, keys.job_prefix(source), KEPT_JOBS)
        return True

    async def _note(self, source: str, target: str, tenant: str, bank: str) -> None:  # bank of an open job, or empty
        """Put the new key where the old one stood in what users share, unless the user is erased meanwhile."""
        profile = await self.profiles.load(target)
        if profile and profile.adapter:
            await self._adapters.add_adapted(target, bank_of(profile.adapter.recipe))
            if await self._adapters.adapter_id(target) is None:
                await self._adapters.remove_adapted(target)
        await self._adapters.remove_adapted(source)
        await self._tallies.move(source, target, tenant)
        if await self._holdings.is_counted(tenant):
            _, held, _ = await self.profiles.measure(target)
            await self._holdings.note(tenant, {source: Held(), target: held})
        if bank:
            await UserQueue(self._connection, "jobs", bank).add(target, tenant=tenant)

    async def sweep(self, tenants: Sequence[UserKeys], on_users: Callable[[Sweep], None]) -> Sweep:
        """Move every user of these tenants who is stored under the second secret."""
        sweep = Sweep()
        for batch in batches(await self._copying.users_with(keys.profile), AT_ONCE):
            await asyncio.gather(*(self._visit(key, tenants, sweep) for key in batch))
            on_users(sweep)
        return sweep

    async def _visit(self, key: str, tenants: Sequence[UserKeys], sweep: Sweep) -> None:
        try:
            profile = await self.profiles.load(key)
        except Unavailable as error:
            if error.code != "store_corrupt":
                raise
            sweep.unknown += 1
            return
        if profile is None:
            return
        for users in tenants:
            first, second = users.keys(profile.user_id)
            if key == first:
                return
            if key == second:
                moved = await self.move(second, first, users.tenant)
                sweep.moved, sweep.busy = sweep.moved + moved, sweep.busy + (not moved)
                return
        sweep.unknown += 1

    async def let_nameless_expire(self) -> int:
        """Count feedback without a profile that says whose it is; also what an earlier version left expires then."""
        count = 0
        for key in await self._copying.users_with(keys.feedback):
            if await self.profiles.load(key) is None:
                count += 1
                await self._connection.run(methodcaller("expire", keys.feedback(key), NO_PROFILE_S, nx=True))
        return count
