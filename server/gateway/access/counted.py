"""A request that is counted: what it was given of what is limited, and what it has used."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.gateway.access.running import Seat
from server.store.tenants.rates import Rate


@dataclass(frozen=True, slots=True)
class Use:
    """Some of what a rate allows."""

    rate: Rate
    amount: int


@dataclass(frozen=True, slots=True)
class Taken:
    """What a request has been given."""

    uses: Sequence[Use]
    seat: Seat


class Counted:
    """A request that is counted: made by `Limiter`.

    Attributes:
        tokens: how many it used; None if nobody can say, and the estimate counts.
    """

    def __init__(self) -> None:
        self.tokens: int | None = 0
        self.allowed: asyncio.Task[Taken] | None = None
        self.shown: asyncio.Task[dict[str, str]] | None = None

    async def let_in(self) -> None:
        """Return once it is known to be within all limits.

        Raises:
            TooMany: when it is not.
        """
        if self.allowed:
            await asyncio.shield(self.allowed)  # what it uses must be known, even if the client leaves now

    async def headers(self) -> Mapping[str, str]:
        """OpenAI's headers that say what is left; empty where nothing is limited."""
        return await self.shown if self.shown else {}
