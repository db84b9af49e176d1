"""`DELETE /users/{id}`: out of the store at once, out of every engine's memory, and out of the append-only file."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from server.gateway.engines.admin import Engines
from server.store.adapters import AdapterStore
from server.store.durability import ForgetsOnDisk
from server.store.jobs import JobStore
from server.store.profiles import Erasure, ProfileStore
from server.store.signing import SignQueue
from server.store.tenants.user_key import User


class Erasing:
    """Erases users.

    Args:
        profiles: where they are kept.
        adapters: lists which bank each user's adapter belongs to, and which banks there have been.
        jobs: its queues may hold them.
        signing: so may these queues, by the bank's 8 hex digits.
        bank: the 8 hex digits of the bank that is served.
        log_file: the file that still holds them on disk.
        engines: hold their adapters in memory.
    """

    def __init__(
        self,
        profiles: ProfileStore,
        *,
        adapters: AdapterStore,
        jobs: JobStore,
        signing: Callable[[str], SignQueue],
        bank: str,
        log_file: ForgetsOnDisk,
        engines: Engines,
    ) -> None:
        self._profiles = profiles
        self._adapters = adapters
        self._jobs = jobs
        self._signing = signing
        self._bank = bank
        self._log_file = log_file
        self._engines = engines
        self._dropping: set[asyncio.Task[None]] = set()

    async def erase(self, user: User) -> Erasure | None:
        """Erase a user; None if nothing was ever stored about them, or that is no longer remembered.

        Each step may be repeated: a DELETE that failed half-way is finished by the next, which gets the same answer.

        Engines are told in the background. One that cannot be reached finds out on its own, or holds nothing: it asks
        the store about every adapter that it keeps (`server/engine/admission/user_adapters.py`).
        """
        erasures = [await self._erase(key) for key in (user.key, *user.former)]
        return next((erasure for erasure in erasures if erasure), None)

    async def _erase(self, key: str) -> Erasure | None:
        is_nobody, erasure = await self._profiles.erase_nobody(key)
        if not is_nobody:
            asked = await self._log_file.ask_for_rewrite(key)
            erasure = await self._profiles.erase(key, asked.erase_by_ms, asked.rewritten_by_ms)
        if erasure is None:
            return None
        await self._adapters.forget_adapted(key)
        for bank in {self._bank, *erasure.banks, *await self._adapters.banks()}:
            await self._jobs.withdraw(key, bank)
            await self._signing(bank).withdraw(key)
        if erasure.erased.adapters:
            task = asyncio.create_task(self._engines.drop(key))
            self._dropping.add(task)
            task.add_done_callback(self._dropping.discard)
        return erasure
