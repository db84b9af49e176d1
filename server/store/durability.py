"""How durable a store's writes are, and how that is found out."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol


class Durability(StrEnum):
    """How a write is known to be on disk before it is acknowledged."""

    ALWAYS = "appendfsync always"
    WAITAOF = "WAITAOF after each write"
    NONE = "none"


class CheckedStore(Protocol):
    """A store whose state can be asked for."""

    @property
    def durability(self) -> Durability:
        """What `check` last found."""

    async def check(self) -> Durability:
        """Reach the store and find out how its writes become durable.

        Raises:
            Unavailable: when it cannot be reached, or is not durable where that is required.
        """
