"""redis-py's client for a cluster, made from a URL with more than one host."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError

from server.store.redis.servers.base import CONNECT_TIMEOUT_S, CONNECTIONS

READ_RETRIES = 3


class Away(RedisConnectionError):  # type: ignore[misc]  # untyped
    """A server did not answer a moment ago, so it is not asked: who waits for it holds the place of others."""


class _Client(RedisCluster):  # type: ignore[misc]  # untyped
    """Leaves servers alone that are away."""

    _away: Collection[Any] = ()
    _until_s = 0.0

    def stay_away(self, nodes: Collection[Any], for_s: float) -> None:
        """Send nothing to these servers for a while."""
        self._away, self._until_s = nodes, time.monotonic() + for_s

    def is_away(self, node: Any) -> bool:
        """Whether a server is to be left alone."""
        return node in self._away and time.monotonic() < self._until_s

    def refuse_away(self, node: Any) -> None:
        """Raises `Away` of a server that is to be left alone."""
        if self.is_away(node):
            raise Away(f"{node.name} did not answer when it was last looked at")

    async def _execute_command(self, target_node: Any, *args: Any, **kwargs: Any) -> Any:
        self.refuse_away(target_node)
        return await super()._execute_command(target_node, *args, **kwargs)


def cluster_client(url: str) -> Any:
    """The client for a URL, as of `Cluster`; it connects when it is first used. Raises `ValueError`."""
    hosts, options = _read_url(url)
    return _Client(
        startup_nodes=[ClusterNode(host, port) for host, port in hosts],
        max_connections=4 * CONNECTIONS,  # those that are being closed count, too
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=None,  # see `base.py`
        retry=Retry(NoBackoff(), READ_RETRIES),
        reinitialize_steps=0,  # it would cut all connections off; `Cluster` looks around often enough
        **options,
    )


def _read_url(url: str) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    """Hosts with ports, and options of redis-py's client; raises `ValueError`."""
    parts = urlsplit(url)
    login, at, hosts = parts.netloc.rpartition("@")
    scheme = parts.scheme.removesuffix("+cluster")
    found, options = [], {}
    for host in hosts.split(","):
        options = parse_url(urlunsplit((scheme, f"{login}{at}{host}", parts.path, parts.query, "")))
        found.append((options.pop("host", ""), options.pop("port", 6379)))
    if options.pop("db", 0):
        raise ValueError("a cluster has no numbered databases")
    if not all(host for host, _ in found):
        raise ValueError("a host is missing")
    if options.pop("connection_class", None) is SSLConnection:
        options["ssl"] = True
    return found, options
