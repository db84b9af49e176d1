"""A Redis cluster, through redis-py's cluster client, which finds the server of each key and follows keys that move.

Writes bypass that client: it would send WAITAOF to any server, and after a lost connection repeat only the unanswered
commands. Here a script and its confirmations use one connection and are repeated together.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from redis import exceptions
from redis.asyncio.cluster import ClusterNode, PipelineCommand, RedisCluster
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.utils import str_if_bytes

from server.store.durability import Durability
from server.store.redis.scripts import Script
from server.store.redis.servers.base import (
    CONNECT_TIMEOUT_S,
    CONNECTIONS,
    StoreServer,
    check_confirmed,
    confirmations,
    durability_of,
)

log = logging.getLogger("mta.store")

# Pauses between attempts. Failovers and slot migrations finish within their sum; anything longer needs an operator.
PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.5)
REFRESH_S = 5.0  # seconds between topology queries: silent servers and new replicas cause no errors
DISCOVERY_TIMEOUT_S = 1.0  # per server asked for the topology
READ_RETRIES = 3
SKIP_S = 5.0  # seconds to skip a server that did not answer `durability`, which runs every two seconds

SLOTS = 16384
_RANKS = (Durability.NONE, Durability.WAITAOF, Durability.ALWAYS)

_TRANSIENT = (
    exceptions.AskError,  # MOVED is one, too
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ClusterDownError,
    exceptions.SlotNotCoveredError,
    exceptions.TryAgainError,
    OSError,
)
"""Errors of a write during a failover or while keys move between servers."""


class NodeUnresponsive(exceptions.ConnectionError):  # type: ignore[misc]  # untyped
    """The server did not answer recently, so it is skipped: waiting for it would block a connection slot."""


class _Client(RedisCluster):  # type: ignore[misc]  # untyped
    """A cluster client that skips unresponsive servers."""

    _skipped: Collection[Any] = ()
    _until_s = 0.0

    def skip(self, nodes: Collection[Any], for_s: float) -> None:
        self._skipped, self._until_s = nodes, time.monotonic() + for_s

    def is_skipped(self, node: Any) -> bool:
        return node in self._skipped and time.monotonic() < self._until_s

    def raise_if_skipped(self, node: Any) -> None:
        if self.is_skipped(node):
            raise NodeUnresponsive(f"{node.name} did not answer the last check")

    async def _execute_command(self, target_node: Any, *args: Any, **kwargs: Any) -> Any:
        self.raise_if_skipped(target_node)
        return await super()._execute_command(target_node, *args, **kwargs)


class Cluster:
    """A cluster of primaries, each with any number of replicas.

    A write is acknowledged once it is on its primary's disk and, if there are replicas, received by one of them. The
    hosts in the URL need not be all: the others are discovered. Raises `ValueError` if the URL is invalid.
    """

    def __init__(self, url: str) -> None:
        hosts, options = _read_url(url)
        self._client = _Client(
            startup_nodes=[ClusterNode(host, port) for host, port in hosts],
            max_connections=4 * CONNECTIONS,  # connections being closed count, too
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_timeout=None,  # see `base.py`
            retry=Retry(NoBackoff(), READ_RETRIES),
            reinitialize_steps=0,  # would drop all connections; `_refresh` runs often enough
            **options,
        )
        self.unserved: str | None = None
        self._connections = asyncio.Semaphore(CONNECTIONS)  # the client fails instead of waiting for a free connection
        self._refreshing = asyncio.Lock()
        self._refreshed_s = -REFRESH_S
        self._not_durable: set[str] = set()

    async def run(self, command: Callable[[Any], Awaitable[Any]]) -> Any:
        for pause_s in (*PAUSES_S, None):
            try:
                async with self._connections:
                    await self._refresh()
                    return await command(self._client)
            except exceptions.ClusterError as error:
                if pause_s is None or type(error) is not exceptions.ClusterError:
                    raise
                await asyncio.sleep(pause_s)  # its keys are moving: the servers redirected the command to each other
        raise AssertionError("unreachable")

    async def write(
        self, script: Script, names: Sequence[str], arguments: Sequence[Any], durability: Durability
    ) -> Any:
        return await script.run(lambda *command: self._routed(command, names[0], durability), names, arguments)

    async def _routed(self, command: Sequence[Any], name: str, durability: Durability) -> Any:
        """Send a script to the server that holds a key, wherever the key moves meanwhile."""
        node, asking, owner = None, False, None
        for pause_s in (*PAUSES_S, None):
            try:
                async with self._connections:
                    await self._refresh()
                    await self._client.initialize()
                    owner = node or self._client.get_node_from_key(name)
                    self._client.raise_if_skipped(owner)
                    return await self._write(owner, command, name, durability, asking=asking)
            except _TRANSIENT as error:
                if pause_s is None or (isinstance(error, NodeUnresponsive) and not self._replicas(owner, name)):
                    raise
                await asyncio.sleep(pause_s)
                await self._discover(owner)
                node, asking = None, False
                if isinstance(error, exceptions.AskError):
                    node = self._client.get_node(host=error.host, port=error.port)
                    asking = not isinstance(error, exceptions.MovedError)
        raise AssertionError("unreachable")

    async def durability(self) -> Durability:
        """Return the lowest durability of the usable primaries; `unserved` then names the unusable ones."""
        await self._refresh(at_once=True)
        nodes = self._client.get_primaries()
        probes = dict(zip(nodes, await asyncio.gather(*map(self._probe, nodes)), strict=True))
        self._client.skip({node for node, how in probes.items() if how is None}, SKIP_S)
        serving = {node: how for node, how in probes.items() if isinstance(how, Durability)}
        self._note_unserved({node.name for node in nodes if node not in serving}, set(serving))
        not_durable = {node.name for node, how in serving.items() if how is Durability.NONE}
        if not_durable - self._not_durable:
            log.warning("these servers of the cluster may lose acknowledged writes: %s", sorted(not_durable))
        self._not_durable = not_durable
        return min(serving.values(), key=_RANKS.index)

    async def members(self) -> list[StoreServer]:
        replicas = []
        for _, nodes in await self._shards():
            for fields in nodes:
                places = ((fields.get("endpoint"), fields.get(port)) for port in ("port", "tls-port"))
                known = [self._client.get_node(host=host, port=port) for host, port in places if host and port]
                replicas += [StoreServer(fields["id"], node.execute_command) for node in known if node][:1]
        return replicas

    async def holders(self, name: str = "") -> list[str]:
        slot, names = self._client.keyslot(name), list[str]()
        for ranges, nodes in await self._shards():
            if not name or any(first <= slot <= last for first, last in ranges):
                names += [fields["id"] for fields in nodes]
        if not names:
            raise exceptions.SlotNotCoveredError(f"no server holds slot {slot}")
        return names

    async def close(self) -> None:
        await self._client.aclose()

    async def _probe(self, node: Any) -> Durability | str | None:
        """Return a primary's durability, the cluster state if it is not ok, or None if the primary is silent."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DISCOVERY_TIMEOUT_S):
                for _ in range(1 + READ_RETRIES):  # connections also end when the client replaces them
                    with suppress(*_TRANSIENT):
                        info = await node.execute_command("CLUSTER INFO")
                        state = str(info["cluster_state"])
                        return await durability_of(node.execute_command) if state == "ok" else state
        return None

    def _note_unserved(self, failed: set[str], serving: set[Any]) -> None:
        """Set `unserved`; raise `ClusterDownError` unless most slots are served."""
        served = sum(held[0] in serving for held in self._client.nodes_manager.slots_cache.values())
        message = f"{1 - served / SLOTS:.0%} of all users cannot be served: {', '.join(sorted(failed))} cannot be used"
        unserved = message if served < SLOTS else None
        if unserved and unserved != self.unserved:
            log.error("%s", unserved)
        self.unserved = unserved
        if served <= SLOTS / 2:
            raise exceptions.ClusterDownError(message)

    async def _write(
        self, node: Any, command: Sequence[Any], name: str, durability: Durability, *, asking: bool
    ) -> Any:
        """Send ASKING if needed, the script, and its confirmations on one connection."""
        before = [("ASKING",)] if asking else []
        replicas = self._replicas(node, name)
        after = confirmations(durability, replicas=bool(replicas))
        sent = [PipelineCommand(n, *parts) for n, parts in enumerate([*before, command, *after])]
        await node.execute_pipeline(sent)
        for part in sent:
            if isinstance(part.result, Exception):
                raise part.result
        answer, *confirmed = [part.result for part in sent[len(before) :]]
        if len(confirmed) > 1 and confirmed[1] < 1:
            await self._discover(replicas[0])  # writes stop waiting for a replica once the cluster marks it as failed
        check_confirmed(confirmed)
        return answer

    def _replicas(self, node: Any, name: str) -> tuple[Any, ...]:
        """Return the replicas of the server that is asked for a key, even if the key is still moving there."""
        slots = self._client.nodes_manager.slots_cache
        held = slots[self._client.keyslot(name)]
        if held[0] != node:
            held = next((nodes for nodes in slots.values() if nodes[0] == node), ())
        return tuple(held[1:])

    async def _discover(self, silent: Any = None) -> None:
        """Query the topology again; ask the possibly `silent` server last. Connections are replaced when they become
        free, those to a former primary at once, since it may be silent."""
        before = self._client.get_primaries()
        for _ in self._client.get_nodes():
            with suppress(TimeoutError):
                async with asyncio.timeout(DISCOVERY_TIMEOUT_S):
                    # Asks a different server each time.
                    await self._client.nodes_manager.initialize(last_failed_node_name=silent and silent.name)
                break
        else:
            raise exceptions.TimeoutError("no server of the cluster returns the topology")
        now = self._client.get_primaries()
        await asyncio.gather(*(node.disconnect() for node in before if node not in now), return_exceptions=True)

    async def _refresh(self, *, at_once: bool = False) -> None:
        """Check every few seconds whether the topology has changed; concurrent calls wait for the result."""
        if time.monotonic() < self._refreshed_s + REFRESH_S and not (at_once or self._refreshing.locked()):
            return
        async with self._refreshing:
            if time.monotonic() < self._refreshed_s + REFRESH_S and not at_once:
                return
            await self._client.initialize()
            with suppress(*_TRANSIENT):
                node, shards = await self._ask_any("CLUSTER SLOTS")
                if not self._is_current(shards, node.host):
                    await self._discover()
            self._refreshed_s = time.monotonic()

    async def _ask_any(self, command: str) -> tuple[Any, Any]:
        """Send a command to a random server, skipped ones last; return the server and its answer."""
        nodes = self._client.get_nodes()
        for node in sorted(random.sample(nodes, len(nodes)), key=self._client.is_skipped):
            with suppress(*_TRANSIENT):
                async with asyncio.timeout(DISCOVERY_TIMEOUT_S):
                    return node, await node.execute_command(command)
        raise exceptions.ConnectionError("no server of the cluster answers")

    def _is_current(self, shards: Sequence[Any], host: str) -> bool:
        """Return whether the client's view of primaries and replicas equals the view of the server at `host`.

        redis-py shares one list among a primary's slots, except slots that it was redirected from: there it forgets the
        replicas. So there are few lists to compare, not 16,384.
        """
        slots = self._client.nodes_manager.slots_cache
        for first, last, *nodes in shards:
            primary, *replicas = (f"{str_if_bytes(node[0]) or host}:{node[1]}" for node in nodes)
            lists = {id(held): held for held in (slots.get(slot, ()) for slot in range(first, last + 1))}
            for held in lists.values():
                known = [node.name for node in held]
                if known[:1] != [primary] or set(known[1:]) != set(replicas):
                    return False
        return True

    async def _shards(self) -> list[tuple[list[tuple[int, int]], list[dict[str, Any]]]]:
        """Return for each shard its slot ranges (first, last) and the fields of its servers."""
        _, shards = await self._ask_any("CLUSTER SHARDS")
        return [(_ranges(shard["slots"]), list(map(_decoded, shard["nodes"]))) for shard in shards]


def _ranges(slots: list[Any]) -> list[tuple[int, int]]:
    """Return the pairs of redis-py from 8.2 on as they are, and pair the flat list of earlier ones."""
    return slots if slots and isinstance(slots[0], tuple) else list(zip(slots[::2], slots[1::2], strict=True))


def _decoded(fields: Mapping[Any, Any]) -> dict[str, Any]:
    return {str_if_bytes(name): str_if_bytes(value) for name, value in fields.items()}


def _read_url(url: str) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    """Return hosts with ports, and options for redis-py's client; raises `ValueError` if the URL is invalid."""
    parts = urlsplit(url)
    login, at, hosts = parts.netloc.rpartition("@")
    scheme = parts.scheme.removesuffix("+cluster")
    addresses, options = [], {}
    for host in hosts.split(","):
        options = parse_url(urlunsplit((scheme, f"{login}{at}{host}", parts.path, parts.query, "")))
        addresses.append((options.pop("host", ""), options.pop("port", 6379)))
    if options.pop("db", 0):
        raise ValueError("a cluster has no numbered databases")
    if not all(host for host, _ in addresses):
        raise ValueError("a host is missing")
    if options.pop("connection_class", None) is SSLConnection:
        options["ssl"] = True
    return addresses, options
