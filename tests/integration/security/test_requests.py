"""What a request may reach: routes by its key, users of its own tenant, nothing by what it smuggles."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import Mount, Route

from server.cli.run import processes
from server.gateway.access.keys import KnownKeys
from server.gateway.access.routes import OPEN, ROUTES, RouteKind, guard
from server.store.tenants.access_keys import new_secret
from server.store.tenants.user_key import UserKeys
from tests.integration.security.conftest import KEYS, ask
from tests.support.calls import ALL, HELLO, error_of
from tests.support.fake_engine import KEY, FakeEngine
from tests.support.gateway import SECRET, GatewayThread, Keyed, generate
from tests.support.store_parts import StoreParts

CLOSED = {route: scope for route, (scope, _) in ROUTES.items() if scope is not OPEN}
ITEMS = {"items": [{"text": "Dear friend,\nThe first roses are open along the south wall."}]}
OWN_HEADERS = {"host", "content-type", "content-length", "accept", "authorization", "x-request-id", "x-session-id"}


def test_the_table_has_every_route_and_no_other(keyed: Keyed) -> None:
    names = set()
    for route in keyed.gateway.app.routes:
        assert isinstance(route, Route | Mount)
        methods = {"GET"} if isinstance(route, Mount) else route.methods or set()
        names |= {f"{method} {route.path}" for method in methods - {"HEAD"}}
    assert names == set(ROUTES)
    unlimited = (RouteKind.OPERATION, RouteKind.UNLIMITED)
    assert all(kind in unlimited for scope, kind in ROUTES.values() if scope is OPEN)  # there is no key to limit


def test_a_route_that_nobody_put_into_the_table_is_not_served() -> None:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/new", lambda: None)
    with pytest.raises(KeyError, match="GET /new"):
        guard(app, KnownKeys("default"), 1, counted=MagicMock(), refused=MagicMock())


def test_the_document_says_which_routes_want_a_key(stranger: httpx.Client) -> None:
    document = stranger.get("/openapi.json").raise_for_status().json()
    [(name, scheme)] = document["components"]["securitySchemes"].items()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    paths = document["paths"].items()
    said = {f"{method.upper()} {path}": one.get("security") for path, ones in paths for method, one in ones.items()}
    closed = {route.replace(":path", "") for route in CLOSED}
    assert said.keys() >= closed
    assert said == {route: [{name: []}, {}] if route in closed else None for route in said}


def test_mta_up_shows_a_key_in_what_to_try_where_one_is_wanted(keyed: Keyed, gateway: GatewayThread) -> None:
    for one, wanted in ((keyed.gateway, True), (gateway, False)):
        assert ('-H "Authorization: Bearer $MTA_API_KEY"' in processes.welcome(one.url)) is wanted


@pytest.mark.parametrize("route", CLOSED)
class TestClosed:
    def test_without_a_valid_key(self, keyed: Keyed, stranger: httpx.Client, route: str) -> None:
        wrong = {"Authorization": f"Bearer {new_secret()}"}
        for headers, code in (({}, "missing"), (wrong, "invalid"), (keyed.header("revoked"), "revoked")):
            refused = ask(stranger, route, headers)
            assert error_of(refused) == (401, None, f"{code}_api_key")
            assert refused.headers["www-authenticate"] == "Bearer"

    def test_by_its_own_scope_alone(self, keyed: Keyed, stranger: httpx.Client, route: str) -> None:
        refused = ask(stranger, route, keyed.header(f"no {CLOSED[route]}"))
        assert error_of(refused) == (403, None, "missing_scope")
        assert f"--scope {CLOSED[route]}" in refused.json()["error"]["message"]
        assert ask(stranger, route, keyed.header(f"only {CLOSED[route]}")).status_code not in (401, 403)

    def test_with_another_tenant(self, acme: httpx.Client, globex: httpx.Client, shared_name: str, route: str) -> None:
        before = acme.get(f"/users/{shared_name}").json()
        answer = ask(globex, route, {}, shared_name)
        if route.startswith(("GET /users", "DELETE /users", "GET /jobs", "DELETE /jobs")):
            assert answer.status_code == httpx.codes.NOT_FOUND
        assert acme.get(f"/users/{shared_name}").json() == before


@pytest.mark.parametrize("route", [route for route in CLOSED if route.startswith("GET")])
def test_head_is_no_way_around(stranger: httpx.Client, route: str) -> None:
    assert ask(stranger, route.replace("GET", "HEAD"), {}).status_code == httpx.codes.UNAUTHORIZED


@pytest.mark.parametrize("key", [None, "revoked", "acme"])
@pytest.mark.parametrize("route", sorted(ROUTES.keys() - CLOSED.keys()))
def test_open_routes_do_not_reveal_parts(keyed: Keyed, stranger: httpx.Client, route: str, key: str | None) -> None:
    answer = ask(stranger, route, keyed.header(key) if key else {})
    assert answer.status_code in ((404,) if route == "GET /docs/files" else (200, 307, 503))
    bank = keyed.gateway.parts.bank.manifest
    for told in (bank.fingerprint, bank.embedder.id, keyed.gateway.opened.settings.engine_url):
        assert told not in answer.text
    if route in ("GET /health", "GET /ready"):
        assert {name: value for name, value in answer.json().items() if value is not None}.keys() == {"status"}
        assert answer.json()["status"] in ("ok", "ready", "not_ready")


@pytest.mark.parametrize("route", ["GET /health", "GET /ready"])
def test_admin_is_told_of_the_parts(keyed: Keyed, stranger: httpx.Client, route: str) -> None:
    parts = ask(stranger, route, keyed.header("only admin")).json()["parts"]
    assert parts["bank"]["fingerprint"] == keyed.gateway.parts.bank.manifest.fingerprint


def test_a_key_counts_in_its_one_place_alone(keyed: Keyed, stranger: httpx.Client) -> None:
    key = keyed.secrets["acme"]
    for name, value in (
        ("X-API-Key", key),
        ("Cookie", f"Authorization=Bearer {key}"),
        ("Proxy-Authorization", f"Bearer {key}"),
        ("Authorization", f"Basic {key}"),
        ("Authorization", f"Bearer {key}, Bearer {key}"),
        ("Authorization", key),
    ):
        assert stranger.get("/v1/models", headers={name: value}).status_code == httpx.codes.UNAUTHORIZED, name
    assert stranger.get(f"/v1/models?api_key={key}&access_token={key}").status_code == httpx.codes.UNAUTHORIZED
    two = [("Authorization", f"Bearer {keyed.secrets[name]}") for name in ("acme", "globex")]
    assert stranger.get("/v1/models", headers=two).status_code == httpx.codes.UNAUTHORIZED


def test_messages_take_a_key_as_anthropics_clients_send_it(keyed: Keyed, stranger: httpx.Client) -> None:
    key, revoked = (("X-API-Key", keyed.secrets[name]) for name in ("acme", "revoked"))
    bearer = ("Authorization", f"Bearer {keyed.secrets['globex']}")
    for headers, status in (([key], 200), ([key, key], 401), ([revoked], 401), ([revoked, bearer], 200)):
        assert ask(stranger, "POST /v1/messages", headers).status_code == status


@pytest.mark.parametrize("key", [name for name in KEYS if name.startswith("only")])
def test_a_body_is_not_awaited_for_a_key_that_may_not_send_it(keyed: Keyed, key: str) -> None:
    with keyed.send(key, "PUT /users/ada/profile", b"", length=8_000_000) as connection:
        if key == "only write":
            connection.settimeout(0.2)
            with pytest.raises(TimeoutError):
                connection.recv(1)
        else:
            assert connection.recv(64).startswith(b"HTTP/1.1 403")


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


def test_many_jobs_of_one_tenant_delay_anothers_by_one(
    keyed: Keyed, acme: httpx.Client, globex: httpx.Client, new_user: Callable[[], str]
) -> None:
    def job(client: httpx.Client) -> str:
        answer = ask(client, "POST /users/{user_id}/adapt", {}, new_user()).raise_for_status()
        return str(answer.json()["id"])

    async def next_job() -> str:
        async with StoreParts.opened(keyed.gateway.opened.settings.redis_url) as parts:
            found = await parts.jobs.next_job(keyed.gateway.parts.bank.manifest.short, 5)
            assert found
            return str(found)

    many, own = [job(acme) for _ in range(4)], job(globex)
    before = list(iter(lambda: asyncio.run(next_job()), own))
    assert len({*before} & {*many}) <= 1


@ALL
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


def test_tenant_and_user_names_never_make_the_same_key() -> None:
    pairs = [("a", "bc"), ("ab", "c"), ("a", "b"), ("default", "a"), ("defaulta", "")]
    assert len({UserKeys(SECRET, tenant).key(user) for tenant, user in pairs}) == len(pairs)


def test_users_without_keys_belong_to_default(keyed: Keyed, globex: httpx.Client, new_user: Callable[[], str]) -> None:
    user_id = new_user()
    with keyed.client("default") as default:
        default.put(f"/users/{user_id}/profile", json=ITEMS).raise_for_status()
    key = UserKeys(SECRET, "default").key(user_id)  # as a gateway without keys names them
    stored = keyed.gateway.opened.tenants.users("default").key(user_id)
    assert (stored, globex.get(f"/users/{user_id}").status_code) == (key, httpx.codes.NOT_FOUND)


def raw(keyed: Keyed, line: str, headers: bytes = b"", body: bytes = b"") -> bytes:
    """The beginning of what a gateway answers to bytes that no client would send."""
    with socket.create_connection(("127.0.0.1", keyed.gateway.port), timeout=30) as connection:
        head = f"{line} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {keyed.secrets['acme']}\r\n"
        connection.sendall(head.encode() + headers + b"\r\n" + body)
        return connection.recv(1 << 16)


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
@pytest.mark.parametrize("model", ["mta3:{}:shared:a01*1000", "mta3:{}:shared:c:u-{key}.1", "../base", "BASE", " mta"])
def test_recipes_are_refused(keyed: Keyed, acme: httpx.Client, fake_engine: FakeEngine, route: str, model: str) -> None:
    name = model.replace("{key}", "a" * 26).replace("{}", keyed.gateway.parts.bank.manifest.short)
    said = {"prompt": "x"} if route == "completions" else {"messages": [{"role": "user", "content": "x"}]}
    refused = acme.post(f"/v1/{route}", json=said | {"model": name, "max_tokens": 1})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert fake_engine.seen == []


def test_a_clients_headers_do_not_reach_the_engine(keyed: Keyed, acme: httpx.Client, fake_engine: FakeEngine) -> None:
    sent = dict.fromkeys(("X-Session-ID", "X-Request-Id", "Cookie", "X-Forwarded-For", "X-Mine"), "a=b")
    acme.post("/generate", json={"user_id": "kai", "prompt": "x", "max_tokens": 1}, headers=sent).raise_for_status()
    (seen,) = fake_engine.seen
    arrived = {name.lower(): value for name, value in seen.headers.items()}
    assert arrived.keys() <= OWN_HEADERS
    assert arrived["authorization"] == f"Bearer {KEY}"
    assert arrived["x-session-id"] == "base"
    assert arrived["x-request-id"].startswith("gen-")


@pytest.mark.parametrize(
    "lines",
    [
        b"X-User-ID: ada\rX-Evil: 1",
        b"X-User-ID: ada\n X-Evil: 1",
        b"X-User-ID: a\0b",
        b"X-User-ID : ada",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: +5",
        b"Transfer-Encoding: chunked, identity",
    ],
)
def test_what_is_no_clean_header_is_no_request(keyed: Keyed, fake_engine: FakeEngine, lines: bytes) -> None:
    headers = b"Content-Type: application/json\r\n" + lines + b"\r\n"
    answer = raw(keyed, "POST /v1/completions", headers, b"0\r\n\r\n")
    assert answer.split(b" ")[1] in (b"400", b"413"), answer
    assert answer.count(b"content-length:") == 1, "one answer to one request"
    assert fake_engine.seen == []


def test_a_body_after_an_upgrade_is_no_request(keyed: Keyed, acme: httpx.Client, shared_name: str) -> None:
    host = "HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    hidden = f"DELETE /users/{shared_name} {host}Authorization: Bearer {keyed.secrets['acme']}\r\n\r\n".encode()
    upgrade = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
    with keyed.gateway.send("POST /generate", b"", upgrade, length=len(hidden)) as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 401")
        connection.sendall(hidden)
        connection.sendall(f"GET /health {host}\r\n".encode())
        assert b'"ok"' in b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert acme.get(f"/users/{shared_name}").status_code == httpx.codes.OK


@pytest.mark.parametrize("user_id", ["a\r\nX-Evil: 1", "a\nb", "a\x00b"])
def test_no_user_id_becomes_a_header(acme: httpx.Client, fake_engine: FakeEngine, user_id: str) -> None:
    refused = acme.post("/v1/completions", json={"prompt": "x", "user": user_id, "max_tokens": 1})
    assert refused.status_code == httpx.codes.BAD_REQUEST
    assert "x-evil" not in refused.headers
    assert fake_engine.seen == []


@pytest.mark.parametrize("name", ["X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override"])
def test_no_header_changes_the_method(keyed: Keyed, acme: httpx.Client, shared_name: str, name: str) -> None:
    acme.get(f"/users/{shared_name}", headers={name: "DELETE"}).raise_for_status()
    assert acme.get(f"/users/{shared_name}").status_code == httpx.codes.OK


@pytest.mark.parametrize(
    "path",
    [
        *("/console/../../app.py", "/console/%2e%2e/%2e%2e/app.py", "/console/..%2f..%2fapp.py", "/generate/"),
        *("/console/....//....//app.py", "/console/%5c..%5c..%5capp.py", "/console/.%00./app.py", "//example.org/"),
        *("/users/..%2f..%2fmetrics", "/users/%2e%2e/profile", "/jobs/..%2f..%2fmetrics", "/jobs/%2e%2e"),
        *("/v1/../metrics", "/metrics/", "/METRICS", "/metrics%2f", "/./metrics", "/console//etc/passwd"),
    ],
)
def test_no_path_leads_out_of_its_place(keyed: Keyed, path: str) -> None:
    answer = raw(keyed, f"GET {path}")
    assert answer.split(b" ")[1] in (b"400", b"404", b"405"), answer
    assert b"root:" not in answer
    assert b"import" not in answer


def test_no_other_origin_is_let_in(stranger: httpx.Client) -> None:
    asks = {"Origin": "http://anywhere.example", "Access-Control-Request-Method": "POST"}
    for method, path in (("OPTIONS", "/generate"), ("GET", "/health"), ("OPTIONS", "/users/ada")):
        answer = stranger.request(method, path, headers=asks)
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("request_of", "status"),
    [
        (lambda key: {"headers": {"Authorization": f"Bearer {key}" + "x" * 20_000}}, 401),
        (lambda key: {"headers": {"X-Long": "x" * 40_000}}, 431),
        (lambda key: {"params": {"long": "x" * 40_000}}, 431),
        (lambda key: {"headers": {"X-User-ID": "x" * 300, "Authorization": f"Bearer {key}"}}, 400),
    ],
    ids=["key", "header", "query", "user id"],
)
def test_what_is_too_long_is_refused(keyed: Keyed, request_of: Callable[[str], Any], status: int) -> None:
    given = {"json": {"prompt": "x", "max_tokens": 1}} | request_of(keyed.secrets["acme"])
    assert httpx.post(f"{keyed.gateway.url}/v1/completions", **given).status_code == status
