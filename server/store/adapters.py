"""The store's port for user adapters: what training made, and whose adapter is of which bank."""

from __future__ import annotations

import secrets
from base64 import b32encode
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from adapters.recipe import UserAdapterId


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A user adapter as it is kept.

    Attributes:
        id: as `new_adapter_id` made it.
        recipe: the recipe it was trained on.
        sha256: of `raw`, 64 hex digits.
        raw: what `adapters.user_adapter` encoded.
    """

    id: str
    recipe: str
    sha256: str
    raw: bytes


def new_adapter_id() -> str:
    """26 characters of base32: 128 random bits, the alphabet and the length that recipe names take."""
    return b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower()


class AdapterStore(Protocol):
    """Keeps user adapters. Every method raises `Unavailable` when the store cannot be used."""

    async def adapter(self, adapter_id: UserAdapterId) -> StoredAdapter | None:
        """An adapter, if its user still has it."""

    async def adapter_id(self, user_key: str) -> str | None:
        """The `id` of the adapter that a user has now."""

    async def lend(self, user_key: str, stored: StoredAdapter, ttl_s: int) -> None:
        """Keep an adapter that is nobody's for some seconds, to be served under its name."""

    async def adapted(self) -> dict[str, int]:
        """Banks (the 8 hex digits of recipes) that user adapters were trained on, with how many users of each."""

    def adapted_users(self, bank: str) -> AsyncIterator[str]:
        """The keys of users whose adapter was trained on a bank; some may have another, or none, by now."""

    async def forget_adapted(self, user_key: str, *, but: str = "") -> None:
        """Take a user off the lists of all banks but one."""
