"""What requests smuggle: recipes, headers, paths, sizes."""

from __future__ import annotations

import socket

import httpx
import pytest

from tests.support.fake_engine import KEY, FakeEngine
from tests.support.gateway import Keyed

OWN_HEADERS = {"host", "content-type", "content-length", "accept", "authorization", "x-request-id", "x-session-id"}


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
    acme.post("/generate", json={"user_id": "ada", "prompt": "x", "max_tokens": 1}, headers=sent).raise_for_status()
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
def test_what_is_too_long_is_refused(keyed: Keyed, stranger: httpx.Client, request_of: object, status: int) -> None:
    given = {"json": {"prompt": "x", "max_tokens": 1}} | request_of(keyed.secrets["acme"])  # type: ignore[operator]
    assert stranger.post("/v1/completions", **given).status_code == status
