"""What can be said of a store: how durable its writes are, how full it is, what calls take, when its file forgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from server.errors import Unavailable

REWRITE_CHECK_S = 10.0  # how often each gateway checks whether the file is due to be rewritten
FULL_SHARE = 0.99  # from where on a store counts as full: the next write may need more than is left


class Durability(StrEnum):
    """How a write is known to be on disk before it is acknowledged."""

    ALWAYS = "appendfsync always"
    WAITAOF = "WAITAOF after each write"
    NONE = "none"
    EVICTS = "none: keys are evicted"

    @property
    def is_durable(self) -> bool:
        return self not in (Durability.NONE, Durability.EVICTS)


@dataclass(frozen=True, slots=True)
class Memory:
    """A store's memory; of several servers, the fullest one's."""

    used_bytes: int
    max_bytes: int  # beyond which it refuses to store anything; 0 if nobody said

    @property
    def share(self) -> float:
        return self.used_bytes / self.max_bytes if self.max_bytes else 0.0

    @property
    def full(self) -> bool:
        return self.share >= FULL_SHARE


Timed = Callable[[str, float, bool], None]
"""Gets what a call took: `write` or `command`, in seconds, and whether the store could not be used."""


def untimed(kind: str, seconds: float, failed: bool) -> None:
    """Measures nothing."""


Span = Callable[[str], AbstractContextManager[object]]
"""Makes a block a part of its trace (`server.watching.tracing.Tracing.span`), or is `contextlib.nullcontext`."""


class CheckedStore(Protocol):
    """A store, and what `check` last found of it."""

    durability: Durability
    memory: Memory | None  # None if the store does not say

    @property
    def unserved(self) -> str | None:
        """Who cannot be served while most can, in a sentence; None if nobody."""

    async def check(self) -> Durability:
        """Reach the store and find out how its writes become durable.

        Raises `Unavailable` when it cannot be reached, or may lose what it acknowledges although that is forbidden.
        """


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A requested rewrite of the store's file. Unix time by the store's clock."""

    erase_by_ms: int  # by when to erase what it must leave out
    rewritten_by_ms: int  # by when that is gone from the file


class RewritableFile(Protocol):
    """The store's file, or files, which holds erased data until it is rewritten (`AppendOnlyFile`)."""

    async def request_rewrite(self, user_key: str) -> Rewrite:
        """Request one that leaves out what is about to be erased of a user; raises `Unavailable`: erase nothing yet."""

    async def overdue_s(self) -> float:
        """For how long a rewrite that was promised should have been done; 0 if none is late."""

    async def rewrite_if_due(self) -> None:
        """Settle a rewrite that has ended and begin one that is due. Only one of all gateways does so."""


@contextmanager
def corrupt_if_undecodable() -> Iterator[None]:
    """Translate decoding errors: the store is corrupt, or a later version wrote to it (`store_corrupt`)."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable("the store holds a record that this version cannot read", code="store_corrupt") from error
