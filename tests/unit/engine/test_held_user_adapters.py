"""Which user adapters an engine's workers hold: fetched once, never beyond their room, gone when the store's are."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapters.errors import UserAdapterError
from adapters.lora import LoraWeights, ModuleShape, RowLayout
from adapters.raw import read_user_adapter
from adapters.recipe import FusionMethod, FusionRecipe, UserAdapterId
from adapters.user_adapter import UserAdapter, encode_user_adapter
from bench.rig.processes import PATIENCE_S
from server.engine.admission import user_adapters
from server.engine.admission.user_adapters import UserAdapters
from server.errors import Unavailable
from server.store.adapters import StoredAdapter

RANK = 4
LAYOUT = RowLayout((ModuleShape("q_proj", 8, 8),), RANK, shared_a=True)
BANK = "9f2c41d0"


class Store:
    """Adapters in a dictionary, and how often their bytes were asked for."""

    def __init__(self) -> None:
        self.kept: dict[str, StoredAdapter] = {}
        self.fetched = 0
        self.down = False

    async def adapter(self, adapter_id: UserAdapterId) -> StoredAdapter | None:
        self.fetched += 1
        stored = self.kept.get(adapter_id.user_key)
        return stored if stored and stored.id == adapter_id.id else None

    async def adapter_id(self, user_key: str) -> str | None:
        if self.down:
            raise Unavailable("the store cannot be used now")
        return self.kept[user_key].id if user_key in self.kept else None


class Workers:
    """What every worker holds and was told, in order; `gate` lets adapters through."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.told: list[str] = []
        self.failure: Exception | None = None
        self.sending, self.gate = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self._turn = asyncio.Lock()  # calls are carried out one by one, as they came

    async def rpc(self, method: str, args: tuple[Any, ...]) -> None:
        await {"hold": self.hold, "release": self.release}[args[0]](*args[1:])  # type: ignore[operator]

    async def hold(self, name: str, raw: bytes) -> None:
        self.told.append("hold")
        self.sending.set()
        async with self._turn:
            await self.gate.wait()
            if self.failure:
                raise self.failure
            self.held[name] = raw
            self.told.append("held")

    async def release(self, names: list[str]) -> None:
        async with self._turn:
            for name in names:
                self.held.pop(name, None)
            self.told.append("released")


class World:
    """A store, workers and the adapters between them; `in_use` is for the test to fill."""

    def __init__(self, room: int = 10) -> None:
        self.store, self.workers, self.in_use = Store(), Workers(), set[str]()
        manifest: Any = SimpleNamespace(layout=LAYOUT, rank_of=lambda recipe: RANK)
        self.adapters = UserAdapters(
            self.store,
            self.workers.rpc,
            {BANK: manifest},
            max_rank=8,
            capacity_bytes=room * len(self.keep("z").raw),
            in_use=lambda: self.in_use,
        )

    async def hold(self, *users: str) -> None:
        """Store an adapter for each, and have the workers hold it."""
        for user in users:
            self.keep(user)
            await self.adapters.ensure(recipe(user))

    async def drop(self, user: str) -> int:
        return await self.adapters.drop(user * 25 + "e")

    @property
    def held(self) -> set[str]:
        """Names of users, by a letter, whose adapter the workers have."""
        return {name.partition(":u-")[2][0] for name in self.workers.held}

    def keep(self, user: str, adapter: str = "a", *, raw: bytes | None = None, **changes: Any) -> StoredAdapter:
        """Store an adapter for a user named by a letter."""
        raw = encoded(recipe(user).plain.name) if raw is None else raw
        stored = StoredAdapter(adapter * 25 + "e", recipe(user).plain.name, hashlib.sha256(raw).hexdigest(), raw)
        self.store.kept[user * 25 + "e"] = replace(stored, **changes)
        return stored


def recipe(user: str, adapter: str = "a") -> FusionRecipe:
    return FusionRecipe(BANK, FusionMethod.SHARED, True, (), UserAdapterId(f"{user * 25}e", f"{adapter * 25}e"))


def encoded(trained_on: str, rank: int = 1) -> bytes:
    weights = LoraWeights(rank, {"q_proj": torch.zeros(rank, 8)}, {"q_proj": torch.zeros(8, rank)})
    return encode_user_adapter(LAYOUT, UserAdapter(trained_on, weights))


@pytest.fixture
async def world() -> World:
    return World()


async def test_an_adapter_is_fetched_once_and_asked_for_every_time(world: World) -> None:
    for _ in range(3):
        await world.hold("b")
    assert world.store.fetched == 1
    assert world.held == {"b"}
    world.keep("b", "d")
    await world.adapters.ensure(recipe("b", "d"))
    with pytest.raises(UserAdapterError, match="does not exist"):
        await world.adapters.ensure(recipe("b"))


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (lambda plain: {"sha256": "0" * 64}, "its SHA-256 differs"),
        (lambda plain: {"raw": b"no adapter"}, "cannot be read"),
        (lambda plain: {"raw": encoded(plain + "+a01*500")}, "was trained on"),
        (lambda plain: {"raw": encoded(plain, rank=5)}, "adds rank 5 to 4, but slots hold rank 8"),
        (lambda plain: {"adapter": "d"}, "does not exist; the plain recipe is"),
    ],
)
async def test_what_a_worker_could_not_serve_is_refused_with_the_reason_and_sent_to_none(
    world: World, kept: Callable[[str], dict[str, Any]], reason: str
) -> None:
    world.keep("b", **kept(recipe("b").plain.name))
    with pytest.raises(UserAdapterError, match=reason):
        await world.adapters.ensure(recipe("b"))
    assert world.workers.told == []
    assert len(world.adapters) == 0


async def test_beyond_their_room_the_least_recently_used_go_and_never_what_is_in_use() -> None:
    world = World(room=2)
    world.in_use.add(recipe("b").name)
    await world.hold("b", "c", "d")
    assert world.held == {"b", "d"}
    assert len(world.adapters) == 2


async def test_what_the_store_has_not_any_more_is_let_go_once_nobody_uses_it(world: World) -> None:
    await world.hold("b", "c")
    del world.store.kept["b" * 25 + "e"]
    world.keep("c", "d")  # replaced
    world.in_use.add(recipe("c").name)
    await world.adapters.sweep()
    assert world.held == {"c"}
    world.in_use.clear()
    await world.adapters.sweep()
    assert not world.held


async def test_while_the_store_is_down_nothing_is_let_go_and_nothing_new_is_served(world: World) -> None:
    await world.hold("b")
    world.store.down = True
    with pytest.raises(Unavailable):
        await world.adapters.sweep()
    assert world.held
    with pytest.raises(UserAdapterError, match="cannot be fetched"):
        await world.adapters.ensure(recipe("b"))


async def test_dropping_a_user_says_how_much_is_still_in_use(world: World) -> None:
    await world.hold("b", "c")
    world.in_use.add(recipe("b").name)
    assert await world.drop("b") == 1
    world.in_use.clear()
    assert await world.drop("b") == 0
    assert world.held == {"c"}


@pytest.mark.parametrize("dropped", [False, True])
async def test_while_an_adapter_is_checked_others_go_on_and_who_is_dropped_then_is_sent_to_no_worker(
    world: World, monkeypatch: pytest.MonkeyPatch, dropped: bool
) -> None:
    begun, gate = threading.Event(), threading.Event()

    def read(layout: RowLayout, raw: bytes) -> Any:
        begun.set()
        assert gate.wait(PATIENCE_S), "the event loop waits for the reading"
        return read_user_adapter(layout, raw)

    monkeypatch.setattr(user_adapters, "read_user_adapter", read)
    asking = asyncio.create_task(world.hold("b"))
    await until(begun.is_set)
    if dropped:
        assert await world.drop("b") == 0
    gate.set()
    await asyncio.wait([asking])
    if dropped:
        assert "does not exist" in str(asking.exception())
        assert "hold" not in world.workers.told
    assert len(world.adapters) == len(world.held) == (not dropped)


async def begun(world: World, name: str) -> asyncio.Task[None]:
    """An `ensure` whose adapter is on its way to the workers, but not there; it is known already."""
    world.workers.gate.clear()
    asking = asyncio.create_task(world.hold(name))
    await world.workers.sending.wait()
    assert len(world.adapters) == 1
    return asking


async def left(asking: asyncio.Task[None]) -> None:
    """Its client goes away."""
    asking.cancel()
    await asyncio.wait([asking])


@pytest.mark.parametrize("let_go", ["sweep", "drop"])
async def test_a_client_that_leaves_meanwhile_leaves_nothing_unknown_in_the_workers(world: World, let_go: str) -> None:
    await left(await begun(world, "b"))
    world.store.kept.clear()
    going: Any = asyncio.ensure_future(world.adapters.sweep() if let_go == "sweep" else world.drop("b"))
    await asyncio.sleep(0)
    world.workers.gate.set()
    await going
    await until(lambda: "released" in world.workers.told)
    assert len(world.adapters) == len(world.held) == 0
    assert world.workers.told == ["hold", "held", "released"]


async def test_a_second_request_waits_until_the_workers_have_it(world: World) -> None:
    first = await begun(world, "b")
    second = asyncio.create_task(world.adapters.ensure(recipe("b")))
    await asyncio.sleep(0.01)
    assert not second.done()
    await left(first)
    await asyncio.sleep(0.01)
    assert not second.done()
    world.workers.gate.set()
    await second
    assert world.held == {"b"}
    assert world.workers.told == ["hold", "held"]


async def test_what_the_workers_could_not_take_is_released_and_tried_anew(world: World) -> None:
    world.workers.failure = RuntimeError("a rank is gone")
    with pytest.raises(RuntimeError, match="a rank is gone"):
        await world.hold("b")
    assert len(world.adapters) == 0
    assert world.workers.told == ["hold", "released"]
    world.workers.failure = None
    await world.hold("b")
    assert world.held == {"b"}


async def test_a_release_is_carried_out_though_its_client_leaves(world: World) -> None:
    await world.hold("b")
    dropping = asyncio.create_task(world.drop("b"))
    await asyncio.sleep(0)
    dropping.cancel()
    await until(lambda: not world.held)
    assert len(world.adapters) == 0


async def until(condition: Callable[[], bool]) -> None:
    """Let others run until it holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0)
