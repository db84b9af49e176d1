"""What the stores need of Redis 7.2+ or Valkey 8+: one server (`single.py`), a cluster, or a watched primary.

Every change is one Lua script on keys of one slot, so it is atomic on a cluster too. `WAITAOF` follows on the same
connection: elsewhere it would wait for nothing.

`RedisConnection` stops waiting when its time is up, and cancels what it waited for. redis-py gets no `socket_timeout`:
it would then send through `asyncio.wait_for`, in which Python 3.11 loses cancellations.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from redis.exceptions import NoPermissionError, RedisError, ResponseError

from server.errors import Unavailable
from server.store.durability import Durability, Memory

CONNECTIONS = 64
CONNECT_TIMEOUT_S = 2.0
READ_TIMEOUT_S = 2.0
WRITE_TIMEOUT_S = 15.0
CHECK_TIMEOUT_S = 3.0  # in a cluster a silent server may be met twice, each time for a second
WAITAOF_TIMEOUT_MS = 10_000
REPLICA_TIMEOUT_MS = 4_000
WAITAOF = ("WAITAOF", 1, 0, WAITAOF_TIMEOUT_MS)
MEMORY_TIMEOUT_S = 0.5  # for what one server says of its memory: a replica may be silent, and a check must end in time

Execute = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class StoreServer:
    """One server process, and how to send it a command: `execute("INFO")`."""

    id: str  # which it keeps when its address changes; empty if it is not in a cluster
    execute: Execute


class Servers(Protocol):
    """One server, or several. Raises redis-py's errors; `RedisConnection` translates them."""

    unserved: str | None  # who cannot be served while most can, as `durability` last found

    async def run(self, command: Callable[[Any], Awaitable[Any]]) -> Any: ...

    async def write(self, script: str, names: Sequence[str], arguments: Sequence[Any], durability: Durability) -> Any:
        """Run a script on keys of one slot; return its answer once what it wrote is as durable as was found."""

    async def durability(self) -> Durability:
        """How writes become durable on the server where they do so least, of those that take writes now."""

    async def members(self) -> list[StoreServer]:
        """All servers that keep data and can be asked."""

    async def holders(self, name: str) -> list[str]:
        """The ids of the servers whose files hold a key, whether or not they can be asked now."""

    async def close(self) -> None: ...


async def durability_of(execute: Execute) -> Durability:
    try:
        config = await execute("CONFIG GET", "appendonly", "appendfsync")
    except (NoPermissionError, ResponseError):  # managed services hide CONFIG
        return await _try_waitaof(execute)
    found = decoded(config)
    if found.get("appendonly") != "yes" or found.get("appendfsync") == "no":
        return Durability.NONE  # with `no` the server never learns what is on disk: WAITAOF would wait for ever
    return Durability.ALWAYS if found.get("appendfsync") == "always" else await _try_waitaof(execute)


async def _try_waitaof(execute: Execute) -> Durability:
    """On a connection that wrote nothing WAITAOF answers at once: with an error if there is no file to wait for."""
    try:
        await execute("WAITAOF", 1, 0, 1)
    except ResponseError:
        return Durability.NONE
    return Durability.WAITAOF


async def memory_of(servers: Sequence[StoreServer]) -> tuple[list[str], Memory | None]:
    """Which servers may drop keys to make room, each with its policy; and the memory of the fullest, if any says so.

    It is read from `INFO`, for managed services hide `CONFIG`. A server that cannot be asked, or refuses, says nothing.
    """
    evicting, fullest = [], None
    for server, info in zip(servers, await asyncio.gather(*map(_memory_info, servers)), strict=True):
        if (policy := str(info.get("maxmemory_policy", "noeviction"))) != "noeviction":
            evicting.append(f"{server.id} {policy}".strip())
        if info:
            # What replicas and the append-only file are still to get does not count against the maximum.
            used = int(info.get("used_memory", 0)) - int(info.get("mem_not_counted_for_evict", 0))
            memory = Memory(used, int(info.get("maxmemory", 0)))
            fullest = memory if fullest is None or memory.share > fullest.share else fullest
    return evicting, fullest


async def _memory_info(server: StoreServer) -> dict[str, Any]:
    with suppress(RedisError, OSError, TimeoutError):
        async with asyncio.timeout(MEMORY_TIMEOUT_S):
            return dict(await server.execute("INFO", "memory"))
    return {}


def confirmations(durability: Durability, *, replicas: bool) -> list[tuple[object, ...]]:
    """The commands after a script that wait until its writes last.

    Also where the server fsyncs before it answers: one that takes over may not, and then this is an error.
    """
    if durability is Durability.NONE:
        return []
    return [WAITAOF, ("WAIT", 1, REPLICA_TIMEOUT_MS)] if replicas else [WAITAOF]


def check_confirmed(answers: Sequence[Any]) -> None:
    """Raises `Unavailable` unless the answers to `confirmations` say so; whoever sent the write sends it again."""
    waits = (("on disk", WAITAOF_TIMEOUT_MS), ("on a replica", REPLICA_TIMEOUT_MS))
    for answer, (where, timeout_ms) in zip(answers, waits, strict=False):
        if (answer[0] if isinstance(answer, list) else answer) < 1:
            raise Unavailable(
                f"Redis did not confirm within {timeout_ms / 1000:g} s that the write is {where}: send it again",
                code="store_not_durable",
            )


def decoded(fields: Mapping[Any, Any]) -> dict[str, Any]:
    return {text(name): text(value) for name, value in fields.items()}


def text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
