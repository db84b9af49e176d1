"""Reads all keys of the store for a copy, and writes them again (names: `server/store/redis/keys.py`).

A copy reads over an ordinary connection. It needs neither a fork nor a file of the server, so rewrites of the
append-only file go on meanwhile. One script reads all keys of a user: each user is copied as of one moment.

While a restore is unfinished the store holds `keys.RESTORING`: processes refuse to use it (`RedisConnection.check`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import TypeVar

from adapters.errors import MtaError
from server.errors import Unavailable
from server.store.base import Store
from server.store.jobs import KEPT_JOBS
from server.store.redis import keys
from server.store.redis.scripts import script
from server.store.redis.servers.base import WRITE_TIMEOUT_S, StoreServer
from server.store.redis.servers.cluster import SLOTS
from server.store.redis.servers.connection import RedisConnection

T = TypeVar("T")

AT_ONCE = 4  # number of users that are read at once; more would delay other commands
WRITTEN_AT_ONCE = 32
SETTLE_S = 6.0  # longest time until running gateways have noticed an unfinished restore

Entry = list[tuple[str, int, bytes]]
"""Keys of one moment, all of a user or one that users share: name, expiry (Unix time, ms; 0: never) and DUMP."""

_DUMP = script("backup/dump")
_RESTORE = script("backup/restore")
_MARK, _UNMARK = script("backup/mark"), script("backup/unmark")


class StoreCopying(Store):
    """Copies and restores a store."""

    def __init__(self, connection: RedisConnection) -> None:
        super().__init__(connection)
        self.version = self.secret = ""  # of the store that was copied: its server's, and `in` of `keys.SECRET`

    async def entries(self, progress: Callable[[int, int], None]) -> AsyncIterator[Entry]:
        """Yield all users, then the shared keys; `progress` gets the number of users done, and of all.

        Raises `MtaError` if servers were replaced or keys moved meanwhile, since keys may then be missing.
        """
        if await self._unfinished():
            raise MtaError("the store is only half restored: finish `mta restore` before a copy is made")
        secret = await self._connection.run(lambda redis: redis.hgetall(keys.SECRET))
        if b"from" in secret:
            raise MtaError("users move to another MTA_SECRET: make the copy when `mta secret rotate` has ended")
        self.secret = secret.get(b"in", b"").decode()
        servers, before = await self._primaries()
        users: set[str] = set()
        shared: set[str] = set()
        async for name in self._names(servers):
            user = keys.user_of(name)
            (users if user else shared).add(user or name)
        # Shared keys are read first: counts that leave a user's tally for the sums meanwhile are not counted twice.
        of_all = [await self._dump([name]) for name in shared]
        done = 0
        for batch in batches(users, AT_ONCE):
            for entry in filter(None, await asyncio.gather(*map(self._dump_user, batch))):
                yield entry
            progress(done := done + len(batch), len(users))
        if (await self._primaries())[1] != before:
            raise MtaError("servers of the store were replaced or restarted, or keys moved: make the copy again")
        if await self._connection.run(lambda redis: redis.hgetall(keys.SECRET)) != secret:
            raise MtaError("`mta secret rotate` has begun meanwhile: make the copy again when it has ended")
        for entry in filter(None, of_all):
            yield entry

    async def note_copy(self, began_s: float) -> None:
        """Note in the store that it has a complete copy from then."""
        await self._connection.run(lambda redis: redis.set(keys.COPIED, began_s))

    async def copied_s(self) -> float:  # when the newest copy began, s since 1970; 0 if there is none
        return float(await self._connection.run(lambda redis: redis.get(keys.COPIED)) or 0)

    async def users_with(self, kind: Callable[[str], str]) -> set[str]:
        """Return the users that have a key of this kind, but for those who come or go meanwhile."""
        servers, _ = await self._primaries()
        return {user async for name in self._names(servers, kind("*")) if (user := keys.user_of(name))}

    async def begin_restore(self, copy: str) -> bool:
        """Mark the store as incomplete, and return whether this copy was begun here before.

        Raises `MtaError` unless it was, or the store is empty.
        """
        self._connection.restoring = True
        await self._connection.check()
        if (begun := await self._unfinished()) == copy:
            return True
        if begun:
            raise MtaError(f"the store holds a part of another copy ({begun[:12]}): restore that, or empty the store")
        await self._check_empty()
        await self._connection.write(_MARK, (keys.RESTORING,), copy)
        await asyncio.sleep(SETTLE_S)
        try:
            await self._check_empty()  # a running gateway may have accepted something
        except MtaError:
            await self.end_restore()
            raise
        return False

    async def write(self, entries: Iterable[Entry]) -> AsyncIterator[int]:
        """Write entries, and yield the number written so far; raise `MtaError` if the server refuses one."""
        written = 0
        for batch in batches(entries, WRITTEN_AT_ONCE):
            await asyncio.gather(*map(self._restore, batch))
            yield (written := written + len(batch))

    async def end_restore(self) -> None:
        await self._connection.write(_UNMARK, (keys.RESTORING,))

    async def _dump_user(self, user_key: str) -> Entry:
        return await self._dump(keys.of_user(user_key), keys.job_prefix(user_key), KEPT_JOBS)

    async def _dump(self, names: Sequence[str], *arguments: object) -> Entry:
        dumped = await self._connection.evaluate(_DUMP, names, *arguments, timeout_s=WRITE_TIMEOUT_S)
        return [(dumped[i].decode(), *dumped[i + 1 : i + 3]) for i in range(0, len(dumped), 3)]

    async def _restore(self, entry: Entry) -> None:
        arguments = [part for _, *parts in entry for part in parts]
        refusal = await self._connection.write(_RESTORE, [name for name, *_ in entry], *arguments)
        if refusal:
            raise MtaError(f"the store does not take {entry[0][0]}: {refusal.decode()}. Is its server older?")

    async def _unfinished(self) -> str:
        return (await self._connection.run(lambda redis: redis.get(keys.RESTORING)) or b"").decode()

    async def _check_empty(self) -> None:
        async for name in self._names((await self._primaries())[0]):
            if name not in (keys.USED_KEYS, keys.SECRET):  # any gateway writes them
                raise MtaError(
                    f"the store is not empty, it holds {name}: restore to a new one, or stop gateways and workers and "
                    "empty this one (FLUSHALL)"
                )

    async def _names(self, servers: Iterable[StoreServer], pattern: str = "mta:*") -> AsyncIterator[str]:
        """Yield the names of all keys that belong to a copy; a name may come twice."""
        for server in servers:
            async for names in self._connection.names(server, pattern, 1000):
                for name in filter(keys.is_copied, names):
                    yield name

    async def _primaries(self) -> tuple[list[StoreServer], dict[str, tuple[object, ...]]]:
        """Return the servers that accept writes, and by id what changes if keys may have moved or cursors are void."""
        records, held = [], 0
        facts: dict[str, tuple[object, ...]] = {}
        for server in await self._connection.members():
            with suppress(Unavailable):  # a replica may be down
                info = await self._connection.send(server, "INFO")
                if info["role"] != "master":
                    continue
                slots, moving = [["0", str(SLOTS - 1)]], None
                if info.get("cluster_enabled"):
                    nodes = (await self._connection.send(server, "CLUSTER NODES")).values()
                    ((slots, moving),) = [(n["slots"], n["migrations"]) for n in nodes if "myself" in n["flags"]]
                if moving:
                    raise MtaError(f"keys are moving from or to {server.id}: try again once they have moved")
                records.append(server)
                facts[server.id] = (info["run_id"], slots)
                held += sum(int(slot[-1]) - int(slot[0]) + 1 for slot in slots)
                self.version = f"{info.get('server_name', 'redis')} {info.get('valkey_version', info['redis_version'])}"
        if held < SLOTS:
            raise Unavailable("some servers of the store cannot be reached", code="store_unavailable")
        return records, facts


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch
