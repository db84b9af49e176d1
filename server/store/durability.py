"""How durable a store's writes are, how full it is, what calls take, and how erased data leaves the disk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

LOOK_S = 10.0
"""How often each gateway checks whether the file is due to be rewritten."""


class Durability(StrEnum):
    """How a write is known to be on disk before it is acknowledged."""

    ALWAYS = "appendfsync always"
    WAITAOF = "WAITAOF after each write"
    NONE = "none"
    EVICTS = "none: keys are evicted"

    @property
    def lasts(self) -> bool:
        """Whether what was acknowledged stays."""
        return self not in (Durability.NONE, Durability.EVICTS)


FULL_SHARE = 0.99
"""From where on a store counts as full: the next write may need more than is left."""


@dataclass(frozen=True, slots=True)
class Memory:
    """A store's memory; of several servers, the fullest one's. Beyond `most_bytes` it refuses to store anything; 0 if
    nobody said."""

    used_bytes: int
    most_bytes: int

    @property
    def share(self) -> float:
        """How much of it is taken; 0 where there is no maximum."""
        return self.used_bytes / self.most_bytes if self.most_bytes else 0.0

    @property
    def full(self) -> bool:
        """Whether new writes are refused, or are about to be."""
        return self.share >= FULL_SHARE


Timed = Callable[[str, float, bool], None]
"""Gets what a call took: `write` or `command`, in seconds, and whether the store could not be used."""


def untimed(kind: str, seconds: float, failed: bool) -> None:
    """Measures nothing."""


Span = Callable[[str], AbstractContextManager[object]]
"""Makes a block a part of the trace that it runs in, as `server.watching.tracing.Tracing.span` does; or
`contextlib.nullcontext`."""


class CheckedStore(Protocol):
    """A store whose state can be checked."""

    @property
    def durability(self) -> Durability:
        """What `check` last found."""

    @property
    def unserved(self) -> str | None:
        """Who cannot be served while most can, in a sentence, as `check` last found; None if nobody."""

    @property
    def memory(self) -> Memory | None:
        """What `check` last found; None if the store does not say."""

    async def check(self) -> Durability:
        """Reach the store and find out how its writes become durable.

        Raises:
            Unavailable: when it cannot be reached, or may lose what it acknowledges although that is forbidden.
        """


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A requested rewrite of the store's file: by when to erase what it must leave out, and by when that is gone from
    the file. Unix time in milliseconds by the store's clock."""

    erase_by_ms: int
    rewritten_by_ms: int


class ForgetsOnDisk(Protocol):
    """The store's file, or files, which holds erased data until it is rewritten."""

    async def request_rewrite(self, user_key: str) -> Rewrite:
        """Request a rewrite of the file that leaves out what is about to be erased of a user.

        Raises:
            Unavailable: when the store cannot be used; then the caller should erase nothing yet.
        """

    async def overdue_s(self) -> float:
        """For how long a rewrite that was promised should have been done; 0 if none is late."""

    async def look(self) -> None:
        """Settle a rewrite that has ended and begin one that is due. Only one of all gateways does so."""
