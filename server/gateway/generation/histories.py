"""Users' histories, indexed for prompts: kept while they are unchanged and in use.

Indexing takes the interpreter from the event loop, up to a second for a long history. So one is made at a time, callers
take turns in lines that are bounded, and a request that waits too long goes without.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from bank.items.profile import Item
from bank.items.retrieval import ItemIndex
from bank.items.tasks import Task
from server.gateway.access.shares import FairQueue, Shares
from server.store.profiles import Profile, StoredItem
from server.store.tenants.user_key import User

KEPT_S = 300.0
"""How long a history stays in memory after its last use."""
MOST_WAITING = 16
"""Longest line of each caller."""

Version = tuple[int, int, bytes]


@dataclass(frozen=True, slots=True)
class _Kept:
    version: Version
    index: ItemIndex
    expiry: asyncio.TimerHandle


class IndexCache:
    """One index per user; the least recently used go first. Belongs to one event loop."""

    def __init__(self, max_bytes: int, kept_s: float = KEPT_S) -> None:
        self.size_bytes = 0
        self._max_bytes = max_bytes
        self._kept_s = kept_s
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def get(self, user_key: str, version: Version) -> ItemIndex | None:
        """The index of this version of a user's history; one of any other version is dropped."""
        kept = self.drop(user_key)
        if kept is None or kept.version != version:
            return None
        self.put(user_key, version, kept.index)
        return kept.index

    def put(self, user_key: str, version: Version, index: ItemIndex) -> None:
        """Keep an index, unless it alone exceeds `max_bytes`."""
        self.drop(user_key)
        if index.size_bytes > self._max_bytes:
            return
        expiry = asyncio.get_running_loop().call_later(self._kept_s, self.drop, user_key)
        self._kept[user_key] = _Kept(version, index, expiry)
        self.size_bytes += index.size_bytes
        while self.size_bytes > self._max_bytes:
            self.drop(next(iter(self._kept)))

    def drop(self, user_key: str) -> _Kept | None:
        """Forget a user's index, if there is one."""
        kept = self._kept.pop(user_key, None)
        if kept is not None:
            kept.expiry.cancel()
            self.size_bytes -= kept.index.size_bytes
        return kept


@dataclass(frozen=True, slots=True, eq=False)
class _Build:
    """An index in the making; `begun` is done once its turn has come."""

    caller: str
    begun: asyncio.Future[None]
    task: asyncio.Task[ItemIndex]


class HistoryIndexer:
    """Indexes histories, whose items `read` reads. Belongs to one event loop.

    A build stays in the line when those who asked for it have left: it is ready for their next request.
    """

    def __init__(
        self, read: Callable[[User], Awaitable[Mapping[str, StoredItem]]], task: Task, cache: IndexCache
    ) -> None:
        self._read = read
        self._task = task
        self._cache = cache
        self._builds: dict[tuple[str, Version], _Build] = {}
        self._line = FairQueue(Shares(lambda: 1))

    async def index(
        self, user: User, profile: Profile, caller: str, patience_s: float
    ) -> tuple[ItemIndex | None, float]:
        """A user's items, ready to be searched, and how long their turn was waited for; None if it did not come.

        `patience_s` is the longest wait for the turn in the caller's line; what has begun is waited for to its end.
        """
        version = (profile.updated_ms, profile.items, profile.embedding.tobytes())
        if (kept := self._cache.get(user.key, version)) is not None:
            return kept, 0.0
        build = self._builds.get((user.key, version)) or self._begin(user, version, caller)
        if build is None:
            return None, 0.0
        start_s = time.monotonic()
        await asyncio.wait((build.begun,), timeout=patience_s)
        waited_s = time.monotonic() - start_s
        return (await asyncio.shield(build.task) if build.begun.done() else None), waited_s

    def _begin(self, user: User, version: Version, caller: str) -> _Build | None:
        """Join the caller's line, unless it is full."""
        if sum(build.caller == caller and not build.begun.done() for build in self._builds.values()) >= MOST_WAITING:
            return None
        begun = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._build(user, version, caller, begun))
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be left to be told
        build = self._builds[user.key, version] = _Build(caller, begun, task)
        return build

    async def _build(self, user: User, version: Version, caller: str, begun: asyncio.Future[None]) -> ItemIndex:
        try:
            async with self._line.held(caller):
                begun.set_result(None)
                items = [Item(name, item.fields) for name, item in (await self._read(user)).items()]
                index = await asyncio.to_thread(ItemIndex, self._task, items)
            self._cache.put(user.key, version, index)
            return index
        finally:
            del self._builds[user.key, version]
