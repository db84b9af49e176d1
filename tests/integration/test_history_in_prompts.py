"""`history`: past items in the prompt, the most relevant first and as many as fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from server.settings import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, generate, wait_until_ready
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
