"""Histories that no index is at hand for: read and indexed one at a time, and waited for in lines that are bounded.

Indexing takes the interpreter from the event loop, up to a second for a long history. So there is never more than one
under way, callers take turns, and who waits too long goes without.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from bank.items.profile import Item
from bank.items.retrieval import ItemIndex
from bank.items.tasks import Task
from server.gateway.generation.index_cache import IndexCache, Version
from server.store.profiles import Profile, StoredItem
from server.store.tenants.user_key import User

MOST_WAITING = 16
"""Longest line of each caller."""


class Reads(Protocol):
    """The part of `server.gateway.users.profiles.Profiles` that is needed."""

    async def items(self, user: User) -> Mapping[str, StoredItem]: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Wanted:
    """A history in the line; `begun` gets the work once its turn has come."""

    user: User
    version: Version
    begun: asyncio.Future[asyncio.Task[ItemIndex]]


@dataclass(frozen=True, slots=True)
class Found:
    """A history that is ready to be searched, or None for want of time, and how long its turn was waited for."""

    index: ItemIndex | None
    waited_s: float = 0.0


class Indexing:
    """Indexes histories. Belongs to one event loop.

    What is in the line stays there when those who asked for it have left: it is ready for their next request.

    Args:
        profiles: where the histories are kept.
        task: how the bank reads items.
        cache: keeps what has been indexed.
    """

    def __init__(self, profiles: Reads, task: Task, cache: IndexCache) -> None:
        self._profiles = profiles
        self._task = task
        self._cache = cache
        self._wanted: dict[tuple[str, Version], _Wanted] = {}
        self._lines: OrderedDict[str, deque[_Wanted]] = OrderedDict()  # whose turn is next comes first; none is empty
        self._working = False

    async def index(self, user: User, profile: Profile, caller: str, patience_s: float) -> Found:
        """A user's items, ready to be searched, if they are at hand or their turn comes in time.

        Args:
            user: whose they are.
            profile: as found for this request.
            caller: in whose line it waits.
            patience_s: longest wait for the turn; what has begun is waited for to its end.

        Raises:
            Unavailable: when the store is down.
        """
        version = (profile.updated_ms, profile.items, profile.embedding.tobytes())
        if (kept := self._cache.get(user.key, version)) is not None:
            return Found(kept)
        wanted = self._wanted.get((user.key, version)) or self._line_up(_Wanted(user, version, _future()), caller)
        if wanted is None:
            return Found(None)
        start_s = time.monotonic()
        await asyncio.wait((wanted.begun,), timeout=patience_s)
        waited_s = time.monotonic() - start_s
        return Found(await asyncio.shield(wanted.begun.result()) if wanted.begun.done() else None, waited_s)

    def _line_up(self, wanted: _Wanted, caller: str) -> _Wanted | None:
        """Join the caller's line, unless it is full."""
        if self._working and len(self._lines.get(caller, ())) >= MOST_WAITING:
            return None
        self._wanted[wanted.user.key, wanted.version] = wanted
        self._lines.setdefault(caller, deque()).append(wanted)
        if not self._working:
            self._begin_next()
        return wanted

    def _begin_next(self) -> None:
        """Begin what comes next: each caller's first in turn."""
        self._working = bool(self._lines)
        if not self._lines:
            return
        caller, line = next(iter(self._lines.items()))
        wanted = line.popleft()
        self._lines.move_to_end(caller)
        if not line:
            del self._lines[caller]
        work = asyncio.create_task(self._work(wanted))
        work.add_done_callback(lambda _: self._end(wanted))
        wanted.begun.set_result(work)

    def _end(self, wanted: _Wanted) -> None:
        del self._wanted[wanted.user.key, wanted.version]
        work = wanted.begun.result()
        if not work.cancelled():
            work.exception()  # nobody may be left to be told
        self._begin_next()

    async def _work(self, wanted: _Wanted) -> ItemIndex:
        stored = await self._profiles.items(wanted.user)
        items = [Item(name, item.fields) for name, item in stored.items()]
        index = await asyncio.to_thread(ItemIndex, self._task, items)
        self._cache.put(wanted.user.key, wanted.version, index)
        return index


def _future() -> asyncio.Future[asyncio.Task[ItemIndex]]:
    return asyncio.get_running_loop().create_future()
