"""Profiles through the API: written, added to, read, erased."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import redis

from bank.manifest import read_manifest
from bench.rig.tiny import world
from server.settings import Settings
from server.store.tenants.user_key import UserKeys
from tests.support.gateway import SECRET, GatewayThread

NewUser = Callable[[], str]


def texts(*numbers: int) -> list[dict[str, Any]]:
    return [{"id": f"n{number}", "text": f"{world(number % 6)}, part {number}"} for number in numbers]


def put(client: httpx.Client, user_id: str, items: list[dict[str, Any]]) -> dict[str, Any]:
    return client.put(f"/users/{user_id}/profile", json={"items": items}).raise_for_status().json()


def post(client: httpx.Client, user_id: str, items: list[dict[str, Any]]) -> dict[str, Any]:
    return client.post(f"/users/{user_id}/profile/items", json={"items": items}).raise_for_status().json()


def counts(answer: dict[str, Any]) -> tuple[int, int, int]:
    return answer["received"], answer["kept"], answer["changed"]


def test_a_profile_answers_with_the_recipe_that_it_makes(
    client: httpx.Client, new_user: NewUser, gateway_settings: Settings
) -> None:
    user_id = new_user()
    answer = put(client, user_id, [{"text": world(3)}])
    assert answer["user_id"] == user_id
    assert answer["anchors"][0]["id"] == "a03"
    assert answer["anchors"][0]["similarity"] == pytest.approx(1, abs=0.01)
    assert answer["recipe"].startswith(f"mta3:{read_manifest(gateway_settings.bank).short}:shared:c+a")
    generated = client.post("/generate", json={"user_id": user_id, "prompt": "x", "max_tokens": 1}).json()
    assert generated["personalization"]["recipe"] == answer["recipe"]
    assert generated["personalization"]["anchors"] == answer["anchors"]


def test_all_shapes_of_items_are_taken_and_strange_fields_ignored(client: httpx.Client, new_user: NewUser) -> None:
    items = [
        {"text": "plain"},
        {"input": "a question", "output": "an answer"},
        {"id": "x", "text": "with an id", "date": "2021-05-13", "nested": {"a": [1, None]}},
    ]
    assert counts(put(client, new_user(), items)) == (3, 3, 3)


def test_repeating_a_request_changes_nothing(
    client: httpx.Client, new_user: NewUser, gateway_settings: Settings
) -> None:
    user_id = new_user()
    first = put(client, user_id, texts(0, 1, 2))
    before = dump(gateway_settings, user_id)
    assert put(client, user_id, texts(0, 1, 2)) == first | {"changed": 0}
    assert counts(post(client, user_id, texts(0, 1, 2))) == (3, 3, 0)
    assert counts(post(client, user_id, texts(1))) == (1, 3, 0)
    assert dump(gateway_settings, user_id) == before
    added = post(client, user_id, texts(3))
    before = dump(gateway_settings, user_id)
    assert post(client, user_id, texts(3)) == added | {"changed": 0}
    assert dump(gateway_settings, user_id) == before


def test_what_a_change_received_kept_and_changed(client: httpx.Client, new_user: NewUser) -> None:
    user_id = new_user()
    assert counts(post(client, user_id, texts(0))) == (1, 1, 1)  # adding to nobody makes a profile
    put(client, user_id, [{"text": "one"}, {"text": "two"}])
    assert counts(post(client, user_id, [{"text": "two"}, {"text": "three"}, {"text": "three"}])) == (3, 3, 1)
    put(client, user_id, [{"id": "a", "text": world(0)}])
    for change, items, changed, nearest in (
        (post, [{"id": "a", "text": world(4)}], (1, 1, 1), "a04"),
        (put, texts(0, 6, 12), (3, 3, 4), "a00"),
        (put, [{"text": world(5)}], (1, 1, 4), "a05"),  # three went, one came
    ):
        answer = change(client, user_id, items)
        assert counts(answer) == changed
        assert answer["anchors"][0]["id"] == nearest
        assert len(items) > 1 or answer["anchors"][0]["similarity"] == pytest.approx(1, abs=0.01)


def test_a_profile_does_not_depend_on_how_it_came_about(client: httpx.Client, new_user: NewUser) -> None:
    at_once, bit_by_bit = new_user(), new_user()
    whole = put(client, at_once, texts(0, 1, 2, 3))
    for number in (0, 1, 2):
        post(client, bit_by_bit, texts(number))
    last = post(client, bit_by_bit, texts(3))
    assert (last["recipe"], last["anchors"]) == (whole["recipe"], whole["anchors"])


def test_only_the_newest_items_are_kept_and_the_answer_says_so(gateway_settings: Settings, new_user: NewUser) -> None:
    user_id = new_user()
    with (
        GatewayThread(gateway_settings.model_copy(update={"profile_items": 3})) as small,
        small.client() as client,
    ):
        assert counts(put(client, user_id, texts(0, 1, 2, 3, 4))) == (5, 3, 3)
        assert counts(post(client, user_id, texts(5))) == (1, 3, 2)  # one came, one went
        assert counts(post(client, user_id, texts(3))) == (1, 3, 0)
        assert counts(post(client, user_id, texts(2))) == (1, 3, 2)
    assert item_ids(gateway_settings, user_id) == {"n4", "n5", "n2"}


def test_what_is_stored_can_be_read(client: httpx.Client, new_user: NewUser) -> None:
    user_id = new_user()
    written = put(client, user_id, texts(0, 1))
    stored = client.get(f"/users/{user_id}").raise_for_status().json()
    assert (stored["user_id"], stored["items"], stored["source"]) == (user_id, 2, "topic")
    assert stored["bytes"] > 2 * 384 * 2
    assert re.fullmatch(r"[0-9a-f]{16}", stored["embedder"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", stored["updated_at"])
    assert (stored["recipe"], stored["anchors"]) == (written["recipe"], written["anchors"])


def test_erasing_leaves_nothing(client: httpx.Client, new_user: NewUser, gateway_settings: Settings) -> None:
    user_id = new_user()
    put(client, user_id, texts(0, 1, 2))
    answer = client.delete(f"/users/{user_id}").json()
    assert answer["erased"] == {"items": 3, "samples": 0, "jobs": 0, "adapters": 0, "keys": 3}
    rewritten_in = datetime.fromisoformat(answer["log_rewritten_by"]) - datetime.now(UTC)
    assert rewritten_in < timedelta(hours=1, minutes=15)
    tombstone = dump(gateway_settings, user_id)
    assert [(name.rpartition(b":")[2], user_id.encode() in value) for name, value in tombstone.items()] == [
        (b"epoch", False)
    ]
    assert client.get(f"/users/{user_id}").status_code == 404
    assert client.delete(f"/users/{user_id}").json() == answer
    who = client.post("/generate", json={"user_id": user_id, "prompt": "x", "max_tokens": 1}).json()["personalization"]
    assert who["level"] == "base"


@pytest.mark.parametrize("user_id", ["ada@example.org", "Ångström", "用户:1", "a+b%20c", "%2F", "x" * 256, "..."])
def test_any_printable_id_works_once_it_is_percent_encoded(client: httpx.Client, user_id: str) -> None:
    path = f"/users/{quote(user_id, safe='')}"
    client.put(f"{path}/profile", json={"items": texts(0)}).raise_for_status()
    assert client.get(path).json()["user_id"] == user_id
    body = {"user_id": user_id, "prompt": "x", "max_tokens": 1}
    assert client.post("/generate", json=body).json()["personalization"]["level"] == "merged"
    client.delete(path).raise_for_status()


def item_ids(settings: Settings, user_id: str) -> set[str]:
    key = UserKeys(SECRET, "default").key(user_id)
    with redis.from_url(settings.redis_url, decode_responses=True) as store:
        return set(store.hkeys(f"mta:{{{key}}}:items"))


def dump(settings: Settings, user_id: str) -> dict[bytes, bytes]:
    key = UserKeys(SECRET, "default").key(user_id)
    with redis.from_url(settings.redis_url) as store:
        return {name: store.dump(name) for name in store.keys(f"mta:{{{key}}}:*")}
