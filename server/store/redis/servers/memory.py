"""What servers say of their memory: how full they are, and whether they drop keys to make room.

It is read from `INFO`, for managed services hide `CONFIG`. A server that cannot be asked, or refuses, says nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from redis.exceptions import RedisError

from server.store.durability import Memory
from server.store.redis.servers.base import Server

PATIENCE_S = 0.5
"""How long to wait for one of them: a replica may be silent, and all of a check must end in time."""

_KEEPS_ALL = "noeviction"


async def evicting(servers: Sequence[Server]) -> tuple[list[str], Memory | None]:
    """Which servers may drop keys, each with its policy; and the memory of the fullest, None if none of them says."""
    said = [info for info in await asyncio.gather(*map(_ask, servers)) if info]
    policies = {server: str(info.get("maxmemory_policy", _KEEPS_ALL)) for server, info in said}
    found = [f"{server} {policy}".strip() for server, policy in policies.items() if policy != _KEEPS_ALL]
    return found, max((_memory(info) for _, info in said), key=lambda memory: memory.share, default=None)


async def _ask(server: Server) -> tuple[str, dict[str, Any]] | None:
    with suppress(RedisError, OSError, TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            return server.id, await server.execute("INFO", "memory")
    return None


def _memory(info: dict[str, Any]) -> Memory:
    # What replicas and the append-only file are still to get does not count against the maximum.
    used = int(info.get("used_memory", 0)) - int(info.get("mem_not_counted_for_evict", 0))
    return Memory(used, int(info.get("maxmemory", 0)))
