"""Histories indexed for prompts, kept while they are unchanged and in use."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from bank.items.retrieval import ItemIndex

KEPT_S = 300.0
"""How long a history stays in memory after its last use."""

Version = tuple[int, int, bytes]


@dataclass(slots=True)
class _Kept:
    version: Version
    index: ItemIndex
    expiry: asyncio.TimerHandle


class IndexCache:
    """One index per user; the least recently used go first. Belongs to one event loop.

    Args:
        max_bytes: most memory for all of them.
        kept_s: how long each stays after its last use.
    """

    def __init__(self, max_bytes: int, kept_s: float = KEPT_S) -> None:
        self._max_bytes = max_bytes
        self._kept_s = kept_s
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self.size_bytes = 0
        """Memory in use."""

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
