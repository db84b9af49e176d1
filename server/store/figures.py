"""Figures that the store's servers report about themselves. Commands appear by name only: `INFO` holds no arguments."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.errors import Unavailable
from server.store.redis.servers.base import StoreServer
from server.store.redis.servers.connection import RedisConnection

FIGURES_INTERVAL_S = 10.0
_SECTIONS = ("memory", "persistence", "replication", "stats", "commandstats")
_PREFIX = "cmdstat_"


@dataclass(frozen=True, slots=True)
class ServerFigures:
    """State of one server; durations are 0 until the first fork and the first rewrite since its start."""

    server: str  # as `StoreServer.id`
    used_bytes: int
    resident_bytes: int  # what the operating system counts, fragmentation included
    fork_s: float  # how long the last fork stopped the server
    rewrite_s: float  # how long the last rewrite of the append-only file took
    rewrite_failed: bool
    replicas: int  # connected ones
    commands: Mapping[str, tuple[int, float]]  # calls of each since the server started, and their seconds


async def read_figures(connection: RedisConnection) -> list[ServerFigures]:
    """Return the figures of the servers that report them; managed services may refuse."""
    members = await connection.members()
    reports = await asyncio.gather(*(_figures(connection, server) for server in members))
    return [report for report in reports if report is not None]


async def _figures(connection: RedisConnection, server: StoreServer) -> ServerFigures | None:
    try:
        info: dict[str, Any] = await connection.send(server, "INFO", *_SECTIONS)
    except Unavailable:
        return None
    return ServerFigures(
        server.id,
        int(info.get("used_memory", 0)),
        int(info.get("used_memory_rss", 0)),
        int(info.get("latest_fork_usec", 0)) / 1e6,
        max(0.0, float(info.get("aof_last_rewrite_time_sec", 0))),
        info.get("aof_last_bgrewrite_status", "ok") != "ok",
        int(info.get("connected_slaves", 0)),
        {
            name.removeprefix(_PREFIX): (int(value["calls"]), int(value["usec"]) / 1e6)
            for name, value in info.items()
            if name.startswith(_PREFIX)
        },
    )
