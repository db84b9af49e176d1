"""State of a store's servers: durability of writes, and memory use. Does not import redis-py."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

FULL_SHARE = 0.99  # memory use from which a store counts as full: the next write may need more than is free


class Durability(StrEnum):
    """How a write is confirmed to be on disk before it is acknowledged."""

    ALWAYS = "appendfsync always"
    WAITAOF = "WAITAOF after each write"
    NONE = "none"
    EVICTS = "none: keys are evicted"

    @property
    def is_durable(self) -> bool:
        return self not in (Durability.NONE, Durability.EVICTS)


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory use of a store; with several servers, of the fullest one."""

    used_bytes: int
    max_bytes: int  # limit above which the server refuses writes; 0 if no limit is configured

    @property
    def share(self) -> float:
        return self.used_bytes / self.max_bytes if self.max_bytes else 0.0

    @property
    def full(self) -> bool:
        return self.share >= FULL_SHARE


class CheckedStore(Protocol):
    """A store, with the results of its last `check`."""

    durability: Durability
    memory: Memory | None  # None if the store does not report it

    @property
    def unserved(self) -> str | None:
        """Message about users who cannot be served while most can; None if all can."""

    async def check(self) -> Durability:
        """Connect to the store and determine how its writes become durable.

        Raises `Unavailable` if the store cannot be reached, or is not durable although the settings require it.
        """
