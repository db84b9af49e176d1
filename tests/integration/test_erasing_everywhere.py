"""`DELETE /users/{id}` with two real engines, one answering and one standing still at that moment: nothing is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import redis

from bench.rig.engine import KEY, Engine, running_engine
from bench.rig.processes import PATIENCE_S, descendants, paused, wait_until
from bench.rig.tiny import world
from bench.rig.valkey import ValkeyProcess
from server.engine.admission.user_adapters import SWEEP_S
from server.settings import Settings
from server.supervisor.services import free_port
from tests.integration.conftest import Work
from tests.support.gateway import SECRET, GatewayThread, generate

IDLE, ANSWERED = "somebody-who-leaves", "somebody-who-leaves-in-the-middle-of-an-answer"
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
    """One engine is told, but an answer of one of them is under way there; the other one stands still meanwhile."""
    client, (near, far) = fleet.client, fleet.engines
    for user in (IDLE, ANSWERED):
        client.put(f"/users/{user}/profile", json={"items": [{"text": world(0)}]}).raise_for_status()
        client.post(f"/users/{user}/adapt", json={"samples": SAMPLES}).raise_for_status()
    work()
    told = {user: generate(client, user).json()["personalization"] for user in (IDLE, ANSWERED)}
    assert [who["level"] for who in told.values()] == ["stacked", "stacked"]
    keys = {user: fleet.gateway.key(user) for user in told}
    adapters = {user: client.get(f"/users/{user}").json()["adapter"]["id"] for user in told}
    recipes = {user: f"{told[user]['recipe']}:u-{keys[user]}.{adapters[user]}" for user in told}
    for recipe in recipes.values():
        far.chat(recipe).raise_for_status()
    assert [engine.resident()["held"] for engine in fleet.engines] == [sorted(recipes.values())] * 2
    blobs = [_blob(valkey, key) for key in keys.values()]
    kept = [IDLE.encode(), ANSWERED.encode(), SECRET_WORDS.encode(), *blobs]
    assert all(words in _everything(valkey) for words in kept)

    with paused(far.pid, *descendants(far.pid)), ExitStack() as open_answer:
        with paused(*descendants(near.pid)):  # its model, so that the answer cannot end before
            lines = open_answer.enter_context(near.long_answer(recipes[ANSWERED]))
            for user in recipes:
                assert client.delete(f"/users/{user}").json()["erased"]["adapters"] == 1
            assert not any(words in _everything(valkey) for words in kept)
            assert near.client.post("/mta/v1/drop", json={"user_key": keys[ANSWERED]}).json() == {"held": 1}
        wait_until(lambda: not _has(near, recipes[IDLE]), "the engine that was told to drop an idle adapter")
        assert [line for line in lines if line][-1] == "data: [DONE]"
    for user, recipe in recipes.items():
        assert generate(client, user).json()["personalization"]["level"] == "base"
        assert near.chat(recipe).status_code == httpx.codes.NOT_FOUND
    wait_until(lambda: not _has(near, recipes[ANSWERED]), "the adapter of the answer to go", SWEEP_S + PATIENCE_S)
    for recipe in recipes.values():
        assert far.chat(recipe).status_code == httpx.codes.NOT_FOUND
    wait_until(lambda: not far.resident()["held"], "the other to find out by itself", SWEEP_S + PATIENCE_S)
    assert not any(_has(engine, recipe) for engine in fleet.engines for recipe in recipes.values())
    assert [engine.resident()["held"] for engine in fleet.engines] == [[], []]
    assert [engine.status()["user_adapters"] for engine in fleet.engines] == [0, 0]


def _has(engine: Engine, recipe: str) -> bool:
    """Whether its workers hold anything of a user's adapter."""
    return recipe in str(engine.resident())


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
                case kind:
                    raise AssertionError(f"{name!r} is a {kind!r}")
            found += [name, *values]
    return b"\n".join(found)
