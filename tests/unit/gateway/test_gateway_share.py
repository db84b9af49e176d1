"""How the engines' places are shared out among gateways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.errors import Unavailable
from server.gateway.access.queue import GatewayShare


class Leases:
    """Who holds what, as the store knows it."""

    def __init__(self) -> None:
        self.held: dict[str, set[str]] = {}
        self.is_away = False

    async def acquire(self, name: str, members: Sequence[str], lease_s: float, most: int | None = None) -> int:
        if self.is_away:
            raise Unavailable("away")
        self.held.setdefault(name, set()).update(members)
        return len(self.held[name])

    async def release(self, name: str, member: str) -> None:
        if self.is_away:
            raise Unavailable("away")
        self.held[name].discard(member)


def share(store: Any, sequences: int | None, *urls: str, given: int | None = None) -> GatewayShare:
    return GatewayShare(store, urls, lambda: sequences, given)


async def test_gateways_before_the_same_engines_share_their_places() -> None:
    store: Any = Leases()
    one, two = (share(store, 9, *urls) for urls in (("a", "b"), ("b", "a")))
    other = share(store, 9, "c")
    assert one() == 9
    for places in (one, two, other, one):
        await places.count_gateways()
    assert (one(), two(), other()) == (5, 5, 9)
    await two.leave()
    await one.count_gateways()
    assert one() == 9


async def test_what_is_not_known_is_not_shared() -> None:
    store: Any = Leases()
    assert share(store, None, "a")() is None
    assert share(store, 9, "a", given=4)() == 4


async def test_a_store_that_is_away_keeps_nobody_from_leaving() -> None:
    store: Any = Leases()
    places = share(store, 9, "a")
    await places.count_gateways()
    store.is_away = True
    await places.leave()
    assert places() == 9
