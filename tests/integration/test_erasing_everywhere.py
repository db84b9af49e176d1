"""`DELETE /users/{id}` with two real engines, one of which cannot be reached at that moment: nobody keeps anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import redis

from server.engine_plugin.user_adapters import SWEEP_S
from server.settings import Settings
from server.supervisor.parts import free_port
from tests.integration.conftest import Work
from tests.support.engine import KEY, Engine, running_engine
from tests.support.gateway import SECRET, GatewayThread, generate
from tests.support.processes import PATIENCE_S, wait_until
from tests.support.tiny import world
from tests.support.valkey import ValkeyProcess

USER = "somebody-who-leaves"
SECRET_WORDS = "yes my secret words"
SAMPLES = [{"input": f"question {n}", "output": f"{n} {SECRET_WORDS}"} for n in range(8)]


@dataclass(frozen=True, slots=True)
class Fleet:
    """Two engines over one store, and a gateway that reaches the first of them alone."""

    client: httpx.Client
    gateway: GatewayThread
    engines: tuple[Engine, Engine]


@pytest.fixture(scope="module")
def fleet(
    tiny_bank_folder: Path, tiny_model_folder: Path, embedder_folder: Path, valkey: ValkeyProcess
) -> Iterator[Fleet]:
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(running_engine(tiny_bank_folder, tiny_model_folder, redis_url=valkey.url))
            for _ in range(2)
        )
        settings = Settings(
            bank=tiny_bank_folder,
            embedder=embedder_folder,
            redis_url=valkey.url,
            secret=SECRET,
            engine_url=first.url,
            engine_urls=f"{first.url},http://127.0.0.1:{free_port()}",
            engine_key=KEY,
        )
        gateway = stack.enter_context(GatewayThread(settings))
        yield Fleet(stack.enter_context(gateway.client()), gateway, (first, second))


def test_who_is_erased_is_gone_from_the_store_at_once_and_from_every_engine_in_time(
    fleet: Fleet, work: Work, valkey: ValkeyProcess
) -> None:
    client, (near, far) = fleet.client, fleet.engines
    client.put(f"/users/{USER}/profile", json={"items": [{"text": world(0)}]}).raise_for_status()
    client.post(f"/users/{USER}/adapt", json={"samples": SAMPLES}).raise_for_status()
    work()
    who = generate(client, USER).json()["personalization"]
    assert who["level"] == "stacked"
    user_key = fleet.gateway.parts.profiles.key(USER)
    recipe = f"{who['recipe']}:u-{user_key}.{client.get(f'/users/{USER}').json()['adapter']['id']}"
    far.chat(recipe).raise_for_status()
    assert [engine.status()["user_adapters"] for engine in fleet.engines] == [1, 1]
    blob = _blob(valkey, user_key)
    assert all(kept in _everything(valkey) for kept in (USER.encode(), SECRET_WORDS.encode(), blob))

    assert client.delete(f"/users/{USER}").json()["erased"]["adapters"] == 1
    assert generate(client, USER).json()["personalization"]["level"] == "base"
    assert not any(kept in _everything(valkey) for kept in (USER.encode(), SECRET_WORDS.encode(), blob))
    wait_until(lambda: _forgot(near, recipe), "the engine that was told to drop the adapter")
    assert near.chat(recipe).status_code == httpx.codes.NOT_FOUND
    assert far.chat(recipe).status_code == httpx.codes.NOT_FOUND
    wait_until(lambda: _forgot(far, recipe), "the other to find out by itself", SWEEP_S + PATIENCE_S)


def _forgot(engine: Engine, recipe: str) -> bool:
    return engine.status()["user_adapters"] == 0 and recipe not in str(engine.resident())


def _blob(valkey: ValkeyProcess, user_key: str) -> bytes:
    with redis.Redis.from_url(valkey.url) as raw:
        blob = raw.hget(f"mta:{{{user_key}}}:adapter", "raw")
    assert isinstance(blob, bytes)
    return blob


def _everything(valkey: ValkeyProcess) -> bytes:
    """All names and values that Valkey holds."""
    found: list[bytes] = []
    with redis.Redis.from_url(valkey.url) as raw:
        for name in raw.scan_iter():
            match raw.type(name):
                case b"string":
                    values = [raw.get(name)]
                case b"hash":
                    values = [part for pair in raw.hgetall(name).items() for part in pair]
                case b"list":
                    values = raw.lrange(name, 0, -1)
                case b"set":
                    values = list(raw.smembers(name))
                case b"zset":
                    values = raw.zrange(name, 0, -1)
                case b"stream":
                    values = [str(raw.xrange(name)).encode()]
                case kind:
                    raise AssertionError(f"{name!r} is a {kind!r}")
            found += [name, *values]
    return b"\n".join(found)
