"""A primary with replicas, watched by Redis Sentinel, which promotes a replica when the primary fails."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import redis.asyncio as redis
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from server.store.durability import Durability
from server.store.redis.scripts import Script
from server.store.redis.servers.base import (
    CONNECT_TIMEOUT_S,
    SingleServer,
    StoreServer,
    check_confirmed,
    confirmations,
)

log = logging.getLogger("mta.store")

FORM = "redis+sentinel://[user:password@]host:port[,host:port…]/service[/database]"

REFRESH_S = 5.0  # seconds between queries for the primary and its replicas: a new replica causes no error
DISCOVERY_TIMEOUT_S = 1.0  # per Sentinel; the last one has the caller's timeout

# Errors of a call to a server that is no longer the primary.
_TRANSIENT = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ReadOnlyError, OSError)


@dataclass(frozen=True, slots=True)
class _Topology:
    """The servers as reported by a Sentinel, named `host:port`."""

    primary: str
    replicas: frozenset[str]  # replicas that Sentinel does not consider down
    known: frozenset[str]  # all replicas so far, up or down: their files may hold erased data
    server: SingleServer  # the client for the primary's address


class Sentinel:
    """A primary and its replicas, at a URL as `FORM`. Raises `ValueError` if it is invalid.

    A write is acknowledged once it is on the primary's disk and, if there are replicas, received by one of them. Login
    and options in the URL are for the servers; the Sentinels get `sentinel_username` and `sentinel_password`.
    """

    unserved: str | None = None  # a primary serves all users or none

    def __init__(self, url: str) -> None:
        self._urls, sentinels, self._service = _read_url(url)
        self._sentinels: list[Any] = [
            redis.Redis.from_url(each, socket_connect_timeout=CONNECT_TIMEOUT_S, retry=Retry(NoBackoff(), 1))
            for each in sentinels
        ]
        self._servers: dict[str, SingleServer] = {}
        self._topology: _Topology | None = None
        self._refreshing = asyncio.Lock()
        self._refreshed_s = -REFRESH_S

    async def run(self, command: Callable[[Any], Awaitable[Any]]) -> Any:
        return await self._with_primary(lambda topology: topology.server.run(command))

    async def write(
        self, script: Script, names: Sequence[str], arguments: Sequence[Any], durability: Durability
    ) -> Any:
        async def write_to(topology: _Topology) -> Any:
            confirm = confirmations(durability, replicas=bool(topology.replicas))
            answer, confirmed = await topology.server.send(script, names, arguments, confirm)
            if len(confirmed) > 1 and confirmed[1] < 1:
                self._refreshed_s = -REFRESH_S  # writes stop waiting for a replica once it is marked as down
            check_confirmed(confirmed)
            return answer

        return await self._with_primary(write_to)

    async def durability(self) -> Durability:
        return await (await self._current(at_once=True)).server.durability()

    async def members(self) -> list[StoreServer]:
        topology = await self._current()
        names = [topology.primary, *sorted(topology.replicas)]
        return [StoreServer(name, self._server(name).execute) for name in names]

    async def holders(self, name: str = "") -> list[str]:
        topology = await self._current()
        return [topology.primary, *sorted(topology.known)]

    async def close(self) -> None:
        for each in self._sentinels:
            await each.aclose()
        for server in self._servers.values():
            await server.close()

    async def _with_primary(self, work: Callable[[_Topology], Awaitable[Any]]) -> Any:
        """Run `work`, and once more if another server has become the primary."""
        topology = await self._current()
        try:
            return await work(topology)
        except _TRANSIENT:
            now = await self._current(at_once=True)
            if now.primary == topology.primary:
                raise
        return await work(now)

    async def _current(self, *, at_once: bool = False) -> _Topology:
        """Return the servers. Sentinel is asked every few seconds; concurrent calls wait for its answer."""
        called_s = time.monotonic()
        if self._topology and called_s < self._refreshed_s + REFRESH_S and not (at_once or self._refreshing.locked()):
            return self._topology
        async with self._refreshing:
            fresh = self._refreshed_s >= called_s if at_once else called_s < self._refreshed_s + REFRESH_S
            if self._topology and fresh:
                return self._topology
            before, self._refreshed_s = self._topology, time.monotonic()
            try:
                self._topology = now = await self._discover()
            except exceptions.ConnectionError as error:
                if before is None:
                    raise
                log.warning("%s; %s stays the primary", error, before.primary)
                return before
            if before and before.primary != now.primary:
                log.warning("%s is the new primary of %s", now.primary, self._service)
            for name in self._servers.keys() - {now.primary, *now.replicas}:
                # Close at once: the server may be silent, and calls would wait for it.
                with suppress(exceptions.RedisError, OSError):
                    await self._servers.pop(name).close()
            return now

    async def _discover(self) -> _Topology:
        """Ask the Sentinels in turn for the servers; raises `ConnectionError` with every Sentinel's reason."""
        reasons = []
        for sentinel in (asked := tuple(self._sentinels)):
            try:
                async with asyncio.timeout(DISCOVERY_TIMEOUT_S if sentinel is not asked[-1] else None):
                    primary = await sentinel.sentinel_master(self._service)
                    replicas = await sentinel.sentinel_slaves(self._service)
            except (exceptions.RedisError, OSError) as error:
                reasons.append(str(error) or "a Sentinel does not answer")
                continue
            if _down(primary) or not primary["is_master"]:
                reasons.append(f"{_name(primary)} is down, and no replica has taken over yet")
                continue
            self._sentinels.remove(sentinel)
            self._sentinels.insert(0, sentinel)
            name, up = _name(primary), frozenset(_name(replica) for replica in replicas if not _down(replica))
            return _Topology(name, up, frozenset(map(_name, replicas)), self._server(name))
        raise exceptions.ConnectionError(f"no Sentinel knows a primary of {self._service!r}: {'; '.join(reasons)}")

    def _server(self, name: str) -> SingleServer:
        if name not in self._servers:
            host, _, port = name.rpartition(":")
            self._servers[name] = SingleServer(self._urls(f"[{host}]:{port}" if ":" in host else name))
        return self._servers[name]


def _name(state: dict[str, Any]) -> str:
    return f"{state['ip']}:{state['port']}"


def _down(state: dict[str, Any]) -> bool:
    return bool(state["is_sdown"] or state["is_odown"])


def _read_url(url: str) -> tuple[Callable[[str], str], list[str], str]:
    """Return a function from address to server URL, the Sentinels' URLs, and the service; raises `ValueError`."""
    parts = urlsplit(url)
    scheme = parts.scheme.removesuffix("+sentinel")
    login, at, hosts = parts.netloc.rpartition("@")
    service, _, database = parts.path.removeprefix("/").partition("/")
    options = dict(parse_qsl(parts.query))
    name, password = options.pop("sentinel_username", ""), options.pop("sentinel_password", "")
    if not service:
        raise ValueError(f"it names no service: use {FORM}")
    if database and not database.isdecimal():
        raise ValueError(f"{database!r} is not a database number: use {FORM}")
    query = urlencode(options)

    def url_of(address: str) -> str:
        return urlunsplit((scheme, f"{login}{at}{address}", f"/{database}", query, ""))

    their_login = f"{quote(name, '')}:{quote(password, '')}@" if password else ""
    sentinels = [urlunsplit((scheme, f"{their_login}{host}", "", query, "")) for host in hosts.split(",")]
    for each in map(urlsplit, sentinels):
        if not each.hostname or each.port is None:  # `port` raises ValueError if it is not a number
            raise ValueError(f"each Sentinel needs host and port, got {each.netloc.rpartition('@')[2]!r}: {FORM}")
    return url_of, sentinels, service
