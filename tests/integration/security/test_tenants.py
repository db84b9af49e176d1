"""One tenant can neither read, serve, adapt, erase nor learn of another's user, whatever the user is called."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest

from server.store.tenants.user_key import UserKeys
from tests.integration.security.conftest import ask
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import SECRET, Keyed, generate

ITEMS = {"items": [{"text": "Dear friend,\nThe first roses are open along the south wall."}]}


def job_of(client: httpx.Client, user_id: str) -> str:
    """The id of a new job."""
    return str(ask(client, "POST /users/{user_id}/adapt", {}, user_id).raise_for_status().json()["id"])


@pytest.mark.parametrize("path", ["", "/export"])
def test_a_user_of_another_tenant_is_unknown(globex: httpx.Client, shared_name: str, path: str) -> None:
    assert globex.get(f"/users/{shared_name}{path}").status_code == httpx.codes.NOT_FOUND


def test_one_name_in_two_tenants_is_two_users(acme: httpx.Client, globex: httpx.Client, shared_name: str) -> None:
    before = acme.get(f"/users/{shared_name}").json()
    globex.put(f"/users/{shared_name}/profile", json=ITEMS).raise_for_status()
    assert acme.get(f"/users/{shared_name}").json() == before
    theirs = globex.get(f"/users/{shared_name}/export").json()
    assert [item["text"] for item in theirs["items"]] == [ITEMS["items"][0]["text"]]
    assert theirs["samples"] == theirs["jobs"] == []


def test_erasing_a_name_erases_the_tenants_own_user_alone(
    acme: httpx.Client, globex: httpx.Client, shared_name: str
) -> None:
    assert globex.delete(f"/users/{shared_name}").status_code == httpx.codes.NOT_FOUND
    globex.put(f"/users/{shared_name}/profile", json=ITEMS).raise_for_status()
    globex.delete(f"/users/{shared_name}").raise_for_status()
    assert acme.get(f"/users/{shared_name}").status_code == httpx.codes.OK
    assert globex.get(f"/users/{shared_name}").status_code == httpx.codes.NOT_FOUND


@pytest.mark.parametrize("personalize", ["auto", "merged"])
def test_nobody_is_answered_as_another_tenants_user(
    globex: httpx.Client, shared_name: str, fake_engine: FakeEngine, personalize: str
) -> None:
    answer = generate(globex, shared_name, personalize=personalize)
    if personalize == "merged":
        assert answer.status_code == httpx.codes.NOT_FOUND
    else:
        assert answer.json()["personalization"]["level"] == "base"
        assert [seen.body["model"] for seen in fake_engine.seen] == ["base"]


@pytest.mark.parametrize("how", ["field", "header"])
def test_nor_over_openais_routes(globex: httpx.Client, shared_name: str, fake_engine: FakeEngine, how: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "history": 4}
    named = {"user": shared_name} if how == "field" else {}
    headers = {"X-User-ID": shared_name} if how == "header" else {}
    answer = globex.post("/v1/chat/completions", json=body | named, headers=headers)
    assert answer.headers["x-mta-level"] == "base"
    assert "swell" not in json.dumps(fake_engine.seen[-1].body)


@pytest.mark.parametrize("call", ["GET {}", "GET {}/events", "DELETE {}"])
def test_another_tenants_job_is_no_job(acme: httpx.Client, globex: httpx.Client, shared_name: str, call: str) -> None:
    job_id = job_of(acme, shared_name)
    method, path = call.format(f"/jobs/{job_id}").split(" ")
    refused = globex.request(method, path)
    unknown = globex.request(method, path.replace(job_id, f"{'a' * 26}.1"))
    assert refused.status_code == unknown.status_code == httpx.codes.NOT_FOUND
    assert refused.text.replace(job_id, "") == unknown.text.replace(f"{'a' * 26}.1", "")
    assert acme.get(f"/jobs/{job_id}").json()["state"] == "queued"
    assert acme.delete(f"/jobs/{job_id}").json()["state"] == "cancelled"


@pytest.mark.parametrize("route", ["/generate", "/v1/chat/completions", "/v1/completions"])
def test_what_one_tenant_asked_warms_no_prefix_cache_for_another(
    acme: httpx.Client, globex: httpx.Client, fake_engine: FakeEngine, route: str
) -> None:
    """A cache hit needs equal salts, so its timing says something of one's own tenant's prompts alone."""
    for client in (acme, globex, acme):
        ask(client, f"POST {route}", {}).raise_for_status()
    first, other, again = [seen.body["cache_salt"] for seen in fake_engine.seen]
    assert first == again != other
    assert {first, other} == {UserKeys(SECRET, tenant).cache_salt for tenant in ("acme", "globex")}


@pytest.mark.parametrize("field", ["cache_salt", "session_id", "request_id", "kv_transfer_params"])
def test_a_salt_of_anothers_cannot_be_sent(acme: httpx.Client, fake_engine: FakeEngine, field: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], field: UserKeys(SECRET, "globex").cache_salt}
    assert acme.post("/v1/chat/completions", json=body).status_code == httpx.codes.BAD_REQUEST
    assert acme.post("/generate", json={"user_id": "ada", "prompt": "x", field: "y"}).status_code == 400
    assert fake_engine.seen == []


def test_the_names_of_tenants_and_users_never_run_into_each_other() -> None:
    pairs = [("a", "bc"), ("ab", "c"), ("a", "b"), ("default", "a"), ("defaulta", "")]
    assert len({UserKeys(SECRET, tenant).key(user) for tenant, user in pairs}) == len(pairs)


def test_users_of_before_there_were_keys_belong_to_the_tenant_default(
    keyed: Keyed, globex: httpx.Client, new_user: Callable[[], str]
) -> None:
    user_id = new_user()
    with keyed.client("default") as default:
        default.put(f"/users/{user_id}/profile", json=ITEMS).raise_for_status()
    key = UserKeys(SECRET, "default").key(user_id)  # as a gateway without keys names them
    stored = keyed.gateway.parts.tenants.users("default").key(user_id)
    assert (stored, globex.get(f"/users/{user_id}").status_code) == (key, httpx.codes.NOT_FOUND)
