"""The queue in front of the engines: who is admitted, waits or is refused, in which order; shares of places."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from server.errors import TooMany, Unavailable
from server.gateway.access import queue, shares
from server.gateway.access.keys import Caller
from server.gateway.access.queue import EngineQueue, GatewayShare
from server.gateway.access.shares import FairQueue, FairShares, Shares
from server.gateway.routes.users import EXPORTS_AT_ONCE
from tests.support.watchdog import settled


class Line:
    """A queue for two sequences and its callers; `served` names those who got a place, in order."""

    def __init__(self, places: int | None = 2, max_waiting: int | None = 2) -> None:
        self.places = places
        self.queue = EngineQueue(lambda: self.places, max_waiting=max_waiting, patience_s=60)
        self.served: list[str] = []
        self.callers: dict[str, str] = {}  # by the first letter of a name, if not that letter
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, *names: str, size: int = 1, patience_s: float | None = None) -> None:
        """Send requests one after the other; `a1` and `a2` are two requests of the caller `a`."""
        for name in names:
            self._ends[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._request(name, size, patience_s))
            await settled()

    async def end(self, *names: str) -> None:
        for name in names:
            self._ends[name].set()
            await self._tasks[name]
            await settled()

    async def leave(self, name: str) -> None:
        self._tasks[name].cancel()
        await asyncio.gather(self._tasks[name], return_exceptions=True)
        await settled()

    async def refusal(self, name: str) -> TooMany:
        with pytest.raises(TooMany) as refused:
            await asyncio.wait_for(self._tasks[name], 10)
        return refused.value

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        assert (self.queue.taken, self.queue.waiting) == (0, 0)

    async def _request(self, name: str, size: int, patience_s: float | None) -> None:
        async with self.queue.acquire(self.callers.get(name[0], name[0]), size=size, patience_s=patience_s):
            self.served.append(name)
            await self._ends[name].wait()


@pytest.fixture
async def line() -> AsyncIterator[Line]:
    line = Line()
    yield line
    await line.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of queue and shares; `now_s` is its time."""
    clock = SimpleNamespace(now_s=0.0)
    for module in (queue, shares):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    return clock


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
    "a request may say how long it waits": (2, 2, "a1 a2 a3 a4/0 a5/0.01", "a1 a2", "a4 a5"),
    "others pass a wide one for half its patience, then places are kept for it": (
        *(4, 10, "a1 b1 c1 d1*4 @29 e1 f1 @31 -a1 g1 -b1 -c1 -e1 -d1", "a1 b1 c1 e1 d1 f1 g1", ""),
    ),
    "nothing is kept for a wide one that left": (2, 2, "a1 b1*2 @31 c1 ~b1", "a1 c1", ""),
    "after one long answer others wait again": (
        *(2, 2, "a1 a2 a3 -a1 a4 @100 -a2 a5 b1 @101 -a3", "a1 a2 a3 a4 a5", "b1"),
    ),
    "places come and go with the engines": (2, 3, "a1 a2 a3 a4 =1 -a1 ~a3 a5 =4 -a2", "a1 a2 a4 a5", ""),
    "who asks for more than a share comes after those who do not, and alone may have all": (
        *(8, 50, "b1 c1 a1 a2 a3 a4 a5 a6 a7 a8 b2 c2 -a1 -a2 -b1 -b2 -c1 -c2"),
        *("b1 c1 a1 a2 a3 a4 a5 a6 b2 c2 a7 a8", ""),
    ),
}
"""Places, longest line, what happens (`a1` comes, `a1*2` for two sequences, `a1/9` with 9 s of patience, `-a1` ends,
`~a1` leaves, `=4` places are there, it is second `@9`), who is served in which order, and who is refused."""


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
async def test_scenarios(scenario: tuple[int | None, int | None, str, str, str], clock: SimpleNamespace) -> None:
    places, max_waiting, steps, served, refused = scenario
    line = Line(places, max_waiting)
    for step in steps.split():
        name, size, patience_s = re.fullmatch(r"[-~=@]?(\w+)(?:\*(\d+))?(?:/(.+))?", step).groups()  # type: ignore[union-attr]
        match step[0]:
            case "-":
                await line.end(name)
            case "~":
                await line.leave(name)
            case "=":
                line.places = int(name)
            case "@":
                clock.now_s = float(name)
            case _:
                await line.come(name, size=int(size or 1), patience_s=patience_s and float(patience_s))
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


async def test_what_would_wait_too_long_is_refused_at_once(line: Line, clock: SimpleNamespace) -> None:
    line.queue = EngineQueue(lambda: 2, max_waiting=10, patience_s=60)
    await line.come(*(f"{name}{turn}" for turn in range(5) for name in "ab"))
    for name in ("a0", "b0", "a1", "b1"):
        clock.now_s += 20  # one is served every 20 s
        await line.end(name)
    await line.come("c1", patience_s=60)  # two are ahead, for callers take turns
    assert line.queue.waiting == 5
    await line.come("c2", patience_s=10)
    refused = await line.refusal("c2")
    assert 10 < int(refused.headers["Retry-After"]) <= 60
    with pytest.raises(TooMany):
        line.queue.check("c", 10)


async def test_places_come_back_one_by_one_and_only_once(line: Line) -> None:
    async with line.queue.acquire("a", size=2) as lease:
        await line.come("b1", "c1")
        for served in (["b1"], ["b1", "c1"], ["b1", "c1"]):
            lease.release(1)
            await settled()
            assert (line.served, line.queue.taken) == (served, 2)


async def test_another_part_of_an_answer_is_not_refused(line: Line) -> None:
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


class Leases:
    """The store's leases, by name."""

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
    assert share(store, None, "a")() is None
    assert share(store, 9, "a", given=4)() == 4


def keys(tenant: str, count: int) -> list[str]:
    """Callers of a tenant."""
    return [Caller(tenant, f"k{number}", frozenset()).name for number in range(count)]


def taken(places: Shares, *callers: str, at_most: int = 100) -> dict[str, int]:
    """Return how many places each caller gets if they take turns until nobody gets another."""
    got = dict.fromkeys(callers, 0)
    for caller in [*callers] * at_most:
        if places.may_acquire(caller):
            places.acquire(caller)
            got[caller] += 1
    return got


@pytest.mark.parametrize(("most", "share"), [(1, 1), (2, 1), (3, 2), (16, 8), (512, 256)])
def test_where_clients_decide_how_long_a_caller_alone_gets_half(most: int, share: int) -> None:
    assert taken(Shares(lambda: most), "a", at_most=most) == {"a": share}


def test_however_many_want_all_of_it_a_newcomer_finds_a_place() -> None:
    places = Shares(lambda: 16)
    assert [taken(places, name)[name] for name in "abcde"] == [8, 4, 2, 1, 1]
    places.release("a", 4)
    assert taken(places, "a", "f") == {"a": 0, "f": 2}


def test_however_many_keys_a_tenant_has_another_finds_a_place() -> None:
    places = Shares(lambda: EXPORTS_AT_ONCE)
    assert sum(taken(places, *keys("acme", 9)).values()) < EXPORTS_AT_ONCE
    assert taken(places, *keys("globex", 1)) == {keys("globex", 1)[0]: 1}


def test_a_new_key_finds_a_place_beside_others_of_its_tenant() -> None:
    places = Shares(lambda: 512)
    assert [taken(places, key, at_most=512)[key] for key in keys("acme", 5)] == [256, 86, 28, 10, 3]
    assert [taken(places, key, at_most=512)[key] for key in keys("globex", 2)] == [65, 21]


def test_active_tenants_get_equal_shares_whatever_their_keys() -> None:
    places, callers = FairShares(lambda: 12), [*keys("acme", 3), *keys("globex", 1)]
    for caller in callers:
        places.acquire(caller)
    within = [[size for size in range(13) if places.is_within_share(caller, size)] for caller in callers]
    assert [max(sizes) + 1 for sizes in within] == [2, 2, 2, 6]


async def test_tenants_take_turns_and_so_do_their_keys() -> None:
    line, served = FairQueue(Shares(lambda: 1)), list[str]()
    one, other, third = keys("acme", 3)
    (globex,) = keys("globex", 1)

    async def ask(caller: str) -> None:
        async with line.held(caller):
            served.append(caller)
            await asyncio.sleep(0)

    await asyncio.gather(*map(ask, [one, one, other, other, third, globex, globex]))
    assert served == [one, one, globex, other, globex, third, other]


async def test_a_full_line_makes_room_for_the_tenant_that_waits_less() -> None:
    line = Line(places=1, max_waiting=4)
    line.callers = {"a": "acme\0a", "b": "acme\0b", "c": "acme\0c", "g": "globex\0g", "h": "globex\0h"}
    await line.come("a1", "a2", "b1", "b2", "c1", "g1", "h1")
    assert line.queue.waiting == 4
    for name in ("b2", "a2"):
        await line.refusal(name)
    await line.come("c2")
    await line.refusal("c2")
    await line.close()


def test_a_caller_without_a_place_stays_active_for_ten_seconds(clock: SimpleNamespace) -> None:
    places = FairShares(lambda: 8)
    for caller in "ab":
        places.acquire(caller)
    places.release("a")
    for clock.now_s, is_alone in ((9.0, False), (10.0, True)):
        places.may_acquire("b")  # it asks
        assert places.is_within_share("b", 4) is is_alone


SHARES = {
    "active callers get equal shares": (8, "~a ~b ~c ~d ?abcd=2222"),
    "of what is free, others keep 2.5 times their mean, which fades": (
        *(8, "+a4 +b2 @1000 -b2 ?a=0 @1005.2 ~b @1010.4 ~b @1015.6 ~b @1020.8 ~b ?a=1"),
    ),
    "a burst is at most half as much again as the share": (12, "+a4 @1000 +b1 @1005 ~c @1010 ~c ?b=5"),
    "what was left unused may be taken later, once": (8, "+a2 @1000 +b2 @1000.5 ?b=3 @1100 -b2 ?b=1"),
}
"""Places and what happens: `a` asks (`~a`), takes (`+a2`) or returns (`-a2`) places, it is second `@9`, and `a` and
`b` then get so many more, in turns (`?ab=12`)."""


@pytest.mark.parametrize(("most", "steps"), SHARES.values(), ids=SHARES)
def test_fair_shares(most: int, steps: str, clock: SimpleNamespace) -> None:
    places = FairShares(lambda: most)
    for step in steps.split():
        match step[0]:
            case "~":
                places.may_acquire(step[1])
            case "+":
                places.acquire(step[1], int(step[2:]))
            case "-":
                places.release(step[1], int(step[2:]))
            case "@":
                clock.now_s = float(step[1:])
            case _:
                callers, _, counts = step[1:].partition("=")
                assert taken(places, *callers) == dict(zip(callers, map(int, counts), strict=True))


def test_while_nobody_knows_how_many_there_are_everybody_may() -> None:
    for places in (Shares(lambda: None), FairShares(lambda: None)):
        assert taken(places, "a", "b", at_most=5) == {"a": 5, "b": 5}
