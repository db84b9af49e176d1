"""`DELETE /users/{id}` with two real engines, one answering and one paused at that moment: nothing is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest
import redis
from httpx import Client

from bench.rig.engine import Engine, running_engine
from bench.rig.processes import PATIENCE_S, descendants, paused, wait_until
from bench.rig.tiny import world
from bench.rig.valkey import ValkeyProcess
from server.engine.admission.user_adapters import SWEEP_S
from server.settings import Settings
from server.supervisor.services import free_port
from tests.integration.conftest import Work
from tests.support.calls import adapt, put, who
from tests.support.gateway import GatewayThread, generate

IDLE, ANSWERED = "somebody-who-leaves", "somebody-who-leaves-in-the-middle-of-an-answer"
SECRET_WORDS = "yes my secret words"
SAMPLES = [{"input": f"question {n}", "output": f"{n} {SECRET_WORDS}"} for n in range(8)]


@pytest.fixture(scope="module")
def engines(tiny_bank_folder: Path, tiny_model_folder: Path, valkey: ValkeyProcess) -> Iterator[list[Engine]]:
    def running() -> AbstractContextManager[Engine]:
        return running_engine(tiny_bank_folder, tiny_model_folder, redis_url=valkey.url)

    with running() as near, running() as far:
        yield [near, far]


@pytest.fixture(scope="module")
def gateway(gateway_settings: Settings, engines: list[Engine]) -> Iterator[GatewayThread]:
    """A gateway that reaches only the near engine."""
    near = engines[0].url
    urls = {"engine_url": near, "engine_urls": f"{near},http://127.0.0.1:{free_port()}"}
    with GatewayThread(gateway_settings.model_copy(update=urls)) as gateway:
        yield gateway


def test_an_erased_user_is_gone_from_the_store_at_once_and_from_every_engine_in_time(
    client: Client, gateway: GatewayThread, engines: list[Engine], work: Work, valkey: ValkeyProcess
) -> None:
    """The near engine is told, but one user's answer is in progress there; the far engine is paused meanwhile."""
    near, far = engines
    for user in (IDLE, ANSWERED):
        put(client, user, [{"text": world(0)}])
        adapt(client, user, samples=SAMPLES).raise_for_status()
    work()
    recipes, keys = {}, {user: gateway.key(user) for user in (IDLE, ANSWERED)}
    for user, key in keys.items():
        told = who(generate(client, user))
        assert told["level"] == "stacked"
        recipes[user] = f"{told['recipe']}:u-{key}.{client.get(f'/users/{user}').json()['adapter']['id']}"
        far.chat(recipes[user]).raise_for_status()
    assert [engine.resident()["held"] for engine in engines] == [sorted(recipes.values())] * 2
    kept = [IDLE.encode(), ANSWERED.encode(), SECRET_WORDS.encode(), *(_blob(valkey, key) for key in keys.values())]
    assert all(words in _everything(valkey) for words in kept)

    with paused(far.pid, *descendants(far.pid)), ExitStack() as open_answer:
        with paused(*descendants(near.pid)):  # its model, so that the answer cannot end earlier
            lines = open_answer.enter_context(near.long_answer(recipes[ANSWERED]))
            for user in recipes:
                assert client.delete(f"/users/{user}").json()["erased"]["adapters"] == 1
            assert not any(words in _everything(valkey) for words in kept)
            assert near.client.post("/mta/v1/drop", json={"user_key": keys[ANSWERED]}).json() == {"held": 1}
        wait_until(lambda: not _has(near, recipes[IDLE]), "the engine that was told to drop an idle adapter")
        assert [line for line in lines if line][-1] == "data: [DONE]"
    for user, recipe in recipes.items():
        assert who(generate(client, user))["level"] == "base"
        assert near.chat(recipe).status_code == 404
    wait_until(lambda: not _has(near, recipes[ANSWERED]), "the answer's adapter to go", SWEEP_S + PATIENCE_S)
    assert [far.chat(recipe).status_code for recipe in recipes.values()] == [404, 404]
    wait_until(lambda: not far.resident()["held"], "the far engine to find out by itself", SWEEP_S + PATIENCE_S)
    assert not any(_has(engine, recipe) for engine in engines for recipe in recipes.values())
    assert [(engine.resident()["held"], engine.status()["user_adapters"]) for engine in engines] == [([], 0)] * 2


def _has(engine: Engine, recipe: str) -> bool:
    """Whether the engine's workers hold anything of a user's adapter."""
    return recipe in str(engine.resident())


def _blob(valkey: ValkeyProcess, user_key: str) -> bytes:
    with redis.Redis.from_url(valkey.url) as raw:
        blob = raw.hget(f"mta:{{{user_key}}}:adapter", "raw")
    assert isinstance(blob, bytes)
    return blob


def _everything(valkey: ValkeyProcess) -> bytes:
    """All names and values that Valkey holds."""
    with redis.Redis.from_url(valkey.url) as raw:
        values = {
            b"string": lambda name: [raw.get(name)],
            b"hash": lambda name: [part for pair in raw.hgetall(name).items() for part in pair],
            b"list": lambda name: raw.lrange(name, 0, -1),
            b"set": raw.smembers,
            b"zset": lambda name: raw.zrange(name, 0, -1),
        }
        return b"\n".join(part for name in raw.scan_iter() for part in (name, *values[raw.type(name)](name)))
