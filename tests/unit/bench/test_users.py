"""Users of a file served by a running server: when their recipes stay, what is counted, and whose key is shown."""

from __future__ import annotations

from collections.abc import Iterator
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

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self.looks: dict[str, int] = {}
        self.keys = set[str | None]()

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.keys.add(request.headers.get("Authorization"))
        if request.url.path == "/bank":
            return httpx.Response(200, json={"rule": {"name": self.rule}})
        user = request.url.path.rpartition("/")[2]
        self.looks[user] = self.looks.get(user, 0) + 1
        signed = user != "plain" and self.looks[user] > int(user)
        source = "signature" if signed else "topic"
        return httpx.Response(200, json=USER | {"user_id": user, "source": source})


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig, "PATIENCE_S", 0.1)
    monkeypatch.setattr(rig, "POLL_S", 0.001)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("MTA_API_KEY", KEY)
    return Server("signature")


@pytest.fixture
def client(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    transport = httpx.MockTransport(server.answer)
    with httpx.Client(transport=transport) as plain, Client("http://mta", transport=transport) as client:
        monkeypatch.setattr(httpx, "get", plain.get)
        yield client


def test_the_wait_is_over_when_all_are_signed_who_can_be_by_a_bank_with_signatures(
    server: Server, client: Client, patience: None
) -> None:
    assert until_signed(client, ["0", "2", "plain", "5"]) == {"plain"}
    assert (server.looks["0"], server.looks["2"], server.looks["5"]) == (1, 3, 6)
    assert server.keys == {f"Bearer {KEY}"}
    server.rule, server.looks = "topic", {}
    assert until_signed(client, ["0", "plain"]) == {"0", "plain"}
    assert server.looks == {}


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


def wrong(*queries: Query) -> list[str]:
    return [what for what, _, good in judged(queries) if not good]


def test_people_share_recipes_by_topic_but_not_by_signature() -> None:
    assert wrong(*(query(f"{n}", f"r{n % 2}", "topic") for n in range(10))) == []
    assert wrong(*(query(f"{n}", f"r{n}") for n in range(10))) == []
    assert wrong(*(query(f"{n}", f"r{n % 2}") for n in range(10))) == ["of them by signature"]
    assert wrong(*(query(f"{n}", "r", "topic") for n in range(10))) == ["distinct recipes"]


def test_another_recipe_explains_another_answer_and_is_wrong_by_itself() -> None:
    moved = replace(query("b", "r2", "topic"), recipe_again="r3", again="mine, but otherwise")
    assert not moved.differs
    assert wrong(query("a", "r1"), moved) == ["answers with the same recipe when asked again"]


def test_another_answer_by_the_same_recipe_must_be_a_near_tie() -> None:
    many = [query(f"{n}", f"r{n}") for n in range(60)]
    changed = replace(query("b", "r"), again="mine, but otherwise")
    assert changed.differs
    assert wrong(*many, changed) == ["unexplained differences"]
    assert wrong(*many, replace(changed, gap_nats=0.5)) == ["unexplained differences"]
    assert wrong(*many, replace(changed, gap_nats=0.1)) == []
    assert wrong(changed, query("a", "r1")) == ["of them equal, alone", "unexplained differences"]
