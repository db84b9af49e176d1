"""One tenant can neither read, serve, adapt, erase nor learn of another's user, whatever the user is called."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest

from server.store.tenants.user_key import UserKeys
from tests.integration.security.conftest import ask
from tests.support.calls import HELLO
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import SECRET, Keyed, generate

ITEMS = {"items": [{"text": "Dear friend,\nThe first roses are open along the south wall."}]}


def test_one_name_in_two_tenants_is_two_users(acme: httpx.Client, globex: httpx.Client, shared_name: str) -> None:
    url = f"/users/{shared_name}"
    before = acme.get(url).json()
    assert globex.delete(url).status_code == httpx.codes.NOT_FOUND
    globex.put(f"{url}/profile", json=ITEMS).raise_for_status()
    theirs = globex.get(f"{url}/export").json()
    assert [item["text"] for item in theirs["items"]] == [ITEMS["items"][0]["text"]]
    assert theirs["samples"] == theirs["jobs"] == []
    globex.delete(url).raise_for_status()
    assert globex.get(url).status_code == httpx.codes.NOT_FOUND
    assert acme.get(url).json() == before


def test_no_foreign_profile(globex: httpx.Client, shared_name: str, fake_engine: FakeEngine) -> None:
    assert generate(globex, shared_name, personalize="merged").status_code == httpx.codes.NOT_FOUND
    assert generate(globex, shared_name).json()["personalization"]["level"] == "base"
    for named, headers in (({"user": shared_name}, {}), ({}, {"X-User-ID": shared_name})):
        answer = globex.post("/v1/chat/completions", json=HELLO | {"history": 4} | named, headers=headers)
        assert answer.headers["x-mta-level"] == "base"
    assert {seen.body["model"] for seen in fake_engine.seen} == {"base"}
    assert not any("swell" in json.dumps(seen.body) for seen in fake_engine.seen)


@pytest.mark.parametrize("call", ["GET {}", "GET {}/events", "DELETE {}"])
def test_another_tenants_job_is_no_job(acme: httpx.Client, globex: httpx.Client, shared_name: str, call: str) -> None:
    job_id = ask(acme, "POST /users/{user_id}/adapt", {}, shared_name).raise_for_status().json()["id"]
    method, path = call.format(f"/jobs/{job_id}").split(" ")
    refused = globex.request(method, path)
    unknown = globex.request(method, path.replace(job_id, f"{'a' * 26}.1"))
    assert refused.status_code == unknown.status_code == httpx.codes.NOT_FOUND
    assert refused.text.replace(job_id, "") == unknown.text.replace(f"{'a' * 26}.1", "")
    assert acme.get(f"/jobs/{job_id}").json()["state"] == "queued"
    assert acme.delete(f"/jobs/{job_id}").json()["state"] == "cancelled"


@pytest.mark.parametrize("route", ["/generate", "/v1/chat/completions", "/v1/completions"])
def test_no_shared_prefix_cache(acme: httpx.Client, globex: httpx.Client, fake_engine: FakeEngine, route: str) -> None:
    for client in (acme, globex, acme):
        ask(client, f"POST {route}", {}).raise_for_status()
    first, other, again = [seen.body["cache_salt"] for seen in fake_engine.seen]
    assert first == again != other
    assert {first, other} == {UserKeys(SECRET, tenant).cache_salt for tenant in ("acme", "globex")}


@pytest.mark.parametrize("field", ["cache_salt", "session_id", "request_id", "kv_transfer_params"])
def test_a_salt_of_anothers_cannot_be_sent(acme: httpx.Client, fake_engine: FakeEngine, field: str) -> None:
    body = HELLO | {field: UserKeys(SECRET, "globex").cache_salt}
    assert acme.post("/v1/chat/completions", json=body).status_code == httpx.codes.BAD_REQUEST
    assert acme.post("/generate", json={"user_id": "ada", "prompt": "x", field: "y"}).status_code == 400
    assert fake_engine.seen == []


def test_the_names_of_tenants_and_users_never_run_into_each_other() -> None:
    pairs = [("a", "bc"), ("ab", "c"), ("a", "b"), ("default", "a"), ("defaulta", "")]
    assert len({UserKeys(SECRET, tenant).key(user) for tenant, user in pairs}) == len(pairs)


def test_users_without_keys_belong_to_default(keyed: Keyed, globex: httpx.Client, new_user: Callable[[], str]) -> None:
    user_id = new_user()
    with keyed.client("default") as default:
        default.put(f"/users/{user_id}/profile", json=ITEMS).raise_for_status()
    key = UserKeys(SECRET, "default").key(user_id)  # as a gateway without keys names them
    stored = keyed.gateway.parts.tenants.users("default").key(user_id)
    assert (stored, globex.get(f"/users/{user_id}").status_code) == (key, httpx.codes.NOT_FOUND)
