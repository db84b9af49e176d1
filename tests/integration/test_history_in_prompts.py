"""`history`: past items in the prompt, the most relevant first and as many as fit; kept ready, and never stale."""

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
from tests.support.gateway import GatewayThread, chunks_of, generate, give_adapter, wait_until_ready
from tests.support.openai import metric
from tests.support.past import ITEMS, TURN, asked, pair, put

pytestmark = pytest.mark.usefixtures("known_context")

NewUser = Callable[[], str]
CONTEXT = 512


def test_the_most_relevant_items_stand_before_the_last_turn(
    client: httpx.Client, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    user_id = new_user()
    put(client, user_id, ITEMS)
    generate(client, user_id, prompt=TURN, history=1).raise_for_status()
    assert asked(fake_engine) == f'"behind the mill" is the answer to "where is the harbour?". {TURN}'
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TURN}]
    generate(client, user_id, prompt=None, messages=messages, history=3).raise_for_status()
    assert fake_engine.seen[-1].body["messages"][0] == messages[0]
    assert asked(fake_engine).startswith('"behind the mill"')
    assert "crusty" in asked(fake_engine)


CHAT = {"messages": [{"role": "user", "content": TURN}], "max_tokens": 4}
ROUTES = {"/generate": {"prompt": TURN, "max_tokens": 4}, "/v1/chat/completions": CHAT}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("fields", "helps", "items"), [
    ({}, False, (0, 0)), ({"history": "auto"}, False, (0, 0)), ({"history": 2}, False, (2, 2)),
    ({}, True, (1, 0)), ({"history": "auto"}, True, (1, 1)), ({"history": 0}, True, (0, 0)),
])  # fmt: skip
def test_auto_is_what_the_bank_was_found_to_gain_by_and_the_default_of_generate_alone(
    request: pytest.FixtureRequest,
    client: httpx.Client,
    new_user: NewUser,
    fake_engine: FakeEngine,
    *,
    route: str,
    fields: dict[str, Any],
    helps: bool,
    items: tuple[int, int],
) -> None:
    if helps:
        request.getfixturevalue("helpful")
    user_id = new_user()
    put(client, user_id, ITEMS)
    who = {"user_id" if route == "/generate" else "user": user_id}
    answer = client.post(route, json=ROUTES[route] | who | fields).raise_for_status().json()
    wanted = items[list(ROUTES).index(route)]
    assert answer["personalization"]["history"] == wanted
    assert asked(fake_engine).count("is the answer to") == wanted


@pytest.mark.parametrize("last", [{"role": "assistant", "content": "Well,"}, {"role": "system", "content": "Go on."}])
def test_items_go_before_a_users_own_turn_only(
    client: httpx.Client, new_user: NewUser, fake_engine: FakeEngine, last: dict[str, str]
) -> None:
    user_id = new_user()
    put(client, user_id, ITEMS)
    messages = [{"role": "user", "content": TURN}, last]
    answer = generate(client, user_id, prompt=None, messages=messages, history=2).raise_for_status().json()
    assert answer["personalization"]["history"] == 0
    assert fake_engine.seen[-1].body["messages"] == messages


@pytest.mark.parametrize("personalize", ["none", "auto"])
def test_who_is_unknown_or_asks_for_the_base_model_gets_the_turn_alone(
    client: httpx.Client, new_user: NewUser, fake_engine: FakeEngine, personalize: str
) -> None:
    user_id = new_user()
    if personalize == "none":
        put(client, user_id, ITEMS)
    answer = generate(client, user_id, prompt=TURN, history=3, personalize=personalize).raise_for_status().json()
    assert answer["personalization"]["history"] == 0
    assert asked(fake_engine) == TURN


@pytest.mark.parametrize(("max_tokens", "quoted"), [(64, 3), (200, 2), (300, 1), (480, 0)])
def test_items_that_the_context_has_no_room_for_are_left_out_the_least_relevant_first(
    client: httpx.Client, new_user: NewUser, fake_engine: FakeEngine, max_tokens: int, quoted: int
) -> None:
    user_id = new_user()
    answers = [f"{'harbour ' * n}{'ä' * (80 - 8 * n)}" for n in range(1, 4)]  # two bytes a letter, one token here
    put(client, user_id, [pair(f"n{n}", "?", answer) for n, answer in enumerate(answers)])
    answer = generate(client, user_id, prompt=TURN, max_tokens=max_tokens, history=16).raise_for_status().json()
    assert answer["personalization"]["history"] == quoted
    best_first = answers[::-1]
    assert [answer in asked(fake_engine) for answer in best_first] == [True] * quoted + [False] * (3 - quoted)
    assert len(asked(fake_engine)) + max_tokens <= CONTEXT


def test_an_item_that_never_fits_does_not_keep_the_others_out(
    client: httpx.Client, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    user_id = new_user()
    put(client, user_id, [*ITEMS, pair("long", "harbour?", "harbour " * 100)])
    generate(client, user_id, prompt=TURN, history=16).raise_for_status()
    assert "behind the mill" in asked(fake_engine)
    assert len(asked(fake_engine)) < CONTEXT


def test_where_the_engine_counts_no_tokens_only_what_surely_fits_is_put_in(
    client: httpx.Client, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    user_id = new_user()
    fake_engine.knobs.counts = False
    put(client, user_id, [*ITEMS, pair("long", "harbour?", "harbour " * 30)])
    generate(client, user_id, prompt=TURN, history=16).raise_for_status()
    assert "behind the mill" in asked(fake_engine)
    assert "harbour harbour" not in asked(fake_engine)


def test_the_longest_prompt_holds_for_what_is_built_too(
    gateway_settings: Settings, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    user_id = new_user()
    settings = gateway_settings.model_copy(update={"max_prompt_chars": 100})
    with GatewayThread(settings) as short, short.client() as client:
        wait_until_ready(client)
        put(client, user_id, ITEMS)
        generate(client, user_id, prompt=TURN, history=3).raise_for_status()
    assert "behind the mill" in asked(fake_engine)
    assert len(asked(fake_engine)) <= 100


def test_only_the_newest_items_that_fit_into_the_bytes_of_a_user_are_kept(
    gateway_settings: Settings, new_user: NewUser
) -> None:
    user_id = new_user()
    items = [{"id": f"n{n}", "text": "x" * 89} for n in range(6)]  # 100 bytes each as JSON
    small = gateway_settings.model_copy(update={"profile_bytes": 350})
    with GatewayThread(small) as gateway, gateway.client() as client:
        answer = put(client, user_id, items[:5])
        assert (answer["received"], answer["kept"]) == (5, 3)
        added = client.post(f"/users/{user_id}/profile/items", json={"items": items[5:]}).json()
        assert (added["received"], added["kept"], added["changed"]) == (1, 3, 2)


@pytest.fixture(scope="module")
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


@pytest.mark.parametrize(("route", "history"), [("/generate", 1), ("/generate", "auto"), ("/v1/chat/completions", 1)])
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
    body = ROUTES[route] | {"user_id" if route == "/generate" else "user": second, "history": history}
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
