"""Erasing is a barrier: a request in progress when its user is erased stores nothing and gets 409."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import redis
from httpx import Client, Response

from server.errors import Unavailable
from tests.support.calls import NewUser, put
from tests.support.gateway import GatewayThread

ITEMS = [{"text": "up at five for the waves"}]
BODIES = {
    "profile": {"items": ITEMS},
    "profile/items": {"items": ITEMS},
    "adapt": {"samples": [{"input": f"question {n}", "output": f"{n} yes"} for n in range(3)]},
}


class Gate:
    """A place where a request waits until the test lets it go on."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.reached.set()
        assert self.opened.wait(30)


def erased_while(gate: Gate, client: Client, user: str, request: Callable[[], Response]) -> Response:
    """The answer to a request whose user is erased while it waits at the gate."""
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(request)
        assert gate.reached.wait(30)
        assert client.delete(f"/users/{user}").status_code in (200, 404)
        gate.opened.set()
        return answering.result()


def check_erased(client: Client, gateway: GatewayThread, user: str, status: int, error: dict[str, Any]) -> None:
    """Check that a request was refused, and that of its user only the tombstone is left."""
    assert (status, error["code"]) == (409, "user_erased")
    assert client.get(f"/users/{user}").status_code == 404
    key = gateway.key(user)
    with redis.Redis.from_url(gateway.parts.settings.redis_url) as raw:
        assert list(raw.scan_iter(f"mta:{{{key}}}:*")) == [f"mta:{{{key}}}:epoch".encode()]


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
    user, gate = new_user(), Gate()
    if known:
        put(client, user, [{"text": "something else"}])
    embedder, jobs = gateway.parts.profiles.embedder, gateway.parts.adapting.jobs
    embed, submit = embedder.embed, jobs.submit

    async def later(*arguments: Any) -> Any:
        await asyncio.to_thread(gate.wait)
        return await submit(*arguments)

    if waits_at == "submit":
        monkeypatch.setattr(jobs, "submit", later)
    else:
        monkeypatch.setattr(embedder, "embed", lambda texts: (gate.wait(), embed(texts))[1])
    verb, _, path = method.partition(" ")
    request = partial(client.request, verb, f"/users/{user}/{path}", json=BODIES[path])
    answer = erased_while(gate, client, user, request)
    check_erased(client, gateway, user, answer.status_code, answer.json()["error"])
    request().raise_for_status()  # a user may come back


@pytest.mark.parametrize(
    ("method", "known"), [("PUT profile", True), ("POST profile/items", False), ("POST adapt", True)]
)
def test_a_body_that_ends_after_its_user_was_erased_stores_nothing(
    client: Client, gateway: GatewayThread, new_user: NewUser, *, method: str, known: bool
) -> None:
    user = new_user()
    if known:
        put(client, user, [{"text": "something else"}])
    verb, _, path = method.partition(" ")
    body = json.dumps(BODIES[path]).encode()
    head = f"{verb} /users/{user}/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as connection:
        connection.sendall(f"{head}Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100")  # the gateway now waits for the body
        assert client.delete(f"/users/{user}").status_code == (200 if known else 404)
        connection.sendall(body)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        check_erased(client, gateway, user, answer.status, json.loads(answer.read())["error"])


def test_the_file_is_asked_to_forget_before_anything_is_erased(
    client: Client, gateway: GatewayThread, ada: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a gateway that dies after erasing has asked."""

    async def away(user_key: str) -> None:
        raise Unavailable("the store cannot be used now")

    with monkeypatch.context() as patched:
        patched.setattr(gateway.parts.erasing.log_file, "request_rewrite", away)
        assert client.delete(f"/users/{ada}").status_code == 503
    assert client.get(f"/users/{ada}").status_code == 200
    assert client.delete(f"/users/{ada}").raise_for_status().json()["erased"]["items"] == 3
