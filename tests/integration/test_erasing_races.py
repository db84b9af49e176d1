"""Erasing is a barrier: what was under way when a user was erased stores nothing of them, and is told so."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import redis

from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable
from tests.support.gateway import GatewayThread

ITEMS = {"items": [{"text": "up at five for the waves"}]}
SAMPLES = {"samples": [{"input": f"question {n}", "output": f"{n} yes"} for n in range(3)]}


class Gate:
    """A place where a request waits until the test lets it go on."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.reached.set()
        assert self.opened.wait(30)


def erased_while(gate: Gate, client: httpx.Client, user: str, request: Callable[[], httpx.Response]) -> httpx.Response:
    """The answer to a request during which its user is erased."""
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(request)
        assert gate.reached.wait(30)
        assert client.delete(f"/users/{user}").status_code in (httpx.codes.OK, httpx.codes.NOT_FOUND)
        gate.opened.set()
        return answering.result()


def left_of(gateway: GatewayThread, valkey: ValkeyProcess, user: str) -> list[bytes]:
    """The last parts of the names of all keys that hold something of a user."""
    with redis.Redis.from_url(valkey.url) as raw:
        return [name.rpartition(b":")[2] for name in raw.scan_iter(f"mta:{{{gateway.key(user)}}}:*")]


def refused(answer: httpx.Response) -> bool:
    return (answer.status_code, answer.json().get("error", {}).get("code")) == (httpx.codes.CONFLICT, "user_erased")


@pytest.mark.parametrize(
    ("method", "known"),
    # To adapt embeds for whoever has no profile alone.
    [("PUT profile", True), ("PUT profile", False), ("POST profile/items", True), ("POST adapt", False)],
)
def test_a_write_that_waits_for_the_embedder_does_not_bring_an_erased_user_back(
    client: httpx.Client, gateway: GatewayThread, valkey: ValkeyProcess, new_user: Callable[[], str], *, known: bool,
    method: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    user = new_user()
    if known:
        client.put(f"/users/{user}/profile", json={"items": [{"text": "something else"}]}).raise_for_status()
    gate, embedder = Gate(), gateway.parts.profiles.embedder
    embed = embedder.embed
    monkeypatch.setattr(embedder, "embed", lambda texts: (gate.wait(), embed(texts))[1])
    verb, _, path = method.partition(" ")
    body = SAMPLES if path == "adapt" else ITEMS
    answer = erased_while(gate, client, user, lambda: client.request(verb, f"/users/{user}/{path}", json=body))
    assert refused(answer)
    assert client.get(f"/users/{user}").status_code == httpx.codes.NOT_FOUND
    assert left_of(gateway, valkey, user) == [b"epoch"]


@pytest.mark.parametrize(
    ("method", "known"), [("PUT profile", True), ("POST profile/items", False), ("POST adapt", True)]
)
def test_a_body_that_ends_after_its_user_was_erased_stores_nothing(
    client: httpx.Client, gateway: GatewayThread, valkey: ValkeyProcess, new_user: Callable[[], str], *, known: bool,
    method: str,
) -> None:  # fmt: skip
    user = new_user()
    if known:
        client.put(f"/users/{user}/profile", json={"items": [{"text": "something else"}]}).raise_for_status()
    verb, _, path = method.partition(" ")
    body = json.dumps(SAMPLES if path == "adapt" else ITEMS).encode()
    head = f"{verb} /users/{user}/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as connection:
        connection.sendall(f"{head}Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n".encode())
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 100")  # from here on the body is awaited
        assert client.delete(f"/users/{user}").status_code == (httpx.codes.OK if known else httpx.codes.NOT_FOUND)
        connection.sendall(body)
        with connection.makefile("rb") as answer:
            assert answer.readline() == b"HTTP/1.1 409 Conflict\r\n"
            headers = http.client.parse_headers(answer)
            error = json.loads(answer.read(int(headers["Content-Length"])))["error"]
    assert error["code"] == "user_erased"
    assert client.get(f"/users/{user}").status_code == httpx.codes.NOT_FOUND
    assert left_of(gateway, valkey, user) == [b"epoch"]


def test_samples_that_arrive_after_their_user_was_erased_are_not_stored(
    client: httpx.Client, gateway: GatewayThread, valkey: ValkeyProcess, ada: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, jobs = Gate(), gateway.parts.adapting.jobs
    submit = jobs.submit

    async def later(*arguments: Any) -> Any:
        await asyncio.to_thread(gate.wait)
        return await submit(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(jobs, "submit", later)
        assert refused(erased_while(gate, client, ada, lambda: client.post(f"/users/{ada}/adapt", json=SAMPLES)))
    assert left_of(gateway, valkey, ada) == [b"epoch"]
    client.post(f"/users/{ada}/adapt", json=SAMPLES).raise_for_status()  # who comes back is welcome


def test_the_file_is_asked_to_forget_before_anything_is_erased(
    client: httpx.Client, gateway: GatewayThread, ada: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that dies after erasing has asked; one that cannot ask has erased nothing."""

    async def away(user_key: str) -> None:
        raise Unavailable("the store cannot be used now")

    with monkeypatch.context() as patched:
        patched.setattr(gateway.parts.erasing.log_file, "request_rewrite", away)
        assert client.delete(f"/users/{ada}").status_code == httpx.codes.SERVICE_UNAVAILABLE
    assert client.get(f"/users/{ada}").status_code == httpx.codes.OK
    answer = client.delete(f"/users/{ada}").raise_for_status().json()
    assert answer["erased"]["items"] == 3
