"""Users' histories, indexed for prompts: kept while they are unchanged and in use, and made one at a time.

Indexing takes the interpreter from the event loop, up to a second for a long history. So there is never more than one
under way, callers take turns in lines that are bounded, and who waits too long goes without.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

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


@dataclass(slots=True)
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
        kept = self._kept.get(user_key)
        if kept is None:
            return None
        if kept.version != version:
            self.drop(user_key)
            return None
        self._kept.move_to_end(user_key)
        kept.expiry.cancel()
        kept.expiry = self._expiry(user_key)
        return kept.index

    def put(self, user_key: str, version: Version, index: ItemIndex) -> None:
        """Keep an index, unless it alone exceeds `max_bytes`."""
        self.drop(user_key)
        if index.size_bytes > self._max_bytes:
            return
        self._kept[user_key] = _Kept(version, index, self._expiry(user_key))
        self.size_bytes += index.size_bytes
        while self.size_bytes > self._max_bytes:
            self.drop(next(iter(self._kept)))

    def drop(self, user_key: str) -> None:
        """Forget a user's index, if there is one."""
        kept = self._kept.pop(user_key, None)
        if kept is not None:
            kept.expiry.cancel()
            self.size_bytes -= kept.index.size_bytes

    def _expiry(self, user_key: str) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(self._kept_s, self.drop, user_key)


class HistoryReader(Protocol):
    """The part of `server.gateway.users.profiles.Profiles` that is needed."""

    async def items(self, user: User) -> Mapping[str, StoredItem]: ...


@dataclass(frozen=True, slots=True)
class FoundIndex:
    """A history that is ready to be searched, or None for want of time, and how long its turn was waited for."""

    index: ItemIndex | None
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Build:
    """An index in the making; `begun` is done once its turn has come."""

    begun: asyncio.Future[None]
    task: asyncio.Task[ItemIndex]


class HistoryIndexer:
    """Indexes histories. Belongs to one event loop.

    What is in the line stays there when those who asked for it have left: it is ready for their next request.
    """

    def __init__(self, profiles: HistoryReader, task: Task, cache: IndexCache) -> None:
        self._profiles = profiles
        self._task = task
        self._cache = cache
        self._builds: dict[tuple[str, Version], _Build] = {}
        self._waiting: Counter[str] = Counter()
        self._line = FairQueue(Shares(lambda: 1))

    async def index(self, user: User, profile: Profile, caller: str, patience_s: float) -> FoundIndex:
        """A user's items, ready to be searched, if they are at hand or their turn comes in time.

        `patience_s` is the longest wait for the turn in the caller's line; what has begun is waited for to its end.
        """
        version = (profile.updated_ms, profile.items, profile.embedding.tobytes())
        if (kept := self._cache.get(user.key, version)) is not None:
            return FoundIndex(kept)
        build = self._builds.get((user.key, version)) or self._begin(user, version, caller)
        if build is None:
            return FoundIndex(None)
        start_s = time.monotonic()
        await asyncio.wait((build.begun,), timeout=patience_s)
        waited_s = time.monotonic() - start_s
        return FoundIndex(await asyncio.shield(build.task) if build.begun.done() else None, waited_s)

    def _begin(self, user: User, version: Version, caller: str) -> _Build | None:
        """Join the caller's line, unless it is full."""
        begun = asyncio.get_running_loop().create_future()
        if self._line.try_acquire(caller, 1):
            begun.set_result(None)
        elif self._waiting[caller] >= MOST_WAITING:
            return None
        else:
            self._waiting[caller] += 1
        task = asyncio.create_task(self._build(user, version, caller, begun))
        build = self._builds[user.key, version] = _Build(begun, task)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be left to be told
        return build

    async def _build(self, user: User, version: Version, caller: str, begun: asyncio.Future[None]) -> ItemIndex:
        try:
            if not begun.done():
                if not self._line.try_acquire(caller, 1):  # it may have come free since
                    await self._line.wait(caller, 1, None, 0)
                self._waiting -= Counter((caller,))
                begun.set_result(None)
            try:
                stored = await self._profiles.items(user)
                items = [Item(name, item.fields) for name, item in stored.items()]
                index = await asyncio.to_thread(ItemIndex, self._task, items)
            finally:
                self._line.release(caller, 1)
            self._cache.put(user.key, version, index)
            return index
        finally:
            del self._builds[user.key, version]
