"""Users through the API: profiles are written, added to and read; erasing is a barrier to requests in progress."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from urllib.parse import quote

import pytest
import redis
from httpx import Client

from bench.rig.tiny import world
from server.errors import Unavailable
from tests.support.calls import NewUser, error_of, put, who
from tests.support.gateway import GatewayThread, generate, give_adapter

ITEMS = [{"text": "up at five for the waves"}]
BODIES = {
    "profile": {"items": ITEMS},
    "profile/items": {"items": ITEMS},
    "adapt": {"samples": [{"input": f"question {n}", "output": f"{n} yes"} for n in range(3)]},
}


def texts(*numbers: int) -> list[dict[str, Any]]:
    return [{"id": f"n{number}", "text": f"{world(number % 6)}, part {number}"} for number in numbers]


def post(client: Client, user_id: str, items: list[dict[str, Any]]) -> dict[str, Any]:
    return client.post(f"/users/{user_id}/profile/items", json={"items": items}).raise_for_status().json()


def counts(answer: dict[str, Any]) -> tuple[int, int, int]:
    return answer["received"], answer["kept"], answer["changed"]


def dump(gateway: GatewayThread, user_id: str) -> dict[bytes, bytes]:
    """Everything that the store holds of a user."""
    with redis.from_url(gateway.opened.settings.redis_url) as store:
        return {name: store.dump(name) for name in store.keys(f"mta:{{{gateway.key(user_id)}}}:*")}


def test_a_profile_is_answered_with_its_recipe(client: Client, new_user: NewUser, gateway: GatewayThread) -> None:
    user_id = new_user()
    answer = put(client, user_id, [{"text": world(3)}])
    assert (answer["user_id"], answer["anchors"][0]["id"]) == (user_id, "a03")
    assert answer["anchors"][0]["similarity"] == pytest.approx(1, abs=0.01)
    assert answer["recipe"].startswith(f"mta3:{gateway.parts.bank.manifest.short}:shared:c+a")
    stored = client.get(f"/users/{user_id}").raise_for_status().json()
    assert (stored["user_id"], stored["items"], stored["source"]) == (user_id, 1, "topic")
    assert stored["bytes"] > 384 * 2
    assert re.fullmatch(r"[0-9a-f]{16}", stored["embedder"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", stored["updated_at"])
    for same in (stored, who(generate(client, user_id))):
        assert (same["recipe"], same["anchors"]) == (answer["recipe"], answer["anchors"])


def test_what_changed_and_what_had_to_go_are_two_numbers(client: Client, new_user: NewUser) -> None:
    user_id = new_user()
    put(client, user_id, texts(0))
    answer = put(client, user_id, texts(1))
    assert (*counts(answer), answer["removed"]) == (1, 1, 1, 1)
    answer = put(client, user_id, texts(1, 2))
    assert (*counts(answer), answer["removed"]) == (2, 2, 1, 0)


def test_items_are_listed_with_what_each_teaches(client: Client, new_user: NewUser) -> None:
    user_id = new_user()
    put(client, user_id, [{"id": "pair", "input": "Tea?", "output": "Yes."}, {"id": "long", "text": "word " * 100}])
    post(client, user_id, [{"id": "short", "text": "ok"}])
    listed = client.get(f"/users/{user_id}/profile/items").raise_for_status().json()
    assert [(item["id"], item["teaches"]) for item in listed["items"]] == [
        ("short", "too_short"),
        ("long", "lesson"),
        ("pair", "lesson"),
    ]
    assert "400 characters" in listed["items"][0]["reason"] and listed["items"][1]["reason"] is None
    assert (len(listed["items"][1]["text"]), listed["items"][2]["text"]) == (300, "Tea?\nYes.")
    newest = client.get(f"/users/{user_id}/profile/items", params={"limit": 1}).raise_for_status().json()
    assert newest["items"] == listed["items"][:1]
    assert error_of(client.get(f"/users/{new_user()}/profile/items"))[0] == 404


async def test_a_user_is_shown_with_the_recipe_that_serves_them(
    client: Client, gateway: GatewayThread, new_user: NewUser
) -> None:
    user_id = new_user()
    put(client, user_id, texts(3))
    await give_adapter(gateway, user_id)
    shown = client.get(f"/users/{user_id}").raise_for_status().json()
    assert shown["recipe"] == shown["adapter"]["recipe"]
    assert [(anchor["id"], anchor["weight"]) for anchor in shown["anchors"]] == [("a01", 0.5)]


def test_repeating_a_request_changes_nothing(client: Client, new_user: NewUser, gateway: GatewayThread) -> None:
    user_id = new_user()
    first = put(client, user_id, texts(0, 1, 2))
    before = dump(gateway, user_id)
    assert put(client, user_id, texts(0, 1, 2)) == first | {"changed": 0}
    assert counts(post(client, user_id, texts(0, 1, 2))) == (3, 3, 0)
    assert counts(post(client, user_id, texts(1))) == (1, 3, 0)
    assert dump(gateway, user_id) == before
    added = post(client, user_id, texts(3))
    before = dump(gateway, user_id)
    assert post(client, user_id, texts(3)) == added | {"changed": 0}
    assert dump(gateway, user_id) == before
    at_once = put(client, new_user(), texts(0, 1, 2, 3))
    assert (added["recipe"], added["anchors"]) == (at_once["recipe"], at_once["anchors"])


def test_what_a_change_received_kept_and_changed(client: Client, new_user: NewUser) -> None:
    user_id = new_user()
    assert counts(post(client, user_id, texts(0))) == (1, 1, 1)  # adding to nobody makes a profile
    shapes = [{"input": "a question", "output": "an answer"}, {"text": "plain", "nested": {"a": [1, None]}}]
    assert counts(put(client, user_id, shapes)) == (2, 2, 2)
    put(client, user_id, [{"text": "one"}, {"text": "two"}])
    assert counts(post(client, user_id, [{"text": "two"}, {"text": "three"}, {"text": "three"}])) == (3, 3, 1)
    put(client, user_id, [{"id": "a", "text": world(0)}])
    for change, items, changed, nearest in (
        (post, [{"id": "a", "text": world(4)}], (1, 1, 1), "a04"),
        (put, texts(0, 6, 12), (3, 3, 3), "a00"),
        (put, [{"text": world(5)}], (1, 1, 1), "a05"),
    ):
        answer = change(client, user_id, items)
        assert (counts(answer), answer["anchors"][0]["id"]) == (changed, nearest)
        assert len(items) > 1 or answer["anchors"][0]["similarity"] == pytest.approx(1, abs=0.01)


def test_erasing_leaves_nothing(client: Client, new_user: NewUser, gateway: GatewayThread) -> None:
    user_id = new_user()
    put(client, user_id, texts(0, 1, 2))
    answer = client.delete(f"/users/{user_id}").json()
    assert answer["erased"] == {"items": 3, "samples": 0, "jobs": 0, "adapters": 0, "keys": 3, "feedback": 0}
    rewritten_in = datetime.fromisoformat(answer["log_rewritten_by"]) - datetime.now(UTC)
    assert rewritten_in < timedelta(hours=1, minutes=15)
    ((name, value),) = dump(gateway, user_id).items()
    assert (name.rpartition(b":")[2], user_id.encode() in value) == (b"epoch", False)
    assert client.get(f"/users/{user_id}").status_code == 404
    assert client.delete(f"/users/{user_id}").json() == answer
    assert who(generate(client, user_id))["level"] == "base"


@pytest.mark.parametrize("user_id", ["ada@example.org", "Ångström", "用户:1", "a+b%20c", "%2F", "x" * 256, "..."])
def test_any_printable_id_works_once_it_is_percent_encoded(client: Client, user_id: str) -> None:
    path = f"/users/{quote(user_id, safe='')}"
    client.put(f"{path}/profile", json={"items": texts(0)}).raise_for_status()
    assert client.get(path).json()["user_id"] == user_id
    assert who(generate(client, user_id))["level"] == "merged"
    client.delete(path).raise_for_status()


def check_erased(
    client: Client, gateway: GatewayThread, user: str, status: int, error: dict[str, Any], *, known: bool
) -> None:
    """Check that a request was refused, and that of its user only the tombstone is left, of an unknown one nothing."""
    assert (status, error["code"]) == (409, "user_erased")
    assert client.get(f"/users/{user}").status_code == 404
    assert [*dump(gateway, user)] == [f"mta:{{{gateway.key(user)}}}:epoch".encode()] * known


@pytest.mark.parametrize(
    ("method", "known", "waits_at"),
    [
        ("PUT profile", True, "embed"),
        ("PUT profile", False, "embed"),
        ("POST profile/items", True, "embed"),
        ("POST adapt", False, "embed"),  # adapting embeds only for users without a profile
        ("POST adapt", True, "submit"),
    ],
)
def test_a_write_in_progress_does_not_bring_an_erased_user_back(
    client: Client, gateway: GatewayThread, new_user: NewUser, monkeypatch: pytest.MonkeyPatch, *, method: str,
    known: bool, waits_at: str,
) -> None:  # fmt: skip
    user, reached, erased = new_user(), threading.Event(), threading.Event()
    if known:
        put(client, user, [{"text": "something else"}])
    embedder, jobs = gateway.parts.profiles.embedder, gateway.parts.adapting.jobs
    embed, submit = embedder.embed, jobs.submit

    def wait() -> None:
        reached.set()
        assert erased.wait(30)

    async def later(*arguments: Any) -> Any:
        await asyncio.to_thread(wait)
        return await submit(*arguments)

    if waits_at == "submit":
        monkeypatch.setattr(jobs, "submit", later)
    else:
        monkeypatch.setattr(embedder, "embed", lambda texts: (wait(), embed(texts))[1])
    verb, _, path = method.partition(" ")
    request = partial(client.request, verb, f"/users/{user}/{path}", json=BODIES[path])
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(request)
        assert reached.wait(30)
        assert client.delete(f"/users/{user}").status_code in (200, 404)
        erased.set()
        answer = answering.result()
    check_erased(client, gateway, user, answer.status_code, answer.json()["error"], known=known)
    assert answer.headers["X-Should-Retry"] == "false"  # else OpenAI's clients bring the user back
    request().raise_for_status()  # a user may come back


@pytest.mark.parametrize(
    ("method", "known"), [("PUT profile", True), ("POST profile/items", False), ("POST adapt", True)]
)
def test_body_ending_after_the_erasure_stores_nothing(
    client: Client, gateway: GatewayThread, new_user: NewUser, *, method: str, known: bool
) -> None:
    user = new_user()
    if known:
        put(client, user, [{"text": "something else"}])
    verb, _, path = method.partition(" ")
    body = json.dumps(BODIES[path]).encode()
    line = f"{verb} /users/{user}/{path}"
    with gateway.send(line, b"", "Expect: 100-continue\r\n", len(body)) as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100")  # the gateway now waits for the body
        assert client.delete(f"/users/{user}").status_code == (200 if known else 404)
        connection.sendall(body)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        check_erased(client, gateway, user, answer.status, json.loads(answer.read())["error"], known=known)


def test_the_file_is_asked_to_forget_before_anything_is_erased(
    client: Client, gateway: GatewayThread, ada: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(user_key: str) -> None:
        raise Unavailable("the store cannot be used now")

    with monkeypatch.context() as patched:
        patched.setattr(gateway.parts.erasing.stores.file, "announce", away)
        assert client.delete(f"/users/{ada}").status_code == 503
    assert client.get(f"/users/{ada}").status_code == 200
    assert client.delete(f"/users/{ada}").raise_for_status().json()["erased"]["items"] == 3
