"""Where a request ends and the next one begins: bodies that look like requests, sent to the real server's protocol."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import uvicorn
from fastapi import FastAPI
from hypothesis import example, given, settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from server.gateway.http.serving import uvicorn_config
from server.settings import Settings

HIDDEN = b"DELETE /users/victim HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN)
NEXT = b"GET /next HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
LENGTH, EMPTY, CHUNKS = (
    (b"Content-Length: %d" % len(HIDDEN),),
    (b"Content-Length: 0",),
    (b"Transfer-Encoding: chunked",),
)
UNCLEAR = (
    *(LENGTH + CHUNKS, CHUNKS + LENGTH, EMPTY + CHUNKS, CHUNKS + EMPTY),
    *(LENGTH + LENGTH, LENGTH + EMPTY, EMPTY + LENGTH, CHUNKS + CHUNKS),
    (b"Content-Length: 0, %d" % len(HIDDEN),),
    (*CHUNKS, b"Transfer-Encoding: identity"),
    (b"Transfer-Encoding: chunked, identity",),
    (b"Transfer-Encoding: xchunked",),
)
UPGRADES = (
    (b"Connection: Upgrade", b"Upgrade: h2c"),
    (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA"),
    (b"upgrade: websocket", b"connection: keep-alive, upgrade", b"Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw=="),
    (b"Connection: close, Upgrade", b"Upgrade: TLS/1.0, HTTP/1.1"),
    (b"Connection: Upgrade", b"Upgrade: a", b"Upgrade: b"),
)


class Sent(NamedTuple):
    """A request whose body is a request."""

    framing: tuple[bytes, ...]
    upgrade: tuple[bytes, ...] = ()
    line: bytes = b"POST /first HTTP/1.1"
    other: bytes = b"Accept: */*"

    @property
    def raw(self) -> bytes:
        lines = (self.line, b"Host: localhost", *self.upgrade, self.other, *self.framing)
        return b"\r\n".join(lines) + b"\r\n\r\n" + (CHUNKED if CHUNKS[0] in self.framing else HIDDEN)


REQUESTS = st.builds(
    Sent,
    st.sampled_from([LENGTH, CHUNKS, *UNCLEAR]),
    st.sampled_from([(), *UPGRADES]),
    st.sampled_from(
        [b"POST /first", b"GET /first", b"CONNECT localhost:80", b"CONNECT http://localhost/first"]
    ).flatmap(lambda start: st.sampled_from([start + b" HTTP/1.1", start + b" HTTP/1.0"])),
    st.sampled_from([b"Accept: */*", b"Expect: 100-continue", b"Connection: keep-alive", b"Connection: close"]),
)


class Noting:
    """An app that notes requests, and reads their bodies or answers at once."""

    def __init__(self, *, reads: bool) -> None:
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self._reads = reads

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.requests.append(f"{scope['method']} {scope['path']}")
        body, more = b"", self._reads
        while more and (message := await receive())["type"] == "http.request":
            body, more = body + message["body"], message["more_body"]
        if not more:
            self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})


@cache
def loaded_config() -> uvicorn.Config:
    config = uvicorn_config(FastAPI(), Settings())
    config.load()
    return config


async def answer_to(sent: bytes, cut: int, app: Noting) -> bytes:
    """The first head that answers these bytes, of which `cut` are a packet of their own; another request follows."""
    config = loaded_config()
    made: Any = config.http_protocol_class(config=config, server_state=ServerState(), app_state={})
    made.app = app
    left, parse = 0, made.data_received

    def data_received(data: bytes) -> None:
        nonlocal left
        left -= len(data)
        parse(data)

    made.data_received = data_received
    server = await asyncio.get_running_loop().create_server(lambda: made, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    answer = b""
    with suppress(ConnectionError, asyncio.IncompleteReadError):
        for piece in filter(None, (sent[:cut], sent[cut:])):
            left = len(piece)
            writer.write(piece)
            while left and not (made.transport and made.transport.is_closing()):
                await asyncio.sleep(0)
        while not answer or b" 100 " in answer:
            answer = await reader.readuntil(b"\r\n\r\n")
        writer.write(NEXT)
        await reader.read()
    writer.transport.abort()
    server.close()
    return answer


@given(sent=REQUESTS, share=st.floats(0, 1), reads=st.booleans())
@settings(max_examples=150)
@example(sent=Sent(LENGTH, UPGRADES[0]), share=0, reads=True)
def test_nothing_of_a_body_is_a_request(sent: Sent, share: float, reads: bool) -> None:
    app, raw = Noting(reads=reads), sent.raw
    answer = asyncio.run(answer_to(raw, round(share * len(raw)), app))
    first = sent.line.partition(b" HTTP")[0].decode()
    if sent.framing in UNCLEAR or first.startswith("CONNECT"):
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
        assert app.requests in ([], [first])
        assert app.bodies in ([], [b""])
    else:
        assert answer.startswith(b"HTTP/1.1 200")
        assert app.requests in ([first], [first, "GET /next"])
        assert app.bodies[0] == (HIDDEN if reads else b"")
