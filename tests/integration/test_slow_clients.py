"""Clients that send slowly, without end, or not to the end, and more of them than can be served."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Any

import pytest

from bank.items.profile import Vectors
from bank.lookup.embedder import Embedder
from bench.rig.processes import wait_until
from server.gateway.http import bodies, serving
from server.gateway.http.bodies import LARGE_AT_ONCE, SMALL_BYTES
from server.settings import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, metric

HEADER_BYTES = 16 << 10
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def gateway(gateway_settings: Settings) -> Iterator[GatewayThread]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(serving, "MAX_HEADER_BYTES", HEADER_BYTES)
        with GatewayThread(gateway_settings) as running:
            yield running


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that does not wait for headers for long."""
    monkeypatch.setattr(serving, "HEADER_TIMEOUT_S", 0.5)


@pytest.fixture
def connection(gateway: GatewayThread) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as connection:
        yield connection


class TestHeaders:
    @pytest.mark.parametrize(
        "head",
        [
            b"GET /health HTTP/1.1\r\nX: " + b"x" * HEADER_BYTES + b"\r\n\r\n",
            b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * (HEADER_BYTES // 6) + b"\r\n",
            b"GET /" + b"x" * HEADER_BYTES + b" HTTP/1.1\r\n\r\n",
        ],
        ids=["one", "many", "path"],
    )
    @pytest.mark.parametrize("piece", [100, 1 << 20])
    def test_too_many_bytes_are_refused(self, connection: socket.socket, head: bytes, piece: int) -> None:
        for start in range(0, len(head), piece):
            with suppress(OSError):
                connection.sendall(head[start : start + piece])
        assert answered(connection) == (431, "headers_too_large")

    def test_the_most_that_is_allowed_is_taken(self, connection: socket.socket) -> None:
        head = GET[:-2] + b"Connection: close\r\nX: "
        connection.sendall(head + b"x" * (HEADER_BYTES - len(head) - 4) + b"\r\n\r\n")
        assert everything(connection).startswith(b"HTTP/1.1 200")

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            (b"GET /health HTTP/1.1\r\nConnection: close\r\nX: ", b"\r\n\r\n"),
            (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: ", b"\r\n\r\n"),
            (POST + b"Transfer-Encoding: chunked\r\n\r\n2;", b"\r\n{}\r\n0\r\n\r\n"),
        ],
        ids=["header", "trailer", "chunk extension"],
    )
    def test_95_mb_are_not_taken(self, connection: socket.socket, before: bytes, after: bytes) -> None:
        with suppress(OSError):
            for piece in (before, *[b"x" * (1 << 20)] * 95, after):
                connection.sendall(piece)
        assert everything(connection)[:12] in (b"", b"HTTP/1.1 431")

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("trickle", [b"", b"X"])
    def test_what_does_not_arrive_in_time_is_refused(self, connection: socket.socket, trickle: bytes) -> None:
        connection.sendall(GET[:-2] + b"X: ")
        trickled(connection, trickle)
        assert answered(connection) == (408, "request_timeout")

    @pytest.mark.usefixtures("impatient")
    def test_a_second_request_is_no_other(self, connection: socket.socket) -> None:
        connection.sendall(GET + b"GET /health")
        trickled(connection, b"x")
        first, _, second = everything(connection).partition(b"HTTP/1.1 408")
        assert first.startswith(b"HTTP/1.1 200")
        assert b"request_timeout" in second

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("sent", [b"", b"\r\n"])
    def test_silence_is_hung_up_on(self, connection: socket.socket, sent: bytes) -> None:
        connection.sendall(sent)
        assert not everything(connection).startswith(b"HTTP/1.1 200")

    def test_connection_is_reused_after_the_clients_idle_limit(self, connection: socket.socket) -> None:
        connection.sendall(GET)
        time.sleep(6)  # httpx, and so OpenAI's client, closes one that is idle for 5 s
        connection.sendall(GET[:-2] + b"Connection: close\r\n\r\n")
        assert everything(connection).count(b"HTTP/1.1 200") == 2

    def test_what_is_no_http_is_refused_in_our_shape(self, connection: socket.socket) -> None:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert answered(connection) == (400, "invalid_http")

    def test_a_thousand_at_once_end_the_connection(self, connection: socket.socket) -> None:
        with suppress(OSError):
            connection.sendall(GET * 1000)
        assert everything(connection).count(b"HTTP/1.1 200") <= 1

    def test_a_second_one_before_the_answer_to_the_first_ends_both(
        self, gateway: GatewayThread, fake_engine: FakeEngine
    ) -> None:
        fake_engine.turn(admit_s=30)
        before = counted(gateway, 499)
        with gateway.send("POST /generate", b'{"user_id": "ada", "prompt": "Hello"}') as connection:
            wait_until(lambda: bool(fake_engine.seen), "the engine to be asked")
            connection.sendall(GET)
            assert everything(connection) == b""
            wait_until(lambda: counted(gateway, 499) == before + 1, "the generation to end")


class TestBodies:
    @pytest.mark.usefixtures("impatient")  # it hangs up soon
    @pytest.mark.parametrize("trickle", [b"", b" "])
    def test_a_late_one_is_refused(
        self, gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch, trickle: bytes
    ) -> None:
        monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.5)
        before = counted(gateway, 408)
        with gateway.send("POST /generate", b"{", length=1000) as connection:
            trickled(connection, trickle)
            assert answered(connection) == (408, "request_timeout")
        wait_until(lambda: counted(gateway, 408) == before + 1, "the request to be counted")

    @pytest.mark.parametrize("size", [0, 10, 100_000])
    def test_an_upload_cut_short(self, gateway: GatewayThread, caplog: pytest.LogCaptureFixture, size: int) -> None:
        before = counted(gateway, 499)
        with caplog.at_level(logging.WARNING):
            gateway.send("POST /generate", b" " * size, length=200_000).close()
            wait_until(lambda: counted(gateway, 499) == before + 1, "the request to be counted")
        assert not [record for record in caplog.records if record.name.startswith("mta")]

    @pytest.mark.usefixtures("impatient")
    def test_one_that_goes_on_after_its_answer_is_hung_up_on(self, connection: socket.socket) -> None:
        connection.sendall(POST.replace(b"json", b"xml") + b"Content-Length: 1000000\r\n\r\n")
        trickled(connection, b" ")
        answer = everything(connection)
        assert answer.startswith(b"HTTP/1.1 415")
        assert answer.count(b"HTTP/1.1") == 1

    def test_large_ones_wait_for_each_other_and_small_ones_do_not(
        self, gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reader, asked, held = gateway.app.state.bodies, list[Any](), list[Any]()
        place, most = reader._large, LARGE_AT_ONCE // 2  # of one caller

        @asynccontextmanager
        async def noted(request: Any) -> AsyncIterator[None]:
            asked.append(request)
            async with place(request):
                held.append(request)
                yield

        def code_of(size: int) -> str:
            return str(client.post("/generate", json={"x": "x" * size}).json()["error"]["code"])

        monkeypatch.setattr(reader, "_large", noted)
        with ThreadPoolExecutor(1) as pool, gateway.client() as client:
            with ExitStack() as others:
                for _ in range(most):
                    others.enter_context(gateway.send("POST /generate", b" " * (SMALL_BYTES + 1), length=200_000))
                wait_until(lambda: len(held) == most, "the others to have their places")
                large = pool.submit(code_of, SMALL_BYTES)
                wait_until(lambda: len(asked) > most, "the next one to ask for a place")
                monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 1.0)
                assert (code_of(1), code_of(SMALL_BYTES), len(held)) == ("missing", "overloaded", most)
            assert large.result() == "missing"


class TestHandlers:
    """What follows a body: the embedder is busy with it."""

    @pytest.fixture
    def embedding(self, gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
        embedder = Held(gateway.parts.profiles.embedder)
        monkeypatch.setattr(gateway.parts.profiles, "embedder", embedder)
        yield embedder
        embedder.gate.set()

    def test_large_body_keeps_its_place_until_its_request_ends(
        self, gateway: GatewayThread, embedding: Held, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("server.gateway.app.LARGE_AT_ONCE", 1)
        with ThreadPoolExecutor(1) as pool, gateway.client() as client:
            first = pool.submit(client.put, "/users/holder/profile", json=large_profile())
            embedding.asked.wait(30)
            monkeypatch.setattr(bodies, "BODY_TIMEOUT_S", 0.3)
            second = client.put("/users/waiter/profile", json=large_profile())
            embedding.gate.set()
            assert first.result().status_code == 200
        assert (second.status_code, second.json()["error"]["code"]) == (503, "overloaded")

    def test_one_that_waits_too_long_is_refused(
        self, gateway: GatewayThread, embedding: Held, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bodies, "HANDLER_TIMEOUT_S", 0.3)
        with gateway.client() as client:
            late = client.put("/users/late/profile", json=large_profile())
            embedding.gate.set()
            assert (late.status_code, late.json()["error"]["code"]) == (503, "overloaded")
            assert int(late.headers["Retry-After"]) > 0
            assert client.get("/users/late").status_code == 404

    def test_a_client_that_leaves_ends_its_work(self, gateway: GatewayThread, embedding: Held) -> None:
        gone = 'mta_requests_total{level="",method="PUT",route="/users/{user_id}/profile",status="499"}'
        with gateway.client() as client:
            before = metric(client, gone)
            with gateway.send("PUT /users/leaver/profile", json.dumps(large_profile()).encode()):
                embedding.asked.wait(30)
            wait_until(lambda: metric(client, gone) == before + 1, "the request to be counted")
            embedding.gate.set()
            assert client.get("/users/leaver").status_code == 404


class TestAnswers:
    @pytest.mark.usefixtures("impatient")
    def test_a_long_stream_goes_on(self, gateway: GatewayThread, fake_engine: FakeEngine, ada: str) -> None:
        fake_engine.knobs.token_delay_s = 0.1
        body = json.dumps({"user_id": ada, "prompt": "x", "max_tokens": 8, "stream": True}).encode()
        with gateway.send("POST /generate", body, "Connection: close\r\n") as connection:
            connection.sendall(b"\r\n")  # some clients do that
            assert b"data: [DONE]" in everything(connection)


class Held:
    """An embedder that waits at a gate."""

    def __init__(self, inner: Embedder) -> None:
        self.id = inner.id
        self.gate, self.asked = threading.Event(), threading.Event()
        self._inner = inner

    def embed(self, texts: Sequence[str]) -> Vectors:
        self.asked.set()
        assert self.gate.wait(30)
        return self._inner.embed(texts)


def large_profile() -> dict[str, Any]:
    return {"items": [{"text": f"{number} {'x' * 20_000}"} for number in range(4)]}


def trickled(connection: socket.socket, byte: bytes) -> None:
    """Send a byte at a time until the other side has had enough."""
    connection.settimeout(0.05)
    with suppress(OSError):
        for _ in range(100):
            connection.sendall(byte)
            with suppress(TimeoutError):
                if connection.recv(1, socket.MSG_PEEK):
                    break
    connection.settimeout(30)


def everything(connection: socket.socket) -> bytes:
    """What comes until the other side hangs up."""
    received = b""
    with suppress(ConnectionResetError):
        while chunk := connection.recv(1 << 16):
            received += chunk
    return received


def answered(connection: socket.socket) -> tuple[int, str]:
    """Status and error code of the answer after which the other side hangs up."""
    head, _, content = everything(connection).partition(b"\r\n\r\n")
    error: dict[str, Any] = json.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error["code"]


def counted(gateway: GatewayThread, status: int) -> float:
    with gateway.client() as client:
        return metric(client, f'mta_requests_total{{level="",method="POST",route="/generate",status="{status}"}}')
