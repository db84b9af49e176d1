"""What an engine holds of adapters, within bounds: names whose ids stay while they are used, and user adapters."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import UserAdapterError
from adapters.lora import LoraWeights, ModuleShape, RowLayout
from adapters.raw import read_user_adapter
from adapters.recipe import FusionMethod, FusionRecipe, UserAdapterId
from adapters.user_adapter import UserAdapter, encode_user_adapter
from bench.rig.processes import PATIENCE_S
from server.engine.admission import user_adapters
from server.engine.admission.prepare import AdapterNames
from server.engine.admission.user_adapters import UserAdapters
from server.engine.shared_part import MAX_ID
from server.errors import Unavailable
from server.store.adapters import StoredAdapter


def make_names(capacity: int, in_flight: set[str] | None = None, next_id: int = 1) -> AdapterNames:
    return AdapterNames({}, capacity=capacity, in_flight=lambda: in_flight or set(), next_id=next_id)


def test_least_recent_name_not_in_flight_is_evicted_first() -> None:
    names = make_names(8, in_flight={"b"})
    ids = {name: names.lease(name).lora_int_id for name in "abcdefgh"}
    for name in ids:
        names.release(name)
    for name in ("a", "new"):  # the first is used again
        names.lease(name)
        names.release(name)
    assert {name: names.lease(name).lora_int_id for name in "ab"} == {name: ids[name] for name in "ab"}
    assert names.lease("c").lora_int_id != ids["c"]


def test_ids_start_over_below_int32() -> None:
    late = make_names(8, next_id=MAX_ID)
    assert [late.lease(name).lora_int_id for name in ("last", "first again")] == [MAX_ID, 1]


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.booleans()), max_size=200))
def test_held_names_have_distinct_and_unchanging_ids(steps: list[tuple[str, bool]]) -> None:
    names = make_names(2)
    held: dict[str, list[int]] = {}
    bound = 0
    for name, take in steps:
        if take:
            held.setdefault(name, []).append(names.lease(name).lora_int_id)
        elif held.get(name):
            held[name].pop()
            names.release(name)
        current = {n: ids for n, ids in held.items() if ids}
        assert all(len(set(ids)) == 1 for ids in current.values())
        assert len({ids[0] for ids in current.values()}) == len(current) == names.leased
        bound = 2 + len(current) if take else bound  # names give way when another one comes
        assert len(names) <= bound


RANK = 4
LAYOUT = RowLayout((ModuleShape("q_proj", 8, 8),), RANK, shared_a=True)
BANK = "9f2c41d0"


class World:
    """A store, user adapters, and workers with what they were told; `in_use` is for the test to fill."""

    def __init__(self, room: int = 10) -> None:
        self.kept: dict[str, StoredAdapter] = {}  # in the store, by user key
        self.fetched, self.down = 0, False
        self.workers: dict[str, bytes] = {}  # what every worker holds, by recipe name
        self.told: list[str] = []
        self.failure: Exception | None = None
        self.sending, self.gate = asyncio.Event(), asyncio.Event()  # `gate` lets adapters through
        self.gate.set()
        self._turn = asyncio.Lock()  # calls are carried out one by one, as they came
        self.in_use = set[str]()
        manifest: Any = SimpleNamespace(layout=LAYOUT, rank_of=lambda recipe: RANK)
        room *= len(self.keep("z").raw)
        self.adapters = UserAdapters(self, self.rpc, {BANK: manifest}, 8, room, lambda: self.in_use)  # type: ignore[arg-type]

    async def adapter(self, adapter_id: UserAdapterId) -> StoredAdapter | None:
        self.fetched += 1
        stored = self.kept.get(adapter_id.user_key)
        return stored if stored and stored.id == adapter_id.id else None

    async def adapter_id(self, user_key: str) -> str | None:
        if self.down:
            raise Unavailable("the store cannot be used now")
        return self.kept[user_key].id if user_key in self.kept else None

    async def rpc(self, method: str, args: tuple[Any, ...]) -> None:
        if args[0] == "hold":
            self.told.append("hold")
            self.sending.set()
        async with self._turn:
            if args[0] == "release":
                self.workers = {name: raw for name, raw in self.workers.items() if name not in args[1]}
                self.told.append("released")
                return
            await self.gate.wait()
            if self.failure:
                raise self.failure
            self.workers[args[1]] = args[2]
            self.told.append("held")

    async def hold(self, *users: str) -> None:
        for user in users:
            self.keep(user)
            await self.adapters.ensure(recipe(user))

    async def drop(self, user: str) -> int:
        return await self.adapters.drop(user * 25 + "e")

    @property
    def held(self) -> set[str]:
        """Names of users, by a letter, whose adapter the workers have."""
        return {name.partition(":u-")[2][0] for name in self.workers}

    def keep(self, user: str, adapter: str = "a", *, raw: bytes | None = None, **changes: Any) -> StoredAdapter:
        raw = encoded(recipe(user).plain.name) if raw is None else raw
        stored = StoredAdapter(adapter * 25 + "e", recipe(user).plain.name, hashlib.sha256(raw).hexdigest(), raw)
        self.kept[user * 25 + "e"] = replace(stored, **changes)
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
    assert (world.fetched, world.held) == (1, {"b"})
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
async def test_unservable_adapters_are_refused(
    world: World, kept: Callable[[str], dict[str, Any]], reason: str
) -> None:
    world.keep("b", **kept(recipe("b").plain.name))
    with pytest.raises(UserAdapterError, match=reason):
        await world.adapters.ensure(recipe("b"))
    assert (world.told, len(world.adapters)) == ([], 0)


async def test_full_room_evicts_least_recent_adapters_not_in_use() -> None:
    world = World(room=2)
    world.in_use.add(recipe("b").name)
    await world.hold("b", "c", "d")
    assert (world.held, len(world.adapters)) == ({"b", "d"}, 2)


async def test_adapter_gone_from_the_store_is_released_once_unused(world: World) -> None:
    await world.hold("b", "c")
    del world.kept["b" * 25 + "e"]
    world.keep("c", "d")  # replaced
    world.in_use.add(recipe("c").name)
    await world.adapters.sweep()
    assert world.held == {"c"}
    world.in_use.clear()
    world.down = True
    with pytest.raises(Unavailable):
        await world.adapters.sweep()
    with pytest.raises(UserAdapterError, match="cannot be fetched"):
        await world.adapters.ensure(recipe("c"))
    assert world.held == {"c"}
    world.down = False
    await world.adapters.sweep()
    assert not world.held


async def test_drop_counts_uses_left_and_goes_on_without_its_client(world: World) -> None:
    await world.hold("b", "c", "d")
    world.in_use.add(recipe("b").name)
    assert await world.drop("b") == 1
    world.in_use.clear()
    assert (await world.drop("b"), world.held) == (0, {"c", "d"})
    dropping = asyncio.create_task(world.drop("c"))
    await asyncio.sleep(0)
    dropping.cancel()
    await until(lambda: world.held == {"d"})
    assert len(world.adapters) == 1


@pytest.mark.parametrize("dropped", [False, True])
async def test_others_go_on_while_an_adapter_is_checked(
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
        assert "hold" not in world.told
    assert len(world.adapters) == len(world.held) == (not dropped)


async def begun(world: World, name: str) -> asyncio.Task[None]:
    """An `ensure` whose adapter is on its way to the workers, but not there; it is known already."""
    world.gate.clear()
    asking = asyncio.create_task(world.hold(name))
    await world.sending.wait()
    assert len(world.adapters) == 1
    return asking


async def left(asking: asyncio.Task[None]) -> None:
    asking.cancel()
    await asyncio.wait([asking])


@pytest.mark.parametrize("let_go", ["sweep", "drop"])
async def test_workers_release_the_adapter_of_a_departed_client(world: World, let_go: str) -> None:
    await left(await begun(world, "b"))
    world.kept.clear()
    going: Any = asyncio.ensure_future(world.adapters.sweep() if let_go == "sweep" else world.drop("b"))
    await asyncio.sleep(0)
    world.gate.set()
    await going
    await until(lambda: "released" in world.told)
    assert len(world.adapters) == len(world.held) == 0
    assert world.told == ["hold", "held", "released"]


async def test_a_second_request_waits_until_the_workers_have_it(world: World) -> None:
    first = await begun(world, "b")
    second = asyncio.create_task(world.adapters.ensure(recipe("b")))
    for leaving in (False, True):
        if leaving:
            await left(first)
        await asyncio.sleep(0.01)
        assert not second.done()
    world.gate.set()
    await second
    assert (world.held, world.told) == ({"b"}, ["hold", "held"])


async def test_adapter_the_workers_refuse_is_released_and_retried(world: World) -> None:
    world.failure = RuntimeError("a rank is gone")
    with pytest.raises(RuntimeError, match="a rank is gone"):
        await world.hold("b")
    assert (world.told, len(world.adapters)) == (["hold", "released"], 0)
    world.failure = None
    await world.hold("b")
    assert world.held == {"b"}


async def test_failure_after_the_client_left_is_no_loop_error(world: World) -> None:
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    await left(await begun(world, "b"))
    world.failure = Unavailable("the store cannot be used now")
    world.gate.set()
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
    gc.collect()
    assert not reported


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0)
