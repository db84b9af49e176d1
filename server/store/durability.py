"""How durable a store's writes are, how that is found out, and how what was erased leaves the disk."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

LOOK_S = 10.0
"""How often each gateway looks whether the file is due to be rewritten."""


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


@dataclass(frozen=True, slots=True)
class Asked:
    """A rewrite of the store's file that was asked for.

    Attributes:
        erase_by_ms: what it shall leave out must be erased by then, by the store's clock; Unix time in milliseconds.
        rewritten_by_ms: by when the file has forgotten it.
    """

    erase_by_ms: int
    rewritten_by_ms: int


class ForgetsOnDisk(Protocol):
    """The store's file, which holds what was erased until it is rewritten."""

    async def ask_for_rewrite(self) -> Asked:
        """Have the file rewritten after what is about to be erased.

        Raises:
            Unavailable: when the store cannot be used; then nothing should be erased yet.
        """

    async def look(self) -> None:
        """Settle a rewrite that has ended and begin one that is due. Of all gateways one does it."""
