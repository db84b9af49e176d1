"""`DELETE /users/{id}`: out of the store at once, out of every engine's memory, and out of the append-only file."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from server.store.adapters import AdapterStore
from server.store.durability import ForgetsOnDisk
from server.store.jobs import JobStore
from server.store.profiles import Erasure, ProfileStore
from server.store.queue import UserQueue
from server.store.tenants.user_key import User


class Erasing:
    """Erases users.

    Args:
        adapters: lists which bank each user's adapter belongs to, and which banks there have been.
        signing: the queue of a bank, by its 8 hex digits.
        bank: the 8 hex digits of the bank that is served.
        log_file: still holds them on disk.
        drop: has every engine drop a user's adapters, by the user's key.
    """

    def __init__(
        self,
        profiles: ProfileStore,
        *,
        adapters: AdapterStore,
        jobs: JobStore,
        signing: Callable[[str], UserQueue],
        bank: str,
        log_file: ForgetsOnDisk,
        drop: Callable[[str], Coroutine[Any, Any, None]],
    ) -> None:
        self._profiles = profiles
        self._adapters = adapters
        self._jobs = jobs
        self._signing = signing
        self._bank = bank
        self._log_file = log_file
        self._drop = drop
        self._dropping: set[asyncio.Task[None]] = set()

    async def erase(self, user: User) -> Erasure | None:
        """Erase a user; None if nothing was ever stored about them, or that is no longer remembered.

        Each step may be repeated: a DELETE that failed half-way is finished by the next, which gets the same answer.
        Engines drop adapters in the background. One that cannot be reached finds out by itself: it asks the store about
        every adapter that it keeps (`server/engine/admission/user_adapters.py`).
        """
        key = user.key
        is_nobody, erasure = await self._profiles.erase_nobody(key)
        if not is_nobody:
            asked = await self._log_file.request_rewrite(key)
            erasure = await self._profiles.erase(key, asked.erase_by_ms, asked.rewritten_by_ms)
        if erasure is None:
            return None
        await self._adapters.forget_adapted(key)
        for bank in {self._bank, *erasure.banks, *await self._adapters.banks()}:
            await self._jobs.withdraw(key, bank)
            await self._signing(bank).withdraw(key)
        if erasure.erased.adapters:
            task = asyncio.create_task(self._drop(key))
            self._dropping.add(task)
            task.add_done_callback(self._dropping.discard)
        return erasure
