"""The store's port for user adapters: what training made, and which bank each user's adapter belongs to."""

from __future__ import annotations

import secrets
from base64 import b32encode
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from adapters.recipe import UserAdapterId


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A user adapter as it is kept: the recipe it was trained on, and the bytes that `adapters.user_adapter` encoded,
    with their SHA-256 in 64 hex digits."""

    id: str
    recipe: str
    sha256: str
    raw: bytes


def new_adapter_id() -> str:
    """26 characters of base32: 128 random bits, in the alphabet and length that recipe names take."""
    return b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower()


class AdapterStore(Protocol):
    """Keeps user adapters. Every method raises `Unavailable` when the store cannot be used."""

    async def adapter(self, adapter_id: UserAdapterId) -> StoredAdapter | None:
        """An adapter, if its user still has it."""

    async def adapter_id(self, user_key: str) -> str | None:
        """The `id` of the adapter that a user has now."""

    async def lend(self, user_key: str, stored: StoredAdapter, ttl_s: int) -> None:
        """Keep an adapter that belongs to nobody for `ttl_s`, so that engines can serve it."""

    async def banks(self) -> list[str]:
        """The banks (8 hex digits) that users were ever queued for, or user adapters trained on."""

    async def adapted(self) -> dict[str, int]:
        """The banks that user adapters were trained on, with the number of users of each."""

    def adapted_users(self, bank: str) -> AsyncIterator[str]:
        """The keys of users whose adapter was trained on a bank; by now some may have another, or none."""

    async def forget_adapted(self, user_key: str, *, but: str = "") -> None:
        """Take a user off every bank's list, except that of `but`."""
