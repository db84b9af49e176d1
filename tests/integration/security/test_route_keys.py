"""Every route, and every key that must not open it."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import Route

from server.cli.run import up
from server.gateway.access.keys import KnownKeys
from server.gateway.access.routes import KINDS, OPEN, ROUTES, guard
from server.store.tenants.access_keys import new_secret
from tests.integration.security.conftest import KEYS, ask
from tests.support.gateway import GatewayThread, Keyed

CLOSED = [route for route, scope in ROUTES.items() if scope is not OPEN]
OPENED = [route for route, scope in ROUTES.items() if scope is OPEN]


def code_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_the_table_has_every_route_and_no_other(keyed: Keyed) -> None:
    routes = [route for route in keyed.gateway.app.routes if isinstance(route, Route)]
    assert len(routes) == len(keyed.gateway.app.routes)
    names = {f"{method} {route.path}" for route in routes for method in route.methods or () if method != "HEAD"}
    assert names == set(ROUTES) >= KINDS.keys()


def test_a_route_that_nobody_put_into_the_table_is_not_served() -> None:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route("/new", lambda: None)
    with pytest.raises(KeyError, match="GET /new"):
        guard(app, KnownKeys("default"), 1, lambda reason: None)


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
        assert ('-H "Authorization: Bearer $MTA_API_KEY"' in up.welcome(one.url)) is wanted


@pytest.mark.parametrize("route", CLOSED)
class TestClosed:
    def test_without_a_valid_key(self, keyed: Keyed, stranger: httpx.Client, route: str) -> None:
        wrong = {"Authorization": f"Bearer {new_secret()}"}
        for headers, code in (({}, "missing"), (wrong, "invalid"), (keyed.header("revoked"), "revoked")):
            refused = ask(stranger, route, headers)
            assert code_of(refused) == (401, f"{code}_api_key")
            assert refused.headers["www-authenticate"] == "Bearer"

    def test_by_its_own_scope_alone(self, keyed: Keyed, stranger: httpx.Client, route: str) -> None:
        refused = ask(stranger, route, keyed.header(f"no {ROUTES[route]}"))
        assert code_of(refused) == (403, "missing_scope")
        assert f"--scope {ROUTES[route]}" in refused.json()["error"]["message"]
        assert ask(stranger, route, keyed.header(f"only {ROUTES[route]}")).status_code not in (401, 403)

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
@pytest.mark.parametrize("route", OPENED)
def test_open_routes_do_not_reveal_parts(keyed: Keyed, stranger: httpx.Client, route: str, key: str | None) -> None:
    answer = ask(stranger, route, keyed.header(key) if key else {})
    assert answer.status_code in (200, 307, 503)
    bank = keyed.gateway.parts.bank.manifest
    for told in (bank.fingerprint, bank.embedder.id, keyed.gateway.parts.settings.engine_url):
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


@pytest.mark.parametrize("key", [name for name in KEYS if name.startswith("only")])
def test_a_body_is_not_awaited_for_a_key_that_may_not_send_it(keyed: Keyed, key: str) -> None:
    with keyed.send(key, "PUT /users/ada/profile", b"", length=8_000_000) as connection:
        if key == "only write":
            connection.settimeout(0.2)
            with pytest.raises(TimeoutError):
                connection.recv(1)
        else:
            assert connection.recv(64).startswith(b"HTTP/1.1 403")
