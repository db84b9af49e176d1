"""How durable a store's writes are, how to find out, what calls take, and how erased data leaves the disk."""

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


Timed = Callable[[str, float, bool], None]
"""Gets what a call took: `write` or `command`, in seconds, and whether the store could not be used."""


def untimed(kind: str, seconds: float, failed: bool) -> None:
    """For whoever does not want to know."""


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

    async def check(self) -> Durability:
        """Reach the store and find out how its writes become durable.

        Raises:
            Unavailable: when it cannot be reached, or is not durable although that is required.
        """


@dataclass(frozen=True, slots=True)
class Asked:
    """A requested rewrite of the store's file.

    Attributes:
        erase_by_ms: by when to erase what the rewrite must leave out, by the store's clock; Unix time in milliseconds.
        rewritten_by_ms: by when it is gone from the file.
    """

    erase_by_ms: int
    rewritten_by_ms: int


class ForgetsOnDisk(Protocol):
    """The store's file, or files, which holds erased data until it is rewritten."""

    async def ask_for_rewrite(self, user_key: str) -> Asked:
        """Request a rewrite of the file that leaves out what is about to be erased of a user.

        Raises:
            Unavailable: when the store cannot be used; then the caller should erase nothing yet.
        """

    async def look(self) -> None:
        """Settle a rewrite that has ended and begin one that is due. Only one of all gateways does so."""
