"""Connections of the real server before small apps: how responses are sent, and how a server stops."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from unittest.mock import MagicMock

import pytest
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.server import ServerState

from server.gateway.http import serving
from server.gateway.http.serving import GatewayServer, allow_connections, uvicorn_config
from server.gateway.operating.metrics import Metrics
from server.gateway.operating.middleware import RequestLog
from server.observability import open_tracing
from server.settings import Settings

App = Callable[[Any, Any, Any], Awaitable[None]]
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def streaming(*pieces: bytes) -> App:
    """An app whose responses have these pieces and no length."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})

    return app


@asynccontextmanager
async def started(app: App, **options: object) -> AsyncIterator[tuple[GatewayServer, socket.socket]]:
    """A server and its listener; `options` are those of its connections."""
    settings = Settings(drain_s=5)
    config = uvicorn_config(app, settings)  # type: ignore[arg-type]
    config.http.keywords.update(options)  # type: ignore[union-attr]
    config.load()
    server = GatewayServer(config)
    server.lifespan = config.lifespan_class(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await server.startup([listener])
        yield server, listener
        for connection in server.server_state.connections:
            connection.transport.abort()
        for each in server.servers:
            each.close()


async def everything(reader: asyncio.StreamReader) -> bytes:
    """What comes until the other side hangs up."""
    received = b""
    with suppress(ConnectionError):
        while piece := await reader.read(1 << 16):
            received += piece
    return received


async def until(predicate: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not predicate():
            await asyncio.sleep(0.005)


class Clock:
    """An event loop whose time passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._calls: list[tuple[float, Callable[..., object], tuple[object, ...]]] = []

    def time(self) -> float:
        return self.now_s

    def call_later(self, after_s: float, call: Callable[..., object], *given: object) -> MagicMock:
        self._calls.append((self.now_s + after_s, call, given))
        return MagicMock()

    def pass_on(self) -> None:
        """Go to the time of the next call."""
        self.now_s, call, given = self._calls.pop(0)
        call(*given)


@pytest.fixture
def attentive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that looks often whether a client reads."""
    monkeypatch.setattr(serving, "CHECK_SENDING_S", 0.1)


class TestResponses:
    @pytest.mark.parametrize(
        ("version", "body"), [("1.0", b"one, two"), ("1.1", b"5\r\none, \r\n3\r\ntwo\r\n0\r\n\r\n")]
    )
    async def test_a_stream_has_chunks_where_the_client_knows_them(self, version: str, body: bytes) -> None:
        async with started(streaming(b"one, ", b"two")) as (_, listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(f"GET / HTTP/{version}\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            head, _, content = (await everything(reader)).partition(b"\r\n\r\n")
        assert content == body
        assert b"\r\nconnection: close" in head
        assert (b"transfer-encoding" in head) is (version == "1.1")

    @pytest.mark.usefixtures("attentive")
    async def test_who_stops_reading_is_counted_as_gone(self) -> None:
        metrics, stream = Metrics(), streaming(*[b"x" * (1 << 20)] * 8)
        app = RequestLog(stream, metrics, open_tracing(Settings(), "test"))
        async with started(app, send_timeout_s=0.2) as (_, listener):
            _, writer = await asyncio.open_connection(*listener.getsockname(), limit=1)
            writer.write(GET)
            await until(lambda: b"mta_requests_total{" in metrics.text())
            assert b'status="499"} 1.0' in metrics.text()
            writer.transport.abort()

    @pytest.mark.usefixtures("attentive")
    async def test_what_is_cut_after_its_request_has_ended_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        async with started(streaming(b"x" * (8 << 20)), send_timeout_s=0.2) as (_, listener):
            _, writer = await asyncio.open_connection(*listener.getsockname(), limit=1)
            with caplog.at_level(logging.WARNING):
                writer.write(GET)
                await until(lambda: "stopped reading" in caplog.text)
            writer.transport.abort()

    @pytest.mark.parametrize(("read_bytes", "is_cut"), [(1, False), (0, True)])
    def test_only_a_buffer_that_does_not_fall_is_cut(self, read_bytes: int, is_cut: bool) -> None:
        transport, clock = MagicMock(), Clock()
        transport.get_write_buffer_size.return_value = 1 << 20
        config = uvicorn_config(streaming(), Settings(send_timeout_s=60))  # type: ignore[arg-type]
        config.load()
        made: Any = config.http_protocol_class(config=config, server_state=ServerState(), app_state={}, _loop=clock)
        made.transport, made.flow = transport, FlowControl(transport)
        made.pause_writing()
        while clock.now_s < 90 and not transport.abort.called:
            transport.get_write_buffer_size.return_value -= read_bytes
            clock.pass_on()
        assert transport.abort.called is is_cut
        assert clock.now_s == (60 if is_cut else 90)


class TestConnections:
    async def test_too_many_cost_the_one_that_is_idle_for_longest(self) -> None:
        async with started(streaming(b"here"), limit=2) as (server, listener):
            place = listener.getsockname()
            used, silent = [await asyncio.open_connection(*place) for _ in range(2)]
            await until(lambda: len(server.server_state.connections) == 2)
            used[1].write(GET)
            await used[0].readuntil(b"0\r\n\r\n")
            third = await asyncio.open_connection(*place)
            assert await everything(silent[0]) == b""
            for reader, writer in (used, third):
                writer.write(GET)
                assert b"here" in await reader.readuntil(b"0\r\n\r\n")

    @pytest.mark.parametrize(("hard", "soft", "number"), [(1024, 1024, 512), (8192, 4000, 2000)])
    def test_files_are_allowed_for_all_that_are_meant(
        self, monkeypatch: pytest.MonkeyPatch, hard: int, soft: int, number: int
    ) -> None:
        limits = [(256, hard)]
        monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
        monkeypatch.setattr(resource, "setrlimit", lambda which, both: limits.append(both))
        assert allow_connections() == number
        assert limits[-1] == (soft, hard)


class TestStopping:
    async def test_what_has_connected_is_accepted(self) -> None:
        async with started(streaming(b"here")) as (server, listener):
            with socket.create_connection(listener.getsockname()) as client:  # no turn of the loop until it stops
                client.sendall(GET)
                await server.shutdown([listener])
                answer = client.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer

    async def test_a_first_request_may_still_come(self) -> None:
        async with started(streaming(b"here")) as (server, listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            await until(lambda: server.server_state.connections)
            stopping = asyncio.create_task(server.shutdown([listener]))
            await until(lambda: listener.fileno() < 0)
            writer.write(GET)
            answer = await everything(reader)
            await stopping
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer

    @pytest.mark.parametrize("sent", [b"", GET[:20]])
    async def test_one_that_does_not_come_in_time_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, sent: bytes
    ) -> None:
        monkeypatch.setattr(serving, "LAST_READ_S", 0.05)
        async with started(streaming(b"here")) as (server, listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(sent)
            await until(lambda: server.server_state.connections)
            stopping = asyncio.create_task(server.shutdown([listener]))
            answer = await everything(reader)
            writer.close()
            await stopping
        assert answer.startswith(b"HTTP/1.1 503")
        assert b'"code":"stopping"' in answer
        assert b"connection: close" in answer

    async def test_what_takes_longer_than_it_waits_is_refused(self) -> None:
        metrics, asked = Metrics(), asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            asked.set()
            await asyncio.Event().wait()

        async with started(RequestLog(app, metrics, open_tracing(Settings(), "test"))) as (server, listener):
            server.config.timeout_graceful_shutdown = 0
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(GET)
            await asked.wait()
            await server.shutdown([listener])
            answer = await everything(reader)
        assert answer.startswith(b"HTTP/1.1 503")
        assert b'"code":"stopping"' in answer
        assert b'status="503"} 1.0' in metrics.text()

    async def test_idle_connections_do_not_delay_it(self) -> None:
        async with started(streaming(b"here")) as (server, listener):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(GET)
            await reader.readuntil(b"0\r\n\r\n")
            (connection,) = server.server_state.connections
            connection.shutdown()
            assert await everything(reader) == b""
