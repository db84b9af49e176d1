"""Who may take another place."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from server.gateway.access import shares
from server.gateway.access.shares import LATELY_S, Shares


def taken(places: Shares, *callers: str, at_most: int = 100) -> dict[str, int]:
    """How many each caller gets who take turns until nobody gets another."""
    got = dict.fromkeys(callers, 0)
    for caller in [*callers] * at_most:
        if places.may_take(caller):
            places.take(caller)
            got[caller] += 1
    return got


@pytest.mark.parametrize(("most", "share"), [(1, 1), (2, 1), (3, 2), (16, 8), (512, 256)])
def test_where_clients_decide_how_long_a_caller_alone_gets_half(most: int, share: int) -> None:
    assert taken(Shares(lambda: most), "a", at_most=most) == {"a": share}


def test_however_many_want_all_of_it_a_newcomer_finds_a_place() -> None:
    places = Shares(lambda: 16)
    assert [taken(places, name)[name] for name in "abcde"] == [8, 4, 2, 1, 1]
    places.give_back("a", 4)
    assert taken(places, "a", "f") == {"a": 0, "f": 2}


def test_where_places_come_back_a_caller_alone_gets_all_of_it() -> None:
    assert taken(Shares(lambda: 7, come_back=True), "a") == {"a": 7}
    assert taken(Shares(lambda: 7, come_back=True), "a", "b", "c") == {"a": 3, "b": 2, "c": 2}


def test_what_others_had_a_minute_ago_is_kept_for_them_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(shares, "time", SimpleNamespace(monotonic=lambda: now_s))
    places = Shares(lambda: 8, come_back=True)
    for _ in range(3):
        places.take("b")
    places.give_back("b", 2)
    assert taken(places, "a")["a"] == 5
    now_s = LATELY_S
    assert taken(places, "a")["a"] == 2


def test_while_nobody_knows_how_many_there_are_everybody_may() -> None:
    assert taken(Shares(lambda: None), "a", "b", at_most=5) == {"a": 5, "b": 5}
