"""`history`: past items in the prompt, the most relevant first and as many as fit; indexed once, and never stale."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis
from httpx import Client

from bank.items.profile import Item
from bank.items.retrieval import ItemIndex
from bank.items.tasks import Task
from bench.rig.processes import wait_until
from server.settings import Settings
from tests.support.calls import ITEMS, TURN, NewUser, asked, pair, put, who
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, chunks_of, generate, give_adapter, metric, wait_until_ready

pytestmark = pytest.mark.usefixtures("known_context")

CONTEXT = 512
SAID = [{"role": "user", "content": TURN}]
ROUTES = {"/generate": {"prompt": TURN, "max_tokens": 4}, "/v1/chat/completions": {"messages": SAID, "max_tokens": 4}}
QUOTED = f'"behind the mill" is the answer to "where is the harbour?". {TURN}'


@pytest.fixture(scope="module")
def other_gateway(gateway_settings: Settings) -> Iterator[GatewayThread]:
    """A second gateway on the same store, which takes short prompts only."""
    with GatewayThread(gateway_settings, max_prompt_chars=100) as running:
        yield running


@pytest.fixture
def user(client: Client, new_user: NewUser) -> str:
    """A user whose history is `ITEMS`."""
    user_id = new_user()
    put(client, user_id)
    return user_id


def body_of(route: str, user_id: str, **fields: Any) -> dict[str, Any]:
    return ROUTES[route] | {"user_id" if route == "/generate" else "user": user_id} | fields


def level_of(model: str) -> str:
    """The level of an answer by the engine's model name."""
    return "stacked" if ":u-" in model else "base" if model == "base" else "merged"


def reads(settings: Settings) -> int:
    """How often whole hashes have been read from the store."""
    with redis.from_url(settings.redis_url) as store:
        return int(store.info("commandstats").get("cmdstat_hgetall", {}).get("calls", 0))


def count_builds(monkeypatch: pytest.MonkeyPatch, gate: threading.Event | None = None) -> list[int]:
    """A list that grows by one with every index build; each build waits for the gate, if there is one."""
    begun: list[int] = []
    build = ItemIndex.__init__

    def counting(self: ItemIndex, task: Task, items: Sequence[Item]) -> None:
        begun.append(len(items))
        assert gate is None or gate.wait(30)
        build(self, task, items)

    monkeypatch.setattr(ItemIndex, "__init__", counting)
    return begun


def test_the_most_relevant_items_stand_before_the_last_turn(client: Client, user: str, fake_engine: FakeEngine) -> None:
    generate(client, user, prompt=TURN, history=1).raise_for_status()
    assert asked(fake_engine) == QUOTED
    messages = [{"role": "system", "content": "Be brief."}, *SAID]
    generate(client, user, prompt=None, messages=messages, history=3).raise_for_status()
    assert fake_engine.seen[-1].body["messages"][0] == messages[0]
    assert asked(fake_engine).startswith('"behind the mill"')
    assert "crusty" in asked(fake_engine)


@pytest.mark.parametrize(("fields", "helps", "items"), [
    ({}, False, (0, 0)), ({"history": "auto"}, False, (0, 0)), ({"history": 2}, False, (2, 2)),
    ({}, True, (1, 0)), ({"history": "auto"}, True, (1, 1)), ({"history": 0}, True, (0, 0)),
])  # fmt: skip
def test_auto_history_follows_verdict_and_is_default_of_generate(
    request: pytest.FixtureRequest, client: Client, user: str, *, fields: dict[str, Any], helps: bool, items: list[int]
) -> None:
    if helps:
        request.getfixturevalue("helpful")
    answers = [who(client.post(route, json=body_of(route, user, **fields))) for route in ROUTES]
    assert [answer["history"] for answer in answers] == list(items)


def test_messages_stay_unchanged(client: Client, user: str, new_user: NewUser, fake_engine: FakeEngine) -> None:
    for user_id, messages, personalize in (
        (user, [*SAID, {"role": "assistant", "content": "Well,"}], "auto"),
        (user, [*SAID, {"role": "system", "content": "Go on."}], "auto"),
        (user, SAID, "none"),
        (new_user(), SAID, "auto"),
    ):
        answer = generate(client, user_id, prompt=None, messages=messages, history=3, personalize=personalize)
        assert (who(answer)["history"], fake_engine.seen[-1].body["messages"]) == (0, messages)


def test_the_least_relevant_items_are_left_out_first(client: Client, user: str, fake_engine: FakeEngine) -> None:
    answers = [f"{'harbour ' * n}{'ä' * (80 - 8 * n)}" for n in (3, 2, 1)]  # two bytes a letter, one token here
    put(client, user, [pair(f"n{n}", "?", answer) for n, answer in enumerate(answers)])
    for max_tokens, quoted in ((64, 3), (200, 2), (300, 1), (480, 0)):
        answer = generate(client, user, prompt=TURN, max_tokens=max_tokens, history=16)
        assert who(answer)["history"] == quoted
        assert [answer in asked(fake_engine) for answer in answers] == [True] * quoted + [False] * (3 - quoted)
        assert len(asked(fake_engine)) + max_tokens <= CONTEXT


def test_an_item_that_does_not_fit_keeps_no_other_out(
    client: Client, user: str, fake_engine: FakeEngine, other_gateway: GatewayThread
) -> None:
    with other_gateway.client() as short:
        wait_until_ready(short)
        generate(short, user, prompt=TURN, history=16).raise_for_status()
    assert "behind the mill" in asked(fake_engine)
    assert len(asked(fake_engine)) <= 100
    for words, counts in ((100, True), (30, False)):  # 30 would fit, but then the engine does not count tokens
        fake_engine.knobs.counts = counts
        put(client, user, [*ITEMS, pair("long", "harbour?", "harbour " * words)])
        generate(client, user, prompt=TURN, history=16).raise_for_status()
        assert ("behind the mill" in asked(fake_engine), "harbour harbour" in asked(fake_engine)) == (True, False)
        assert len(asked(fake_engine)) < CONTEXT


def test_a_second_request_neither_reads_nor_indexes_the_items(
    client: Client, user: str, fake_engine: FakeEngine, gateway_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed = count_builds(monkeypatch)
    generate(client, user, prompt=TURN, history=1).raise_for_status()
    before = reads(gateway_settings)
    for turn in (TURN, "and the bread?"):
        generate(client, user, prompt=turn, history=1).raise_for_status()
    assert "crusty" in asked(fake_engine)
    assert (reads(gateway_settings) - before, len(indexed)) == (0, 1)


@pytest.mark.parametrize("levels", [["stacked", "merged"], ["stacked", "merged", "base"]])
def test_a_fallback_does_not_read_or_search_the_history_again(
    client: Client, user: str, fake_engine: FakeEngine, gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch,
    *, levels: list[str],
) -> None:  # fmt: skip
    searched, search = list[Any](), ItemIndex.memories
    asyncio.run(give_adapter(gateway, user))
    monkeypatch.setattr(ItemIndex, "memories", lambda *given: (searched.append(given), search(*given))[1])
    fake_engine.knobs.user_adapters, fake_engine.knobs.lacks = True, lambda model: level_of(model) in levels[:-1]
    before = reads(gateway.opened.settings)
    assert who(generate(client, user, prompt=TURN, history=1))["level"] == levels[-1]
    assert [level_of(seen.body["model"]) for seen in fake_engine.seen] == levels
    assert {seen.body["messages"][-1]["content"] for seen in fake_engine.seen} == {QUOTED}
    assert (reads(gateway.opened.settings) - before, len(searched)) == (1, 1)


@pytest.mark.parametrize(("route", "history"), [("/generate", "auto"), ("/v1/chat/completions", 1)])
@pytest.mark.usefixtures("helpful")
def test_request_waiting_too_long_for_history_goes_without(
    client: Client, user: str, new_user: NewUser, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch,
    *, route: str, history: int | str,
) -> None:  # fmt: skip
    first, gate = new_user(), threading.Event()
    put(client, first)
    indexed = count_builds(monkeypatch, gate)
    body, hurry = body_of(route, user, history=history), {"X-Queue-Timeout": "0.1"}
    before = metric(client, "mta_histories_left_out_total")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(generate, client, first, prompt=TURN, history=1)
        wait_until(lambda: bool(indexed), "the first index build")
        told = who(client.post(route, json=body, headers=hurry))
        assert asked(fake_engine) == TURN
        streamed = chunks_of(client.post(route, json=body | {"stream": True}, headers=hurry))[0]["personalization"]
        gate.set()
        assert who(waiting.result())["history"] == 1
    for late in (told, streamed):
        assert (late["level"], late["history"]) == ("merged", 0)
        assert "could not be read in time" in late["history_reason"]
    assert metric(client, "mta_histories_left_out_total") == before + 2
    wait_until(lambda: len(indexed) == 2, "the second index build")  # for the next request
    told = who(client.post(route, json=body))
    assert (told["history"], told["history_reason"], len(indexed)) == (1, None, 2)


def test_items_without_anything_to_quote_say_so(client: Client, new_user: NewUser) -> None:
    told = put(client, user := new_user(), [{"text": "Yes."}, ITEMS[0]])
    assert told["hint"].startswith("1 of 2 items tell topics alone: 'Yes.' is too short to learn from")
    assert put(client, user, [{"text": "Yes, behind the mill. " * 20}])["hint"] is None
    assert who(generate(client, user, prompt=TURN, history=1))["history_reason"] is None
    put(client, user, [{"text": "Yes."}])
    before = metric(client, "mta_histories_left_out_total")
    told = who(generate(client, user, prompt=TURN, history=1))
    assert (told["history"], told["history_reason"]) == (
        0,
        "none of the user's items has the fields that prompts quote",
    )
    assert metric(client, "mta_histories_left_out_total") == before


def test_changes_through_another_gateway_are_seen_at_once(
    client: Client, other_gateway: GatewayThread, user: str, fake_engine: FakeEngine
) -> None:
    generate(client, user, prompt=TURN, history=3).raise_for_status()
    with other_gateway.client() as other:
        put(other, user, [ITEMS[0], pair("harbour", "where is the harbour?", "gone"), ITEMS[2]])
        generate(client, user, prompt=TURN, history=1).raise_for_status()
        assert asked(fake_engine) == f'"gone" is the answer to "where is the harbour?". {TURN}'
        other.delete(f"/users/{user}").raise_for_status()
        generate(client, user, prompt=TURN, history=3).raise_for_status()
        assert asked(fake_engine) == TURN
        put(other, user, [pair("sea", "and the sea?", "salty"), ITEMS[0], ITEMS[2]])
    generate(client, user, prompt=TURN, history=3).raise_for_status()
    assert ("salty" in asked(fake_engine), "gone" in asked(fake_engine)) == (True, False)
