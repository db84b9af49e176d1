"""URLs of clusters: those of redis-py, with more than one host."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit, urlunsplit

from redis.asyncio.connection import SSLConnection, parse_url

SCHEMES = ("redis+cluster", "rediss+cluster")


def read_url(url: str) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    """Hosts with ports, and options of redis-py's client.

    Args:
        url: one of `SCHEMES`, then what redis-py reads behind `redis://`, with one host or several, comma-separated.

    Raises:
        ValueError: when the URL cannot be read.
    """
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
