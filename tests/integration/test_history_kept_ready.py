"""`history` again and again: found fast, and never of a user who is not there any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import redis

from bank.items.profile import Item
from bank.items.retrieval import ItemIndex
from bank.items.tasks import Task
from bench.rig.processes import wait_until
from server.settings import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, chunks_of, generate, give_adapter
from tests.support.openai import metric
from tests.support.past import ITEMS, TURN, asked, pair, put

pytestmark = pytest.mark.usefixtures("known_context")

NewUser = Callable[[], str]


@pytest.fixture
def other_gateway(gateway_settings: Settings) -> Iterator[GatewayThread]:
    """A second gateway on the same store."""
    with GatewayThread(gateway_settings) as running:
        yield running


def test_a_second_request_of_the_same_profile_neither_reads_nor_indexes_the_items(
    client: httpx.Client,
    new_user: NewUser,
    fake_engine: FakeEngine,
    gateway_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    user_id, indexed = new_user(), counted(monkeypatch)
    put(client, user_id, ITEMS)
    generate(client, user_id, prompt=TURN, history=1).raise_for_status()
    before = reads(gateway_settings)
    for turn in (TURN, "and the bread?"):
        generate(client, user_id, prompt=turn, history=1).raise_for_status()
    assert "crusty" in asked(fake_engine)
    assert (reads(gateway_settings) - before, len(indexed)) == (0, 1)


@pytest.mark.parametrize("levels", [["stacked", "merged"], ["stacked", "merged", "base"]])
def test_whoever_speaks_in_the_end_the_history_is_read_searched_and_rendered_once(
    client: httpx.Client,
    new_user: NewUser,
    fake_engine: FakeEngine,
    gateway: GatewayThread,
    monkeypatch: pytest.MonkeyPatch,
    *,
    levels: list[str],
) -> None:
    user_id, searched = new_user(), []
    put(client, user_id, ITEMS)
    asyncio.run(give_adapter(gateway, user_id))
    search = ItemIndex.memories

    def searching(self: ItemIndex, *arguments: Any) -> list[str]:
        searched.append(arguments)
        return search(self, *arguments)

    monkeypatch.setattr(ItemIndex, "memories", searching)
    fake_engine.knobs.user_adapters, fake_engine.knobs.lacks = True, lambda model: level_of(model) in levels[:-1]
    before = reads(gateway.parts.settings)
    answer = generate(client, user_id, prompt=TURN, history=1).raise_for_status().json()
    assert answer["personalization"]["level"] == levels[-1]
    assert [level_of(seen.body["model"]) for seen in fake_engine.seen] == levels
    assert {seen.body["messages"][-1]["content"] for seen in fake_engine.seen} == {
        f'"behind the mill" is the answer to "where is the harbour?". {TURN}'
    }
    assert (reads(gateway.parts.settings) - before, len(searched)) == (1, 1)


def test_requests_that_come_while_a_history_is_indexed_share_the_work_and_hold_up_nobody(
    client: httpx.Client, new_user: NewUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_id, gate = new_user(), threading.Event()
    indexed = counted(monkeypatch, gate)
    put(client, user_id, ITEMS)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(generate, client, user_id, prompt=TURN, history=1) for _ in range(4)]
        wait_until(lambda: bool(indexed), "the index to be begun")
        client.get("/health").raise_for_status()
        generate(client, user_id, prompt=TURN).raise_for_status()
        gate.set()
        assert {answer.result().status_code for answer in waiting} == {200}
    assert len(indexed) == 1


@pytest.mark.parametrize("history", ["auto", 1])
@pytest.mark.parametrize("route", ["/generate", "/v1/chat/completions"])
@pytest.mark.usefixtures("helpful")
def test_who_waits_too_long_for_others_histories_is_answered_without_one_and_told_so(
    client: httpx.Client,
    new_user: NewUser,
    fake_engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    *,
    route: str,
    history: int | str,
) -> None:
    first, second, gate = new_user(), new_user(), threading.Event()
    indexed = counted(monkeypatch, gate)
    for user_id in (first, second):
        put(client, user_id, ITEMS)
    turn = {"prompt": TURN} if route == "/generate" else {"messages": [{"role": "user", "content": TURN}]}
    who = {"user_id" if route == "/generate" else "user": second}
    body = who | turn | {"max_tokens": 4, "history": history}
    before = metric(client, "mta_histories_left_out_total")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(generate, client, first, prompt=TURN, history=1)
        wait_until(lambda: bool(indexed), "the index to be begun")
        hurry = {"X-Queue-Timeout": "0.1"}
        answer = client.post(route, json=body, headers=hurry).raise_for_status().json()
        assert asked(fake_engine) == TURN
        streamed = chunks_of(client.post(route, json=body | {"stream": True}, headers=hurry))
        assert "could not be read in time" in streamed[0]["personalization"]["history_reason"]
        gate.set()
        assert waiting.result().json()["personalization"]["history"] == 1
    told = answer["personalization"]
    assert (told["level"], told["history"]) == ("merged", 0)
    assert "could not be read in time" in told["history_reason"]
    assert metric(client, "mta_histories_left_out_total") == before + 2
    wait_until(lambda: len(indexed) == 2, "the second history to be indexed")  # for the next request
    answer = client.post(route, json=body).raise_for_status().json()
    assert (answer["personalization"]["history"], answer["personalization"]["history_reason"]) == (1, None)
    assert len(indexed) == 2


def test_what_another_gateway_changes_is_seen_at_once(
    client: httpx.Client, other_gateway: GatewayThread, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    user_id = new_user()
    put(client, user_id, ITEMS)
    generate(client, user_id, prompt=TURN, history=1).raise_for_status()
    with other_gateway.client() as other:
        put(other, user_id, [ITEMS[0], pair("harbour", "where is the harbour?", "gone"), ITEMS[2]])
    generate(client, user_id, prompt=TURN, history=1).raise_for_status()
    assert asked(fake_engine) == f'"gone" is the answer to "where is the harbour?". {TURN}'


def test_nothing_of_an_erased_user_comes_back_even_when_they_do(
    client: httpx.Client, other_gateway: GatewayThread, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    user_id = new_user()
    put(client, user_id, ITEMS)
    generate(client, user_id, prompt=TURN, history=3).raise_for_status()
    with other_gateway.client() as other:
        other.delete(f"/users/{user_id}").raise_for_status()
        generate(client, user_id, prompt=TURN, history=3).raise_for_status()
        assert asked(fake_engine) == TURN
        put(other, user_id, [pair("sea", "and the sea?", "salty"), ITEMS[0], ITEMS[2]])
    generate(client, user_id, prompt=TURN, history=3).raise_for_status()
    assert "salty" in asked(fake_engine)
    assert "mill" not in asked(fake_engine)


def level_of(model: str) -> str:
    """The level of an answer, by the name that the engine was asked for."""
    return "stacked" if ":u-" in model else "base" if model == "base" else "merged"


def reads(settings: Settings) -> int:
    """How often whole hashes were read from the store so far."""
    with redis.from_url(settings.redis_url) as store:
        return int(store.info("commandstats").get("cmdstat_hgetall", {}).get("calls", 0))


def counted(monkeypatch: pytest.MonkeyPatch, gate: threading.Event | None = None) -> list[int]:
    """Grows by one with every index that is begun; each waits for the gate, if there is one."""
    begun: list[int] = []
    build = ItemIndex.__init__

    def counting(self: ItemIndex, task: Task, items: Sequence[Item]) -> None:
        begun.append(len(items))
        if gate is not None:
            assert gate.wait(30)
        build(self, task, items)

    monkeypatch.setattr(ItemIndex, "__init__", counting)
    return begun
