"""The line before the engines: who is admitted, waits or is refused, in which order; and how gateways share places."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from server.errors import TooMany, Unavailable
from server.gateway.access.queue import EngineQueue, GatewayShare


class Line:
    """A queue for two sequences and its callers; `served` names those who got a place, in order."""

    def __init__(self, places: int | None = 2, max_waiting: int | None = 2) -> None:
        self.places = places
        self.queue = EngineQueue(lambda: self.places, max_waiting=max_waiting, patience_s=60)
        self.served: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, *names: str, size: int = 1, patience_s: float | None = None) -> None:
        """Callers ask, one after the other; `a1` and `a2` are two requests of the caller `a`."""
        for name in names:
            self._ends[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._request(name, size, patience_s))
            await settled()

    async def end(self, *names: str) -> None:
        """What was served comes to its end."""
        for name in names:
            self._ends[name].set()
            await self._tasks[name]
            await settled()

    async def leave(self, name: str) -> None:
        """A client goes away."""
        self._tasks[name].cancel()
        await asyncio.gather(self._tasks[name], return_exceptions=True)
        await settled()

    async def refusal(self, name: str) -> TooMany:
        """How a request was refused."""
        with pytest.raises(TooMany) as refused:
            await asyncio.wait_for(self._tasks[name], 10)
        return refused.value

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        assert (self.queue.taken, self.queue.waiting) == (0, 0)

    async def _request(self, name: str, size: int, patience_s: float | None) -> None:
        async with self.queue.acquire(name[0], size=size, patience_s=patience_s):
            self.served.append(name)
            await self._ends[name].wait()


async def settled() -> None:
    """Let everybody run who can."""
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.fixture
async def line() -> AsyncIterator[Line]:
    line = Line()
    yield line
    await line.close()


SCENARIOS = {
    "who finds a place does not wait": (2, 2, "a1 a2 a3 -a2", "a1 a2 a3", ""),
    "callers take turns": (2, 10, "a1 a2 a3 a4 a5 b1 c1 b2 -a1 -a2 -b1 -c1 -a3 -b2 -a4", "a1 a2 b1 a3 c1 b2 a4 a5", ""),
    "beyond a full line nobody waits": (2, 2, "a1 a2 a3 a4 a5", "a1 a2", "a5"),
    "by default half as many wait as there are places": (4, None, "a1 a2 a3 a4 a5 a6 a7", "a1 a2 a3 a4", "a7"),
    "a full line makes room for who waits less, once": (2, 2, "a1 a2 a3 a4 b1 c1 -a1 -a2", "a1 a2 b1 a3", "a4 c1"),
    "who leaves frees the place in line and engines": (2, 2, "a1 a2 a3 a4 ~a3 a5 ~a1 -a2", "a1 a2 a4 a5", ""),
    "a request takes as many places as it has answers": (2, 2, "a1 b1*2 -a1 c1 -b1 -c1 a2*100", "a1 b1 c1 a2", ""),
    "whoever waits behind a wide one with the same key passes": (2, 2, "a1 a2*2 a3", "a1 a3", ""),
    "while nobody knows how many there are nobody waits": (None, 2, "a1 a2 a3 a4 a5 -a1", "a1 a2 a3 a4 a5", ""),
    "a caller alone has all of it": (8, 2, "a1 a2 a3 a4 a5 a6 a7 a8", "a1 a2 a3 a4 a5 a6 a7 a8", ""),
    "who asks for more than a share comes after those who do not, and alone may have all": (
        *(8, 50, "b1 c1 a1 a2 a3 a4 a5 a6 a7 a8 b2 c2 -a1 -a2 -b1 -b2 -c1 -c2"),
        *("b1 c1 a1 a2 a3 a4 a5 a6 b2 c2 a7 a8", ""),
    ),
}
"""Places, longest line, what happens (`a1` comes, `a1*2` for two sequences, `-a1` ends, `~a1` leaves), who is served in
which order, and who is refused."""


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
async def test_scenarios(scenario: tuple[int | None, int | None, str, str, str]) -> None:
    places, max_waiting, steps, served, refused = scenario
    line = Line(places, max_waiting)
    for step in steps.split():
        name, _, size = step.lstrip("-~").partition("*")
        if step[0] == "-":
            await line.end(name)
        elif step[0] == "~":
            await line.leave(name)
        else:
            await line.come(name, size=int(size or 1))
    assert " ".join(line.served) == served
    for name in refused.split():
        refusal = await line.refusal(name)
        assert (refusal.status, refusal.code) == (429, "overloaded")
        assert int(refusal.headers["Retry-After"]) >= 1
    await line.close()


async def test_who_leaves_at_the_moment_of_their_turn_passes_it_on(line: Line) -> None:
    await line.come("a1", "a2", "a3", "a4")
    line._ends["a1"].set()
    await asyncio.sleep(0)  # a1 gives its place to a3, who does not know it yet
    await line.leave("a3")
    assert line.served == ["a1", "a2", "a4"]


async def test_room_is_made_at_the_expense_of_one_who_is_just_leaving(line: Line) -> None:
    await line.come("a1", "a2", "a3", "a4")
    coming = asyncio.create_task(line.come("b1"))
    await asyncio.sleep(0)  # b1 is the next to run
    line._tasks["a4"].cancel()
    await coming
    await line.end("a1", "a2")
    assert line.served == ["a1", "a2", "b1", "a3"]


async def test_after_one_long_answer_others_wait_again(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("server.gateway.access.queue.time", SimpleNamespace(monotonic=lambda: now_s))
    await line.come("a1", "a2", "a3")
    await line.end("a1")
    await line.come("a4")
    now_s += 100.0  # longer than anybody waits
    await line.end("a2")
    await line.come("a5")
    with pytest.raises(TooMany):
        line.queue.check("b", None)  # whoever has somebody ahead
    now_s += 1.0
    await line.end("a3")
    assert line.served == ["a1", "a2", "a3", "a4", "a5"]


async def test_patience_ends(line: Line) -> None:
    await line.come("a1", "a2", "a3")
    await line.come("a4", patience_s=0)
    await line.refusal("a4")
    await line.come("a5", patience_s=0.01)
    await line.refusal("a5")
    assert line.queue.waiting == 1


async def test_what_would_wait_too_long_is_refused_at_once(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    line.queue = EngineQueue(lambda: 2, max_waiting=10, patience_s=60)
    now_s = 0.0
    monkeypatch.setattr("server.gateway.access.queue.time", SimpleNamespace(monotonic=lambda: now_s))
    await line.come(*(f"{name}{turn}" for turn in range(5) for name in "ab"))
    for name in ("a0", "b0", "a1", "b1"):
        now_s += 20  # one is served every 20 s
        await line.end(name)
    await line.come("c1", patience_s=60)  # two are ahead, for callers take turns
    assert line.queue.waiting == 5
    await line.come("c2", patience_s=10)
    refused = await line.refusal("c2")
    assert 10 < refused.retry_after_s <= 60


class TestWide:
    """Requests for several sequences at once."""

    async def test_others_pass_it_for_half_of_its_patience_then_places_are_kept(
        self, line: Line, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now_s = 0.0
        monkeypatch.setattr("server.gateway.access.shares.time", SimpleNamespace(monotonic=lambda: now_s))
        line.queue = EngineQueue(lambda: 4, max_waiting=10, patience_s=60)
        await line.come("a1", "b1", "c1")
        await line.come("d1", size=4)
        now_s = 29.0
        await line.come("e1")
        assert line.served == ["a1", "b1", "c1", "e1"]
        await line.come("f1")
        now_s = 31.0
        await line.end("a1")
        await line.come("g1")  # one is free, and is kept
        await line.end("b1", "c1")
        assert line.served == ["a1", "b1", "c1", "e1"]
        await line.end("e1")
        assert line.served == ["a1", "b1", "c1", "e1", "d1"]
        await line.end("d1")
        assert line.served[5:] == ["f1", "g1"]

    async def test_once_it_has_left_nothing_is_kept_for_it(self, line: Line) -> None:
        await line.come("a1")
        await line.come("b1", size=2, patience_s=0.01)
        await line.come("c1")
        assert line.served == ["a1", "c1"]
        await line.refusal("b1")
        assert (line.queue.taken, line.queue.waiting) == (2, 0)

    async def test_its_places_come_back_one_by_one(self, line: Line) -> None:
        async with line.queue.acquire("a", size=2) as lease:
            await line.come("b1", "c1")
            lease.release(1)
            await settled()
            assert line.served == ["b1"]
            lease.release(1)
            lease.release(1)
            await settled()
            assert line.served == ["b1", "c1"]
            assert line.queue.taken == 2

    async def test_another_part_of_an_answer_is_not_refused(self, line: Line) -> None:
        await line.come("a1", "b1", "a2", "b2")
        async with AsyncExitStack() as stack:
            part = stack.enter_async_context(line.queue.acquire("a", patience_s=0, begun=True))
            waiting = asyncio.create_task(part)
            await settled()
            await line.come("c1", "d1")
            assert not waiting.done()
            await line.leave("a2")
            await line.end("a1", "b1")
            await asyncio.wait_for(waiting, 10)


async def test_no_place_idles_while_somebody_waits_who_may_have_it(line: Line) -> None:
    line.queue = EngineQueue(lambda: 8, max_waiting=100, patience_s=60)
    for name in "abc":
        await line.come(*(f"{name}{n}" for n in range(30)))
    ended: list[str] = []
    while len(ended) < 20:
        running = [name for name in line.served if name not in ended]
        assert len(running) == line.queue.taken == 8
        await line.end(running[0])
        ended.append(running[0])


async def test_places_come_and_go_with_the_engines(line: Line) -> None:
    await line.come("a1", "a2", "a3", "a4")
    line.places = 1
    await line.end("a1")
    assert line.served == ["a1", "a2"]
    line.places = 4
    await line.end("a2")
    assert line.served == ["a1", "a2", "a3", "a4"]


async def test_a_place_is_given_back_once() -> None:
    queue = EngineQueue(lambda: 1, max_waiting=0, patience_s=1)
    async with AsyncExitStack() as stack:
        lease = await stack.enter_async_context(queue.acquire("a"))
        lease.release()
        assert queue.taken == 0
        await stack.enter_async_context(queue.acquire("b"))
        lease.release()
        assert queue.taken == 1
    assert queue.taken == 0


class Leases:
    """Who holds what, as the store knows it."""

    def __init__(self) -> None:
        self.held: defaultdict[str, set[str]] = defaultdict(set)
        self.is_away = False

    async def acquire(self, name: str, members: Sequence[str], lease_s: float, most: int | None = None) -> int:
        self.held[name].update(members)
        return len(self.held[name])

    async def release(self, name: str, member: str) -> None:
        if self.is_away:
            raise Unavailable("away")
        self.held[name].discard(member)


def share(store: Any, sequences: int | None, *urls: str, given: int | None = None) -> GatewayShare:
    return GatewayShare(store, urls, lambda: sequences, given)


async def test_gateways_before_the_same_engines_share_their_places() -> None:
    store = Leases()
    one, two, other = share(store, 9, "a", "b"), share(store, 9, "b", "a"), share(store, 9, "c")
    assert one() == 9
    for places in (one, two, other, one):
        await places.count_gateways()
    assert (one(), two(), other()) == (5, 5, 9)
    await two.leave()
    await one.count_gateways()
    assert one() == 9
    store.is_away = True
    await one.leave()  # nothing keeps a gateway from leaving


def test_what_is_not_known_is_not_shared() -> None:
    assert share(Leases(), None, "a")() is None
    assert share(Leases(), 9, "a", given=4)() == 4
