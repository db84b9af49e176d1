"""A real Valkey cluster of processes: primaries that share the slots, and their replicas."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import redis
import redis.asyncio

from bench.rig.processes import wait_until
from bench.rig.valkey import DURABLE, ValkeyProcess
from server.supervisor.services import free_port

SLOTS = 16384
NODE_TIMEOUT_MS = 1000
"""Milliseconds of silence after which the others count a node as failed."""


class ValkeyCluster:
    """Some primaries on free ports, the first of them with replicas; has the interface of `ValkeyProcess`."""

    def __init__(
        self, folder: Path, options: Sequence[str] = DURABLE, *, primaries: int = 3, replicas: int = 0
    ) -> None:
        self.folder = folder
        self._buses: dict[ValkeyProcess, int] = {}
        self.primaries = [self._node(f"primary-{n}", options) for n in range(primaries)]
        self.replicas = [self._node(f"replica-{n}", options) for n in range(replicas)]
        self.nodes = [*self.primaries, *self.replicas]

    @property
    def url(self) -> str:
        """The URL for `MTA_REDIS_URL`."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def client(self) -> redis.asyncio.RedisCluster:
        """Return a client of the cluster."""
        return redis.asyncio.RedisCluster(host="127.0.0.1", port=self.nodes[-1].port)

    def start(self) -> ValkeyCluster:
        """Start all nodes, distribute the slots, and wait until every node knows the others."""
        try:
            self._start()
        except BaseException:
            self.kill()
            raise
        return self

    def _start(self) -> None:
        for node in self.nodes:
            node.start()
        share = -(-SLOTS // len(self.primaries))
        for number, node in enumerate(self.primaries):
            last = min(SLOTS, (number + 1) * share) - 1
            ask(node, "CLUSTER ADDSLOTSRANGE", number * share, last)
            ask(node, "CLUSTER SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            ask(self.nodes[0], "CLUSTER MEET", "127.0.0.1", node.port, self._buses[node])
        wait_until(lambda: all(map(self._knows_all, self.nodes)), "the nodes to know one another")
        for replica in self.replicas:
            ask(replica, "CLUSTER REPLICATE", ask(self.primaries[0], "CLUSTER MYID"))
        wait_until(lambda: all(map(self.lists_replicas, self.nodes)), "the replicas to follow")

    def lists_replicas(self, node: ValkeyProcess) -> bool:
        """Whether a node reports all replicas to its clients."""
        found = [replica for _, _, _, *replicas in ask(node, "CLUSTER SLOTS") for replica in replicas]
        return len(found) == len(self.replicas)

    def kill(self) -> None:
        """Send SIGKILL to all nodes."""
        for node in self.nodes:
            node.kill()

    def move(self, slot: int, source: ValkeyProcess, target: ValkeyProcess) -> None:
        """Move a slot from one primary to another, key by key, as operators do."""
        here, there = (ask(node, "CLUSTER MYID").decode() for node in (source, target))
        ask(target, f"CLUSTER SETSLOT {slot} IMPORTING {here}")
        ask(source, f"CLUSTER SETSLOT {slot} MIGRATING {there}")
        while keys := ask(source, f"CLUSTER GETKEYSINSLOT {slot} 100"):
            for key in keys:
                ask(source, "MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
        for node in (target, source, *(node for node in self.primaries if node not in {source, target})):
            ask(node, f"CLUSTER SETSLOT {slot} NODE {there}")

    def home_of(self, key: str) -> ValkeyProcess:
        """Return the primary that a key belonged to initially."""
        share = -(-SLOTS // len(self.primaries))
        return self.primaries[int(redis.crc.key_slot(key.encode())) // share]

    def _node(self, name: str, options: Sequence[str]) -> ValkeyProcess:
        bus = free_port()
        cluster = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT_MS))
        at_once = ("--repl-diskless-sync-delay", "0")
        node = ValkeyProcess(self.folder / name, (*cluster, "--cluster-port", str(bus), *at_once, *options))
        self._buses[node] = bus
        return node

    def _knows_all(self, node: ValkeyProcess) -> bool:
        info = ask(node, "CLUSTER INFO")
        return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == len(self.nodes)


class HasUrl(Protocol):
    """A server with a URL."""

    @property
    def url(self) -> str: ...


def ask(node: HasUrl, command: str, *arguments: object) -> Any:
    """Send a command to one node and return its answer."""
    with redis.Redis.from_url(node.url) as raw:
        return raw.execute_command(command, *arguments)
