"""The store's port for signatures: who wants one. The signature itself lies in the profile record.

Asking is coalesced: whoever is waiting already is asked for once. What a worker that died had taken is found again by
`overdue`.
"""

from __future__ import annotations

from typing import Protocol


class SignQueue(Protocol):
    """User keys that want a signature for one bank. Every method raises `Unavailable` when the store cannot be used."""

    async def ask(self, user_key: str) -> None:
        """Have a worker make a user's signature."""

    async def take(self, worker: str, wait_s: float) -> str | None:
        """Wait for a user who wants one; they may be gone, or have it by now."""

    async def begin(self, user_key: str) -> int:
        """A worker begins to make it: the how-manieth time since it was last `done`, from 1."""

    async def done(self, user_key: str) -> None:
        """The user was seen to; whoever asks from here on is heard anew."""

    async def overdue(self) -> list[str]:
        """Announce again every user who should have been seen to by now; the ones announced."""

    async def withdraw(self, user_key: str) -> None:
        """Take a user who was erased out of the queue."""
