"""A cluster, over redis-py's client for clusters, which finds the server of each key and follows when keys move.

Writing is not left to that client: it would send what asks for durability to a server of its choice, and after a lost
connection repeat only what had no answer, over another one. Here a script and what it waits for go to the primary of
its keys over one connection, and all of it is repeated, there or wherever the keys have gone.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from redis import exceptions
from redis.asyncio.cluster import PipelineCommand

from server.store.durability import Durability
from server.store.redis.servers.base import CONNECTIONS, StoreServer, check_confirmed, confirmations, durability_of
from server.store.redis.servers.cluster_client import READ_RETRIES, Away, cluster_client

log = logging.getLogger("mta.store")

# Between attempts: a replica takes over within seconds, and keys have moved by then, or an operator is needed.
PAUSES_S = (0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.5)
# How often to find out which servers there are now. Errors do not always tell: one that is silent sends none, and a
# replica that has come must be waited for.
REFRESH_S = 5.0
PATIENCE_S = 1.0  # how long to wait for a server that is asked which servers there are, before another is
AWAY_S = 5.0  # how long nothing is sent to a server that did not answer to `durability`, asked every two seconds

SLOTS = 16384
_RANKS = (Durability.NONE, Durability.WAITAOF, Durability.ALWAYS)

_PASSING = (
    exceptions.AskError,  # MOVED is one, too
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ClusterDownError,
    exceptions.SlotNotCoveredError,
    exceptions.TryAgainError,
    OSError,
)
"""What a write meets while a replica takes over, or while keys are on their way from server to server."""


class Cluster:
    """`Servers` that share the keys, each with replicas or without.

    A write is on the disk of its primary, and has reached one of its replicas if there are any: so it is still there
    when that replica takes over.

    Its URL is `redis+cluster://` or `rediss+cluster://`, then what redis-py reads behind `redis://`, with one host or
    several, comma-separated: those that the others are found from; `ValueError` when it cannot be read.
    """

    def __init__(self, url: str) -> None:
        self._client = cluster_client(url)
        self._connections = asyncio.Semaphore(CONNECTIONS)  # the client fails where it should wait for a connection
        self._refreshing = asyncio.Lock()
        self._refreshed_s = -REFRESH_S
        self._not_durable: set[str] = set()
        self._unserved: str | None = None

    @property
    def unserved(self) -> str | None:
        return self._unserved

    async def run(self, command: Callable[[Any], Awaitable[Any]]) -> Any:
        for pause_s in (*PAUSES_S, None):
            try:
                async with self._connections:
                    await self._refresh()
                    return await command(self._client)
            except exceptions.ClusterError as error:
                if pause_s is None or type(error) is not exceptions.ClusterError:
                    raise
                await asyncio.sleep(pause_s)  # its keys move: servers sent it to each other, and none did it
        raise AssertionError("unreachable")

    @asynccontextmanager
    async def pipeline(self) -> AsyncIterator[Any]:
        async with self._connections:
            await self._refresh()
            async with self._client.pipeline(transaction=False) as pipe:
                yield pipe

    async def evaluate(
        self, script: str, names: Sequence[str], arguments: Sequence[Any], durability: Durability
    ) -> Any:
        command = ("EVAL", script, len(names), *names, *arguments)
        node, asking, home = None, False, None
        for pause_s in (*PAUSES_S, None):
            try:
                async with self._connections:
                    await self._refresh()
                    await self._client.initialize()
                    home = node or self._client.get_node_from_key(names[0])
                    self._client.refuse_away(home)
                    return await self._evaluate(home, command, names[0], durability, asking=asking)
            except _PASSING as error:
                if pause_s is None or (isinstance(error, Away) and not self._replicas(home, names[0])):
                    raise
                await asyncio.sleep(pause_s)
                await self._discover(home)
                node, asking = self._redirected(error)
        raise AssertionError("unreachable")

    async def durability(self) -> Durability:
        """How durable writes are where they can be made, if that is for most users; `unserved` says who is left."""
        await self._refresh(at_once=True)
        nodes = self._client.get_primaries()
        found = dict(zip(nodes, await asyncio.gather(*map(self._probe, nodes)), strict=True))
        self._client.stay_away({node for node, how in found.items() if how is None}, AWAY_S)
        serving = {node: how for node, how in found.items() if isinstance(how, Durability)}
        self._note_unserved({node.name for node in nodes if node not in serving}, set(serving))
        not_durable = {node.name for node, how in serving.items() if how is Durability.NONE}
        if not_durable - self._not_durable:
            log.warning("these servers of the cluster do not keep what they acknowledge: %s", sorted(not_durable))
        self._not_durable = not_durable
        return min(serving.values(), key=_RANKS.index)

    async def members(self) -> list[StoreServer]:
        found = []
        for _, nodes in await self._shards():
            for fields in nodes:
                places = ((fields.get("endpoint"), fields.get(port)) for port in ("port", "tls-port"))
                known = [self._client.get_node(host=host, port=port) for host, port in places if host and port]
                found += [StoreServer(fields["id"], node.execute_command) for node in known if node][:1]
        return found

    async def holders(self, name: str) -> list[str]:
        slot = self._client.keyslot(name)
        for slots, nodes in await self._shards():
            if any(first <= slot <= last for first, last in zip(slots[::2], slots[1::2], strict=True)):
                return [fields["id"] for fields in nodes]
        raise exceptions.SlotNotCoveredError(f"no server holds slot {slot}")

    async def close(self) -> None:
        await self._client.aclose()

    async def _probe(self, node: Any) -> Durability | str | None:
        """How durable a primary's writes are; the state of the cluster if it serves nobody; None if it is away."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                for _ in range(1 + READ_RETRIES):  # connections end, too, because the client makes them anew
                    with suppress(*_PASSING):
                        info = await node.execute_command("CLUSTER INFO")
                        state = str(info["cluster_state"])
                        return await durability_of(node.execute_command) if state == "ok" else state
        return None

    def _note_unserved(self, away: set[str], serving: set[Any]) -> None:
        """Raises `ClusterDownError` unless most slots are served."""
        served = sum(held[0] in serving for held in self._client.nodes_manager.slots_cache.values())
        said = f"{1 - served / SLOTS:.0%} of all users cannot be served: {', '.join(sorted(away))} cannot be used"
        unserved = said if served < SLOTS else None
        if unserved and unserved != self._unserved:
            log.error("%s", unserved)
        self._unserved = unserved
        if served <= SLOTS / 2:
            raise exceptions.ClusterDownError(said)

    async def _evaluate(
        self, node: Any, command: Sequence[Any], name: str, durability: Durability, *, asking: bool
    ) -> Any:
        """On one connection: leave to use keys that are arriving, the script, and what it waits for."""
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
            await self._discover(replicas[0])  # once the others count it as failed, writes no longer wait for it
        check_confirmed(confirmed)
        return answer

    def _replicas(self, node: Any, name: str) -> tuple[Any, ...]:
        """Which servers follow one that is asked for a key, its own or one that is arriving there."""
        slots = self._client.nodes_manager.slots_cache
        held = slots[self._client.keyslot(name)]
        if held[0] != node:
            held = next((nodes for nodes in slots.values() if nodes[0] == node), ())
        return tuple(held[1:])

    def _redirected(self, error: Exception) -> tuple[Any, bool]:
        """Which server an error names, if any, and whether leave must be asked there."""
        if not isinstance(error, exceptions.AskError):
            return None, False
        node = self._client.get_node(host=error.host, port=error.port)
        return node, not isinstance(error, exceptions.MovedError)

    async def _discover(self, silent: Any = None) -> None:
        """Find out again which servers there are and what they hold, if need be from the one that may be silent.

        Connections are made anew, each when it is free; those to a server that is no primary any more at once, so that
        nobody waits for it: it may be silent.
        """
        before = self._client.get_primaries()
        for _ in self._client.get_nodes():
            with suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    # Asks any server, another one each time.
                    await self._client.nodes_manager.initialize(last_failed_node_name=silent and silent.name)
                break
        else:
            raise exceptions.TimeoutError("no server says which others there are")
        now = self._client.get_primaries()
        await asyncio.gather(*(node.disconnect() for node in before if node not in now), return_exceptions=True)

    async def _refresh(self, *, at_once: bool = False) -> None:
        """Look around if anything has changed, every few seconds. Calls that come meanwhile wait for the result."""
        if time.monotonic() < self._refreshed_s + REFRESH_S and not (at_once or self._refreshing.locked()):
            return
        async with self._refreshing:
            if time.monotonic() < self._refreshed_s + REFRESH_S and not at_once:
                return
            await self._client.initialize()
            with suppress(*_PASSING):
                node, shards = await self._ask_any("CLUSTER SLOTS")
                if not self._knows(shards, node.host):
                    await self._discover()
            self._refreshed_s = time.monotonic()

    async def _ask_any(self, command: str) -> tuple[Any, Any]:
        """A server and its answer: another one each time, and only at last one that is away."""
        nodes = self._client.get_nodes()
        for node in sorted(random.sample(nodes, len(nodes)), key=self._client.is_away):
            with suppress(*_PASSING):
                async with asyncio.timeout(PATIENCE_S):
                    return node, await node.execute_command(command)
        raise exceptions.ConnectionError("no server of the cluster answers")

    def _knows(self, shards: Sequence[Any], host: str) -> bool:
        """Whether the client knows which primary holds which slots, and who follows it, as the server at a host says.

        It is compared with what the client holds, not with what was said last: the next server may know less.
        """
        for first, last, *nodes in shards:
            primary, *replicas = (f"{_text(node[0]) or host}:{node[1]}" for node in nodes)
            for known in self._layouts(first, last):
                if known[:1] != [primary] or set(known[1:]) != set(replicas):
                    return False
        return True

    def _layouts(self, first: int, last: int) -> list[list[str]]:
        """The names of the primary and its replicas that the client has for some slots: each different list once.

        redis-py lets the slots of a primary share one list object, but for those that it was redirected from: of these
        it forgets the replicas. So few lists are compared, not 16,384.
        """
        slots = self._client.nodes_manager.slots_cache
        lists = {id(nodes): nodes for nodes in (slots.get(slot, ()) for slot in range(first, last + 1))}
        return [[node.name for node in nodes] for nodes in lists.values()]

    async def _shards(self) -> list[tuple[list[int], list[dict[str, Any]]]]:
        """For each primary: its ranges of slots, first and last in turn; then its own fields and its replicas'."""
        _, shards = await self._ask_any("CLUSTER SHARDS")
        return [(shard["slots"], [_decoded(node) for node in shard["nodes"]]) for shard in shards]


def _decoded(fields: dict[Any, Any]) -> dict[str, Any]:
    return {_text(name): _text(value) for name, value in fields.items()}


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
