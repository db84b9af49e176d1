"""The store's port for signatures: which users need one. The signature itself is in the profile record.

Requests are coalesced: a user who is already waiting is queued once. `overdue` finds the users whom a worker had taken
when it died.
"""

from __future__ import annotations

from typing import Protocol


class SignQueue(Protocol):
    """Users who need a signature for one bank. Every method raises `Unavailable` when the store cannot be used."""

    async def ask(self, user_key: str) -> None:
        """Have a worker make a user's signature."""

    async def take(self, worker: str, wait_s: float) -> str | None:
        """Wait for a user who needs one; by now they may be gone, or have it."""

    async def begin(self, user_key: str) -> int:
        """Count a worker's attempt to make it; returns the number of attempts since `done`, from 1; 0 for a user who is
        no longer in the queue."""

    async def done(self, user_key: str) -> None:
        """Take a user out of the queue; a later `ask` queues them again."""

    async def overdue(self) -> list[str]:
        """Announce again, and return, every user who should have been dealt with by now."""

    async def withdraw(self, user_key: str) -> None:
        """Remove an erased user from the queue."""
