"""Rewrites the append-only files, so that erased data leaves the disk: every server its own, at most once an hour.

The hash `keys.rewrite(server)` says since when the file may hold erased data (`first`, absent if it does not), when the
newest erasure was announced (`asked`), when the last rewrite that succeeded began (`last`) and the one that was tried
(`tried`; `before`: the server's run id and its number of rewrites by then). Times are in ms. The version before knows
`due`.

An erasure is announced *before* it happens, so that a crash in between cannot leave the file unchanged. It happens
within `ERASE_MS` or not at all, so a rewrite leaves out what was announced that long before its start.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from server.errors import Unavailable
from server.store.base import Store
from server.store.redis import keys
from server.store.redis.scripts import script
from server.store.redis.servers.base import StoreServer

log = logging.getLogger("mta.store")

REWRITE_CHECK_S = 10.0  # seconds between a gateway's checks whether a rewrite is due
INTERVAL_MS = 3_600_000  # time between the starts of two rewrites
ERASE_MS = 60_000  # time from the announcement within which the erasure must happen
CLOCK_SKEW_MS = 10_000  # maximum clock difference in a cluster: another server's clock judges the deadline
REWRITE_MS = 600_000  # assumed duration of a rewrite; one that has not succeeded by then is tried again

_ANNOUNCE = script("append_only_file/announce", runs_when_full=True)
_UPDATE = script("append_only_file/update", runs_when_full=True)
_AGE = script("append_only_file/age")


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A promised rewrite. Times are Unix time by the store's clock."""

    erase_by_ms: int  # deadline for erasing the data that the rewrite must leave out
    rewritten_by_ms: int  # when the erased data is gone from the file at the latest


class AppendOnlyFile(Store):
    """The files of all servers."""

    async def announce(self, user_key: str, in_ms: int = 0) -> Rewrite:
        """Announce the erasure of a user, or of what goes by then. If it raises `Unavailable`, erase nothing."""
        now_ms = await self._announce(await self._connection.holders(keys.profile(user_key)), in_ms)
        return Rewrite(now_ms + ERASE_MS - CLOCK_SKEW_MS, now_ms + _promised_ms())

    async def announce_expiry(self, in_ms: int) -> None:
        """Announce that data on every server will have expired by then."""
        await self._announce(await self._connection.holders(), in_ms)

    async def _announce(self, servers: Sequence[str], in_ms: int = 0) -> int:
        return int(await self._connection.write(_ANNOUNCE, list(map(keys.rewrite, servers)), in_ms))

    async def overdue_s(self) -> float:
        """Return by how many seconds the oldest rewrite is late, of all servers, reachable or not; 0 if none is."""
        states = list(map(keys.rewrite, await self._connection.holders()))
        age_ms = int(await self._connection.evaluate(_AGE, states))
        return max(0, age_ms - _promised_ms()) / 1000

    async def rewrite_if_due(self) -> None:
        """Start the rewrites that are due. Only one gateway at a time does so."""
        members = await self._connection.members()
        results = await asyncio.gather(*map(self._check_server, members), return_exceptions=True)
        for error in results:  # raise only after all servers were checked
            if error is not None:
                raise error

    async def _check_server(self, server: StoreServer) -> None:
        info = await self._connection.send(server, "INFO")
        is_behind = info.get("master_link_status", "up") != "up"  # a replica that may not know of an erasure
        if is_behind or info.get("aof_rewrite_in_progress") or info.get("aof_rewrite_scheduled"):
            return
        if not info.get("aof_enabled"):  # there is no file to rewrite
            await self._connection.run(lambda redis: redis.delete(keys.rewrite(server.id)))
            return
        succeeded = int(info.get("aof_last_bgrewrite_status") == "ok")
        given = (info["run_id"], info.get("aof_rewrites", 0), succeeded, INTERVAL_MS, ERASE_MS, REWRITE_MS)
        starts, failed = await self._connection.evaluate(_UPDATE, (keys.rewrite(server.id),), *given)
        if failed:
            log.error("the append-only file%s still contains erased users: its rewrite failed", _of(server))
        if starts:
            try:
                await self._connection.send(server, "BGREWRITEAOF")
            except Unavailable as error:
                log.error("the append-only file%s cannot be rewritten now: %s", _of(server), error.explained)


def _of(server: StoreServer) -> str:
    return f" of {server.id}" if server.id else ""


def _promised_ms() -> int:
    """Longest time from an announcement to the end of the rewrite, in normal operation."""
    return ERASE_MS + INTERVAL_MS + REWRITE_MS + round(2 * REWRITE_CHECK_S * 1000)
