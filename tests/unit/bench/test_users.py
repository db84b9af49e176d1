"""Users of a file served by a running server: when their recipes stay, what is counted, and whose key is shown."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from bench.rig import client as rig
from bench.rig.client import until_signed
from bench.serving import gateway
from bench.serving.users import Query, judged
from mta_client import Client

KEY = "mta_of_the_reader"
USER: dict[str, Any] = {
    "items": 3,
    "bytes": 900,
    "embedder": "e",
    "updated_at": "2026-01-01T00:00:00Z",
    "recipe": "mta3:00000000:shared:c",
    "anchors": [],
    "at": None,
    "adapter": None,
}


class Server:
    """A server whose worker reads one user's items with every look at them; it never signs whoever is `plain`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rule = "signature"
        self.looks = Counter[str]()
        self.keys = set[str | None]()
        monkeypatch.setattr(rig, "PATIENCE_S", 0.1)
        monkeypatch.setattr(rig, "POLL_S", 0.001)
        monkeypatch.setenv("MTA_API_KEY", KEY)

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.keys.add(request.headers.get("Authorization"))
        if request.url.path == "/bank":
            return httpx.Response(200, json={"rule": {"name": self.rule}})
        user = request.url.path.rpartition("/")[2]
        self.looks[user] += 1
        signed = user != "plain" and self.looks[user] > int(user)
        return httpx.Response(200, json=USER | {"user_id": user, "source": "signature" if signed else "topic"})


def test_the_wait_is_over_when_all_are_signed_who_can_be_by_a_bank_with_signatures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(monkeypatch)
    transport = httpx.MockTransport(server.answer)
    with httpx.Client(transport=transport) as plain, Client("http://mta", transport=transport) as client:
        monkeypatch.setattr(httpx, "get", plain.get)
        assert until_signed(client, ["0", "2", "plain", "5"]) == {"plain"}
        assert (server.looks["0"], server.looks["2"], server.looks["5"]) == (1, 3, 6)
        assert server.keys == {f"Bearer {KEY}"}
        server.rule = "topic"
        server.looks.clear()
        assert until_signed(client, ["0", "plain"]) == {"0", "plain"}
        assert not server.looks


def test_the_key_goes_to_the_gateway_and_the_engine_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "put_profile", lambda *_: SimpleNamespace(recipe="mta3:00000000:shared:c"))
    for key, shown in ((KEY, {"Authorization": f"Bearer {KEY}"}), ("", {})):
        monkeypatch.setenv("MTA_API_KEY", key)
        sides = gateway._sides("http://gateway", "http://engine", "inner", 4)
        assert sides["gateway"].headers == shown
        assert sides["engine"].headers == {"Authorization": "Bearer inner"}


def query(user: str, recipe: str, source: str = "signature") -> Query:
    made = Query(user, f"q-{user}", "?", "!", "merged", recipe, source, recipe_again=recipe)
    return replace(made, merged="mine", none="anybody's", again="mine")


TOPICS, SIGNED = ([query(f"{n}", f"r{n % 2}", source) for n in range(10)] for source in ("topic", "signature"))
MANY = [query(f"{n}", f"r{n}") for n in range(60)]
MOVED = replace(query("b", "r2", "topic"), recipe_again="r3", again="mine, but otherwise")
CHANGED = replace(query("b", "r"), again="mine, but otherwise")


@pytest.mark.parametrize(
    ("queries", "wrong"),
    [
        (TOPICS, []),  # people share recipes by topic, but not by signature
        (MANY[:10], []),
        (SIGNED, ["of them by signature"]),
        ([query(f"{n}", "r", "topic") for n in range(10)], ["distinct recipes"]),
        # Another recipe explains another answer, and is wrong by itself.
        ([query("a", "r1"), MOVED], ["answers with the same recipe when asked again"]),
        # Another answer by the same recipe must be a near tie.
        ([*MANY, CHANGED], ["unexplained differences"]),
        ([*MANY, replace(CHANGED, gap_nats=0.5)], ["unexplained differences"]),
        ([*MANY, replace(CHANGED, gap_nats=0.1)], []),
        ([CHANGED, query("a", "r1")], ["of them equal, alone", "unexplained differences"]),
    ],
)
def test_what_is_wrong_with_answers_is_named(queries: list[Query], wrong: list[str]) -> None:
    assert [what for what, _, good in judged(queries) if not good] == wrong
    assert CHANGED.differs and not MOVED.differs
