"""What a server's own logs of commands hold of a user who was erased: nothing, as far as they can be reset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from bench.rig.cluster import ValkeyCluster, ask
from bench.rig.valkey import DURABLE, ValkeyProcess
from tests.support.store_parts import KEYS, StoreParts, submitted

USER, WORDS = "somebody-who-was-here", "words that nobody shall find again"
KINDS = ("slow", "large-request", "large-reply")


@pytest.fixture
def nodes(server: ValkeyProcess | ValkeyCluster) -> Iterator[Sequence[ValkeyProcess]]:
    """Servers that log every command."""
    nodes = [server] if isinstance(server, ValkeyProcess) else server.nodes
    before = [ask(node, "CONFIG GET", "slowlog-log-slower-than", "commandlog-*-than") for node in nodes]
    for node, settings in zip(nodes, before, strict=True):
        for name in settings:
            ask(node, "CONFIG SET", name, 0)
    yield nodes
    for node, settings in zip(nodes, before, strict=True):
        for name, value in settings.items():
            ask(node, "CONFIG SET", name, value)


def logged(nodes: Sequence[ValkeyProcess]) -> str:
    has_more = [bool(ask(node, "CONFIG GET", "commandlog-request-larger-than")) for node in nodes]
    found = [ask(node, "SLOWLOG GET", -1) for node in nodes]
    found += [
        ask(node, "COMMANDLOG GET", -1, kind)
        for node, has in zip(nodes, has_more, strict=True)
        if has
        for kind in KINDS
    ]
    return repr(found)


async def store_somebody(parts: StoreParts) -> None:
    await parts.put(USER, WORDS)
    await submitted(parts.jobs, KEYS.key(USER), WORDS)


async def test_they_forget_who_is_erased(parts: StoreParts, nodes: Sequence[ValkeyProcess]) -> None:
    await store_somebody(parts)
    assert USER in logged(nodes)
    assert WORDS in logged(nodes)
    assert await parts.erase(USER)
    assert USER not in logged(nodes)
    assert WORDS not in logged(nodes)


async def test_where_they_may_not_be_reset_users_are_erased_all_the_same(tmp_path: Path) -> None:
    hidden = [word for name in ("SLOWLOG", "COMMANDLOG") for word in ("--rename-command", name, "")]
    server = ValkeyProcess(tmp_path, (*DURABLE, *hidden)).start()
    try:
        async with StoreParts.opened(server.url) as parts:
            await store_somebody(parts)
            assert await parts.erase(USER)
            assert await parts.profiles.load(KEYS.key(USER)) is None
    finally:
        server.kill()
