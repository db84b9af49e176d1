"""Who may take another place."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from server.gateway.access import shares
from server.gateway.access.shares import MEAN_TIME_S, FairShares, Shares


def taken(places: Shares, *callers: str, at_most: int = 100) -> dict[str, int]:
    """How many each caller gets who take turns until nobody gets another."""
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


class TestFairShares:
    """A caller has its share; beyond it, what it left unused, and what others do not need."""

    now_s = 0.0

    @pytest.fixture(autouse=True)
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shares, "time", SimpleNamespace(monotonic=lambda: self.now_s))

    @pytest.fixture
    def places(self) -> FairShares:
        return FairShares(lambda: 8)

    def test_alone_a_caller_gets_all_of_it(self, places: FairShares) -> None:
        assert taken(places, "a") == {"a": 8}

    def test_those_who_are_there_get_the_same(self, places: FairShares) -> None:
        for caller in "abcd":
            places.arrives(caller)
        assert taken(places, *"abcd") == dict.fromkeys("abcd", 2)

    def test_who_has_no_place_at_this_moment_still_counts_for_some_seconds(self, places: FairShares) -> None:
        for caller in "ab":
            places.acquire(caller)
        places.release("a")
        self.now_s = 9.0
        places.arrives("b")
        assert not places.is_within_share("b", 4)
        self.now_s = 10.0
        places.arrives("b")
        assert places.is_within_share("b", 4)

    def test_more_than_what_others_had_on_average_is_left_to_them(self, places: FairShares) -> None:
        for caller in "aaaabb":
            places.acquire(caller)
        self.now_s = 1000.0
        places.release("b", 2)
        assert taken(places, "a")["a"] == 0
        for _ in range(4):
            self.now_s += MEAN_TIME_S * math.log(2) / 4
            places.arrives("b")
        assert taken(places, "a")["a"] == 1  # of the four that are free, 2.5 times their mean of one stay

    def test_a_burst_is_at_most_half_as_much_again_as_the_share(self) -> None:
        places = FairShares(lambda: 12)
        places.acquire("a", 4)
        self.now_s = 1000.0
        places.acquire("b")
        for _ in range(2):
            self.now_s += 5.0
            places.arrives("c")
        assert taken(places, "b")["b"] == 4 + 2 - 1

    def test_who_left_some_of_its_share_unused_may_take_as_much_more_once(self, places: FairShares) -> None:
        places.acquire("a", 2)
        self.now_s = 1000.0
        places.acquire("b", 2)
        self.now_s = 1000.5
        assert taken(places, "b")["b"] == 3  # up to its share of 4, and 0.5 s times the 2 that it left
        self.now_s = 1100.0
        places.release("b", 2)
        assert taken(places, "b")["b"] == 1  # it has used them all the time


def test_while_nobody_knows_how_many_there_are_everybody_may() -> None:
    for places in (Shares(lambda: None), FairShares(lambda: None)):
        assert taken(places, "a", "b", at_most=5) == {"a": 5, "b": 5}
