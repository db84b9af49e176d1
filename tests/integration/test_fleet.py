"""`mta up --replicas 2` for real: two engines answer as one, forget who was erased, and survive what kills parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis
from pydantic import SecretStr

from bench.fleet.chaos import Plan, under_load
from bench.fleet.exercise.faults import Fault
from bench.fleet.exercise.machine import ENGINES, Machine, engine_of, tiny_machine, wait_for_router
from bench.fleet.exercise.parts import all_whole
from bench.fleet.replicas import compared
from bench.fleet.ring import Ring
from bench.rig.engine import Engine
from bench.rig.processes import PATIENCE_S, descendants, paused, wait_until
from bench.rig.tiny import WORLDS, world
from bench.rig.valkey import ValkeyProcess
from server.engine.admission.user_adapters import SWEEP_S
from server.settings import Settings
from server.supervisor.services import free_port
from tests.support.calls import adapt, put, who
from tests.support.gateway import GatewayThread, generate

PEOPLE = 20
IDLE, ANSWERED = "somebody-who-leaves", "somebody-who-leaves-in-the-middle-of-an-answer"
SECRET_WORDS = "yes my secret words"
SAMPLES = [{"input": f"question {n}", "output": f"{n} {SECRET_WORDS}"} for n in range(8)]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with tiny_machine(tmp_path_factory.mktemp("fleet"), "--dtype", "float32") as started:
        yield started


@pytest.fixture
def engines(machine: Machine) -> Iterator[list[Engine]]:
    with ExitStack() as stack:
        yield [stack.enter_context(engine_of(machine.up, name)) for name in ENGINES]


@pytest.fixture
def gateway(machine: Machine, engines: list[Engine], gateway_settings: Settings) -> Iterator[GatewayThread]:
    """A gateway over the same store that reaches only the first engine."""
    urls = {"engine_url": engines[0].url, "engine_urls": f"{engines[0].url},http://127.0.0.1:{free_port()}"}
    secret = SecretStr((machine.up.data / "secret").read_text().strip())
    parts = {"bank": machine.up.data.parent / "bank", "redis_url": machine.store.url, "secret": secret}
    with GatewayThread(gateway_settings, **urls, **parts) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def erased() -> set[str]:
    """Recipes of users who were erased a while ago."""
    return set()


def test_erased_user_leaves_the_store_and_no_engine_serves_them(
    machine: Machine, engines: list[Engine], gateway: GatewayThread, erased: set[str]
) -> None:
    """The near engine is told, but one user's answer is in progress there; the far engine is paused meanwhile."""
    (near, far), valkey = engines, machine.store
    recipes, keys = {}, {user: gateway.key(user) for user in (IDLE, ANSWERED)}
    with gateway.client() as client:
        for user, key in keys.items():
            put(client, user, [{"text": world(0)}])
            adapt(client, user, samples=SAMPLES).raise_for_status()
            wait_until(lambda user=user: client.get(f"/users/{user}").json()["adapter"], "the worker")  # type: ignore[misc]
            told = who(generate(client, user))
            assert told["level"] == "stacked"
            recipes[user] = f"{told['recipe']}:u-{key}.{client.get(f'/users/{user}').json()['adapter']['id']}"
            far.chat(recipes[user]).raise_for_status()
        assert [engine.resident()["held"] for engine in engines] == [sorted(recipes.values())] * 2
        kept = [SECRET_WORDS.encode(), *map(str.encode, keys), *(_blob(valkey, key) for key in keys.values())]
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
            assert near.chat(recipe).status_code == far.chat(recipe).status_code == 404
    erased.update(recipes.values())
    wait_for_router(machine.up)
    wait_until(lambda: all_whole(machine), "all to be as before")


def test_two_engines_answer_as_one_and_share_out_the_recipes(machine: Machine) -> None:
    people = [
        {
            "user_id": f"replica-{n}",
            "profile": [WORLDS[n % 6], *(f"{WORLDS[(n + n // 6 + 1) % 6]}, {i}" for i in range(1 + n % 3))],
            "query": [{"input": f"What about {WORLDS[n % 5]}?"}, {"input": "And else?"}],
        }
        for n in range(PEOPLE)
    ]
    found = compared(machine.up, people, max_tokens=12)
    assert (len(found.asked), found.differing) == (2 * PEOPLE, [])
    assert len(found.recipes) > PEOPLE / 3
    assert not found.twice
    assert set.union(*found.resident.values()) >= found.recipes
    ring = Ring([f"http://{machine.up.address(name)}" for name in ENGINES])
    for number, name in enumerate(ENGINES):
        assert {ring.engine_of(recipe) for recipe in found.resident[name] & found.recipes} <= {number}


def test_every_engine_releases_erased_users_by_itself(engines: list[Engine], erased: set[str]) -> None:
    assert len(erased) == 2
    for engine in engines:
        wait_until(lambda it=engine: not it.resident()["held"], "the adapters to go", SWEEP_S + PATIENCE_S)  # type: ignore[misc]
        assert not any(_has(engine, recipe) for recipe in erased)
        assert engine.status()["user_adapters"] == 0


def test_claims_hold_while_store_and_each_part_are_killed(machine: Machine, tmp_path: Path) -> None:
    faults = [Fault("valkey"), Fault("engine"), Fault("worker"), Fault("gateway")]
    claims = under_load(Plan(tmp_path, faults, seed=1, lost_share=0.001), machine)
    speeds = {fault.kind for fault in faults}  # how soon they recover is the benchmark's to judge
    assert [claim.row for claim in claims if not claim.holds and claim.what not in speeds] == []


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
