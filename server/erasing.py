"""`DELETE /users/{id}`: out of the store at once, out of every engine's memory, and out of the append-only file."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import aiohttp

from server.engine_client import bearer
from server.profiles import Profiles
from server.store.jobs import JobStore
from server.store.profiles import Erased

log = logging.getLogger("mta.gateway")

DROP_PATH = "/mta/v1/drop"
_TIMEOUT_S = 5.0


class RewritesLog(Protocol):
    """What is needed of `server.store.redis_log.AppendOnlyFile`."""

    async def ask_for_rewrite(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Erasure:
    """What was erased, and by when the append-only file has forgotten it too (Unix time, ms)."""

    erased: Erased
    rewritten_by_ms: int


class Erasing:
    """Erases users.

    Args:
        profiles: finds them.
        jobs: lists whose adapter is of which bank.
        log_file: what still holds them on disk.
        session: the process's HTTP session.
        urls: every engine by itself.
        key: what engines ask for, or None.
    """

    def __init__(
        self,
        profiles: Profiles,
        jobs: JobStore,
        log_file: RewritesLog,
        *,
        session: aiohttp.ClientSession,
        urls: Sequence[str],
        key: str | None,
    ) -> None:
        self._profiles = profiles
        self._jobs = jobs
        self._log_file = log_file
        self._session = session
        self._urls = tuple(urls)
        self._headers = bearer(key)
        self._dropping: set[asyncio.Task[None]] = set()

    async def erase(self, user_id: str) -> Erasure | None:
        """Erase a user; None when there is nothing of them.

        Engines are told in the background. One that cannot be reached finds out by itself, or holds nothing: it asks
        the store for every adapter that it keeps (`server/engine_plugin/user_adapters.py`).
        """
        erased = await self._profiles.erase(user_id)
        if erased is None:
            return None
        if erased.adapters:
            await self._jobs.forget_adapted(self._profiles.key(user_id))
            for url in self._urls:
                task = asyncio.create_task(self._drop(url, self._profiles.key(user_id)))
                self._dropping.add(task)
                task.add_done_callback(self._dropping.discard)
        return Erasure(erased, await self._log_file.ask_for_rewrite())

    async def _drop(self, url: str, user_key: str) -> None:
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        body = {"user_key": user_key}
        try:
            async with self._session.post(
                f"{url}{DROP_PATH}", json=body, headers=self._headers, timeout=timeout
            ) as response:
                if response.status != 200:
                    log.warning("the engine at %s answered %d to a drop", url, response.status)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            log.warning("the engine at %s could not be told to drop an adapter: %s", url, error)
